"""``python -m tests.gpu``: runs the sections one after the other and prints the table. See tests/gpu/__init__.py."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.gpu.section import run_section

SECTIONS = {
    "system": 60,
    "losses": 90,
    "ring": 60,
    "steps": 120,
    "memory": 120,
    "speed": 240,
    "training": 200,
    "several": 120,
}
"""Modules of tests/gpu, in the order of what they tell for their time, with the most seconds that each may take."""
MARKS = {True: "ok", False: "FAIL", None: "-"}


def gpus() -> int:
    """Asked of nvidia-smi, since a parent that has touched CUDA cannot start ranks by fork."""
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return len([line for line in found.splitlines() if line.startswith("GPU ")])


def collect(name: str, dry: bool, limit: float, start: str) -> list[dict[str, Any]]:
    """The records of a section; one more where it crashed or took too long."""
    context = multiprocessing.get_context(start)
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=run_section, args=(name, dry, send))
    process.start()
    send.close()
    records: list[dict[str, Any]] = []
    deadline = time.monotonic() + limit
    try:
        while True:
            if not receive.poll(max(0.0, deadline - time.monotonic())):
                late = {"name": "time", "criterion": f"{limit:.0f} s", "ok": False, "text": "took longer"}
                records.append(late)
                show(name, late)
                break
            record = receive.recv()
            if record is None:
                break
            records.append(record)
            show(name, record)
    except EOFError:
        process.join(5)
        crash = {"name": "process", "criterion": "ends by itself", "ok": False, "text": f"exit {process.exitcode}"}
        records.append(crash)
        show(name, crash)
    finally:
        process.kill()
        process.join()
    return [{"section": name, **record} for record in records]


def show(section: str, record: dict[str, Any]) -> None:
    line = f"| {section} | {record['name']} | {record['criterion']} | {record['text']} | {MARKS[record['ok']]} |"
    print(line, flush=True)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bash tests/gpu/run.sh", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU: shows that the script itself works")
    parser.add_argument("--out", type=Path, help="write all records to this JSON file")
    parser.add_argument("--only", default="", help="sections whose name holds this text")
    parser.add_argument("--seconds", type=float, default=480.0, help="no section starts after so many")
    parser.add_argument("--start", choices=("fork", "spawn"), help="how a section's process begins")
    options = parser.parse_args(argv)
    # On a CPU a forked process saves the seconds of importing torch and DeepSpeed; CUDA does not survive a fork.
    method = options.start or ("fork" if options.dry else "spawn")
    if not options.dry and not gpus():
        print("error: no GPU here; --dry runs the same lines at toy sizes on the CPU", file=sys.stderr)
        return 2
    if options.dry:
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401 (once here instead of once a section)

        import trainer.train  # noqa: F401
    start = time.monotonic()
    print("| section | claim | criterion | measured | |\n|---|---|---|---|---|", flush=True)
    records: list[dict[str, Any]] = []
    for name, limit in SECTIONS.items():
        if options.only not in name:
            continue
        left = options.seconds - (time.monotonic() - start)
        if left < 10:
            record = {"section": name, "name": "all", "criterion": "", "text": "no time left", "ok": None}
            records.append(record)
            show(name, record)
            continue
        records += collect(name, options.dry, min(limit, left), method)
        if options.out:
            options.out.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    failed = [record for record in records if record["ok"] is False]
    for record in failed:
        print(f"\n{record['section']}: {record['name']}\n{record.get('trace', record['text'])}", file=sys.stderr)
    print(f"\n{len(records) - len(failed)} lines in order, {len(failed)} failed, {time.monotonic() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
