"""Turns errors of reading or creating a Hugging Face model into one line that names the recipe's key.

with reading("model.path", path, "its config"):
    config = AutoConfig.from_pretrained(path)
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

from trainer.core.types import RunFailed, UserError, is_out_of_memory

UNREADABLE = (
    OSError,
    ValueError,
    ImportError,
    KeyError,
    RuntimeError,
    EOFError,
    SafetensorError,
    pickle.UnpicklingError,
)
"""Exceptions of transformers and its file formats for missing, incomplete or wrong files. (torch raises
RuntimeError.)"""


@contextmanager
def reading(key: str, path: str, what: str) -> Iterator[None]:
    """Raises UserError if ``path`` is neither a directory nor a hub name, or if the block cannot read its ``what``;
    RunFailed if the hub cannot be reached.
    """
    here = Path(path).is_dir()
    if not here:
        try:
            validate_repo_id(path)
        except HFValidationError:
            raise UserError(
                f"{key} {path!r} is neither a directory here nor a name on the Hugging Face hub: check the path"
            ) from None
    try:
        yield
    except UNREADABLE as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{key} {path!r}: {what} needs Python code from that model's files, which RingLIP never runs; choose a "
                "model whose classes are in transformers"
            ) from error
        if here:
            raise UserError(
                f"{key} {path!r}: {what} cannot be read there ({_words(error)}); copy or download it again"
            ) from error
        if _unreachable(error):
            raise RunFailed(
                f"{key} {path!r} is not a local directory, and {what} could not be fetched from the Hugging Face hub "
                "(no "
                "network, or HF_HUB_OFFLINE?): give a directory, or download it where there is a network"
            ) from error
        raise UserError(
            f"{key} {path!r} is neither a directory here nor a name on the Hugging Face hub whose "
            f"{what.removeprefix('its ')} can be read ({_words(error)})"
        ) from error


@contextmanager
def making(key: str) -> Iterator[None]:
    """Raises UserError, with the library's message, if ``key`` does not describe a valid model."""
    try:
        yield
    except (*UNREADABLE, TypeError, ArithmeticError, AssertionError) as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise UserError(f"{key}: invalid model config ({_words(error)}); change these sizes") from error


def _words(error: BaseException) -> str:
    return " ".join((repr(error) if isinstance(error, KeyError) else str(error) or type(error).__name__).split())[:200]


def _unreachable(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError):
            return True
        error = error.__cause__ or error.__context__
    return False
