"""Where shards go: a local folder, by rename, or any fsspec URL, by upload of finished files. A final name is always a
whole file."""

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
"""Seconds to wait for the children of a killed run to end."""
PARTS = ".parts"
"""Folder of what is not finished: shards being written, and a record of each finished one until the manifest holds them
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
        # Asked for anew each time: fsspec keeps one for each process, and those of a parent do not work in its
        # children.
        return fsspec.core.url_to_fs(self.root)[0]

    def _reach(self) -> None:
        """A first look at the remote place, before anything is made for it."""
        try:
            self._fs.info(self._base)
        except FileNotFoundError:
            return
        except Exception as error:  # each backend has its own: botocore's, gcsfs' HttpError are no OSErrors
            said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise UserError(
                f"{self.root}: cannot be reached ({said}); look at the address, the credentials and the network"
            ) from error

    def start(self) -> None:
        """Makes the folders."""
        make_folder(self.scratch)

    @contextmanager
    def locked(self, task: str) -> Iterator[None]:
        """Keeps a second run of the same task away for as long as this process or a child of it lives.

        A killed run's children notice within a sample or two; they are waited for, so that nobody writes the same file
        twice.
        """
        if self.is_remote:
            yield
            return
        with FileLock(self.scratch / f"lock-{task}") as lock:
            if not lock.acquire(PATIENCE):
                raise UserError(f"{self.root}: another run is writing here; wait for it or end it")
            if not lock.supported:
                print(f"{self.root}: this file system has no locks; do not start the same task twice", file=sys.stderr)
            yield

    def take_back(self) -> bool:
        """Removes the shards that a local run has begun here, if it wrote no sample and is not at it any more; says
        whether that was so.

        Never of a remote place, which has no locks that would tell.
        """
        if self.is_remote:
            return False
        empty = [
            path for path in Path(self.root).glob("*.tar") if path.stat().st_size == 2 * BLOCK
        ]  # its end marker alone
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
        """Bytes of a finished file, None where there is none."""
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
        """A finished JSON file, None where there is none. Raises UserError when it is damaged."""
        try:
            text = self.read_text(name)
        except FileNotFoundError:
            return None
        try:
            return json.loads(text)
        except ValueError as error:
            raise UserError(f"{self.root}/{name}: not readable as JSON ({error}); remove it and run again") from None

    def publish(self, name: str, local: Path) -> None:
        """Gives a finished and synced file its name, at once and as a whole."""
        if self.is_remote:
            self._fs.makedirs(os.path.dirname(f"{self._base}/{name}"), exist_ok=True)
            self._fs.put_file(str(local), f"{self._base}/{name}")
            local.unlink()
            return
        publish(local, Path(self.root, name))

    def write(self, name: str, data: bytes) -> None:
        """A small file, complete under its name or not there."""
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
        """Removes everything that was needed only while shards were being written."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        if self.is_remote and self._fs.exists(f"{self._base}/{PARTS}"):
            self._fs.rm(f"{self._base}/{PARTS}", recursive=True)


def json_text(value: Any) -> str:
    """A JSON file's content: the same value gives the same text."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def refuse_file(path: str | Path) -> None:
    """Raises UserError where a file stands in the place of a folder, or of one above it."""
    there = next(place for place in (Path(path).absolute(), *Path(path).absolute().parents) if place.exists())
    if not there.is_dir():
        raise UserError(
            f"{path}: {'a file' if there == Path(path).absolute() else f'{there} is a file'}; name a folder"
        )


def make_folder(path: str | Path) -> Path:
    """The folder, made where it is not there."""
    refuse_file(path)
    Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)
