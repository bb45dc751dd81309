"""``python -m data_tools COMMAND ...``: one module of data_tools/commands per command, imported when it is called."""

from __future__ import annotations

import importlib
import io
import sys

from data_tools.commands import COMMANDS
from data_tools.io.command_table import check_command, usage
from data_tools.io.errors import AGAIN, run_command
from data_tools.io.formatting import printable

PROGRAM = "python -m data_tools"
GROUPS = {"Data": COMMANDS}


def main(argv: list[str]) -> int:
    """Runs ``COMMAND ...``; the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        print(usage(PROGRAM, GROUPS))
        return 0 if argv else 2
    try:
        return run_command(_run, argv)
    except BrokenPipeError:  # as in `... | head`
        sys.stderr.close()
        return 0
    except OSError as error:  # a full disk, missing rights, a lost mount: the message names its file
        print(printable(f"error: {error}; {AGAIN}"), file=sys.stderr, flush=True)
        return 2


def _run(argv: list[str]) -> int | None:
    check_command(PROGRAM, GROUPS, argv[0])
    module = importlib.import_module(f"data_tools.commands.{argv[0]}")
    return module.main(argv[1:])


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # Keys in tars of other tools need not be UTF-8: print them all the same.
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main(sys.argv[1:]))
