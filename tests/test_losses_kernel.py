"""The Triton kernel by Triton's interpreter: the tile against float64, and the whole loss no further from it than with
embeddings rounded to bfloat16. And its resources on cards that are not here."""

import os
import subprocess
import sys

import pytest

pytest.importorskip(
    "triton", reason="Triton is not installed: pip install triton runs the kernel's tests in its interpreter"
)

# The interpreter is chosen when Triton is imported: a process of its own, whatever this one has imported already.
SCRIPT = """
import torch, torch.nn.functional as F
from tests.support import dense_losses
from trainer.losses import SigmoidLoss, kernel, sigmoid
from trainer.losses.kernel import sigmoid_tile

POWER = 4096.0
cases = [(64, 64, 32, 10., -10.), (70, 50, 40, 120., -20.), (5, 130, 24, 120., 0.), (65, 64, 8, 10., -10.)]
cases += [(1, 1, 768, 10., -10.), (33, 31, 96, 10., 5.), (64, 32, 64, 120., -120.)]
for tma in (True, False):
    kernel.INTERPRETED = kernel.INTERPRETED._replace(tma=tma)
    for rows, columns, width, t, b in cases:
        generator = torch.Generator().manual_seed(rows)
        x, u = (F.normalize(torch.randn(n, width, generator=generator), dim=1).half() for n in (rows, columns))
        out = torch.full((rows, columns), float("nan"), dtype=torch.float16)
        loss, total = sigmoid_tile(x, u, torch.tensor(t), torch.tensor(b), out, POWER)
        z = t * x.double() @ u.double().T + b
        terms, truth = F.softplus(z, threshold=1000), torch.sigmoid(z)
        # A float32 logit is rounded by 2^-24 of t, and what is computed of it by as much.
        limit = max(1e-6, t * 2**-23)
        assert abs(loss - terms.sum()) <= limit * terms.sum(), (rows, loss, terms.sum())
        assert abs(total - truth.sum()) <= limit * truth.sum(), rows
        error = (out.double() / POWER - truth).abs()
        assert (error <= (2**-11 + limit) * truth + 2**-25 / POWER).all(), (rows, error.max())


def on_a_cpu(images, texts, scale, bias, out, power):
    # Where there are no tensor cores, rounded operands are held in float32, and rounding comes after the visit.
    gradient = torch.empty_like(out, dtype=torch.float16)
    sums = sigmoid_tile(images.half(), texts.half(), scale, bias, gradient, power)
    out.copy_(gradient.float())
    return sums


calls = []
sigmoid.fused_kernel = lambda image: lambda *tile: calls.append(tile) or on_a_cpu(*tile)
for sizes in ([37], [20, 17]):
    batches = [dense_losses.batch(sum(sizes), t=t, b=b, near=0.35) for t, b in ((10., -10.), (120., -20.))]
    make = lambda: SigmoidLoss(tile_rows=12, precision="fast")
    for z, found in zip(batches, dense_losses.errors(make, dense_losses.sigmoid, batches, sizes)):
        limit = dense_losses.rounded_to_bfloat16(z, dense_losses.sigmoid)
        assert all(error <= max(1e-6, limit[name]) for name, error in found.items()), (found, limit)
dense_losses.on_ranks(make, batches, [37])  # in this process, to see that the kernel is what ran
assert len(calls) == 2 * 2 * 4, len(calls)  # batches, slices, tiles of twelve images
print("kernel agrees")
"""


def test_kernel_in_tritons_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and "kernel agrees" in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_kernel_keeps_to_registers_and_uses_the_tensor_cores(capability):
    from tests.benchmarks.kernel import CARDS, compiled

    found = compiled(capability, even=True)
    assert found.spilled == 0
    assert found.products > 0
    assert found.shared <= CARDS[capability][1] * 1024
