"""Command lines of the commands: mistakes are one line, as those in the data are."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from typing import NoReturn

from data_tools.io.errors import UserError


class Parser(argparse.ArgumentParser):
    """A command's parser. ``about`` is the docstring of its module, shown as it stands."""

    def __init__(self, command: str, about: str | None) -> None:
        super().__init__(
            prog=f"python -m data_tools {command}",
            description=about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Instead of argparse's page of usage, in which the mistake is lost."""
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
    """The type of an option: a whole number from ``low`` on, up to ``high`` where there is such a limit."""

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
    """As ``whole`` for any number; neither nan nor inf is one."""

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
