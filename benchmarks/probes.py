"""The functions of ``probes.cpp``: plans of sharing among threads, and yardsticks of the machine.

They are compiled at the first use of one, for the instruction set in use, into ``build/probes``.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fusedrnn import _C

_ROOT = Path(__file__).parent.parent
_TARGETS = {"avx512": ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"), "avx2": ("avx2", "fma")}


@functools.cache
def _native() -> ModuleType:
    from torch.utils.cpp_extension import load

    flags = ["-O3", "-fopenmp", "-ffp-contract=fast", f"-DFUSEDRNN_VECTOR_BYTES={_C.vector_bytes()}"]
    name = f"probes_{_C.isa()}_{sys.implementation.cache_tag}_torch{torch.__version__}".replace(".", "_")
    folder = _ROOT / "build/probes" / (name := name.replace("+", "_").replace("-", "_"))
    folder.mkdir(parents=True, exist_ok=True)
    sources = [str(_ROOT / file) for file in ("benchmarks/probes.cpp", "csrc/cpu/plan.cpp")]
    flags += [f"-m{target}" for target in _TARGETS.get(_C.isa(), ())]
    return load(name, sources, extra_cflags=flags, extra_ldflags=["-fopenmp"], build_directory=str(folder))


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    return getattr(_native(), name)
