"""From tar shards to batches: ``build_loader`` makes an endless, resumable stream; evaluation reads ``ShardedDataset``
in order."""

from trainer.data.loader import Loader as Loader
from trainer.data.loader import build_loader as build_loader
from trainer.data.reader import SkippedSamples as SkippedSamples
from trainer.data.settings import AugmentSettings as AugmentSettings
from trainer.data.settings import DataSettings as DataSettings
from trainer.data.settings import SourceSettings as SourceSettings
