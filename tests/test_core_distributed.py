"""What GPUs and NCCL would do, shown without either: one GPU a rank, timeouts of all groups, and how a rank ends."""

from __future__ import annotations

import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import yaml
from torch.distributed import distributed_c10d

from data_tools.io.errors import run_command
from tests.support.dense_step import Case
from tests.support.forked_ranks import run_ranks
from tests.support.runs import call, make_shards
from tests.support.tiny_models import tiny_captions, tiny_config, tiny_tokenizer
from trainer import train
from trainer.core import distributed
from trainer.core.types import RunFailed, UserError


def set_device_calls(stage: int) -> tuple[list[str], int, str]:
    """Where DeepSpeed would compute on a rank that sees its own GPU alone; and this rank's number on its node, before
    and after."""
    from deepspeed.accelerator import get_accelerator

    os.environ["LOCAL_RANK"] = "3"
    calls: list[str] = []
    case = Case(stage=stage)
    model = case.model()
    with (
        patch.object(torch.cuda, "device_count", lambda: 1),
        patch.object(type(get_accelerator()), "set_device", lambda _, device: calls.append(str(device))),
    ):
        distributed.tell_deepspeed_the_gpu()
        case.engine(model=model)
    return calls, distributed.local_rank(), os.environ["LOCAL_RANK"]


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_takes_the_only_gpu_that_a_rank_sees(stage: int) -> None:
    [(calls, local_rank, environment)] = run_ranks(set_device_calls, 1, stage)
    assert {call.removeprefix("cuda:") for call in calls} - {"cpu"} == {"0"}
    assert local_rank == 3  # "one line a node" still means one
    assert environment == "0"  # at ZeRO-3 DeepSpeed reads it again later


def test_a_rank_without_a_gpu_of_its_own_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.gpu_index() == 1
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="LOCAL_RANK is 2, but this rank sees 2 GPUs: start at most 2 ranks"):
        distributed.gpu_index()


@pytest.mark.parametrize(("gpus", "shared"), [("abcd", ""), ("abca", "ranks 0 and 3"), ("aabb", "share one GPU (")])
def test_ranks_that_share_a_gpu_all_end_with_one_line(gpus: str, shared: str) -> None:
    store = dist.HashStore()

    def ends(rank: int) -> UserError | None:
        try:
            distributed.check_one_gpu_each(store, rank, len(gpus), gpus[rank])
        except UserError as error:
            return error
        return None

    with ThreadPoolExecutor(len(gpus)) as pool:
        errors = [error for error in pool.map(ends, range(len(gpus))) if error is not None]
    assert len(errors) == (len(gpus) if shared else 0)
    assert sum(not error.told for error in errors) == bool(shared)
    for error in errors:
        assert "share one GPU" in str(error) and "CUDA_VISIBLE_DEVICES" in str(error)
    if gpus == "abca":
        assert {str(error).split(" share")[0] for error in errors} <= {"ranks 0 and 3", "ranks 3 and 0"}


@pytest.mark.parametrize("name", ["", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_segments_grow_unless_the_user_has_set_the_allocator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda.memory, "_set_allocator_settings", asked.append)
    for one in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(one, "")  # so that what is set here is taken back
        monkeypatch.delenv(one)
    if name:
        monkeypatch.setenv(name, "max_split_size_mb:512")
    distributed.let_segments_grow()
    assert asked == ([] if name else ["expandable_segments:True"])


def group_timeouts(recipe: Path, port: int, ds_config: str) -> dict[str, float]:
    """Timeout of each process group there is at the end of a run that trained, evaluated and saved."""
    dist.destroy_process_group()  # that of the test's own ranks
    os.environ["MASTER_PORT"] = str(port)
    found: dict[str, float] = {}

    def look(*_: object) -> None:
        for group in distributed_c10d._world.pg_map:
            options = group._get_backend(torch.device("cpu")).options
            found[group.group_name] = options._timeout.total_seconds()

    with patch.object(train, "say_finished", look):
        assert call(recipe, f"engine.ds_config={ds_config}", "run.timeout=4321") == 0
    return found


@pytest.mark.parametrize("ds_config", ["zero1", "zero3"])
def test_every_process_group_of_a_run_has_its_timeout(tmp_path: Path, ds_config: str) -> None:
    """DeepSpeed makes groups of its own, with torch's default of 10 or 30 minutes unless told."""
    shards = str(make_shards(tmp_path / "pairs", tiny_captions(32)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "run": {"directory": str(tmp_path / "run"), "samples": 32},
                "model": {"config": tiny_config(), "tokenizer": tiny_tokenizer()},
                "data": {"train": shards, "validation": shards, "workers": 0},
                "batch": {"size": 16},
                "engine": {"precision": "fp32"},
            }
        )
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for found in run_ranks(group_timeouts, 2, recipe, port, ds_config, timeout=180):
        assert len(found) > 1, "DeepSpeed made no group: this test shows nothing"
        assert set(found.values()) == {4321 + 60}, found


def exit_code(error: BaseException | None, destroying: str) -> int:
    """Of a command on two ranks of NCCL that ends with ``error``; -1 where it hangs. ``destroying`` the process group
    "hangs", or is "seen": exit code 90 where it never happened."""
    pid = os.fork()
    if pid == 0:
        destroyed = []

        def main(_: list[str]) -> int:
            with distributed.process_group():
                if error is not None:
                    raise error
            return 75

        os.environ.pop("RANK", None)
        with (
            patch.object(dist, "get_backend", lambda *_: "nccl"),
            patch.object(dist, "get_world_size", lambda *_: 2),
            patch.object(dist, "destroy_process_group", lambda: time.sleep(600) if destroying == "hangs" else destroyed.append(1)),
        ):  # fmt: skip
            code = run_command(main, [])
        os._exit(code if destroyed else 90)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -1


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("wrong key"), 2, "error: wrong key\n"),
        (RunFailed("a disk is full"), 1, "error: a disk is full\n"),
        (KeyError("a bug"), 1, "KeyError: 'a bug'\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (SystemExit(7), 7, ""),
    ],
)
def test_a_rank_that_fails_on_nccl_says_why_and_leaves_without_waiting_for_its_peers(
    error: BaseException, code: int, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(error, "hangs") == code
    assert capfd.readouterr().err.endswith(said)


def test_after_success_the_process_group_is_finalised() -> None:
    assert exit_code(None, "seen") == 75
