"""CLIP's softmax with a queue of past text embeddings as further negatives (MoCo, arXiv 1911.05722; proposed in
openai/CLIP #25).

    loss: {name: queue, size: 65536, width: 768}

Each image's softmax runs over the global batch and the queue; texts see the batch only, as there is no queue of images.
The queue is [size, width] float32, replicated and equal on all ranks: it stores the texts as they pass, without further
traffic. Entries have no gradient, and there is no momentum encoder: they are outputs of the text tower itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from trainer.core.types import UserError
from trainer.losses.softmax import SoftmaxBaseSettings, SoftmaxLoss, exp_minus, lse, merge
from trainer.losses.tiles import Pairs, Tile


class QueueSettings(SoftmaxBaseSettings):
    """Softmax whose images also see a queue of past text embeddings (MoCo)."""

    name: Literal["queue"] = "queue"
    width: int = Field(ge=1)
    """Width of the embeddings."""
    size: int = Field(default=65536, ge=1)
    """Past texts kept on every rank: size x width x 4 bytes."""


class QueueLoss(SoftmaxLoss):
    """InfoNCE with ``size`` past texts as further negatives of the images (MoCo, arXiv 1911.05722).

    Only calls that take gradients, in training mode, fill the queue; before it is full its empty places do not count.
    """

    scale_from_image = True
    queue: Tensor
    taken: Tensor

    def __init__(self, *args: Any, width: int, size: int = 65536, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("queue", torch.zeros(size, width))
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))
        self._replaced: list[tuple[slice, Tensor]] | None = None
        """Rows that were overwritten since ``snapshot``, and what was there, in host memory."""

    def _apply(self, fn: Any, recurse: bool = True) -> QueueLoss:
        taken = self.taken
        super()._apply(fn, recurse)
        self.taken = taken  # on the host: reading it from a device would synchronise
        return self

    def snapshot(self) -> Callable[[], None]:
        """Keeps only what a step overwrites, until the next snapshot."""
        taken = self.taken.clone()
        replaced: list[tuple[slice, Tensor]] = []
        self._replaced = replaced

        def restore() -> None:
            for rows, before in reversed(replaced):
                self.queue[rows].copy_(before)
            replaced.clear()
            self.taken.copy_(taken)

        return restore

    def objective(self, pairs: Pairs, image_gradient: bool, text_gradient: bool) -> Tensor:
        if pairs.image.shape[1] != self.queue.shape[1]:
            raise UserError(
                f"loss.width: the queue is {self.queue.shape[1]} wide, the embeddings {pairs.image.shape[1]}; set "
                f"loss.width to it"
            )
        total = super().objective(pairs, image_gradient, text_gradient)
        if self.training and (image_gradient or text_gradient):
            self.taken.add_(pairs.ring.total_rows)
        return total

    def _with_more_columns(self, pairs: Pairs, rows: Tensor) -> Tensor:
        rows = rows.clone()
        pairs.sweep_constants(
            self._past(), lambda tile: merge(rows[tile.rows], lse(tile.z, 1, pairs.space("values", tile.z)))
        )
        return rows

    def _more_gradient(self, pairs: Pairs, rows: Tensor, share: Tensor, image_gradient: bool) -> None:
        if image_gradient:
            pairs.sweep_constants(
                self._past(), lambda tile: exp_minus(tile.z, rows[tile.rows, None], share[tile.rows, None] / 2), True
            )

    def _past(self) -> Tensor:
        return self.queue[: min(int(self.taken), self.queue.shape[0])]

    def _gradient(self, pairs: Pairs, tile: Tile, *args: Any) -> None:
        super()._gradient(pairs, tile, *args)
        if self.training and tile.rows.start == 0:
            self._take_in(pairs, tile)

    def _take_in(self, pairs: Pairs, tile: Tile) -> None:
        """Stores the tile's texts by their position in the global batch: the same on all ranks, in whatever order they
        pass."""
        size = self.queue.shape[0]
        first = sum(pairs.ring.rows[: tile.owner]) + tile.columns.start
        skip = max(0, pairs.ring.total_rows - size - first)  # of a batch larger than the queue, the last stay
        texts, place = tile.texts[skip:], (int(self.taken) + first + skip) % size
        while texts.shape[0]:
            part = texts[: size - place]
            rows = slice(place, place + part.shape[0])
            if self._replaced is not None:
                self._replaced.append((rows, self.queue[rows].to("cpu", non_blocking=True, copy=True)))
            self.queue[rows] = part.to(self.queue.dtype)
            texts, place = texts[part.shape[0] :], 0
