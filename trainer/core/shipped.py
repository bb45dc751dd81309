"""Finds the folders that RingLIP ships beside its modules, in an installed package and in a checkout."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

PACKAGE = Path(__file__).resolve().parents[1]


def shipped(name: Literal["ds_configs", "launch", "recipes"]) -> Path:
    """The folder of that name: trainer/NAME in an installed package, NAME at the top of a checkout (pyproject.toml maps
    one to the other). Raises FileNotFoundError where an installation lacks it."""
    for folder in (PACKAGE / name, PACKAGE.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"{PACKAGE / name} is missing: this installation of RingLIP is incomplete; reinstall it")
