"""The trace under fake tensors: what it counts, and that repeated layers stand for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.support.tiny_models import tiny_settings
from trainer.models import ModelSettings
from trainer.plan import profile
from trainer.plan.repeated_layers import Shortened
from trainer.plan.trace import Recorder


@pytest.fixture
def fake() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@pytest.mark.usefixtures("fake")
def test_live_bytes_of_a_small_graph_are_what_autograd_keeps() -> None:
    layer = nn.Linear(8, 16, bias=False)
    recorder = Recorder(layer.parameters())
    x = torch.zeros(4, 8)
    with recorder:
        y = layer(x)  # [4, 16]: 256 bytes
        z = y.square()  # keeps y, makes another 256
        total = z.sum()  # 4 bytes; z is not needed any more
        del y, z
        recorder.turn()
        total.backward()
        del total
    trace = recorder.trace()
    assert (
        trace.saved == 256 + 256 + 4
    )  # y, which square needs, z, which went after the last operator was noted, and the sum
    assert trace.gradients[-1] == 4 * 8 * 16
    assert trace.live[-1] == 0
    assert trace.flops.sum() == 2 * 2 * 4 * 8 * 16  # the product and its weight gradient: x needs none


@pytest.mark.usefixtures("fake")
def test_views_move_nothing_and_inputs_are_not_counted() -> None:
    x = torch.zeros(4, 8)
    recorder = Recorder()
    with recorder:
        y = x.t().reshape(2, 2, 8)[0]
    trace = recorder.trace()
    assert trace.live[-1] == 4 * 32 and y.shape == (2, 8)  # the transpose is a view, reshaping it copies
    assert trace.traffic.max() <= 2 * 4 * 32


@pytest.mark.usefixtures("fake")
def test_every_product_reads_its_operands_and_writes_its_result_once() -> None:
    """Fake tensors ask for their device in between, thousands of times a layer."""
    layer, x = nn.Linear(16, 32, bias=False).requires_grad_(False), torch.zeros(2, 4, 16)
    with Recorder() as recorder:
        layer(layer(x)[..., :16])
    weight, rows = 4 * 16 * 32, 4 * 8
    assert recorder.trace().traffic.sum() == 2 * (weight + rows * (16 + 32))


class Whole(Shortened):
    """Shortens nothing: the reference."""

    def __init__(self, model: nn.Module, period: int = 1) -> None:
        super().__init__(nn.Identity())


@pytest.mark.parametrize(
    ("kind", "keys", "precision"),
    [
        ("siglip", {}, "fp32"),
        ("clip", {"recompute": {"image": 2, "text": "all", "offload": True}}, "bf16"),
        ("clip", {"lora": {"rank": 4, "towers": "text"}, "lock": {"image": True}}, "fp16"),
    ],
)
def test_repeated_layers_give_the_trace_of_the_whole_model(
    kind: str, keys: dict[str, Any], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ModelSettings.model_validate({**tiny_settings(kind, layers=7).model_dump(), **keys})
    short = profile.look(settings, precision, "cuda")
    monkeypatch.setattr(profile, "Shortened", Whole)
    whole = profile.look(settings, precision, "cuda")
    for name in ("training", "inference"):
        mine, theirs = getattr(short, name), getattr(whole, name)
        assert mine.turn == theirs.turn
        np.testing.assert_array_equal(mine.gradients, theirs.gradients)
        for column in ("live", "flops", "traffic", "host"):
            np.testing.assert_allclose(
                getattr(mine, column).at(6), getattr(theirs, column).at(6), err_msg=f"{name} {column}"
            )


def test_a_trace_of_six_rows_lies_on_the_line_through_two_and_four() -> None:
    settings = tiny_settings("clip", layers=3)
    line = profile.look(settings, "fp32", "cpu").training
    before, profile.SIZES = profile.SIZES, (2, 6)
    try:
        other = profile.look(settings, "fp32", "cpu").training
    finally:
        profile.SIZES = before
    np.testing.assert_allclose(line.live.at(6), other.live.at(6))


def test_parking_activations_on_the_host_moves_them_there() -> None:
    plain = profile.look(tiny_settings(layers=5, recompute={"image": "all", "text": "all"}), "fp32", "cuda").training
    parked = profile.look(
        tiny_settings(layers=5, recompute={"image": "all", "text": "all", "offload": True}), "fp32", "cuda"
    ).training
    assert plain.host_bytes(8) == 0
    assert parked.host_bytes(8) > 0
    assert parked.saved(8) <= plain.saved(8) - 0.9 * parked.host_bytes(8)
