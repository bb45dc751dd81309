"""The odd images of Pillow's own tests, from its source distribution; fetched once to a temporary folder.

folder = odd_pictures()     # None, with a line that says why, where there is no package index
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

INSIDE = "Tests/images/"


def odd_pictures() -> Path | None:
    """The folder of images of the installed Pillow's version."""
    release = version("pillow")
    folder = Path(tempfile.gettempdir()) / f"ringlip-pillow-{release}"
    done = folder / "complete"
    if not done.exists():
        folder.mkdir(exist_ok=True)
        command = ["download", "--no-binary", ":all:", "--no-deps", "--dest", str(folder), f"pillow=={release}"]
        fetched = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True, check=False)
        archives = list(folder.glob("*.tar.gz"))
        if fetched.returncode or not archives:
            print(f"no source distribution of Pillow: {fetched.stderr.strip()[-200:]}")
            return None
        with tarfile.open(archives[0]) as archive:
            members = [member for member in archive if member.isfile() and INSIDE in member.name]
            archive.extractall(folder, members, filter="data")
        archives[0].unlink()
        done.touch()
    return next(folder.glob(f"*/{INSIDE}"))
