"""What building an engine promises beyond the numbers: nobody is told what only DeepSpeed's authors can change."""

from __future__ import annotations

import gc
import importlib
import os
import warnings
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.dense_step import Case, GatheredSigmoid, captured, global_batch
from tests.support.forked_ranks import run_ranks
from trainer.engine import workarounds
from trainer.losses import SigmoidLoss
from trainer.step import train_step


def heard(quiet: bool) -> list[str]:
    """Warnings of the calls that DeepSpeed makes, and one of somebody else."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        if quiet:
            importlib.reload(workarounds)  # pytest has put the filters away that were set when it was imported
        dist.all_gather_into_tensor(torch.zeros(4), torch.ones(2))
        dist.reduce_scatter_tensor(torch.zeros(2), torch.ones(4))
        warnings.warn("another", FutureWarning, stacklevel=1)
    return [str(warning.message) for warning in found]


def test_old_names_in_deepspeed_are_not_the_users_business_and_other_warnings_are() -> None:
    loud, quiet = (run_ranks(heard, 2, how)[0] for how in (False, True))
    assert quiet == ["another"]
    assert "another" in loud  # and whatever this torch says of those names


def threads_of_a_step(offload: str, environment: dict[str, str]) -> int:
    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ |= {"LOCAL_WORLD_SIZE": "1"} | environment
    torch.set_num_threads(1)  # as OMP_NUM_THREADS=1 has it
    os.sched_getaffinity = lambda _: set(range(6))  # type: ignore[assignment]
    Case(stage=2, offload=offload).engine()
    return torch.get_num_threads()


@pytest.mark.parametrize(
    ("offload", "environment", "threads"),
    [
        ("optimizer", {"TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1"}, 6),
        ("optimizer", {"OMP_NUM_THREADS": "1"}, 1),  # whoever set it was not torchrun
        ("", {"TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": "1"}, 1),
    ],
)
def test_torchruns_one_thread_does_not_hold_for_an_offloaded_optimizer(
    offload: str, environment: dict[str, str], threads: int
) -> None:
    assert run_ranks(threads_of_a_step, 1, offload, environment) == [threads]


def averaged_and_discarded(stage: int) -> tuple[int, int]:
    """How many gradients a step had, and how many of them memory still holds once they are discarded."""
    found = Case(stage=stage).engine()
    batch = global_batch(4)
    found.start_gradients()
    found.backward(found.forward(batch.pixels, batch.tokens, batch.token_mask).image.square().sum())
    found.finish_gradients()
    kept = [weakref.ref(part) for group in found.ds_engine.optimizer.averaged_gradients.values() for part in group]
    found.discard_gradients()
    gc.collect()
    return len(kept), sum(reference() is not None for reference in kept)


@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_that_are_discarded_leave_memory(stage: int) -> None:
    """A step that fp16 repeats, or that is skipped, must not leave a copy of the gradients behind."""
    [(number, left)] = run_ranks(averaged_and_discarded, 1, stage)
    assert number > 10
    assert left == 0


def released(stage: int) -> bool:
    engine = Case(stage=stage).engine(precision="bf16")
    train_step(engine, global_batch(16, 0), SigmoidLoss(), 8)
    model = weakref.ref(engine.module)
    engine.close()
    del engine
    gc.collect()
    return model() is None


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_closed_engine_releases_its_model(stage: int) -> None:
    """DeepSpeed's hooks on gradients would hold it in the process for good."""
    assert run_ranks(released, 1, stage) == [True]


class Norms(TorchDispatchMode):
    """Counts the kernels that take norms."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "norm" in str(function) and "layer_norm" not in str(function)
        return function(*args, **(kwargs or {}))


def norms_of_a_step(stage: int) -> tuple[int, int, float, float]:
    """Kernels for norms, parameters, and the norm before clipping by 1e-3 and after it."""
    engine = Case(stage=stage).engine(clip=1e-3)
    with Norms() as norms:
        result = train_step(engine, global_batch(16, 0), GatheredSigmoid(), 8)
    gradients = captured(engine)
    after = sum(float(gradient.double().square().sum()) for gradient in gradients.values()) ** 0.5
    return norms.count, len(gradients), result.grad_norm, after


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_norm_is_taken_once_and_of_all_gradients_together(stage: int) -> None:
    """DeepSpeed takes it parameter by parameter, up to three times a step."""
    count, parameters, before, after = run_ranks(norms_of_a_step, 1, stage)[0]
    assert count < parameters / 2  # a few are of the embeddings
    assert before > 1e-2
    assert after == pytest.approx(1e-3, rel=1e-4)
