"""Shards on a Ray cluster: the tasks of `shard --task i/n`, scheduled by Ray, then merged. Ray is optional: pip install
ray."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from data_tools.io.errors import UserError

_PATHS = ("pairs", "out", "images")


def shard_on_ray(arguments: argparse.Namespace) -> None:
    """Runs ``arguments.ray`` tasks of one process each and waits for all. Every node must see PAIRS and OUT.

    Connects to the cluster in RAY_ADDRESS, else to the one that this machine belongs to, else starts one here.
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
    # Ray starts tasks in another working directory.
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
    """Runs one task; a UserError is returned as text, because Ray would wrap it in a traceback."""
    try:
        run(argparse.Namespace(**settings))
    except UserError as error:
        return str(error)
    return None
