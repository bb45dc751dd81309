"""Evaluation between training steps under DeepSpeed: right numbers at ZeRO-3, and no trace left in the training."""

from __future__ import annotations

import io
from pathlib import Path

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from tests.support.forked_ranks import run_ranks
from tests.support.tiny_models import IMAGE_SIZE, tiny_batch, tiny_captions, tiny_model
from tests.test_evals import write_tar
from trainer.data.settings import DataSettings
from trainer.engine import EngineSettings, build_engine
from trainer.evals import EvalSettings, ZeroShotSettings, run
from trainer.losses import SigmoidLoss
from trainer.step import train_step

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven random images with captions."""
    pixels = torch.randint(
        256, (11, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5)
    )
    samples = []
    for picture, caption in zip(pixels, tiny_captions(11, seed=3), strict=True):
        data = io.BytesIO()
        Image.fromarray(picture.numpy()).save(data, "PNG")
        samples.append(
            {"png": data.getvalue(), "txt": caption.encode(), "json": b'{"kind": "%s"}' % caption.split()[0].encode()}
        )
    return write_tar(tmp_path_factory.mktemp("pairs") / "a.tar", samples)


def train(shard: Path, config: Path, interrupted: bool) -> tuple[list[float], dict[str, float]]:
    """Losses of three steps with dropout, and the metrics after the second."""
    model = tiny_model("siglip", dropout=0.2)
    engine = build_engine(
        model, torch.optim.SGD(model.parameters(), lr=0.1), EngineSettings(ds_config=str(config), precision="fp32")
    )
    settings = EvalSettings(data=[str(shard)], batch_size=3, zeroshot=[ZeroShotSettings(label="kind")])
    data = DataSettings(cache_dir=str(shard.parent / "cache"))
    losses, metrics = [], {}
    torch.manual_seed(7 + dist.get_rank())
    for step in range(3):
        if step == 2 and interrupted:
            metrics = run(engine, settings, model.preprocess, dist.get_rank(), dist.get_world_size(), data)
        batch = tiny_batch(8, seed=step).split(4)[dist.get_rank()]
        losses.append(train_step(engine, batch, SigmoidLoss(), micro_batch=2).loss)
    return losses, metrics


def on_ranks(shard: Path, config: Path, interrupted: bool) -> tuple[list[float], dict[str, float]]:
    results = run_ranks(train, 2, shard, config, interrupted)
    assert results[0] == results[1]
    return results[0]


def test_evaluation_leaves_training_alone_and_agrees_between_stages(shard: Path, tmp_path: Path) -> None:
    found = {}
    for stage in (0, 3):
        config = tmp_path / f"zero{stage}.json"
        persist = ', "stage3_param_persistence_threshold": 0' if stage == 3 else ""
        config.write_text(f'{{"zero_optimization": {{"stage": {stage}{persist}}}}}')
        losses, found[stage] = on_ranks(shard, config, interrupted=True)
    assert (
        losses == on_ranks(shard, config, interrupted=False)[0]
    )  # at ZeRO-3, where evaluation fetches the parameters too
    assert found[0] == pytest.approx(found[3], abs=1e-12)
    assert 0 < found[0]["image_to_text_r10"] < 1
    assert "kind_top1" in found[0]
