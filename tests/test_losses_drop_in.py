"""The losses under open_clip's signatures: what they accept, refuse and return. Gradients under every wrapper are in
tests/test_examples.py."""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import pytest
import torch

from tests.support import dense_losses, torchvision_stub
from tests.support.forked_ranks import run_ranks
from trainer.core.types import UserError
from trainer.losses.drop_in import ClipLoss, SigLipLoss


def features(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    z = dense_losses.batch(8, dtype=dtype)
    return {"image_features": z.image, "text_features": z.text, "logit_scale": z.scale, "logit_bias": z.bias}


@pytest.mark.parametrize("make", [SigLipLoss, ClipLoss])
def test_it_answers_as_open_clip_does(make: Any) -> None:
    value = make()(**features())
    assert make()(**features(), output_dict=True) == {"contrastive_loss": value}
    assert value.shape == () and value.dtype == torch.float32


def test_clip_needs_no_bias_and_autocast_may_give_two_dtypes() -> None:
    given = features()
    given["text_features"] = given["text_features"].bfloat16()
    del given["logit_bias"]
    z = dense_losses.batch(8)
    z = z._replace(text=z.text.bfloat16().float(), bias=torch.tensor(0.0))
    assert ClipLoss()(**given).item() == pytest.approx(dense_losses.softmax(z).item(), rel=1e-5)


def test_accumulation_divides_the_gradients_of_scale_and_bias_alone() -> None:
    gradients = []
    for accum_freq in (1, 4):
        given = {name: value.double().requires_grad_() for name, value in features().items()}
        SigLipLoss(accum_freq=accum_freq)(**given).backward()
        gradients.append({name: value.grad for name, value in given.items()})
    for name, gradient in gradients[0].items():
        times = 4 if name.startswith("logit") else 1
        torch.testing.assert_close(gradient, times * gradients[1][name], rtol=1e-12, atol=0)


def _refused() -> list[str]:
    messages = []
    for arguments in ({"world_size": 1}, {"rank": 7}):
        with pytest.raises(UserError) as raised:
            SigLipLoss(**arguments)(**features())
        messages.append(str(raised.value))
    return messages


def test_another_rank_or_world_size_than_the_group_is_refused() -> None:
    for rank, (world, number) in enumerate(run_ranks(_refused, 2)):
        assert "world_size is 1, but the process group says 2" in world
        assert f"rank is 7, but the process group says {rank}" in number


def test_what_cannot_be_is_refused_as_it_is_made() -> None:
    with pytest.raises(UserError, match="dist_impl 'star' is not known"):
        SigLipLoss(dist_impl="star")
    with pytest.raises(UserError, match="horovod"):
        ClipLoss(use_horovod=True)
    with pytest.raises(UserError, match="accum_freq"):
        ClipLoss(accum_freq=0)


@pytest.mark.parametrize("name", ["SigLipLoss", "ClipLoss"])
def test_the_signatures_are_open_clips(name: str) -> None:
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip is not installed: see tests/test_examples.py")
    torchvision_stub.install()
    from open_clip import loss as theirs

    mine = {"SigLipLoss": SigLipLoss, "ClipLoss": ClipLoss}[name]
    for method in ("__init__", "forward"):
        wanted = list(inspect.signature(getattr(getattr(theirs, name), method)).parameters)
        assert list(inspect.signature(getattr(mine, method)).parameters)[: len(wanted)] == wanted
