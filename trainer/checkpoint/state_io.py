"""The contents of a checkpoint, and the transfer of tensors between an engine and files.

``model.safetensors`` holds weights and buffers in fp32 by the names of ``DualEncoder``, ``optimizer.safetensors`` the
moments as ``NAME.exp_avg`` and ``NAME.exp_avg_sq`` (and ``NAME.ema``, where the run averages its weights),
``loss.safetensors`` the buffers of a loss that has any (a queue) and the chunks of its SampleTable, ``state.json``
samples_seen, the optimizer's step counts and what the training loop adds. Only rank 0 uses the disk.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor, nn

from trainer.checkpoint.store import Draft, find, prune, read_manifest
from trainer.checkpoint.tensor_file import Entry, TensorReader, TensorWriter
from trainer.core import distributed
from trainer.core.collectives import on_main, share
from trainer.core.types import UserError
from trainer.engine.state_names import AVERAGE, WEIGHT
from trainer.losses.sample_table import CHUNK, PREFIX, SampleTable
from trainer.models import DualEncoder, ModelSettings, build_to_load

MODEL, OPTIMIZER, LOSS, STATE = "model.safetensors", "optimizer.safetensors", "loss.safetensors", "state.json"

Piece = tuple[str, str, Tensor]
"""File, name in it, tensor."""


@dataclass(frozen=True)
class Resumed:
    """The state that a run resumes from."""

    samples_seen: int
    extra: dict[str, Any]
    """What the training loop passed to ``save``."""
    folder: Path


@dataclass(frozen=True)
class Contents:
    """The plan of a checkpoint: the tensors of each file, and ``state.json``."""

    samples_seen: int
    entries: dict[str, list[Entry]]
    state: dict[str, Any]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.size for entries in self.entries.values() for entry in entries)


def contents(engine: Any, samples_seen: int, extra: dict[str, Any], loss: nn.Module | None) -> Contents:
    """The tensors that ``pieces`` will yield. No communication."""
    from trainer.engine import state  # DeepSpeed takes seconds to import, and evaluating or exporting does without

    buffers, loss_state = _buffers(engine.module), _loss_state(loss)
    layout = state.layout(engine.ds_engine)
    entries = {
        MODEL: [_entry(name, tensor) for name, tensor in buffers.items()]
        + [Entry(name, torch.float32, kinds[WEIGHT]) for name, kinds in layout.items()],
        OPTIMIZER: [
            Entry(f"{name}.{kind}", torch.float32, shape)
            for name, kinds in layout.items()
            for kind, shape in kinds.items()
            if kind != WEIGHT
        ],
    }
    table = _table(loss)
    chunks = [Entry(name, torch.float32, (CHUNK, table.width)) for name in table.names] if table else []
    if loss_state or chunks:
        entries[LOSS] = [_entry(name, tensor) for name, tensor in loss_state.items()] + chunks
    facts = {
        "samples_seen": samples_seen,
        "extra": extra,
        "kinds": {name: list(kinds) for name, kinds in layout.items()},
        "steps": state.steps(engine.ds_engine),
        "made_by": {"ranks": distributed.world_size(), "zero_stage": engine.zero_stage, "torch": torch.__version__},
    }
    return Contents(samples_seen, entries, facts)


def pieces(engine: Any, loss: nn.Module | None) -> Iterator[Piece]:
    """Yields every tensor on rank 0; within a file, in the order of its entries. All ranks must exhaust it."""
    from trainer.engine import state

    if distributed.is_main():
        for name, tensor in _buffers(engine.module).items():
            yield MODEL, name, tensor
        for name, tensor in _loss_state(loss).items():
            yield LOSS, name, tensor
    table = _table(loss)
    if table is not None:
        for name, tensor in table.pieces():
            yield LOSS, name, tensor
    for name, kind, tensor in state.read_state(engine.ds_engine):
        yield (MODEL, name, tensor) if kind == WEIGHT else (OPTIMIZER, f"{name}.{kind}", tensor)


def write(run_dir: Path, plan: Contents, tensors: Iterable[Piece], keep: int = 0, keep_every: int = 0) -> Path:
    """On rank 0: writes a checkpoint and removes the surplus ones (``keep`` 0: none). After an OSError the other
    checkpoints are intact.
    """
    draft = Draft(run_dir, plan.samples_seen)
    try:
        if shutil.disk_usage(run_dir).free < plan.size:
            raise OSError(errno.ENOSPC, "not enough space left on the disk")
        writers = {name: TensorWriter(draft.file(name), entries) for name, entries in plan.entries.items()}
        for file, name, tensor in tensors:
            writers[file].add(name, tensor)
        for writer in writers.values():
            writer.finish()
        draft.write(STATE, plan.state)
        folder = draft.finish()
    except BaseException:
        draft.abandon()
        raise
    if keep:
        prune(run_dir, plan.samples_seen, keep, keep_every)
    return folder


def save(
    run_dir: Path,
    engine: Any,
    samples_seen: int,
    extra: dict[str, Any],
    loss: nn.Module | None = None,
    keep: int = 0,
    keep_every: int = 0,
) -> Path:
    """Writes a checkpoint of an ``Engine`` and returns its directory. Every rank calls it; ``extra`` must be JSON.

    Raises OSError on all ranks if the disk is full or fails; earlier checkpoints are intact.
    """
    plan, tensors = contents(engine, samples_seen, extra, loss), pieces(engine, loss)
    answer: dict[str, Any] = {}
    if distributed.is_main():
        try:
            answer["folder"] = str(write(run_dir, plan, tensors, keep, keep_every))
        except OSError as error:
            answer["error"] = explain(error, run_dir, plan)
    for _ in tensors:  # the other ranks, and rank 0 after a failure, must take part in all collectives
        pass
    answer = share(answer)
    if "error" in answer:
        raise OSError(answer["error"])
    return Path(answer["folder"])


def explain(error: OSError, run_dir: Path, plan: Contents) -> str:
    """The error, its place, and the size of a checkpoint."""
    return f"{error.strerror or error} ({run_dir}; a checkpoint takes {plan.size / 1e9:.3f} GB)"


def load(where: Path, engine: Any, loss: nn.Module | None = None) -> Resumed:
    """Loads the newest undamaged checkpoint of a run, or the given one, into an ``Engine`` and the loss's buffers.
    Every rank calls it.

    Raises UserError, before changing anything, if the checkpoint is damaged or belongs to another model.
    """
    return restore(Path(on_main(lambda: {"folder": str(find(where))})["folder"]), engine, loss)


def restore(folder: Path, engine: Any, loss: nn.Module | None = None) -> Resumed:
    """``load`` for a checkpoint that has been verified."""
    from trainer.engine import state

    readers: dict[str, TensorReader] = {}
    table = _table(loss)
    facts = on_main(lambda: _open(folder, engine.module, _shapes(engine, state), _loss_state(loss), table, readers))

    def read(name: str, kind: str) -> Tensor:
        return readers[MODEL].read(name) if kind == WEIGHT else readers[OPTIMIZER].read(f"{name}.{kind}")

    state.restore_state(engine.ds_engine, facts["kinds"], facts["steps"], read)
    for file, targets in ((MODEL, _buffers(engine.module)), (LOSS, _loss_state(loss))):
        for name, target in targets.items():
            _broadcast_into(target, readers[file].read(name) if distributed.is_main() else None)
    if table is not None:
        table.load(facts["chunks"], lambda name: readers[LOSS].read(name))
    return Resumed(facts["samples_seen"], facts["extra"], folder)


def _open(
    folder: Path,
    module: nn.Module,
    shapes: dict[str, tuple[int, ...]],
    loss_state: dict[str, Tensor],
    table: SampleTable | None,
    readers: dict[str, TensorReader],
) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / STATE).read_bytes())
    for name in read_manifest(folder)["files"]:
        if name != STATE:
            readers[name] = _reader(folder / name)
    wanted = shapes | {name: tuple(tensor.shape) for name, tensor in _buffers(module).items()}
    _same(folder, "model", readers[MODEL].shapes(), wanted)
    saved_loss = readers[LOSS].shapes() if LOSS in readers else {}
    facts["chunks"] = [name for name in saved_loss if table is not None and name.startswith(PREFIX)]
    saved_loss = {name: shape for name, shape in saved_loss.items() if name not in facts["chunks"]}
    _same(folder, "loss", saved_loss, {name: tuple(tensor.shape) for name, tensor in loss_state.items()})
    return facts


def load_model(settings: ModelSettings, where: Path, average: bool = False) -> tuple[DualEncoder, Path]:
    """(A run's model for evaluation and export, the checkpoint that it was loaded from); ``where`` is a run or one of
    its checkpoints.

    An adapter that was trained on a rounded base (``model.lora.base``) is put on the exact base, read from
    ``model.path``. A tower whose embeddings were precomputed is read from there too. With ``average``, trained weights
    are replaced by their running average (``optim.ema``).
    """
    rounded = settings != settings.at_rest
    model = build_to_load(settings.at_rest, weights=rounded)
    return model, load_weights(model, where, only_trained=rounded, average=average)


def load_weights(model: nn.Module, where: Path, only_trained: bool = False, average: bool = False) -> Path:
    """Loads weights and buffers of a checkpoint (or of a run's newest undamaged one) into a plain module."""
    folder = find(where)
    reader = _reader(folder / MODEL)
    unsaved: frozenset[str] = getattr(model, "unsaved", frozenset())  # not part of the training: unchanged
    targets = {
        name: target
        for name, target in {**dict(model.named_parameters()), **_buffers(model)}.items()
        if name not in unsaved
    }
    saved = reader.shapes()
    if only_trained:
        targets = {name: target for name, target in targets.items() if target.requires_grad}
        saved = {name: shape for name, shape in saved.items() if name in targets}
    _same(folder, "model", saved, {name: tuple(target.shape) for name, target in targets.items()})
    if unsaved:
        tower = json.loads((folder / STATE).read_bytes())["extra"].get("tower", "")
        ours: str = getattr(model, "tower", "")
        if tower != ours:
            raise UserError(
                f"{folder} was trained on stored embeddings of another tower (fingerprint {tower[:12]}, that of the "
                f"recipe's path is now {ours[:12]}): restore the pretrained tower"
            )
    averages = _averages(folder) if average else {}
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(averages[name].read(f"{name}.{AVERAGE}") if name in averages else reader.read(name))
    return folder


def _averages(folder: Path) -> dict[str, TensorReader]:
    """Name of each weight that has a running average -> the reader of its file."""
    reader = _reader(folder / OPTIMIZER)
    ending = f".{AVERAGE}"
    found = {name.removesuffix(ending): reader for name in reader.names if name.endswith(ending)}
    if not found:
        raise UserError(
            f"{folder}: has no running average of the weights; set optim.ema in the recipe and train, or remove "
            f"--ema out"
        )
    return found


def _reader(path: Path) -> TensorReader:
    try:
        return TensorReader(path)
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({error})") from error


def _same(folder: Path, what: str, saved: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> None:
    """Raises UserError naming the first tensors that differ."""
    differ = [
        f"{name} is {_words(saved.get(name))} in the checkpoint, {_words(wanted.get(name))} here"
        for name in [*wanted, *(name for name in saved if name not in wanted)]
        if saved.get(name) != wanted.get(name)
    ]
    if differ:
        more = f" and {len(differ) - 3} more" if len(differ) > 3 else ""
        raise UserError(
            f"{folder} does not match the {what}: {'; '.join(differ[:3])}{more}; resume with the recipe that wrote it"
        )


def _words(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _entry(name: str, tensor: Tensor) -> Entry:
    return Entry(name, tensor.dtype, tuple(tensor.shape))


def _shapes(engine: Any, state: Any) -> dict[str, tuple[int, ...]]:
    return {name: kinds[WEIGHT] for name, kinds in state.layout(engine.ds_engine).items()}


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers (without those that a module recomputes)."""
    belonging = module.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in belonging}


def _loss_state(loss: nn.Module | None) -> dict[str, Tensor]:
    return _buffers(loss) if loss is not None else {}


def _table(loss: nn.Module | None) -> SampleTable | None:
    """What the loss remembers of each sample, which is divided over the ranks."""
    table: SampleTable | None = getattr(loss, "table", None)
    return table


def _broadcast_into(target: Tensor, value: Tensor | None) -> None:
    if value is not None:
        target.copy_(value)
    if distributed.world_size() > 1:
        bits = target.to(distributed.device(), copy=True).contiguous().view(-1).view(torch.uint8)
        dist.broadcast(bits, src=0)
        target.copy_(bits.view(target.dtype).view(target.shape))
