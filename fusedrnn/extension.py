"""Loads what is compiled: the shared library of the ops, and, if it is of this torch and Python, the module ``_fast``.

The library, ``_ops``, serves every torch from 2.11 on. ``_fast``, inference past the dispatcher, serves the minor
version of torch that it was built with; another would not load it, or fail later. Without it everything works, a short
call in inference in more time.
"""

from __future__ import annotations

import ctypes
import importlib
from pathlib import Path
from types import ModuleType

import torch

BUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
FOLDER = Path(__file__).parent
OLDEST = (2, 11)


def library(folder: Path, running: str = torch.__version__) -> Path:
    """The library in ``folder``.

    Raises:
        ImportError: there is none, or torch is older than it may be.
    """
    found = sorted(folder.glob("_ops*.so")) + sorted(folder.glob("_ops*.pyd"))
    if not found:
        raise ImportError(f"fusedrnn is not built: no _ops in {folder}. In its source tree: {BUILD}, or make build")
    if tuple(int(part) for part in running.split(".")[:2]) < OLDEST:
        raise ImportError(f"fusedrnn needs torch >= {'.'.join(map(str, OLDEST))}, got {running}")
    return found[0]


def built_with(folder: Path) -> str:
    """The torch that the ``_fast`` in ``folder`` was built with; "" if there is none."""
    record = folder / "_fast.torch"  # written by setup.py
    there = [*folder.glob("_fast*.so"), *folder.glob("_fast*.pyd")]
    return record.read_text().strip() if there and record.exists() else ""


def fits(folder: Path, running: str = torch.__version__) -> bool:
    """Whether there is one of the same minor version."""
    return built_with(folder).split(".")[:2] == running.split(".")[:2]


def load() -> tuple[ctypes.CDLL, ModuleType | None]:
    """Both, the module connected to the library."""
    path = library(FOLDER)
    torch.ops.load_library(path)
    loaded = ctypes.CDLL(str(path))
    for function, result in (("fusedrnn_description", ctypes.c_char_p), ("fusedrnn_interface", ctypes.c_void_p)):
        getattr(loaded, function).restype = result
    if not fits(FOLDER):
        return loaded, None
    fast = importlib.import_module("fusedrnn._fast")
    fast.connect(loaded.fusedrnn_interface())
    return loaded, fast
