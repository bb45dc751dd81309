"""Sharding against img2dataset, and the tar writer against webdataset's and Python's, with where our time goes.

    python -m venv /tmp/peer && /tmp/peer/bin/pip install img2dataset       # a throw-away environment for the peer
    python -m tests.benchmarks.shard --img2dataset /tmp/peer/bin/python     # the table, in Markdown
    python -m tests.benchmarks.shard  # without the peer; the writers alone still have theirs

Images are synthetic JPEGs of about 69 KB (512 x 384). Every tool starts as a process of its own with two workers.
"End to end" is all of its time over the larger set; "steady" is the difference between two sizes of set, which takes
start-up out of both. Rounds of the contenders take turns and medians are compared, so that a busy machine slows all
alike: read the ratios, not the rates; those of CPU seconds depend least on who else is at work.
"""

from __future__ import annotations

import argparse
import io
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import webdataset
from PIL import Image

from data_tools.format.tar_writer import TarWriter
from data_tools.samples.captions import clean_all
from data_tools.samples.image_header import read_header
from data_tools.samples.images import ImageOptions, check_pixels, prepare
from data_tools.sources.base import Row, read_image

RESIZE = 224


def make_pictures(folder: Path, count: int) -> Path:
    """``count`` JPEGs of 512 x 384 and about 69 KB, and pairs.csv with both a path and a file:// address of each."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 16, (384, 512, 3))
    lines = ["image,url,caption"]
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            (512, 384), Image.Resampling.BICUBIC
        )
        pixels = np.clip(np.asarray(coarse) + np.roll(noise, number * 7, 1), 0, 255).astype(np.uint8)
        path = folder / f"{number:06d}.jpg"
        path.write_bytes(simplejpeg.encode_jpeg(pixels, quality=83, colorsubsampling="420"))
        lines.append(f"{path.name},file://{path},an image of number {number} for the benchmark")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    return folder / "pairs.csv"


def first_rows(table: Path, count: int) -> Path:
    """A table of the first ``count`` rows."""
    part = table.with_name(f"pairs{count}.csv")
    part.write_text("\n".join(table.read_text().splitlines()[: count + 1]) + "\n")
    return part


def ours(table: Path, out: Path, processes: int, *options: str) -> list[str]:
    """The command that shards a table with RingLIP."""
    columns = [
        "--image",
        "image",
        "--caption",
        "caption",
        "--shard-size",
        "250",
        "--processes",
        str(processes),
        "--quiet",
    ]
    return [sys.executable, "-m", "data_tools", "shard", str(table), str(out), *columns, *options]


def peer(python: str, table: Path, out: Path, processes: int) -> list[str]:
    """The same work with img2dataset: shorter side to 224, JPEG quality 95, tars with captions."""
    settings = {
        "url_list": str(table),
        "input_format": "csv",
        "url_col": "url",
        "caption_col": "caption",
        "output_folder": str(out),
        "output_format": "webdataset",
        "processes_count": processes,
        "thread_count": 32,
        "image_size": RESIZE,
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "number_sample_per_shard": 250,
        "enable_wandb": False,
    }
    return [python, "-c", f"import img2dataset; img2dataset.download(**{settings!r})"]


def timed(command: list[str], out: Path, expected: int) -> tuple[float, float]:
    """(Seconds, CPU seconds) a command takes to write ``expected`` samples into ``out``, which is removed
    afterwards."""
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    written = sum(len({name.partition(".")[0] for name in _names(path)}) for path in out.glob("*.tar"))
    if done.returncode or written != expected:
        raise SystemExit(f"{command[:4]} wrote {written} of {expected}:\n{done.stderr[-2000:]}")
    shutil.rmtree(out)
    return seconds, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def _names(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return tar.getnames()


def write_ours(path: Path, samples: list[dict[str, Any]]) -> None:
    writer = TarWriter(path)
    for sample in samples:
        for extension in ("jpg", "txt", "json"):
            writer.add(f"{sample['__key__']}.{extension}", sample[extension])
    writer.close()


def write_webdataset(path: Path, samples: list[dict[str, Any]]) -> None:
    with webdataset.ShardWriter(str(path.parent / "%05d.tar"), maxcount=10**9, maxsize=1e12, verbose=0) as writer:
        for sample in samples:
            writer.write(sample)


def write_tarfile(path: Path, samples: list[dict[str, Any]]) -> None:
    with tarfile.open(path, "w") as tar:
        for sample in samples:
            for extension in ("jpg", "txt", "json"):
                info = tarfile.TarInfo(f"{sample['__key__']}.{extension}")
                info.size = len(sample[extension])
                tar.addfile(info, io.BytesIO(sample[extension]))


def compare_writers(pictures: list[bytes], folder: Path, rounds: int) -> list[str]:
    """Rows of the table: samples written a second, all in memory before."""
    samples = [
        {
            "__key__": f"{number:09d}",
            "jpg": pictures[number % len(pictures)],
            "txt": b"a caption of some length",
            "json": b'{"a": 1}',
        }
        for number in range(2000)
    ]
    contenders = {
        "RingLIP TarWriter (synced)": write_ours,
        "webdataset ShardWriter": write_webdataset,
        "Python tarfile": write_tarfile,
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, write in contenders.items():
            out = folder / "writers"
            out.mkdir()
            started = time.perf_counter()
            write(out / "a.tar", samples)
            seconds[name].append(time.perf_counter() - started)
            shutil.rmtree(out)
    rates = {name: len(samples) / statistics.median(values) for name, values in seconds.items()}
    base = rates["webdataset ShardWriter"]
    return [f"| {name} | {rate:,.0f} | {rate / base:.2f}x |" for name, rate in rates.items()]


def profile(pictures: list[bytes], folder: Path) -> list[str]:
    """Where one process's time goes, in CPU microseconds a sample."""
    paths = [str(path) for path in sorted(folder.glob("*.jpg"))[: len(pictures)]]
    resize = ImageOptions(resize=RESIZE)
    small = [prepare(data, resize).data for data in pictures]
    headers = [read_header(data) for data in pictures]
    pixels = [simplejpeg.decode_jpeg(data) for data in pictures]
    thumbs = [simplejpeg.decode_jpeg(data) for data in small]
    shape = (round(512 * RESIZE / 384), RESIZE)
    writer = TarWriter(folder / "profile.bin")
    stages: dict[str, Callable[[int], object]] = {
        "read the file": lambda n: read_image(Row("", paths[n], []), "", 1 << 30),
        "clean the caption": lambda n: clean_all(["an image of some number for the benchmark"], 4096),
        "header": lambda n: read_header(pictures[n]),
        "strict check (bytes kept)": lambda n: check_pixels(pictures[n], headers[n]),
        "strict decode (resize)": lambda n: simplejpeg.decode_jpeg(pictures[n]),
        "resize, hamming": lambda n: Image.fromarray(pixels[n]).resize(shape, Image.Resampling.HAMMING),
        "resize, bicubic (--filter bicubic)": lambda n: Image.fromarray(pixels[n]).resize(
            shape, Image.Resampling.BICUBIC
        ),
        "encode": lambda n: simplejpeg.encode_jpeg(thumbs[n], quality=95, colorsubsampling="420"),
        "write (bytes kept)": lambda n: writer.add(f"{n:09d}.jpg", pictures[n]),
    }
    rows = []
    for name, stage in stages.items():
        started = time.process_time()
        for number in range(len(pictures)):
            stage(number)
        rows.append(f"| {name} | {(time.process_time() - started) / len(pictures) * 1e6:,.0f} |")
    writer.close()
    return rows


def compare_tools(table: Path, folder: Path, arguments: argparse.Namespace) -> list[str]:
    """Rows of the table: images a second, steady and end to end."""
    sizes = (arguments.images // 4, arguments.images)
    tables = {size: first_rows(table, size) for size in sizes}
    contenders: dict[str, Callable[[Path, Path], list[str]]] = {
        f"RingLIP, resize {RESIZE}": lambda rows, out: ours(rows, out, arguments.processes, "--resize", str(RESIZE)),
        "RingLIP, strict check, bytes kept": lambda rows, out: ours(rows, out, arguments.processes),
    }
    if arguments.img2dataset:
        contenders[f"img2dataset, resize {RESIZE}"] = lambda rows, out: peer(
            arguments.img2dataset, rows, out, arguments.processes
        )
    taken: dict[tuple[str, int], list[tuple[float, float]]] = {
        (name, size): [] for name in contenders for size in sizes
    }
    for _ in range(arguments.rounds):
        for size in sizes:
            for name, command in contenders.items():
                out = folder / "out"
                taken[name, size].append(timed(command(tables[size], out), out, size))
    small, large = sizes
    wall = {key: statistics.median(seconds for seconds, _ in values) for key, values in taken.items()}
    cpu = {key: statistics.median(seconds for _, seconds in values) for key, values in taken.items()}
    base = f"img2dataset, resize {RESIZE}" if arguments.img2dataset else f"RingLIP, resize {RESIZE}"
    measures = [
        {name: (large - small) / (wall[name, large] - wall[name, small]) for name in contenders},
        {name: large / wall[name, large] for name in contenders},
        {name: (large - small) / (cpu[name, large] - cpu[name, small]) for name in contenders},
        {name: large / cpu[name, large] for name in contenders},
    ]
    return [
        " | ".join([f"| {name}", *(f"{rate[name]:,.0f} ({rate[name] / rate[base]:.2f}x)" for rate in measures)]) + " |"
        for name in contenders
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="images of the larger set (default 2000)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--processes", type=int, default=2, help="workers of every tool (default 2)")
    parser.add_argument("--img2dataset", metavar="PYTHON", help="the Python of an environment with img2dataset")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        table = make_pictures(folder, arguments.images)
        pictures = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))[:300]]
        size = statistics.mean(len(data) for data in pictures)
        tools = compare_tools(table, folder, arguments)
        writers = compare_writers(pictures, folder, 2 * arguments.rounds + 1)
        stages = profile(pictures, folder)
    about = f"{arguments.images} JPEGs of 512 x 384, {size / 1000:.0f} KB each, {arguments.processes} processes"
    print(f"{about}, medians of {arguments.rounds} rounds\n")
    heads = [
        "tool",
        "images/s steady",
        "images/s end to end",
        "images a CPU second steady",
        "images a CPU second end to end",
    ]
    print("| " + " | ".join(heads) + " |\n|---|---:|---:|---:|---:|", *tools, sep="\n")
    print("\n| writer alone | samples/s | ratio |\n|---|---:|---:|", *writers, sep="\n")
    print("\n| stage of ours | CPU us a sample |\n|---|---:|", *stages, sep="\n")


if __name__ == "__main__":
    main()
