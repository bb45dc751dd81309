"""The ``ringlip`` command: all commands of trainer and data_tools under one name.

    ringlip train RECIPE [section.key=value ...]      # the same as python -m trainer.train RECIPE ...
    ringlip shard pairs.csv OUT ...                   # the same as python -m data_tools shard pairs.csv OUT ...

A command's module is imported when it is called: ``ringlip --help`` imports neither torch nor pyarrow.
"""

from __future__ import annotations

import glob
import os
import runpy
import sys

from data_tools.commands import COMMANDS as DATA_COMMANDS
from data_tools.io.command_table import Groups, check_command, usage
from data_tools.io.errors import UserError
from trainer import __version__
from trainer.cli import completion
from trainer.core.shipped import shipped

TRAINER: Groups = {
    "Training": {
        "train": "train or finetune as a recipe describes; resumes a run",
        "finetune": "finetune a model on your pairs with one command: chooses a recipe, trains, measures forgetting",
        "study": "repeat a paper's finding as a grid of short runs; your own data and recipe too",
        "plan": "forecast memory and time per GPU; choose ds_config and micro-batch",
        "doctor": "check this machine or a cluster before a run",
        "embed": "store the embeddings of a locked tower (SigLiT) or of teachers beside the shards",
    },
    "Models": {
        "evaluate": "retrieval and zero-shot scores of a run, an export or a Hugging Face model",
        "export": "write a Hugging Face directory or a PEFT adapter",
        "search": "search your images by words or by an image, on a local page",
        "report": "write an HTML page about a run, or one that compares several",
        "runs": "list the runs in a folder with state, progress, scores and speed",
    },
}
SHELL: Groups = {
    "Shell": {
        "launch": "train on all GPUs of one or several nodes, with restarts (launch/multinode.sh)",
        "completion": "print the completion script for bash, zsh or fish",
    },
}
ALL: Groups = {**TRAINER, "Data": DATA_COMMANDS, **SHELL}
LAUNCHERS = """`ringlip train` runs one rank on one device. To use all GPUs, with the same result:
  ringlip launch --ranks 8 RECIPE                         restarts after failures; --hostfile F: several nodes
  deepspeed --module trainer.train RECIPE                 all GPUs of this node
  torchrun --nproc-per-node 8 -m trainer.train RECIPE"""


def run() -> None:
    """The ``ringlip`` on the PATH."""
    sys.exit(main(sys.argv[1:], "ringlip", ALL))


def main(argv: list[str], program: str, groups: Groups) -> int:
    """Runs the command ``argv[0]`` of ``groups`` as its ``python -m`` form would. Returns the exit code; a command that
    ends its process itself raises SystemExit."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(program, groups))
        if "Shell" in groups:
            print(
                f"\nRecipes: {shipped('recipes')}\nds_configs: {shipped('ds_configs')}\nLaunch scripts: "
                f"{shipped('launch')}"
            )
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"ringlip {__version__}")
        return 0
    name, arguments = argv[0], argv[1:]
    try:
        check_command(program, groups, name)
        if name == "completion":
            print(completion.script(arguments, groups, start))
            return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if name == "launch":
        os.execvp("bash", ["bash", str(shipped("launch") / "multinode.sh"), *arguments])
    if name == "train" and (text := launchers(arguments)):
        print(f"{text}\n", file=sys.stderr, flush=True)
    start(name, arguments)
    return 0


def launchers(arguments: list[str]) -> str:
    """How to use several GPUs: for the help of `ringlip train`, and for a start that leaves some GPUs unused."""
    if not arguments or arguments[0] in ("-h", "--help"):
        return LAUNCHERS
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = len(glob.glob("/dev/nvidia[0-9]*")) if visible is None else len(visible.split(","))
    return LAUNCHERS if gpus > 1 and "RANK" not in os.environ else ""


def start(name: str, arguments: list[str]) -> None:
    """Runs a command's module as ``python -m`` does, so that both forms are identical (worker processes use
    ``__main__``)."""
    is_data = name in DATA_COMMANDS
    module = "data_tools" if is_data else f"trainer.{name}"
    before, sys.argv = sys.argv, [module, *([name] if is_data else []), *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        sys.argv = before
