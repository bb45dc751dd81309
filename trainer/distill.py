"""Distillation: a frozen teacher embeds the same batch, and the student's similarities are trained to match its own
(trainer/losses/distill.py).

    python -m trainer.train RECIPE distill.teacher=openai/clip-vit-large-patch14 distill.weight=1

The teacher is outside the engine: complete on every rank, without gradient, in evaluation mode, in the engine's
precision. It gets the pixels and tokens that the loader made for the student (each model normalises pixels itself),
without dropped patches or tokens. It is not part of checkpoints: a fingerprint tells a resumed run whether it is the
same teacher.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field

from trainer.core import distributed
from trainer.core.settings import Settings
from trainer.core.types import Batch, Embeddings, Preprocess, UserError
from trainer.engine.precision import DTYPES, Precision
from trainer.models import DualEncoder, ModelSettings, build
from trainer.models.adapt.lock import LockSettings
from trainer.models.adapt.lora import hold_base
from trainer.models.precomputed import fingerprint, token_inputs


class DistillSettings(Settings):
    """A teacher whose similarities over the global batch the student is trained to match (CLIP-KD, arXiv 2307.12732;
    TinyCLIP, arXiv 2309.12314)."""

    teacher: str
    "Directory or hub name of a Hugging Face CLIP or SigLIP model with the student's image size and tokenizer."
    weight: float = Field(default=1.0, gt=0)
    "Weight of the divergence from the teacher, relative to the recipe's loss."

    @property
    def model(self) -> ModelSettings:
        """The teacher as a model section, with locked towers."""
        return ModelSettings(path=self.teacher, lock=LockSettings(image=True, text=True))


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
        if recorded is None:
            return
        if any(recorded.get(key) != value for key, value in self.identity.items()):
            raise UserError(
                f"distill.teacher {self.path!r} is not the teacher that this run started with ({recorded['path']!r}): "
                "use that one, or start another run.directory"
            )


def build_teacher(settings: DistillSettings, student: Preprocess, precision: Precision) -> TeacherModel:
    """Loads the teacher. Raises UserError for a path without a model, or one that cannot use the student's inputs."""
    try:
        model = build(settings.model)
    except UserError as error:
        raise type(error)(str(error).replace("model.path", "distill.teacher")) from error
    check_inputs(settings.teacher, student, model.preprocess)
    return TeacherModel(model, settings.teacher, precision)


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
