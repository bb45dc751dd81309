"""Who am I among the ranks: the same answer under deepspeed, torchrun, accelerate, Slurm and Open MPI, or in one plain
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


_local_rank: int | None = None
"""LOCAL_RANK as the launcher gave it; see ``tell_deepspeed_the_gpu``."""


@contextmanager
def process_group(timeout_seconds: float = 600.0) -> Iterator[None]:
    """Joins the process group and, after success, leaves it in order.

    After an error on several GPUs the process prints it and ends here, with its exit code: destroying the group would
    make NCCL wait for kernels that never end, because the peers they talk to wait for this rank.
    """
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
    """Joins the process group (nccl on GPUs, gloo on CPUs); one plain process becomes a group of one. Safe to call
    again.

    A peer that hangs ends the run after ``timeout_seconds``, so that no collective waits for ever. Groups that are made
    later (DeepSpeed makes its own) have the same timeout. Raises UserError where a rank has no GPU of its own.
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
            f"RANK is set but {', '.join(missing)} not: start through deepspeed or torchrun, or export the address "
            f"of rank 0"
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
    """Has torch's allocator map more memory onto a segment instead of adding one: micro-batches of unlike sizes and a
    step's phases would else leave gaps that nothing fits. What the user has set stays."""
    if not any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")


def tell_deepspeed_the_gpu() -> None:
    """Makes LOCAL_RANK the index of this rank's GPU, which DeepSpeed takes it for.

    The two differ where the launcher shows each rank its own GPU alone. ``local_rank`` still answers with the
    launcher's number.
    """
    global _local_rank
    _local_rank = local_rank()
    for name in ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"):  # DeepSpeed compares them
        if name in os.environ:
            os.environ[name] = str(gpu_index())


def check_one_gpu_each(store: dist.Store, rank: int, world: int, gpu: str) -> None:
    """Raises UserError on all ranks when two of them have the same ``gpu`` (its node and identity): NCCL would only say
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
    return int(os.environ.get("LOCAL_RANK", "0")) if _local_rank is None else _local_rank


def ranks_here() -> int | None:
    """How many processes this node has; None where no launcher says so (one plain process, or one started by hand)."""
    return next((int(os.environ[name]) for name in RANKS_HERE if os.environ.get(name, "").isdigit()), None)


def is_main() -> bool:
    """True on the one rank that prints and writes shared files."""
    return rank() == 0


def device() -> torch.device:
    """Where this rank computes."""
    return torch.device("cuda", gpu_index()) if torch.cuda.is_available() else torch.device("cpu")


def to_device(tensor: torch.Tensor, where: torch.device) -> torch.Tensor:
    """``tensor``, which lies in ordinary memory, on ``where``; the host goes on while it is copied to a GPU."""
    return tensor.pin_memory().to(where, non_blocking=True) if where.type == "cuda" else tensor.to(where)


def gpu_index() -> int:
    """Which of the GPUs that this rank sees is its own: the only one where the launcher shows each rank one (srun
    --gpus-per-task=1), else that of its local rank."""
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
    """Pairs of a global batch on each rank. Raises UserError naming the nearest sizes that all can take an equal part
    of."""
    if batch_size < 1 or batch_size % ranks:
        lower = batch_size // ranks * ranks
        nearest = f"{lower} or {lower + ranks}" if lower > 0 else str(lower + ranks)
        raise UserError(f"batch.size {batch_size} does not divide by {ranks} ranks; the nearest that do are {nearest}")
    return batch_size // ranks


def shutdown() -> None:
    """Leaves the process group; without this gloo complains at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()
