"""The doctor finds what is wrong with a node, names it and the remedy, and says so by its exit code."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.clusters import free_port, ssh_nodes
from trainer.core.types import UserError
from trainer.doctor.__main__ import Node, problems, read_hostfile, table

FACTS: dict[str, Any] = {
    "versions": {"python": "3.11.9", "torch": "2.13.0", "deepspeed": "0.19.8", "ringlip": "abcdef"},
    "gpus": ["A card"] * 2,
    "cores": 8,
    "shm": 8 << 30,
    "paths": {"/shared": ""},
    "shared": {},
    "port": "",
    "bytes_per_second": 1e9,
    "compiler": True,
    "ninja": True,
    "ops": {"CPUAdamBuilder": True, "AsyncIOBuilder": False},
}


def nodes() -> list[Node]:
    return [Node(name, 2, found=copy.deepcopy(FACTS)) for name in ("a", "b")]


def test_what_is_well_is_a_line_a_node() -> None:
    assert problems(nodes(), True) == []
    head, *lines = table(nodes()).splitlines()
    assert head.split()[0] == "node" and [line.split()[0] for line in lines] == ["a", "b"]
    assert "1,000 MB/s" in lines[0] and "CPUAdam AsyncIO:no" in lines[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"versions": FACTS["versions"] | {"torch": "2.12.0"}}, "b: torch 2.12.0, but 2.13.0 on a; install the same"),
        ({"gpus": ["A card"]}, "b: has 1 GPUs, but the hostfile says slots=2"),
        ({"shm": 64 << 20}, "b: /dev/shm has 64 MiB free, and NCCL exchanges between the GPUs of a node there: start"),
        ({"paths": {"/shared": "does not exist"}}, "b: /shared does not exist; mount it"),
        ({"shared": {"/shared": "is not shared"}}, "b: /shared is not shared; mount one file system"),
        ({"port": "timed out"}, "b: cannot meet on the first node's port (timed out); open it"),
        ({"ring": "no route"}, "b: nodes meet but cannot exchange (no route)"),
        ({"error": "no module"}, "b: DeepSpeed does not import (no module)"),
    ],
)
def test_what_fails_is_named_with_its_remedy(change: dict[str, Any], says: str) -> None:
    both = nodes()
    both[1].found |= change
    [line] = problems(both, True)
    assert line.startswith(says)


def test_a_single_gpu_needs_no_shared_memory() -> None:
    node = Node("a", 1, found=copy.deepcopy(FACTS) | {"gpus": ["A card"], "shm": 64 << 20})
    assert problems([node], True) == []


def test_a_clock_that_is_off_and_a_node_that_does_not_answer() -> None:
    both = nodes()
    both[1].offset = 7.5
    assert problems(both, True) == ["b: its clock is 7.5 s ahead of that of a; run chrony or ntpd on both"]
    both[1] = Node("b", 2, failure="Connection refused")
    [line] = problems(both, True)
    assert line.startswith("b: Connection refused; `ssh b true` must work")
    assert "no answer" in table(both)


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text("# nodes\nnode-a slots=8\n\nnode-b slots=4  # old\n")
    assert [(node.name, node.slots) for node in read_hostfile(path)] == [("node-a", 8), ("node-b", 4)]
    path.write_text("node-a slots=8\nnode-b\n")
    with pytest.raises(UserError, match="line 2: expected NAME slots=RANKS, got 'node-b'"):
        read_hostfile(path)
    with pytest.raises(UserError, match="no such hostfile"):
        read_hostfile(tmp_path / "nowhere")


def test_two_real_nodes(tmp_path: Path) -> None:
    """Over ssh, with a shared directory that is there and one that is not."""
    with ssh_nodes(tmp_path / "ssh") as (names, environment):
        hostfile = tmp_path / "hostfile"
        hostfile.write_text("".join(f"{name} slots=1\n" for name in names))
        command = [
            sys.executable,
            "-m",
            "trainer.doctor",
            "--hostfile",
            str(hostfile),
            "--port",
            str(free_port()),
            "--megabytes",
            "1",
        ]
        command += ["--paths", str(tmp_path), "/nowhere"]
        done = subprocess.run(
            command, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
        )
    lines = done.stdout.splitlines()
    assert done.returncode == 1, done.stdout + done.stderr
    assert [line.split()[0] for line in lines[1:3]] == names
    assert all("MB/s" in line for line in lines[1:3])
    assert [line for line in lines if line.startswith("FAIL")] == [
        f"FAIL {name}: /nowhere does not exist; mount it, or name another run.directory" for name in names
    ]
    assert not [path for path in os.listdir(tmp_path) if path.startswith(".ringlip")]
