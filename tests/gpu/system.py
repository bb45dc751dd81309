"""What the machine is, and that the stack on it works at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import torch
import torch.distributed as dist

from tests.gpu.checks import Check, Measured, Skip, below, on_gpu
from trainer.core import distributed


def card() -> Measured:
    if not on_gpu():
        return Measured(f"CPU, torch {torch.__version__}", None)
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    text = (
        f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.multi_processor_count} SMs, "
        f"{total / 2**30:.1f} GiB ({free / 2**30:.1f} free); torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"NCCL {nccl}"
    )
    return Measured(text, None, {"name": properties.name, "gib": total / 2**30})


def shared_memory() -> Measured:
    gib = shutil.disk_usage("/dev/shm").total / 2**30
    return Measured(f"{gib:.2f} GiB", gib >= 1)


def group_of_one() -> Measured:
    distributed.init(60)
    values = torch.arange(4.0, device=distributed.device())
    dist.all_reduce(values)
    return Measured(dist.get_backend(), values.tolist() == [0, 1, 2, 3])


def send_to_self() -> Measured:
    """What emulating several ranks on one card would need of NCCL."""
    distributed.init(60)
    if not on_gpu():
        raise Skip("gloo does not send to itself")
    there, here = torch.randn(1 << 20, device="cuda"), torch.empty(1 << 20, device="cuda")
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, there, 0), dist.P2POp(dist.irecv, here, 0)]):
        work.wait()
    torch.cuda.synchronize()
    return Measured("equal" if torch.equal(there, here) else "different", torch.equal(there, here))


ONE_GPU = """
from tests.support.dense_step import Case
from trainer.core import distributed
distributed.init(60)
engine = Case(stage=1).engine()
print(next(engine.module.parameters()).device, distributed.device(), distributed.local_rank())
"""


def one_visible_gpu() -> Measured:
    """A launcher that shows each rank its own GPU alone: LOCAL_RANK is 3 and the only device is cuda:0."""
    environment = {**os.environ, "LOCAL_RANK": "3", "CUDA_VISIBLE_DEVICES": "0" if on_gpu() else ""}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ONE_GPU], env=environment, capture_output=True, text=True, timeout=90
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-300:])
    device, wanted, rank = done.stdout.split()[-3:]
    return Measured(f"{device}, rank {rank} of its node", (device, rank) == (wanted, "3"))


FAILING = """
import sys
import torch
from trainer.core import distributed
from data_tools.io.errors import run_command
from trainer.core.types import UserError
def main(argv):
    with distributed.process_group(600):
        torch.distributed.all_reduce(torch.ones(1, device=distributed.device()))
        raise UserError("made for this test")
sys.exit(run_command(main, []))
"""


def leaves_after_an_error() -> Measured:
    """A rank that ends with an error prints it and leaves with its own exit code, at once."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, text=True, timeout=60)
    took, told = time.monotonic() - start, "error: made for this test" in done.stderr
    return Measured(f"exit {done.returncode}, {took:.1f} s with start-up", done.returncode == 2 and told)


def engine_starts() -> Measured:
    distributed.init(60)
    from tests.support.dense_step import Case

    start = time.monotonic()
    Case(stage=3).engine()
    return below(time.monotonic() - start, 60, " s")


def checks(dry: bool) -> list[Check]:
    return [
        Check("card", "", card),
        Check("process group of one", "all_reduce works", group_of_one),
        Check("/dev/shm", ">= 1 GiB", shared_memory),
        Check("NCCL sends to itself", "the same bytes", send_to_self),
        Check("DeepSpeed engine, ZeRO-3", "starts within 60 s", engine_starts),
        Check("one visible GPU, LOCAL_RANK 3", "the engine is on it", one_visible_gpu),
        Check("a rank that fails", "its line and exit code 2", leaves_after_an_error),
    ]
