"""What the build must hold: the registries agree, no symbol leaks between instruction sets, threads are honoured."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import sysconfig
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
        expected |= {"projectable": cell.projectable, "split": cell.split, "parameters": len(cell.parameters)}
        expected |= {"columns": cell.gradient_blocks, "row_values": cell.row_values}
        expected |= {"first": len(cell.gates) if cell.first is None else cell.first}
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


@pytest.mark.skipif(fusedrnn._C.build()["fast"] is None, reason="no _fast here")
def test_a_module_that_does_not_load_is_done_without(tmp_path: Path) -> None:
    """The file is there, and is not what its name says."""
    there = package(tmp_path)
    (module,) = there.glob(f"_fast-{fusedrnn.extension.versions()}.*")
    module.write_bytes(b"")
    done = python("import torch, fusedrnn; print(fusedrnn.LSTM(3, 4)(torch.ones(2, 1, 3))[0].shape)", tmp_path)
    assert done.stdout == "torch.Size([2, 1, 4])\n", done.stderr
    assert f"RuntimeWarning: fusedrnn: {module.name} cannot be loaded: " in done.stderr


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ("libcublas.so.13: cannot open shared object file", "built for CUDA 13, running torch 2.13.0+cpu, which has"),
        ("libcudart.so.12.8: cannot open shared object file", "CUDA: install a torch for CUDA 12, or build again"),
        ("libtorch_cuda.so: cannot open shared object file: No such file", "built for CUDA, running torch 2.13.0+cpu"),
        ("libc10_cuda.so: cannot open shared object file: No such file", "no CUDA: install a torch for CUDA, or build"),
        ("libgomp.so.1: cannot open shared object file", "libgomp.so.1 is missing on this system: install it, or"),
        ("libc.so.6: version `GLIBC_2.99' not found (required by x)", "built for glibc 2.99 or newer, running "),
        ("_ops.so: undefined symbol: torch_new", "running torch 2.13.0+cpu, which has no torch_new: build again"),
        ("_ops.so: wrong ELF class: ELFCLASS32", "built for another machine, running "),
        (
            "/c/lib/libstdc++.so.6: version `GLIBCXX_3.4.99' not found (required by x)",
            "C++ runtime than the one loaded first, /c/lib/libstdc++.so.6, which has no GLIBCXX_3.4.99: update that",
        ),
        ("x.so: cannot open shared object file: Too many open files",) * 2,
        ("something else", "something else"),
    ],
)  # fmt: skip
def test_why_a_library_does_not_load(told: str, says: str) -> None:
    """One sentence: built for what, running what, what to do."""
    found = fusedrnn.extension.reason(told, "2.13.0+cpu", None)
    assert says in found and ("pip install" in found) == (told != says) and "\n" not in found


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ("/a b/_ops.so: cannot open shared object file: Permission denied", "may not read /a b/_ops.so: permit it"),
        ("libcublas.so.13: cannot open shared object file: Permission denied", "may not read libcublas.so.13: permit"),
        ("_ops.so: failed to map segment from shared object: Operation not permitted", "mounted noexec, or memory"),
        ("libgomp.so.1: cannot allocate memory in static TLS block", "import fusedrnn first, before other libraries"),
    ],
)
def test_a_library_that_another_build_would_not_help(told: str, says: str) -> None:
    found = fusedrnn.extension.reason(told, "2.13.0+cpu", None)
    assert says in found and "install it" not in found and fusedrnn.extension.BUILD not in found


def test_a_missing_symbol_names_what_was_built(tmp_path: Path) -> None:
    told = "_ops.so: undefined symbol: torch_new"
    assert fusedrnn.extension.reason(told, folder=tmp_path).startswith("built for another torch, running torch ")
    (tmp_path / "_fast-torch2_12-cpython-310-x86_64-linux-gnu.so").touch()
    assert fusedrnn.extension.reason(told, folder=tmp_path).startswith("built for torch 2.12; Python 3.10, running ")


def test_another_library_is_an_import_error(tmp_path: Path) -> None:
    """It loads, and has nothing of ours."""
    there = package(tmp_path, "_ops*")
    shutil.copyfile(torch._C.__file__, there / "_ops.so")
    done = python("import fusedrnn", tmp_path)
    assert f"ImportError: fusedrnn: {there / '_ops.so'} is another library: it has no fusedrnn_" in done.stderr


def test_a_library_that_does_not_load_is_an_import_error(tmp_path: Path) -> None:
    there = package(tmp_path)
    (there / "_ops.so").unlink()
    (there / "_ops.so").write_text("not a library")
    done = python("import fusedrnn", tmp_path)
    assert "ImportError: fusedrnn: _ops.so cannot be loaded: damaged, or built for another machine" in done.stderr


def test_a_module_of_another_build_is_not_connected() -> None:
    if fusedrnn._C.build()["fast"] is None:
        pytest.skip("no _fast here")
    another = (ctypes.c_uint64 * 32)()  # an interface whose layout is 0
    assert not fusedrnn._C._fast.connect(ctypes.addressof(another))
    assert fusedrnn.LSTM(3, 4)(torch.ones(2, 1, 3))[0].shape == (2, 1, 4)


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
    assert exported and all(re.search(r"fusedrnn::k(Table|Int8|BFloat16)\w+$", line) for line in exported), exported


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


def python(code: str, folder: Path, **settings: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(folder), **settings}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


def package(folder: Path, *left_out: str) -> Path:
    """A copy of the package."""
    ignore = shutil.ignore_patterns("__pycache__", *left_out)
    return Path(shutil.copytree(Path(fusedrnn.__file__).parent, folder / "fusedrnn", ignore=ignore))


def test_what_is_not_built_says_so(tmp_path: Path) -> None:
    package(tmp_path, "_ops*", "_fast*")
    done = python("import fusedrnn", tmp_path)
    assert done.returncode == 1 and "is not built" in done.stderr and "--no-build-isolation" in done.stderr


def test_a_package_in_a_zip_says_so(tmp_path: Path) -> None:
    package(tmp_path / "all", "_ops*", "_fast*")
    archive = shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "all")
    done = python(f"import sys; sys.path.insert(0, {archive!r}); import fusedrnn", tmp_path)
    assert done.returncode == 1 and "ImportError: fusedrnn must be unpacked" in done.stderr


def test_a_second_copy_in_a_process_is_refused(tmp_path: Path) -> None:
    """Torch would end the process."""
    there = package(tmp_path)
    code = f"""
import sys, fusedrnn
for name in [name for name in sys.modules if name.startswith("fusedrnn")]:
    del sys.modules[name]
sys.path.insert(0, {str(there.parent)!r})
import fusedrnn
"""
    done = python(code, ROOT)
    assert done.returncode == 1 and "ImportError: the ops of fusedrnn are loaded already" in done.stderr


def test_an_import_that_failed_says_why_again() -> None:
    code = """
try:
    import fusedrnn
except ImportError as first:
    try:
        import fusedrnn
    except ImportError as second:
        assert str(first) == str(second), second
        print("twice:", second)
"""
    done = python(code, ROOT, FUSEDRNN_CPU_ISA="sse9")
    assert done.stdout.startswith("twice: FUSEDRNN_CPU_ISA must be one of "), done.stdout + done.stderr


@pytest.mark.parametrize("versions", ["torch2_9-{soabi}", "torch{minor}-cpython-35m-{platform}", None])
def test_without_the_module_for_these_versions_everything_goes_by_the_ops(versions: str | None, tmp_path: Path) -> None:
    """Also where the loader would stop at an undefined symbol: the file that it would load is empty here."""
    there = package(tmp_path, "_fast*")
    if versions:
        minor, soabi = "_".join(torch.__version__.split(".")[:2]), sysconfig.get_config_var("SOABI")
        versions = versions.format(minor=minor, soabi=soabi, platform=soabi.split("-", 2)[2])
        (there / f"_fast-{versions}.so").touch()
    code = """
import torch, fusedrnn
assert fusedrnn._C.build()["fast"] is None
for name in ("RNN", "LSTM", "GRU"):
    ours, theirs = getattr(fusedrnn, name)(3, 4), getattr(torch.nn, name)(3, 4)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 2, 3)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    y, state = ours.step(x[0])
    torch.testing.assert_close(ours.step(x[1], state)[0], theirs(x[:2])[0][1])
    cell = getattr(fusedrnn, name + "Cell")(3, 4)
    with torch.no_grad():
        cell(x[0])
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "RuntimeWarning: fusedrnn: no _fast for" in done.stderr
    told = python("import fusedrnn.info; fusedrnn.info.main()", tmp_path).stdout
    (line,) = (line for line in told.splitlines() if line.startswith("short calls"))
    assert "by the ops alone" in line and "pip install" in line
    known = "torch 2.9" if versions and "2_9" in versions else "Python 3.5" if versions else "none"
    assert re.search(rf"no _fast for .* \(built for: (.*; )?{known}", done.stderr)
    assert f"but for {known}" in line or f"; {known})" in line


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils' nm")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF objects")
def test_the_library_depends_on_no_version_of_torch_or_python() -> None:
    """Of torch its stable C functions alone; of Python nothing."""
    (library,) = Path(fusedrnn.__file__).parent.glob("_ops*.so")
    command = ["nm", "-D", "--undefined-only", library]
    names = [
        line.split()[-1]
        for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    ]
    others = [name for name in names if "@" not in name]  # those of libc, libm and libstdc++ have versions
    of_torch = [name for name in others if re.match(r"(aoti_torch|torch)_\w+$", name)]
    allowed = re.compile(r"(omp|GOMP|_ITM|__asan|__ubsan|__tsan)_\w+|__gmon_start__")
    assert len(of_torch) > 20
    assert [name for name in others if name not in of_torch and not allowed.fullmatch(name)] == []


@pytest.mark.parametrize("running", ["2.13.0", "2.13.2+cu130", "2.13.0a0+git123"])
def test_a_module_of_the_same_minor_versions_is_loaded(running: str, tmp_path: Path) -> None:
    soabi = sysconfig.get_config_var("SOABI")
    fitting = tmp_path / f"_fast-torch2_13-{soabi}.so"
    others = (f"{fitting.name}.bak", f"_fast-torch2_13-{soabi}.bak", f"_fast-torch2_12-{soabi}.so.old")
    for name in (*others, "_ops.so", f"_fast-torch2_1-{soabi}.so", "_fast-torch2_13-cpython-27mu.so"):
        (tmp_path / name).touch()
    assert fusedrnn.extension.module(tmp_path, running) is None
    fitting.touch()
    assert fusedrnn.extension.module(tmp_path, running) == fitting
    assert fusedrnn.extension.module(tmp_path, "2.12.1") is None
    assert fusedrnn.extension.library(tmp_path, running) == tmp_path / "_ops.so"
    with pytest.raises(ImportError, match="needs torch >= 2.11, got 2.10.1"):
        fusedrnn.extension.library(tmp_path, "2.10.1")


SETUP = """
import runpy, setuptools
setuptools.setup = lambda **given: extensions.extend(given["ext_modules"])
extensions = []
runpy.run_path("setup.py", run_name="__main__")
for extension in extensions:
    print(extension.name, id(extension.libraries), id(extension.extra_link_args), id(extension.extra_compile_args))
"""


def test_extensions_share_no_list() -> None:
    """Torch adds to them: CUDA's libraries are for one extension alone."""
    done = subprocess.run([sys.executable, "-c", SETUP], capture_output=True, text=True, check=True, cwd=ROOT)
    lists = [number for line in done.stdout.splitlines() for number in line.split()[1:]]
    assert len(done.stdout.splitlines()) == 2 and len(set(lists)) == len(lists) == 6
