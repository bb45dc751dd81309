"""Reasons for leaving a sample out: one word each, in ``rejects.jsonl``, the manifest and the progress line."""

from __future__ import annotations

REASONS = {
    "row_malformed": "not a row of the table (a carriage return outside of quotes; JSON that is not an object)",
    "not_utf8": "a row, caption or .json that is not UTF-8 (for a table try --encoding cp1252 or another)",
    "not_json": "a row or .json that is invalid JSON, or nested too deep",
    "wrong_fields": "more or fewer fields in the row than columns in the header (an unquoted delimiter perhaps)",
    "image_missing": "no image is named, or a caption has no image beside it",
    "image_type": "the image column holds neither bytes nor the name of a file",
    "image_encoding": "an image in base64 or a data: URL that cannot be decoded",
    "web_address": "the image is on the web: fetch it with img2dataset",
    "file_missing": "the image's file does not exist",
    "file_unreadable": "the image's file cannot be read",
    "file_too_large": "the image's file is larger than --max-bytes",
    "empty_file": "the image has 0 bytes",
    "html": "the file holds a web page, not an image",
    "svg": "the file holds vector graphics",
    "unknown_format": "the file is not an image in a known format",
    "rare_format": "a format that is read only on request (--formats), or never",
    "truncated": "the image ends too early",
    "corrupt": "the image is damaged: a checksum or its compressed data is wrong",
    "pixel_format": "pixels that have no defined brightness: float or 32-bit integers",
    "too_many_pixels": "width x height in the header is above --max-pixels (nothing was decoded)",
    "too_much_memory": "decoding the image takes more than --max-memory",
    "too_slow": "decoding the image takes more than --max-seconds of CPU time",
    "decoder_crashed": "the decoder of the image's format crashed",
    "too_small": "a side is below --min-side",
    "too_elongated": "the longer side is more than --max-aspect times the shorter one",
    "caption_missing": "no caption, or null",
    "caption_type": "the caption's column does not hold text",
    "caption_empty": "the caption is empty after cleaning",
    "missing_text": "an image in a tar without its text",
    "missing_image": "a text in a tar without its image",
    "duplicate_key": "a second member of the same name in a tar (both are kept where both are whole)",
    "bad_header": "a damaged header in a tar; reading continues at the next intact one",
    "cut_in_member": "the tar ends inside a member",
    "no_end_marker": "the tar has no end marker: it was cut off",
    "concatenated": "a second archive follows in the same tar; it is read too",
    "link": "a link in a tar: never followed",
    "special_file": "a device or pipe in a tar: never created",
    "unsafe_name": "a name in a tar that points outside (absolute, or with ..)",
    "too_large": "a member of 4 GiB or more in a tar, or a caption or .json of more than 16 MiB in an archive",
    "encrypted": "the member of a zip is encrypted: unpack it with its password",
    "zip_method": "the member of a zip is compressed by a method other than store, deflate, bzip2 and LZMA",
    "zip_damaged": "the member of a zip is damaged: its header, length or checksum is wrong",
    "zip_bomb": "the member of a zip unpacks to more than its directory says",
}
"""Every reason in ``rejects.jsonl``, with its explanation."""


class Reject(Exception):
    """A sample that cannot be used. Not an error of the run: the writer records the reason and continues. ``path`` is
    the path that was not found, or describes what was found instead."""

    def __init__(self, reason: str, path: str | None = None) -> None:
        assert reason in REASONS, reason
        super().__init__(reason)
        self.reason, self.path = reason, path


def fault_of(error: ValueError) -> str:
    """The reason for text that could not be decoded or is not JSON."""
    return "not_utf8" if isinstance(error, UnicodeDecodeError) else "not_json"


def explain(reason: str, path: str | None) -> str:
    """The explanation of a reason in one line, with the path."""
    return f"{REASONS[reason]}: {' '.join(path.split())[:200]}" if path else REASONS[reason]
