"""AdamW with moments in any format, and Lion: the update of an element depends on that element only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from trainer.core.partitioned import Moment, PartitionedOptimizer, Piece
from trainer.optim.moments import Format, make

ON_GPU, ON_CPU = 1 << 22, 1 << 16


def most(tensor: Tensor) -> int:
    """Elements that are computed at once: what bounds the float32 copies of moments (on a CPU they stay in its
    cache)."""
    return ON_GPU if tensor.is_cuda else ON_CPU


class FormattedOptimizer(PartitionedOptimizer):
    """An optimizer that keeps its moments in the format ``moments``. ``defaults`` (lr, betas, ...) hold for every group
    that does not set its own."""

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        groups: Iterable[dict[str, Any]],
        *,
        moments: Format,
        **defaults: Any,
    ) -> None:
        super().__init__(named, groups, {**defaults, "weight_decay": 0.0})
        self._format = moments


class LowPrecisionAdamW(FormattedOptimizer):
    """AdamW (arXiv 1711.05101) whose moments are rounded between steps; the arithmetic is float32."""

    def moments(self, piece: Piece) -> dict[str, Moment]:
        return adam_moments(piece, self._format)

    def update(self, pieces: list[Piece], group: dict[str, Any]) -> None:
        for piece in pieces:
            adamw(piece, self.state[piece.parameter], group)


def adam_moments(piece: Piece, format: Format) -> dict[str, Moment]:
    """Fresh first and second moments."""
    return {
        "exp_avg": make(piece, format, "exp_avg"),
        "exp_avg_sq": make(piece, format, "exp_avg_sq", signed=False),
    }


def advance(state: dict[str, Any], gradient: Tensor, first: int, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Adam's moments m and v (float32) of the elements from ``first`` on, one step later; they are written to
    ``state``, in its format, and returned unrounded. ``gradient``: float32, one value for each of these elements."""
    beta1, beta2 = betas
    end = first + gradient.numel()
    m = state["exp_avg"].read(first, end).float().lerp(gradient, 1 - beta1)
    v = (state["exp_avg_sq"].read(first, end).float() * beta2).addcmul_(gradient, gradient, value=1 - beta2)
    state["exp_avg"].write(first, m, state["step"])
    state["exp_avg_sq"].write(first, v, state["step"])
    return m, v


def adamw(piece: Piece, state: dict[str, Any], group: dict[str, Any]) -> None:
    """One AdamW step of one parameter, a stretch at a time."""
    weight, gradient = piece.weight, piece.gradient
    (beta1, beta2), step, rate = group["betas"], state["step"], group["lr"]
    for first, end in piece.stretches(most(weight)):
        w = weight[first:end]
        m, v = advance(state, gradient[first:end], first, group["betas"])
        root = v.sqrt_().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
        w.mul_(1 - rate * group["weight_decay"]).addcdiv_(m, root, value=-rate / (1 - beta1**step))


class Lion(FormattedOptimizer):
    """The sign of a momentum (Chen et al., arXiv 2302.06675): one moment, every element moves by the rate."""

    def moments(self, piece: Piece) -> dict[str, Moment]:
        return {"exp_avg": make(piece, self._format, "exp_avg")}

    def update(self, pieces: list[Piece], group: dict[str, Any]) -> None:
        (beta1, beta2), rate = group["betas"], group["lr"]
        for piece in pieces:
            state = self.state[piece.parameter]
            weight, gradient = piece.weight, piece.gradient
            for first, end in piece.stretches(most(weight)):
                w, g = weight[first:end], gradient[first:end]
                m = state["exp_avg"].read(first, end).float()
                w.mul_(1 - rate * group["weight_decay"]).sub_(m.lerp(g, 1 - beta1).sign_(), alpha=rate)
                state["exp_avg"].write(first, m.lerp(g, 1 - beta2), state["step"])
