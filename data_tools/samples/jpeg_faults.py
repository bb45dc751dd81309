"""Tells JPEGs with harmless faults from damaged ones, by libjpeg's warnings, and repairs the former.

A harmless fault lies outside of the entropy-coded data: every pixel is sound. ``mend`` removes or corrects the few
bytes in question and leaves the compressed pixels as they are; the result must then decode without any warning.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from data_tools.samples.reject import Reject


class Fault(NamedTuple):
    """One of libjpeg's warnings (jerror.h) or of turbojpeg's errors, and the decision."""

    message: str
    """Regular expression of the message."""
    note: str
    """How the sample's .json names it once mended; empty: the image is rejected."""
    why: str


FAULTS = (
    Fault("extraneous bytes before marker 0x(c|d[b-f]|e|fe)", "junk_bytes", "between the segments before the pixels"),
    Fault("extraneous bytes before marker 0xd9", "padding", "accepted where they are zeros; others are lost pixels"),
    Fault("extraneous bytes before marker", "", "the decoder lost its place in the pixels"),
    Fault("bad ICC marker", "icc_profile", "the colour profile is incomplete; it is removed"),
    Fault("Unknown Adobe color transform", "adobe_marker", "corrected to the code that libjpeg assumes"),
    Fault("unknown JFIF revision", "jfif_version", "corrected to 1.02"),
    Fault("Invalid SOS parameters", "scan_header", "fields that sequential JPEGs do not use; corrected"),
    Fault("Premature end of JPEG file", "end_marker", "accepted where only the last marker is missing"),
    Fault("premature end of data segment", "", "pixels are missing"),
    Fault("bad Huffman code", "", "pixels are damaged"),
    Fault("bad arithmetic code", "", "pixels are damaged"),
    Fault("instead of RST", "", "pixels are missing or damaged"),
    Fault("Inconsistent progression", "", "scans are missing or in the wrong order"),
)
"""The first that matches decides; a message that none matches is an error of libjpeg, and the image is rejected."""

MARKER = re.compile(rb"\xff+[^\x00\xff]")
"""A marker, its code in the last byte."""
_AFTER_SCAN = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")


def is_frame(code: int) -> bool:
    """Whether a marker's code begins a frame header (SOF0 .. SOF15), which holds the size: not DHT, JPG and DAC."""
    return 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC)


def fault(message: str) -> Fault | None:
    """The entry of ``FAULTS`` for a message of the decoder."""
    return next((found for found in FAULTS if re.search(found.message, message)), None)


def mend(data: bytes, message: str) -> tuple[bytes, str]:
    """(A JPEG without the harmless fault that ``message`` names, its note). Raises Reject for damaged pixels."""
    found = fault(message)
    note = found.note if found else ""
    mended = data
    if note in ("padding", "end_marker"):
        mended = _without_padding(data, message) if note == "padding" else _with_end(data)
    elif note:
        mended = _rewrite(data, note)
    if mended == data:
        raise Reject("truncated" if "remature end" in message else "corrupt")
    return mended, note


def _rewrite(data: bytes, note: str) -> bytes:
    """All segments up to the first scan without what lies between them, corrected where ``note`` says."""
    parts, at, components = [data[:2]], 2, 3
    while marker := MARKER.search(data, at):
        at, code = marker.end(), data[marker.end() - 1]
        if code in (0x01, *range(0xD0, 0xDA)):
            parts.append(bytes((0xFF, code)))
            continue
        length = int.from_bytes(data[at : at + 2], "big")
        body = bytearray(data[at : at + length])
        at += length
        if is_frame(code) and length > 7:
            components = body[7]
        if note == "icc_profile" and code == 0xE2 and body[2:14] == b"ICC_PROFILE\0":
            continue
        if note == "adobe_marker" and code == 0xEE and body[2:7] == b"Adobe" and length >= 14:
            body[13] = body[13] if body[13] <= 2 else 2 if components == 4 else 1
        if note == "jfif_version" and code == 0xE0 and body[2:7] == b"JFIF\0" and length >= 9:
            body[7:9] = b"\1\2"
        if note == "scan_header" and code == 0xDA and length >= 6:
            body[-3:] = b"\0\x3f\0"
        parts += [bytes((0xFF, code)), bytes(body)]
        if code == 0xDA:
            break
    return b"".join(parts) + data[at:]


def _without_padding(data: bytes, message: str) -> bytes:
    count = int(next(iter(re.findall(r"(\d+) extraneous", message)), 0))
    end = data.find(b"\xff\xd9", data.find(b"\xff\xda"))
    return data[: end - count] + data[end:] if end > count > 0 and not data[end - count : end].strip(b"\0") else data


def _with_end(data: bytes) -> bytes:
    """With an end marker, where all components are in one sequential scan: then libjpeg notices missing pixels."""
    scan, frame = data.rfind(b"\xff\xda"), _frame(data)
    if frame is None or scan < frame.end() or _AFTER_SCAN.search(data, scan + 2) or len(data) < frame.end() + 8:
        return data
    one_scan = data.find(b"\xff\xda", frame.end()) == scan and data[scan + 4 : scan + 5] == data[frame.end() + 7 :][:1]
    return data + b"\xff\xd9" if one_scan else data


def _frame(data: bytes) -> re.Match[bytes] | None:
    """The marker of a sequential frame's header; None for progressive and other frames."""
    at = 2
    while marker := MARKER.search(data, at):
        code = data[marker.end() - 1]
        if is_frame(code):
            return marker if code in (0xC0, 0xC1, 0xC9) else None
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return None
