"""Every loss on the device against float64 with all logits at once, and its repeatability."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tests.gpu.checks import Check, Measured, Skip, on_gpu, worst
from tests.support import dense_losses
from trainer.core import distributed
from trainer.core.types import Embeddings
from trainer.losses import PairLoss, SigmoidLoss, SoftmaxLoss, TripletLoss
from trainer.losses.queue import QueueLoss
from trainer.losses.sinkhorn import SinkhornLoss

EXACT = 2e-6
"""A float32 logit at t = 120 is itself rounded by 4e-6; at t = 10 errors are a tenth of this."""


def gradients(loss: PairLoss, z: Embeddings) -> dict[str, Tensor]:
    """Loss and gradients on the device."""
    leaves = [value.detach().to(distributed.device()).requires_grad_() for value in z[:4]]
    groups = None if z.groups is None else z.groups.to(distributed.device())
    value = loss.to(distributed.device())(Embeddings(*leaves, groups))
    value.backward()
    names = ("image", "text", "scale", "bias")
    return {"loss": value.detach(), **{name: leaf.grad for name, leaf in zip(names, leaves, strict=True)}}


def errors(loss: PairLoss, dense: dense_losses.Dense, z: Embeddings) -> dict[str, float]:
    """Relative errors of loss and gradients against float64 on the CPU."""
    found = gradients(loss, z)
    truth = Embeddings(*[value.double().requires_grad_() for value in z[:4]], z.groups)
    value = dense(truth)
    wanted = dict(
        zip(found, (value.detach(), *torch.autograd.grad(value, truth[:4], materialize_grads=True)), strict=True)
    )
    return {name: dense_losses.relative(found[name].cpu(), wanted[name]) for name in found}


def against_float64(make: Callable[[], PairLoss], dense: dense_losses.Dense, rows: int, t: float) -> Measured:
    # Cosines around 0.3 at high temperatures: a softmax that is sure of every pair has a gradient of rounding errors.
    return worst(errors(make(), dense, dense_losses.batch(rows, 96, t=t, near=1.0 if t < 50 else 0.35)), EXACT)


def fast(make: Callable[..., PairLoss], dense: dense_losses.Dense, rows: int, t: float) -> Measured:
    """``loss.precision: fast``, float16 operands: no further from float64 than embeddings rounded to bfloat16, of loss
    and gradients whichever is furthest (a scalar's error may be small by chance)."""
    z = dense_losses.batch(rows, 96, t=t, near=0.35)
    limits = dense_losses.rounded_to_bfloat16(z, dense)
    found = worst(errors(make(precision="fast"), dense, z), max(limits.values()))
    return found._replace(text=f"{found.text}, limit {max(limits.values()):.1e}")


def float16_product() -> Measured:
    """The product that ``fast`` is made of: float16 operands, float32 sums; the operands' products are exact in them."""
    if not on_gpu():
        raise Skip("only CUDA has this product; elsewhere rounded values are multiplied in float32")
    found = {}
    for rows, columns, width in ((512, 512, 768), (127, 63, 1023), (1, 8, 24)):
        a, b = (torch.randn(*shape, device="cuda").half() for shape in ((rows, width), (width, columns)))
        out = torch.full((rows, columns), float("nan"), device="cuda")
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, beta=0.0, alpha=1.0, out=out)
        found[f"{rows} x {width} x {columns}"] = dense_losses.relative(out.cpu(), a.cpu().double() @ b.cpu().double())
    return worst(found, EXACT)


def masked(z: Embeddings) -> Tensor:
    weight = (~dense_losses.same(z) | dense_losses.eye(z)).double()
    return dense_losses.sigmoid(z, weight=weight)


def repeats(make: Callable[[], PairLoss], rows: int) -> Measured:
    """The same call three times gives the same bits."""
    z = dense_losses.batch(rows, 96)
    first, *others = (gradients(make(), z) for _ in range(3))
    same = all(torch.equal(first[name], other[name]) for other in others for name in first)
    return Measured("bit-equal" if same else "different", same)


def runs(make: Callable[[], PairLoss], rows: int) -> Measured:
    """Objectives whose reference needs more than a screen: the same numbers as on the CPU, where they are tested."""
    z = dense_losses.batch(rows, 32)
    found = gradients(make(), z)
    leaves = [value.clone().requires_grad_() for value in z[:4]]
    value = make()(Embeddings(*leaves, z.groups))
    value.backward()
    wanted = {"loss": value.detach().double()} | {
        name: leaf.grad.double() for name, leaf in zip(("image", "text", "scale", "bias"), leaves, strict=True)
    }
    return worst({name: dense_losses.relative(found[name].cpu(), wanted[name]) for name in found}, 1e-5)


def tile_errors(rows: int, columns: int, width: int, t: float, b: float) -> dict[str, float]:
    """Of the kernel's gradient of the logits, and of its sums of loss and gradient, against float64."""
    from trainer.losses.kernel import sigmoid_tile

    device, power = distributed.device(), 4096.0
    generator = torch.Generator().manual_seed(rows + columns)
    images, texts = (
        torch.nn.functional.normalize(torch.randn(n, width, generator=generator), dim=1).half() for n in (rows, columns)
    )
    out = torch.full((rows, columns), float("nan"), dtype=torch.float16, device=device)
    scalars = [torch.tensor(value, device=device) for value in (t, b)]
    loss, total = sigmoid_tile(images.to(device), texts.to(device), *scalars, out, power)
    z = t * images.double() @ texts.double().T + b
    wanted, terms = torch.sigmoid(z), torch.nn.functional.softplus(z, threshold=1e9)
    return {
        "gradient": dense_losses.relative(out.cpu().double() / power, wanted),
        "loss": dense_losses.relative(loss.cpu(), terms.sum()),
        "sum": dense_losses.relative(total.cpu(), wanted.sum()),
    }


SHAPES = [
    (64, 64, 32, 10.0, -10.0),
    (127, 63, 776, 10.0, -10.0),
    (5, 130, 24, 120.0, 0.0),
    (1, 1, 8, 10.0, -10.0),
    (1000, 513, 768, 10.0, -10.0),
    (300, 700, 768, 120.0, -20.0),
    (512, 512, 1152, 10.0, -10.0),
    (2000, 3000, 768, 30.0, -12.0),
]


def triton_tile(names: tuple[str, ...], limit: float, of_scale: float = 0.0) -> Measured:
    """The largest error, of a limit that grows by ``of_scale`` times the scale."""
    if not on_gpu():
        raise Skip("Triton's interpreter is used by tests/test_losses_kernel.py")
    found = {}
    for shape in SHAPES:
        of_shape = tile_errors(*shape)
        found |= {f"{name}, {shape}": of_shape[name] / (1 + of_scale * shape[3]) for name in names}
    return worst(found, limit)


def checks(dry: bool) -> list[Check]:
    rows = 150 if dry else 1500
    tile = 40 if dry else 512
    sigmoid = partial(SigmoidLoss, tile_rows=tile)
    exact = f"error <= {EXACT:.0e}"
    found = [
        Check(f"sigmoid, t = {t:g}", exact, partial(against_float64, sigmoid, dense_losses.sigmoid, rows, t))
        for t in (10.0, 120.0)
    ]
    found += [
        Check(f"softmax, t = {t:g}", exact, partial(against_float64, SoftmaxLoss, dense_losses.softmax, rows, t))
        for t in (10.0, 100.0)
    ]
    found.append(
        Check(
            "sigmoid, groups masked",
            exact,
            partial(against_float64, partial(sigmoid, same_group="mask"), masked, rows, 10.0),
        )
    )
    others: list[tuple[str, Callable[[], PairLoss]]] = [
        ("triplet", partial(TripletLoss, tile_rows=tile)),
        ("queue", partial(QueueLoss, tile_rows=tile, width=32, size=64)),
        ("sinkhorn", partial(SinkhornLoss, tile_rows=tile)),
    ]
    found += [Check(name, "as on the CPU, 1e-05", partial(runs, make, rows // 3)) for name, make in others]
    for title, make, dense in (
        ("sigmoid", sigmoid, dense_losses.sigmoid),
        ("softmax", partial(SoftmaxLoss, tile_rows=tile), dense_losses.softmax),
    ):
        for t in (10.0, 100.0):
            check = partial(fast, make, dense, rows, t)
            found.append(Check(f"{title}, t = {t:g}, loss.precision fast", "error <= that of bf16 embeddings", check))
    found.append(Check("float16 product, float32 sums", exact, float16_product))
    half = 2.0**-11
    found.append(
        Check("Triton tile, gradient", f"error <= {half:.0e}: float16's", partial(triton_tile, ("gradient",), half))
    )
    # The tensor cores cut off 1e-6 of a cosine, of which the scale t makes t 1e-6 of a logit.
    sums = partial(triton_tile, ("loss", "sum"), 1e-6, 1.0)
    found.append(Check("Triton tile, sums", "error <= 1e-6 (1 + t)", sums))
    found.append(Check("sigmoid three times", "bit-equal", partial(repeats, sigmoid, rows)))
    found.append(Check("softmax three times", "bit-equal", partial(repeats, SoftmaxLoss, rows)))
    return found
