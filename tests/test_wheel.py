"""The wheel: what it holds, and that it works outside the checkout. (``make wheel`` builds the whole of it.)"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch

from fusedrnn import extension
from fusedrnn.cells import CELLS
from release import supported, versions, wheel

ROOT = Path(__file__).parent.parent
#: A cell of a user's own, compiled from the sources in the package.
OWN = """
import torch, fusedrnn
from fusedrnn.user_cells.library import HEADERS

@fusedrnn.cell(gates="h")
def plain(x, rec, h):
    return torch.tanh(x.h + rec.h)

plain.Module(2, 3)(torch.ones(4, 1, 2))[0].sum().backward()
print(HEADERS)
"""


def names_of_sources() -> set[str]:
    folders = ("added", "cells", "cpu", "cuda", "persistent", "stepwise")
    files = {path for folder in folders for path in (ROOT / "csrc" / folder).rglob("*") if path.is_file()}
    return {str(path.relative_to(ROOT)) for path in files} | {"csrc/problem.h"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For this torch and Python alone, from the objects that the checkout has."""
    if not (ROOT / "build/log").exists():
        pytest.skip("not built in this checkout")
    there = tmp_path_factory.mktemp("wheel")
    return wheel.build(there / "dist", work=there, base=ROOT / "build")


def test_it_is_for_every_python_and_holds_the_package_alone(built: Path) -> None:
    assert built.name.split("-", 2)[2].startswith("py3-none-")
    names = {name for name in zipfile.ZipFile(built).namelist() if ".dist-info/" not in name}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "fusedrnn").rglob("*.py")}
    # What cells of a user's own are compiled from.
    headers = {f"fusedrnn/{name}" for name in names_of_sources()}
    assert names == sources | headers | {"fusedrnn/_ops.so", f"fusedrnn/_fast-{extension.versions()}.so"}


def test_it_works_outside_the_checkout(built: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(built).extractall(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    told = subprocess.run(
        [sys.executable, "-c", f"{wheel.TRY}\nprint(fusedrnn.__file__)"],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert told.stdout.splitlines()[-1].startswith(str(tmp_path))
    (tmp_path / "own.py").write_text(OWN)
    environment |= {"FUSEDRNN_CACHE": str(tmp_path / "cache"), "FUSEDRNN_CXX_FLAGS": "-O0"}
    command = [sys.executable, "own.py"]
    told = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert told.returncode == 0 and told.stdout.startswith(str(tmp_path)), told.stderr


def test_a_module_for_each_torch_and_python_whose_headers_are_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("torch2_9", "torch2_11", "cpython-310-darwin", "cpython-313-darwin"):
        (tmp_path / name).mkdir()
    told = {}
    monkeypatch.setattr(setuptools, "setup", told.update)
    monkeypatch.setenv("FUSEDRNN_HEADERS", str(tmp_path))
    monkeypatch.setenv("FUSEDRNN_CUDA", "0")
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    library, *modules = told["ext_modules"]
    assert library.include_dirs[0] == str(tmp_path / "torch2_9")
    first = {module.name: module.include_dirs[:3] for module in modules}
    assert len(first) == 4
    headers = tmp_path / "torch2_11"
    assert first["fusedrnn._fast-torch2_11-cpython-310-darwin"] == [
        str(headers), str(headers / "torch/csrc/api/include"), str(tmp_path / "cpython-310-darwin"),
    ]  # fmt: skip


@pytest.mark.parametrize("made", [[], ["torch2_11"], ["cpython-311-darwin"]])
def test_a_folder_without_headers_is_an_error(made: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in made:
        (tmp_path / name).mkdir()
    monkeypatch.setenv("FUSEDRNN_HEADERS", str(tmp_path))
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit, match="FUSEDRNN_HEADERS: no headers in .*: python -m release.wheel --headers"):
        runpy.run_path("setup.py")


def test_nothing_but_headers_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(SystemExit, match="holds what is no header: mine"):
        wheel.collect([], [], tmp_path)
    assert (tmp_path / "mine").exists()


def test_what_the_public_ci_runs_needs_the_package_alone() -> None:
    """It runs outside the checkout: no benchmarks there, no sources."""
    command = re.search(r'^test-command = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    files = re.findall(r"\{project\}/(tests/\w+\.py)", command)
    assert len(files) > 3
    for name in files:
        assert not re.search(r"^(from|import) (benchmarks|release)", (ROOT / name).read_text(), re.MULTILINE), name


def test_a_part_of_the_tests_is_of_three_cells() -> None:
    left = [cell for cell in CELLS if not any(word in cell for word in versions.OTHER_CELLS)]
    assert left == ["rnn_tanh", "lstm", "gru"]


def test_every_supported_version_is_tried_whole_or_in_part() -> None:
    assert {pair.torch for pair in versions.WHOLE} == {pair.torch for pair in versions.PAIRS} == set(supported.TORCH)
    assert {pair.python for pair in versions.WHOLE} == {pair.python for pair in versions.PAIRS} == set(supported.PYTHON)
    assert set(versions.WHOLE) <= set(versions.PAIRS)
    assert not set(versions.PAIRS) & supported.ABSENT
    minor = "{}.{}".format(*extension.OLDEST)
    assert supported.TORCH[0].startswith(minor + ".") and f'"torch>={minor}"' in (ROOT / "pyproject.toml").read_text()
    assert any(torch.__version__.startswith(version.rpartition(".")[0]) for version in supported.TORCH)
