"""Where shards are written: a local folder (finished by rename) or any fsspec URL (finished files are uploaded). A file
under its final name is always complete."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from data_tools.format.tar_reader import BLOCK
from data_tools.io.errors import UserError
from data_tools.io.files import publish, synced_file
from data_tools.io.lock import FileLock
from data_tools.io.remote import require_backend

PATIENCE = 10.0
"""Seconds to wait for the child processes of a killed run to end."""
PARTS = ".parts"
"""Folder of unfinished work: shards being written, and a record of each finished one until the manifest has them
all."""


class Output:
    """A dataset being written. ``scratch`` is the local folder where files grow."""

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/") or "/"
        self.is_remote = "://" in self.root
        if self.is_remote:
            require_backend(self.root)
            self._base = self._fs._strip_protocol(self.root)
            self._reach()
            self.scratch = Path(tempfile.mkdtemp(prefix="ringlip-shard-"))
        else:
            refuse_file(self.root)
            self.scratch = Path(self.root, PARTS)

    @property
    def _fs(self) -> Any:
        # Not kept: fsspec caches one per process, and a parent's does not work in its children.
        return fsspec.core.url_to_fs(self.root)[0]

    def _reach(self) -> None:
        """Fails early if the remote folder cannot be reached."""
        try:
            self._fs.info(self._base)
        except FileNotFoundError:
            return
        except Exception as error:  # each backend raises its own: botocore's and gcsfs' are not OSErrors
            said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(
                f"{self.root}: cannot be reached ({said}); check the address, the credentials and the network"
            ) from error

    def start(self) -> None:
        """Creates the folders."""
        make_folder(self.scratch)

    @contextmanager
    def locked(self, task: str) -> Iterator[None]:
        """Excludes a second run of the same task while this process or a child of it is alive.

        Waits for the children of a killed run, which end within a sample or two, so that no file has two writers.
        """
        if self.is_remote:
            yield
            return
        with FileLock(self.scratch / f"lock-{task}") as lock:
            if not lock.acquire(PATIENCE):
                raise UserError(f"{self.root}: another run is writing here; wait for it or stop it")
            if not lock.supported:
                print(f"{self.root}: this file system has no locks; do not start the same task twice", file=sys.stderr)
            yield

    def take_back(self) -> bool:
        """Removes the shards that a local run began here, if it wrote no sample and has ended; returns whether it did.

        Does nothing for a remote folder: without locks nobody can tell whether the run has ended.
        """
        if self.is_remote:
            return False
        empty = [
            path for path in Path(self.root).glob("*.tar") if path.stat().st_size == 2 * BLOCK
        ]  # a tar with only its end marker
        records = [self.scratch / f"{path.name}.json" for path in empty]
        if set(Path(self.root).glob("*.tar")) - set(empty) or set(self.scratch.glob("*.json")) - set(records):
            return False
        for lock in self.scratch.glob("lock-*"):
            with FileLock(lock) as held:
                if not held.acquire(timeout=0) or not held.supported:
                    return False
        for path in [*records, *(path.with_suffix(".idx") for path in empty), *empty]:
            path.unlink(missing_ok=True)
        return True

    def size(self, name: str) -> int | None:
        """Bytes of a finished file; None if there is none."""
        try:
            return (
                int(self._fs.info(f"{self._base}/{name}")["size"])
                if self.is_remote
                else os.stat(f"{self.root}/{name}").st_size
            )
        except FileNotFoundError:
            return None

    def read_text(self, name: str) -> str:
        """A finished UTF-8 file. Raises FileNotFoundError."""
        data: bytes = (
            self._fs.cat_file(f"{self._base}/{name}") if self.is_remote else Path(self.root, name).read_bytes()
        )
        return data.decode()

    def read_json(self, name: str) -> Any | None:
        """The content of a finished JSON file; None if there is none. Raises UserError if it is damaged."""
        try:
            text = self.read_text(name)
        except FileNotFoundError:
            return None
        try:
            return json.loads(text)
        except ValueError as error:
            raise UserError(f"{self.root}/{name}: not readable as JSON ({error}); remove it and run again") from None

    def publish(self, name: str, local: Path) -> None:
        """Moves a finished and synced file to its final name, atomically."""
        if self.is_remote:
            self._fs.makedirs(os.path.dirname(f"{self._base}/{name}"), exist_ok=True)
            self._fs.put_file(str(local), f"{self._base}/{name}")
            local.unlink()
            return
        publish(local, Path(self.root, name))

    def write(self, name: str, data: bytes) -> None:
        """Writes a small file atomically."""
        local = self.scratch / f"{name.replace('/', '-')}.{uuid.uuid4().hex}.tmp"
        with synced_file(local) as file:
            file.write(data)
        self.publish(name, local)

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, json_text(value).encode())

    def remove(self, name: str) -> None:
        """Removes a finished file if it is there."""
        try:
            if self.is_remote:
                self._fs.rm_file(f"{self._base}/{name}")
            else:
                os.unlink(f"{self.root}/{name}")
        except FileNotFoundError:
            return

    def finish(self) -> None:
        """Removes what is only needed while shards are being written."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        if self.is_remote and self._fs.exists(f"{self._base}/{PARTS}"):
            self._fs.rm(f"{self._base}/{PARTS}", recursive=True)


def json_text(value: Any) -> str:
    """The content of a JSON file; equal values give equal text."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def refuse_file(path: str | Path) -> None:
    """Raises UserError if ``path``, or a folder above it, is a file."""
    there = next(place for place in (Path(path).absolute(), *Path(path).absolute().parents) if place.exists())
    if not there.is_dir():
        raise UserError(
            f"{path}: {'a file' if there == Path(path).absolute() else f'{there} is a file'}; name a folder"
        )


def make_folder(path: str | Path) -> Path:
    """Creates the folder if it is missing and returns it."""
    refuse_file(path)
    Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)
