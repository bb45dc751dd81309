"""The script for GPUs (tests/gpu) at toy sizes on the CPU, so that it does not fail on the card by a typing mistake."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.gpu.ring import covered

ROOT = Path(__file__).parent.parent


def test_every_section_runs_and_nothing_fails(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = ["bash", "tests/gpu/run.sh", "--dry", "--out", str(out)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads(out.read_text())
    sections = {record["section"] for record in records}
    assert sections == {"system", "losses", "ring", "steps", "memory", "speed", "training", "several"}
    measured = [record for record in records if record["ok"] is True]
    assert len(measured) > 25
    assert len(done.stdout.splitlines()) > len(records)


def test_a_section_starts_as_on_a_gpu() -> None:
    """By spawn: the new process must be able to import what it runs."""
    command = ["bash", "tests/gpu/run.sh", "--dry", "--start", "spawn", "--only", "ring"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "| ring | sigmoid" in done.stdout, done.stdout + done.stderr


def test_without_a_gpu_it_names_the_option(tmp_path: Path) -> None:
    empty = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    done = subprocess.run(
        ["bash", "tests/gpu/run.sh"], cwd=ROOT, env=empty, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "--dry" in done.stderr


@pytest.mark.parametrize(
    ("spans", "by", "share"),
    [
        ([(0, 10), (20, 30)], [(5, 25)], 0.5),
        ([(0, 10), (2, 4)], [(0, 2), (1, 3), (9, 20)], 0.4),
        ([(3, 5)], [(0, 3), (5, 9)], 0.0),
        ([(1, 2)], [(0, 5)], 1.0),
        ([], [(0, 1)], 0.0),
    ],
)
def test_what_lies_behind_products(
    spans: list[tuple[float, float]], by: list[tuple[float, float]], share: float
) -> None:
    assert covered(spans, by) == pytest.approx(share)
