"""The planner: its forecast against real memory, its choice, and what it says to people."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.benchmarks import allocator
from tests.benchmarks.plan import Setting, measured, predicted
from tests.benchmarks.trainable import forecast_cost, measured_cost
from tests.support.forked_ranks import run_ranks
from tests.support.shards import picture
from tests.support.tiny_models import tiny_pretrained, tiny_settings, tiny_tokenizer
from trainer.config import Recipe
from trainer.core.types import UserError
from trainer.data.transforms import fit
from trainer.engine.precision import DTYPES
from trainer.losses import SigmoidSettings
from trainer.models import DualEncoder, ModelSettings, build
from trainer.models.adapt.lora import LoraSettings
from trainer.optim import AdafactorSettings, AdamWSettings, MuonSettings, OptimSettings
from trainer.plan import command
from trainer.plan.auto import largest_micro_batch
from trainer.plan.bar_chart import bars
from trainer.plan.memory import PARTS, Job, forecast, loss_bytes
from trainer.plan.model_shapes import KNOWN, lookup, stand_in
from trainer.plan.profile import Survey, look
from trainer.plan.roofline import CARDS, step_seconds
from trainer.plan.search import choose, ds_configs, largest, usable_bytes, zero_section

GIB = 1 << 30


@pytest.fixture(scope="module")
def survey() -> Survey:
    return look(tiny_settings(), "fp32", "cuda")


@pytest.fixture
def small_buckets(tmp_path: Path) -> str:
    """A ds_config whose buckets do not hide what a tiny model takes."""
    path = tmp_path / "small.json"
    zero = {
        "stage": 3,
        "reduce_bucket_size": 20_000,
        "stage3_prefetch_bucket_size": 20_000,
        "stage3_param_persistence_threshold": 0,
    }
    path.write_text(json.dumps({"zero_optimization": zero}))
    return str(path)


def within_ten_percent(setting: Setting) -> None:
    peak, _ = predicted(setting)
    guess, truth = peak.total + peak.host, measured(setting)
    assert abs(guess / truth - 1) <= 0.1, (guess, truth, peak)


@pytest.mark.parametrize(("precision", "base"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_a_base_held_in_16_bits_takes_half_and_needs_them(precision: str, base: Any, tmp_path: Path) -> None:
    tiny_pretrained("siglip", tmp_path)
    whole = ModelSettings(path=str(tmp_path), lora=LoraSettings(rank=2))
    held = whole.model_copy(update={"lora": LoraSettings(rank=2, base=base)})
    before, after = (look(settings, precision, "cuda") for settings in (whole, held))
    halved = sum(parameter.numel() for parameter in build(held).parameters() if parameter.dtype == DTYPES[precision])
    assert before.parameters - after.parameters == 2 * halved > 0
    assert (before.count, before.trainable, before.largest) == (after.count, after.trainable, after.largest)
    with pytest.raises(UserError, match=f"{base} is for cards that compute in it, .* in fp32: leave it out"):
        look(held, "fp32", "cuda")
    other = "fp16" if precision == "bf16" else "bf16"
    with pytest.raises(UserError, match=f"computes in {other}: take b?float16, or leave it out"):
        look(held, other, "cuda")


def saved_bytes(model: DualEncoder, pixels: torch.Tensor) -> int:
    """What a forward pass leaves alive."""
    allocator.install()
    tokens = torch.zeros(len(pixels), model.preprocess.num_tokens, dtype=torch.int64)
    before = allocator.live_bytes()
    z = model.train()(pixels, tokens)
    assert z.image.requires_grad
    return allocator.live_bytes() - before


@pytest.mark.skipif(shutil.which("c++") is None, reason="the counting allocator is compiled")
class TestForecastAgainstTheAllocator:
    tiny = Setting("tiny", width=64, layers=4, side=32, tokens=8, rows=16, micro_batch=8)

    def test_two_passes(self, small_buckets: str) -> None:
        tiny_tokenizer()
        path = Path(small_buckets)
        path.write_text(path.read_text().replace('"stage": 3', '"stage": 1'))
        within_ten_percent(dataclasses.replace(self.tiny, ds_config=small_buckets))

    def test_fp16_with_the_copy_that_unscaling_makes_of_the_largest_gradient(self) -> None:
        tiny_tokenizer()
        setting = dataclasses.replace(self.tiny, ds_config="zero0", precision="fp16", vocabulary=20000)
        peak, survey = predicted(setting)
        guess, truth = peak.total + peak.host, measured(setting)
        assert guess == pytest.approx(truth, rel=0.02)
        assert peak.phase == "pass 2" and truth > survey.parameters + 3 * survey.trainable + survey.largest

    def test_a_locked_image_tower_once_the_optimizer_has_its_moments(self) -> None:
        """The first step, whose moments do not exist yet, takes less: SigLIP-B/16 1.99 GiB of 2.29."""
        tiny_tokenizer()
        setting = dataclasses.replace(self.tiny, ds_config="zero0", model={"lock": {"image": True}})
        peak, survey = predicted(setting)
        guess, truth = peak.total + peak.host, measured(setting)
        assert guess == pytest.approx(truth, rel=0.02)
        assert peak.phase == "pass 2" and truth > survey.parameters + 3 * survey.trainable

    @pytest.mark.parametrize("optim", [AdamWSettings(moments="int8"), AdafactorSettings(), MuonSettings()])
    def test_the_moments_of_other_optimizers(self, optim: OptimSettings) -> None:
        tiny_tokenizer()
        setting = dataclasses.replace(self.tiny, ds_config="zero0", optim=optim)
        peak, _ = predicted(setting)
        assert peak.total == pytest.approx(measured(setting), rel=0.02)

    def test_what_an_adapter_saves(self) -> None:
        tiny_tokenizer()
        for model in ({}, {"lora": {"rank": 2, "targets": ["q_proj", "v_proj"]}}):
            setting = dataclasses.replace(self.tiny, ds_config="zero0", model=model)
            guess, truth = forecast_cost(setting), measured_cost(setting)
            assert (guess.trainable, guess.optimizer) == (truth.trainable, truth.optimizer)
            assert guess.activations == pytest.approx(truth.activations, rel=0.05)

    def test_naflex_with_full_budgets(self, tmp_path: Path) -> None:
        model = tiny_pretrained("siglip2 naflex", tmp_path)
        guess = look(ModelSettings(path=str(tmp_path)), "fp32", "cpu").training
        [truth] = run_ranks(
            saved_bytes,
            1,
            model,
            torch.stack([fit(np.asarray(picture(row, (16, 16))), model.preprocess) for row in range(8)]),
        )
        assert guess.saved(8) == pytest.approx(truth, rel=0.1)

    def test_sharded_on_two_ranks_with_recomputation(self, small_buckets: str) -> None:
        tiny_tokenizer()
        recompute = {"recompute": {"image": "all", "text": "all"}}
        within_ten_percent(dataclasses.replace(self.tiny, ranks=2, ds_config=small_buckets, model=recompute))


def test_known_models_have_their_published_sizes() -> None:
    published = {  # parameters, from the models' safetensors headers
        "google/siglip-base-patch16-224": 203_155_970,
        "google/siglip-so400m-patch14-384": 877_960_498,
        "openai/clip-vit-base-patch32": 151_277_313,
        "openai/clip-vit-large-patch14-336": 427_944_193,
    }
    import torch

    from trainer.models import ModelSettings, build

    assert lookup("Google/SigLIP-so400m-patch14-384") is KNOWN["google/siglip-so400m-patch14-384"]
    for name, size in published.items():
        with stand_in(ModelSettings(path=name), KNOWN[name]) as settings, torch.device("meta"):
            assert sum(p.numel() for p in build(settings, weights=False).parameters()) == size


@pytest.mark.parametrize("name", sorted(ds_configs()))
def test_every_ds_config_has_a_forecast_that_grows_with_the_micro_batch(survey: Survey, name: str) -> None:
    zero = zero_section(name)
    totals = [forecast(survey, zero, Job(4, 4096, rows)).total for rows in (1, 64, 512, 2048)]
    assert totals == sorted(totals) and totals[-1] > totals[0]
    assert set(forecast(survey, zero, Job(4, 64, 8)).parts) == set(PARTS)


def test_sharding_and_offload_take_less_of_the_device(survey: Survey) -> None:
    size: dict[str, Any] = {"parameters": 4 * 10**10, "trainable": 4 * 10**10, "largest": 10**8}
    big = dataclasses.replace(survey, **size, shapes={((10**5, 10**5), True): 1})

    def total(name: str, ranks: int = 8) -> float:
        return forecast(big, zero_section(name), Job(ranks, 64, 8)).total

    assert total("zero0") > total("zero1") > total("zero3")
    assert total("zero2") > total("zero2_offload") and total("zero3") > total("zero3_offload") > total(
        "zero3_offload_params"
    )
    assert total("zero1", 2) > total("zero1", 16)


def test_the_largest_micro_batch_fits_and_one_more_does_not(survey: Survey) -> None:
    zero, job = zero_section("zero1"), Job(2, 4096, 1)
    budget = 150e6
    rows, peak = largest(survey, zero, job, budget)
    assert 1 < rows < 4096 and peak.total <= budget
    passes = -(-4096 // rows)
    one_less = -(-4096 // (passes - 1))  # the next larger even micro-batch
    assert forecast(survey, zero, dataclasses.replace(job, micro_batch=one_less)).total > budget
    assert largest(survey, zero, job, 1e12)[0] == 4096
    assert largest(survey, zero, job, 1e5)[0] == 0


def test_loss_memory_does_not_grow_with_ranks_on_the_ring_and_does_in_a_gather() -> None:
    def size(ranks: int, exchange: str) -> float:
        return loss_bytes(768, Job(ranks, 4096, 64, loss=SigmoidSettings(exchange=exchange)), "cuda")  # type: ignore[arg-type]

    assert size(8, "ring") == size(64, "ring")
    assert size(64, "gather") > 4 * size(8, "gather")


def test_time_falls_with_faster_cards_and_rises_with_slower_links(survey: Survey) -> None:
    zero, job = zero_section("zero2"), Job(8, 256, 64)

    def seconds(card: str, link: float) -> float:
        return sum(step_seconds(survey, zero, job, CARDS[card], "bf16", link).values())

    assert seconds("h100", 1e11) < seconds("rtx3090", 1e11) < seconds("rtx3090", 1e9)
    single = step_seconds(survey, zero, Job(1, 256, 256), CARDS["a100"], "bf16", 1e9)
    assert single["pass 1"] == 0 and single["links"] == 0


def test_cards_without_bf16_units_take_fp16_at_the_rate_of_their_tensor_cores(survey: Survey) -> None:
    chosen = {name: card.precision("auto") for name, card in CARDS.items()}
    assert [name for name in chosen if chosen[name] == "fp16"] == ["gtx1660ti", "rtx2080ti", "titanrtx", "t4", "v100"]
    assert set(chosen.values()) == {"bf16", "fp16"}
    assert all(card.precision("fp32") == "fp32" for card in CARDS.values())
    v100, a100 = CARDS["v100"], CARDS["a100"]
    assert v100.attained("fp16") == pytest.approx(75e12) and v100.attained("bf16") == v100.attained("fp32")
    assert a100.attained("fp16") == a100.attained("bf16") > a100.attained("fp32")
    assert CARDS["gtx1660ti"].attained("fp16") == CARDS["gtx1660ti"].attained("fp32")
    half, zero = look(tiny_settings(), "fp16", "cuda"), zero_section("zero0")
    assert half.training.saved(64) < 0.8 * survey.training.saved(64)

    def seconds(survey: Survey, precision: str, loss: SigmoidSettings | None = None) -> dict[str, float]:
        card = dataclasses.replace(v100, memory=1e20)  # what arithmetic takes
        return step_seconds(survey, zero, Job(1, 4096, 64, loss=loss), card, precision, 1e9)

    slow, fast = seconds(survey, "fp32"), seconds(half, "fp16", SigmoidSettings(precision="fast"))
    assert slow["pass 2"] / fast["pass 2"] == pytest.approx(125 / 15.7)
    assert slow["loss"] / fast["loss"] == pytest.approx(125 / 15.7)


def test_modules_kept_in_float32_are_slower_and_larger() -> None:
    settings = tiny_settings(layers=5)
    half, mixed = (look(settings, "fp16", "cpu", float32_modules=kept) for kept in ((), (r"layers\.0\.mlp",)))
    every, in_float32 = mixed.training.flops.at(8).sum(), mixed.training.flops32.at(8).sum()
    assert every == half.training.flops.at(8).sum()
    assert half.training.flops32.at(8).sum() == 0 < in_float32 < every / 5
    assert half.training.saved(8) < mixed.training.saved(8)
    assert mixed.training.seconds(8, 1e12, 1e11, 1e20) == pytest.approx((every + 9 * in_float32) / 1e12)


def recipe(tmp_path: Path, size: int = 4096) -> Path:
    path = tmp_path / "recipe.yaml"
    model = tiny_settings().model_dump(mode="json", include={"config", "tokenizer"})
    path.write_text(
        json.dumps({"run": {"samples": 10**6}, "model": model, "data": {"train": "shards"}, "batch": {"size": size}})
    )
    return path


def test_the_verb_prints_a_line_to_paste_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "plan.svg"
    code = command.main(
        [
            str(recipe(tmp_path)),
            "--gpu-memory",
            "16GiB",
            "--gpus",
            "8",
            "--nodes",
            "2",
            "--link",
            "25Gbit",
            "--out",
            str(out),
        ]
    )
    text = capsys.readouterr().out
    assert code == 0
    line = text.split("chosen:\n")[1].splitlines()[0]
    assert (
        "--module trainer.train" in line
        and "engine.ds_config=" in line
        and "batch.micro_batch=" in line
        and "--num_nodes 2" in line
    )
    assert text.count("zero3_offload_params") == 6  # three recomputations, with and without LoRA
    assert out.read_text().startswith("<svg") and "GiB to use" in out.read_text()


def test_it_says_when_nothing_fits_and_what_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], survey: Survey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "look", lambda *_, **__: survey)
    code = command.main([str(recipe(tmp_path)), "--gpu-memory", "100.2MiB", "--reserve", "100MiB", "--gpus", "2"])
    text = capsys.readouterr().out
    assert code == 1 and "NOTHING FITS" in text and "what would:" in text and "chosen" not in text


def test_auto_asks_for_the_recipe_as_it_is(tmp_path: Path) -> None:
    from trainer import config

    parsed: Recipe = config.load(recipe(tmp_path, size=65536), ["engine.ds_config=zero1", "engine.precision=fp32"])
    rows = largest_micro_batch(parsed, 4 * GIB, 2)
    assert 1 < rows <= 32768
    assert 1 < largest_micro_batch(parsed, 1.5 * GIB, 2) < rows
    assert largest_micro_batch(parsed, 0.5 * GIB, 2) == 1


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    path = str(recipe(tmp_path))
    with pytest.raises(UserError, match="write 16GiB"):
        command.main([path, "--gpu-memory", "lots"])
    with pytest.raises(UserError, match="does not divide by 3 ranks; the nearest that do are 4095 or 4098"):
        command.main([path, "--gpu-memory", "16GiB", "--gpus", "3"])
    with pytest.raises(UserError, match="do not divide among --nodes 3"):
        command.main([path, "--gpu-memory", "16GiB", "--gpus", "4", "--nodes", "3"])
    for options, message in (
        (["--out", str(tmp_path)], "is a directory: name a file in it"),
        (["--out", path + "/plan.svg"], "its folder cannot be created"),
        (["--tflops", "0"], "rates above 0"),
        (["--tflops", "-3"], "rates above 0"),
        (["--link", "0Gbit"], "rates above 0"),
        (["--reserve", "16GiB"], "--reserve 16GiB leaves nothing of --gpu-memory 16GiB"),
        (["--gpu-memory", "0GiB"], "leaves nothing of --gpu-memory 0GiB"),
        (["--gpu-memory", "1.2.3GiB"], "write 16GiB"),
        (["--global-batch", "0"], "'batch.size'"),
    ):
        with pytest.raises(UserError, match=message) as error:
            command.main([path, "--gpu-memory", "16GiB", *options])
        assert "\n" not in str(error.value)


def test_bars_are_cut_where_they_would_leave_the_picture() -> None:
    picture = bars(
        [("huge", {"parameters": 100.0 * GIB}, "does not fit"), ("small", {"activations": 1.0 * GIB}, "")],
        10.0 * GIB,
        "<t>",
    )
    assert "&lt;t&gt;" in picture and 'width="620.0"' in picture and usable_bytes(2 * GIB) == 0.95 * GIB
    assert choose([]) is None
