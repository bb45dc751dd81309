"""Command-line parsing shared by all commands: a mistake is reported in one line, like a mistake in the data."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from typing import NoReturn

from data_tools.io.errors import UserError


class Parser(argparse.ArgumentParser):
    """A command's parser. ``about`` is the docstring of its module, printed verbatim by --help."""

    def __init__(self, command: str, about: str | None) -> None:
        super().__init__(
            prog=f"python -m data_tools {command}",
            description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Reports the mistake alone; argparse would bury it under a page of usage."""
        raise UserError(f"{message.removeprefix('argument ')}; `{self.prog} --help` says more")


def add_processes(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """The option that nearly every command has."""
    parser.add_argument(
        "--processes",
        type=whole(1),
        default=os.cpu_count() or 1,
        metavar="N",
        help="worker processes (default: all cores)",
    )


def whole(low: int, high: int | None = None) -> Callable[[str], int]:
    """An option type: an integer of at least ``low`` and, if given, at most ``high``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {_range(low, high)}")
        return value

    return parse


def number(low: float, high: float | None = None) -> Callable[[str], float]:
    """Like ``whole``, for any finite number."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {_range(low, high)}")
        return value

    return parse


def _range(low: float, high: float | None) -> str:
    return f"of {low:g} or more" if high is None else f"from {low:g} to {high:g}"
