"""The persistent kernels of the GPU (csrc/persistent) on the emulated one, without torch: tests/persistent/check.cpp.

``pytest -m isa`` under ``FUSEDRNN_CPU_ISA=persistent`` (test_isa.py does so) checks them inside a layer. Here they are
held against a plain loop, for every cell, type and geometry of a cluster; the emulator against programs that it must
refuse; and both against mutants: each barrier left out, each index of a buffer or a fragment changed must be noticed.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import fusedrnn
from benchmarks import probes
from benchmarks.gpu import estimate

ROOT = Path(__file__).parent.parent
COMPILER = shlex.split(os.environ.get("CXX", "c++"))
FLAGS = ("-std=c++20", "-O1", "-Wall", "-Werror", "-Wno-unknown-pragmas")


def compiled(output: Path, *inputs: Path | str) -> Path:
    subprocess.run([*COMPILER, *FLAGS, *inputs, "-o", output], check=True)
    return output


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("persistent") / "emulator.o"
    return compiled(output, "-c", ROOT / "csrc/persistent/emulator.cpp")


@pytest.fixture(scope="module")
def check(emulator: Path) -> Path:
    return compiled(emulator.parent / "check", ROOT / "tests/persistent/check.cpp", emulator)


@pytest.mark.long
@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_loops_equal_a_plain_one(check: Path, seed: str) -> None:
    """Forward and backward, whatever the order of the threads; no race, no unwritten word, no thread left waiting."""
    done = run(check, "loops", seed)
    assert done.returncode == 0, done.stdout + done.stderr


def test_fragments_are_those_of_cutlass(check: Path) -> None:
    assert run(check, "fragments").returncode == 0


FAULTS = {
    "none": "nothing",
    "read after write": "with no barrier between them",
    "write after read": "with no barrier between them",
    "write after write": "with no barrier between them",
    "half a word": "with no barrier between them",
    "another block": "thread 0 of block 1 reads byte 0 of shared memory, which thread 0 of block 0 wrote",
    "between arrive and wait": "with no barrier between them",
    "another group": "with no barrier between them",
    "unwritten": "which nobody has written",
    "beyond the end": "of 1024 of shared memory",
    "misaligned": "of 1024 of shared memory",
    "a lane stays away": "no thread can go on: thread 0 of block 0 waits for the other lanes of its warp",
    "lanes diverge": "comes to another collective than other lanes of its warp",
    "a block stays away": "waits for the cluster's barrier",
    "wait without arrive": "before it has arrived",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulator_stops(check: Path, fault: str) -> None:
    done = run(check, "fault", fault)
    assert done.returncode == 0 and FAULTS[fault] in done.stdout, done.stdout + done.stderr


# ---- the plan ------------------------------------------------------------------------------------------------------

KIB = 1024
#: Compute capability, shared memory that a block may have.
GPUS = {"T4": (7, 64 * KIB), "A100": (8, 163 * KIB), "RTX 4090": (8, 99 * KIB), "H100": (9, 227 * KIB)}
#: Cells with one product a step.
PERSISTENT = [cell["name"] for cell in fusedrnn._C.cells() if cell["first"] == cell["gates"]]
MULTIPLIERS = ("bfloat16", "tf32", "float32")


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("multiplier", MULTIPLIERS)
@pytest.mark.parametrize("cell", PERSISTENT)
def test_a_plan_fits_the_gpu(cell: str, multiplier: str, gpu: str) -> None:
    """Every unit has a place, every weight too; threads, shared memory and blocks are no more than there are."""
    major, shared_bytes = GPUS[gpu]
    vector = 32 if multiplier == "bfloat16" else 16
    refused = []
    for H in [*range(1, 70), 100, 127, 128, 129, 200, 256, 257, 512, 513, 700, 1024, 1025, 2048, 1 << 40]:
        for backward in (False, True):
            plan = probes.persistent_plan(cell, multiplier, H, backward, major, shared_bytes)
            if plan["refusal"]:
                refused.append(H)
                continue
            blocks, parts, vectors = plan["blocks"], plan["parts"], plan["vectors"]
            assert blocks in ((1, 2, 4, 8) if major >= 9 else (1,))
            assert blocks * plan["tiles"] * 16 >= H and parts * vectors * vector >= H and 0 <= plan["held"] <= vectors
            assert 32 <= plan["tiles"] * parts * 32 <= 512 and parts in (1, 2, 4)
            assert plan["shared_bytes"] <= shared_bytes
            assert 100 < plan["cycles"] < 10_000
    assert all(H in refused for H in (1025, 2048, 1 << 40))
    if major < 8:
        assert 1 in refused
    else:
        assert min(refused) > (128 if multiplier == "bfloat16" and gpu != "RTX 4090" else 64)


def test_a_refusal_says_why() -> None:
    def why(H: int, major: int, shared_bytes: int) -> str:
        return probes.persistent_plan("lstm", "bfloat16", H, False, major, shared_bytes)["refusal"]

    assert "compute capability 8.0" in why(64, *GPUS["T4"])
    assert why(2000, *GPUS["H100"]) == "too many units"
    assert "no clusters" in why(512, *GPUS["A100"])
    assert why(128, 9, 1 * KIB) == "too little shared memory"
    assert why(512, *GPUS["H100"]) is None


def test_the_page_of_estimates_is_what_the_command_prints() -> None:
    assert (ROOT / "docs/gpu-estimates.md").read_text() == estimate.page()
    assert estimate.step("lstm", "bfloat16", 64, 1, False) == estimate.step("lstm", "bfloat16", 64, 8, False)
    assert estimate.step("lstm", "bfloat16", 512, 256, False) > estimate.step("lstm", "bfloat16", 512, 64, False)
    assert estimate.step("lstm", "bfloat16", 2048, 1, False) is None


# ---- mutants -------------------------------------------------------------------------------------------------------

#: What is changed wherever it stands in the kernels: a pattern and its replacement.
CHANGES = {
    "barrier left out": (r"m\.(cluster_arrive|cluster_wait)\(\);|m\.group_sync\([^;]*;", ""),
    "buffer not changed": (r"; buffer \^= 1\)", ";)"),
    "same buffer": (r"\(buffer \^ 1\)", "buffer"),
    "other half of a fragment": (r"\b8 \* \(r & 1\)", "8 * (r >> 1)"),
    "rows and halves of k change places": (r"\(r >> 1\) \* kPer\b", "(r & 1) * kPer"),
    "products of a vector change places": (r"\bb\.r\[2 \* j\], b\.r\[2 \* j \+ 1\]", "b.r[2 * j + 1], b.r[2 * j]"),
    "lanes change places": (r"\bat_\.g\b", "at_.t"),
    "lanes change places too": (r"\bat_\.t\b", "at_.g"),
    "pairs change places": (r"\bp & 1\b", "p >> 1"),
    "units change places": (r"\? p >> 1 :", "? p & 1 :"),
    "parts change places": (r"\bpart & 1 :", "part >> 1 :"),
    "first part for all": (r"\bat_\.part \* s\.vectors\b", "0 * s.vectors"),
    "first tile for all": (r"\b(at_?\.)?tile \* kTileUnits\b", "0 * kTileUnits"),
    "one weight for all gates": (r"load\(s, where, gate,", "load(s, where, 0,"),
    "another part's sums": (r"place\(at\.part, from, i, p\)", "place(from, at.part, i, p)"),
    "odd and even lanes": (r"\bodd \? got : keep\b", "odd ? keep : got"),
    "odd samples": (r"2 \* at\.t \+ odd", "2 * at.t"),
    "gates side by side": (r"gate \* gate_row", "gate * row"),
    "gates of one row": (r"\(gate \* k \+ v\)", "v"),
    "stale x": (r"^ +load_x\(\);\n +m\.cluster_arrive", "      m.cluster_arrive"),
    "first row": (r"reverse \? -rows\(\) : own", "reverse ? -own : own"),
    "row before": (r"reverse \? row \+ rows\(\)", "reverse ? row - rows()"),
    "carried samples": (r"reverse \? rows_of\(step - 1\) : rows\(\)", "rows()"),
    "sign of dy": (r"dh\[i\] \+ dy\[i\]", "dh[i] - dy[i]"),
    "sign of dc": (r"dc\[i\] \+ dc_given\[i\]", "dc[i] - dc_given[i]"),
    "sign of what is sent": (r"dh\[i\] \+ sent\[0\]\[i\]", "dh[i] - sent[0][i]"),
    "sign of a gate": (r"total\[0\]\[i\] \+= sums", "total[0][i] -= sums"),
    "sign of a bias": (r"x\[gate\]\[i\] \+ bias", "x[gate][i] - bias"),
    "severed step": (r"time\(reverse \? step - 1 : step\)", "time(step)"),
}


@dataclass(frozen=True)
class Mutant:
    """A file with one place changed."""

    path: str
    line: int
    name: str
    text: str


def mutants() -> Iterator[Mutant]:
    for file in ("geometry", "products", "span", "forward", "backward"):
        path = f"csrc/persistent/{file}.h"
        text = (ROOT / path).read_text()
        for name, (pattern, replacement) in CHANGES.items():
            for found in re.finditer(pattern, text, re.MULTILINE):
                changed = text[: found.start()] + found.expand(replacement) + text[found.end() :]
                yield Mutant(path, text[: found.start()].count("\n") + 1, name, changed)


MUTANTS = list(mutants())


def test_every_change_is_made_somewhere() -> None:
    assert {mutant.name for mutant in MUTANTS} == set(CHANGES)


@pytest.mark.long
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{Path(mutant.path).stem}:{mutant.line} {mutant.name}")
def test_a_mutant_is_noticed(mutant: Mutant, emulator: Path, tmp_path: Path) -> None:
    for folder in ("csrc", "tests/persistent"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    (tmp_path / mutant.path).write_text(mutant.text)
    program = compiled(tmp_path / "check", "-DFEW", "-w", "-O0", tmp_path / "tests/persistent/check.cpp", emulator)
    done = run(program, "loops", "1", "2")
    assert done.returncode == 1 and done.stdout, "no difference, no race"
