"""The loader as a torch IterableDataset, for other training loops.

pairs = dataset("shards/train", preprocess, batch_size=4096)
for batch in DataLoader(pairs, batch_size=None): ...                # Batch: this rank's rows of each global batch
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from trainer.core import distributed
from trainer.core.settings import parse
from trainer.core.types import Batch, Preprocess, UserError
from trainer.data.loader import build_loader
from trainer.data.settings import DataSettings


class ShardDataset(IterableDataset[Batch]):
    """This rank's part of every global batch. Made by ``dataset``."""

    def __init__(
        self,
        settings: DataSettings,
        preprocess: Preprocess,
        batch_size: int,
        seed: int,
        samples_seen: int,
        samples: int | None,
        rank: int | None,
        world_size: int | None,
    ) -> None:
        super().__init__()
        self.settings, self.preprocess, self.batch_size, self.seed = settings, preprocess, batch_size, seed
        self.samples_seen = samples_seen
        """Sample position after the last batch handed out, in pairs over all ranks: what a checkpoint keeps."""
        self.samples, self._rank, self._world_size = samples, rank, world_size

    def __iter__(self) -> Iterator[Batch]:
        if get_worker_info() is not None:
            raise UserError("ringlip.dataset has its own workers (workers=N): set num_workers=0 in the DataLoader")
        rank = distributed.rank() if self._rank is None else self._rank
        world = distributed.world_size() if self._world_size is None else self._world_size
        if self._finished():
            return
        with build_loader(
            self.settings, self.preprocess, self.batch_size, rank, world, self.seed, self.samples_seen
        ) as loader:
            while not self._finished():
                batch = next(loader)
                self.samples_seen = loader.samples_seen
                yield batch

    def _finished(self) -> bool:
        return self.samples is not None and self.samples_seen >= self.samples

    def state_dict(self) -> dict[str, int]:
        """The sample position, valid for any number of ranks."""
        return {"samples_seen": self.samples_seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Sets the sample position at which the next ``iter`` begins."""
        self.samples_seen = state["samples_seen"]


def dataset(
    shards: str | Path | Sequence[dict[str, Any]],
    preprocess: Preprocess,
    batch_size: int,
    *,
    seed: int = 0,
    samples_seen: int = 0,
    samples: int | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    **data: Any,
) -> ShardDataset:
    """Shards as batches of pixels and tokens, in an order that depends on (seed, epoch) only.

    Any number of ranks and workers reads the same global batches; resuming at ``samples_seen`` is exact. Do not pass it
    to ``accelerator.prepare`` or a sampler: its batches are already this rank's.

    Args:
        shards: a folder or URL of shards, a tar, a pattern of tars, or a list of ``{"path", "weight" | "upsample"}``.
        preprocess: image size, resizing and tokenizer; ``trainer.models`` reads it from a Hugging Face directory.
        batch_size: pairs of the global batch; each rank gets ``batch_size / world_size`` of them.
        samples_seen: sample position to begin at, in pairs over all ranks.
        samples: sample position to end at; None: it never ends.
        rank, world_size: None takes the process group's.
        data: further keys of a recipe's ``data:`` section (``workers``, ``augment``, ``caption``, ...).

    Raises:
        UserError: no such shards, an unknown key, or, when iterated, a batch that does not divide by the ranks or a
            DataLoader with num_workers above 0.
    """
    train = str(shards) if isinstance(shards, str | Path) else list(shards)
    settings = parse(DataSettings, {"train": train, **data}, "ringlip.dataset")
    return ShardDataset(settings, preprocess, batch_size, seed, samples_seen, samples, rank, world_size)
