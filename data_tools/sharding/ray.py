"""Shards through a Ray cluster: the same tasks as `shard --task i/n`, scheduled by Ray, then merged. Ray is optional:
pip install ray."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from data_tools.io.errors import UserError

_PATHS = ("pairs", "out", "images")


def shard_on_ray(arguments: argparse.Namespace) -> None:
    """Runs ``arguments.ray`` tasks of one process each and waits for all. PAIRS and OUT must be where every node sees
    them.

    Connects to the cluster that RAY_ADDRESS names, or to the one this machine belongs to, or starts one on this
    machine.
    """
    try:
        import ray
    except ImportError:
        raise UserError(
            "--ray needs Ray, which is not installed: pip install ray; or use --processes and --task"
        ) from None
    from data_tools.commands.shard import run_task

    if not ray.is_initialized():
        ray.init(runtime_env={"py_modules": [str(Path(__file__).parents[1])]}, log_to_driver=False)
    count = arguments.ray
    # Tasks start in a folder of their own.
    places = {
        name: os.path.abspath(path)
        for name, path in vars(arguments).items()
        if name in _PATHS and path and "://" not in path
    }
    settings = {**vars(arguments), **places, "processes": 1, "quiet": True}
    remote = ray.remote(num_cpus=1, max_retries=3)(_task)
    waiting = [remote.remote(run_task, {**settings, "task": (index, count)}) for index in range(count)]
    while waiting:
        done, waiting = ray.wait(waiting)
        for error in ray.get(done):
            if error is not None:
                for task in waiting:
                    ray.cancel(task)
                raise UserError(error)
        print(f"{count - len(waiting)} of {count} Ray tasks done", file=sys.stderr, flush=True)


def _task(run: Any, settings: dict[str, Any]) -> str | None:
    """One task; what the user can mend comes back as a line, not as Ray's traceback."""
    try:
        run(argparse.Namespace(**settings))
    except UserError as error:
        return str(error)
    return None
