"""What the build must hold: the registries agree, no symbol leaks between instruction sets, threads are honoured."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedrnn
from fusedrnn import _C

ROOT = Path(__file__).parent.parent


def test_python_registry_equals_the_compiled_one():
    compiled = {cell["name"]: cell for cell in _C.cells()}
    assert list(compiled) == list(fusedrnn.CELLS)
    for name, cell in fusedrnn.CELLS.items():
        expected = {"gates": len(cell.gates), "states": len(cell.states), "saved": cell.saved}
        expected |= {"projectable": cell.projectable}
        assert {constant: compiled[name][constant] for constant in expected} == expected, name


def test_fake_and_real_kernels_agree_on_saved_width():
    for hidden in (1, 5, 16, 64, 100, 256):
        for dtype in fusedrnn.ops.KERNEL_DTYPES["cpu"]:
            x = torch.zeros(2, 3, 4, dtype=dtype)
            weights = [torch.zeros(4 * hidden, 4, dtype=dtype), torch.zeros(4 * hidden, hidden, dtype=dtype)]
            real = fusedrnn.ops.layer_forward(x, None, None, None, weights, "lstm", False, True)
            meta = fusedrnn.ops.layer_forward(
                x.to("meta"), None, None, None, [w.to("meta") for w in weights], "lstm", False, True
            )
            assert [(r.shape, r.dtype) for r in real] == [(m.shape, m.dtype) for m in meta]


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils' nm")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF objects")
@pytest.mark.parametrize("isa", _C.built_isas())
def test_objects_of_an_instruction_set_share_no_symbol(isa):
    """A weak function compiled for AVX-512 could be picked by the linker for everyone, and crash older CPUs."""
    objects = sorted((ROOT / "build").glob(f"temp*/**/isa_{isa}.o"), key=lambda path: path.stat().st_mtime)
    if not objects:
        pytest.skip("no object files: the package was installed, not built in this checkout")
    symbols = subprocess.run(["nm", "-C", objects[-1]], capture_output=True, text=True, check=True).stdout
    shared = [line for line in symbols.splitlines() if line[17:18] in "WVu" and "__gxx_personality" not in line]
    exported = [line for line in symbols.splitlines() if line[17:18] in "TDBR"]
    assert shared == []
    assert len(exported) == 1 and "kTable" in exported[0], exported


THREADS = """
import os, torch, fusedrnn
torch.set_num_threads({threads})
layer = fusedrnn.LSTM(64, 64)
x = torch.randn(50, 32, 64)
with torch.no_grad():
    torch.set_num_threads(1)
    layer(x)
    before = len(os.listdir("/proc/self/task"))
    torch.set_num_threads({threads})
    layer(x)
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
@pytest.mark.parametrize("count", [1, 2, 3])
def test_set_num_threads_is_honoured(count):
    """Compiled without -fopenmp, threading would be lost in silence."""
    code = THREADS.format(threads=count)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert int(out) == count - 1


@pytest.mark.parametrize(("value", "message"), [("sse9", "must be one of"), ("avx512", "does not have it")])
def test_wrong_instruction_set_is_an_import_error(value, message):
    if value in _C.supported_isas():
        pytest.skip("this CPU has it")
    if value == "avx512" and value not in _C.built_isas():
        pytest.skip("not in this build")
    run = subprocess.run(
        [sys.executable, "-c", "import fusedrnn"],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "FUSEDRNN_CPU_ISA": value},
    )  # fmt: skip
    assert run.returncode == 1 and "ImportError" in run.stderr and message in run.stderr


@pytest.mark.parametrize("built", ["2.9.1+cu128", "1.13.0", None])
def test_an_extension_of_another_torch_is_named(built: str | None, tmp_path: Path) -> None:
    """Also where the loader would stop at an undefined symbol: the file that it would load is empty here."""
    package = tmp_path / "fusedrnn"
    shutil.copytree(Path(fusedrnn.__file__).parent, package, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    if built:
        (package / "_C.so").touch()
        (package / "_C.torch").write_text(built)
    done = subprocess.run([sys.executable, "-c", "import fusedrnn"], cwd=tmp_path, capture_output=True, text=True)
    expected = f"built with torch {built}, but torch {torch.__version__} is running" if built else "is not built"
    assert done.returncode == 1 and expected in done.stderr and "--no-build-isolation" in done.stderr


def test_the_build_leaves_its_torch() -> None:
    assert (Path(fusedrnn.__file__).parent / "_C.torch").read_text().strip() == torch.__version__


@pytest.mark.parametrize("running", ["2.13.0", "2.13.2+cu130", "2.13.0a0+git123"])
def test_an_extension_of_the_same_minor_version_is_loaded(running: str, tmp_path: Path) -> None:
    (tmp_path / "_C.so").touch()
    (tmp_path / "_C.torch").write_text("2.13.0+cpu\n")
    fusedrnn.extension.check(tmp_path, running)
