"""The Triton kernel by Triton's interpreter: the tile against float64, and the whole loss against the torch path."""

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
from tests import dense
from trainer.losses import SigmoidLoss, sigmoid
from trainer.losses.kernel import sigmoid_tile

cases = [(64, 64, 32, 10., -10., 0), (70, 50, 40, 120., -20., -10), (5, 130, 24, 120., 0., 60), (65, 64, 33, 10., -10., None)]
for rows, columns, width, t, b, shift in cases:
    generator = torch.Generator().manual_seed(rows)
    x, u = (F.normalize(torch.randn(n, width, generator=generator), dim=1) for n in (rows, columns))
    out = torch.full((rows, columns), float("nan"))
    loss, total = sigmoid_tile(x, u, torch.tensor(t), torch.tensor(b), out, shift, False)
    z = t * x.double() @ u.double().T + b
    sign = torch.ones_like(z)
    if shift is not None:
        for i in range(rows):
            if 0 <= i + shift < columns:
                sign[i, i + shift] = -1
        assert (sign < 0).any()
    truth = sign * torch.sigmoid(sign * z)
    assert abs(loss - F.softplus(sign * z, threshold=1000).sum()) <= 1e-6 * loss.abs(), (rows, loss)
    assert (out - truth).norm() <= 1e-6 * truth.norm(), (rows, (out - truth).norm() / truth.norm())
    assert abs(total - truth.sum()) <= 1e-6 * truth.abs().sum()

sigmoid.fused_kernel = lambda image: sigmoid_tile
for sizes in ([37], [20, 17]):
    batches = [dense.batch(sum(sizes), t=t, b=b) for t, b in ((10., -10.), (120., 0.))]
    for found in dense.errors(lambda: SigmoidLoss(tile_rows=12), dense.sigmoid, batches, sizes):
        assert max(found.values()) <= 1e-6, found
print("kernel agrees")
"""


def test_kernel_in_tritons_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "kernel agrees" in done.stdout, done.stderr[-3000:]
