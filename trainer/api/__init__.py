"""RingLIP from Python: ``import ringlip``. Importing it is cheap; what it names is loaded on first use."""

from trainer import __version__

__all__ = ["__version__"]
