"""Process-group setup and rank queries, alike under deepspeed, torchrun, accelerate, Slurm, Open MPI and in one plain
process."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import psutil
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from data_tools.io.errors import run_command
from trainer.core.rendezvous import meeting
from trainer.core.types import UserError

# deepspeed, torchrun and accelerate set RANK, WORLD_SIZE and LOCAL_RANK; these launchers use names of their own. The
# marker is a variable that only a launched task has: an interactive Slurm shell has the others too.
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
"""Ranks per node, as set by torchrun and accelerate; deepspeed; Slurm; Open MPI."""

_launchers: tuple[int, ...] = ()
"""Process ids of the launcher of this rank and of the `deepspeed` command above it; empty for a plain process."""


_local_rank: int | None = None
"""LOCAL_RANK as the launcher gave it; see ``tell_deepspeed_the_gpu``."""


@contextmanager
def process_group(timeout_seconds: float = 600.0) -> Iterator[None]:
    """Joins the process group and, after success, destroys it; one that exists already is used and left as it is.

    After an error on several GPUs the process prints the error and exits here: destroying the group would make NCCL
    wait for kernels that never finish, because their peers wait for this rank.
    """
    if dist.is_initialized():
        yield
        return
    init(timeout_seconds)
    try:
        yield
    except BaseException as error:
        if dist.is_initialized() and world_size() > 1 and dist.get_backend() == "nccl":
            _end(error)
        shutdown()
        raise
    shutdown()


def _end(error: BaseException) -> NoReturn:
    def again(_: list[str]) -> int:
        raise error

    try:
        code = run_command(again, [])
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def init(timeout_seconds: float = 600.0) -> None:
    """Joins the process group (nccl on GPUs, gloo on CPUs); a plain process becomes a group of one. Safe to call again.

    If a peer hangs, the run ends after ``timeout_seconds`` instead of waiting forever. Groups that are created later
    (DeepSpeed creates its own) get the same timeout. Raises UserError if two ranks share a GPU.
    """
    if dist.is_initialized():
        return
    _adopt_foreign_launcher()
    if "RANK" in os.environ:
        global _launchers
        _launchers = _those_above()
    if torch.cuda.is_available():
        let_segments_grow()
        torch.cuda.set_device(device())
        tell_deepspeed_the_gpu()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    # A new group does not inherit the timeout of the first one; torch gives it these (10 minutes on nccl, 30 on gloo).
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")  # DeepSpeed looks for them
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"RANK is set, but {', '.join(missing)} is not: start with deepspeed or torchrun, or export the address of "
            f"rank 0"
        )
    with meeting(timeout) as (store, rank, world):
        store.set_timeout(timeout)
        if torch.cuda.is_available():
            check_one_gpu_each(store, rank, world, f"{socket.gethostname()}, GPU {_gpu_uuid()}")
        store = dist.PrefixStore("default_pg", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def _adopt_foreign_launcher() -> None:
    if "RANK" in os.environ:
        return
    for marker, names in FOREIGN_LAUNCHERS:
        if marker in os.environ:
            os.environ.update({ours: os.environ[theirs] for ours, theirs in names.items()})
            return


def let_segments_grow() -> None:
    """Enables expandable segments in torch's allocator, unless the user has configured it: micro-batches of different
    sizes and the phases of a step would otherwise fragment memory."""
    if not any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")


def tell_deepspeed_the_gpu() -> None:
    """Sets LOCAL_RANK to the index of this rank's GPU, because DeepSpeed uses it as that.

    They differ if the launcher shows each rank only its own GPU. ``local_rank`` still returns the launcher's number.
    """
    global _local_rank
    _local_rank = local_rank()
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):  # DeepSpeed compares them
        if name in os.environ:
            os.environ[name] = str(gpu_index())


def check_one_gpu_each(store: dist.Store, rank: int, world: int, gpu: str) -> None:
    """Raises UserError on all ranks if two of them have the same ``gpu`` (its node and UUID); NCCL would only report
    "Duplicate GPU"."""
    first = store.compare_set(f"gpu of {gpu}", "", str(rank)).decode()
    if first != str(rank):
        store.set("shared gpu", f"ranks {first} and {rank} share one GPU ({gpu})")
    if store.add("gpus seen", 1) == world:
        store.set("all gpus seen", "")
    store.wait(["all gpus seen"])
    if store.check(["shared gpu"]):
        error = UserError(
            f"{store.get('shared gpu').decode()}, and NCCL needs one for each: start no more ranks on a node than it "
            "has "
            f"GPUs, or correct CUDA_VISIBLE_DEVICES"
        )
        error.told = rank != 0
        raise error


def _gpu_uuid() -> str:
    return str(torch.cuda.get_device_properties(device()).uuid)


def orphaned() -> bool:
    """Whether the launcher of this rank is gone: the rank must end too, or a restarted job would find it running."""
    return bool(_launchers) and _those_above()[: len(_launchers)] != _launchers


def _those_above() -> tuple[int, ...]:
    """The parent process, and its parent if that is the `deepspeed` command, which may be killed without ending the
    launcher below it."""
    try:
        parent = psutil.Process(os.getppid())
        above = parent.parent()
        if above is not None and any(Path(part).name == "deepspeed" for part in above.cmdline()[:2]):
            return parent.pid, above.pid
        return (parent.pid,)
    except psutil.Error:
        return (os.getppid(),)


def rank() -> int:
    """Global rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """Rank within this node."""
    return int(os.environ.get("LOCAL_RANK", "0")) if _local_rank is None else _local_rank


def ranks_here() -> int | None:
    """Number of ranks on this node; None if no launcher says (a plain process, or ranks started by hand)."""
    return next((int(os.environ[name]) for name in RANKS_HERE if os.environ.get(name, "").isdigit()), None)


def is_main() -> bool:
    """Whether this is rank 0, which prints and writes shared files."""
    return rank() == 0


def device() -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", gpu_index()) if torch.cuda.is_available() else torch.device("cpu")


def to_device(tensor: torch.Tensor, where: torch.device) -> torch.Tensor:
    """Copies ``tensor``, in pageable host memory, to ``where``; asynchronously if that is a GPU."""
    return tensor.pin_memory().to(where, non_blocking=True) if where.type == "cuda" else tensor.to(where)


def gpu_index() -> int:
    """Index of this rank's GPU among those that it sees: 0 if the launcher shows each rank one (srun
    --gpus-per-task=1), else its local rank."""
    visible, mine = torch.cuda.device_count(), local_rank()
    if visible == 1:
        return 0
    if visible and mine >= visible:
        raise UserError(
            f"LOCAL_RANK is {mine}, but this rank sees {visible} GPUs: start at most {visible} ranks on this node, or "
            f"correct CUDA_VISIBLE_DEVICES"
        )
    return mine


def cores() -> int:
    """Processor cores for each rank of this node."""
    return max(1, len(os.sched_getaffinity(0)) // (ranks_here() or 1))


def per_rank(batch_size: int, ranks: int) -> int:
    """Pairs of a global batch on each rank. If they do not divide evenly, raises UserError with the nearest sizes that
    do."""
    if batch_size < 1 or batch_size % ranks:
        lower = batch_size // ranks * ranks
        nearest = f"{lower} or {lower + ranks}" if lower > 0 else str(lower + ranks)
        raise UserError(f"batch.size {batch_size} does not divide by {ranks} ranks; the nearest that do are {nearest}")
    return batch_size // ranks


def shutdown() -> None:
    """Destroys the process group; without this gloo warns at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()
