"""Forecasts memory and time per GPU, and chooses the ds_config and the micro-batch. Needs no GPU.

    python -m trainer.plan trainer/recipes/glyphs.yaml --gpu-memory 16GiB --gpus 8
    python -m trainer.plan RECIPE batch.size=32768 --gpu-memory 24GiB --gpus 16 --nodes 2 --link 25Gbit \\
        --card rtx4090 --out plan.svg

The model is built on the meta device, without weights, and one micro-batch is traced with fake tensors. Models in the
planner's own table need no network.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_tools.io.errors import run_command
from trainer import config
from trainer.config import Recipe
from trainer.core.settings import check_out
from trainer.core.types import UserError
from trainer.models import ModelSettings
from trainer.models.adapt.lora import LoraSettings
from trainer.models.adapt.recompute import RecomputeSettings
from trainer.plan.auto import job_of, teacher_of
from trainer.plan.bar_chart import bars
from trainer.plan.device import Device
from trainer.plan.memory import Job
from trainer.plan.profile import Curve, look
from trainer.plan.roofline import CARDS, STREAM, Card, default_card, wire_bytes
from trainer.plan.search import RESERVE, Option, Way, choose, options, usable_bytes, zero_section

GIB = float(1 << 30)
UNITS = {"gib": 2.0**30, "mib": 2.0**20, "gb": 1e9, "mb": 1e6, "gbit": 1e9 / 8, "mbit": 1e6 / 8}


@dataclass(frozen=True)
class Plan:
    """The options considered and the one chosen."""

    options: list[Option]
    chosen: Option | None
    budget: float
    """Bytes per GPU that tensors may take."""
    notes: list[str]
    job: Job
    """A step of one rank, with one pair at a time."""


def plan(
    recipe: Recipe,
    memory_bytes: float,
    gpus: int,
    *,
    nodes: int = 1,
    link: float | None = None,
    card: Card | None = None,
    tflops: float | None = None,
    reserve: float = RESERVE,
    device: Device = "cuda",
) -> Plan:
    """Considers every ds_config, recomputation and LoRA for ``recipe`` on ``gpus`` cards (in all nodes) of
    ``memory_bytes`` each.

    ``link`` is bytes a second between nodes, ``tflops`` the attained matrix rate of a card where it is known. Raises
    UserError when the global batch does not divide among the cards.
    """
    card = card or default_card(memory_bytes)
    slowest = min(card.link, link) if link and nodes > 1 else card.link
    precision = card.precision(recipe.engine.precision)
    job = replace(job_of(recipe, gpus, nodes), teacher=teacher_of(recipe, precision, device))
    ways, notes = _ways(recipe, precision, device)
    budget = usable_bytes(memory_bytes, reserve)
    found = options(ways, job, budget, card, precision, slowest, tflops)
    return Plan(found, choose(found), budget, notes + _of_teacher(job), job)


def _of_teacher(job: Job) -> list[str]:
    """What the table counts of a teacher, for people."""
    if job.teacher is None:
        return []
    return [
        f"teacher: {job.teacher.count / 1e6:.1f} M parameters, whole on every GPU ({job.teacher.parameters / GIB:.2f} "
        "GiB), its forward pass and the divergence are counted",
        *([job.teacher.note] if job.teacher.note else []),
    ]


def _ways(recipe: Recipe, precision: str, device: Device) -> tuple[list[Way], list[str]]:
    """The recipe's model under every recomputation, with the recipe's LoRA and without (or with a plain one where it
    has none)."""
    model = recipe.model
    ways: list[Way] = []
    notes: list[str] = []
    recomputations = {
        "no recomputation": RecomputeSettings(),
        "recompute all": RecomputeSettings(image="all", text="all"),
        "recompute all, offload": RecomputeSettings(image="all", text="all", offload=True),
    }
    if model.recompute not in recomputations.values():
        recomputations = {"as in the recipe": model.recompute, **recomputations}
    adapters = {False: model.lora, True: None if model.lora else LoraSettings()}
    for other, lora in adapters.items():
        inference: Curve | None = None
        for label, recompute in recomputations.items():
            try:
                variant = ModelSettings.model_validate({**dict(model), "lora": lora, "recompute": recompute})
            except ValueError:
                continue  # a locked tower takes no adapter
            survey = look(variant, precision, device, inference, float32_modules=recipe.engine.float32_modules)
            inference = survey.inference
            keys = (
                []
                if recompute == model.recompute
                else [f"model.recompute.{k}={v}" for k, v in recompute.model_dump(mode="json").items()]
            )
            keys += [] if not other else ["model.lora=null" if lora is None else "'model.lora={}'"]
            ways.append(Way(label + (", LoRA" if lora else ""), tuple(keys), survey, not other))
            notes += [survey.note] if survey.note and survey.note not in notes else []
    return ways, notes


def table(result: Plan, job: Job) -> str:
    """The options as text, one a line, the fitting ones first by time."""
    columns = f"{'ds_config':<22}{'recomputation, LoRA':<31}{'micro':>6}  {'GiB':>6}  {'step s':>7} {'pairs/s':>8}"
    lines = [columns + "  peak at, and what it is made of (GiB)"]
    for option in sorted(result.options, key=lambda o: (not o.way.same_training, not o.fits, o.step_seconds)):
        parts = " ".join(f"{name} {size / GIB:.2f}" for name, size in option.peak.parts.items() if size > 0.005 * GIB)
        host = f" | host {option.peak.host / GIB:.1f}" if option.peak.host > 0.005 * GIB else ""
        speed = f"{option.step_seconds:7.2f} {job.local_batch * job.ranks / option.step_seconds:8.0f}"
        micro = f"{option.micro_batch:>6}" if option.fits else "     -"
        star = "*" if option is result.chosen else " "
        each = ", reduced per micro-batch" if option.grad_reduction == "per_micro_batch" else ""
        lines.append(
            f"{star}{option.ds_config:<21}{option.way.label + each:<31}{micro}  {option.peak.total / GIB:6.2f}  "
            f"{speed if option.fits else '      -        -'}  {option.peak.phase}: {parts}{host}"
        )
    return "\n".join(lines)


def advice(result: Plan, job: Job, recipe: str, overrides: list[str], gpus: int, nodes: int) -> str:
    """The line to paste, and where the step's time and traffic go; or, where nothing fits, what would."""
    if result.chosen is not None:
        keys = shlex.join([*overrides, *result.chosen.overrides()])
        where = (
            f"--num_gpus {gpus}"
            if nodes == 1
            else f"--hostfile hostfile --num_nodes {nodes} --num_gpus {gpus // nodes}"
        )
        return (
            f"chosen:\n  deepspeed {where} --module trainer.train {shlex.quote(recipe)} "
            f"{keys}\n{_spent(result.chosen, job)}"
        )
    same = min((o for o in result.options if o.way.same_training), key=lambda o: o.peak.total)
    need = same.peak.total / GIB
    lines = [
        f"NOTHING FITS {result.budget / GIB:.1f} GiB: the least that this recipe takes is {need:.1f} GiB a GPU, one "
        f"pair at a time, with {same.ds_config}, {same.way.label} (most of it "
        f"{max(same.peak.parts, key=lambda part: same.peak.parts[part])})"
    ]
    card = need * GIB / 0.95 + RESERVE
    lines.append(
        f"what would: cards of {card / GIB:.0f} GiB; or more cards (ZeRO-3 divides the states among them); or a "
        f"smaller model"
    )
    others = [o for o in result.options if o.fits and not o.way.same_training]
    if others:
        best = min(others, key=lambda o: o.step_seconds)
        lines.append(f"or another training: {shlex.join(best.overrides())} ({best.way.label})")
    return "\n".join(lines)


def _spent(option: Option, job: Job) -> str:
    """Seconds by what they go to, and bytes on the wire."""
    seconds = ", ".join(
        f"{name} {value:.3g}" for name, value in option.seconds.items() if value > 0.001 * option.step_seconds
    )
    there = replace(job, micro_batch=option.micro_batch, grad_reduction=option.grad_reduction)
    sent = ", ".join(
        f"{name} {size / GIB:.2f}"
        for name, size in wire_bytes(option.way.survey, zero_section(option.ds_config), there).items()
    )
    return f"a step: {option.step_seconds:.3g} s ({seconds}); GiB that each GPU sends: {sent}"


def amount(text: str) -> float:
    """'16GiB', '24GB', '25Gbit' -> bytes (a second)."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]+)(?:/s)?\s*", text)
    if not found or found[2].lower() not in UNITS:
        raise UserError(f"{text!r} is not a size: write 16GiB, 24GB, or 25Gbit for a link")
    return float(found[1]) * UNITS[found[2].lower()]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path, help="a YAML file, or the name of a shipped recipe (trainer/recipes/)")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="override the recipe, as for training"
    )
    parser.add_argument("--gpu-memory", required=True, help="memory of one GPU: 16GiB, 24GB, ...")
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs, over all nodes (default 1)")
    parser.add_argument(
        "--nodes", type=int, default=1, help="number of nodes that the GPUs are spread over evenly (default 1)"
    )
    parser.add_argument(
        "--link", default="", help="bandwidth between nodes, per second: 25Gbit, 100Gbit, ... (with several nodes)"
    )
    parser.add_argument(
        "--card", choices=sorted(CARDS), help="GPU (default: a common one of that memory size; 15GiB: t4, 16GiB: v100)"
    )
    parser.add_argument(
        "--tflops", type=float, help="TFLOP/s that a GPU reaches in matrix products, if you have measured it"
    )
    parser.add_argument("--global-batch", type=int, help="the same as batch.size=...")
    parser.add_argument(
        "--reserve", default="1GiB", help="memory per GPU to leave for the CUDA context, cuBLAS and NCCL (default 1GiB)"
    )
    parser.add_argument(
        "--out", type=Path, help="also draw the table as stacked bars in this SVG file; the report shows RUN/plan.svg"
    )
    options_, rest = parser.parse_known_args(argv)
    overrides = [*options_.overrides, *rest]
    if unknown := [text for text in rest if text.startswith("-")]:
        raise UserError(f"{unknown[0]!r} is not an option; see --help")
    if options_.global_batch is not None:
        overrides.append(f"batch.size={options_.global_batch}")
    check_out(options_.out)
    if options_.gpus < 1 or options_.nodes < 1 or options_.gpus % options_.nodes:
        raise UserError(f"--gpus {options_.gpus} do not divide among --nodes {options_.nodes}")
    recipe = config.load(options_.recipe, overrides)
    memory, link = amount(options_.gpu_memory), amount(options_.link) if options_.link else None
    reserve = amount(options_.reserve)
    if reserve >= memory:
        raise UserError(
            f"--reserve {options_.reserve} leaves nothing of --gpu-memory {options_.gpu_memory} for tensors: lower it"
        )
    if link == 0 or (options_.tflops is not None and options_.tflops <= 0):
        raise UserError("--link and --tflops are rates above 0; leave them out where you have not measured them")
    card = CARDS[options_.card] if options_.card else default_card(memory)
    keywords: dict[str, Any] = {"nodes": options_.nodes, "link": link, "card": card, "tflops": options_.tflops}
    result = plan(recipe, memory, options_.gpus, reserve=reserve, **keywords)
    job = result.job
    for note in result.notes:
        print(f"note: {note}")
    print(_assumptions(result, recipe, job, card, options_) + "\n")
    print(
        table(result, job)
        + "\n\n"
        + advice(result, job, str(options_.recipe), overrides, options_.gpus, options_.nodes)
    )
    if options_.out:
        _draw(
            result,
            options_.out,
            f"{options_.recipe.stem}: {recipe.batch.size} pairs on {options_.gpus} x {options_.gpu_memory}",
        )
        print(f"drawn in {options_.out}")
    return 0 if result.chosen else 1


def _assumptions(result: Plan, recipe: Recipe, job: Job, card: Card, given: argparse.Namespace) -> str:
    survey, precision = result.options[0].way.survey, card.precision(recipe.engine.precision)
    rate = given.tflops or card.attained(precision) / 1e12
    link = min(card.link, amount(given.link)) if given.link and given.nodes > 1 else card.link
    return (
        f"{survey.count / 1e6:.1f} M parameters, {survey.trainable / 4e6:.1f} M trained; global batch "
        f"{recipe.batch.size} = "
        f"{job.ranks} x {job.local_batch} pairs; {precision}\n"
        f"{given.gpu_memory} a card, {result.budget / GIB:.1f} GiB of it for tensors ({given.reserve} and 5% set "
        f"aside)\n"
        f"time: roofline of {card.name} at {rate:.0f} TFLOP/s and {STREAM * card.memory / 1e9:.0f} GB/s, links of "
        f"{link / 1e9:.1f} GB/s, "
        "nothing overlaps; without engine.compile expect 1.4 times as long"
    )


def _draw(result: Plan, out: Path, title: str) -> None:
    rows = []
    for option in sorted(result.options, key=lambda o: (not o.way.same_training, not o.fits, o.step_seconds)):
        speed = f"micro-batch {option.micro_batch}, {option.step_seconds:.2f} s" if option.fits else "does not fit"
        mark = " *" if option is result.chosen else ""
        rows.append(
            (
                f"{option.ds_config}, {option.way.label}",
                option.peak.parts,
                f"{option.peak.total / GIB:.1f} GiB, {speed}{mark}",
            )
        )
    out.write_text(bars(rows, result.budget, title), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
