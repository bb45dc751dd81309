"""The ring as several ranks emulated on one card."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tests.gpu import emulated
from tests.gpu.checks import Check, Measured, Skip, on_gpu, peak_bytes, synchronize, worst
from tests.gpu.losses import EXACT, gradients
from tests.support import dense_losses
from trainer.core import distributed
from trainer.core.types import Embeddings
from trainer.losses import PairLoss, SigmoidLoss, SoftmaxLoss


def exact(loss: PairLoss, dense: dense_losses.Dense, world: int, rows: int) -> Measured:
    """Rank 0's gradients against the dense computation of the global batch, in which every rank brings these rows."""
    distributed.init(60)
    # Every pair occurs once a rank: where cosines are high, what is left of a softmax's gradient is mostly rounding.
    mine = dense_losses.batch(rows, 96, near=0.35)._replace(groups=None)
    with emulated.ranks(world):
        found = gradients(loss, mine)
    own = [value.double().requires_grad_() for value in mine[:4]]
    others = [value.detach() for value in own[:2]]
    image, text = (torch.cat([own[side], *[others[side]] * (world - 1)]) for side in (0, 1))
    value = dense(Embeddings(image, text, own[2], own[3]))
    image_gradient, text_gradient = torch.autograd.grad(value, own[:2])
    wanted = {"loss": value.detach(), "image": image_gradient, "text": text_gradient}
    # A rank's gradient is that of the sum over ranks: averaging, as data parallelism does, divides by the ranks.
    scaled = {"loss": found["loss"], "image": found["image"] / world, "text": found["text"] / world}
    return worst({name: dense_losses.relative(scaled[name].cpu(), wanted[name]) for name in wanted}, EXACT)


def flat_memory(rows: int, width: int) -> Measured:
    """The loss's memory does not grow with the number of ranks."""
    if not on_gpu():
        raise Skip("counted by the CUDA allocator; tests/test_losses_memory.py counts on the CPU")
    z = dense_losses.batch(rows, width)._replace(groups=None)
    peaks = {}
    for world in (2, 8, 32):
        with emulated.ranks(world):
            peaks[world] = peak_bytes(lambda: gradients(SigmoidLoss(), z))
    text = ", ".join(f"{world}: {peak / 2**20:.0f} MiB" for world, peak in peaks.items())
    return Measured(text, peaks[32] <= 1.02 * peaks[2], {str(world): peak for world, peak in peaks.items()})


def covered(spans: list[tuple[float, float]], by: list[tuple[float, float]]) -> float:
    """The share of the time of ``spans`` (start, end) in which one of ``by`` runs too."""
    edges = sorted(
        [(time, change, 0) for start, end in spans for time, change in ((start, 1), (end, -1))]
        + [(time, 0, change) for start, end in by for time, change in ((start, 1), (end, -1))]
    )
    inside = others = 0
    total = both = before = 0.0
    for time, span, other in edges:
        total += (time - before) * (inside > 0)
        both += (time - before) * (inside > 0 and others > 0)
        inside, others, before = inside + span, others + other, time
    return both / total if total else 0.0


def hidden(world: int, rows: int, width: int) -> Measured:
    """How much of the transfers' time lies behind products, as the profiler saw the kernels."""
    distributed.init(60)
    z, loss = dense_losses.batch(rows, width)._replace(groups=None), SigmoidLoss()
    kind = ProfilerActivity.CUDA if on_gpu() else ProfilerActivity.CPU
    for recording in (nullcontext(), profile(activities=[kind])):
        with recording as profiler, emulated.ranks(world, nccl=on_gpu()):
            gradients(loss, z)
            synchronize()
    spans: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for event in profiler.events():
        transfer, copy = "nccl" in event.name.lower(), event.name.startswith(("Memcpy", "Memset"))
        product = event.device_type == DeviceType.CUDA and not copy if on_gpu() else event.name == "aten::addmm"
        if transfer or product:
            spans[transfer].append((event.time_range.start, event.time_range.end))
    assert spans[True] and spans[False], "the profiler saw no transfers, or no products"
    share = covered(spans[True], spans[False])
    text = f"{100 * share:.0f}% of {len(spans[True])} transfers' time"
    return Measured(text, share >= 0.5 if on_gpu() else None, {"share": share})


def checks(dry: bool) -> list[Check]:
    rows, tile = (60, 16) if dry else (700, 256)
    objectives = {
        "sigmoid": (partial(SigmoidLoss, tile_rows=tile), dense_losses.sigmoid),
        "softmax": (partial(SoftmaxLoss, tile_rows=tile), dense_losses.softmax),
    }
    found = [
        Check(
            f"{name}, {world} emulated ranks, {exchange}",
            f"error <= {EXACT:.0e}",
            partial(exact, make(exchange=exchange), dense, world, rows),
        )
        for name, (make, dense) in objectives.items()
        for world, exchange in ((4, "ring"), (4, "bidirectional"), (8, "ring"))
    ]
    overlap = partial(hidden, 4, *((60, 32) if dry else (8192, 768)))
    return [
        *found,
        Check("memory of the loss at 2, 8, 32 ranks", "within 2%", partial(flat_memory, 4096, 768)),
        Check("transfers to itself over NCCL, 4 ranks", "at least half behind products", overlap),
    ]
