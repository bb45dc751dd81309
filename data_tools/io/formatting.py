"""Numbers and untrusted text, as people read them on a terminal."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def count(number: float) -> str:
    """1234 -> 1,234; 1234567 -> 1.23M."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e5, "k")):
        if number >= limit:
            scaled = number / (1e3 if unit == "k" else limit)
            return f"{scaled:.2f}{unit}" if scaled < 100 else f"{scaled:.0f}{unit}"
    return f"{number:,.0f}" if number >= 10 or number == int(number) else f"{number:.1f}"


def duration(seconds: float) -> str:
    """3725 -> 1:02:05; days in front where there are some."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return (f"{days}d " if days else "") + f"{hours}:{minutes:02d}:{rest:02d}"


def human_bytes(size: float) -> str:
    """1,234,567 -> 1.2 MB."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def printable(text: str) -> str:
    """Text from outside (captions, keys, file names) for a terminal: control characters are shown as \\xNN, so that it
    cannot move the cursor, change colours or forge a line. Line breaks and tabs stay."""
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def distinct_ends(paths: list[str], least: int = 1) -> list[str]:
    """The last parts of each path: as many as tell all apart, ``least`` at least. Equal paths get a number."""
    parts = [[part for part in path.split("/") if part] or [path] for path in paths]
    longest = max(map(len, parts), default=0)
    for length in range(min(least, longest), longest + 1):
        ends = ["/".join(part[-length:]) for part in parts]
        if len(set(ends)) == len(ends):
            return ends
    return [f"{path} ({number})" for number, path in enumerate(paths, 1)]
