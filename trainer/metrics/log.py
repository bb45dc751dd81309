"""``log.jsonl``, the progress line and the trackers, fed by one call per step."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from data_tools.io.files import write_atomic
from trainer.core import distributed
from trainer.core.settings import Settings
from trainer.metrics.advice import Advisor
from trainer.metrics.environment import write_environment
from trainer.metrics.meters import Meter
from trainer.metrics.progress_line import ProgressLine
from trainer.metrics.trackers import Trackers, check_installed

logger = logging.getLogger(__name__)


Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow"]


class LogSettings(Settings):
    """What a run logs."""

    trackers: tuple[Tracker, ...] = ("tensorboard",)
    "Any of tensorboard, wandb, trackio, mlflow; `none` for none. log.jsonl is always written."
    project: str = "ringlip"
    "Project name in the trackers; the run's own name is that of its directory."
    every: int = Field(default=10, ge=1)
    "Steps between two lines of log.jsonl."
    line_seconds: float = Field(default=30.0, ge=0)
    "Seconds between progress lines if the output is not a terminal."

    @field_validator("trackers", mode="before")
    @classmethod
    def _one_or_none(cls, value: Any) -> Any:
        if value is None or value == "none":
            return ()
        return (value,) if isinstance(value, str) else value


class RunLog:
    """A run's log. Every rank creates one and calls the same methods; only rank 0 writes."""

    def __init__(
        self,
        run_dir: Path,
        settings: LogSettings,
        total_samples: int,
        recipe: dict[str, Any] | None = None,
        samples_seen: int = 0,
        advisor: Advisor | None = None,
    ) -> None:
        check_installed(settings.trackers)
        self._every = settings.every
        self._total, self._seen = total_samples, samples_seen
        self._advisor = advisor
        self._meter = Meter()
        self._latest: dict[str, Any] = {}
        run_dir.mkdir(parents=True, exist_ok=True)
        write_environment(run_dir, samples_seen)
        self._seconds = 0.0
        if distributed.is_main():
            self._trackers = Trackers(settings.trackers, run_dir, settings.project, recipe or {}, samples_seen)
            self._seconds = cut_back(run_dir / "log.jsonl", samples_seen)
            self._file = LineFile(run_dir / "log.jsonl")
            self._line = ProgressLine(total_samples, settings.line_seconds)

    def waiting(self) -> AbstractContextManager[None]:
        """Wrap the wait for a batch in this."""
        return self._meter.waiting()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Wrap what is not training (evaluation, checkpoints) in this: its time does not count in rates."""
        with self._meter.paused():
            yield

    def due(self, step: int, samples_seen: int) -> bool:
        """Whether ``step``, which ends at ``samples_seen``, writes a line."""
        return step % self._every == 0 or samples_seen >= self._total

    def step(self, step: int, samples_seen: int, values: dict[str, Any], local_seconds: float = 0.0) -> None:
        """Call after each step. ``values`` are the same on all ranks; ``local_seconds`` is this rank's part of
        ``rank_seconds``.

        If a value is not finite, warns and writes a line at once.
        """
        self._meter.step(samples_seen - self._seen, local_seconds)
        self._seen = samples_seen
        position = {"step": step, "samples_seen": samples_seen}
        not_finite = [key for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)]
        last = samples_seen >= self._total
        if not_finite:
            logger.warning(f"step {step}: {', '.join(f'{key} is {values[key]}' for key in not_finite)}")
        measured: dict[str, Any] = {}
        if not_finite or self.due(step, samples_seen):
            reading = self._meter.read()
            measured = {
                "pairs_per_second": round(reading.samples / reading.seconds, 2),
                "step_seconds": round(reading.seconds / max(reading.steps, 1), 6),
                "seconds": round(self._seconds + self._meter.seconds, 3),
                "memory_bytes": reading.memory_bytes,
                "data_wait": round(reading.data_wait, 4),
            }
            if distributed.world_size() > 1:
                measured["slowest_rank"] = reading.slowest_rank
                measured["rank_seconds"] = dict(
                    zip(("least", "median", "most"), (round(s, 4) for s in reading.rank_seconds), strict=True)
                )
            self._latest = measured
            if distributed.is_main():
                self._write(position | values | measured)
                for text in self._advisor.hear(position | values) if self._advisor else []:
                    logger.warning(text)
                    self.note(samples_seen, {"advice": text})
        if distributed.is_main():
            rate = {} if self._latest else {"pairs_per_second": self._meter.pairs_per_second()}
            self._line.show(
                {key: _finite(value) for key, value in (self._latest | rate | position | values).items()}, last
            )

    def note(self, samples_seen: int, values: dict[str, Any]) -> None:
        """Logs other values, such as ``{"eval": {...}}``, at ``samples_seen``."""
        if distributed.is_main():
            self._write({"samples_seen": samples_seen} | values)

    def flush(self) -> None:
        """Call before a checkpoint: a run that resumes from it must find the earlier lines in the log."""
        if distributed.is_main():
            self._file.flush()

    def _write(self, record: dict[str, Any]) -> None:
        clean = _finite(record)
        self._file.append(json.dumps(clean, allow_nan=False) + "\n")
        self._trackers.log(
            {key: value for key, value in clean.items() if key not in ("step", "samples_seen")}, record["samples_seen"]
        )

    def close(self) -> None:
        """Call at the end of a run."""
        if distributed.is_main():
            self._line.close()
            self._file.close()
            self._trackers.close()


class LineFile:
    """Appends lines. While the disk is full they wait in memory, so that a full disk neither ends a run nor loses its
    log."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        self._end = os.lseek(self._file, 0, os.SEEK_END)
        self._waiting: list[bytes] = []

    def append(self, line: str) -> None:
        """Writes the waiting lines and ``line``."""
        self._waiting.append(line.encode())
        self.flush()

    def flush(self) -> None:
        """Writes the waiting lines."""
        data = b"".join(self._waiting)
        try:
            if os.pwrite(self._file, data, self._end) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(self._file, self._end)
            if len(self._waiting) == 1:
                logger.warning(f"{self._path}: {error.strerror}; its lines wait in memory until there is space")
            return
        self._end += len(data)
        self._waiting = []

    def close(self) -> None:
        """Warns of lines that could not be written."""
        self.flush()
        os.close(self._file)
        if self._waiting:
            logger.warning(f"{self._path}: {len(self._waiting)} lines are lost: the disk was full until the end")


def cut_back(path: Path, samples_seen: int) -> float:
    """Removes lines after the ``samples_seen`` that a run resumes from (and a line truncated by a crash), so that a
    curve has no duplicates; returns the training seconds up to there.
    """
    if not path.is_file():
        return 0.0
    kept: list[str] = []
    seconds = 0.0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            here = 0 < samples_seen >= int(record["samples_seen"])
        except (ValueError, KeyError, TypeError):
            continue
        if here:
            kept.append(line + "\n")
            seconds = max(seconds, record.get("seconds") or 0.0)
    write_atomic(path, "".join(kept))
    return seconds


def _finite(value: Any) -> Any:
    """NaN and infinities, which JSON does not have, as None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
