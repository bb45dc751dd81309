"""Contrastive losses over the global batch, with memory that does not grow with the number of ranks.

    from trainer.losses import SigmoidLoss
    from trainer.core.types import Embeddings

    loss = SigmoidLoss(tile_rows=512, exchange="ring")(Embeddings(image, text, scale, bias))

A recipe's ``loss:`` section chooses by ``name``; a new loss is one file and one line in LOSSES.
"""

from typing import Annotated

from pydantic import Field

from trainer.losses.base import PairLoss
from trainer.losses.distill import AffinityLoss, TaughtLoss
from trainer.losses.global_contrastive import GlobalLoss, GlobalSettings
from trainer.losses.negatives import NegativeSettings, matched_samples
from trainer.losses.queue import QueueLoss, QueueSettings
from trainer.losses.sigmoid import AutoSettings, SigmoidLoss, SigmoidSettings
from trainer.losses.sinkhorn import SinkhornLoss, SinkhornSettings
from trainer.losses.softmax import SoftmaxLoss, SoftmaxSettings
from trainer.losses.topology import PeerLost
from trainer.losses.triplet import TripletLoss, TripletSettings

LossSettings = Annotated[
    AutoSettings
    | SigmoidSettings
    | SoftmaxSettings
    | GlobalSettings
    | QueueSettings
    | SinkhornSettings
    | TripletSettings,
    Field(discriminator="name"),
]
LOSSES: dict[type, type[PairLoss]] = {
    AutoSettings: SigmoidLoss,
    SigmoidSettings: SigmoidLoss,
    SoftmaxSettings: SoftmaxLoss,
    GlobalSettings: GlobalLoss,
    QueueSettings: QueueLoss,
    SinkhornSettings: SinkhornLoss,
    TripletSettings: TripletLoss,
}


def build(settings: LossSettings) -> PairLoss:
    """The loss a recipe asks for, on the default process group."""
    return LOSSES[type(settings)](**settings.arguments())


__all__ = [
    "LOSSES",
    "AffinityLoss",
    "AutoSettings",
    "GlobalLoss",
    "GlobalSettings",
    "LossSettings",
    "NegativeSettings",
    "PairLoss",
    "PeerLost",
    "QueueLoss",
    "QueueSettings",
    "SigmoidLoss",
    "SigmoidSettings",
    "SinkhornLoss",
    "SinkhornSettings",
    "SoftmaxLoss",
    "SoftmaxSettings",
    "TaughtLoss",
    "TripletLoss",
    "TripletSettings",
    "build",
    "matched_samples",
]
