"""The base of all losses over pairs: one autograd function, the settings of the exchange, and the loss contract.

The forward pass computes exact gradients of the global batch; backward multiplies them by the incoming scalar.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer.core.settings import OPERATIONAL, Settings
from trainer.core.types import Embeddings, UserError
from trainer.losses.exchange import Sums, traverse
from trainer.losses.tiles import Pairs, few_rows
from trainer.losses.topology import Exchange, Ring, Slice

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
CommDtype = Literal["float32", "bfloat16", "float16"]
SameGroup = Literal["negative", "mask", "positive"]


class PairSettings(Settings):
    """Keys that all losses over pairs have; they change memory, traffic and speed."""

    renamed: ClassVar = {"rows": "tile_rows", "wire": "comm_dtype", "wire_gradient": "comm_gradient_dtype"}
    repeats: ClassVar[Literal["positive", "mask"]] = "positive"
    """What `same_group: auto` means where captions repeat within a batch."""
    normalises: ClassVar[bool] = False
    """Whether logits are normalised over the batch, as in CLIP, whose temperature `optim.max_scale: auto` limits."""

    tile_rows: Annotated[int | None, OPERATIONAL] = Field(default=None, ge=1)
    """Images per tile, the block of logits that is computed at once. Memory grows with it; below a few hundred, matrix
    products become slow. null: 1024 on
    CPUs and 2048 on GPUs, where the fused kernel of a fast sigmoid loss takes 16384."""
    exchange: Annotated[Exchange, OPERATIONAL] = "ring"
    """ring; bidirectional (both directions of each link); gather (all-gather and reduce-scatter: memory grows with
    ranks, for fast interconnects); hierarchical (gather inside a node, ring between nodes). All give the same
    numbers."""
    node_size: Annotated[int | None, OPERATIONAL] = Field(default=None, ge=1)
    """Ranks of one node for hierarchical; null: read from the environment that the launcher sets (deepspeed, torchrun,
    accelerate, Slurm, Open MPI)."""
    comm_dtype: CommDtype | None = None
    """Dtype in which text embeddings are exchanged; null: their own. bfloat16 halves the traffic and rounds them, alike
    on every rank."""
    precision: Literal["exact", "fast"] = "exact"
    """exact: products of float32 embeddings (error up to 1e-6; of a softmax at scale 120, 2e-6). fast: embeddings and
    the gradient of the logits are rounded to float16 for the tensor cores (an eighth of bfloat16's rounding), which
    also halves the traffic of texts; logits and sums stay float32. exact is the default because the loss is a small
    part of most steps."""
    comm_gradient_dtype: CommDtype = "float32"
    """Dtype in which text gradients are exchanged. bfloat16 halves the traffic and rounds them once per hop; they are
    summed in float32."""

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the loss; an undecided same_group counts as negative."""
        found = {key: getattr(self, key) for key in type(self).model_fields if key != "name"}
        return {key: "negative" if key == "same_group" and value == "auto" else value for key, value in found.items()}


class _Exact(torch.autograd.Function):
    """The loss, with gradients computed in the forward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor,
        loss: PairLoss,
        constants: dict[str, Any],
        on: bool,
    ) -> Tensor:
        needs = [on and need for need in ctx.needs_input_grad[:4]]
        with torch.autocast(image.device.type, enabled=False):
            value, ctx.gradients = loss.evaluate(Embeddings(image, text, scale, bias, **constants), needs)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "backward() may run only once per call of this loss, which hands out its gradients in place: call it "
                "again"
            )
        return *(None if g is None else g.mul_(incoming[0].to(g.dtype)) for g in gradients), None, None, None


class PairLoss(nn.Module):
    """A loss over all pairs of the global batch; subclasses compute it from tiles of logits.

    The arguments are the keys of PairSettings, and ``group``: the default process group when None, one rank when there
    is none.
    """

    uses_scale = True
    """False if the objective uses cosines only: scale and bias then get zero gradients."""
    scale_from_image = False
    """True if constant texts (a queue) contribute: the scale's gradient must then be computed from the images'."""

    def __init__(
        self,
        tile_rows: int | None = None,
        exchange: Exchange = "ring",
        *,
        node_size: int | None = None,
        comm_dtype: CommDtype | None = None,
        comm_gradient_dtype: CommDtype = "float32",
        precision: Literal["exact", "fast"] = "exact",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        if tile_rows is not None and tile_rows < 1:
            raise UserError(f"loss.tile_rows is {tile_rows}: it must be 1 or more; 256 to 2048 are usual")
        self.tile_rows, self.exchange, self.node_size, self.group = tile_rows, exchange, node_size, group
        self.comm_dtype = DTYPES[comm_dtype] if comm_dtype else None
        self.comm_gradient_dtype = DTYPES[comm_gradient_dtype]
        self.precision = precision
        self.traffic: Counter[str] = Counter()
        """Bytes this rank has sent, by kind ("text", "sums"), since it was last cleared."""

    def forward(self, z: Embeddings) -> Tensor:
        """``z`` -> scalar float32 (float64 for float64 embeddings); the mean over ranks is the loss of the global
        batch.

        Local batches may be unequal: sums are divided by the true global batch. Raises UserError if the ranks'
        embeddings differ in width or dtype, PeerLost (a RuntimeError) if a peer dies or hangs. Gradients can be taken
        once.
        """
        _check(z)
        constants = {"groups": z.groups, "teacher": z.teacher, "ids": z.ids}
        loss: Tensor = _Exact.apply(*z[:4], self, constants, torch.is_grad_enabled())
        return loss

    def connect(self, device: torch.device) -> None:
        """Sends a few rows along the paths of texts and gradients, so that NCCL opens its connections and allocates
        their memory before the model fills the card. Raises UserError if the ranks cannot exchange as the settings say.
        Call it on all ranks."""
        ring = Ring(8, (0, 0, 0), self.exchange, self.node_size, self.group, device)
        rows = torch.zeros(8, 1, device=device)
        traverse(ring, [rows], [Sums((1,), rows.dtype, 0.0, Tensor.add_)], lambda *_: None)

    def snapshot(self) -> Callable[[], None]:
        """A function that restores this loss's present state (its buffers), for a repeated step."""
        kept = [(buffer, buffer.detach().clone()) for buffer in self.buffers()]

        def restore() -> None:
            for buffer, before in kept:
                buffer.copy_(before)

        return restore

    def progress(self, samples_seen: int, total_samples: int) -> None:
        """Updates schedules; called before each step."""

    def objective(self, pairs: Pairs, image_gradient: bool, text_gradient: bool) -> Tensor:
        """Sum (not mean) of this rank's losses, float64 []; leaves the gradients asked for in ``pairs``."""
        raise NotImplementedError

    def evaluate(self, z: Embeddings, needs: list[bool]) -> tuple[Tensor, list[Tensor | None]]:
        """The loss and the gradients of image, text, scale, bias that ``needs`` asks for."""
        dtype = torch.float64 if z.image.dtype == torch.float64 else torch.float32
        fast = self.precision == "fast" and dtype == torch.float32
        image, text = (x.detach().to(torch.float16 if fast else x.dtype).contiguous() for x in (z.image, z.text))
        text = text.to(self.comm_dtype or text.dtype)
        scale, bias = (value.detach().to(dtype).reshape(()) for value in (z.scale, z.bias))
        if not self.uses_scale:
            scale, bias = torch.ones_like(scale), torch.zeros_like(bias)
        # One side is enough for the scale's gradient; the texts' would have to be sent back.
        with_image = needs[0] or (any(needs) and (not needs[1] or self.scale_from_image))
        signature = (image.shape[1], list(DTYPES.values()).index(text.dtype), needs[1] + 2 * (z.groups is not None))
        ring = Ring(image.shape[0], signature, self.exchange, self.node_size, self.group, image.device, self.traffic)
        groups = None if z.groups is None else z.groups.contiguous()
        pairs = Pairs(image, text, scale, bias, groups, ring, self.tile_rows, z.teacher, fast, z.ids)
        share = ring.world / ring.total_rows
        value = (self.objective(pairs, with_image, needs[1]) * share).to(dtype)
        return value, self._gradients(z, pairs, needs, share) if any(needs) else [None] * 4

    def _gradients(self, z: Embeddings, pairs: Pairs, needs: list[bool], share: float) -> list[Tensor | None]:
        # Gradients in ``pairs`` are with respect to scaled cosines: sum(image * gradient) is the scale's gradient.
        d_scale = _inner(pairs.image, pairs.d_image) if pairs.d_image is not None else _inner(pairs.text, pairs.d_text)
        factor = pairs.scale * share
        made = [
            pairs.d_image.mul_(factor) if needs[0] and pairs.d_image is not None else None,
            pairs.d_text.mul_(factor) if needs[1] and pairs.d_text is not None else None,
            d_scale * (share * self.uses_scale) if needs[2] else None,
            pairs.d_bias * (share * self.uses_scale) if needs[3] else None,
        ]
        return [
            None if g is None else g.to(x.dtype).reshape(x.shape)
            for g, x in zip(made, z[:4], strict=True)
            if x is not None
        ]


def _inner(values: Tensor, gradient: Tensor | None) -> Tensor:
    """sum(values * gradient) in float64, a few rows at a time."""
    assert gradient is not None
    total = torch.zeros((), dtype=torch.float64, device=values.device)
    for a, b in zip(few_rows(values), few_rows(gradient), strict=True):
        total += (a.to(b.dtype) * b).sum(dtype=torch.float64)
    return total


def _check(z: Embeddings) -> None:
    if z.image.dim() != 2 or z.image.shape != z.text.shape or not z.image.shape[0]:
        raise UserError(
            f"loss: image {list(z.image.shape)} and text {list(z.text.shape)} must be one [rows, width] each, with "
            f"rows > 0"
        )
    if z.scale.numel() != 1 or z.bias.numel() != 1:
        raise UserError("loss: scale and bias have one element each")
    if {z.image.dtype, z.text.dtype} - set(DTYPES.values()):
        raise UserError(f"loss: embeddings are {z.image.dtype} and {z.text.dtype}; floating-point ones are needed")
    if z.groups is not None and (z.groups.shape != z.image.shape[:1] or z.groups.dtype != torch.int64):
        raise UserError("loss: groups must be one int64 for each pair")


def group_sizes(pairs: Pairs, groups: Tensor) -> Tensor:
    """[b] int64: how many pairs of the global batch are of each local pair's group, itself included. ``groups`` [b]
    int64 travel the ring once, 8 bytes a pair."""
    sizes = torch.zeros_like(groups)

    def visit(_: Slice, payload: list[Tensor], __: list[Tensor]) -> None:
        there = payload[0].sort().values
        sizes.add_(torch.searchsorted(there, groups, right=True)).sub_(torch.searchsorted(there, groups))

    traverse(pairs.ring, [groups], [], visit, "groups")
    return sizes


def groups_of(pairs: Pairs, key: str) -> Tensor:
    """The groups of this rank's pairs, or an error that says which key asked for them."""
    if pairs.groups is None:
        raise UserError(f"loss.{key}: Embeddings.groups is needed for it, a caption hash or group id for each pair")
    return pairs.groups
