"""The source distribution builds, and CONTRIBUTING's recipe for a cell leaves nothing out.

``recipe/cells.patch`` adds a cell by that recipe: an LSTM with coupled gates, CIFG, with three gates and two states
that are not projected, which is like no other. Here it is applied to an unpacked source distribution, which is built
for the base instruction set, and the tests of the new cell are run there: they go through the registry. If the patch no
longer applies, add the cell to a checkout by hand and renew it with ``git diff -U1``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATCH = Path(__file__).parent / "recipe/cells.patch"
#: gradcheck, second derivatives, packed input, lengths and resets, vmap and per-sample gradients, record_gradients,
#: compare, convert and revert, initialisers; what reads the registries, the equations and their numbers.
FILES = (
    "gradcheck", "second_order", "packed", "sequences", "transforms", "recording", "compare", "convert", "reference",
    "derivations", "structure", "build", "dropout", "dropout_modules", "through_time", "step", "init", "numerics",
    "modules",
)  # fmt: skip


def run(command: list[str], tree: Path, **settings: str) -> str:
    own = {name: value for name, value in os.environ.items() if name != "FUSEDRNN_CPU_ISA" and "PYTEST" not in name}
    own |= {"PYTHONPATH": str(tree), "FUSEDRNN_CUDA": "0", **settings}
    done = subprocess.run(command, cwd=tree, env=own, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.skipif(shutil.which("git") is None, reason="applies a patch with git")
def test_a_cell_is_added_to_the_source_distribution(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", str(tmp_path), "sdist", "-d", str(tmp_path)]
    run(command, ROOT)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (tree,) = (path for path in tmp_path.iterdir() if (path / "setup.py").exists())
    files = [path.relative_to(ROOT) for top in ("csrc", "fusedrnn") for path in (ROOT / top).rglob("*.*")]
    needed = {path for path in files if path.suffix in (".cpp", ".cu", ".h", ".inl", ".py")}
    needed |= {Path(name) for name in ("LICENSE", "README.md", "pyproject.toml", "setup.py")}
    assert len(needed) > 70 and [path for path in needed if not (tree / path).exists()] == []

    run(["git", "apply", str(PATCH)], tree, GIT_CEILING_DIRECTORIES=str(tmp_path))
    flags = "-O1 -DFUSEDRNN_BASE_ONLY"
    run([sys.executable, "setup.py", "build_ext", "--inplace"], tree, FUSEDRNN_CXX_FLAGS=flags, MAX_JOBS="2")
    tests = [f"tests/test_{name}.py" for name in FILES]
    chosen = "cifg or lacks or registry or every_cell or every_line or every_number"
    said = run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *tests], tree)
    passed = int(said.rpartition(" passed")[0].split()[-1])
    assert passed > 300, said[-2000:]
