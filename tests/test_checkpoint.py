"""Checkpoints are whole or not there; what is resumed goes on with the same numbers; damage, full disks and other
models are noticed."""

import json
import os
import random
import resource
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from tests.support.forked_ranks import run_ranks
from tests.support.tiny_models import tiny_batch, tiny_model
from tests.test_engine_state import Toy, make_engine, train
from trainer.checkpoint import (
    Checkpointer,
    CheckpointSettings,
    RunLock,
    load,
    load_weights,
    newest_good,
    save,
    seed_step,
    state_io,
    store,
    tensor_file,
)
from trainer.checkpoint.tensor_file import DTYPES, Entry, TensorReader, TensorWriter
from trainer.core.distributed import rank, world_size
from trainer.core.types import RunFailed, UserError
from trainer.engine import EngineSettings, build_engine, state
from trainer.losses import GlobalLoss, PairLoss, QueueLoss
from trainer.optim import AdamWSettings, Guard, build_optimizer
from trainer.step import train_step


class Queue(nn.Module):
    """A loss that remembers."""

    def __init__(self, rows: int = 4) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(rows, 3))
        self.register_buffer("filled", torch.tensor(0))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def wrap(ds_engine: Any, stage: int) -> Any:
    """As trainer.engine's Engine: what a checkpoint asks of it."""
    return SimpleNamespace(ds_engine=ds_engine, module=ds_engine.module, zero_stage=stage)


def plain(samples_seen: int, tensors: dict[str, Tensor]) -> tuple[state_io.Contents, list[state_io.Piece]]:
    """A checkpoint without an engine."""
    entries = {state_io.MODEL: [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]}
    return state_io.Contents(samples_seen, entries, {"samples_seen": samples_seen}), [
        (state_io.MODEL, n, t) for n, t in tensors.items()
    ]


def write(run_dir: Path, samples_seen: int, **options: int) -> Path:
    return state_io.write(run_dir, *plain(samples_seen, {"w": torch.full((100,), float(samples_seen))}), **options)


def names(run_dir: Path) -> list[int]:
    return [store.samples_of(folder) for folder in store.listing(run_dir)]


# ----------------------------------------------------------------------------------------------------------------
# resume


def stop_at_two(run_dir: Path, stage: int) -> list[float]:
    engine, queue = make_engine(stage), Queue()
    train(engine, 0, 2)
    queue.queue.fill_(rank() == 0)
    queue.filled.fill_(3)
    save(run_dir, wrap(engine, stage), 16, {"step": 2, "seed": 7}, queue)
    return train(engine, 2, 4)


def go_on(run_dir: Path, stage: int) -> Any:
    engine, queue = make_engine(stage, seed=1), Queue()
    engine.module.mean.fill_(9.0)
    resumed = load(run_dir, wrap(engine, stage), queue)
    return resumed, queue.queue.mean().item(), queue.filled.item(), train(engine, 2, 4)


@pytest.mark.parametrize(
    ("source", "target"), [((2, 0), (2, 0)), ((2, 2), (2, 2)), ((2, 3), (2, 3)), ((2, 1), (4, 3)), ((2, 3), (1, 0))]
)
def test_a_resumed_run_goes_on_with_the_same_numbers(
    tmp_path: Path, source: tuple[int, int], target: tuple[int, int]
) -> None:
    straight = run_ranks(stop_at_two, source[0], tmp_path, source[1])[0]
    results = run_ranks(go_on, target[0], tmp_path, target[1])
    for resumed, queue, filled, _ in results:
        assert (resumed.samples_seen, resumed.extra) == (16, {"step": 2, "seed": 7})
        assert (queue, filled) == (1.0, 3)  # rank 0's, on every rank
    if source == target:
        assert results[0][3] == straight
    else:
        assert results[0][3] == pytest.approx(straight, rel=2e-6)


def save_slowly(run_dir: Path, stage: int, patience: float) -> float:
    """Seconds that a checkpoint takes on a slow disk, where no collective may take longer than ``patience``."""
    engine, add, read = make_engine(stage), state_io.TensorWriter.add, state.read_state

    def slow(*args: Any) -> None:
        time.sleep(0.3)
        add(*args)

    distributed_c10d._set_pg_timeout(timedelta(seconds=patience))
    began = time.monotonic()
    with (
        patch.object(state_io.TensorWriter, "add", slow),
        patch.object(state, "read_state", lambda engine: read(engine, bucket_bytes=200)),
    ):
        save(run_dir, wrap(engine, stage), 8, {})
    return time.monotonic() - began


@pytest.mark.parametrize("stage", [0, 3])
def test_a_checkpoint_may_take_longer_than_a_collective(tmp_path: Path, stage: int) -> None:
    """The ranks meet after every bucket, so that none waits for the checkpoint as a whole."""
    patience = 1.8
    assert min(run_ranks(save_slowly, 2, tmp_path, stage, patience)) > patience
    store.verify(store.listing(tmp_path)[0])


def test_the_files_are_what_plain_tools_read(tmp_path: Path) -> None:
    def work() -> Any:
        engine = make_engine(3)
        train(engine, 0, 1)
        folder = save(tmp_path, wrap(engine, 3), 8, {})
        saved = load_file(folder / "model.safetensors")
        model = Toy()
        assert load_weights(model, tmp_path) == folder
        x = torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(0))
        return sorted(path.name for path in folder.iterdir()), saved, (engine(x) - model(x)).abs().max().item()

    files, saved, difference = run_ranks(work, 2)[0]
    assert files == ["checkpoint.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert saved.keys() == Toy().state_dict().keys()
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert difference == 0


def test_a_checkpoint_of_another_model_is_one_line_on_every_rank(tmp_path: Path) -> None:
    def make() -> None:
        save(tmp_path, wrap(make_engine(0), 0), 8, {})

    def wrong(width: int, queue: Queue | None) -> tuple[str, bool]:
        engine = make_engine(1, width=width)
        before = engine.module.body.weight.clone()
        with pytest.raises(UserError) as caught:
            load(tmp_path, wrap(engine, 1), queue)
        return str(caught.value), torch.equal(before, engine.module.body.weight)

    run_ranks(make, 1)
    for message, untouched in run_ranks(wrong, 2, 9, None):
        assert (
            "does not match the model: body.weight is [7, 5] in the checkpoint, [9, 5] here; body.bias is [7] in the checkpoint, [9] here"
            in message
        )
        assert "and 1 more" in message and "\n" not in message and untouched
    for message, _ in run_ranks(wrong, 2, 7, Queue()):
        assert "does not match the loss: queue is absent in the checkpoint, [4, 3] here" in message


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 8)
    with pytest.raises(
        UserError,
        match=r"does not match the model: conv\.weight is absent in the checkpoint, \[4, 3, 2, 2\] here.* and 8 more",
    ):
        load_weights(Toy(), tmp_path)
    with pytest.raises(UserError, match="no checkpoint to load"):
        load_weights(Toy(), tmp_path / "elsewhere")


# ------------------------------------------------------------------------------------------------------- with real
# parts

SIZE = 16
"""Global batch."""


class Run:
    """A training run in small: what train.py does, with the real engine, step, loss with a queue, guard and
    schedule."""

    def __init__(
        self, run_dir: Path, stage: int, micro_batch: int, dropout: float, remembers: str = "queue", seed: int = 0
    ) -> None:
        # eps is large: AdamW at 1e-8 divides rounding by rounding where a gradient is mathematically zero (key biases).
        optim = AdamWSettings(lr=3e-3, eps=1e-4, warmup=0)
        model = tiny_model("clip", seed=seed, layers=1, dropout=dropout)
        config = (
            run_dir / f"zero{stage}-of-rank-{rank()}.json"
        )  # one for all would be read by a rank while another writes it
        config.write_text(json.dumps({"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}))
        self.engine = build_engine(
            model, build_optimizer(model, optim), EngineSettings(ds_config=str(config), precision="fp32")
        )
        self.loss: PairLoss = QueueLoss(width=32, size=40) if remembers == "queue" else GlobalLoss(gamma_decay=0)
        self.guard = Guard(optim)
        self.micro_batch, self.samples_seen = micro_batch, 0
        self.keeper = Checkpointer(run_dir, CheckpointSettings(every=SIZE))

    def resume(self) -> None:
        resumed = self.keeper.resume(self.engine, self.loss)
        assert resumed is not None
        self.samples_seen = resumed.samples_seen
        self.guard.load_state_dict(resumed.extra["guard"])

    def train(self, steps: int) -> list[tuple[float, float]]:
        """(loss, gradient norm) of each step."""
        found = []
        for _ in range(steps):
            rows = SIZE // world_size()
            batch = tiny_batch(SIZE, seed=self.samples_seen).split(rows)[rank()]
            batch = batch._replace(ids=batch.ids % 23)  # samples come again
            seed_step(0, self.samples_seen, rank())
            result = train_step(self.engine, batch, self.loss, self.micro_batch, guard=self.guard)
            self.samples_seen += SIZE
            found.append((result.loss, result.grad_norm))
        return found

    def save(self) -> None:
        self.keeper.save(self.engine, self.samples_seen, {"guard": self.guard.state_dict()}, self.loss)


def run_and_stop(run_dir: Path, *options: Any) -> list[tuple[float, float]]:
    run = Run(run_dir, *options)
    run.train(3)
    run.save()
    return run.train(3)


def run_again(run_dir: Path, *options: Any) -> tuple[list[tuple[float, float]], dict[str, Any]]:
    run = Run(run_dir, *options, seed=1)
    run.resume()
    return run.train(3), run.guard.state_dict()


@pytest.mark.parametrize("remembers", ["queue", "global"])
@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_real_run_goes_on_with_the_same_numbers(tmp_path: Path, stage: int, remembers: str) -> None:
    """Dropout, a queue, micro-batches and the guard included, to the last bit."""
    straight = run_ranks(run_and_stop, 2, tmp_path, stage, 3, 0.1, remembers)[0]
    resumed, guard = run_ranks(run_again, 2, tmp_path, stage, 3, 0.1, remembers)[0]
    assert resumed == straight and len(set(straight)) == 3
    assert guard["norms"][3:] == [norm for _, norm in straight]


@pytest.mark.parametrize("remembers", ["queue", "global"])
@pytest.mark.parametrize(("ranks", "stage", "micro_batch"), [(1, 0, 16), pytest.param(4, 3, 2, marks=pytest.mark.slow)])
def test_a_real_run_goes_on_elsewhere(remembers: str, tmp_path: Path, ranks: int, stage: int, micro_batch: int) -> None:
    """Other ranks, another stage, another micro-batch: the same curve but for rounding."""
    straight = run_ranks(run_and_stop, 2, tmp_path, 2, 3, 0.0, remembers)[0]
    resumed, _ = run_ranks(run_again, ranks, tmp_path, stage, micro_batch, 0.0, remembers)[0]
    assert torch.tensor(resumed).flatten().tolist() == pytest.approx(
        torch.tensor(straight).flatten().tolist(), rel=1e-5
    )


# ----------------------------------------------------------------------------------------------------------------
# damage


def cut(folder: Path) -> None:
    os.truncate(folder / state_io.MODEL, 100)


def flip(folder: Path) -> None:
    data = bytearray((folder / state_io.MODEL).read_bytes())
    data[-7] ^= 1
    (folder / state_io.MODEL).write_bytes(data)


def lose_manifest(folder: Path) -> None:
    (folder / store.MANIFEST).unlink()


def garble_manifest(folder: Path) -> None:
    (folder / store.MANIFEST).write_text('{"format": "ringlip-checkpoint", "files": {"model')


def lose_file(folder: Path) -> None:
    (folder / state_io.STATE).unlink()


@pytest.mark.parametrize("damage", [cut, flip, lose_manifest, garble_manifest, lose_file])
def test_a_damaged_one_is_noticed_and_the_one_before_is_used(tmp_path: Path, damage: Any) -> None:
    good, bad = write(tmp_path, 100), write(tmp_path, 200)
    said: list[str] = []
    assert newest_good(tmp_path, said.append) == bad and not said
    damage(bad)
    assert newest_good(tmp_path, said.append) == good
    assert len(said) == 1 and str(bad) in said[0] and "\n" not in said[0]
    damage(good)
    assert newest_good(tmp_path, said.append) is None
    with pytest.raises(UserError):
        store.find(bad)


def test_a_newer_format_is_refused_in_words(tmp_path: Path) -> None:
    manifest = write(tmp_path, 100) / store.MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_bytes()) | {"version": 2}))
    with pytest.raises(UserError, match="newer RingLIP"):
        store.verify(manifest.parent)


def save_for_ever(run_dir: Path, first: int) -> None:
    for samples in range(first, first + 1_000_000):
        state_io.write(run_dir, *plain(samples, {"w": torch.full((200_000,), float(samples))}), keep=2)


def test_killed_at_any_moment_the_last_one_is_whole(tmp_path: Path) -> None:
    """25 times SIGKILL into a process that does nothing but save; nothing is ever lost but what was being written."""
    moments = random.Random(0)
    newest = 0
    for _ in range(25):
        child = os.fork()
        if child == 0:
            try:
                save_for_ever(tmp_path, newest + 1)
            finally:
                os._exit(1)
        time.sleep(moments.uniform(0.01, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        said: list[str] = []
        folder = newest_good(tmp_path, said.append)
        if folder is None:
            assert newest == 0
            continue
        assert store.samples_of(folder) >= newest and not said
        newest = store.samples_of(folder)
        assert TensorReader(folder / state_io.MODEL).read("w").unique().tolist() == [newest]
    assert newest > 0  # it did save in between
    write(tmp_path, newest + 1, keep=2)
    assert len(names(tmp_path)) == 2 and not [
        path for path in store.checkpoints_dir(tmp_path).iterdir() if path.name.startswith(".")
    ]


# ------------------------------------------------------------------------------------------------------------ full
# disks


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("on_failure", ["continue", "stop"])
def test_a_full_disk_leaves_the_last_good_one(tmp_path: Path, on_failure: Any, asynchronous: bool) -> None:
    def work() -> Any:
        engine = wrap(make_engine(1), 1)
        keeper = Checkpointer(tmp_path, CheckpointSettings(on_failure=on_failure, asynchronous=asynchronous, keep=1))
        keeper.save(engine, 8, {})
        keeper.wait()
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (900, hard))  # a write beyond it fails, as on a full disk
        error = ""
        try:
            keeper.save(engine, 16, {})
            keeper.wait()
        except UserError as stopped:
            error = str(stopped)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        left = names(tmp_path), newest_good(tmp_path)
        with pytest.raises(RunFailed, match="the last checkpoint, at 16 samples, could not be written"):
            keeper.close(16)  # nobody is told that a run has ended well, or was saved before it stopped
        keeper.save(engine, 16, {})
        keeper.close(16)
        return error, left, names(tmp_path)

    for error, (left, good), after in run_ranks(work, 2):
        assert left == [8] and good is not None
        assert after == [16]
        if on_failure == "stop":
            assert "File too large" in error and str(tmp_path) in error and "free some space" in error
        else:
            assert error == ""


def test_too_little_room_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 100)
    monkeypatch.setattr(state_io.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(OSError, match="not enough space"):
        write(tmp_path, 200)
    assert names(tmp_path) == [100] and newest_good(tmp_path) is not None


# ------------------------------------------------------------------------------------------------------------ one job


def test_a_directory_is_one_jobs_until_it_dies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        with RunLock(tmp_path):
            os.write(go, b"!")
            time.sleep(60)
        os._exit(1)
    os.read(ready, 1)
    with pytest.raises(RunFailed, match="another job is training there"), RunLock(tmp_path, patience=0.3):
        pass
    assert capsys.readouterr().err.count("another job is training there; waiting up to") == 1
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for _ in range(2):
        with RunLock(tmp_path, patience=5):
            pass


# ----------------------------------------------------------------------------------------------------------
# asynchronous


def test_writing_in_the_background_keeps_the_moment_of_saving(tmp_path: Path) -> None:
    def work() -> Any:
        engine = make_engine(2)
        train(engine, 0, 2)
        keeper = Checkpointer(tmp_path, CheckpointSettings(asynchronous=True))
        trained, write_now = threading.Event(), tensor_file.DigestFile.write

        def held_up(self: Any, data: Any) -> None:
            assert trained.wait(60)  # a disk so slow that training is done first
            write_now(self, data)

        tensor_file.DigestFile.write = held_up  # type: ignore[method-assign]
        keeper.save(wrap(engine, 2), 16, {"step": 2})
        straight = train(engine, 2, 4)
        there = names(tmp_path)
        trained.set()
        keeper.close(16)
        other = make_engine(2, seed=1)
        resumed = Checkpointer(tmp_path, CheckpointSettings()).resume(wrap(other, 2))
        assert resumed is not None
        return there, resumed.samples_seen, straight == train(other, 2, 4)

    assert run_ranks(work, 2) == [([], 16, True)] * 2


# --------------------------------------------------------------------------------------------------- what stays, what
# next


def test_the_last_ones_and_every_nth_stay(tmp_path: Path) -> None:
    for samples in range(300, 5100, 300):
        write(tmp_path, samples, keep=2, keep_every=1000)
    assert names(tmp_path) == [1200, 2100, 3000, 4200, 4500, 4800]
    assert (store.checkpoints_dir(tmp_path) / "latest").read_text() == "samples-000004800\n"


def test_going_back_by_hand(tmp_path: Path) -> None:
    for samples in (100, 200, 300):
        write(tmp_path, samples)
    (store.checkpoints_dir(tmp_path) / "latest").write_text("samples-000000100\n")
    assert newest_good(tmp_path) == store.checkpoints_dir(tmp_path) / "samples-000000100"
    write(tmp_path, 150, keep=3)
    assert names(tmp_path) == [100, 150]  # 200 and 300 belonged to the course that was left


def test_the_same_position_is_replaced(tmp_path: Path) -> None:
    write(tmp_path, 100)
    folder = state_io.write(tmp_path, *plain(100, {"w": torch.zeros(3)}))
    assert TensorReader(folder / state_io.MODEL).read("w").tolist() == [0, 0, 0]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["latest", "samples-000000100"]


def start(run_dir: Path, resume: str) -> str | None:
    return Checkpointer(run_dir, CheckpointSettings(resume=resume))._start()


def test_what_a_run_goes_on_from(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    elsewhere = write(other, 50)
    assert start(run, "auto") is None and start(run, "never") is None
    assert start(run, str(other)) == start(run, str(elsewhere)) == str(elsewhere)
    own = write(run, 100)
    assert start(run, "auto") == start(run, str(other)) == str(own)  # a restarted job goes on with its own
    with pytest.raises(UserError, match=r"checkpoint\.resume is never"):
        start(run, "never")
    cut(own)
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        start(run, "auto")
    with pytest.raises(UserError, match="no checkpoint to load"):
        start(tmp_path / "new", str(tmp_path / "nowhere"))


# ------------------------------------------------------------------------------------------------------------------
# parts


def test_streamed_files_are_safetensors(tmp_path: Path) -> None:
    made = {str(dtype): (torch.randn(3, 5) * 3).to(dtype) for dtype in DTYPES}
    made |= {
        "scalar": torch.tensor(4.5),
        "empty": torch.zeros(0, 3),
        "transposed": torch.arange(6).view(2, 3).t(),
        "é": torch.ones(1),
    }
    file = tensor_file.DigestFile(tmp_path / "x.safetensors")
    writer = TensorWriter(file, [Entry(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in made.items()])
    for name, tensor in made.items():
        writer.add(name, tensor)
    writer.finish()
    line = file.close()
    back = load_file(tmp_path / "x.safetensors")
    assert back.keys() == made.keys()
    assert all(torch.equal(back[name], tensor) and back[name].dtype == tensor.dtype for name, tensor in made.items())
    assert line == {
        "bytes": (tmp_path / "x.safetensors").stat().st_size,
        "xxh3_128": tensor_file.digest_of(tmp_path / "x.safetensors"),
    }


def test_randomness_is_a_function_of_seed_position_and_rank() -> None:
    def draw(*position: int) -> tuple[float, ...]:
        seed_step(*position)
        return torch.rand(1).item(), random.random(), float(np.random.rand())

    first = draw(0, 512, 1)
    torch.rand(7)
    assert draw(0, 512, 1) == first
    others = [draw(1, 512, 1), draw(0, 1024, 1), draw(0, 512, 0)]
    assert all(set(first).isdisjoint(other) for other in others)
