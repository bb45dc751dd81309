"""Distillation: a frozen teacher embeds the same batch, and the student's similarities are trained to match its own
(trainer/losses/distill.py).

    python -m trainer.train RECIPE distill.teacher=openai/clip-vit-large-patch14 distill.weight=1

    python -m trainer.embed RECIPE distill.teacher=runs/large distill.stored=large --views 8       # once
    python -m trainer.train RECIPE distill.stored=large                        # and never again: dataset reinforcement

A teacher that is run is outside the engine: complete on every rank, without gradient, in evaluation mode, in the
engine's precision. It gets the pixels and tokens that the loader made for the student (each model normalises pixels
itself), without dropped patches or tokens. It is not part of checkpoints: a fingerprint tells a resumed run whether it
is the same teacher. A stored teacher (MobileCLIP, arXiv 2311.17049) is only read: its embeddings of the view drawn and
of the caption drawn come with the batch (trainer/data/stored_teacher.py).
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, field_validator, model_validator

from trainer.core import distributed
from trainer.core.settings import Settings
from trainer.core.types import Batch, Embeddings, Preprocess, UserError
from trainer.data.open import open_source
from trainer.data.settings import DataSettings
from trainer.data.stored_teacher import open_stored
from trainer.engine.precision import DTYPES, Precision
from trainer.models import DualEncoder, ModelSettings, build
from trainer.models.adapt.lock import LockSettings
from trainer.models.adapt.lora import hold_base
from trainer.models.precomputed import NAME, fingerprint, token_inputs


class DistillSettings(Settings):
    """A teacher whose similarities over the global batch the student is trained to match (CLIP-KD, arXiv 2307.12732;
    TinyCLIP, arXiv 2309.12314)."""

    teacher: str | list[str] | None = None
    """Directory or hub name of a Hugging Face CLIP or SigLIP model with the student's image size and tokenizer. With
    `stored`, `python -m trainer.embed` runs it, training does not need it, and it may be several, with image sizes and
    tokenizers of their own."""
    stored: str | None = None
    """Read the teacher's embeddings from these columns, which `python -m trainer.embed` has written: training draws one
    of the views that they are of, and never loads the teacher (MobileCLIP, arXiv 2311.17049). `npz`: what
    the tars of DataCompDR hold themselves, two teachers at temperature 100; data.caption=[txt,syn_text] then draws
    synthetic captions too."""
    weight: float = Field(default=1.0, gt=0)
    "Weight of the divergence from the teacher, relative to the recipe's loss."

    @field_validator("stored")
    @classmethod
    def _a_name(cls, value: str | None) -> str | None:
        if value is not None and not NAME.fullmatch(value):
            raise ValueError(f"{value!r} cannot name a column: letters, digits, _, - and . after the first are known")
        return value

    @model_validator(mode="after")
    def _one_that_is_run(self) -> DistillSettings:
        if not self.teachers and self.stored is None:
            raise ValueError("teacher: name one, or the stored embeddings of one (stored)")
        if len(self.teachers) > 1 and self.stored is None:
            raise ValueError("teacher: several are not run beside the student; store them (stored: NAME)")
        return self

    @property
    def teachers(self) -> list[str]:
        """The paths given."""
        return [self.teacher] if isinstance(self.teacher, str) else self.teacher or []

    @property
    def model(self) -> ModelSettings:
        """The teacher that is run as a model section, with locked towers."""
        return teacher_section(self.teachers[0])


def teacher_section(path: str) -> ModelSettings:
    """A teacher as a model section, with locked towers."""
    return ModelSettings(path=path, lock=LockSettings(image=True, text=True))


class TeacherModel:
    """Embeds a batch with the teacher; draws no random numbers, so that the student's are the same with and without
    it."""

    def __init__(self, model: DualEncoder, path: str, precision: Precision = "fp32") -> None:
        self.path, self.dtype = path, DTYPES[precision]
        towers, preprocess = model.towers, model.preprocess
        self.identity: dict[str, Any] = {
            "image": fingerprint(towers, preprocess, "image"),
            "text": fingerprint(towers, preprocess, "text"),
            "scale": model.head.logit_scale.item(),
        }
        """Identifies the teacher, independent of its path."""
        self.model = model.requires_grad_(False).eval().to(distributed.device())
        if self.dtype != torch.float32:
            hold_base(towers, self.dtype)

    @torch.no_grad()
    def __call__(self, batch: Batch, rows: int) -> Embeddings:
        """[b, k] float32 embeddings of the local batch, ``rows`` pairs at a time, and the teacher's scale and bias."""
        device = distributed.device()
        image, text = (torch.empty(batch.rows, self.model.embed_dim, device=device) for _ in range(2))
        with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
            scale, bias = self.model.head()
            for index, part in enumerate(batch.split(rows)):
                micro, places = part.to(device), slice(index * rows, index * rows + part.rows)
                image[places] = self.model.embed_images(micro.pixels)
                text[places] = self.model.embed_texts(micro.tokens, micro.token_mask)
        return Embeddings(image, text, scale, bias)

    @property
    def record(self) -> dict[str, Any]:
        """The teacher's entry in a checkpoint."""
        return {"path": self.path, **self.identity}

    def check_resumed(self, recorded: dict[str, Any] | None) -> None:
        """Raises UserError if the run had another teacher before; a run without one may continue with this one."""
        _check_resumed(f"distill.teacher {self.path!r}", self.identity, recorded)


class StoredTeacher:
    """Hands out what the loader has read of the teachers' embeddings, an Embeddings for each teacher."""

    def __init__(self, name: str, teachers: list[dict[str, Any]]) -> None:
        self.name, self.teachers = name, teachers

    def __call__(self, batch: Batch, rows: int) -> list[Embeddings]:
        """Embeddings of the local batch as they were stored, float32, each with its teacher's scale."""
        whole = batch.taught.to(distributed.device(), non_blocking=True).float()
        sizes = [int(one["width"]) for one in self.teachers]
        parts = whole.split([*sizes, *sizes], dim=1)
        scales = [torch.tensor([float(one["scale"])], device=whole.device) for one in self.teachers]
        pairs = zip(parts[: len(sizes)], parts[len(sizes) :], scales, strict=True)
        return [Embeddings(image, text, scale, torch.zeros_like(scale)) for image, text, scale in pairs]

    @property
    def record(self) -> dict[str, Any]:
        """As TeacherModel."""
        paths = ", ".join(one["path"] for one in self.teachers)
        return {"path": paths, "stored": [_identity(one) for one in self.teachers]}

    def check_resumed(self, recorded: dict[str, Any] | None) -> None:
        """As TeacherModel."""
        _check_resumed(f"distill.stored {self.name!r}", {"stored": self.record["stored"]}, recorded)


def _identity(teacher: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in teacher.items() if key not in ("path", "width")}


def _check_resumed(what: str, identity: dict[str, Any], recorded: dict[str, Any] | None) -> None:
    if recorded is not None and any(recorded.get(key) != value for key, value in identity.items()):
        raise UserError(
            f"{what} is not the teacher that this run started with ({recorded['path']!r}): use that one, or start "
            "another run.directory"
        )


def build_teacher(
    settings: DistillSettings, student: Preprocess, precision: Precision, data: DataSettings
) -> TeacherModel | StoredTeacher:
    """Loads the teacher, or opens its stored embeddings. Raises UserError for a path without a model, or one that
    cannot use the student's inputs, and for columns that do not fit."""
    if settings.stored is not None:
        sources = [open_source(source, data) for source in data.sources]
        teachers = open_stored(sources, settings.stored, data, student)[0].teachers
        made_by = [one["path"] for one in teachers]
        if settings.teachers and settings.teachers != made_by:
            raise UserError(
                f"distill.stored {settings.stored!r} is of the teacher {', '.join(made_by)}, distill.teacher names "
                f"{', '.join(settings.teachers)}: remove distill.teacher, or store that one under another name"
            )
        return StoredTeacher(settings.stored, teachers)
    model = load_teacher(settings.teachers[0])
    check_inputs(settings.teachers[0], student, model.preprocess)
    return TeacherModel(model, settings.teachers[0], precision)


def load_teacher(path: str) -> DualEncoder:
    """A teacher as it is saved. Raises UserError for a path without a model."""
    try:
        return build(teacher_section(path))
    except UserError as error:
        raise type(error)(str(error).replace("model.path", "distill.teacher")) from error


def check_inputs(path: str, student: Preprocess, teacher: Preprocess) -> None:
    """Raises UserError if the student's pixels or tokens have another meaning for the teacher.

    Mean and standard deviation may differ: pixels are bytes, and each model normalises them itself.
    """
    compared = (
        ("images resized by", student.resize, teacher.resize, "take a teacher of the student's kind"),
        (
            "images of",
            student.image_size,
            teacher.image_size,
            f"set model.image_size={teacher.image_size[0]}, or take another teacher",
        ),
        (
            "captions of",
            student.num_tokens,
            teacher.num_tokens,
            f"set model.num_tokens={teacher.num_tokens}, or take another teacher",
        ),
    )
    for what, mine, theirs, remedy in compared:
        if mine != theirs:
            units = {"captions of": " tokens", "images of": " pixels"}.get(what, "")
            raise UserError(
                f"distill.teacher {path!r} needs {what} {theirs}{units}, but the student's are {mine}: {remedy}"
            )
    if token_inputs(student) != token_inputs(teacher):
        raise UserError(
            f"distill.teacher {path!r} has another tokenizer than the student: take a teacher with the student's, or "
            f"train the student with model.tokenizer={path}"
        )
