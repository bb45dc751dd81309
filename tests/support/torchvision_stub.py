"""open_clip imports torchvision, whose wheel does not load beside a CPU torch (shared facts): names in its place.

Only what open_clip's modules name as they are imported; its training loop, models and losses use none of it.
"""

import importlib.util
import sys
from types import ModuleType
from typing import Any

NAMES = [
    "Normalize",
    "Compose",
    "RandomResizedCrop",
    "InterpolationMode",
    "ToTensor",
    "Resize",
    "CenterCrop",
    "ColorJitter",
    "Grayscale",
]


class _Absent:
    """Stands for a class of torchvision; using it fails."""

    BICUBIC = BILINEAR = None

    def __init__(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("torchvision is not here")


def install() -> None:
    """Puts the names where open_clip looks for them, unless the real torchvision is installed."""
    if "torchvision" in sys.modules or importlib.util.find_spec("torchvision") is not None:
        return
    modules = {name: ModuleType(name) for name in ("torchvision", "torchvision.transforms", "torchvision.ops")}
    modules |= {name: ModuleType(name) for name in ("torchvision.transforms.functional", "torchvision.ops.misc")}
    for name in NAMES:
        setattr(modules["torchvision.transforms"], name, type(name, (_Absent,), {}))
    modules["torchvision.ops.misc"].FrozenBatchNorm2d = type("FrozenBatchNorm2d", (_Absent,), {})  # type: ignore[attr-defined]
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
        sys.modules[name] = module
