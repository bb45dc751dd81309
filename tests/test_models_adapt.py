"""Locking, patch dropping and learning rates per layer: what trains, what each costs, and that replaying the random
state repeats it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.tiny_models import IMAGE_SIZE, KINDS, tiny_batch, tiny_model
from trainer.core.types import UserError
from trainer.models import DualEncoder
from trainer.models.adapt.lock import LockSettings
from trainer.models.adapt.mask import MaskSettings, TokenDrop
from trainer.models.adapt.recompute import RecomputeSettings
from trainer.models.param_groups import RateSettings


def backward(model: DualEncoder, rows: int = 4) -> dict[str, torch.Tensor]:
    batch = tiny_batch(rows)
    z = model(*batch[:3])
    ((z.scale * z.image @ z.text.T + z.bias) ** 2).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_a_locked_tower_has_no_graph_and_no_gradient(kind: str) -> None:
    model = tiny_model(kind, lock=LockSettings(image=True), dropout=0.5).train()
    assert (model.trains("image"), model.trains("text")) == (False, True)
    assert not model(pixels=tiny_batch(2).pixels).image.requires_grad
    assert not model.towers.get_submodule("vision_model").training
    assert model.towers.get_submodule("text_model").training
    names = set(backward(model))
    assert not any("vision_model" in name or "visual_projection" in name for name in names)
    assert any("text_model.embeddings" in name for name in names)
    assert "head.logit_scale" in names


def test_the_last_layers_of_a_locked_tower_train() -> None:
    model = tiny_model("siglip", layers=3, lock=LockSettings(text=True, text_layers=1, scale=True))
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad and "vision" not in name}
    assert {name.split(".encoder.layers.")[1][0] for name in names if ".layers." in name} == {"2"}
    assert {name for name in names if ".layers." not in name} == {
        "towers.text_model.final_layer_norm.weight",
        "towers.text_model.final_layer_norm.bias",
        "towers.text_model.head.weight",
        "towers.text_model.head.bias",
    }
    with pytest.raises(UserError, match="the text tower has 3 layers"):
        tiny_model("siglip", layers=3, lock=LockSettings(text=True, text_layers=4))


@pytest.mark.parametrize(("kind", "special"), [("siglip", 0), ("clip", 1)])
def test_flip_keeps_that_many_patches_and_evaluation_sees_all(kind: str, special: int) -> None:
    model = tiny_model(kind, mask=MaskSettings(drop=0.5, unmasked=0.25))
    patches, lengths = (IMAGE_SIZE // 8) ** 2, []
    encoder = model.towers.get_submodule("vision_model.encoder")
    encoder.register_forward_hook(
        lambda module, args, kwargs, out: lengths.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    pixels = tiny_batch(3).pixels
    model.train()
    model(pixels=pixels)
    model.progress(74, 100)
    model(pixels=pixels)
    model.progress(75, 100)
    model(pixels=pixels)
    model.progress(0, 100)
    model.eval()
    model(pixels=pixels)
    assert lengths == [special + patches // 2] * 2 + [special + patches] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_flip_repeats_itself_under_the_same_random_state(kind: str) -> None:
    model = tiny_model(kind, mask=MaskSettings(drop=0.5), dropout=0.3).train()
    batch = tiny_batch(6)
    state = torch.get_rng_state()
    with torch.no_grad():
        first = model(*batch[:3])
    other = model(*batch[:3])
    torch.set_rng_state(state)
    replayed = model(*batch[:3])
    assert torch.equal(first.image, replayed.image)
    assert torch.equal(first.text, replayed.text)
    assert not torch.equal(first.image, other.image)


def test_dropping_keeps_positions_and_order() -> None:
    model = tiny_model("clip", mask=MaskSettings(drop=0.5)).train()
    hook, embeddings = model.patch_drop, model.towers.get_submodule("vision_model.embeddings")
    assert hook is not None
    hidden = torch.arange(5.0).reshape(1, 5, 1).expand(64, 5, 3)
    kept = hook(embeddings, (), hidden)[:, :, 0]
    assert kept[:, 0].tolist() == [0.0] * 64
    assert (kept.diff(dim=1) > 0).all()
    assert set(kept[:, 1:].flatten().tolist()) == {1.0, 2.0, 3.0, 4.0}
    assert kept.shape == (64, 3)


@pytest.mark.parametrize("kept", ["first", "random", "block"])
def test_captions_are_shortened_to_real_tokens_in_order(kept: Any) -> None:
    drop = TokenDrop(MaskSettings(tokens=4, tokens_kept=kept))
    lengths = torch.tensor([1, 2, 3, 4, 5, 8, 8, 8] * 8)
    places = torch.arange(8).expand(64, 8)
    mask = places < lengths[:, None]
    tokens, short = drop((10 + places) * mask, mask)
    assert tokens.shape == short.shape == (64, 4)
    seen = set()
    for row, length, real in zip(tokens.tolist(), lengths.tolist(), short.tolist(), strict=True):
        words = [token for token, is_real in zip(row, real, strict=True) if is_real]
        assert len(words) == min(4, length)
        assert row == words + [0] * (4 - len(words))
        assert (words[0], words[-1]) == (10, 9 + length)
        assert words == sorted(set(words))
        if length == 8:
            seen.add(tuple(words[1:-1]))
        if kept == "block" and length == 8:
            assert words[2] == words[1] + 1
    assert seen == {(11, 12)} if kept == "first" else len(seen) >= 4


@pytest.mark.parametrize("kind", KINDS)
def test_short_captions_repeat_themselves_and_end_with_the_run(kind: str) -> None:
    model = tiny_model(kind, mask=MaskSettings(tokens=3, tokens_kept="random", unmasked=0.25)).train()
    batch, whole = tiny_batch(6), tiny_model(kind).train()
    state = torch.get_rng_state()
    first, other = (model(tokens=batch.tokens, token_mask=batch.token_mask).text for _ in range(2))
    torch.set_rng_state(state)
    assert torch.equal(model(tokens=batch.tokens, token_mask=batch.token_mask).text, first)
    assert not torch.equal(first, other)
    expected = whole(tokens=batch.tokens, token_mask=batch.token_mask).text
    assert not torch.equal(first, expected)
    model.progress(75, 100)
    torch.testing.assert_close(model(tokens=batch.tokens, token_mask=batch.token_mask).text, expected)
    model.progress(0, 100)
    torch.testing.assert_close(model.eval()(tokens=batch.tokens, token_mask=batch.token_mask).text, expected)
    with pytest.raises(UserError, match="captions have 8 tokens"):
        tiny_model(kind, mask=MaskSettings(tokens=8))


def test_rates_per_tower_and_layer() -> None:
    model = tiny_model("clip", layers=2, rates=RateSettings(image=0.1, text=1.0, layer_decay=0.5))
    groups = model.parameter_groups()
    rates = {name: group.rate for group in groups for name in group.names}
    decays = {name: group.decay for group in groups for name in group.names}
    assert set(rates) == {name for name, _ in model.named_parameters()}
    assert sum(len(group.names) for group in groups) == len(rates)
    assert rates["head.logit_scale"] == 1.0
    assert rates["towers.visual_projection.weight"] == pytest.approx(0.1)
    assert rates["towers.vision_model.encoder.layers.1.mlp.fc1.weight"] == pytest.approx(0.05)
    assert rates["towers.vision_model.encoder.layers.0.mlp.fc1.weight"] == pytest.approx(0.025)
    assert rates["towers.vision_model.pre_layrnorm.weight"] == pytest.approx(0.0125)
    assert rates["towers.text_model.embeddings.token_embedding.weight"] == pytest.approx(0.125)
    assert rates["towers.text_model.final_layer_norm.bias"] == 1.0
    assert decays["towers.text_projection.weight"]
    assert not decays["towers.text_model.final_layer_norm.bias"]
    assert not decays["head.logit_scale"]
    assert len(tiny_model("siglip").parameter_groups()) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_recomputation_changes_no_gradient(kind: str) -> None:
    settings = RecomputeSettings(image="all", text=2)
    plain, again = tiny_model(kind, dropout=0.3).train(), tiny_model(kind, dropout=0.3, recompute=settings).train()
    torch.manual_seed(1)
    expected = backward(plain)
    torch.manual_seed(1)
    found = backward(again)
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=0, rtol=0)
