"""The data of a finetuning: shards, what is in them, and their validation part."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.format.index import MANIFEST, Dataset
from data_tools.format.view import open_view, write_view
from trainer.core.types import UserError
from trainer.data.captions import CaptionSurvey, survey_captions
from trainer.data.open import open_source
from trainer.data.settings import DataSettings, SourceSettings
from trainer.data.sharded_dataset import ShardedDataset
from trainer.data.transforms import Damaged
from trainer.finetune.split import hold_out, same_side
from trainer.models import DualEncoder


@dataclass(frozen=True)
class Data:
    """Where training and validation pairs lie, and what they are like."""

    train: str
    validation: str
    samples: int
    """Pairs to train on."""
    held_out: int
    survey: CaptionSurvey | None
    num_classes: int
    """0 where it is not about classes."""


def prepare(
    source: str, out: Path, validation: str | None, field: str | None, model: DualEncoder
) -> tuple[Data, list[str]]:
    """Shards, split where no ``validation`` is given; and what to tell. What is in ``out`` already is used. Raises
    UserError."""
    told: list[str] = []
    train = as_shards(source, out / "shards")
    if validation is None:
        validation, train = str(out / "data" / "validation"), split(train, out / "data", field, told)
    else:
        validation = as_shards(validation, out / "validation-shards")
    settings = DataSettings(train=train)
    opened = {
        name: open_source(SourceSettings(path=path), settings) for name, path in (("t", train), ("v", validation))
    }
    classes = len(set(labels(opened["t"], field))) if field else 0
    survey = survey_captions(settings, model.preprocess)
    facts = Data(train, validation, opened["t"].size, opened["v"].size, survey, classes)
    return facts, [describe(facts, field), *told]


def describe(data: Data, field: str | None) -> str:
    """The pairs in a line."""
    text = f"data: {data.samples:,} pairs to train on, {data.held_out:,} held out"
    if data.num_classes:
        text += f", {data.num_classes:,} different values of {field}"
    if data.survey is not None:
        repeat = 1 - data.survey.distinct / data.survey.looked_at
        text += f"; {repeat:.1%} of captions repeat another"
        if data.survey.cut is not None:
            text += f", {data.survey.cut:.1%} are longer than the model reads (longest: {data.survey.longest} tokens)"
    return text


def as_shards(source: str, out: Path) -> str:
    """``source``, or shards made of it in ``out`` where it is a folder of images or a table of pairs."""
    path = Path(source).expanduser()
    if (
        "://" in source
        or (path / MANIFEST).is_file()
        or source.endswith(".tar")
        or any(sign in source for sign in "*{")
    ):
        return source
    if not path.exists():
        raise UserError(f"{source}: no such file or folder; name shards, a folder of images, or a table of pairs")
    if not (out / MANIFEST).is_file():
        command = [sys.executable, "-m", "data_tools", "shard", str(path), str(out), "--quiet"]
        print(f"data: {source} is not shards; running: python {' '.join(command[1:])}", file=sys.stderr, flush=True)
        if subprocess.run(command, check=False).returncode:
            raise UserError(
                f"{source}: `{' '.join(['python', *command[1:]])}` failed (see above); run it with other options"
            )
    return str(out)


def split(shards: str, out: Path, field: str | None, told: list[str]) -> str:
    """Writes two views of ``shards`` to ``out``/train and ``out``/validation; the path of the first."""
    if not (out / "validation" / MANIFEST).is_file():
        if "://" in shards or not Path(shards, MANIFEST).is_file():
            raise UserError(f"{shards}: pairs can be held out of local, indexed shards only: give --validation SHARDS")
        dataset = Dataset.open(shards)
        source = open_source(SourceSettings(path=shards), DataSettings())
        pictures = [
            [digest] for shard in range(dataset.num_shards) for digest in dataset.shard(shard)["digest"].tolist()
        ]
        # Of classes, names repeat by nature: there equal images alone stay together.
        keys = [pictures] if field else [pictures, [captions(source, sample) for sample in range(source.size)]]
        sides = same_side(*keys)
        held = hold_out(sides, labels(source, field) if field else None)
        made_by = {"command": "trainer.finetune", "field": field}
        for name, keep in (("train", ~held), ("validation", held)):
            write_view(open_view(str(out / name), dataset), dataset, keep, {**made_by, "part": name})
        joined = len(sides) - len(np.unique(sides))
        together = "images" if field else "images or captions"
        told.append(
            f"held out: {int(held.sum()):,} pairs; {joined:,} with {together} equal to another's stay on its side"
        )
    return str(out / "train")


def captions(source: ShardedDataset, sample: int) -> list[str]:
    """All captions of a sample; none of one that cannot be read."""
    try:
        return source.captions(sample)
    except Damaged:
        return []


def labels(source: ShardedDataset, field: str) -> list[str]:
    """The class of each sample. Raises UserError where the metadata has no such field."""
    found = []
    for sample in range(source.size):
        metadata = source.metadata(sample)
        if field not in metadata:
            known = ", ".join(sorted(metadata)) or "none"
            raise UserError(f"--for {field}: sample {sample} has no such field in its .json (it has: {known})")
        found.append(str(metadata[field]))
    return found
