"""Loads what is compiled: the shared library of the ops, and the module ``_fast`` that is of this torch and Python.

The library, ``_ops``, serves every torch from 2.11 on. A ``_fast``, inference past the dispatcher, serves the minor
versions of torch and Python that its file's name says: ``_fast-torch2_13-cpython-311-x86_64-linux-gnu.so``. Another
would not load, or fail later. Without one everything works, short calls in more time.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
import sysconfig
import warnings
from pathlib import Path
from types import ModuleType

import torch

BUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
FOLDER = Path(__file__).parent
OLDEST = (2, 11)

#: What the system tells of a library that does not load, and the sentence for it: {0} is what the first group matches.
REASONS = (
    (
        r"(.+): cannot open shared object file: Permission denied",
        "this user may not read {0}: permit it (chmod a+r, and a+x for the folders above it)",
    ),
    (
        r"(.+): cannot open shared object file(?=: No such|$)",
        "{0} is missing on this system: install it, or build again: {build}",
    ),
    (r"version `GLIBC_([\d.]+)' not found", "built for glibc {0} or newer, running {glibc}: build it here: {build}"),
    (
        r"(\S+): version `((?:GLIBCXX|CXXABI)_[\d.]+)' not found",
        "built with a newer C++ runtime than the one loaded first, {0}, which has no {1}: update that one (in a conda"
        " environment: conda install -c conda-forge libstdcxx-ng), or build again with its compiler: {build}",
    ),
    (
        r"failed to map segment",
        "the system does not let it be loaded as a program: its folder is on a file system mounted noexec, or memory"
        " is limited (ulimit -v): install fusedrnn in another folder, or raise the limit",
    ),
    (
        r"cannot allocate memory in static TLS block",
        "the libraries loaded before it have used up the memory for thread-local variables: import fusedrnn first,"
        " before other libraries",
    ),
    (
        r"undefined symbol: (\w+)",
        "built for {of}, running torch {running}, which has no {0}: build again with it: {build}",
    ),
    (
        r"ELF header|ELF class|file too short|Exec format|not a mach-o|incompatible architecture",
        "damaged, or built for another machine, running {machine}: build it here: {build}",
    ),
)


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


def built(folder: Path) -> str:
    """The versions that each ``_fast`` in ``folder`` is of, in words."""
    found = [re.match(r"_fast-torch(\d+)_(\d+)-\D+(\d)(\d+)", path.name) for path in folder.glob("_fast-*.so")]
    if not any(found):
        return "none"
    of_torch = sorted({(int(m[1]), int(m[2])) for m in found if m})
    of_python = sorted({(int(m[3]), int(m[4])) for m in found if m})
    names = (", ".join(f"{major}.{minor}" for major, minor in each) for each in (of_torch, of_python))
    return "torch {}; Python {}".format(*names)


def module(folder: Path, running: str = torch.__version__) -> Path | None:
    """The ``_fast`` that fits; None if there is none."""
    found = folder / f"_fast-{versions(running)}.so"
    return found if found.exists() else None


def reason(
    told: str, running: str = torch.__version__, cuda: str | None = torch.version.cuda, folder: Path = FOLDER
) -> str:
    """Why a library in ``folder`` does not load, and what to do, from what the system has told."""
    of_cuda = (
        r"(?:libtorch_cuda|libc10_cuda|libcu\w+)\.so(?:\.(\d+))?\S*: cannot open shared object file(?=: No such|$)"
    )
    if found := re.search(of_cuda, told):
        has = f"CUDA {cuda}" if cuda else "no CUDA"
        needed = f"CUDA {found[1]}" if found[1] else "CUDA"
        return (
            f"built for {needed}, running torch {running}, which has {has}: install a torch for {needed}, or build"
            f" again: {BUILD}"
        )
    of = built(folder)
    known = {"of": "another torch" if of == "none" else of, "running": running, "build": BUILD}
    known |= {"glibc": platform.libc_ver()[1], "machine": platform.machine()}
    for pattern, sentence in REASONS:
        if found := re.search(pattern, told):
            return sentence.format(*found.groups(), **known)
    return told


def load() -> tuple[ctypes.CDLL, ModuleType | None]:
    """Both, the module connected to the library.

    Raises:
        ImportError: the library is not there, is not ours, does not load, or one of its kind is there already.
    Warns:
        RuntimeWarning: there is no module that fits.
    """
    path = library(FOLDER)
    again = str(path.resolve()) in map(os.path.realpath, torch.ops.loaded_libraries)  # an earlier import failed
    if not again and hasattr(torch.ops.fusedrnn, "layer_forward"):  # torch would end the process
        raise ImportError(f"the ops of fusedrnn are loaded already, by an earlier import; not again from {FOLDER}")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(f"fusedrnn: {path.name} cannot be loaded: {reason(str(error.__cause__ or error))}") from error
    loaded = ctypes.CDLL(str(path))
    text, address = ctypes.c_char_p, ctypes.c_void_p
    results = {"description": text, "interface": address, "services": address, "add_cell": text}
    for function, result in results.items():
        if not hasattr(loaded, f"fusedrnn_{function}"):
            raise ImportError(
                f"fusedrnn: {path} is another library: it has no fusedrnn_{function}. Build it again: {BUILD}"
            )
        getattr(loaded, f"fusedrnn_{function}").restype = result
    loaded.fusedrnn_add_cell.argtypes = [address]
    fast, why = None, f"no _fast for {versions()} in {FOLDER} (built for: {built(FOLDER)})"
    if fitting := module(FOLDER):
        spec = importlib.util.spec_from_file_location("fusedrnn._fast", fitting)
        try:
            fast = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(fast)
        except ImportError as error:  # of a torch that is not quite this one
            fast, why = None, f"{fitting.name} cannot be loaded: {reason(str(error))}"
        if fast is not None and not fast.connect(loaded.fusedrnn_interface()):
            fast, why = None, f"{fitting.name} and _ops.so are of different builds"
    if fast is None:
        warnings.warn(
            f"fusedrnn: {why}: a call of one step takes about 70 us more (see python -m fusedrnn.info)",
            RuntimeWarning,
            stacklevel=2,
        )
    return loaded, fast
