"""Checks every node before a run: prints one line per node, and a remedy for each problem.

    python -m trainer.doctor                                                             # this machine only
    python -m trainer.doctor --hostfile hostfile --paths /shared/runs /shared/shards     # over ssh

Checks that versions match, that there are as many GPUs as in the hostfile, that /dev/shm is large enough for NCCL, that
the first node's port is reachable, that paths exist, are writable and shared by all nodes, that clocks agree, and that
DeepSpeed's extensions can be built; measures the bandwidth between neighbours on the ring. Exits with 1 if a check
fails. RINGLIP_SSH holds extra options for ssh (RINGLIP_SSH="-p 2222 -F config").
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.io.errors import run_command
from trainer.core.types import UserError

CLOCK_SECONDS = 2.0
"""Larger differences between clocks make logs and file times misleading."""
SHM_BYTES = 1 << 30
"""NCCL needs some 10 MiB per connection; with Docker's default of 64 MiB it fails with "unhandled system error"."""
LIMIT_SECONDS = 420


@dataclass
class Node:
    """A line of the hostfile, and the results of the checks on that node."""

    name: str
    slots: int
    here: bool = False
    found: dict[str, Any] = field(default_factory=dict)
    offset: float = 0.0
    """Seconds by which its clock is ahead of this machine's."""
    failure: str = ""
    """Why the node did not answer."""


def read_hostfile(path: Path) -> list[Node]:
    """Reads lines of ``NAME slots=N``; raises UserError with the line number."""
    if not path.is_file():
        raise UserError(f"{path}: no such hostfile; launch/hostfile.example shows one")
    nodes = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not words[1].removeprefix("slots=").isdigit() or not words[1].startswith("slots="):
            raise UserError(f"{path}, line {number}: expected NAME slots=RANKS, got {line.strip()!r}")
        nodes.append(Node(words[0], int(words[1].removeprefix("slots="))))
    if not nodes:
        raise UserError(f"{path}: has no nodes")
    return nodes


def ask(node: Node, task: dict[str, Any]) -> None:
    """Runs the checks on a node and records the results."""
    command = [sys.executable, "-m", "trainer.doctor.node", json.dumps(task)]
    if not node.here:
        there = f"cd {shlex.quote(os.getcwd())} && PATH={shlex.quote(os.environ['PATH'])} {shlex.join(command)}"
        options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=15", *shlex.split(os.environ.get("RINGLIP_SSH", ""))]
        command = ["ssh", *options, node.name, there]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        try:
            node.found |= json.loads(line)
        except ValueError:  # not ours: a login message
            continue
        if "clock" in node.found and not node.offset:
            node.offset = node.found["clock"] - time.time()
    errors = process.stderr.read().strip().splitlines()
    if process.wait():
        node.failure = errors[-1] if errors else f"exit code {process.returncode}"


def problems(nodes: list[Node], slots_known: bool) -> list[str]:
    """Everything that would break a run or falsify its results, with a remedy for each."""
    found: list[str] = []
    heard = [node for node in nodes if "versions" in node.found]
    for node in nodes:
        if node.failure and node not in heard:
            found.append(
                f"{node.name}: {node.failure}; `ssh {node.name} true` must work, repository and .venv lie at one path"
            )
        elif node.failure:
            found.append(f"{node.name}: the checks did not finish: {node.failure}")
    for node in heard:
        found += _own(node, slots_known)
    if heard:
        first = heard[0]
        for node in heard[1:]:
            for package, number in first.found["versions"].items():
                other = node.found["versions"].get(package)
                if other != number:
                    found.append(
                        f"{node.name}: {package} {other}, but {number} on {first.name}; install the same "
                        f"requirements.txt, sources"
                    )
        early, late = min(heard, key=lambda node: node.offset), max(heard, key=lambda node: node.offset)
        if late.offset - early.offset > CLOCK_SECONDS:
            apart = f"{late.offset - early.offset:.1f} s"
            found.append(f"{late.name}: its clock is {apart} ahead of that of {early.name}; run chrony or ntpd on both")
    return found


def _own(node: Node, slots_known: bool) -> list[str]:
    facts, found = node.found, []
    gpus = len(facts["gpus"])
    if slots_known and gpus and gpus < node.slots:
        found.append(
            f"{node.name}: has {gpus} GPUs, but the hostfile says slots={node.slots}; correct it, or run `nvidia-smi` "
            "there"
        )
    if gpus > 1 and facts["shm"] < SHM_BYTES:
        found.append(
            f"{node.name}: /dev/shm has {facts['shm'] / 2**20:,.0f} MiB free, and NCCL exchanges between the GPUs of a "
            "node "
            f"there: start the container with --shm-size=8g or --ipc=host"
        )
    for path, wrong in facts["paths"].items():
        if wrong:
            found.append(f"{node.name}: {path} {wrong}; mount it, or name another run.directory")
    for path, wrong in facts.get("shared", {}).items():
        if wrong and not facts["paths"][path]:
            found.append(f"{node.name}: {path} {wrong}; mount one file system on all nodes")
    if facts.get("port"):
        found.append(
            f"{node.name}: cannot meet on the first node's port ({facts['port']}); open it, or choose another --port"
        )
    if facts.get("ring"):
        found.append(
            f"{node.name}: nodes meet but cannot exchange ({facts['ring']}); open all ports between them, set "
            f"NCCL_SOCKET_IFNAME"
        )
    if facts.get("error"):
        found.append(f"{node.name}: DeepSpeed does not import ({facts['error']}); pip install -r requirements.txt")
    return found


def table(nodes: list[Node]) -> str:
    """One line per node."""
    rows: list[tuple[str, ...]] = [
        ("node", "ranks", "devices", "torch", "deepspeed", "ringlip", "clock", "paths", "from left", "extensions")
    ]
    for node in nodes:
        facts = node.found
        if "versions" not in facts:
            rows.append((node.name, str(node.slots), "no answer", *[""] * 7))
            continue
        devices = f"{len(facts['gpus'])} x {facts['gpus'][0]}" if facts["gpus"] else f"{facts['cores']} cores"
        wrong = [path for path, text in (facts["paths"] | facts.get("shared", {})).items() if text]
        paths = "-" if not facts["paths"] else "ok" if not wrong else "FAIL"
        rate = facts.get("bytes_per_second")
        speed = f"{rate / 1e6:,.0f} MB/s" if rate else "FAIL" if facts.get("port") or facts.get("ring") else "-"
        versions = facts["versions"]
        names = (versions["torch"], versions["deepspeed"], versions["ringlip"][:8])
        rows.append(
            (
                node.name,
                str(node.slots or "-"),
                devices,
                *names,
                f"{node.offset:+.2f} s",
                paths,
                speed,
                _extensions(facts),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _extensions(facts: dict[str, Any]) -> str:
    """DeepSpeed's extensions. RingLIP needs none; a ds_config may (NVMe offload: AsyncIO)."""
    tools = [name for name in ("compiler", "ninja") if not facts.get(name)]
    if tools:
        return f"none: no {' and no '.join(tools)}"
    return (
        " ".join(
            f"{name.removesuffix('Builder')}{'' if good else ':no'}" for name, good in facts.get("ops", {}).items()
        )
        or "?"
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--hostfile", type=Path, help="lines of NAME slots=RANKS; without it only this machine is checked"
    )
    parser.add_argument(
        "--paths",
        nargs="*",
        default=[],
        metavar="DIR",
        help="directories that all nodes must see and write: runs, shards",
    )
    parser.add_argument("--master-addr", default="", help="address of the first node (default: its name)")
    parser.add_argument("--port", type=int, default=29500, help="rendezvous port on the first node (default 29500)")
    parser.add_argument(
        "--megabytes", type=float, default=64, help="size of the exchange between neighbours (default 64)"
    )
    options = parser.parse_args(argv)
    nodes = read_hostfile(options.hostfile) if options.hostfile else [Node("localhost", 0, here=True)]
    task = {
        "world": len(nodes),
        "address": options.master_addr or nodes[0].name,
        "port": options.port,
        "bytes": int(options.megabytes * 1e6),
    }
    paths = [str(Path(path).absolute()) for path in options.paths]
    with ThreadPoolExecutor(max_workers=len(nodes)) as pool:
        waiting = [pool.submit(ask, node, task | {"rank": rank, "paths": paths}) for rank, node in enumerate(nodes)]
        for one in waiting:
            one.result(LIMIT_SECONDS)
    print(table(nodes))
    wrong = problems(nodes, options.hostfile is not None)
    for line in wrong:
        print(f"FAIL {line}")
    print("no problems found" if not wrong else f"{len(wrong)} problem{'s' if len(wrong) > 1 else ''} found")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
