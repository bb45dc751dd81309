"""Models from wherever they lie, and one model whose weights are a mean of several.

model, source = load_model("runs/quickstart")
mean = blend([model, other], [0.5, 0.5])

The mean of several finetuned models that began from the same weights is often better than each of them, at the cost of
one (model soups, Wortsman et al., arXiv 2203.05482); a mean of a finetuned model and what it began from keeps what that
could do elsewhere (WiSE-FT, Wortsman et al., arXiv 2109.01903). The mean is of whole models: adapters are merged first.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor

from trainer import checkpoint, config
from trainer.core import distributed
from trainer.core.types import UserError
from trainer.models import DualEncoder


def load_model(where: str, average: bool = False) -> tuple[DualEncoder, str]:
    """(the model on this rank's device, where its weights came from) for a run directory, one of its checkpoints, a
    Hugging Face directory or a hub name; with ``average`` a run's averaged weights. Raises UserError where there is
    none of these.
    """
    path = Path(where)
    run = path if (path / "recipe.yaml").is_file() else path.parent.parent
    if (run / "recipe.yaml").is_file() and (run == path or (path / "checkpoint.json").is_file()):
        chosen, _ = checkpoint.find_best(path)
        model, folder = checkpoint.load_model(config.load(run / "recipe.yaml").model, chosen, average)
        where = str(folder)
    elif (path / "adapter_config.json").is_file():
        raise UserError(
            f"{where}: an adapter, not a model: name its run, or what `python -m trainer.export --merge` makes of it"
        )
    elif path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"{where}: neither a run (recipe.yaml), nor a checkpoint of one, nor a Hugging Face model (config.json)"
        )
    elif average:
        raise UserError(
            f"{where}: --ema takes the averaged weights of a run, but an exported model has only one set; remove --ema"
        )
    else:
        try:
            model = DualEncoder.from_pretrained(where)
        except UserError as error:
            raise type(error)(str(error).removeprefix("model.path ")) from error  # there is no recipe here
    return model.to(distributed.device()).eval(), where


def whole(model: DualEncoder) -> DualEncoder:
    """The same model without an adapter or a bottleneck: merged, multiplied out."""
    if model.settings.lora is None and not model.settings.token_bottleneck:
        return model
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return DualEncoder.from_pretrained(folder)


@torch.no_grad()
def blend(models: Sequence[DualEncoder], shares: Sequence[float], names: Sequence[str]) -> DualEncoder:
    """The model whose every parameter is the sum of ``shares`` times those of ``models``, in float64 (the temperature's
    is its logarithm); it takes the first one's place. ``names`` are for messages: raises UserError for models that do
    not have the same parameters or read other inputs.
    """
    plain = [whole(model) for model in models]
    states = [model.state_dict() for model in plain]
    for name, model, state in zip(names[1:], plain[1:], states[1:], strict=True):
        _check_alike(names[0], name, plain[0], model)
        _check_shapes(names[0], name, states[0], state)
    for name, target in states[0].items():
        if target.is_floating_point():
            parts = [share * state[name].double() for share, state in zip(shares, states, strict=True)]
            target.copy_(torch.stack(parts).sum(dim=0))
    return plain[0]


def _check_shapes(first: str, other: str, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        shapes = [str(list(state[name].shape)) if name in state else "absent" for state in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise UserError(f"{other} is another model than {first}: {name} is {shapes[1]} there and {shapes[0]} here")


def _check_alike(first: str, other: str, ours: DualEncoder, theirs: DualEncoder) -> None:
    """Weights that read other pixels or tokens cannot be averaged even where their shapes are equal."""
    for field in fields(ours.preprocess):
        a, b = (getattr(model.preprocess, field.name) for model in (ours, theirs))
        if field.name == "tokenize":
            a, b = (tokenize([PROBE])[0].tolist() for tokenize in (a, b))
        if a != b:
            raise UserError(f"{other} is another model than {first}: its {field.name} differs ({b} there, {a} here)")


PROBE = "The quick brown fox jumps over 13 lazy dogs, doesn't it?"
"""A caption whose tokens tell tokenizers apart."""
