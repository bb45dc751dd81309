"""``import ringlip``: what it names, and the examples that train, read and plan, run as they are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ringlip
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

from tests.examples import dataset as dataset_example
from tests.examples import plan as plan_example
from tests.examples import train as train_example
from tests.examples.tiny import TwoTowers
from tests.support.forked_ranks import run_ranks
from tests.support.runs import curve, make_shards
from tests.support.tiny_models import tiny_captions, tiny_config, tiny_model, tiny_settings, tiny_tokenizer
from trainer.core.types import UserError
from trainer.plan.module import survey_module
from trainer.plan.profile import look


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("pairs"), tiny_captions(80))


def test_importing_it_loads_neither_torch_nor_the_trainer() -> None:
    code = "import sys, ringlip; print(sorted({'torch', 'deepspeed', 'transformers', 'pydantic'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_name_is_there_and_documented() -> None:
    for name in ringlip.__all__:
        value = getattr(ringlip, name)
        assert name == "__version__" or value.__doc__, name
    assert set(dir(ringlip)) >= set(ringlip.__all__)
    with pytest.raises(AttributeError, match="no attribute 'SigLIPLoss'"):
        ringlip.SigLIPLoss  # noqa: B018


def _train(shards: Path, directory: Path) -> Any:
    return train_example.main(str(shards), str(directory), config=tiny_config(), tokenizer=tiny_tokenizer())


def test_train_answers_on_every_rank_and_goes_on(shards: Path, tmp_path: Path) -> None:
    first, second = run_ranks(_train, 2, shards, tmp_path / "run")
    assert first == second
    assert (first.exit_reason, first.samples_seen, first.directory) == ("finished", 48, tmp_path / "run")
    assert first.metrics["loss"] == curve(tmp_path / "run")[-1][1]
    again = run_ranks(_train, 1, shards, tmp_path / "run")[0]
    assert again == first


def _train_in_a_group(shards: Path, directory: Path) -> tuple[Any, float]:
    found = _train(shards, directory)
    total = torch.ones(())
    dist.all_reduce(total)  # the caller's group still works
    return found.exit_reason, float(total)


def test_train_leaves_the_process_group_of_its_caller(shards: Path, tmp_path: Path) -> None:
    assert run_ranks(_train_in_a_group, 2, shards, tmp_path / "run") == [("finished", 2.0)] * 2


def test_a_mistake_in_a_recipe_is_one_line() -> None:
    with pytest.raises(UserError, match=r"recipe: unknown key 'optim.lrr'"):
        ringlip.train({"run": {"samples": 1}, "model": {}, "data": {}, "batch": {"size": 1}}, {"optim": {"lrr": 1}})


def _read(shards: Path) -> list[list[int]]:
    return dataset_example.main(str(shards), tiny_model().preprocess)


def test_a_dataset_reads_the_same_global_batches_on_any_ranks_and_resumes(shards: Path) -> None:
    alone, both = run_ranks(_read, 1, shards)[0], run_ranks(_read, 2, shards)
    assert len(alone) == 3
    assert [a + b for a, b in zip(*both, strict=True)] == alone
    straight = ringlip.dataset(shards, tiny_model().preprocess, 16, samples=48, workers=0)
    assert [batch.ids.tolist() for batch in straight] == alone


def test_a_dataset_refuses_workers_of_a_data_loader(shards: Path) -> None:
    pairs = ringlip.dataset(shards, tiny_model().preprocess, 16, samples=16, workers=0)
    with pytest.raises(UserError, match="num_workers=0"):
        next(iter(DataLoader(pairs, batch_size=None, num_workers=1)))


def test_a_dataset_names_unknown_keys(shards: Path) -> None:
    with pytest.raises(UserError, match=r"ringlip.dataset: unknown key 'worker'; did you mean 'workers'"):
        ringlip.dataset(shards, tiny_model().preprocess, 16, worker=1)


def test_preprocess_is_read_from_a_directory(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    found = ringlip.preprocess(str(tmp_path))
    assert (found.image_size, found.num_tokens) == (model.preprocess.image_size, model.preprocess.num_tokens)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_module_is_surveyed_as_the_planner_surveys_the_same_model(precision: str) -> None:
    settings = tiny_settings(layers=3)
    known = look(settings, precision, "cuda")
    model = tiny_model(layers=3)
    pixels, tokens = torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 8, dtype=torch.int64)
    mine = survey_module(model, (pixels, tokens), precision)
    assert (mine.count, mine.trainable, mine.embed_dim) == (known.count, known.trainable, known.embed_dim)
    for rows in (2, 64):
        assert mine.training.peak(rows) == pytest.approx(known.training.peak(rows), rel=0.01)
        assert mine.inference.peak(rows) == pytest.approx(known.inference.peak(rows), rel=0.01)


def test_the_plan_example(capsys: pytest.CaptureFixture[str]) -> None:
    lines = plan_example.main()
    assert len(lines) >= 5 and all("GiB, fits: True" in line for line in lines)


def test_a_plan_of_a_recipe() -> None:
    model = {"config": tiny_config(), "tokenizer": tiny_tokenizer()}
    recipe = {"run": {"samples": 64}, "model": model, "data": {}, "batch": {"size": 32}}
    plan = ringlip.plan(recipe, "16GiB", gpus=2, batch_size=64)
    assert plan.job.local_batch == 32
    assert plan.chosen is not None and plan.chosen.peak.total <= plan.budget


class Looks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.layer(images) * (2 if images.sum().item() > 0 else 1),)


def test_what_cannot_be_planned_is_said() -> None:
    images, texts = torch.zeros(1, 3, 8, 8), torch.zeros(1, 6, dtype=torch.int64)
    with pytest.raises(UserError, match="needs batch_size"):
        ringlip.plan(TwoTowers(), "16GiB", inputs=(images, texts))
    with pytest.raises(UserError, match="inputs="):
        ringlip.plan(TwoTowers(), "16GiB", batch_size=8)
    with pytest.raises(UserError, match="depends on the values"):
        ringlip.plan(Looks(), "16GiB", inputs=(torch.zeros(1, 3),), batch_size=8)
    with pytest.raises(UserError, match="locked"):
        ringlip.plan(TwoTowers().requires_grad_(False), "16GiB", inputs=(images, texts), batch_size=8)
