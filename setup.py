"""Builds the shared library of the ops, fusedrnn/_ops.so, and the module fusedrnn._fast.

The library serves every torch from csrc/target.h's on and every Python. The module looks into their objects: it is of
one torch and one Python, which the name of its file says, and fusedrnn/extension.py loads the one that fits. No
downloads, no reading of the builder's CPU: every instruction set is compiled.

FUSEDRNN_HEADERS: a folder of headers, from which a module is built for each torch and each Python in it, and the
library by the oldest torch (release/wheel.py makes it). Without it: one module, of the torch and Python that build.

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
import sysconfig
from pathlib import Path

import torch
from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

if not os.environ.get("CUDA_HOME") and shutil.which("nvcc"):
    # Torch would take the folder above the one that nvcc lies in, which may be a link or a script. It knows itself.
    told = subprocess.run(["nvcc", "--dryrun", "-c", "none.cu"], capture_output=True, text=True).stderr
    if home := re.search(r"TOP=(.*)", told):
        os.environ["CUDA_HOME"] = os.path.realpath(home[1])
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension  # noqa: E402

ROOT = Path(__file__).parent
OF_CUDA = (ROOT / "csrc/cuda").glob
CUDA_SOURCES = sorted(str(path.relative_to(ROOT)) for path in [*OF_CUDA("*.cu"), *OF_CUDA("*.cpp")])
SOURCES = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp")}
FAST = ["csrc/autograd.cpp", "csrc/parameters.cpp", "csrc/python.cpp", "csrc/second_order.cpp", "csrc/training.cpp"]
ADDED = {"csrc/added/cell.cpp"}  # of a library that is built where a cell is added
SOURCES = sorted(SOURCES - set(CUDA_SOURCES) - set(FAST) - ADDED)
# One translation unit an instruction set: the largest first, so that parallel jobs end together.
SOURCES.sort(key=lambda name: ("isa_" not in name, name))

# The newest torch's headers ask for C++20, the oldest's take it.
FLAGS = ["-std=c++20", "-O3", "-g0", "-fopenmp", "-ffp-contract=fast", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wno-unknown-pragmas"]
if sys.platform == "darwin":
    FLAGS.remove("-fopenmp")  # Apple's clang has none: one thread
FLAGS += shlex.split(os.environ.get("FUSEDRNN_CXX_FLAGS", ""))


def with_cuda() -> str:
    """The version of CUDA to compile the kernels with; empty: none."""
    wish = os.environ.get("FUSEDRNN_CUDA") or "auto"
    if wish not in ("auto", "0", "1"):
        sys.exit(f"FUSEDRNN_CUDA must be auto, 0 or 1, got {wish!r}")
    missing, version = None, ""
    if not torch.version.cuda:
        missing = f"torch {torch.__version__} is built without CUDA"
    elif not CUDA_HOME or not (Path(CUDA_HOME) / "bin" / "nvcc").exists():
        missing = "nvcc is not found: set CUDA_HOME"
    else:
        told = subprocess.run([Path(CUDA_HOME) / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release ((\d+)\.\d+)", told)
        version = release[1] if release else ""
        if not release or release[2] != torch.version.cuda.partition(".")[0]:
            missing = f"torch is built for CUDA {torch.version.cuda}, nvcc in {CUDA_HOME} is of another major version"
    if missing and wish == "1":
        sys.exit(f"FUSEDRNN_CUDA=1, but {missing}")
    if missing and torch.version.cuda and wish == "auto":
        print(f"fusedrnn: building without CUDA kernels: {missing}")
    return "" if wish == "0" or missing else version


def torch_headers() -> list[str]:
    """Flags that find, after the toolkit's own headers, those of the packages that torch brings: cuBLAS's, say."""
    found = Path(torch.__file__).parent.parent.glob("nvidia/*/include/cublas_v2.h")
    return [flag for path in found for flag in ("-idirafter", str(path.parent))]


def headers() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Folders of headers of each torch, oldest first, and of each Python, by the names in a module's file."""
    folder = os.environ.get("FUSEDRNN_HEADERS")
    if not folder:
        major, minor = torch.__version__.split(".")[:2]
        return {f"torch{major}_{minor}": []}, {sysconfig.get_config_var("SOABI"): []}
    collected = (ROOT / folder).resolve()
    paths = {path.name: path for path in collected.glob("*")}
    if not any(name.startswith("torch") for name in paths) or not any(name.startswith("cpython") for name in paths):
        sys.exit(f"FUSEDRNN_HEADERS: no headers in {collected}: python -m release.wheel --headers {folder}")
    torches = sorted((name for name in paths if name.startswith("torch")), key=lambda name: int(name.split("_")[1]))
    return (
        {name: [str(paths[name]), str(paths[name] / "torch/csrc/api/include")] for name in torches},
        {name: [str(paths[name])] for name in sorted(paths.keys() - torches)},
    )


class Build(BuildExtension):
    """Keeps the objects of each extension apart, for they share sources; leaves no module of an earlier build."""

    def run(self) -> None:
        super().run()
        paths = {Path(self.get_ext_fullpath(extension.name)) for extension in self.extensions}
        for path in {other for built in paths for other in built.parent.glob("_fast*")} - paths:
            path.unlink()

    def build_extension(self, extension) -> None:
        above, self.build_temp = self.build_temp, str(Path(self.build_temp) / extension.name)
        super().build_extension(extension)
        self.build_temp = above


class Modules(build_py):
    """With the C++ sources, which cells of a user's own are compiled from (fusedrnn/user_cells/library.py)."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            into = Path(self.build_lib, "fusedrnn/csrc")
            for folder in ("added", "cells", "cpu", "cuda", "persistent", "stepwise"):
                shutil.copytree(ROOT / "csrc" / folder, into / folder, dirs_exist_ok=True)
            shutil.copy(ROOT / "csrc/problem.h", into)


class Wheel(bdist_wheel):
    """For every Python: where no module fits, the library alone will do."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


CUDA = with_cuda()
if CUDA:
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    too_old = [found for found in re.findall(r"\d+\.\d+", os.environ["TORCH_CUDA_ARCH_LIST"]) if float(found) < 8]
    if too_old:
        sys.exit(f"TORCH_CUDA_ARCH_LIST names {', '.join(too_old)}: the CUDA kernels need 8.0 or more")
    FLAGS.append(f"-DFUSEDRNN_CUDA={CUDA}")
FLAGS.append(f'-DFUSEDRNN_FLAGS="{" ".join(FLAGS)}"')  # for fusedrnn.info

TORCHES, PYTHONS = headers()


def linking() -> dict[str, list[str]]:
    """How an extension is linked. Lists of its own: torch adds to them."""
    # libstdc++ before torch's libraries: some of them have copies of its functions, which others lack.
    libraries = ["stdc++"] if sys.platform.startswith("linux") else []
    return {"libraries": libraries, "extra_link_args": shlex.split(os.environ.get("FUSEDRNN_LD_FLAGS", ""))}


setup(
    ext_modules=[
        (CUDAExtension if CUDA else CppExtension)(
            "fusedrnn._ops",
            SOURCES + (CUDA_SOURCES if CUDA else []),
            include_dirs=[*next(iter(TORCHES.values()))],
            extra_compile_args={"cxx": FLAGS + (torch_headers() if CUDA else []), "nvcc": ["-O3"]},
            py_limited_api=True,  # not linked to torch's part for Python
            **linking(),
        ),
    ]
    + [
        CppExtension(
            f"fusedrnn._fast-{of_torch}-{of_python}",
            FAST,
            include_dirs=[*TORCHES[of_torch], *PYTHONS[of_python]],
            extra_compile_args={"cxx": FLAGS},
            **linking(),
        )
        for of_torch in TORCHES
        for of_python in PYTHONS
    ],
    cmdclass={"build_ext": Build.with_options(no_python_abi_suffix=True), "build_py": Modules, "bdist_wheel": Wheel},
)
