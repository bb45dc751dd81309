"""The recipes that ship: they parse, they say how to launch them, and what their headers say of memory is what the
planner answers."""

from __future__ import annotations

import dataclasses
import re
from functools import cache
from pathlib import Path

import pytest

from trainer import config
from trainer.config import Recipe
from trainer.models import ModelSettings
from trainer.plan import command
from trainer.plan.auto import job_of
from trainer.plan.memory import forecast
from trainer.plan.profile import Survey, look
from trainer.plan.roofline import default_card, step_seconds
from trainer.plan.search import Option, largest, usable_bytes, zero_section

GIB = 1 << 30
FOLDER = Path(config.__file__).parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
ANSWER = re.compile(r"#   (\d+) x (\d+) GiB \((.*), (.*)\): (.*); ([0-9.]+) GiB per GPU, ([0-9.]+) s per step")
CASES = [(path, match) for path in RECIPES for match in ANSWER.finditer(path.read_text(encoding="utf-8"))]


def line(gpus: int, memory: int, card: str, precision: str, overrides: list[str], peak: float, seconds: float) -> str:
    """A forecast as it stands in the header of a recipe."""
    return (
        f"#   {gpus} x {memory} GiB ({card}, {precision}): {' '.join(overrides)}; {peak / GIB:.1f} GiB per GPU, "
        f"{seconds:.1f} s per step"
    )


def chosen(recipe: Recipe, gpus: int, memory: int) -> str:
    """What `python -m trainer.plan RECIPE --gpu-memory MEMORYGiB --gpus GPUS` chooses."""
    card = default_card(memory * GIB)
    option = command.plan(recipe, memory * GIB, gpus).chosen
    assert isinstance(option, Option)
    return line(
        gpus, memory, card.name, card.precision("auto"), option.overrides(), option.peak.total, option.step_seconds
    )


@cache
def traced(model: str, precision: str) -> Survey:
    """``look``, once for all cards that compute alike."""
    return look(ModelSettings.model_validate_json(model), precision, "cuda")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_opens_with_its_launch_command(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    recipe = config.load(path)
    assert f"--module trainer.train trainer/recipes/{path.name}" in text.split("\nrun:")[0]
    cards = {card for _, _, card, *_ in ANSWER.findall(text)}
    assert cards == ({"v100", "a100", "rtx4090"} if path.stem == "siglit_1m" else {"v100", "t4", "rtx4090"}) or (
        not recipe.model.path and not cards
    )


@pytest.mark.parametrize(("path", "match"), CASES, ids=[f"{path.stem}-{match[1]}x{match[2]}" for path, match in CASES])
def test_the_memory_in_the_header_is_the_planners(path: Path, match: re.Match[str]) -> None:
    gpus, memory, overrides = int(match[1]), int(match[2]), match[5].split()
    recipe = config.load(path, overrides)
    card = default_card(memory * GIB)
    precision, rows = card.precision("auto"), recipe.batch.micro_batch
    assert isinstance(rows, int)
    survey, zero = traced(recipe.model.model_dump_json(), precision), zero_section(recipe.engine.ds_config)
    job = dataclasses.replace(job_of(recipe, gpus, 1), micro_batch=rows)
    seconds = sum(step_seconds(survey, zero, job, card, precision, card.link).values())
    assert match[0] == line(gpus, memory, card.name, precision, overrides, forecast(survey, zero, job).total, seconds)
    assert largest(survey, zero, job, usable_bytes(memory * GIB))[0] == rows


@pytest.mark.slow
@pytest.mark.parametrize(("path", "match"), CASES, ids=[f"{path.stem}-{match[1]}x{match[2]}" for path, match in CASES])
def test_the_choice_in_the_header_is_the_planners(path: Path, match: re.Match[str]) -> None:
    assert chosen(config.load(path), int(match[1]), int(match[2])) == match[0]
