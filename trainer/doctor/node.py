"""The checks of one node and of its connections; ``python -m trainer.doctor`` starts it on each node.

    python -m trainer.doctor.node '{"rank": 0, "world": 2, "address": "node-a", "port": 29500, "paths": ["/shared"],
                                    "bytes": 1000000}'

Prints JSON lines: local facts first, then the checks that need other nodes. A failed check is reported in words and
does not stop the others.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.core import collectives, distributed
from trainer.metrics.environment import PACKAGES, git_revision

PATIENCE = 60
"""Seconds for the nodes to connect."""
OPS = ("CPUAdamBuilder", "FusedAdamBuilder", "AsyncIOBuilder")


def facts(paths: list[str]) -> dict[str, Any]:
    """Checks that need no other node."""
    packages = {}
    for package in PACKAGES:
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = "absent"
    return {
        "host": socket.gethostname(),
        "clock": time.time(),
        "versions": {
            "python": sys.version.split()[0],
            **packages,
            "cuda": str(torch.version.cuda),
            "ringlip": git_revision() or "unknown",
        },
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cores": len(os.sched_getaffinity(0)),
        "shm": shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else 0,
        "paths": {path: _writable(Path(path)) for path in paths},
    }


def _writable(path: Path) -> str:
    """Empty, or the problem."""
    if not path.is_dir():
        return "does not exist"
    probe = path / f".ringlip-doctor-{socket.gethostname()}-{os.getpid()}"
    try:
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
    except OSError as error:
        return f"cannot be written ({error.strerror})"
    return ""


def buildable() -> dict[str, Any]:
    """Which of DeepSpeed's extensions can be compiled here; in another process, because DeepSpeed takes seconds."""
    code = (
        "import json, logging; logging.disable(logging.CRITICAL)\n"
        "from deepspeed.accelerator import get_accelerator\n"
        f"names = {OPS!r}\n"
        "builders = {name: get_accelerator().create_op_builder(name) for name in names}\n"
        "print(json.dumps({name: bool(b and b.is_compatible(verbose=False)) for name, b in builders.items()}))\n"
    )
    found: dict[str, Any] = {"compiler": shutil.which("c++") is not None, "ninja": shutil.which("ninja") is not None}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    try:
        return found | {"ops": json.loads(done.stdout.splitlines()[-1])}
    except (IndexError, ValueError):
        return found | {"error": (done.stderr.strip().splitlines() or ["no output from DeepSpeed"])[-1]}


def together(task: dict[str, Any]) -> dict[str, Any]:
    """Checks that need the other nodes: rank 0's port, shared paths, an exchange around the ring."""
    rank, world = task["rank"], task["world"]
    timeout = timedelta(seconds=PATIENCE)
    try:
        store = dist.TCPStore(task["address"], task["port"], world, rank == 0, timeout)
    except (OSError, RuntimeError) as error:  # DistNetworkError is one
        return {"port": " ".join(str(error).split())[:160]}
    found: dict[str, Any] = {"port": "", "shared": _shared(store, rank, world, task["paths"])}
    if torch.cuda.is_available():
        torch.cuda.set_device(0)
    try:
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo", store=store, rank=rank, world_size=world, timeout=timeout
        )
        found["bytes_per_second"] = _ring(rank, world, task["bytes"])
    except RuntimeError as error:
        found["ring"] = " ".join(str(error).split())[:160]
    finally:
        distributed.shutdown()
    return found


def _shared(store: dist.Store, rank: int, world: int, paths: list[str]) -> dict[str, str]:
    """Rank 0 writes a file into each path, which the others must see. Path -> empty, or the problem."""
    name, wrong = "", {}
    if rank == 0:
        name = f".ringlip-doctor-shared-{os.getpid()}-{time.time_ns()}"
        for path in paths:
            if Path(path).is_dir() and os.access(path, os.W_OK):
                (Path(path) / name).write_text("seen")
        store.set("name", name)
    else:
        name = store.get("name").decode()
        for path in paths:
            deadline = time.monotonic() + 5  # network file systems show it late
            while not (Path(path) / name).is_file() and time.monotonic() < deadline:
                time.sleep(0.2)
            wrong[path] = (
                ""
                if (Path(path) / name).is_file()
                else "does not show a file that the first node wrote there: it is not shared"
            )
    store.set(f"looked-{rank}", "yes")
    if rank == 0:
        store.wait([f"looked-{other}" for other in range(world)])
        for path in paths:
            (Path(path) / name).unlink(missing_ok=True)
    return wrong


def _ring(rank: int, world: int, size: int) -> float:
    """Bytes per second received from the left neighbour while sending as much to the right: the best of three."""
    device = distributed.device()
    mine, theirs = (
        torch.zeros(size, dtype=torch.uint8, device=device),
        torch.empty(size, dtype=torch.uint8, device=device),
    )
    best = 0.0
    for _ in range(3):
        collectives.barrier()
        began = time.perf_counter()
        right, left = (rank + 1) % world, (rank - 1) % world
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, mine, right), dist.P2POp(dist.irecv, theirs, left)]):
            work.wait()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, size / (time.perf_counter() - began))
    collectives.barrier()
    return best


def main() -> None:
    task = json.loads(sys.argv[1])
    print(json.dumps(facts(task["paths"])), flush=True)
    print(json.dumps(buildable()), flush=True)
    if task["world"] > 1:
        print(json.dumps(together(task)), flush=True)


if __name__ == "__main__":
    main()
