"""Tables of commands: the help that lists them, and a suggestion for a mistyped name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from data_tools.io.errors import UserError

Groups = Mapping[str, Mapping[str, str]]
"""Title of a group -> command -> what it does, in one line."""


def usage(program: str, groups: Groups) -> str:
    """The help of ``program``: its commands by group, one line each."""
    lines = [f"usage: {program} COMMAND ...    ({program} COMMAND --help says more)"]
    for title, commands in groups.items():
        lines += ["", f"{title}:", *(f"  {name:<11} {about}" for name, about in commands.items())]
    return "\n".join(lines)


def check_command(program: str, groups: Groups, name: str) -> None:
    """Raises UserError with the nearest name where there is no command ``name``."""
    known = [command for commands in groups.values() for command in commands]
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
        raise UserError(f"{program}: no command {name!r}; {hint}")
