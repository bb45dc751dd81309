"""Time, memory and exactness of the sigmoid loss and its peers, on forked CPU ranks.

    python -m tests.benchmarks.loss                       # the table of the README, about ten minutes on two idle cores
    python -m tests.benchmarks.loss --out loss.png        # the same, and memory and time against ranks as a plot
    python -m tests.benchmarks.loss --quick               # small shapes, seconds
    python -m tests.benchmarks.loss --case 2,4096,768,float32 --repeats 7

Peers are the variants of open_clip's SigLipLoss where open_clip_torch is installed (pip install --no-deps
open_clip_torch; its loss module is loaded alone), and a plain loss over all-gathered embeddings. One step is forward
and backward on embeddings that take gradients. The floor is what any exact loss computes: for each tile the logits and
both gradients, three matrix products, with no exchange and nothing between them.

time     median over repeats of the slowest rank's wall time; variants take turns within each repeat
CPU      median of the processor seconds of all ranks together, transport included: other load on the machine shows less in it
resident peak resident memory of rank 0 (VmHWM) over what it was before the step, in freshly forked ranks after a tiny
step for warm-up tensors  peak of the tensors alive at once beyond the inputs: exact, without the transport's own
buffers error    largest relative error of loss and gradients (image, text, scale, bias) against float64 with all
logits, at most 256 rows a rank
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import math
import statistics
import sys
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support import dense_losses
from tests.support.forked_ranks import run_ranks
from trainer.core.types import Embeddings
from trainer.losses import SigmoidLoss, SigmoidSettings
from trainer.losses.topology import SLICE_ROWS

warnings.filterwarnings("ignore", category=FutureWarning)  # the peers' collectives have newer names
Step = Callable[[Embeddings], Tensor]


class Case(NamedTuple):
    ranks: int
    rows: int
    width: int
    dtype: torch.dtype


class Row(NamedTuple):
    case: Case
    variant: str
    seconds: float
    cpu: float
    resident: float
    tensors: float
    error: float


OURS = {
    "ring": {},
    "ring, 256-row tiles": {"tile_rows": 256},
    "bidirectional": {"exchange": "bidirectional"},
    "gather": {"exchange": "gather"},
    "hierarchical, nodes of 2": {"exchange": "hierarchical", "node_size": 2},
    "ring, bf16 wire": {"comm_dtype": "bfloat16", "comm_gradient_dtype": "bfloat16"},
}
PEERS = ("bidir", "shift", "reduce", "gather")
DENSE = "all-gather, autograd"
FLOOR = "floor: the matrix products alone"
FULL = [Case(2, 4096, 768, torch.float32), Case(4, 2048, 768, torch.float32), Case(8, 1024, 768, torch.float32)]
FULL_BF16 = [Case(2, 2048, 768, torch.float32), Case(2, 2048, 768, torch.bfloat16)]
QUICK = [Case(1, 128, 64, torch.float32), Case(2, 128, 64, torch.float32), Case(2, 128, 64, torch.bfloat16)]


def open_clip_loss() -> type | None:
    """open_clip's SigLipLoss without importing its package (which needs torchvision), or None."""
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        return None
    spec = importlib.util.spec_from_file_location("open_clip_loss_alone", Path(package.origin).with_name("loss.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SigLipLoss


def variants(case: Case) -> list[str]:
    ours = [name for name in OURS if not ("nodes of 2" in name and (case.ranks % 2 or case.ranks < 4))]
    if case.ranks == 1:
        ours = ["ring", "ring, 256-row tiles"]
    if case.dtype != torch.float32:
        return ["ring"]
    peers = [f"open_clip {name}" for name in PEERS] if open_clip_loss() else []
    return [*ours, DENSE, *peers, FLOOR]


def make(variant: str) -> Step:
    if variant in OURS:
        return SigmoidLoss(**OURS[variant])
    if variant == DENSE:
        return all_gathered
    if variant == FLOOR:
        return products_alone
    peer = open_clip_loss()
    assert peer is not None
    module = peer(rank=dist.get_rank(), world_size=dist.get_world_size(), dist_impl=variant.removeprefix("open_clip "))
    return lambda z: module(z.image, z.text, z.scale, z.bias)


def all_gathered(z: Embeddings) -> Tensor:
    """What one writes first: all texts gathered with autograd's collective, all logits at once."""
    rank, rows = dist.get_rank(), z.image.shape[0]
    texts = torch.cat(torch.distributed.nn.functional.all_gather(z.text)) if dist.get_world_size() > 1 else z.text
    logits = z.scale * z.image @ texts.T + z.bias
    signs = -torch.ones_like(logits)
    signs[:, rank * rows : (rank + 1) * rows].diagonal().fill_(1)
    return -F.logsigmoid(signs * logits).sum() / rows


def products_alone(z: Embeddings) -> Tensor:
    """As many products, of the shapes that the ring has, as there are pairs for this rank; no loss."""
    image, text, world = z.image.detach().float(), z.text.detach().float(), dist.get_world_size()
    d_image, d_text = torch.zeros_like(image), torch.zeros_like(text)
    for texts, d_texts in zip(text.split(SLICE_ROWS), d_text.split(SLICE_ROWS), strict=True):
        for images, d_images in zip(
            image.split(SigmoidSettings().tile_rows), d_image.split(SigmoidSettings().tile_rows), strict=True
        ):
            logits = images.new_empty(len(images), len(texts))
            for _ in range(world):
                torch.mm(images, texts.t(), out=logits)
                d_images.addmm_(logits, texts)
                d_texts.addmm_(logits.t(), images)
    return 0 * (z.scale + z.bias)


def inputs(case: Case) -> Embeddings:
    """This rank's part, seeded by rank: no rank makes the global batch."""
    part = dense_losses.batch(case.rows, case.width, seed=dist.get_rank() + 1)
    leaves = [
        value.requires_grad_() for value in (part.image.to(case.dtype), part.text.to(case.dtype), part.scale, part.bias)
    ]
    return Embeddings(*leaves)


def peak_extra(case: Case, variant: str) -> float:
    """MiB by which one step raises this rank's resident memory at most; runs inside ``run_ranks``."""
    step = make(variant)
    step(inputs(case._replace(rows=8))).backward()
    z = inputs(case)
    gc.collect()
    # What the allocator has kept for reuse would hide what the step takes.
    ctypes.CDLL(None).malloc_trim(0)
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status("VmRSS")
    step(z).backward()
    return (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of storages made under it and still alive; ``peak`` is exact where resident memory has noise."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        result = function(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor) and not any(made.untyped_storage() is storage for storage in given):
                self._count(made.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self.known:
            self.known.add(storage)
            weakref.finalize(storage, self._forget, storage.nbytes())
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)

    def _forget(self, size: int) -> None:
        self.now -= size


def tracked_peak(case: Case, variant: str, grad: bool = True) -> float:
    """MiB of tensors alive at once in one step, beyond its inputs."""
    step, z = make(variant), inputs(case)
    gc.collect()
    with LiveTensors() as live, torch.set_grad_enabled(grad):
        loss = step(z)
        if grad:
            loss.backward()
    return live.peak / 2**20


def times(case: Case, names: list[str], repeats: int) -> dict[str, list[tuple[float, float]]]:
    """{variant: [(wall, this rank's CPU seconds) for each repeat]}; runs inside ``run_ranks``."""
    steps, z = {name: make(name) for name in names}, inputs(case)
    for step in steps.values():
        step(inputs(case._replace(rows=min(64, case.rows)))).backward()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in range(repeats):
        for name, step in steps.items():
            for leaf in z[:4]:
                leaf.grad = None
            gc.collect()
            dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            step(z).backward()
            dist.barrier()
            found[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return found


def gradient_error(case: Case, variant: str) -> float:
    """Against float64 on the embeddings as they are (rounded, for bf16)."""
    rows = min(case.rows, 256)
    z = dense_losses.batch(rows * case.ranks, case.width, near=0.35)
    z = z._replace(image=z.image.to(case.dtype), text=z.text.to(case.dtype), groups=None)
    return max(
        dense_losses.errors(lambda: Counted(make(variant)), dense_losses.sigmoid, [z], [rows] * case.ranks)[0].values()
    )


class Counted(torch.nn.Module):
    """A step in the shape the test helpers expect of a loss."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step, self.traffic = step, dict[str, int]()

    def forward(self, z: Embeddings) -> Tensor:
        return self.step(z)


def measure(case: Case, repeats: int, only: list[str]) -> list[Row]:
    names = [name for name in variants(case) if not only or name in only]
    ranks = run_ranks(times, case.ranks, case, names, repeats, timeout=3000)
    rows = []
    for name in names:
        wall = statistics.median(max(rank[name][i][0] for rank in ranks) for i in range(repeats))
        cpu = statistics.median(sum(rank[name][i][1] for rank in ranks) for i in range(repeats))
        if name == FLOOR:
            rows.append(Row(case, name, wall, cpu, math.nan, math.nan, math.nan))
            print(line(rows[-1]), flush=True)
            continue
        memory = run_ranks(peak_extra, case.ranks, case, name, timeout=3000)[0]
        tensors = run_ranks(tracked_peak, case.ranks, case, name, timeout=3000)[0]
        rows.append(Row(case, name, wall, cpu, memory, tensors, gradient_error(case, name)))
        print(line(rows[-1]), flush=True)
    return rows


def line(row: Row) -> str:
    dtype = str(row.case.dtype).removeprefix("torch.")
    shape = f"| {row.case.ranks} | {row.case.rows} | {row.case.width} | {dtype} "
    rest = " | | |" if row.variant == FLOOR else f" {row.resident:.0f} | {row.tensors:.1f} | {row.error:.1e} |"
    return f"{shape}| {row.variant} | {row.seconds:.2f} | {row.cpu:.2f} |{rest}"


def summary(rows: list[Row]) -> list[str]:
    """The ratios to the fastest peer, case by case."""
    said = []
    for case in dict.fromkeys(row.case for row in rows):
        peers = [row for row in rows if row.case == case and row.variant.startswith("open_clip")]
        ours = next((row for row in rows if row.case == case and row.variant == "ring"), None)
        floor = next((row for row in rows if row.case == case and row.variant == FLOOR), None)
        if floor and ours:
            said.append(
                f"{case.ranks} ranks, b={case.rows}: ring takes {ours.seconds / floor.seconds:.2f}x the time of the "
                f"matrix products alone, {ours.cpu / floor.cpu:.2f}x their CPU seconds"
            )
        if peers and ours:
            wall, cpu = (min(peers, key=lambda row, key=key: getattr(row, key)) for key in ("seconds", "cpu"))
            least = min(row.tensors for row in peers)
            said.append(
                f"{case.ranks} ranks, b={case.rows}: ring takes {ours.seconds / wall.seconds:.2f}x the time of "
                f"{wall.variant}, {ours.cpu / cpu.cpu:.2f}x the CPU seconds of {cpu.variant}, "
                f"{ours.tensors / least:.2f}x the memory of the leanest peer"
            )
    return said


def plot(rows: list[Row], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2))
    for variant in dict.fromkeys(row.variant for row in rows):
        mine = sorted((row for row in rows if row.variant == variant), key=lambda row: row.case.ranks)
        style = (
            {"linewidth": 2.4, "marker": "o"}
            if variant in OURS
            else {"linewidth": 1.2, "marker": "x", "linestyle": "--"}
        )
        for panel, key in zip(panels, ("tensors", "seconds"), strict=True):
            panel.plot([row.case.ranks for row in mine], [getattr(row, key) for row in mine], label=variant, **style)
    case = rows[0].case
    for panel, title in zip(panels, ("peak extra memory of one rank, MiB", "forward + backward, seconds"), strict=True):
        panel.set(
            title=title, xlabel="ranks", xscale="log", yscale="log", xticks=sorted({row.case.ranks for row in rows})
        )
        panel.xaxis.set_major_formatter(matplotlib.ticker.ScalarFormatter())
        panel.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        panel.grid(alpha=0.3, which="both")
    panels[0].legend(fontsize=7)
    figure.suptitle(f"Sigmoid loss, {case.rows} pairs a rank, width {case.width}, float32 (all ranks share one CPU)")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="RANKS,ROWS,WIDTH,DTYPE",
        help="instead of the usual ones; may repeat",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="PNG of memory and time against ranks")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="VARIANT",
        help="these variants, as the table names them; may repeat",
    )
    options = parser.parse_args(argv)
    cases = [Case(*map(int, text.split(",")[:3]), getattr(torch, text.split(",")[3])) for text in options.case]
    cases = cases or (QUICK if options.quick else FULL + FULL_BF16)
    print("| ranks | rows a rank | width | dtype | variant | time, s | CPU, s | resident, MiB | tensors, MiB | error |")
    print("|--:|--:|--:|---|---|--:|--:|--:|--:|--:|")
    rows = [row for case in cases for row in measure(case, 1 if options.quick else options.repeats, options.only)]
    print("\n" + "\n".join(summary(rows)))
    print(
        "The Triton kernel (trainer/losses/kernel.py) is checked by Triton's interpreter and unmeasured: no GPU here."
    )
    if options.out:
        size = 128 if options.quick else 512
        series = [
            Case(ranks, size, 64 if options.quick else 768, torch.float32)
            for ranks in ((1, 2) if options.quick else (1, 2, 4, 8))
        ]
        plot([row for case in series for row in measure(case, 1 if options.quick else 3, options.only)], options.out)


if __name__ == "__main__":
    main(sys.argv[1:])
