"""The versions of torch and Python that are supported, and the interpreters that are here."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]

NEWEST = re.search(r"^torch==(\S+)", (ROOT / "requirements-newest.txt").read_text(), re.MULTILINE)[1]
TORCH = ("2.11.0", "2.12.1", "2.13.0", "2.14.1", NEWEST)
PYTHON = ("3.10", "3.11", "3.12", "3.13")


class Pair(NamedTuple):
    """A torch and a Python."""

    torch: str
    python: str

    def __str__(self) -> str:
        return f"torch {self.torch}, Python {self.python}"


#: Pairs that torch has no wheel for.
ABSENT = {Pair("2.15.0", "3.10")}


def interpreter(version: str) -> str | None:
    """A Python of this version: on PATH, below ~/.pyenv, or where manylinux's images have them; None: there is none."""
    places = [shutil.which(f"python{version}")]
    places += sorted(glob.glob(os.path.expanduser(f"~/.pyenv/versions/{version}.*/bin/python")), reverse=True)
    tag = f"cp{version.replace('.', '')}"
    places.append(f"/opt/python/{tag}-{tag}/bin/python")
    asked = (place for place in places if place and Path(place).exists())  # on PATH may be a shim that leads nowhere
    return next((place for place in asked if subprocess.run([place, "-V"], capture_output=True).returncode == 0), None)


def sources() -> str:
    """A number for all that a wheel is built from."""
    files = [path for name in ("csrc", "fusedrnn") for path in (ROOT / name).rglob("*") if path.is_file()]
    files += [ROOT / "setup.py", ROOT / "pyproject.toml"]
    contents = hashlib.sha256()
    for path in sorted(path for path in files if path.suffix not in (".so", ".pyc")):
        contents.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return contents.hexdigest()
