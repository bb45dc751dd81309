"""The step in two passes on any callables, in one process. Under wrappers and on ranks: tests/test_examples.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.examples.tiny import TwoTowers, global_batch
from trainer.core.types import UserError
from trainer.losses.drop_in import SigLipLoss
from trainer.two_pass import two_pass

IMAGES, TEXTS = global_batch(0, 10)
BATCH = IMAGES.double(), TEXTS


class Encoders:
    """Two encoders that are no module together, with dropout, and a scale of their own."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.image = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.Dropout(0.5)).double()
        self.text = nn.Sequential(nn.Embedding(50, 4), nn.Flatten(), nn.Linear(24, 16), nn.Dropout(0.5)).double()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.calls: list[int] = []

    def __call__(self, images: Tensor, texts: Tensor) -> tuple[Tensor, ...]:
        self.calls.append(len(images))
        return F.normalize(self.image(images)), F.normalize(self.text(texts)), self.scale.exp(), torch.zeros(())

    def parameters(self) -> list[nn.Parameter]:
        return [*self.image.parameters(), *self.text.parameters(), self.scale]


@pytest.mark.parametrize("micro_batch", [1, 3, 9, 10, 64])
def test_gradients_and_random_numbers_are_those_of_one_graph(micro_batch: int) -> None:
    mine, plain, loss = Encoders(), Encoders(), SigLipLoss()
    torch.manual_seed(2)
    value = two_pass(mine, BATCH, loss, micro_batch=micro_batch)
    following = torch.rand(3)
    torch.manual_seed(2)
    parts = [plain(*part) for part in zip(*(tensor.split(micro_batch) for tensor in BATCH), strict=True)]
    wanted = loss(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), *parts[0][2:])
    wanted.backward()
    assert torch.equal(following, torch.rand(3))
    torch.testing.assert_close(value, wanted.detach(), rtol=1e-12, atol=0)
    assert not value.requires_grad
    for found, expected in zip(mine.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-12)


def test_the_loss_runs_once_and_wrappers_reduce_once() -> None:
    model, losses, events = TwoTowers().double(), [], []

    class NoSync:
        def __enter__(self) -> None:
            events.append("quiet")

        def __exit__(self, *_: object) -> None:
            events.append("loud")

    def loss(**outputs: Any) -> Any:
        losses.append(len(outputs["image_features"]))
        return SigLipLoss()(**outputs)

    def backward(value: Tensor) -> None:
        events.append("backward")
        value.backward()

    two_pass(model, BATCH, loss, micro_batch=4, no_sync=NoSync, backward=backward)
    assert losses == [10]
    assert events == ["quiet", "backward", "loud"] * 2 + ["backward"]


def test_a_locked_tower_gets_no_gradient() -> None:
    model, plain = TwoTowers().double(), TwoTowers().double()
    plain.load_state_dict(model.state_dict())
    for towers in (model, plain):
        towers.image.requires_grad_(False)
    two_pass(model, BATCH, SigLipLoss(), micro_batch=3)
    SigLipLoss()(**plain(*BATCH)).backward()
    for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (found.grad is None) == name.startswith("image"), name
        if found.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-12)


def test_a_loss_scale_and_accumulation_multiply_the_gradient_once() -> None:
    model, plain = TwoTowers().double(), TwoTowers().double()
    plain.load_state_dict(model.state_dict())
    two_pass(model, BATCH, SigLipLoss(), micro_batch=3, backward=lambda value: (value * 8).backward())
    (8 * SigLipLoss()(**plain(*BATCH))).backward()
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-12)


def test_mistakes_are_named() -> None:
    model, loss = TwoTowers().double(), SigLipLoss()
    with pytest.raises(UserError, match=r"one length above 0, these have \[9, 10\]"):
        two_pass(model, (BATCH[0], BATCH[1][:9]), loss, micro_batch=2)
    with pytest.raises(UserError, match="micro_batch is 0"):
        two_pass(model, BATCH, loss, micro_batch=0)
    with pytest.raises(UserError, match=r"\[5, 16\] for 2 pairs"):
        two_pass(lambda *_: (torch.zeros(5, 16),), BATCH, loss, micro_batch=2)
    model.requires_grad_(False)
    with pytest.raises(UserError, match="every parameter is locked"):
        two_pass(model, BATCH, loss, micro_batch=2)
