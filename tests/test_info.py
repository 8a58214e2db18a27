"""``python -m fusedrnn.info``: every line tells what is in use."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

import fusedrnn
from fusedrnn import _C, info

ROOT = Path(__file__).parent.parent


def test_every_subject(threads: Callable[[int], None], monkeypatch) -> None:
    monkeypatch.delenv("FUSEDRNN_CPU_ISA", raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    threads(3)
    text = info.describe()
    assert f"fusedrnn {fusedrnn.__version__}, torch {torch.__version__}" in text["versions"]
    assert text["instruction set"].startswith(f"{_C.isa()}, {_C.vector_bytes()}-byte")
    assert all(name in text["instruction set"] for name in _C.built_isas())
    assert text["threads"].startswith("3 ") and "OMP_WAIT_POLICY=passive" in text["threads"]
    assert "-ffp-contract=fast" in text["compiler"] and _C.build()["compiler"] in text["compiler"]
    assert text["cells"].split(", ") == list(fusedrnn.CELLS)
    assert f"{info.cores()} core(s)" in text["processor"]


def test_the_command_prints_them_and_says_what_is_forced() -> None:
    command = [sys.executable, "-m", "fusedrnn.info"]
    environment = os.environ | {"FUSEDRNN_CPU_ISA": "base"}
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment).stdout
    assert [line.split("  ")[0].strip() for line in out.splitlines()] == list(info.describe())
    assert "base, 16-byte vectors, forced by FUSEDRNN_CPU_ISA" in out


def test_what_was_measured_on_a_gpu(monkeypatch, tmp_path: Path) -> None:
    file = tmp_path / "choices.txt"
    monkeypatch.setattr(_C, "choices_file", lambda: str(file))
    assert info.describe()["CUDA plan"].endswith("auto has measured nothing")
    lines = [
        "fusedrnn choices 1",
        *(f"a GPU\tkind {i}\t{way}\t2\t1\t" for i, way in enumerate(("stepwise", "persistent"))),
    ]
    file.write_text("\n".join([*lines, "a line that is none", ""]))
    assert info.describe()["CUDA plan"].endswith(f"measured 2 kind(s) of calls, persistent for 1, in {file}")
