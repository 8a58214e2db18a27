"""The command ``python -m benchmarks.ptxas``: what the compiler makes of each CUDA kernel, on a machine with no GPU.

Compiles csrc/cuda/*.cu with nvcc alone, for each architecture, and prints a kernel's registers, shared memory, stack
and spills. The exit status is 1 if one spills or has a stack. ``--ptxas FILE`` assembles nvcc's intermediate code with
the ptxas of another CUDA, as the package nvidia-cuda-nvcc-cu12 has it, by the oldest version of that code that will do.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ARCHITECTURES", "SOURCES", "Compiled", "Kernel", "Products", "compile_source", "table"]

ROOT = Path(__file__).resolve().parents[1]
SOURCES = tuple(sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
ARCHITECTURES = ("sm_80", "sm_90a")
# As torch compiles extensions: no implicit conversions of 16-bit types.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-Werror",
    "all-warnings",
    *(f"-D__CUDA_NO_{n}__" for n in ("HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS")),
)
ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
OLDEST_PTX = "8.0"  # of CUDA 12.0: what sm_90a needs


@dataclass(frozen=True)
class Kernel:
    """A kernel for an architecture; sizes in bytes a thread, shared memory a block."""

    name: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spills: int


def _readable(names: Sequence[str]) -> list[str]:
    """Names without the mangling, the namespaces and the arguments."""
    done = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True)
    left_out = r"fusedrnn::|persistent::|\(anonymous namespace\)::|void "
    short = (re.sub(left_out, "", name) for name in done.stdout.splitlines())
    return [re.sub(r"\(.*", "", name).replace(" >", ">") for name in short]


@dataclass(frozen=True)
class Products:
    """How many matrix products the time loop of a persistent kernel has, for which way of multiplying and geometry."""

    cell: str
    products: str
    vectors: int
    count: int


@dataclass(frozen=True)
class Compiled:
    """A file of kernels: what ptxas says of each, and the products of the persistent ones for the last architecture."""

    kernels: list[Kernel]
    products: list[Products]


def _run(command: Sequence[str | Path]) -> str:
    """What it prints on its error output. RuntimeError with that if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stderr


def compile_source(source: Path, architectures: Sequence[str] = ARCHITECTURES, ptxas: Path | None = None) -> Compiled:
    """Compile the kernels of a file once, and read what ptxas, nvcc's own or another, says of them.

    Raises:
        FileNotFoundError: no nvcc.
        RuntimeError: it failed; with what it printed.
    """
    nvcc = shutil.which("nvcc")
    if not nvcc:
        raise FileNotFoundError("nvcc is not on the PATH")
    with tempfile.TemporaryDirectory() as folder:
        targets = [f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in architectures]
        kept = ["--keep", "--keep-dir", folder, "-Xptxas", "-v"]
        told = _run([nvcc, *FLAGS, *targets, *kept, "-c", source, "-o", Path(folder, "made.o")])
        which = (f".{a.replace('sm', 'compute')}" if len(architectures) > 1 else "" for a in architectures)
        codes = {a: Path(folder, f"{source.stem}{part}.ptx") for a, part in zip(architectures, which, strict=True)}
        if ptxas:
            told = "".join(_assembled(ptxas, architecture, code) for architecture, code in codes.items())
        products = _products(codes[architectures[-1]].read_text())
    _, *entries = re.split(r"(?=Compiling entry function)", told)
    names = _readable([ENTRY.search(entry)[1] for entry in entries])
    return Compiled([_kernel(name, entry) for name, entry in zip(names, entries, strict=True)], products)


def _assembled(ptxas: Path, architecture: str, code: Path) -> str:
    """What another ptxas prints of nvcc's intermediate code."""
    code.write_text(re.sub(r"(?m)^\.version .*", f".version {OLDEST_PTX}", code.read_text()))
    return _run([ptxas, f"-arch={architecture}", "-v", code, "-o", os.devnull])


def _kernel(name: str, entry: str) -> Kernel:
    stack, stores, loads = map(int, MEMORY.search(entry).groups())
    shared = SHARED.search(entry)
    return Kernel(
        name, ENTRY.search(entry)[2], int(USED.search(entry)[1]), int(shared[1]) if shared else 0, stack, stores + loads
    )


def _products(code: str) -> list[Products]:
    """Of the persistent kernels, in the code that the compiler hands to ptxas."""
    found = []
    for part in re.split(r"(?=\.entry )", code)[1:]:
        (name,) = _readable([re.match(r"\.entry (\w+)", part)[1]])
        count = len(re.findall(r"mma\.sync", part))
        if count:  # one of another architecture is empty
            way = re.search(r"\w+Products", name)[0]
            geometry = re.search(r"FixedGeometry<(\d+), (\d+), (\d+), (\d+), (\d+)>", name)
            cell = re.search(r"persistent_loop<(\w+)", name)[1]
            found.append(Products(cell, way, int(geometry[4]), count))
    return found


def table(kernels: Sequence[Kernel]) -> str:
    """A line for each kernel, the architectures beside one another."""
    found = {(kernel.name, kernel.architecture): kernel for kernel in kernels}
    architectures = sorted({kernel.architecture for kernel in kernels})
    lines = [f"{'registers, shared memory, stack, spills':72} {' '.join(f'{a:>20}' for a in architectures)}"]
    for name in sorted({kernel.name for kernel in kernels}):
        cells = (found[name, a] for a in architectures)
        lines.append(f"{name:72} {' '.join(f'{k.registers:>5}{k.shared:>5}{k.stack:>5}{k.spills:>5}' for k in cells)}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ptxas", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, help="default: %(default)s")
    parser.add_argument("--ptxas", type=Path, metavar="FILE", help="of another CUDA (default: nvcc's own)")
    args = parser.parse_args(argv)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = pool.map(lambda source: compile_source(source, args.arch, args.ptxas), SOURCES)
        kernels = [kernel for each in compiled for kernel in each.kernels]
    print(table(kernels))
    return 1 if any(kernel.stack or kernel.spills for kernel in kernels) else 0


if __name__ == "__main__":
    raise SystemExit(main())
