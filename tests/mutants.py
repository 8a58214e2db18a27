"""Shows that the tests notice a wrong sign: flips each one in the backward passes of csrc/cells and in its rules.h.

    python tests/mutants.py [--only lstm.h] [--jobs 2]

Each mutant is one changed line, compiled for the base instruction set into a package of its own beside the objects of
the last build; it is killed if the file's tests fail, ``test_gradcheck.py`` for a cell. Exits non-zero if one
survives. Minutes, not part of the suite.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.cpp_extension import library_paths

ROOT = Path(__file__).parent.parent
#: Whose failure kills a mutant of the file: zoneout and masks, clipping, norms, none of which is a cell's.
TESTS = {
    "rules.h": ["tests/test_dropout.py", "tests/test_through_time.py", "tests/test_recording.py"],
    "layer_norm.h": ["tests/test_gradcheck.py", "-k", "layer_norm"],
}


@dataclass(frozen=True)
class Mutant:
    """One changed line."""

    file: str
    line: int
    text: str
    equation: str
    what: str


def backward_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The statements of a cell's functions named backward, backward_first, dc_of or normed_gradient, or of all
    functions, with line numbers.
    """
    every = path.name in TESTS
    inside = every
    for number, line in enumerate(path.read_text().splitlines()):
        if re.search(r"static \w+ \w+\(", line):
            inside = bool(re.search(r"static (void backward|V dc_of|void dc_of|V normed_gradient)", line))
        elif line == "  }":
            inside = every
        elif inside and re.match(r"\s+(?:(const V|dx|drec|dunit|d|dc|sum)\b.* = |return ).*;", line):
            yield number, line


def mutants_of(path: Path) -> Iterator[Mutant]:
    """Each statement negated, each sum and difference inside it turned, each d[...] = 0 left out."""
    for number, line in backward_lines(path):
        code, _, comment = line.partition("//")
        found = re.search(r"\((\w+)\)", comment)
        if not found:
            continue  # a line that names no equation only copies values
        tag = found.group(1)
        code = code.rstrip().rstrip(";")
        is_result = code.lstrip().startswith("return ")
        head, _, value = code.partition("return ") if is_result else code.rpartition(" = ")
        if is_result:
            head += "return"
            yield Mutant(path.name, number, f"const auto all = {value}; return all - all - all;", tag, "negated")
        elif value.startswith("tanh("):
            continue  # of which only the square is used
        elif value == "V(0)":
            yield Mutant(path.name, number, "", tag, "left out")
            continue
        else:
            yield Mutant(path.name, number, f"{head} = V(0) - ({value});", tag, "negated")
        for sign in re.finditer(r" ([+-]) ", value):
            turned = value[: sign.start(1)] + ("-" if sign[1] == "+" else "+") + value[sign.end(1) :]
            text = f"{head} {turned};" if is_result else f"{head} = {turned};"
            yield Mutant(path.name, number, text, tag, f"'{sign[1]}' turned at {sign.start(1)}")


def build(mutant: Mutant, workspace: Path) -> None:
    """A copy of the package whose base instruction set holds the mutant."""
    shutil.copytree(ROOT / "csrc", workspace / "csrc")
    ignore = shutil.ignore_patterns("_ops*.so", "__pycache__")
    shutil.copytree(ROOT / "fusedrnn", workspace / "fusedrnn", ignore=ignore)
    shutil.copytree(ROOT / "tests", workspace / "tests", ignore=ignore)
    source = workspace / "csrc" / "cells" / mutant.file
    lines = source.read_text().splitlines()
    lines[mutant.line] = mutant.text
    source.write_text("\n".join(lines) + "\n")
    built = max((ROOT / "build").glob("temp.*"), key=lambda path: path.stat().st_mtime)
    changed = workspace / "isa_base.o"
    compiler = os.environ.get("CXX", "c++")
    flags = "-std=c++20 -O1 -fopenmp -ffp-contract=fast -fPIC -fvisibility=hidden -w".split()
    subprocess.run([compiler, *flags, "-c", workspace / "csrc/cpu/isa_base.cpp", "-o", changed], check=True)
    objects = [path for path in (built / "fusedrnn._ops").rglob("*.o") if path.name != "isa_base.o"]
    libraries = [f"-L{path}" for path in library_paths()] + "-lc10 -ltorch -ltorch_cpu -ltorch_python".split()
    extension = workspace / "fusedrnn" / "_ops.so"
    subprocess.run([compiler, "-shared", changed, *objects, *libraries, "-o", extension], check=True)


def killed(mutant: Mutant) -> bool:
    """Whether the tests fail on the mutant. A crash counts, a test run that finds no tests does not."""
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder)
        build(mutant, workspace)
        environment = {**os.environ, "PYTHONPATH": str(workspace), "FUSEDRNN_CPU_ISA": "base", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        # Of a cell's file the tests of its cells.
        command += TESTS.get(mutant.file) or ["tests/test_gradcheck.py", "-k", Path(mutant.file).stem]
        run = subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True)
        if run.returncode not in (0, 1):
            raise RuntimeError(f"pytest ended with {run.returncode}:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
        return run.returncode == 1


def main(arguments: list[str] | None = None) -> int:
    """Runs every mutant; returns the number of survivors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="files whose name contains this")
    parser.add_argument("--jobs", type=int, default=torch.get_num_threads(), help="mutants at a time")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    options = parser.parse_args(arguments)
    files = sorted(path for path in (ROOT / "csrc" / "cells").glob("*.h") if options.only in path.name)
    mutants = [mutant for path in files for mutant in mutants_of(path)]
    if options.list:
        print(*mutants, sep="\n")
        return 0
    survivors = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutant, dead in zip(mutants, pool.map(killed, mutants), strict=True):
            survivors += not dead
            verdict = "killed  " if dead else "SURVIVED"
            print(f"{verdict} ({mutant.equation}) {mutant.file}:{mutant.line + 1} {mutant.what}", flush=True)
    print(f"{len(mutants) - survivors} of {len(mutants)} mutants killed")
    return survivors


if __name__ == "__main__":
    sys.exit(min(main(), 1))
