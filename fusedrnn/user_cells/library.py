"""A cell's C++ struct, compiled for this processor (``csrc/added/cell.cpp``) and added to the library of the ops."""

from __future__ import annotations

import ctypes
import os
import shlex
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import _C
from ..cells import CELLS, CellInfo
from .compiler import Unit, compiler_if_any, library, without_comments, words

__all__ = ["HEADERS", "add", "cuda_units"]

_PACKAGE = Path(__file__).parents[1]
#: The C++ sources: in the package, or beside it in a checkout.
HEADERS = next((path for path in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc") if path.is_dir()), _PACKAGE / "csrc")
_TORCH = Path(torch.__file__).parent
_AVX512 = ("cpu/isa_avx512.cpp", "kTableAvx512")
#: For an instruction set: the files of its kernels, their table, and that of bfloat16 where it is another's. The GPU's
#: loop on the CPU has one way for these cells: step by step.
_STEPWISE = (("cpu/isa_base.cpp", "stepwise/host.cpp"), "table_stepwise()", None)
SETS: dict[str, tuple[tuple[str, ...], str, str | None]] = {
    "base": (("cpu/isa_base.cpp",), "kTableBase", None),
    "avx2": (("cpu/isa_avx2.cpp",), "kTableAvx2", None),
    "avx_vnni": (("cpu/isa_avx2.cpp",), "kTableAvx2", None),
    "avx512": (_AVX512[:1], _AVX512[1], None),
    "avx512_vnni": (_AVX512[:1], _AVX512[1], None),
    "avx512_bf16": ((_AVX512[0], "cpu/isa_avx512_bf16.cpp"), _AVX512[1], "kTableAvx512Bf16"),
    "amx": ((_AVX512[0], "cpu/isa_amx.cpp"), _AVX512[1], "kTableAmx"),
    "stepwise": _STEPWISE,
    "persistent": _STEPWISE,
}

_loaded: list[ctypes.CDLL] = []  # for the rest of the process: the library of the ops points into them
_added: dict[str, tuple[str, Path]] = {}  # of each cell its source without comments, and the folder of its library
_adding = threading.Lock()


def _after_fork() -> None:
    global _adding
    _adding = threading.Lock()  # a thread that is not in this process may have held it


os.register_at_fork(after_in_child=_after_fork)


def definitions(struct: str) -> tuple[str, ...]:
    """For the files that compile an added cell."""
    return f"-DFUSEDRNN_ADDED_CELL={struct}", '-DFUSEDRNN_ADDED_HEADER="added_cell.h"'


def _units(isa: str, struct: str, cuda: bool) -> list[Unit]:
    """The files of a library with the kernels of ``struct`` for an instruction set."""
    files, table, pairs = SETS[isa]
    flags = [*shlex.split(_C.build()["flags"]), *words("FUSEDRNN_CXX_FLAGS"), "-fPIC", *definitions(struct)]
    flags += [f"-DFUSEDRNN_ADDED_TABLE={table}"]
    flags += [f"-DFUSEDRNN_ADDED_PAIRS={pairs}", f'-DFUSEDRNN_ADDED_ISA="{isa}"'] if pairs else []
    flags += [f"-isystem{_TORCH / 'include'}"] if "stepwise/host.cpp" in files else []
    flags += ["-DFUSEDRNN_ADDED_CUDA"] if cuda else []
    by = compiler_if_any()
    return [Unit(HEADERS / file, by, tuple(flags)) for file in (*files, "cpu/plan.cpp", "added/cell.cpp")]


def _places() -> dict[str, str]:
    """Torch may lie elsewhere where a kept library is used. Where its headers are used (``stepwise/host.cpp``) its
    version counts.
    """
    return {str(_TORCH / "include"): f"torch {torch.__version__}", str(_TORCH): "torch"}


def cuda_units(nvcc: str, struct: str, architectures: Sequence[str]) -> list[Unit]:
    """Those of its CUDA kernels, for architectures such as sm_90."""
    flags = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", *definitions(struct)]
    flags += [f"-gencode=arch={name.replace('sm', 'compute')},code={name}" for name in architectures]
    return [Unit(path, (nvcc,), tuple(flags)) for path in sorted((HEADERS / "cuda").glob("*.cu"))]


def _gpus() -> tuple[str, Path, list[str]] | None:
    """nvcc, its folder and the architectures of the GPUs that are there; None if this build or machine has none."""
    if not _C.build()["cuda"] or not torch.cuda.is_available():
        return None
    from torch.utils.cpp_extension import CUDA_HOME  # not before: it takes its time

    if not CUDA_HOME or not (nvcc := Path(CUDA_HOME, "bin/nvcc")).exists():
        return None
    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return str(nvcc), Path(CUDA_HOME), [f"sm_{major}{minor}" for major, minor in sorted(found)]


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        advice = "If its file system is mounted with noexec, name another folder in FUSEDRNN_CACHE"
        raise RuntimeError(f"{path} cannot be loaded: {error}. {advice}") from error


def add(info: CellInfo, struct: str, source: str) -> Path:
    """Compile a cell and add it, for the rest of the process.

    Args:
        info: what Python needs to know of it. Its name is the struct's ``kName``, and no other cell's.
        struct: the name of the struct in namespace fusedrnn.
        source: the header that has it. Another comment does not make it another.

    Returns:
        The folder where its library is kept.

    Raises:
        RuntimeError: no compiler, or it fails; or the library is of other headers.
        ValueError: another cell has the name.
    """
    with _adding:
        before, folder = _added.get(info.name, (None, Path()))
        if before == without_comments(source):
            CELLS[info.name] = info
            return folder
        if info.name in CELLS:
            raise ValueError(f"there is a cell {info.name} already, which is another")
        gpus = _gpus()
        units = _units(_C.isa(), struct, gpus is not None)
        # OpenMP's symbols come from torch's copy, as for the library of the ops (setup.py).
        link = ["-shared", f"-L{_TORCH / 'lib'}", "-Wl,--no-as-needed", "-ltorch_cpu", "-lc10"]
        if gpus:
            nvcc, home, architectures = gpus
            units += cuda_units(nvcc, struct, architectures)
            link += [f"-L{home / 'lib64'}", "-lcudart"]
        path = library(f"cell {info.name}", units, {"added_cell.h": source}, HEADERS, link, _places())
        cell = _load(path)
        cell.fusedrnn_added_cell.restype = ctypes.c_void_p
        cell.fusedrnn_added_cell.argtypes = [ctypes.c_void_p]
        fault = _C.add_cell(cell.fusedrnn_added_cell(_C.services()))
        if fault:
            raise RuntimeError(f"cell {info.name} is not added: {fault} ({path})")
        _loaded.append(cell)
        _added[info.name] = without_comments(source), path.parent
        CELLS[info.name] = info
    return path.parent
