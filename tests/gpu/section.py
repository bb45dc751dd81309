"""One section in a process of its own. Not in ``__main__``, where a spawned process could not import it from."""

from __future__ import annotations

import os
import sys
import time
import traceback
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any


def run_section(name: str, dry: bool, pipe: Connection) -> None:
    """In a process of its own: sends a record for each check of a section, as it is made."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    # Said here, before any import: the benchmarks that sections borrow from choose the CPU where nothing is said.
    os.environ["DS_ACCELERATOR"] = "cpu" if dry else "cuda"
    if dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from tests.gpu.checks import Skip

    try:
        checks = import_module(f"tests.gpu.{name}").checks(dry)
    except Exception as error:
        pipe.send({"name": "importing the section", "ok": False, "text": short(error), "criterion": ""})
        checks = []
    for check in checks:
        start = time.monotonic()
        record: dict[str, Any] = {"name": check.name, "criterion": check.criterion}
        try:
            measured = check.run()
            record |= {"text": measured.text, "ok": measured.ok, "facts": measured.facts}
        except Skip as reason:
            record |= {"text": f"skipped: {reason}", "ok": None, "skipped": True}
        except Exception as error:
            record |= {"text": short(error), "ok": False, "trace": traceback.format_exc()}
        pipe.send(record | {"seconds": round(time.monotonic() - start, 2)})
    pipe.send(None)
    pipe.close()
    sys.stdout.flush()
    os._exit(0)  # NCCL may wait for ever in a process that saw an error


def short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:200]
