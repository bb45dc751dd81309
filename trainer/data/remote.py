"""A local cache of remote shards: each is fetched once per node, and the least recently used are evicted first.

    cache = ShardCache("~/.cache/ringlip", limit=100 << 30)
    path = cache.fetch("s3://bucket/train/00012.tar")

Processes of a node share the folder: with a lock file per shard, one fetches while the others wait. A shard that is
evicted while it is being read stays readable through the open file.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TypeVar

import fsspec
import xxhash

from data_tools.io.lock import FileLock
from trainer.core.types import RunFailed, UserError

T = TypeVar("T")
ATTEMPTS = 3
PIECE = 8 << 20


class ShardCache:
    """A folder of fetched files: at most ``limit`` bytes of tars, plus those being read."""

    def __init__(self, folder: str, limit: int, retry_seconds: float = 2.0):
        self.root = Path(folder).expanduser()
        self.limit, self.retry_seconds = limit, retry_seconds
        for part in ("shards", "locks", "indexes"):
            (self.root / part).mkdir(parents=True, exist_ok=True)

    def fetch(self, url: str) -> str:
        """The local path of a remote tar, fetched if necessary. Raises UserError if it is missing or larger than the
        cache."""
        path = self.root / "shards" / _local_name(url)
        if not _touch(path):
            with self.lock(path.name):
                if not _touch(path):
                    self.persist(url, lambda: self._download(url, path, make_room=True))
        return str(path)

    def fetch_index(self, url: str) -> str:
        """Like ``fetch`` for the small files beside the tars, which are never evicted."""
        path = self.root / "indexes" / _local_name(url)
        if not path.exists():
            with self.lock(path.name):
                if not path.exists():
                    self.persist(url, lambda: self._download(url, path, make_room=False))
        return str(path)

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Locks ``name`` among all processes of this node; a killed process releases it."""
        with FileLock(self.root / "locks" / f"{name}.lock") as lock:
            lock.acquire()
            yield

    def persist(self, url: str, attempt: Callable[[], T]) -> T:
        """Returns ``attempt()``, retried after network failures. Raises RunFailed after the last attempt, and UserError
        for a missing file at once."""
        for number in range(ATTEMPTS):
            try:
                return attempt()
            except UserError:
                raise
            except FileNotFoundError:
                raise UserError(f"{url}: no such file; upload it, or rebuild the manifest") from None
            except ImportError as error:
                raise UserError(f"{url}: {cause(error)}") from error
            except (
                Exception
            ) as error:  # each backend raises its own (aiohttp.ClientError, botocore's, gcsfs' HttpError), not OSErrors
                if number + 1 == ATTEMPTS:
                    raise RunFailed(
                        f"{url}: not fetched in {ATTEMPTS} attempts ({cause(error)}); check network and credentials"
                    ) from error
                time.sleep(self.retry_seconds * 2**number)
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _download(self, url: str, path: Path, make_room: bool) -> None:
        part = path.with_name(path.name + ".part")
        try:
            with fsspec.open(url, "rb") as remote:
                size = getattr(remote, "size", None)
                if make_room:
                    self._reserve(part, int(size or 0), url)
                with open(part, "r+b" if make_room else "wb") as local:
                    while piece := remote.read(PIECE):
                        local.write(piece)
                    arrived = local.tell()
            if size is not None and arrived != size:
                raise OSError(f"{arrived} of {size} bytes arrived")
        except Exception:
            part.unlink(missing_ok=True)
            raise
        part.replace(path)

    def _reserve(self, part: Path, size: int, url: str) -> None:
        """Evicts until ``size`` more bytes fit within the limit, and reserves them against concurrent fetches."""
        if size > self.limit:
            raise UserError(f"{url}: {size / 2**30:.1f} GiB exceed data.cache_limit; raise it or write smaller shards")
        with self.lock("eviction"):
            part.unlink(missing_ok=True)
            used = size + self._being_fetched()
            files = sorted((stat.st_mtime_ns, stat.st_size, path) for path, stat in _stats(part.parent, "*.tar"))
            used += sum(length for _, length, _ in files)
            for _, length, path in files:
                if used <= self.limit:
                    break
                path.unlink(missing_ok=True)
                used -= length
            with open(part, "wb") as file:
                file.truncate(size)

    def _being_fetched(self) -> int:
        """Bytes reserved by other processes. Partial files of killed processes (their lock is free) are removed."""
        reserved = 0
        for part, stat in _stats(self.root / "shards", "*.part"):
            with FileLock(self.root / "locks" / f"{part.name.removesuffix('.part')}.lock") as lock:
                if lock.acquire(timeout=0):
                    part.unlink(missing_ok=True)
                else:
                    reserved += stat.st_size
        return reserved


def cause(error: Exception) -> str:
    """An error's type and message in one line; some have no message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".removesuffix(": ")


def _stats(folder: Path, pattern: str) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.glob(pattern):
        try:
            yield path, path.stat()
        except FileNotFoundError:
            continue  # evicted by another process, or complete by now


def _touch(path: Path) -> bool:
    try:
        os.utime(path)  # the time of last use decides who is evicted
    except FileNotFoundError:
        return False
    return True


def _local_name(url: str) -> str:
    return f"{xxhash.xxh3_64_hexdigest(url.encode())}-{url.rpartition('/')[2]}"


class FetchAhead:
    """A thread that fetches what will be read next, so that workers find it on disk.

    A file that cannot be fetched is left to the reader, which names it; any other error ends the thread and is raised
    by ``want``.
    """

    def __init__(self, fetch: Callable[[str], str]):
        self.fetch = fetch
        self.wanted: SimpleQueue[list[str] | None] = SimpleQueue()
        self.failure: Exception | None = None
        self.thread = Thread(target=self._run, name="fetch-ahead", daemon=True)
        self.thread.start()

    def want(self, urls: list[str]) -> None:
        """Replaces the queue by ``urls``, in the order in which they are needed. Raises the error that ended the
        thread."""
        if self.failure is not None:
            raise self.failure
        self.wanted.put(urls)

    def close(self) -> None:
        """Stops the thread after the file that it is fetching."""
        self.wanted.put(None)

    def _run(self) -> None:
        waiting: list[str] | None = []
        while waiting is not None:
            waiting = self._newest(waiting)
            if waiting:
                try:
                    self.fetch(waiting.pop(0))
                except UserError:
                    waiting = []
                except Exception as error:
                    self.failure = error
                    return

    def _newest(self, waiting: list[str]) -> list[str] | None:
        newest: list[str] | None = waiting or self.wanted.get()
        while newest is not None:
            try:
                newest = self.wanted.get_nowait()
            except Empty:
                return newest
        return None
