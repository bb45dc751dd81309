"""loss.precision: exact is float32's 1e-6 from float64, fast no further from it than embeddings rounded to bfloat16."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import dense_losses
from tests.support.dense_losses import Dense
from trainer.core.types import Embeddings
from trainer.losses import NegativeSettings, PairLoss, SigmoidLoss, SoftmaxLoss
from trainer.losses.tiles import Pairs
from trainer.losses.topology import Ring, Slice

SIZES = [[150], [70, 33, 47]]
BATCHES = [
    dense_losses.batch(150, width=256, t=10.0, b=-10.0, near=0.35),
    dense_losses.batch(150, width=256, t=120.0, b=-20.0, near=0.35),
]


def heavy(z: Embeddings) -> Tensor:
    """Negatives that count a hundredfold: the logits' gradient is far above 1."""
    return dense_losses.sigmoid(z, weight=torch.where(dense_losses.eye(z), 1.0, 100.0))


LOSSES: list[tuple[type[PairLoss], dict[str, object], Dense]] = [
    (SigmoidLoss, {}, dense_losses.sigmoid),
    (SigmoidLoss, {"negatives": NegativeSettings(weight=100.0)}, heavy),
    (SoftmaxLoss, {}, dense_losses.softmax),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("kind", "keys", "dense"), LOSSES, ids=["sigmoid", "heavy negatives", "softmax"])
def test_both_are_as_exact_as_they_say(
    kind: type[PairLoss], keys: dict[str, object], dense: Dense, sizes: list[int]
) -> None:
    for precision in ("exact", "fast"):
        make = partial(kind, tile_rows=40, precision=precision, **keys)
        for z, found in zip(BATCHES, dense_losses.errors(make, dense, BATCHES, sizes), strict=True):
            print(kind.__name__, precision, sizes, z.scale.item(), {k: f"{v:.1e}" for k, v in found.items()})
            limit = dense_losses.rounded_to_bfloat16(z, dense)
            for name, error in found.items():
                # A softmax at scale t sees float32's rounding of logits of that size.
                floor = max(1e-6, z.scale.item() * 2**-25) if kind is SoftmaxLoss else 1e-6
                assert error <= (floor if precision == "exact" else max(floor, limit[name])), (precision, name)
            if precision == "fast":
                assert found["image"] > 1e-5  # it does round


def test_fast_halves_the_traffic_of_texts() -> None:
    sent = {}
    for precision in ("exact", "fast"):
        make = partial(SigmoidLoss, precision=precision)
        ranks = dense_losses.run_ranks(dense_losses.on_ranks, 2, make, BATCHES[:1], [75, 75])
        sent[precision] = ranks[0][0][2]
    assert sent["fast"]["text"] * 2 == sent["exact"]["text"] and sent["fast"]["sums"] == sent["exact"]["sums"]


def test_float64_embeddings_stay_float64() -> None:
    z = dense_losses.take(dense_losses.batch(9, dtype=torch.float64), [9], 0)
    assert SigmoidLoss(precision="fast")(z).dtype == torch.float64


def test_tensor_cores_get_float16_operands_and_give_float32_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products that CUDA alone has, on the meta device: shapes, dtypes and overloads."""
    monkeypatch.setattr(Pairs, "_tensor_cores", True)

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten.addmm.dtype_out:
                products.append((args[1].dtype, args[2].dtype, args[3], kwargs["out"].dtype))
            return function(*args, **(kwargs or {}))

    products: list[tuple[torch.dtype, ...]] = []
    half = torch.empty(6, 4, dtype=torch.float16, device="meta")
    one = torch.ones((), device="meta")
    pairs = Pairs(half, half, one, one, None, Ring(6, (4, 0, 0)), 4, fast=True)
    with Products():
        pairs._against(half, Slice(0, 0, 6), [], [], lambda tile: None, True, torch.empty(6, 4, device="meta"), True)
    assert products == [(torch.float16, torch.float16, torch.float32, torch.float32)] * 6
