"""All pairs of a global batch, one tile of logits at a time.

A tile is made by a matrix product, turned in place into the gradient of the loss with respect to the logits, multiplied
into the image and text gradients, and overwritten by the next. The forward pass therefore already holds the gradient,
and backward multiplies it by the incoming scalar. Logits, their functions and all sums are float32 (float64 for float64
embeddings) whatever the embeddings' dtype.

``fast`` products have float16 operands and float32 sums. Measured against float64 (1,024 pairs, t = 10 to 120),
rounding embeddings of length 1 and the logits' gradient to float16 costs 2e-4 to 1e-3 of the gradient, rounding the
embeddings alone to bfloat16 2e-3 to 1e-2, and rounding that gradient to bfloat16 too spoils the scale's (7e-4 instead
of 1e-5).

Memory beyond the inputs, for b rows of width d and S slices (see ring.py), float32, on the ring:
b d (image gradient) + 2 (1 + 1/S) b d (travelling texts and text gradient) + rows b / S (logits) elements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainer.core.types import Embeddings
from trainer.losses.exchange import Sums, traverse
from trainer.losses.topology import Ring, Slice


def default_tile_rows(device: str) -> int:
    """Images per tile where nobody says: what keeps a ``device`` of this type busy. With a slice of 8,192 texts a GPU's
    tile of float32 logits takes 64 MiB."""
    return 1024 if device == "cpu" else 2048


def few_rows(values: Tensor) -> tuple[Tensor, ...]:
    """``values`` [n, d] in parts that may be copied: small ones on CPUs, on GPUs as many as are worth a kernel."""
    return values.split(4096 if values.is_cuda else 256)


class Tile(NamedTuple):
    """Logits of this rank's images ``rows`` with the texts ``columns`` of rank ``owner``."""

    z: Tensor
    """[r, c] logits, which the callback may modify in place; in a gradient sweep it must leave d loss / d logits
    here."""
    rows: slice
    columns: slice
    owner: int
    own: bool
    """Whether the texts are this rank's own: the diagonal then has the matched pairs."""
    riders: list[Tensor]
    """Further tensors exchanged with the texts: [c, ...] each."""
    sums: list[Tensor]
    """Tensors summed for the texts: [c, ...] each."""
    images: Tensor
    """[r, d] in the dtype of the products' operands."""
    texts: Tensor
    """[c, d] in the dtype of the products' operands."""

    def diagonal(self) -> Tensor:
        """A view of the logits of matched pairs in this tile, empty outside the own block."""
        return self.diagonal_of(self.z)

    def diagonal_of(self, values: Tensor) -> Tensor:
        """The same places in another tensor [r, c]."""
        first, last = self.matched()
        return values[
            first - self.rows.start : last - self.rows.start, first - self.columns.start : last - self.columns.start
        ].diagonal()

    def same_group(self, groups: Tensor) -> Tensor:
        """[r, c] bool: image and text of one group. ``groups`` is of this rank's images; the texts' must be the first
        rider."""
        return groups[self.rows, None] == self.riders[0]

    def matched(self) -> tuple[int, int]:
        """First and last + 1 row of this rank's batch whose own text is in this tile."""
        first, last = max(self.rows.start, self.columns.start), min(self.rows.stop, self.columns.stop)
        return (first, last) if self.own and first < last else (self.rows.start, self.rows.start)


class Pairs:
    """One forward pass over all pairs: sweeps, and the gradients they leave.

    ``image`` [b, d] and ``text`` [b, d] contiguous (float16 for ``fast``), ``scale`` and ``bias`` [] float32;
    ``tile_rows`` images make a tile.
    """

    def __init__(
        self,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor,
        groups: Tensor | None,
        ring: Ring,
        tile_rows: int | None,
        teacher: Embeddings | list[Embeddings] | None = None,
        fast: bool = False,
        ids: Tensor | None = None,
    ) -> None:
        self.image, self.text, self.scale, self.bias, self.groups, self.ring = image, text, scale, bias, groups, ring
        self.teacher = teacher
        self.ids = ids
        """[b] int64: the number of each pair's sample, where it was given."""
        self.dtype = scale.dtype
        self.tile_rows = min(tile_rows or default_tile_rows(image.device.type), max(1, image.shape[0]))
        self.d_image: Tensor | None = None
        self.d_text: Tensor | None = None
        self.d_bias = torch.zeros((), dtype=torch.float64, device=image.device)
        self._room: dict[str, Tensor] = {}
        self.fast = fast
        self.largest_gradient = 8.0
        """Bound on |d loss / d logits|: below 65504 of it, float16 overflows."""
        self._empty: list[tuple[int, Tensor]] = []

    def sweep(
        self,
        visit: Callable[[Tile], Any],
        riders: Sequence[Tensor] = (),
        sums: Sequence[Sums] = (),
        image_gradient: bool = False,
        text_gradient: bool = False,
        comm_gradient_dtype: torch.dtype | None = None,
        make_logits: bool = True,
    ) -> list[Tensor]:
        """Visits every tile of this rank's images with all texts; returns the totals of ``sums`` for this rank's texts.

        With a gradient asked for, ``visit`` must leave d loss / d logits in the tile, and ``d_image`` / ``d_text`` hold
        the gradients with respect to the *scaled* cosines afterwards. Without ``make_logits`` the tile comes unwritten
        and in the operands' dtype, for ``visit`` to leave d loss / d logits times ``power`` there.
        """
        wanted = list(sums)
        if text_gradient:
            wanted.append(Sums(self.text.shape[1:], self.dtype, 0.0, Tensor.add_, comm_gradient_dtype))

        def on_slice(piece: Slice, payload: list[Tensor], totals: list[Tensor]) -> None:
            if piece.owner != self.ring.rank:
                self._empty.append((piece.owner, torch.linalg.vector_norm(payload[0], float("inf"))))
            d_text = totals[-1] if text_gradient else None
            self._against(
                payload[0], piece, payload[1:], totals[: len(sums)], visit, image_gradient, d_text, make_logits
            )

        with _float32_products():
            totals = traverse(self.ring, [self.text, *riders], wanted, on_slice)
        self._refuse_empty_blocks()
        if text_gradient:
            self.d_text = totals.pop()
        return totals

    def sweep_constants(self, texts: Tensor, visit: Callable[[Tile], Any], image_gradient: bool = False) -> None:
        """The same for ``texts`` [k, d] that every rank has and that take no gradient; the tiles' owner is -1."""
        with _float32_products():
            for start in range(0, texts.shape[0], self.tile_rows):
                part = texts[start : start + self.tile_rows]
                self._against(part, Slice(-1, start, part.shape[0]), [], [], visit, image_gradient, None, True)

    def _against(
        self,
        texts: Tensor,
        piece: Slice,
        riders: list[Tensor],
        sums: list[Tensor],
        visit: Callable[[Tile], Any],
        image_gradient: bool,
        d_text: Tensor | None,
        make_logits: bool,
    ) -> None:
        """All of this rank's images, a tile at a time, with one slice of texts."""
        if image_gradient and self.d_image is None:  # here, where running out of memory leaves no other rank waiting
            self.d_image = torch.zeros(self.image.shape, dtype=self.dtype, device=self.image.device)
        texts = self._as_operand("text", texts)
        columns, own = slice(piece.start, piece.start + piece.rows), piece.owner == self.ring.rank
        for start in range(0, self.image.shape[0], self.tile_rows):
            rows = slice(start, min(start + self.tile_rows, self.image.shape[0]))
            images = self._as_operand("image", self.image[rows])
            dtype = self.dtype if make_logits else self.operand_dtype
            z = self._space("logits", images.shape[0], texts.shape[0], dtype)
            if make_logits:
                self._product(z, images, texts.t(), 0.0).mul_(self.scale).add_(self.bias)
            visit(Tile(z, rows, columns, piece.owner, own, riders, sums, images, texts))
            if not image_gradient and d_text is None:
                continue
            gradient, factor = (self._as_operand_gradient(z) if make_logits else z), 1 / self.power
            if image_gradient and self.d_image is not None:
                self._product(self.d_image[rows], gradient, texts, 1.0, factor)
            if d_text is not None:
                self._product(d_text, gradient.t(), images, 1.0, factor)

    def _product(self, out: Tensor, a: Tensor, b: Tensor, keep: float, factor: float = 1.0) -> Tensor:
        """out <- keep out + factor a b, summed in ``out``'s dtype."""
        if a.dtype == out.dtype:
            return torch.addmm(out, a, b, beta=keep, alpha=factor, out=out)
        # Only CUDA has products of float16 with a float32 result.
        result: Tensor = torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, beta=keep, alpha=factor, out=out)
        return result

    @property
    def power(self) -> float:
        """What d loss / d logits is multiplied by as an operand: float16 needs it in the middle of its range, where
        sigmoids down to e^-20 count."""
        return 2.0 ** math.floor(math.log2(2**15 / self.largest_gradient)) if self.fast else 1.0

    def _as_operand_gradient(self, z: Tensor) -> Tensor:
        """d loss / d logits times ``power`` as an operand."""
        if not self.fast:
            return z
        rounded = torch.mul(z, self.power, out=self.space("rounded", z, torch.float16))
        return rounded if self._tensor_cores else z.copy_(rounded)

    def matched_logits(self, first: int = 0, last: int | None = None) -> Tensor:
        """[last - first] float64: the logits of these matched pairs, without the rounding of a float32 product."""
        parts = zip(*(few_rows(side[first:last]) for side in (self.image, self.text)), strict=True)
        cosines = torch.cat([(image.double() * text.double()).sum(1) for image, text in parts])
        return cosines * self.scale.double() + self.bias.double()

    def space(self, name: str, tile: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A scratch tensor shaped as ``tile``, kept from tile to tile."""
        return self._space(name, tile.shape[0], tile.shape[1], dtype or tile.dtype)

    def _space(self, name: str, rows: int, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        room = self._room.get(name)
        if room is None or room.numel() < rows * columns:
            room = self._room[name] = torch.empty(rows * columns, dtype=dtype or self.dtype, device=self.image.device)
        return room[: rows * columns].view(rows, columns)

    @property
    def _tensor_cores(self) -> bool:
        """Whether operands stay float16; elsewhere their rounded values are multiplied in float32, the same numbers."""
        return self.fast and self.image.is_cuda

    @property
    def operand_dtype(self) -> torch.dtype:
        return torch.float16 if self._tensor_cores else self.dtype

    def _as_operand(self, name: str, values: Tensor) -> Tensor:
        if values.dtype == self.operand_dtype:
            return values
        return self._space(name, values.shape[0], values.shape[1], self.operand_dtype).copy_(values)

    def _refuse_empty_blocks(self) -> None:
        # Normalised embeddings are never all zero: such a slice was not written by its sender.
        if not self._empty:
            return
        largest = torch.stack([amount for _, amount in self._empty]).tolist()
        owners = sorted({owner for (owner, _), amount in zip(self._empty, largest, strict=True) if amount == 0})
        self._empty.clear()
        if owners:
            raise RuntimeError(
                f"rank {self.ring.rank}: text embeddings of rank(s) {owners} arrived all zero; the transport or "
                f"their text tower is broken"
            )


@contextmanager
def _float32_products() -> Iterator[None]:
    """float32 products in float32, whatever is set outside."""
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
