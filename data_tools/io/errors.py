"""Errors that a user can fix, printed as one line that names the file or key and the remedy."""

from __future__ import annotations

import sys
from collections.abc import Callable

from data_tools.io.formatting import printable

AGAIN = "fix this and run again to continue"


class UserError(ValueError):
    """A user-fixable error. One line: what is wrong (the file or key) and the remedy. Commands print it without a
    traceback."""

    code = 2
    """Exit code: the same command would fail again, so a launcher does not restart it."""
    told = False
    """Whether the line has been printed already."""


def run_command(main: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """Runs a command's ``main(argv)`` and returns its exit code: a UserError becomes one line on stderr and its
    ``code``, Ctrl-C 130. Other exceptions pass."""
    try:
        return main(argv) or 0
    except UserError as error:
        if not error.told:
            print(printable(f"error: {error}"), file=sys.stderr, flush=True)
        return error.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
