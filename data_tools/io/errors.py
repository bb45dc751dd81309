"""What a user can mend: one line that names the file or key and the remedy."""

from __future__ import annotations

import sys
from collections.abc import Callable

AGAIN = "mend that and run again to continue"


class DataError(ValueError):
    """A mistake the user can mend. One line: what is wrong (the file or key) and the remedy. Verbs print it without a
    traceback."""


def run_verb(main: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """Runs a verb's ``main(argv)`` and gives its exit code: a DataError is one line on stderr and 2, Ctrl-C is 130."""
    try:
        return main(argv) or 0
    except DataError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except BrokenPipeError:  # `... | head`: the reader has seen enough
        sys.stderr.close()
        return 0
    except OSError as error:  # a full disk, missing rights, a lost mount: it names its file itself
        print(f"error: {error}; {AGAIN}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return 130
