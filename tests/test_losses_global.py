"""The global contrastive loss against a dense float64 version that keeps its running means in a dict."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import dense_losses
from trainer.core.types import Embeddings, UserError
from trainer.losses import GlobalLoss

SIZES = ([17], [9, 12, 4])
LIMIT = 1e-6


class Dense:
    """SogCLR's estimator, or FastCLIP-v3's, as in the papers; logarithms of the running means are kept in float32."""

    def __init__(
        self, gamma: float, temperature: str, rho: float = 6.5, eps: float = 1e-14, mask: bool = False
    ) -> None:
        self.gamma, self.temperature, self.rho, self.eps, self.mask = gamma, temperature, rho, eps, mask
        self.means: dict[int, Tensor] = {}
        self.conditions: list[float] = []
        """Of each loss: the mean size of what it is the mean of, logarithms of both signs, relative to it."""

    def __call__(self, z: Embeddings) -> Tensor:
        assert z.ids is not None
        scale = z.scale if self.temperature == "learned" else z.scale.detach()
        cosines = z.image @ z.text.T
        negative = ~(dense_losses.same(z) if self.mask else dense_losses.eye(z))
        matched = cosines.diagonal()
        g = []
        for values in (cosines, cosines.T):
            terms = (scale * (values - matched[:, None])).exp() * negative
            g.append(terms.sum(1) / negative.sum(1))
        found = torch.stack(g, 1)
        keys = z.ids.tolist()
        u = torch.stack(
            [
                (1 - self.gamma) * self.means[key].double().exp() + self.gamma * now if key in self.means else now
                for key, now in zip(keys, found.detach(), strict=True)
            ]
        )
        for key, value in zip(keys, u, strict=True):
            self.means[key] = value.log().float()
        logs = (self.eps + u).log()
        loss = logs.mean(0).sum() / 2
        moving = (found / (self.eps + u)).mean(0).sum() / 2  # its gradient is the estimator
        moving = moving - moving.detach()
        self.conditions.append((logs.abs().mean() / loss.abs()).item())
        if self.temperature == "fixed":
            return loss + moving
        tau = 1 / scale.squeeze()
        return tau * (loss + self.rho) + tau.detach() * moving


def batches(rows: int, temperatures: list[float]) -> list[Embeddings]:
    """Half of each batch's samples are in the next one too; one sample comes twice in a batch."""
    found = []
    for number, t in enumerate(temperatures):
        ids = torch.arange(rows) + number * (rows // 2) + 65_530
        ids[3] = ids[1]
        found.append(dense_losses.batch(rows, t=t, b=-3.0, near=0.35, seed=number)._replace(ids=ids * 7))
    return found


def make(settings: dict[str, Any], gamma: float) -> GlobalLoss:
    loss = GlobalLoss(tile_rows=5, gamma=gamma, gamma_decay=0, **settings)
    loss.progress(1, 2)
    return loss


@pytest.mark.parametrize("sizes", SIZES, ids=len)
@pytest.mark.parametrize("temperature", ["fixed", "learned"])
@pytest.mark.parametrize(
    ("gamma", "same_group", "eps"), [(0.2, "negative", 1e-14), (0.6, "mask", 1e-3), (1.0, "negative", 0)]
)
def test_against_float64(sizes: list[int], temperature: str, gamma: float, same_group: str, eps: float) -> None:
    settings = {"temperature": temperature, "same_group": same_group, "eps": eps}
    reference = Dense(gamma, temperature, eps=eps, mask=same_group == "mask")
    steps = batches(sum(sizes), [10.0, 60.0, 10.0, 25.0])
    errors = dense_losses.errors(partial(make, settings, gamma), reference, steps, sizes)
    for found, condition in zip(errors, reference.conditions, strict=True):
        assert found.pop("loss") <= LIMIT * condition
        assert max(found.values()) <= LIMIT, found


def test_without_memory_it_is_a_softmax_over_the_negatives() -> None:
    z = batches(12, [20.0])[0]
    leaves = dense_losses.take(z, [12], 0)
    make({"temperature": "fixed", "eps": 0}, 1.0)(leaves).backward()
    truth = Embeddings(*[value.double().requires_grad_() for value in z[:4]])
    logits = dense_losses.logits(truth)
    off = logits.masked_fill(torch.eye(12, dtype=torch.bool), -math.inf)
    ((off.logsumexp(1) + off.logsumexp(0)) / 2 - logits.diagonal()).mean().backward()
    assert dense_losses.relative(leaves.image.grad, truth.image.grad) <= LIMIT
    assert dense_losses.relative(leaves.text.grad, truth.text.grad) <= LIMIT


def test_a_step_can_be_taken_back_and_evaluation_leaves_no_trace() -> None:
    loss = make({}, 0.3)
    first, second = batches(8, [10.0, 20.0])

    def value(z: Embeddings) -> float:
        found = loss(dense_losses.take(z, [8], 0))
        return found.item()

    value(first)
    restore = loss.snapshot()
    wanted = value(second)
    assert value(second) != wanted  # the running means have moved on
    restore()
    assert value(second) == wanted
    restore()
    loss.eval()
    value(second)
    loss.train()
    with torch.no_grad():
        loss(second)
    assert value(second) == wanted


def test_gamma_falls_along_half_a_cosine() -> None:
    loss = GlobalLoss(gamma=0.2, gamma_decay=0.5)
    seen = []
    for samples in (0, 125, 250, 500, 1000):
        loss.progress(samples, 1000)
        seen.append(loss.gamma)
    assert seen == pytest.approx([1.0, 0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2, 0.6, 0.2, 0.2])


@pytest.mark.parametrize("change", [lambda z: z._replace(ids=None), lambda z: z._replace(ids=z.ids[:3])])
def test_samples_must_be_named(change: Callable[[Embeddings], Embeddings]) -> None:
    with pytest.raises(UserError, match=r"Embeddings\.ids"):
        make({}, 0.3)(change(batches(8, [10.0])[0]))


def test_a_batch_of_one_pair_has_no_negatives() -> None:
    z = dense_losses.take(batches(4, [10.0])[0], [1, 3], 0)
    value = make({"temperature": "fixed"}, 0.5)(z)
    value.backward()
    assert value.item() == pytest.approx(math.log(1e-14)) and not z.image.grad.any() and not z.text.grad.any()
