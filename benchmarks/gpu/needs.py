"""What the parts of ``make gpu`` need, looked at before the first of them runs. Imports nothing that may be missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Found", "look", "missing", "nvcc", "path", "sanitizer"]

OLDEST_PYTHON, OLDEST_TORCH, OLDEST_GPU = (3, 11), (2, 11), (8, 0)
SETUPTOOLS = 77  # as in pyproject.toml; older ones do not read it, or lack bdist_wheel
PACKAGES = {
    "build": ("setuptools", "ninja", "pybind11"),
    "tests": ("pytest", "hypothesis", "numpy"),
    "sanitizer": ("pytest", "hypothesis", "numpy"),
}
ACTIVATE = "activate the environment that has one, or name its Python: make gpu PYTHON=.../bin/python"


@dataclass(frozen=True)
class Found:
    """What is there. Empty or None: it is not."""

    python: tuple[int, ...] = sys.version_info[:2]
    packages: frozenset[str] = frozenset()
    torch: str = ""
    why_no_torch: str = "there is no torch"
    cuda: str = ""  # torch's
    gpu: str = ""
    capability: tuple[int, int] | None = None  # None: no GPU that torch can use
    why_no_gpu: str = ""
    device: bool = False  # a GPU that the system knows of
    nvcc: str = ""  # its version
    named: str = ""  # the variable, with its value, in which nvcc is looked for
    cublas: bool = False  # the header
    compiler: str = ""  # why it does not do, or empty
    python_header: bool = False
    sanitizer: bool = False


def _printed(*command: str | Path, given: str = "") -> tuple[bool, str]:
    """Whether a command succeeds, and what it prints."""
    settings = os.environ | {"PATH": path()}
    try:
        done = subprocess.run(command, input=given, capture_output=True, text=True, check=False, env=settings)
    except OSError as error:
        return False, str(error)
    return done.returncode == 0, done.stdout + done.stderr


def path() -> str:
    """PATH as the parts have it: with the folder of this Python, whose environment need not be active."""
    given, here = os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)
    return given if here in given.split(os.pathsep) else here + os.pathsep + given


def _named() -> str:
    """The variable that names the toolkit's folder: as for setup.py and torch, nvcc on PATH goes before CUDA_PATH."""
    if os.environ.get("CUDA_HOME"):
        return "CUDA_HOME"
    return "CUDA_PATH" if os.environ.get("CUDA_PATH") and not shutil.which("nvcc", path=path()) else ""


def nvcc() -> str | None:
    """CUDA's compiler: the one that setup.py takes."""
    if name := _named():
        return shutil.which("nvcc", path=str(Path(os.environ[name], "bin")))
    return shutil.which("nvcc", path=path()) or shutil.which("nvcc", path="/usr/local/cuda/bin")


def sanitizer() -> str | None:
    """CUDA's checker of memory: the one beside nvcc, that on PATH, or that of the usual place."""
    folders = [Path(found).parent] if (found := nvcc()) else []
    return shutil.which("compute-sanitizer", path=os.pathsep.join(map(str, [*folders, path(), "/usr/local/cuda/bin"])))


def _is_there(package: str) -> bool:
    """Whether a part could use it."""
    if package == "ninja":  # torch runs the program
        return _printed("ninja", "--version")[0]
    if package == "setuptools":
        first = next(iter(importlib.metadata.distributions(name=package)), None)
        return first is not None and _version(first.version) >= (SETUPTOOLS,)
    return importlib.util.find_spec(package) is not None


def look() -> Found:
    """Whatever this Python and this machine have."""
    names = {name for packages in PACKAGES.values() for name in packages}
    compiler = os.environ.get("CXX") or "c++"
    program = "int main() { return []<class T>(T x) { return x; }(0); }"
    does, told = _printed(*compiler.split(), "-std=c++20", "-x", "c++", "-fsyntax-only", "-", given=program)
    release = re.search(r"release ([\d.]+)", _printed(nvcc(), "--version")[1]) if nvcc() else None
    named = _named()
    facts = {
        "packages": frozenset(filter(_is_there, names)),
        "nvcc": release[1] if release else "",
        "named": f"{named}={os.environ[named]}" if named else "",
        "compiler": "" if does else f"{compiler}: {told.strip().partition(chr(10))[0] or 'fails'}",
        "python_header": Path(sysconfig.get_path("include"), "Python.h").exists(),
        "sanitizer": sanitizer() is not None,
        "device": Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi") is not None,
    }
    if not importlib.util.find_spec("torch"):
        return Found(**facts)
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:  # a library of it is missing, say
        return Found(**facts, why_no_torch=f"import torch fails: {error}")
    include = [*Path(torch.__file__).parent.parent.glob("nvidia/*/include")]
    include += [Path(nvcc()).resolve().parent.parent / "include"] if nvcc() else []
    facts |= {"torch": torch.__version__, "cuda": torch.version.cuda or ""}
    facts["cublas"] = any((folder / "cublas_v2.h").exists() for folder in include)
    try:
        torch.cuda.init()
        facts |= {"gpu": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability()}
    except (RuntimeError, AssertionError) as error:
        facts["why_no_gpu"] = str(error).partition("\n")[0]
    return Found(**facts)


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def missing(found: Found, parts: Collection[str]) -> list[str]:
    """What is not there and has to be, for these parts: a sentence each, with what to do."""
    build, run = "build" in parts, bool({"tests", "sanitizer", "timing"} & set(parts))
    wanted = {name for part in parts for name in PACKAGES.get(part, ())} - found.packages
    lacks = []
    if found.python < OLDEST_PYTHON:
        need = ".".join(map(str, OLDEST_PYTHON))
        lacks.append(f"Python >= {need}: this is {'.'.join(map(str, found.python))}")
    if not found.torch:
        lacks.append(f"torch for CUDA: {found.why_no_torch}; {ACTIVATE}")
    elif not found.cuda:
        lacks.append(f"torch for CUDA: {found.torch} is built without; {ACTIVATE}")
    elif _version(found.torch) < OLDEST_TORCH:
        lacks.append(f"torch >= {'.'.join(map(str, OLDEST_TORCH))}: this is {found.torch}")
    if run and not found.cuda and not found.device:
        lacks.append("a GPU: the system has no /dev/nvidia0 and no nvidia-smi")
    if run and found.cuda and not found.capability:
        lacks.append(f"a GPU: torch says: {found.why_no_gpu}")
    elif run and found.capability and found.capability < OLDEST_GPU:
        has = ".".join(map(str, found.capability))
        lacks.append(f"a GPU of compute capability 8.0 or more (Ampere): {found.gpu} has {has}")
    major = found.cuda.partition(".")[0]
    toolkit = f"CUDA's toolkit {major}".rstrip()
    if build and not found.nvcc and found.named:
        lacks.append(f"nvcc: {found.named}, and there is no bin/nvcc: set it to the folder of {toolkit}, or unset it")
    elif build and not found.nvcc:
        lacks.append(f"nvcc: not found; install {toolkit}, or set CUDA_HOME to where it is")
    elif build and found.cuda and found.nvcc.partition(".")[0] != major:
        lacks.append(f"nvcc of CUDA {major}, as torch's: this is {found.nvcc}; set CUDA_HOME")
    if build and found.cuda and found.nvcc and not found.cublas:
        lacks.append("cublas_v2.h: install cuBLAS's headers (of CUDA's toolkit, or the package nvidia-cublas)")
    if build and found.compiler:
        lacks.append(f"a C++20 compiler, such as g++ >= 10: {found.compiler}; or name one with CXX=...")
    if build and not found.python_header:
        lacks.append(f"Python.h: install Python's development headers (python{platform.python_version()[:4]}-dev)")
    if "sanitizer" in parts and not found.sanitizer:
        others = " ".join(part for part in parts if part != "sanitizer")
        lacks.append(f'compute-sanitizer (CUDA\'s toolkit): not found; or leave it out: make gpu ARGS="{others}"')
    if wanted:
        names = (f"setuptools>={SETUPTOOLS}" if name == "setuptools" else name for name in sorted(wanted))
        lacks.append(f"packages: {shlex.join([sys.executable, '-m', 'pip', 'install', *names])}")
    return lacks
