"""Which of Pillow's formats are read: those that people train on; others when they are named; some never.

Every plugin is code that hostile bytes reach, so only the plugins of the formats listed here are ever called.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

USUAL = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""Always read. Of a file with several images (GIF, TIFF, MPO, which is a JPEG, AVIF, APNG) the first is taken."""

ON_REQUEST = (
    "BLP",
    "CUR",
    "DCX",
    "DDS",
    "DIB",
    "FITS",
    "FLI",
    "FTEX",
    "GBR",
    "ICNS",
    "ICO",
    "IM",
    "IMT",
    "IPTC",
    "MCIDAS",
    "MSP",
    "PCD",
    "PCX",
    "PIXAR",
    "PSD",
    "QOI",
    "SGI",
    "SPIDER",
    "SUN",
    "TGA",
    "XBM",
    "XPM",
    "XVTHUMB",
)
"""Read where `--formats` names them: textures, icons, scientific and historical formats."""

NEVER = {
    "EPS": "a PostScript program, which Pillow hands to Ghostscript",
    "WMF": "drawing commands, which Pillow renders on Windows only",
    "BUFR": "Pillow only recognizes it",
    "GRIB": "Pillow only recognizes it",
    "HDF5": "Pillow only recognizes it",
    "MPEG": "a film; Pillow only recognizes it",
    "FPX": "an OLE container, which needs another library",
    "MIC": "an OLE container, which needs another library",
}
"""Not read, with the reason."""

_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")


def allowed(extra: Sequence[str]) -> tuple[str, ...]:
    """Pillow's names of the formats to try, with those named in ``extra``."""
    return (*USUAL, *extra)


def name_other(data: bytes) -> str | None:
    """The name of the format of a file that is not read, by its first bytes: Pillow's name, HEIF, or None."""
    if data[4:8] == b"ftyp" and data[8:12] in (*_HEIF, b"mif1", b"msf1"):
        return "HEIF"
    Image.init()
    head = data[:16].ljust(16, b"\0")
    for name in (*ON_REQUEST, *NEVER):
        accept = Image.OPEN[name][1] if name in Image.OPEN else None
        if accept is not None and accept(head):
            return name
    return None
