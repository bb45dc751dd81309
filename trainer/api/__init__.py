"""RingLIP from Python: ``import ringlip``. Importing it is cheap; what it names is loaded on first use.

    ringlip.SigLipLoss(), ringlip.ClipLoss()    the losses with open_clip's signatures, for your own loop

Examples that run lie in tests/examples/: open_clip_loop, hf_trainer, fabric, accelerate_loop, ddp, fsdp2.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trainer import __version__

if TYPE_CHECKING:
    from trainer.losses.drop_in import ClipLoss, SigLipLoss

__all__ = ["ClipLoss", "SigLipLoss", "__version__"]

_HOME = {"ClipLoss": "trainer.losses.drop_in", "SigLipLoss": "trainer.losses.drop_in"}
"""Name -> the module that it is loaded from on first use."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ringlip' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
