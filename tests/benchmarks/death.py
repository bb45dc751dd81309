"""Seconds from the death of a rank to the exit of all others, with the default settings.

    python -m tests.benchmarks.death --ranks 4 --rounds 5

Real ranks over gloo under trainer.runtime.watchdog, no launcher that would kill siblings: a rank is killed (SIGKILL) or
stopped (SIGSTOP: what the others see of a machine that is gone) while they are in a collective, or where nothing tells
them of each other. One line of JSON a case.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.test_runtime_watchdog import apart, collect, collectives, ranks, started, wait_for
from trainer.config import RunSettings
from trainer.runtime.watchdog import Watchdog


def measure(
    world: int, victim: int, work: Callable[[Watchdog], None], number: signal.Signals, heartbeat_timeout: float
) -> float:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pids = ranks(folder, world, started(folder, work), heartbeat_timeout=heartbeat_timeout, timeout=600)
        for rank in range(world):
            wait_for(folder / f"ready-{rank}")
        os.kill(pids[victim], number)
        began = time.monotonic()
        ended = collect(folder, pids, skip=victim if number == signal.SIGSTOP else None, since=began)
        assert len(ended.lines) == 1, ended.lines
        return ended.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    heartbeat_timeout = RunSettings(samples=1).heartbeat_timeout
    for number in (signal.SIGKILL, signal.SIGSTOP):
        for victim in (0, options.ranks - 1):
            for work in (collectives, apart):
                times = [measure(options.ranks, victim, work, number, heartbeat_timeout) for _ in range(options.rounds)]
                case = {"fault": number.name, "rank": victim, "of": options.ranks, "others": work.__name__}
                found = {"median": round(statistics.median(times), 2), "worst": round(max(times), 2)}
                print(json.dumps(case | {"rounds": options.rounds} | found), flush=True)


if __name__ == "__main__":
    main()
