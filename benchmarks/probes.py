"""The functions of ``probes.cpp``: plans of sharing among threads, and yardsticks of the machine.

They are compiled at the first use of one, for the instruction set in use, into ``build/probes``.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fusedrnn import _C

_ROOT = Path(__file__).parent.parent
_TARGETS = {"avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"), "avx2": ("avx2", "fma")}


@functools.cache
def _native() -> ModuleType:
    # AVX-512's kernels may have been compiled for AVX2 (make test-avx512).
    isa = "avx2" if "FUSEDRNN_AVX2_AS_AVX512" in _C.build()["flags"] else _C.isa()
    isa = {"avx512_bf16": "avx512", "amx": "avx512"}.get(isa, isa)
    include = (Path(torch.__file__).parent / "include", sysconfig.get_path("include"))  # pybind11 among torch's headers
    command = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++20", "-O3", "-fopenmp", "-fPIC", "-shared"]
    command += [f"-DFUSEDRNN_VECTOR_BYTES={_C.vector_bytes()}", *(f"-m{name}" for name in _TARGETS.get(isa, ()))]
    command += [*(f"-I{folder}" for folder in include), "benchmarks/probes.cpp"]
    command += ["csrc/cpu/plan.cpp", "csrc/stepwise/choice.cpp"]
    sources = sorted(path for path in (_ROOT / "csrc").rglob("*") if path.suffix in (".h", ".inl", ".cpp"))
    contents = [path.read_bytes() for path in (*sources, _ROOT / "benchmarks/probes.cpp")]
    digest = hashlib.sha256(b"\0".join([*contents, " ".join([*command, sys.version]).encode()])).hexdigest()
    library = _ROOT / "build/probes" / digest[:16] / f"probes{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / library.name
            subprocess.run([*command, "-o", made], cwd=_ROOT, check=True)
            os.replace(made, library)  # complete, whoever else makes it meanwhile
    spec = importlib.util.spec_from_file_location("probes", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    return getattr(_native(), name)
