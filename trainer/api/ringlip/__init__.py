"""RingLIP's Python API, under the name that it is installed as (pyproject.toml: package-dir).

Everything here is trainer.api's: this package holds no code, so that no class exists twice.
"""

from typing import TYPE_CHECKING, Any

from trainer import api

if TYPE_CHECKING:
    from trainer.api import *  # noqa: F403


def __getattr__(name: str) -> Any:
    try:
        return getattr(api, name)
    except AttributeError:
        raise AttributeError(f"module 'ringlip' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return dir(api)
