"""Decides when a run saves, which checkpoints it keeps and what it resumes from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from trainer.checkpoint import state_io, store
from trainer.core import distributed
from trainer.core.collectives import on_main
from trainer.core.settings import Settings
from trainer.core.types import RunFailed, UserError

logger = logging.getLogger(__name__)


class CheckpointSettings(Settings):
    """When to save, what to keep and what to resume from."""

    every: int = Field(default=1_000_000, ge=1)
    "Pairs between checkpoints; one is also saved at the end of the run and when it is stopped early."
    keep: int = Field(default=2, ge=1)
    "Number of newest checkpoints to keep."
    keep_every: int = Field(default=0, ge=0)
    "Also keep, permanently, the first checkpoint in every interval of so many pairs (0: none)."
    best: tuple[str, ...] = ()
    """Metric of log.jsonl, such as image_to_text_r1, or several, of which the mean counts: also keep the checkpoint of
    the best evaluation, which `export` and `evaluate` then use. A finetuning run starts with the pretrained model's, at
    0 samples. Needs eval.every."""
    resume: str = "auto"
    """`auto`: resume from the run's newest undamaged checkpoint; `never`: fail if the run directory has any; a path (a
    checkpoint or another run): start from it while the run has no checkpoint of its own."""
    asynchronous: bool = False
    "Write from a copy in rank 0's memory (12 bytes per parameter) while training continues."
    on_failure: Literal["continue", "stop"] = "continue"
    """If a checkpoint cannot be written: warn and continue, or stop the run. If it is the last one (at the end, or
    after a signal), the run ends with an error in any case."""

    @field_validator("best", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return (value,) if isinstance(value, str) and value else value or ()


class Checkpointer:
    """The checkpoints of a run. Every rank creates one and calls its methods at the same points; only rank 0 uses the
    disk."""

    def __init__(self, run_dir: Path, settings: CheckpointSettings) -> None:
        self._run_dir, self._settings = run_dir, settings
        self._at: int | None = None
        self._background: Background | None = Background() if settings.asynchronous else None

    def resume(self, engine: Any, loss: nn.Module | None = None) -> state_io.Resumed | None:
        """Loads the checkpoint that the settings select; None for a new run."""
        start = on_main(lambda: {"folder": self._start()})["folder"]
        if start is None:
            return None
        resumed = state_io.restore(Path(start), engine, loss)
        self._at = resumed.samples_seen
        return resumed

    def _start(self) -> str | None:
        own = store.listing(self._run_dir)
        if self._settings.resume == "never":
            if own:
                raise UserError(
                    f"{own[-1]} exists and checkpoint.resume is never: choose another run.directory, or resume=auto"
                )
            return None
        newest = store.newest_good(self._run_dir)
        if newest is not None:
            return str(newest)
        if self._settings.resume != "auto":
            return str(store.find(Path(self._settings.resume)))
        if own:
            raise UserError(
                f"{store.checkpoints_dir(self._run_dir)}: every checkpoint is damaged; remove them to start again"
            )
        return None

    def save(self, engine: Any, samples_seen: int, extra: dict[str, Any], loss: nn.Module | None = None) -> None:
        """Saves the state at ``samples_seen``, unless it is saved already. If the disk fails, warns or raises
        UserError, as the settings say."""
        self.wait()
        if self._at == samples_seen:
            return
        if self._background is None:
            try:
                state_io.save(
                    self._run_dir, engine, samples_seen, extra, loss, self._settings.keep, self._settings.keep_every
                )
            except OSError as error:
                self._failed(str(error))
            else:
                self._at = samples_seen
            return
        plan = state_io.contents(engine, samples_seen, extra, loss)
        copies = self._background.copy(state_io.pieces(engine, loss))
        self._at = samples_seen
        if distributed.is_main():
            self._background.start(lambda: self._write(plan, copies))

    def keep_as_best(self, samples_seen: int, record: dict[str, Any]) -> None:
        """The checkpoint just saved is the best; of one that failed nothing is
        noted."""
        self.wait()
        if self._at == samples_seen:
            on_main(lambda: store.write_best(self._run_dir, {"samples_seen": samples_seen, **record}))

    def best(self, samples_seen: int) -> int | None:
        """samples_seen of the best checkpoint of a run that resumes at ``samples_seen``; a later one belongs to a
        course that the run has left."""
        record = on_main(lambda: store.read_best(self._run_dir))
        return record["samples_seen"] if record and record["samples_seen"] <= samples_seen else None

    def _write(self, plan: state_io.Contents, tensors: list[state_io.Piece]) -> str | None:
        try:
            state_io.write(self._run_dir, plan, tensors, self._settings.keep, self._settings.keep_every)
        except OSError as error:
            return state_io.explain(error, self._run_dir, plan)
        return None

    def wait(self) -> None:
        """Waits until a background write is on the disk."""
        if self._background is None:
            return
        background = self._background
        error = on_main(lambda: {"error": background.join()})["error"]
        if error is not None:
            self._at = None
            self._failed(error)

    def join(self) -> None:
        """Waits for a background write, without communication: also called when the run fails."""
        if self._background is not None:
            self._background.join()

    def _failed(self, error: str) -> None:
        text = f"cannot write a checkpoint: {error}; earlier ones are intact"
        if self._settings.on_failure == "stop":
            raise UserError(f"{text}; free some space and start again")
        logger.warning(f"{text}; training continues (checkpoint.on_failure)")

    def close(self, samples_seen: int) -> None:
        """Call at the end of a run, or when it stops: raises RunFailed unless the present state is on the disk."""
        self.wait()
        if self._at != samples_seen:
            raise RunFailed(
                f"{store.checkpoints_dir(self._run_dir)}: the last checkpoint, at {samples_seen:,} samples, could "
                f"not be written (see the "
                "warning above): free some space and start the same command again; it resumes from the one before"
            )


class Background:
    """A thread that writes copies of tensors. The memory of the copies is reused for the next checkpoint."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, str], Tensor] = {}
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._future: Future[str | None] | None = None

    def copy(self, tensors: Iterable[state_io.Piece]) -> list[state_io.Piece]:
        """Copies the tensors to host memory, on rank 0."""
        copies: list[state_io.Piece] = []
        for file, name, tensor in tensors:
            memory = self._memory.get((file, name))
            if memory is None or memory.shape != tensor.shape:
                memory = self._memory[file, name] = torch.empty(tensor.shape, dtype=tensor.dtype)
            copies.append((file, name, memory.copy_(tensor)))
        return copies

    def start(self, work: Callable[[], str | None]) -> None:
        """Runs ``work``, which returns an error message or None."""
        assert self._future is None
        self._future = self._pool.submit(work)

    def join(self) -> str | None:
        """Waits for the thread; returns the error message or None."""
        future, self._future = self._future, None
        return future.result() if future else None
