"""``environment.json`` documents a run: what ran, where, and from which sources. No environment variables: they may be
secret."""

from __future__ import annotations

import json
import platform
import socket
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from data_tools.io.files import write_atomic
from trainer import __version__
from trainer.core import collectives, distributed

PACKAGES = (
    "torch",
    "deepspeed",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "tokenizers",
    "webdataset",
    "numpy",
)
HOST_BYTES = 64


def write_environment(run_dir: Path, samples_seen: int) -> None:
    """Adds this start to ``<run>/environment.json`` (one entry per start: a run may be stopped and moved). Every rank
    calls it."""
    hosts = _hosts()
    if not distributed.is_main():
        return
    path = run_dir / "environment.json"
    try:
        starts = json.loads(path.read_text())["starts"] if path.is_file() else []
    except (ValueError, KeyError):  # truncated by a crash; nothing depends on it
        starts = []
    starts.append(_environment(hosts) | {"samples_seen": samples_seen})
    write_atomic(path, json.dumps({"starts": starts}, indent=1) + "\n")


def _environment(hosts: list[str]) -> dict[str, Any]:
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": [sys.executable, *sys.argv],
        "directory": str(Path.cwd()),
        "git": git_revision(),
        "ringlip": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "ranks": distributed.world_size(),
        "hosts": {host: hosts.count(host) for host in dict.fromkeys(hosts)},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_revision() -> str | None:
    """The revision of the running sources, with ``+changes`` if they were modified; None outside a checkout."""
    root = Path(__file__).parents[2]
    try:
        revision = _git(root, "rev-parse", "HEAD")
        return revision + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", root, *arguments], check=True, capture_output=True, text=True, timeout=10
    ).stdout.strip()


def _hosts() -> list[str]:
    """Every rank's host name, in rank order."""
    padded = socket.gethostname().encode()[:HOST_BYTES].ljust(HOST_BYTES, b"\0")
    mine = torch.frombuffer(bytearray(padded), dtype=torch.uint8).to(distributed.device())
    return [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in collectives.stack_over_ranks(mine)]
