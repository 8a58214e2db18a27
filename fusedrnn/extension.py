"""Loads what is compiled: the shared library of the ops, and the module ``_fast`` that is of this torch and Python.

The library, ``_ops``, serves every torch from 2.11 on. A ``_fast``, inference past the dispatcher, serves the minor
versions of torch and Python that its file's name says: ``_fast-torch2_13-cpython-311-x86_64-linux-gnu.so``. Another
would not load, or fail later. Without one everything works, short calls in more time.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sysconfig
import warnings
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
    found = folder / "_ops.so"
    if not folder.is_dir():
        raise ImportError(f"fusedrnn must be unpacked: a library cannot be loaded from {folder}")
    if not found.exists():
        raise ImportError(f"fusedrnn is not built: no _ops.so in {folder}. In its source tree: {BUILD}, or make build")
    if tuple(int(part) for part in running.split(".")[:2]) < OLDEST:
        raise ImportError(f"fusedrnn needs torch >= {'.'.join(map(str, OLDEST))}, got {running}")
    return found


def versions(running: str = torch.__version__) -> str:
    """What a ``_fast`` for the running torch and this Python has in its name."""
    major, minor = running.split(".")[:2]
    return f"torch{major}_{minor}-{sysconfig.get_config_var('SOABI')}"


def built(folder: Path) -> list[str]:
    """The versions of every ``_fast`` in ``folder``."""
    return sorted(path.stem.removeprefix("_fast-") for path in folder.glob("_fast-*.*"))


def module(folder: Path, running: str = torch.__version__) -> Path | None:
    """The ``_fast`` that fits; None if there is none."""
    return next(iter(folder.glob(f"_fast-{versions(running)}.*")), None)


def load() -> tuple[ctypes.CDLL, ModuleType | None]:
    """Both, the module connected to the library.

    Raises:
        ImportError: the library is not there, or one of its kind is there already.
    Warns:
        RuntimeWarning: there is no module that fits.
    """
    path = library(FOLDER)
    if hasattr(torch.ops.fusedrnn, "layer_forward"):  # torch would end the process
        raise ImportError(f"the ops of fusedrnn are loaded already, by an earlier import; not again from {FOLDER}")
    torch.ops.load_library(path)
    loaded = ctypes.CDLL(str(path))
    for function, result in (("fusedrnn_description", ctypes.c_char_p), ("fusedrnn_interface", ctypes.c_void_p)):
        getattr(loaded, function).restype = result
    if (fitting := module(FOLDER)) is None:
        warnings.warn(
            f"fusedrnn: no _fast for {versions()} in {FOLDER}: a call of one step takes about 70 us more (see"
            " python -m fusedrnn.info)",
            RuntimeWarning,
            stacklevel=2,
        )
        return loaded, None
    spec = importlib.util.spec_from_file_location("fusedrnn._fast", fitting)
    fast = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fast)
    fast.connect(loaded.fusedrnn_interface())
    return loaded, fast
