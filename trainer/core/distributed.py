"""Who am I among the ranks: the same answer under deepspeed, torchrun, accelerate, Slurm and Open MPI, or in one plain
process."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from trainer.core.types import RunFailed, UserError

# deepspeed, torchrun and accelerate set RANK, WORLD_SIZE and LOCAL_RANK themselves; these launchers use names of their
# own. A variable that only a started task has comes first: an interactive Slurm shell has the others too.
FOREIGN_LAUNCHERS = (
    ("SLURM_STEP_ID", {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}),
    (
        "OMPI_COMM_WORLD_RANK",
        {
            "RANK": "OMPI_COMM_WORLD_RANK",
            "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
            "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
        },
    ),
)
RANKS_HERE = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE", "OMPI_COMM_WORLD_LOCAL_SIZE")
"""torchrun and accelerate; deepspeed; Slurm; Open MPI."""

_launchers: tuple[int, ...] = ()
"""Process ids of what started this rank, and of the `deepspeed` command above that; none for a plain process, which
nobody watches over."""


def init(timeout_seconds: float = 600.0) -> None:
    """Joins the process group (nccl on GPUs, gloo on CPUs); one plain process becomes a group of one. Safe to call
    again.

    A peer that hangs ends the run after ``timeout_seconds``, so that no collective waits for ever.
    """
    if dist.is_initialized():
        return
    _adopt_foreign_launcher()
    if "RANK" in os.environ:
        global _launchers
        _launchers = _those_above()
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")  # DeepSpeed looks for them
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"RANK is set but {', '.join(missing)} not: start through deepspeed or torchrun, or export the address "
            f"of rank 0"
        )
    try:
        dist.init_process_group(backend, timeout=timeout)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise RunFailed(
            f"port {os.environ['MASTER_PORT']} of {os.environ['MASTER_ADDR']} is taken: end the ranks of an earlier "
            "start if some are left, or take another (deepspeed --master_port N, torchrun --master-port N)"
        ) from error


def _adopt_foreign_launcher() -> None:
    if "RANK" in os.environ:
        return
    for marker, names in FOREIGN_LAUNCHERS:
        if marker in os.environ:
            os.environ.update({ours: os.environ[theirs] for ours, theirs in names.items()})
            return


def orphaned() -> bool:
    """True when the launcher that started this rank is gone: whoever starts the job again would find it still
    running."""
    return bool(_launchers) and _those_above()[: len(_launchers)] != _launchers


def _those_above() -> tuple[int, ...]:
    """The parent, and its own where that is the command `deepspeed`: it dies of a signal without a word to the launcher
    below it."""
    try:
        parent = psutil.Process(os.getppid())
        above = parent.parent()
        if above is not None and any(Path(part).name == "deepspeed" for part in above.cmdline()[:2]):
            return parent.pid, above.pid
        return (parent.pid,)
    except psutil.Error:
        return (os.getppid(),)


def rank() -> int:
    """This process among all; 0 when there is no process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together; 1 when there is no process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """This process among those of its node."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def ranks_here() -> int | None:
    """How many processes this node has; None where no launcher says so (one plain process, or one started by hand)."""
    return next((int(os.environ[name]) for name in RANKS_HERE if os.environ.get(name, "").isdigit()), None)


def is_main() -> bool:
    """True on the one rank that prints and writes shared files."""
    return rank() == 0


def device() -> torch.device:
    """Where this rank computes; a launcher that shows each rank its own GPU alone calls it 0 (srun
    --gpus-per-task=1)."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank() if torch.cuda.device_count() > 1 else 0)


def say(text: str) -> None:
    """One line on the terminal, from rank 0 alone."""
    if is_main():
        clear = "\r\x1b[K" if sys.stderr.isatty() else ""  # a progress line may stand there
        print(clear + text, file=sys.stderr, flush=True)


def shutdown() -> None:
    """Leaves the process group; without this gloo complains at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()
