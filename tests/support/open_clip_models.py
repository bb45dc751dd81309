"""open_clip's own models, imported without torchvision, whose wheel does not import beside a CPU build of torch.

    open_clip = import_open_clip()      # skips the test where open_clip is not installed

Models and tokenizers need nothing of torchvision; its transforms stay out of these tests.
"""

from __future__ import annotations

import enum
import importlib
import importlib.machinery
import sys
import types
from typing import Any

import pytest

INSTALL = "pip install --no-deps open_clip_torch timm ftfy wcwidth regex"
STUBS = (
    "torchvision",
    "torchvision.transforms",
    "torchvision.transforms.functional",
    "torchvision.ops",
    "torchvision.ops.misc",
    "torchvision.models",
    "torchvision.models.feature_extraction",
    "torchvision.datasets",
)


class InterpolationMode(enum.Enum):
    """torchvision's names, which timm reads as it is imported."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _Stub(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return InterpolationMode if name == "InterpolationMode" else type(name, (), {})


def import_open_clip() -> Any:
    """The module; torchvision's stubs are gone again when this returns."""
    if "open_clip" in sys.modules:
        return sys.modules["open_clip"]
    if importlib.util.find_spec("open_clip") is None or importlib.util.find_spec("timm") is None:
        pytest.skip(f"needs open_clip: {INSTALL}")
    stubs = {name: _Stub(name) for name in STUBS}
    for name, stub in stubs.items():
        stub.__spec__, stub.__path__ = importlib.machinery.ModuleSpec(name, None), []
        if "." in name:
            parent, _, child = name.rpartition(".")
            setattr(stubs[parent], child, stub)
    sys.modules.update(stubs)
    try:
        return importlib.import_module("open_clip")
    finally:
        for name in STUBS:
            del sys.modules[name]
