"""Checkpoint directories, written atomically: each is complete or absent, even if the process is killed.

    <run>/checkpoints/samples-000123456/{model.safetensors, optimizer.safetensors, state.json, checkpoint.json}
    <run>/checkpoints/latest                                         the name of the newest: a run resumes from it
    <run>/checkpoints/best.json                                      the one that checkpoint.best keeps, and its score

A checkpoint is written under a temporary name; each file is synced, the manifest (``checkpoint.json``: sizes and
digests) last. Then the directory is renamed, and ``latest`` updated. To go back to an older checkpoint, write its name
into ``latest``: later checkpoints are then obsolete, and the next save removes them. All of this happens on rank 0.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_tools.io.files import publish, sync_folder, write_atomic
from trainer.checkpoint.tensor_file import DigestFile, digest_of
from trainer.core.types import UserError

logger = logging.getLogger(__name__)


MANIFEST = "checkpoint.json"
BEST = "best.json"
"""Beside the checkpoints: which one `checkpoint.best` keeps, and its score."""
FORMAT = "ringlip-checkpoint"
VERSION = 1
NAME = re.compile(r"samples-(\d+)")


def checkpoints_dir(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def name_of(samples_seen: int) -> str:
    return f"samples-{samples_seen:09d}"


def samples_of(folder: Path) -> int:
    """``samples_seen``, from a checkpoint's name."""
    match = NAME.fullmatch(folder.name)
    assert match, folder
    return int(match.group(1))


def listing(run_dir: Path) -> list[Path]:
    """Checkpoint directories of a run, damaged or not, oldest first."""
    folder = checkpoints_dir(run_dir)
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=samples_of)


class Draft:
    """A checkpoint being written: ``file`` for each part, then ``finish`` or ``abandon``."""

    def __init__(self, run_dir: Path, samples_seen: int) -> None:
        self.samples_seen = samples_seen
        self.final = checkpoints_dir(run_dir) / name_of(samples_seen)
        self._parent = checkpoints_dir(run_dir)
        self._parent.mkdir(parents=True, exist_ok=True)
        for left_over in self._parent.glob(".*"):  # of a run that died while writing
            _remove(left_over)
        self._folder = self._parent / f".{self.final.name}.partial"
        self._folder.mkdir()
        self._files: dict[str, DigestFile] = {}

    def file(self, name: str) -> DigestFile:
        self._files[name] = DigestFile(self._folder / name)
        return self._files[name]

    def write(self, name: str, data: dict[str, Any]) -> None:
        """Writes a JSON file."""
        self.file(name).write(json.dumps(data, indent=1).encode())

    def finish(self) -> Path:
        """Publishes the checkpoint and makes it the latest."""
        files = {name: file.close() for name, file in self._files.items()}
        manifest = {"format": FORMAT, "version": VERSION, "samples_seen": self.samples_seen, "files": files}
        last = DigestFile(self._folder / MANIFEST)
        last.write(json.dumps(manifest, indent=1).encode())
        last.close()
        sync_folder(self._folder)
        if self.final.exists():  # written before the run went back to an older checkpoint
            os.rename(self.final, self._parent / f".{self.final.name}.replaced")
        publish(self._folder, self.final)
        write_atomic(self._parent / "latest", self.final.name + "\n")
        _remove(self._parent / f".{self.final.name}.replaced")
        return self.final

    def abandon(self) -> None:
        """Removes the draft."""
        for file in self._files.values():
            file.abandon()
        _remove(self._folder)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest. Raises UserError if the checkpoint is incomplete."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{folder}: has no {MANIFEST}, so it is not a complete checkpoint; name another, or its run directory"
        )
    try:
        manifest = json.loads(path.read_bytes())
        files = manifest["files"]
        if manifest["format"] != FORMAT or not all(entry.keys() >= {"bytes", "xxh3_128"} for entry in files.values()):
            raise ValueError("unknown fields")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({error})") from error
    if manifest["version"] > VERSION:
        raise UserError(
            f"{path}: written by a newer RingLIP (format {manifest['version']}, known here: {VERSION}); update RingLIP"
        )
    return manifest


def verify(folder: Path, only: str | None = None) -> None:
    """Reads every byte of a checkpoint (of the file ``only``, if given); raises UserError if a file is missing, too
    short or changed."""
    for name, entry in read_manifest(folder)["files"].items():
        if only not in (None, name):
            continue
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: missing")
        if path.stat().st_size != entry["bytes"]:
            raise UserError(f"{path}: has {path.stat().st_size} bytes, but {entry['bytes']} were written")
        if digest_of(path) != entry["xxh3_128"]:
            raise UserError(f"{path}: its content has changed since it was written (digest mismatch)")


def newest_good(run_dir: Path, warn: Callable[[str], None] = logger.warning) -> Path | None:
    """The checkpoint to resume from: the one in ``latest``, or the newest undamaged one before it; None if there is
    none."""
    candidates = listing(run_dir)
    pointer = checkpoints_dir(run_dir) / "latest"
    named = checkpoints_dir(run_dir) / pointer.read_text(errors="replace").strip() if pointer.is_file() else None
    if named in candidates:
        candidates = candidates[: candidates.index(named) + 1]
    for folder in reversed(candidates):
        try:
            verify(folder)
        except UserError as error:
            warn(f"{error}: this checkpoint is damaged, trying the one before it")
        else:
            return folder
    return None


def find(where: Path) -> Path:
    """A run directory's newest undamaged checkpoint, or ``where`` itself if it is a checkpoint, verified. Raises
    UserError."""
    if (where / MANIFEST).is_file():
        verify(where)
        return where
    folder = newest_good(where)
    if folder is None:
        hint = "all of them are damaged" if listing(where) else "none there"
        raise UserError(
            f"{where}: no checkpoint to load ({hint}); name a run directory or one of its checkpoints/samples-*"
        )
    return folder


def write_best(run_dir: Path, record: dict[str, Any]) -> None:
    """Records the best checkpoint; ``record`` has its ``samples_seen`` and its score."""
    write_atomic(checkpoints_dir(run_dir) / BEST, json.dumps(record, indent=1) + "\n")


def read_best(run_dir: Path) -> dict[str, Any] | None:
    """The record of ``write_best``; None if there is none, or the checkpoint is gone."""
    path = checkpoints_dir(run_dir) / BEST
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_bytes())
    return record if (path.parent / name_of(record["samples_seen"]) / MANIFEST).is_file() else None


def find_best(where: Path) -> tuple[Path, dict[str, Any] | None]:
    """(The checkpoint to use from a finished run, its record): the best one if ``checkpoint.best`` kept it; else as
    ``find``, with None."""
    record = None if (where / MANIFEST).is_file() else read_best(where)
    folder = where if record is None else checkpoints_dir(where) / name_of(record["samples_seen"])
    return find(folder), record


def prune(run_dir: Path, newest: int, keep: int, keep_every: int) -> None:
    """Keeps the last ``keep`` checkpoints up to ``newest`` samples, the best one and, unless ``keep_every`` is 0, the
    first one in every interval of so many samples."""
    folders = listing(run_dir)
    ours = [folder for folder in folders if samples_of(folder) <= newest]
    kept = set(ours[-keep:])
    if (best := read_best(run_dir)) is not None:
        kept |= {folder for folder in ours if samples_of(folder) == best["samples_seen"]}
    if keep_every:
        first: dict[int, Path] = {}
        for folder in ours:
            first.setdefault(samples_of(folder) // keep_every, folder)
        kept |= {folder for block, folder in first.items() if block}
    for folder in folders:
        if folder in kept:
            continue
        if samples_of(folder) > newest:
            logger.info(f"removed {folder}: the run was resumed from an earlier checkpoint")
        (folder / MANIFEST).unlink(missing_ok=True)  # first, so that a partly removed one never counts as complete
        shutil.rmtree(folder)
