"""The types that travel between layers. Nothing here knows how they are made or used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from data_tools.io.errors import UserError as UserError


class RunFailed(UserError):
    """A failure of a worker, a peer, a disk, ...: one line too, but starting the same command again may help."""

    code = 1


class PeerLost(RuntimeError):
    """A transfer failed or timed out: the message names the peer and the hop."""


class SharedOutOfMemory(torch.OutOfMemoryError):
    """A rank ran out of memory during an exchange. All ranks complete the exchange, then raise this at the same
    point."""


OUT_OF_MEMORY = ("out of memory", "status_alloc_failed", "cudaerrormemoryallocation", "unhandled cuda error")
"""In out-of-memory messages that do not come from torch's allocator: CUDA's (page-locked host memory, contexts,
graphs), cuBLAS's, cuDNN's and cuSOLVER's (handles, workspaces) and NCCL's (connections)."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether ``error`` means that this rank ran out of memory; a report of another rank's does not count."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error).lower() if isinstance(error, RuntimeError) and not isinstance(error, PeerLost) else ""
    return any(words in text for words in OUT_OF_MEMORY)


class Batch(NamedTuple):
    """One rank's part of a global batch, as the loader makes it.

    ``pixels`` [b, 3, h, w] uint8 (normalised on the device, inside the model), ``tokens`` [b, n] int64, ``token_mask``
    [b, n] bool (True on real tokens), ``ids`` [b] int64 (the sample's number in its dataset: names it in logs),
    ``groups`` [b] int64 (a hash of the caption: pairs of one group are never each other's negatives when the loss is
    told so). Of a tower whose embeddings are stored, ``pixels`` or ``tokens`` are those, [b, k] float16. ``taught``
    [b, 2 d] float16 or float32 are a stored teacher's embeddings of this view of the image and, after them, of this
    caption (``distill.stored``); without one it is empty.
    """

    pixels: Tensor
    tokens: Tensor
    token_mask: Tensor
    ids: Tensor
    groups: Tensor
    taught: Tensor = torch.empty(0)

    @property
    def rows(self) -> int:
        """Pairs in this batch."""
        return self.tokens.shape[0]

    def split(self, rows: int) -> list[Batch]:
        """Micro-batches of at most ``rows`` pairs, views of this batch, in order; the last may be smaller."""
        return [Batch(*(field[start : start + rows] for field in self)) for start in range(0, self.rows, rows)]

    def to(self, device: torch.device) -> Batch:
        """The same batch on ``device``; pinned host memory is copied without waiting."""
        return Batch(*(field.to(device, non_blocking=True) for field in self))


class Embeddings(NamedTuple):
    """The output of a dual encoder for a batch, and the whole input of a loss.

    ``image`` [b, d] and ``text`` [b, d] are L2-normalised (a tower that was not run gives [0, d]); ``scale`` is the
    factor on cosine similarities *after* the exponential (SigLIP's t = exp(t')) and ``bias`` is added to the logits:
    both one element. ``groups`` [b] int64, where given, marks pairs that must not be each other's negatives.
    ``teacher``, where given, has a teacher's embeddings of the same pairs, of its own width and without gradient, or
    those of several teachers (distillation). ``ids`` [b] int64, where given, are the samples' numbers (``Batch.ids``),
    for a loss that remembers something of each sample.
    """

    image: Tensor
    text: Tensor
    scale: Tensor
    bias: Tensor
    groups: Tensor | None = None
    teacher: Embeddings | list[Embeddings] | None = None
    ids: Tensor | None = None


class Loss(Protocol):
    """The mean over ranks of what this returns is the loss of the global batch; the gradient of each rank's embeddings
    is that of the SUM over ranks. Data-parallel averaging of parameter gradients then gives the exact global gradient.
    """

    def __call__(self, z: Embeddings) -> Tensor: ...


@dataclass(frozen=True)
class PrecomputedTower:
    """A locked tower's embeddings as a side-car column of the shards, read in place of the tower's inputs."""

    side: Literal["image", "text"]
    column: str
    """Name of the column."""
    fingerprint: str
    """Of the tower that must have written the column."""
    width: int
    """Numbers in each embedding."""


@dataclass(frozen=True)
class Preprocess:
    """The input format of a model: made by ``trainer.models``, used by ``trainer.data`` (parts do not import each
    other)."""

    image_size: tuple[int, int]
    """Height and width in pixels."""
    resize: Literal["squash", "crop", "patches"]
    """``squash`` changes the aspect (SigLIP); ``crop`` resizes the shorter side and cuts the centre (CLIP); ``patches``
    keeps the aspect and makes a strip of patches (NaFlex, trainer/data/patches.py)."""
    resample: Literal["nearest", "bilinear", "bicubic"]
    mean: tuple[float, float, float]
    """Subtracted from pixels in [0, 1], per channel."""
    std: tuple[float, float, float]
    num_tokens: int
    """Context length: every caption is cut or padded to it."""
    tokenize: Callable[[list[str]], tuple[Tensor, Tensor]]
    """Captions -> (tokens [b, num_tokens] int64, mask [b, num_tokens] bool). Picklable: loader workers call it."""
    precomputed: PrecomputedTower | None = None
    """The tower whose embeddings are read instead of its inputs."""
