"""Every example runs on two ranks, and each gradient that its optimizer meets is that of one dense float64 computation
on the global batch: all parameters, scale and bias included, at every step."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from torch import nn

from tests.examples import hf_trainer
from tests.examples.tiny import TwoTowers
from tests.support import dense_losses, torchvision_stub
from tests.support.example_runs import gradient_errors

EXAMPLES = sorted(path for path in Path(__file__, "../examples").resolve().glob("*.py") if path.name != "__init__.py")
OPEN_CLIP = "pip install ftfy && pip install --no-deps open_clip_torch==3.3.0"
"""Not in requirements.txt: it needs torchvision, whose wheel does not load beside a CPU torch."""


def check(errors: dict[str, float]) -> None:
    assert len({name.split(" ", 2)[1] for name in errors}) >= 2, "the weights moved between steps"
    assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_has_at_most_60_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 60


def test_ddp() -> None:
    check(gradient_errors("ddp", TwoTowers, dense_losses.sigmoid))


def test_fsdp2() -> None:
    check(gradient_errors("fsdp2", TwoTowers, dense_losses.softmax))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate(accumulate: int) -> None:
    check(gradient_errors("accelerate_loop", TwoTowers, dense_losses.sigmoid, accumulate=accumulate))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_hugging_face_trainer(accumulate: int) -> None:
    def plain() -> nn.Module:
        return hf_trainer.Towers(hf_trainer.CONFIG)

    check(gradient_errors("hf_trainer", plain, dense_losses.sigmoid, accumulate=accumulate))


def test_fabric() -> None:
    check(gradient_errors("fabric", TwoTowers, dense_losses.sigmoid))


@pytest.mark.parametrize("accum_freq", [1, 2])
def test_open_clips_own_loop(accum_freq: int) -> None:
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip(f"open_clip is not installed: {OPEN_CLIP}")
    torchvision_stub.install()
    from tests.examples import open_clip_loop

    def plain() -> nn.Module:
        return open_clip_loop.towers()

    check(gradient_errors("open_clip_loop", plain, dense_losses.sigmoid, one_batch=True, accum_freq=accum_freq))


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "fabric", "accelerate"])
def test_two_passes(wrapper: str) -> None:
    check(gradient_errors("two_pass", TwoTowers, dense_losses.sigmoid, one_batch=True, wrapper=wrapper))
