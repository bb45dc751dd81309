"""The endless stream of this rank's batches.

    loader = build_loader(settings.data, model.preprocess, batch_size=4096, rank=0, world=2, seed=0, samples_seen=0)
    for batch in loader: ...                                       # Batch of 2048 pairs, forever
    loader.skipped, loader.wait_seconds; loader.close()

Global batch s has the sample positions [samples_seen + s B, samples_seen + (s + 1) B); rank r of W takes its contiguous
part. Worker processes fill chunks of it in shared memory; a thread of this process copies them into batches
(page-locked with a GPU) ahead of the consumer. Closing, garbage collection and interpreter exit end both.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count, cycle
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.core.distributed import per_rank
from trainer.core.types import Batch, Preprocess, RunFailed, UserError
from trainer.data.buffers import BatchBuffers
from trainer.data.in_memory import MemoryReader, fits_memory
from trainer.data.noise import Noise
from trainer.data.open import open_source
from trainer.data.reader import Reader, Rows, Skip, SkippedSamples, size_of
from trainer.data.remote import FetchAhead
from trainer.data.settings import DataSettings
from trainer.data.stored_teacher import open_stored
from trainer.data.workers import Pool, shared_array, stalled

logger = logging.getLogger(__name__)


CHUNK = 64
"""Pairs a worker makes at a time: small enough to share a batch among workers, large enough to tokenize together."""


class Chunk(NamedTuple):
    """Sample positions [start, stop), to be written into slot ``slot`` of the shared buffers."""

    slot: int
    start: int
    stop: int


def build_loader(
    settings: DataSettings,
    preprocess: Preprocess,
    batch_size: int,
    rank: int,
    world: int,
    seed: int,
    samples_seen: int,
    stored: str | None = None,
) -> Loader:
    """The batches of rank ``rank`` of ``world`` from sample position ``samples_seen`` on; ``batch_size`` is global.
    ``stored`` names the columns of a stored teacher (``distill.stored``), whose views are then drawn.

    Raises UserError if the batch does not divide evenly among the ranks, a dataset or shard is missing, or a mixture
    cannot be drawn.
    """
    per_rank(batch_size, world)
    if not settings.sources:
        raise UserError("data.train: an empty list; name at least one dataset")
    sources = [open_source(source, settings) for source in settings.sources]
    views = open_stored(sources, stored, settings, preprocess) if stored else []
    in_memory = fits_memory(sources, settings, preprocess) and all(one.whole_images for one in views)
    noise = Noise(settings.noise, preprocess, seed, batch_size, samples_seen)
    reader = (MemoryReader if in_memory else Reader)(
        sources, settings, preprocess, seed, noise if noise.active else None, views
    )
    workers = 0 if in_memory else settings.num_workers()
    kept = ", kept decoded in memory" if in_memory else ""
    pairs = f"{sum(source.size for source in sources):,} pairs in {len(sources)} dataset(s)"
    if reader.choices:
        chosen = sum(size_of(number, sources, reader.choices) for number in range(len(sources)))
        pairs = f"data.where selects {chosen:,} of {pairs}"
    logger.info(f"data: {pairs}, {workers} workers per rank{kept}")
    return Loader(reader, batch_size, rank, world, samples_seen, workers)


class Loader:
    """An endless iterator of Batch, for one consumer. Not thread-safe."""

    def __init__(self, reader: Reader, batch_size: int, rank: int, world: int, samples_seen: int, workers: int):
        self.reader, self.batch_size = reader, batch_size
        self.samples_seen = samples_seen
        """Sample position after the last batch handed out, over all ranks: what a checkpoint keeps."""
        self.skipped = SkippedSamples()
        self.wait_seconds = 0.0
        """Seconds that the consumer has waited for batches."""
        self._feed = _Feed(reader, batch_size, rank, world, samples_seen, workers)
        self._finalizer = weakref.finalize(self, self._feed.close)  # also runs at interpreter exit

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        began = time.perf_counter()
        batch, skips = self._feed.get()
        self.wait_seconds += time.perf_counter() - began
        self.samples_seen += self.batch_size
        for skip in self.skipped.add(skips)[:3]:
            logger.info(f"data: replaced {skip.key}: {skip.reason}")
        return batch

    def noise_counts(self) -> dict[str, int]:
        """How many images, captions and pairings of the last global batch ``data.noise`` spoiled; empty without
        it."""
        noise = self.reader.noise
        return {} if noise is None else noise.counts(self.samples_seen - self.batch_size)

    def close(self) -> None:
        """Stops the workers and the thread and closes the tars. Safe to call again."""
        self._finalizer()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


Made = tuple[Batch, list[Skip]]


class _Feed:
    """The background part of a Loader. It has no reference to the Loader, so that dropping the Loader ends it."""

    def __init__(self, reader: Reader, batch_size: int, rank: int, world: int, samples_seen: int, workers: int):
        settings = reader.settings
        self.reader, self.batch_size, self.start = reader, batch_size, samples_seen
        self.rows = per_rank(batch_size, world)
        self.offset = rank * self.rows
        self.reading = Chunk(0, samples_seen + self.offset, samples_seen + self.offset + self.rows)
        self.chunk = min(CHUNK, self.rows)
        self.chunks_a_batch = -(-self.rows // self.chunk)
        self.ahead = max(self.chunks_a_batch * settings.prefetch, 2 * workers)
        self.pool: Pool | None = None
        if workers:
            shapes = reader.shapes(self.chunk)
            self.shared = [shared_array((self.ahead + 1, *shape), dtype) for shape, dtype in shapes]
            self.pool = Pool(
                self._work, workers, settings.stall_seconds, self._describe
            )  # forks: before any thread starts
        self.fetcher = FetchAhead(reader.fetch) if reader.remote_shards(samples_seen) else None
        # The current device is per thread: without this, every rank's pinned memory would open a context on GPU 0.
        self.device = torch.cuda.current_device() if torch.cuda.is_available() else None
        # The batches in the queue, the one being filled, and the one in use.
        self.buffers = BatchBuffers(reader.shapes(self.rows), settings.prefetch + 2, self.device)
        self.batches: Queue[Made | BaseException] = Queue(settings.prefetch)
        self.ended = Event()
        self.thread = Thread(target=self._run, name="loader", daemon=True)
        self.thread.start()

    def _work(self, chunk: Chunk) -> tuple[Chunk, list[Skip]]:
        return chunk, self.reader.fill(np.arange(chunk.start, chunk.stop), self._slot(chunk))

    def _slot(self, chunk: Chunk) -> Rows:
        return Rows(*(array[chunk.slot, : chunk.stop - chunk.start] for array in self.shared))

    def _describe(self, chunk: Chunk) -> str:
        return self.reader.describe(np.arange(chunk.start, chunk.stop))

    def _run(self) -> None:
        if self.device is not None:
            torch.cuda.set_device(self.device)
        try:
            batches = self._in_process() if self.pool is None else self._from_workers(self.pool)
            while self._put(next(batches)):  # a variable would hold the batch, and its buffer, until the next one
                pass
        except BaseException as error:  # the consumer raises it
            self._put(error)

    def _in_process(self) -> Iterator[Made]:
        for first in self._batch_starts():
            self.reading = Chunk(0, first, first + self.rows)
            yield self._made(partial(self.reader.fill, np.arange(first, first + self.rows)))

    def _from_workers(self, pool: Pool) -> Iterator[Made]:
        results = pool.run(self._chunks(), self.ahead)
        for first in count(self.start + self.offset, self.batch_size):
            yield self._made(partial(self._collect, results, first))

    def _made(self, fill: Callable[[Rows], list[Skip]]) -> Made:
        """The next batch; a function, so that no local variable keeps it when the one after it needs a buffer."""
        batch, rows = self.buffers.take()
        return batch, fill(rows)

    def _collect(self, results: Iterator[tuple[Chunk, list[Skip]]], first: int, rows: Rows) -> list[Skip]:
        """Copies the workers' chunks into the batch that begins at position ``first``."""
        skips: list[Skip] = []
        for _ in range(self.chunks_a_batch):
            chunk, found = next(results)
            skips += found
            pairs: Iterator[tuple[NDArray[Any], NDArray[Any]]] = zip(rows, self._slot(chunk), strict=True)
            for target, made in pairs:
                target[chunk.start - first : chunk.stop - first] = made
        return skips

    def _chunks(self) -> Iterator[Chunk]:
        slots = cycle(range(self.ahead + 1))
        for first in self._batch_starts():
            for start in range(first, first + self.rows, self.chunk):
                yield Chunk(next(slots), start, min(start + self.chunk, first + self.rows))

    def _batch_starts(self) -> Iterator[int]:
        """Yields the first position of each of this rank's batches, and requests the shards ahead of it."""
        for position in count(self.start, self.batch_size):
            if self.fetcher is not None:
                self.fetcher.want(self.reader.remote_shards(position))
            yield position + self.offset

    def _put(self, item: Made | BaseException) -> bool:
        while not self.ended.is_set():
            try:
                self.batches.put(item, timeout=0.2)
                return True
            except Full:
                continue
        return False

    def get(self) -> Made:
        """The next batch; raises the error that ended the thread. The pool watches workers; a thread is watched
        here."""
        if self.ended.is_set():
            raise RuntimeError("this loader is closed")
        limit = self.reader.settings.stall_seconds
        try:
            item = self.batches.get(timeout=limit if self.pool is None else None)
        except Empty:
            raise RunFailed(stalled("the loader", limit, self._describe(self.reading))) from None
        if isinstance(item, BaseException):
            self.batches.put(item)  # further calls get the same error
            raise item
        return item

    def close(self) -> None:
        self.ended.set()
        if self.pool is not None:
            self.pool.kill()
        if self.fetcher is not None:
            self.fetcher.close()
        self.thread.join(5)  # a thread that hangs in a read is abandoned: it is a daemon
        if self.pool is not None:
            self.pool.close()
        if not self.thread.is_alive():
            for source in self.reader.sources:
                source.close()
