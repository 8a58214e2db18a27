"""Looks at the compiled extension before it is loaded, and says with which torch it was built, as no loader does.

An extension of another minor version of torch does not load (undefined symbols), or loads and fails later.
"""

from __future__ import annotations

from pathlib import Path

import torch

BUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def check(folder: Path, running: str = torch.__version__) -> None:
    """Raises:
    ImportError: there is no extension in ``folder``, or it was built with another minor version of torch.
    """
    if not list(folder.glob("_C*.so")) + list(folder.glob("_C*.pyd")):
        raise ImportError(f"fusedrnn is not built: no _C in {folder}. In its source tree: {BUILD}, or make build")
    record = folder / "_C.torch"  # written by setup.py
    built = record.read_text().strip() if record.exists() else running
    if built.split(".")[:2] != running.split(".")[:2]:
        raise ImportError(
            f"fusedrnn was built with torch {built}, but torch {running} is running. Build it with this one: {BUILD}"
            " (without --no-build-isolation pip builds with the newest torch, whatever is installed)"
        )


check(Path(__file__).parent)
