"""A query among a million vectors: milliseconds and memory of `ringlip search`'s exact search, and of what else there is.

    python -m tests.benchmarks.search --width 512
    python -m tests.benchmarks.search --width 768 --faiss   # also faiss-cpu's flat indexes, if it is installed
    python -m tests.benchmarks.search --towers              # only the text towers that embed a query

Random unit vectors in a memory-mapped .npy file, like the columns beside shards; 24 results per query. Memory is the
process's anonymous memory (RssAnon), without the mapped file. Processor time is that of all threads.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, SiglipTextConfig, SiglipTextModel

from trainer.core.distributed import cores
from trainer.search.vectors import Vectors

ANSWERS = 24
BLOCK = 50_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--queries", type=int, default=30)
    parser.add_argument("--folder", type=Path, help="where the file is made (default: a temporary folder)")
    parser.add_argument("--faiss", action="store_true", help="also faiss-cpu's flat indexes")
    parser.add_argument("--towers", action="store_true", help="only the time that a text tower needs for a query")
    options = parser.parse_args()
    if options.towers:
        measure_towers(options.queries)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        stored = make(Path(folder, "vectors.npy"), options.vectors, options.width)
        print(f"{options.vectors:,} x {options.width}, {cores()} cores, load {os.getloadavg()[0]:.1f}")
        measure(stored, options.queries)
        if options.faiss:
            measure_faiss(stored, options.queries)


def measure_towers(queries: int) -> None:
    """Random weights of the published sizes; a query of five words."""
    clip = CLIPTextModelWithProjection(CLIPTextConfig(projection_dim=512, bos_token_id=0, eos_token_id=2)).eval()
    siglip = SiglipTextModel(SiglipTextConfig(bos_token_id=0, eos_token_id=2)).eval()
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    for name, tower, length in (
        ("CLIP ViT-B/32, 77 tokens", clip, 77),
        ("CLIP ViT-B/32, without padding", clip, 7),
        ("SigLIP B/16, 64 tokens", siglip, 64),
    ):
        seconds, start = [], time.process_time()
        with torch.inference_mode():
            for _ in range(queries):
                began = time.perf_counter()
                tower(input_ids=torch.full((1, length), 2))
                seconds.append(time.perf_counter() - began)
        processor = (time.process_time() - start) / queries
        print(f"  {name:<42} {1e3 * np.median(seconds):6.1f} ms, {1e3 * processor:6.1f} ms of processor time")


def make(path: Path, rows: int, width: int) -> NDArray[np.float16]:
    """The file, and its rows [rows, width] mapped read-only."""
    dice = np.random.default_rng(0)
    file = np.lib.format.open_memmap(path, "w+", np.float16, (rows, width))
    for start in range(0, rows, BLOCK):
        block = dice.standard_normal((min(BLOCK, rows - start), width), dtype=np.float32)
        file[start : start + BLOCK] = block / np.linalg.norm(block, axis=1, keepdims=True)
    file.flush()
    del file
    return np.asarray(np.load(path, mmap_mode="r"))


def measure(stored: NDArray[np.float16], queries: int) -> None:
    before = anonymous()
    vectors = Vectors(stored, empty=0, threads=cores())
    dice = np.random.default_rng(1)
    masks = {
        "": None,
        ", a filter leaves 50%": dice.random(len(stored)) < 0.5,
        ", a filter leaves 1%": dice.random(len(stored)) < 0.01,
    }
    for name, mask in masks.items():
        show(
            f"RingLIP, exact{name}",
            lambda query, mask=mask: vectors.nearest(query, ANSWERS, mask),
            stored,
            queries,
            before,
        )
    exact = [reference(stored, query) for query in some(stored.shape[1], 3)]
    found = [set(vectors.nearest(query, ANSWERS).samples.tolist()) for query in some(stored.shape[1], 3)]
    print(f"  the answers of a float64 product: {found == exact}")
    vectors.close()


def measure_faiss(stored: NDArray[np.float16], queries: int) -> None:
    import faiss  # of a benchmark alone

    faiss.omp_set_num_threads(1)  # its flat indexes use one thread a query: the rows are shared out here
    parts = np.array_split(np.arange(len(stored)), cores())
    for name, kind in (("fp16", faiss.ScalarQuantizer.QT_fp16), ("int8", faiss.ScalarQuantizer.QT_8bit)):
        before = anonymous()
        indexes = []
        for part in parts:
            index = faiss.IndexScalarQuantizer(stored.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
            index.train(stored[part[:BLOCK]].astype(np.float32))
            for start in range(part[0], part[-1] + 1, BLOCK):
                index.add(stored[start : min(start + BLOCK, part[-1] + 1)].astype(np.float32))
            indexes.append(index)
        with ThreadPoolExecutor(cores()) as pool:

            def nearest(query: NDArray[np.float32], pool: Any = pool, indexes: Any = indexes) -> list[Any]:
                return [
                    part.result() for part in [pool.submit(index.search, query[None], ANSWERS) for index in indexes]
                ]

            show(f"faiss, flat, {name}", nearest, stored, queries, before)
        del indexes, index
        gc.collect()


def show(name: str, search: Callable[..., Any], stored: NDArray[np.float16], queries: int, before: int) -> None:
    seconds, processor = [], 0.0
    for number, query in enumerate(some(stored.shape[1], queries + 3)):
        start, used = time.perf_counter(), time.process_time()
        search(query)
        if number >= 3:  # the first queries read the file into memory
            seconds.append(time.perf_counter() - start)
            processor += time.process_time() - used
    middle, slow = np.quantile(seconds, [0.5, 0.95]) * 1e3
    memory = (anonymous() - before) / 2**20
    times = f"{middle:6.1f} ms, 95% below {slow:6.1f} ms, {1e3 * processor / queries:6.1f} ms of processor time"
    print(f"  {name:<38} {times}, {memory:5.0f} MiB beside the file of {stored.nbytes / 2**20:,.0f} MiB")


def some(width: int, count: int) -> NDArray[np.float32]:
    """Queries [count, width] of length 1."""
    queries = np.random.default_rng(2).standard_normal((count, width)).astype(np.float32)
    return queries / np.linalg.norm(queries, axis=1, keepdims=True)


def reference(stored: NDArray[np.float16], query: NDArray[np.float32]) -> set[int]:
    scores = np.concatenate(
        [
            stored[start : start + BLOCK].astype(np.float64) @ query.astype(np.float64)
            for start in range(0, len(stored), BLOCK)
        ]
    )
    return set(np.argsort(-scores)[:ANSWERS].tolist())


def anonymous() -> int:
    """Bytes of this process that lie in no file."""
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


if __name__ == "__main__":
    main()
