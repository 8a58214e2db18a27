"""Cells compiled after the package (csrc/added): what is kept, by whom it is made, and that it is the same cell."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import fusedrnn
from fusedrnn import _C
from fusedrnn.cells import CELLS
from fusedrnn.modules import FusedRNNBase
from fusedrnn.user_cells import compiler, library

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler")
ONE = 'extern "C" int one() { return 1; }\n'
#: Compiles ONE from the folder given as an argument and prints where the library is.
MAKE = """
import sys; from pathlib import Path; from fusedrnn.user_cells.compiler import *
source = Path(sys.argv[1])
units = [Unit(source / "one.cpp", compiler_if_any(), ("-fPIC",))]
print(library("one", units, {"added_cell.h": ""}, source, ["-shared"]))
"""
#: A compiler that writes a line for each call; and waits with compiling while there is a file.
WRAPPER = """#!/bin/sh
echo "$@" >> {folder}/calls
while [ "$1" != --version ] && [ -e {folder}/wait ]; do sleep 0.05; done
exec c++ "$@"
"""

started: list[subprocess.Popen] = []  # by a test


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a source, a compiler that tells its calls, and a cache of its own."""
    (tmp_path / "source").mkdir()
    (tmp_path / "source/one.cpp").write_text(ONE)
    wrapper = tmp_path / "compiler"
    wrapper.write_text(WRAPPER.format(folder=tmp_path))
    wrapper.chmod(0o700)
    monkeypatch.setenv("CXX", str(wrapper))
    monkeypatch.setenv("FUSEDRNN_CACHE", str(tmp_path / "cache"))
    yield tmp_path
    (tmp_path / "wait").unlink(missing_ok=True)
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    started.clear()


def start(place: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", MAKE, str(place / "source")]
    pipe = subprocess.PIPE
    started.append(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True))
    return started[-1]


def compiled(place: Path) -> int:
    """How often the source was compiled."""
    calls = place / "calls"
    return sum(" -c " in line for line in calls.read_text().splitlines()) if calls.exists() else 0


def test_processes_that_come_at_once_compile_once(place: Path) -> None:
    (place / "wait").touch()
    running = [start(place) for _ in range(4)]
    while compiled(place) == 0:
        time.sleep(0.05)
    (place / "wait").unlink()
    told = [process.communicate(timeout=60) for process in running]
    assert len({out for out, _ in told}) == 1 and Path(told[0][0].strip()).exists(), told
    assert compiled(place) == 1 and sum("compiling one, once" in error for _, error in told) == 1
    again, error = start(place).communicate(timeout=60)
    assert again == told[0][0] and error == "" and compiled(place) == 1


def test_a_process_that_dies_leaves_nothing_that_is_loaded(place: Path) -> None:
    (place / "wait").touch()
    dying, waiting = start(place), None
    while compiled(place) == 0:
        time.sleep(0.05)
    waiting = start(place)
    os.killpg(dying.pid, signal.SIGKILL)
    dying.communicate()
    while compiled(place) == 1:  # the one that waited has taken over
        time.sleep(0.05)
    (place / "wait").unlink()
    out, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 0 and compiled(place) == 2
    there = {path.name for path in Path(out.strip()).parent.iterdir()}
    assert there == {
        "cell.so",
        "cell.sha256",
        "added_cell.h",
        "lock",
    }


def test_it_is_compiled_again_for_another_source_or_compiler(place: Path) -> None:
    paths = {start(place).communicate(timeout=60)[0]}
    (place / "source/one.cpp").write_text(ONE.replace("return 1", "return 1 + 0"))
    paths |= {start(place).communicate(timeout=60)[0]}
    other = place / "other"
    shutil.copy(place / "compiler", other)
    os.environ["CXX"] = str(other)
    paths |= {start(place).communicate(timeout=60)[0]}
    assert len(paths) == 3 and compiled(place) == 3


def test_comments_do_not_count(place: Path) -> None:
    """Of the files that are compiled for one cell."""
    paths = set()
    for text in ("", "// a comment\n\n  // another\n", "int more;\n"):
        code = MAKE.replace('"added_cell.h": ""', f'"added_cell.h": {text!r}')
        told = subprocess.run([sys.executable, "-c", code, str(place / "source")], capture_output=True, check=True)
        paths.add(told.stdout)
    assert len(paths) == compiled(place) == 2


def test_what_the_compiler_says_is_told(place: Path) -> None:
    (place / "source/one.cpp").write_text("int one( { return nonsense; }")
    out, error = start(place).communicate(timeout=60)
    assert out == "" and "RuntimeError: the compiler failed with status 1" in error and "nonsense" in error
    assert list((place / "cache").rglob("*.so")) == list((place / "cache").rglob("making*")) == []


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(RuntimeError, match="CXX is 'no-such-compiler', which is not found. Install g\\+\\+ >= 10"):
        compiler.compiler()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="none of c\\+\\+, g\\+\\+ and clang\\+\\+ is found"):
        compiler.compiler()


def test_a_kept_library_needs_no_compiler(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a cache was filled elsewhere; but what would not be loaded otherwise is not loaded."""
    out, _ = start(place).communicate(timeout=60)
    for name, value in (("CXX", "no-such-compiler"), ("PATH", ""), ("CXX", "")):
        monkeypatch.setenv(name, value)
        assert start(place).communicate(timeout=60) == (out, "")
    assert compiled(place) == 1
    needed, library = "NoCompilerError: a C++ compiler is needed", Path(out.strip())
    (place / "cache").chmod(0o777)
    out, error = start(place).communicate(timeout=60)
    assert out == "" and "compiled cells are not kept: others can write" in error and needed in error
    (place / "cache").chmod(0o700)
    library.chmod(0o777)
    out, error = start(place).communicate(timeout=60)
    assert out == "" and "is not loaded: others can write" in error
    library.chmod(0o700)
    library.write_bytes(b"")
    out, error = start(place).communicate(timeout=60)
    assert out == "" and needed in error
    (place / "source/one.cpp").write_text(ONE.replace("return 1", "return 1 + 0"))
    assert needed in start(place).communicate(timeout=60)[1]
    monkeypatch.setenv("FUSEDRNN_CACHE", str(place / "empty"))
    assert needed in start(place).communicate(timeout=60)[1]


def test_a_compiler_of_another_version_compiles_again(place: Path) -> None:
    first = start(place).communicate(timeout=60)[0]
    text = (place / "compiler").read_text()
    (place / "compiler").write_text(text.replace("exec", '[ "$1" = --version ] && echo newer\nexec'))
    second = start(place).communicate(timeout=60)[0]
    assert second not in (first, "") and compiled(place) == 2
    (place / "compiler").write_text(text)
    assert start(place).communicate(timeout=60)[0] == first and compiled(place) == 2


def test_torchs_version_counts_where_its_headers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the place where it lies does not."""

    def digests() -> list[str]:
        link = [f"-L{library._TORCH / 'lib'}"]
        units = [library._units(isa, "Mgu", False) for isa in ("stepwise", "base")]
        return [compiler._digests(each, {}, Path("nowhere"), link, library._places())[0] for each in units]

    before = digests()
    monkeypatch.setattr(library, "_TORCH", Path("/elsewhere/torch"))
    assert digests() == before
    monkeypatch.setattr(torch, "__version__", "99.0")
    after = digests()
    assert after[0] != before[0] and after[1] == before[1]


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_a_folder_that_others_can_write_is_not_used(place: Path, mode: int) -> None:
    first, _ = start(place).communicate(timeout=60)
    (place / "cache").chmod(mode)
    out, error = start(place).communicate(timeout=60)
    assert "compiled cells are not kept: others can write" in error and not out.startswith(str(place / "cache"))
    assert compiled(place) == 2
    assert not Path(out.strip()).exists()  # it went with its process
    (place / "cache").chmod(0o700)
    Path(first.strip()).chmod(0o777)
    out, error = start(place).communicate(timeout=60)
    assert out == "" and "is not loaded: others can write" in error


def test_a_folder_below_one_that_others_can_write_is_not_used(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "open").mkdir()
    (place / "open").chmod(0o777)
    monkeypatch.setenv("FUSEDRNN_CACHE", str(place / "open/cache"))
    assert "others can write" in start(place).communicate(timeout=60)[1] and not (place / "open/cache").exists()
    (place / "open").chmod(0o1777)  # where nobody can put another folder in the place of mine
    assert start(place).communicate(timeout=60)[0].startswith(str(place / "open/cache"))


def test_nor_one_behind_a_link_in_such_a_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever can write there can let the link lead elsewhere."""
    for name, mode in (("open", 0o777), ("safe", 0o700)):
        (place / name).mkdir()
        (place / name).chmod(mode)
    (place / "open/second").symlink_to(place / "safe")
    (place / "first").symlink_to(place / "open/second")
    monkeypatch.setenv("FUSEDRNN_CACHE", str(place / "first"))
    assert "others can write" in start(place).communicate(timeout=60)[1] and list((place / "safe").iterdir()) == []
    (place / "good").symlink_to("safe")
    monkeypatch.setenv("FUSEDRNN_CACHE", str(place / "good"))
    out, error = start(place).communicate(timeout=60)
    assert out.startswith(str(place / "good")) and "not kept" not in error
    (place / "nowhere").symlink_to(place / "gone")
    monkeypatch.setenv("FUSEDRNN_CACHE", str(place / "nowhere"))
    assert "nowhere leads nowhere" in start(place).communicate(timeout=60)[1]


@pytest.mark.parametrize("mask", [0o002, 0o000, 0o777])
def test_folders_are_made_that_others_cannot_write(place: Path, monkeypatch: pytest.MonkeyPatch, mask: int) -> None:
    """Whatever the user's mask."""
    monkeypatch.setenv("FUSEDRNN_CACHE", str(place / "one/two/cache"))
    before = os.umask(mask)
    try:
        out, error = start(place).communicate(timeout=60)
    finally:
        os.umask(before)
    assert out.startswith(str(place / "one/two/cache")) and "not kept" not in error and compiled(place) == 1


@pytest.mark.parametrize("damage", [lambda text: text[:4096], lambda text: b"", lambda text: bytes(len(text))])
def test_a_library_that_is_damaged_is_compiled_again(place: Path, damage: Callable[[bytes], bytes]) -> None:
    out, _ = start(place).communicate(timeout=60)
    library = Path(out.strip())
    whole = library.read_bytes()
    library.write_bytes(damage(whole))
    assert start(place).communicate(timeout=60)[0] == out and compiled(place) == 2
    assert ctypes.CDLL(out.strip()).one() == 1


def test_a_folder_that_can_only_be_read_serves_what_it_holds(place: Path) -> None:
    out, _ = start(place).communicate(timeout=60)
    loading = MAKE.replace("print(", "import os; os.access = lambda *_: False\nprint(")  # root may write everywhere
    command = [sys.executable, "-c", loading, str(place / "source")]
    told = subprocess.run(command, capture_output=True, text=True, check=True)
    assert told.stdout == out and told.stderr == "" and compiled(place) == 1


def test_compilers_of_several_words(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher such as ccache, and options, in compiling and linking."""
    monkeypatch.setenv("CXX", f"env {place / 'compiler'} -O1")
    assert start(place).communicate(timeout=60)[0] != "" and compiled(place) == 1
    calls = (place / "calls").read_text().splitlines()
    assert len(calls) == 3 and all(line.startswith("-O1 ") for line in calls)  # its version, compiling, linking


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("'c++", 'CXX is "\'c\\+\\+": No closing quotation'),
        ("{place}/source/one.cpp", "the compiler does not run: .*Exec format error"),
        ("true", "made no library"),
    ],
)
def test_what_is_no_compiler(place: Path, monkeypatch: pytest.MonkeyPatch, command: str, said: str) -> None:
    (place / "source/one.cpp").chmod(0o700)
    monkeypatch.setenv("CXX", command.format(place=place))
    out, error = start(place).communicate(timeout=60)
    assert out == "" and re.search(f"RuntimeError: .*{said}", error), error


def test_other_encodings(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comment beyond ASCII, where the locale has no letters but these; and a compiler that speaks Latin-1."""
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("PYTHONUTF8", "0")
    monkeypatch.setenv("PYTHONCOERCECLOCALE", "0")
    code = MAKE.replace('"added_cell.h": ""', '"added_cell.h": "// \\u03c3"')
    told = subprocess.run([sys.executable, "-c", code, str(place / "source")], capture_output=True, check=True)
    assert "\u03c3" in Path(told.stdout.decode().strip()).with_name("added_cell.h").read_text(encoding="utf-8")
    (place / "compiler").write_text("#!/bin/sh\nprintf '\\374ber'\nexit 1\n")
    assert "RuntimeError: the compiler failed with status 1" in start(place).communicate(timeout=60)[1]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_nor_is_one_of_another_user(place: Path) -> None:
    (place / "cache").mkdir(mode=0o700)
    os.chown(place / "cache", 12345, 12345)
    assert "belongs to another user" in start(place).communicate(timeout=60)[1]


def test_the_folder_may_be_below_a_home(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.chdir(place)
    monkeypatch.setenv("FUSEDRNN_CACHE", "~/mine")
    out, error = start(place).communicate(timeout=60)
    assert out.startswith(str(place / "mine")) and "not kept" not in error and not (place / "~").exists()
    monkeypatch.setenv("FUSEDRNN_CACHE", "~nobody-of-this-name/mine")
    out, error = start(place).communicate(timeout=60)
    assert out != "" and "not kept: there is no home folder" in error
    assert not list(place.glob("~*"))


def test_without_a_home(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDRNN_CACHE", "/proc/nothing")
    out, error = start(place).communicate(timeout=60)
    assert out != "" and "compiled cells are not kept" in error


@pytest.fixture(scope="module")
def own_lstm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The LSTM's struct once more, compiled as an added cell."""
    source = (library.HEADERS / "cells/lstm.h").read_text()
    for old, new in (("struct Lstm ", "struct OwnLstm "), ('"lstm"', '"own_lstm"'), ('"cell.h"', '"cells/cell.h"'),
                     ("kProjectable = true", "kProjectable = false")):  # fmt: skip
        assert source.count(old) == 1
        source = source.replace(old, new)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSEDRNN_CACHE", str(tmp_path_factory.mktemp("cache")))
        info = dataclasses.replace(CELLS["lstm"], name="own_lstm", projectable=False)
        library.add(info, "OwnLstm", source)
        library.add(info, "OwnLstm", f"// read once more\n\n{source}")  # nothing more
        with pytest.raises(ValueError, match="there is a cell own_lstm already, which is another"):
            library.add(info, "OwnLstm", source + "struct More {};\n")
    yield "own_lstm"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("number", [1, 2])
def test_an_added_cell_is_like_one_of_the_package(own_lstm: str, dtype: torch.dtype, number: int, threads) -> None:
    """The LSTM's struct, added: the same bits forward, backward and in inference."""
    threads(number)
    Own = type("Own", (FusedRNNBase,), {"_cell": own_lstm})
    ours = Own(5, 19, num_layers=2, bidirectional=True, dtype=dtype)
    built_in = fusedrnn.LSTM(5, 19, num_layers=2, bidirectional=True, dtype=dtype)
    built_in.load_state_dict(ours.state_dict())
    x = torch.randn(7, 3, 5).to(dtype).requires_grad_()

    def everything(module: torch.nn.Module) -> list[torch.Tensor]:
        y, (h, c) = module(x)
        gradients = torch.autograd.grad(y.float().sin().sum() + c.float().sum(), [x, *module.parameters()])
        with torch.no_grad():
            for _ in range(3):
                again = module(x)[0]
            one, _ = fusedrnn.functional.recurrent(module._cell if module is ours else "lstm", x[:1], None,
                                                   module._flat_weights[:4])  # fmt: skip
        return [y, h, c, *gradients, again, one]

    assert all(torch.equal(a, b) for a, b in zip(everything(ours), everything(built_in), strict=True))


def test_it_has_no_matrices_in_int8(own_lstm: str) -> None:
    x, weights = torch.randn(3, 2, 5), [torch.zeros(16, 5, dtype=torch.int8), torch.zeros(16, 4, dtype=torch.int8)]
    with pytest.raises(RuntimeError, match="cell own_lstm has no kernels for matrices in int8 or bfloat16"):
        torch.ops.fusedrnn.layer_forward(
            x, None, None, None, weights, own_lstm, False, False, scales=[torch.ones(16)] * 2
        )


def test_a_library_of_other_headers_is_refused() -> None:
    assert _C.add_cell(None) == "it was compiled with the headers of another fusedrnn"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
def test_its_cuda_kernels_do_not_spill(tmp_path: Path) -> None:
    source = (library.HEADERS / "cells/peephole.h").read_text().replace('"cell.h"', '"cells/cell.h"')
    (tmp_path / "added_cell.h").write_text(source)
    units = library.cuda_units(shutil.which("nvcc"), "PeepholeLstm", ["sm_90"])
    for unit in (unit for unit in units if unit.source.stem in ("device", "persistent_float32")):
        command = [
            *unit.compiler,
            *unit.flags,
            f"-I{tmp_path}",
            f"-I{library.HEADERS}",
            "-Xptxas=-v",
            "-c",
            str(unit.source),
        ]
        said = subprocess.run([*command, "-o", os.devnull], capture_output=True, text=True)
        assert said.returncode == 0, said.stderr
        found = [line for line in said.stderr.splitlines() if "spill stores" in line]
        assert found and all("0 bytes spill stores, 0 bytes spill loads" in line for line in found)
