"""Atomic writes: a file gets its final name only when all of it is on the disk, even if the process is killed.

    write_atomic(run / "recipe.yaml", text)
    with atomic_file(path) as file:                       # in pieces
        np.save(file, rows)

The temporary file is ``.NAME.*.tmp`` beside the final one; only a killed process leaves it behind.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a binary file that becomes ``path`` at the end of the block; after an exception ``path`` is unchanged.
    Several processes may write the same path at once: the last one wins."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with synced_file(temporary) as file:
        yield file
    publish(temporary, path)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes all of ``content`` to ``path``, text as UTF-8, or leaves ``path`` as it was."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def synced_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a binary file that is synced to disk at the end of the block, and removed after an exception."""
    try:
        with open(path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def publish(temporary: Path, path: Path) -> None:
    """Renames a file or folder whose content is synced, and syncs the rename. A folder at ``path`` must be empty."""
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Syncs a folder, so that new names in it survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
