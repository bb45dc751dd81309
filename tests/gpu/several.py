"""Two or more cards: the ring over NCCL, and what training hides of it."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial

import torch

from tests.gpu.checks import Check, Measured, Skip, worst
from tests.gpu.losses import EXACT

EXCHANGES = ("ring", "bidirectional", "gather", "hierarchical")


def cards() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def launched(*arguments: str) -> dict[str, float]:
    """What rank 0 of ``tests.gpu.ranks`` prints, a rank on each card."""
    if cards() < 2:
        raise Skip(f"{cards()} card(s) here")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={cards()}"]
    command += ["-m", "tests.gpu.ranks", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-300:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def exact(exchange: str) -> Measured:
    return worst(launched("exact", exchange), EXACT)


def hidden() -> Measured:
    """How much of the transfers hides behind the products: the ring's time against the same tiles without peers."""
    found = launched("overlap", "ring")
    ratio = found["ring"] / found["alone"]
    return Measured(f"{ratio:.2f}x of the products alone", ratio <= 1.15, found)


def checks(dry: bool) -> list[Check]:
    found = [
        Check(f"{exchange} over NCCL", f"error <= {EXACT:.0e}", partial(exact, exchange)) for exchange in EXCHANGES
    ]
    return [*found, Check("transfers behind the products", "<= 1.15x", hidden)]
