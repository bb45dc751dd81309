"""Resources of the loss's kernel on each card, from compiling it (no card needed): registers, spills, shared memory,
instructions.

python -m tests.benchmarks.kernel
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trainer.losses import kernel

CARDS = {
    80: ("A100", 163),
    86: ("RTX 3090", 99),
    89: ("RTX 4090", 99),
    90: ("H100", 227),
    100: ("B200", 227),
    120: ("RTX 5090", 99),
}
"""Compute capability -> a card of it, and the most shared memory of a program in KiB (CUDA programming guide)."""


class Resources(NamedTuple):
    """Of one compiled kernel."""

    registers: int
    spilled: int
    """Bytes of a thread's stack."""
    shared: int
    """Bytes."""
    products: int
    """Instructions for the tensor cores."""
    others: float
    """Other instructions for each pair of an image and a text."""


def compiled(capability: int, even: bool) -> Resources:
    """The kernel for a card, for a batch that is a multiple of the block size (``even``) or not."""
    block = kernel.blocks_of(capability // 10)
    assert block is not None
    constants: dict[str, Any] = {"R": block.rows, "C": block.columns, "D": block.width, "BAND": block.band}
    constants |= {"PERSISTENT": block.persistent, "TMA": block.tma, "EVEN": even, "HARDWARE": True}
    signature = {"images": "*fp16", "texts": "*fp16", "scale": "*fp32", "bias": "*fp32", "gradient": "*fp16"}
    signature |= {"sums": "*fp32", "rows": "i32", "columns": "i32", "width": "i32", "power": "fp32"}
    if block.tma:
        signature["images"] = f"tensordesc<fp16[{block.rows},{block.width}]>"
        signature["texts"] = f"tensordesc<fp16[{block.columns},{block.width}]>"
    function = kernel._sigmoid_tile
    aligned = [*(name for name, kind in signature.items() if kind.startswith("*")), "columns", "width"]
    source = ASTSource(
        fn=function,
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(function.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": block.warps, "num_stages": block.stages}
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    code, usage = (_cuobjdump(found.asm["cubin"], option) for option in ("-sass", "-res-usage"))
    counts = Counter(re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9]+)", code, re.MULTILINE))
    products = sum(count for name, count in counts.items() if re.fullmatch(r"HG?MMA|UTC\w*MMA", name))
    registers, stack = map(int, re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0])
    pairs = block.rows * block.columns / (32 * block.warps)
    return Resources(registers, stack, found.metadata.shared, products, (counts.total() - products) / pairs)


def _cuobjdump(cubin: bytes, option: str) -> str:
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, option, file.name], capture_output=True, text=True, check=True).stdout


def main() -> None:
    print(
        "| card | blocks | registers | spilled, bytes | shared memory | tensor-core instructions | other instructions per pair |"
    )
    print("|---|---|---:|---:|---:|---:|---:|")
    for capability, (card, limit) in CARDS.items():
        block = kernel.blocks_of(capability // 10)
        assert block is not None
        for even in (True, False):
            found = compiled(capability, even)
            shape = f"{block.rows} x {block.columns} x {block.width}{'' if even else ', batch not a multiple'}"
            print(
                f"| {card}, sm_{capability} | {shape} | {found.registers} | {found.spilled} | "
                f"{found.shared / 1024:.0f} of {limit} KiB | {found.products} | {found.others:.0f} |"
            )


if __name__ == "__main__":
    main()
