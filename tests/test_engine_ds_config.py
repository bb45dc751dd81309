"""What a ds_config may say, and the one line that answers anything else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.core.types import UserError
from trainer.engine.ds_config import FOLDER, OWNERS, REFUSED, complete, load, reduces_early


def written(folder: Path, config: Any) -> str:
    path = folder / "mine.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return str(path)


def refusal(folder: Path, config: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(written(folder, config))
    message = str(caught.value)
    assert "mine.json" in message
    assert "\n" not in message
    return message


def nested(dotted: str) -> dict[str, Any]:
    tree: Any = 1
    for key in reversed(dotted.split(".")):
        tree = {key: tree}
    return tree


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_files_that_come_with_ringlip_are_found_by_name(path: Path) -> None:
    assert load(path.stem) == load(str(path)) == json.loads(path.read_text())


@pytest.mark.parametrize(("key", "owner"), OWNERS.items())
def test_what_the_recipe_owns_is_refused_by_name(key: str, owner: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, nested(key))
    assert repr(key) in message
    assert owner in message


@pytest.mark.parametrize(("key", "reason"), REFUSED.items())
def test_what_changes_gradients_is_refused_with_the_reason(key: str, reason: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, nested(key))
    assert repr(key) in message
    assert reason in message


@pytest.mark.parametrize("kind", ["offload_optimizer", "offload_param"])
def test_nvme_is_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, {"zero_optimization": {"stage": 3, kind: {"device": "nvme", "nvme_path": "/tmp"}}})
    assert f"zero_optimization.{kind}.device" in message
    assert "use 'cpu'" in message


def test_misspelt_keys_are_not_ignored(tmp_path: Path) -> None:
    assert "did you mean 'zero_optimization'?" in refusal(tmp_path, {"zero_optimisation": {"stage": 2}})
    assert "did you mean 'overlap_comm'?" in refusal(tmp_path, {"zero_optimization": {"stage": 2, "overlap_com": True}})
    assert "may set device, pin_memory, buffer_count" in refusal(
        tmp_path, {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin": True}}}
    )


@pytest.mark.parametrize("value", ["x", -4, [1]])
def test_values_of_another_kind_are_refused(tmp_path: Path, value: Any) -> None:
    message = refusal(tmp_path, {"zero_optimization": {"stage": 1, "reduce_bucket_size": value}})
    assert f"'zero_optimization.reduce_bucket_size' is {value!r}: it must be a number" in message
    assert "'comms_logger' is 3, but it is a section" in refusal(tmp_path, {"comms_logger": 3})
    assert "'steps_per_print' is 'x': it must be a number" in refusal(tmp_path, {"steps_per_print": "x"})


def test_stages_and_offload_must_fit(tmp_path: Path) -> None:
    assert "must be 0, 1, 2 or 3" in refusal(tmp_path, {"zero_optimization": {"stage": 4}})
    assert "must be 0, 1, 2 or 3" in refusal(tmp_path, {"zero_optimization": True})
    assert "stage >= 3, this file has 2" in refusal(
        tmp_path, {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}
    )
    assert "stage >= 1, this file has 0" in refusal(
        tmp_path, {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}
    )
    assert "must be 'cpu' or 'none'" in refusal(
        tmp_path, {"zero_optimization": {"stage": 3, "offload_param": {"device": "gpu"}}}
    )


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "not readable as JSON" in refusal(tmp_path, "{")
    assert "is a JSON object" in refusal(tmp_path, [1])
    with pytest.raises(UserError, match="did you mean 'zero2_offload'"):
        load("zero2_ofload")
    with pytest.raises(UserError, match="there are zero0, "):
        load("nothing_like_it")
    with pytest.raises(UserError, match=r"no .*absent\.json"):
        load(str(tmp_path / "absent.json"))


def test_clipping_is_always_written_because_deepspeed_clips_unless_told() -> None:
    assert complete(load("zero2"), 0.0)["gradient_clipping"] == 0.0
    assert complete({}, 2.5)["gradient_clipping"] == 2.5
    assert complete({}, 0.0)["zero_optimization"] == {"stage": 0}


def test_buckets_are_small_unless_a_ds_config_says_otherwise() -> None:
    """DeepSpeed allocates 2 GB for each of its buckets by default, whatever the model."""
    mine = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 7}}
    assert complete(mine, 0.0)["zero_optimization"] == {
        "stage": 2,
        "reduce_bucket_size": 7,
        "allgather_bucket_size": 20_000_000,
    }
    assert mine == {"zero_optimization": {"stage": 2, "reduce_bucket_size": 7}}


def test_settings_come_without_deepspeed() -> None:
    """Importing DeepSpeed takes seconds: `--help`, plan and report must not pay them."""
    code = "import sys, trainer.engine, trainer.step, trainer.optim; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=FOLDER.parent, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("name", "megabytes", "ranks", "early"),
    [
        ("zero1", 1000, 8, False),
        ("zero2", 1000, 1, False),  # the shard is everything
        ("zero2", 1000, 8, False),  # would send them once a micro-batch
        ("zero2_offload", 1000, 1, True),
        ("zero2_offload", 100, 1, False),  # the buckets are larger
        ("zero2_offload", 1000, 2, False),
        ("zero3", 1000, 1, True),
        ("zero3", 1000, 8, True),
        ("zero3", 50, 8, True),  # all of it fills one bucket, which is there already
        ("zero3", 120, 8, False),
        ("zero3_offload_params", 1000, 1, True),
    ],
)
def test_where_gradients_are_reduced_early(name: str, megabytes: int, ranks: int, early: bool) -> None:
    assert reduces_early(load(name)["zero_optimization"], megabytes * 1e6, ranks) is early
