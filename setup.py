"""Builds the shared library of the ops, fusedrnn/_ops.so, and the module fusedrnn._fast.

The library serves every torch from csrc/target.h's on and every Python; the module looks into their objects and is of
the versions that it is built with. No downloads, no reading of the builder's CPU: every instruction set is compiled.

FUSEDRNN_CUDA=auto|0|1: with the CUDA kernels if torch is built for CUDA and its compiler is found (auto, the default),
never, or else an error. No GPU need be there. TORCH_CUDA_ARCH_LIST names the architectures.

OpenMP is compiled in but not linked: its symbols resolve through the copy that torch brings, so that a process has
one OpenMP runtime. FUSEDRNN_CXX_FLAGS and FUSEDRNN_LD_FLAGS add flags of the compiler and the
linker; MAX_JOBS bounds the parallel compile jobs.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from setuptools import setup

if not os.environ.get("CUDA_HOME") and shutil.which("nvcc"):
    # Torch would take the folder above the one that nvcc lies in, which may be a link or a script. It knows itself.
    told = subprocess.run(["nvcc", "--dryrun", "-c", "none.cu"], capture_output=True, text=True).stderr
    if home := re.search(r"TOP=(.*)", told):
        os.environ["CUDA_HOME"] = os.path.realpath(home[1])
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension  # noqa: E402

ROOT = Path(__file__).parent
CUDA_SOURCES = ["csrc/cuda/device.cu", "csrc/cuda/launch.cpp"]
SOURCES = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp")}
FAST = ["csrc/autograd.cpp", "csrc/parameters.cpp", "csrc/python.cpp"]
SOURCES = sorted(SOURCES - set(CUDA_SOURCES) - set(FAST))
# One translation unit an instruction set: the largest first, so that parallel jobs end together.
SOURCES.sort(key=lambda name: ("isa_" not in name, name))

# No -std: torch adds the one that its headers ask for, C++17 or, from 2.14 on, C++20.
FLAGS = ["-O3", "-g0", "-fopenmp", "-ffp-contract=fast", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wno-unknown-pragmas"]
if sys.platform == "darwin":
    FLAGS.remove("-fopenmp")  # Apple's clang has none: one thread
FLAGS += shlex.split(os.environ.get("FUSEDRNN_CXX_FLAGS", ""))


def with_cuda() -> bool:
    """Whether to compile the CUDA kernels."""
    wish = os.environ.get("FUSEDRNN_CUDA") or "auto"
    if wish not in ("auto", "0", "1"):
        sys.exit(f"FUSEDRNN_CUDA must be auto, 0 or 1, got {wish!r}")
    missing = None
    if not torch.version.cuda:
        missing = f"torch {torch.__version__} is built without CUDA"
    elif not CUDA_HOME or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        missing = "nvcc is not found: set CUDA_HOME"
    else:
        told = subprocess.run([Path(CUDA_HOME) / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release (\d+)", told)
        if not release or release[1] != torch.version.cuda.partition(".")[0]:
            missing = f"torch is built for CUDA {torch.version.cuda}, nvcc in {CUDA_HOME} is of another major version"
    if missing and wish == "1":
        sys.exit(f"FUSEDRNN_CUDA=1, but {missing}")
    if missing and torch.version.cuda and wish == "auto":
        print(f"fusedrnn: building without CUDA kernels: {missing}")
    return wish != "0" and not missing


def torch_headers() -> list[str]:
    """Flags that find, after the toolkit's own headers, those of the packages that torch brings: cuBLAS's, say."""
    found = Path(torch.__file__).parent.parent.glob("nvidia/*/include/cublas_v2.h")
    return [flag for path in found for flag in ("-idirafter", str(path.parent))]


class Build(BuildExtension):
    """Leaves the version of torch beside the module, for fusedrnn.extension."""

    def run(self) -> None:
        super().run()
        Path(self.get_ext_fullpath("fusedrnn._fast")).with_name("_fast.torch").write_text(torch.__version__ + "\n")


CUDA = with_cuda()
if CUDA:
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    FLAGS.append("-DFUSEDRNN_CUDA")
FLAGS.append(f'-DFUSEDRNN_FLAGS="{" ".join(FLAGS)}"')  # for fusedrnn.info

COMMON = {"extra_link_args": shlex.split(os.environ.get("FUSEDRNN_LD_FLAGS", ""))}

setup(
    ext_modules=[
        (CUDAExtension if CUDA else CppExtension)(
            "fusedrnn._ops",
            SOURCES + (CUDA_SOURCES if CUDA else []),
            extra_compile_args={"cxx": FLAGS + (torch_headers() if CUDA else []), "nvcc": ["-O3"]},
            py_limited_api=True,  # not linked to torch's part for Python
            **COMMON,
        ),
        CppExtension("fusedrnn._fast", FAST, extra_compile_args={"cxx": FLAGS}, **COMMON),
    ],
    cmdclass={"build_ext": Build.with_options(no_python_abi_suffix=True)},
)
