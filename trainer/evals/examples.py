"""Images to evaluate on, by number: our shards (or any tars with captions), and the folders that CLIP_benchmark
reads.

CLIP_benchmark's layout (github.com/LAION-AI/CLIP_benchmark) is read as it is:

    ROOT/classnames.txt  ROOT/zeroshot_classification_templates.txt  ROOT/dataset_type.txt ("retrieval", or absent)
    ROOT/test/0.tar ...  with .jpg|.png|.webp and .cls (a class number), or for retrieval .txt (a caption a line)
"""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from data_tools.format.index import MANIFEST
from trainer.core.types import UserError
from trainer.data.open import open_source
from trainer.data.settings import DataSettings, SourceSettings, sharded
from trainer.data.sharded_dataset import ShardedDataset
from trainer.data.transforms import Damaged

CLASSES, TEMPLATES, KIND = "classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt"
PICTURES = ("jpg", "jpeg", "png", "webp")


class Example(NamedTuple):
    """One stored sample."""

    image: bytes
    captions: list[str]
    """Empty if the sample has only a class."""
    metadata: dict[str, Any]


class Examples(Protocol):
    """A dataset to evaluate on."""

    size: int
    path: str

    def read(self, sample: int) -> Example:
        """Reads sample 0 .. size - 1. Raises Damaged if it cannot be used."""
        ...

    def beside(self, name: str) -> Path | None:
        """The file of this name beside the data, such as classnames.txt; None if there is none."""
        ...

    def close(self) -> None:
        """Closes open files; reading opens them again."""
        ...


def open_examples(path: str, settings: DataSettings) -> Examples:
    """The dataset at ``path``; ``settings`` says which fields hold captions and where remote shards are cached."""
    local = Path(sharded(path)).expanduser()
    if "://" not in path and not local.exists() and not any(sign in path for sign in "*{"):
        raise UserError(
            f"{path}: no such folder; name shards made by `python -m data_tools shard`, or a CLIP_benchmark dataset"
        )
    if (local / MANIFEST).is_file():  # ours, though `data_tools` writes a classnames.txt too
        return Shards(path, settings)
    for root in (local, local.parent):
        if "://" not in path and any((root / name).is_file() for name in (CLASSES, TEMPLATES, KIND)):
            return BenchmarkFolder(root, local if root != local else _split(root))
    return Shards(path, settings)


class Shards:
    """Sharded pairs, through the loader's own reader."""

    def __init__(self, path: str, settings: DataSettings) -> None:
        self.path = path
        self.source: ShardedDataset = open_source(SourceSettings(path=path), settings)
        self.size = self.source.size

    def read(self, sample: int) -> Example:
        raw = self.source.read(sample)
        return Example(raw.image, raw.captions, self.source.metadata(sample))

    def beside(self, name: str) -> Path | None:
        path = Path(self.path) / name
        return path if "://" not in self.path and path.is_file() else None

    def close(self) -> None:
        self.source.close()


class BenchmarkFolder:
    """CLIP_benchmark's tars, which have no index: headers are read on opening, members on demand."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.path, self.root = str(folder), root
        self.retrieval = (root / KIND).is_file() and "retrieval" in (root / KIND).read_text(
            encoding="utf-8", errors="replace"
        )
        tars = sorted(folder.glob("*.tar"), key=lambda tar: (len(tar.name), tar.name))
        if not tars:
            raise UserError(f"{folder}: no .tar there; name the folder of a split, such as {root}/test")
        self.samples: list[tuple[Path, dict[str, tuple[int, int]]]] = []
        for tar in tars:
            self.samples += [(tar, members) for members in _walk(tar) if any(kind in members for kind in PICTURES)]
        self.size = len(self.samples)
        if not self.size:
            raise UserError(f"{folder}: its tars hold no .jpg, .png or .webp")

    def read(self, sample: int) -> Example:
        tar, members = self.samples[sample]
        found = {}
        with open(tar, "rb") as file:
            for kind, (offset, size) in members.items():
                found[kind] = os.pread(file.fileno(), size, offset)
        try:
            metadata = json.loads(found["json"]) if "json" in found else {}
            # str.splitlines as in CLIP_benchmark: other rules would change the number of captions, and so the recall.
            captions = found.get("txt", b"").decode("utf-8", "replace").splitlines()
            if "cls" in found:
                metadata = {**metadata, "cls": int(found["cls"])}
        except (ValueError, TypeError) as error:
            raise Damaged(f"label or metadata not readable ({error})") from None
        image = next(found[kind] for kind in PICTURES if kind in found)
        return Example(image, [caption.strip() for caption in captions if caption.strip()], metadata)

    def beside(self, name: str) -> Path | None:
        return self.root / name if (self.root / name).is_file() else None

    def close(self) -> None:
        """Nothing stays open between reads."""


def _split(root: Path) -> Path:
    """The test split where there is one, else the only folder that holds tars."""
    found = sorted({tar.parent for tar in root.glob("*/*.tar")} | ({root} if any(root.glob("*.tar")) else set()))
    test = [folder for folder in found if folder.name == "test"]
    if len(test or found) != 1:
        raise UserError(f"{root}: name the split, such as {(found or [root / 'test'])[0]}")
    return (test or found)[0]


def _walk(path: Path) -> list[dict[str, tuple[int, int]]]:
    """(offset, size) of each member by its extension, sample by sample."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, kind = base.partition(".")
                if member.isreg() and stem:
                    samples.setdefault(f"{folder}/{stem}", {})[kind.lower()] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path}: not readable as a tar ({error}); copy it again") from None
    return list(samples.values())
