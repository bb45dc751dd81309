"""What goes wrong where a Hugging Face model is read or made, as one line that names the recipe's key.

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
"""What transformers and the formats below it raise for files that are absent, cut, or of another kind. (torch's are
RuntimeErrors.)"""


@contextmanager
def reading(key: str, path: str, what: str) -> Iterator[None]:
    """Raises UserError for a ``path`` that is neither a directory nor a hub name, or whose ``what`` cannot be read
    within; RunFailed where the hub cannot be reached.
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
        if here:
            raise UserError(
                f"{key} {path!r}: {what} cannot be read there ({_words(error)}); copy or download it anew"
            ) from error
        if _unreachable(error):
            raise RunFailed(
                f"{key} {path!r} is no directory here, and {what} could not be fetched from the Hugging Face hub (no "
                "network, or HF_HUB_OFFLINE?): give a directory, or download it where there is a network"
            ) from error
        raise UserError(
            f"{key} {path!r} is neither a directory here nor a name on the Hugging Face hub whose "
            f"{what.removeprefix('its ')} can be read ({_words(error)})"
        ) from error


@contextmanager
def making(key: str) -> Iterator[None]:
    """Raises UserError in the library's own words for sizes of ``key`` that no model can be made of."""
    try:
        yield
    except (*UNREADABLE, TypeError, ArithmeticError, AssertionError) as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise UserError(f"{key}: no model can be made of it ({_words(error)}); change these sizes") from error


def _words(error: BaseException) -> str:
    return " ".join((repr(error) if isinstance(error, KeyError) else str(error) or type(error).__name__).split())[:200]


def _unreachable(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError):
            return True
        error = error.__cause__ or error.__context__
    return False
