"""DataCompDR's tars as they are (Hugging Face apple/DataCompDR-12M; MobileCLIP, arXiv 2311.17049): beside KEY.jpg and
KEY.txt, KEY.syn.json has synthetic captions ({"syn_text": [...]}), KEY.paug.json the parameters of k augmentations
({"param_aug": [...]}) and KEY.npz two teachers' embeddings of them (image_emb [k, d]) and of the captions (text_emb
[1 + c, d]: that of KEY.txt first).

    data.caption=[txt,syn_text] distill.stored=npz

The places of these members are found from the tars' headers, once, and kept in data.cache_dir.
"""

from __future__ import annotations

import io
import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from data_tools.format.index import load_array
from data_tools.format.scan import hash_key
from data_tools.format.tar_reader import walk
from data_tools.io.files import atomic_file
from trainer.core.types import Preprocess, UserError
from trainer.data.paug import replay
from trainer.data.transforms import Damaged, decode

if TYPE_CHECKING:
    from trainer.data.settings import DataSettings
    from trainer.data.sharded_dataset import ShardedDataset

STORED, SYNTHETIC = "npz", "syn_text"
"""What distill.stored and data.caption call them."""
KINDS = ("syn.json", "paug.json", "npz")
PLACE = np.dtype([("key_hash", "<u8"), ("offset", "<u8", 3), ("size", "<u4", 3)])
"""Of one sample, in the order of KINDS; a size of 0: it has no such member."""
LOOKED_AT = 100
LARGEST = 2**26
"""Bytes of an npz when unpacked: DataCompDR's have 220 KB."""
TEACHER_WIDTH, TEACHER_SCALE = 768, 100.0
"""Of each of DataCompDR's teachers, two ViT-L/14, and the temperature that its authors train with."""


def places(path: str, cache_dir: str) -> NDArray[np.void]:
    """The members of one local tar, dtype PLACE, sorted by key; from the cache if the tar has not changed."""
    stat = os.stat(path)
    stamp = f"{os.path.abspath(path)}\n{stat.st_size}\n{stat.st_mtime_ns}"
    kept = Path(cache_dir).expanduser() / "indexes" / f"{xxhash.xxh3_128_hexdigest(stamp.encode())}.dr"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        found: dict[str, NDArray[np.void]] = {}
        for member in walk(path, []):
            for number, kind in enumerate(KINDS):
                if member.name.endswith(f".{kind}"):
                    row = found.setdefault(member.name.removesuffix(f".{kind}"), np.zeros(1, PLACE))
                    row["offset"][0, number], row["size"][0, number] = member.offset, member.size
        rows = np.concatenate([np.zeros(0, PLACE), *found.values()])
        rows["key_hash"] = [hash_key(key) for key in found]
        with atomic_file(kept) as file:
            np.save(file, np.sort(rows, order="key_hash"))
    return load_array(str(kept))


def place_of(rows: NDArray[np.void], key_hash: int, kind: str) -> tuple[int, int]:
    """(Offset, size) of a sample's member. Raises Damaged if it has none."""
    at = int(np.searchsorted(rows["key_hash"], np.uint64(key_hash)))
    number = KINDS.index(kind)
    if at == len(rows) or rows["key_hash"][at] != key_hash or rows["size"][at, number] == 0:
        raise Damaged(f"no .{kind}")
    return int(rows["offset"][at, number]), int(rows["size"][at, number])


def synthetic_captions(data: bytes) -> list[str]:
    """The texts of a syn.json. Raises Damaged."""
    found = _json(data, "syn.json").get(SYNTHETIC)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise Damaged(f"its syn.json has no list {SYNTHETIC!r}")
    return found


class NpzViews:
    """The embeddings in the tars of one dataset as a stored teacher (StoredViews in stored_teacher.py). Raises
    UserError where the tars have none, or the settings do not fit them."""

    whole_images = False

    def __init__(self, source: ShardedDataset, settings: DataSettings, preprocess: Preprocess) -> None:
        self.source, self.settings = source, settings
        where = f"{source.dataset.root}: distill.stored npz"
        if settings.augment.active:
            raise UserError(f"{where}: its images are augmented as their paug.json says; remove data.augment")
        if preprocess.resize == "patches":
            raise UserError(f"{where}: its crops have no aspect of their own; take a model that is not NaFlex")
        unknown = [field for field in source.fields if field not in ("txt", SYNTHETIC)]
        if unknown:
            raise UserError(f"{where} is of the captions txt and {SYNTHETIC}, not {unknown[0]}: set data.caption")
        images, texts, count = self._first(where)
        self.views, width = images.shape
        if count != self.views or texts.shape[1] != width or width % TEACHER_WIDTH:
            raise UserError(
                f"{where}: its first sample has {count} augmentations, image_emb {list(images.shape)} and text_emb "
                f"{list(texts.shape)}, not k, [k, d] and [c, d] with d a multiple of {TEACHER_WIDTH}"
            )
        self.dtype: type[Any] = np.float16 if images.dtype == texts.dtype == np.float16 else np.float32
        one = {"path": f"{STORED} in the tars", "width": TEACHER_WIDTH, "scale": TEACHER_SCALE}
        self.teachers: list[dict[str, Any]] = [{**one, "number": number} for number in range(width // TEACHER_WIDTH)]

    @property
    def widths(self) -> list[int]:
        """As StoredViews."""
        return [TEACHER_WIDTH for _ in self.teachers]

    def check(self, sample: int) -> None:
        """As StoredViews; nothing is known of a sample before it is read."""

    def read(self, sample: int, view: int, group: int) -> NDArray[Any]:
        """As StoredViews."""
        images, texts = self._arrays(sample)
        number = self.source.texts_with_synthetic(sample, group)
        if images.shape[1] != sum(self.widths) or view >= len(images) or number >= len(texts):
            raise Damaged(f"its npz has image_emb {list(images.shape)} and text_emb {list(texts.shape)}")
        return np.concatenate([images[view], texts[number]])

    def picture(self, image: bytes, sample: int, view: int, preprocess: Preprocess) -> torch.Tensor:
        """As StoredViews."""
        parameters = self._parameters(sample)
        if view >= len(parameters):
            raise Damaged(f"its paug.json has {len(parameters)} augmentations")
        return replay(decode(image, self.settings.max_pixels), parameters[view], preprocess.image_size)

    def _first(self, where: str) -> tuple[NDArray[Any], NDArray[Any], int]:
        """Embeddings and number of augmentations of the first sample that has them."""
        said = ""
        for sample in range(min(self.source.size, LOOKED_AT)):
            try:
                return *self._arrays(sample), len(self._parameters(sample))
            except Damaged as error:
                said = said or f"{self.source.key(sample)}: {error}"
        raise UserError(f"{where}: no embeddings in the tars ({said}); name tars of DataCompDR's layout")

    def _arrays(self, sample: int) -> tuple[NDArray[Any], NDArray[Any]]:
        data = io.BytesIO(self.source.member(sample, "npz"))
        try:
            with np.load(data, allow_pickle=False) as arrays:
                if sum(info.file_size for info in arrays.zip.infolist()) > LARGEST:
                    raise Damaged("its npz is too large")
                images, texts = arrays["image_emb"], arrays["text_emb"]
        except (ValueError, KeyError, OSError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
            raise Damaged(f"its npz cannot be read ({error})") from None
        if images.ndim != 2 or texts.ndim != 2 or images.dtype.kind != "f" or texts.dtype.kind != "f":
            raise Damaged("its npz does not have image_emb [k, d] and text_emb [c, d] of floating-point numbers")
        return images, texts

    def _parameters(self, sample: int) -> list[Any]:
        found = _json(self.source.member(sample, "paug.json"), "paug.json").get("param_aug")
        if isinstance(found, str):  # as the data set's viewer exports it
            found = _json(b'{"list": ' + found.encode() + b"}", "paug.json").get("list")
        if not isinstance(found, list):
            raise Damaged("its paug.json has no list 'param_aug'")
        return found


def _json(data: bytes, kind: str) -> dict[str, Any]:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"its {kind} is not valid JSON ({error})") from None
    return tree if isinstance(tree, dict) else {}
