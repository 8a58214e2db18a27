"""The commands of a GPU machine, tried without one: what they look for, what they write, and how they stop."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import report as page
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import needs, opponents, parts, report, timing

ROOT = Path(__file__).parent.parent
READING = {
    "point": "lstm-both-H256-B32-bfloat16", "cell": "lstm", "hidden": 256, "mode": "both", "dtype": "bfloat16",
    "regime": "192 < H <= 512", "steps": 256, "torch_nn": "cudnn", "us_per_step": {"ours": 5.0},
    "error": {"ours": 1e-3, "torch.nn": 2e-3}, "ratio": {"torch.nn": 2.0, "native": 4.0}, "failed": {},
}  # fmt: skip
REPORT = {
    "date": "2026-01-02",
    "device": "cuda",
    "steps": 256,
    "parts": {name: {"status": 0, "seconds": 1.0, "last": "a|b"} for name in ("tests", "timing")},
    "gpu": {"before": {"name": "A GPU", "driver_version": "1"}, "after": {}},
    "versions": {"torch": "2"},
    "timing": [
        READING,
        READING | {"ratio": {"torch.nn": 8.0}, "failed": {"flashrnn": "RuntimeError: no"}},
        {"point": "gru", "failure": "no memory"},
    ],
}
EVERYTHING = needs.Found(
    python=(3, 12), packages=frozenset(name for names in needs.PACKAGES.values() for name in names),
    torch="2.11.0+cu130", cuda="13.0", gpu="A GPU", capability=(9, 0), nvcc="13.0", cublas=True, python_header=True,
    sanitizer=True, device=True,
)  # fmt: skip


def test_what_is_missing_is_said_at_once_and_with_what_to_do() -> None:
    assert needs.missing(EVERYTHING, parts.KINDS) == []
    nothing = needs.missing(needs.Found(python=(3, 10), compiler="c++: no such file"), parts.KINDS)
    for begin in (
        "Python >= 3.11",
        "torch for CUDA",
        "a GPU",
        "nvcc",
        "a C++20",
        "Python.h",
        "compute-sanitizer",
        "packages",
    ):
        assert sum(lack.startswith(begin) for lack in nothing) == 1, (begin, nothing)
    assert "pip install hypothesis ninja numpy pybind11 pytest 'setuptools>=77'" in nothing[-1]
    assert any(lack == "nvcc: not found; install CUDA's toolkit, or set CUDA_HOME to where it is" for lack in nothing)


@pytest.mark.parametrize(
    ("change", "wanted", "said"),
    [
        ({"torch": "2.13.0+cpu", "cuda": "", "capability": None}, ("build",), "2.13.0+cpu is built without"),
        ({"torch": "2.10.1+cu128"}, ("build",), "torch >= 2.11"),
        ({"capability": None, "why_no_gpu": "no driver"}, ("timing",), "a GPU: torch says: no driver"),
        ({"capability": (7, 5)}, ("tests",), "8.0 or more (Ampere): A GPU has 7.5"),
        ({"nvcc": "12.8"}, ("build",), "nvcc of CUDA 13"),
        ({"nvcc": ""}, ("build",), "install CUDA's toolkit 13, or set CUDA_HOME"),
        ({"nvcc": "", "named": "CUDA_HOME=/old"}, ("build",), "CUDA_HOME=/old, and there is no bin/nvcc: set it"),
        ({"cublas": False}, ("build",), "cublas_v2.h"),
        ({"sanitizer": False}, ("build", "sanitizer", "timing"), 'make gpu ARGS="build timing"'),
        ({"packages": EVERYTHING.packages - {"hypothesis"}}, ("tests",), "-m pip install hypothesis"),
    ],
)
def test_each_need_of_the_parts_that_are_asked_for(change: dict, wanted: tuple[str, ...], said: str) -> None:
    (lack,) = needs.missing(replace(EVERYTHING, **change), wanted)
    assert said in lack


@pytest.mark.parametrize(
    "change", [{"capability": None}, {"sanitizer": False}, {"packages": EVERYTHING.packages - {"pytest"}}]
)
def test_a_build_needs_no_gpu(change: dict) -> None:
    assert needs.missing(replace(EVERYTHING, **change), ("build",)) == []


def test_this_machine_is_looked_at() -> None:
    found = needs.look()
    assert found.torch == torch.__version__ and found.python == sys.version_info[:2] and not found.compiler
    assert {"numpy", "pytest", "ninja", "pybind11"} <= found.packages and found.python_header
    assert (found.capability is None) == (not torch.cuda.is_available()) and (found.gpu or found.why_no_gpu)


def program(file: Path, text: str = "") -> Path:
    """A script of the shell."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{text}\n")
    file.chmod(0o755)
    return file


@pytest.mark.parametrize(
    ("settings", "found", "named"),
    [
        ({"CUDA_HOME": "home"}, "home", "CUDA_HOME"),
        ({"CUDA_HOME": "stale"}, None, "CUDA_HOME"),
        ({"CUDA_HOME": "stale", "PATH": "path/bin"}, None, "CUDA_HOME"),
        ({"CUDA_PATH": "stale", "PATH": "path/bin"}, "path", ""),
        ({"CUDA_PATH": "stale", "PATH": ""}, None, "CUDA_PATH"),
        ({"CUDA_PATH": "home", "PATH": ""}, "home", "CUDA_PATH"),
    ],
)
def test_nvcc_is_the_one_that_setup_takes(
    settings: dict[str, str], found: str | None, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("home", "path"):
        program(tmp_path / folder / "bin" / "nvcc")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    assert needs.nvcc() == (found and str(tmp_path / found / "bin" / "nvcc"))
    assert needs.look().named == (named and f"{named}={tmp_path / settings[named]}")


@pytest.mark.parametrize(("version", "does"), [("66.1.0", False), ("70.1", False), ("77.0.3", True)])
def test_setuptools_must_be_one_that_builds(
    version: str, does: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older ones do not read pyproject.toml, or lack the module that setup.py imports."""
    folder = tmp_path / f"setuptools-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: setuptools\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert ("setuptools" in needs.look().packages) == does
    assert f'"setuptools>={needs.SETUPTOOLS}"' in (ROOT / "pyproject.toml").read_text()


def test_ninja_is_a_program_that_the_build_can_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder of this Python too, whose environment need not be active."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bin" / "python"))
    without = (folder for folder in os.get_exec_path() if not shutil.which("ninja", path=folder))
    monkeypatch.setenv("PATH", os.pathsep.join(without))
    assert "ninja" not in needs.look().packages  # though the module is there
    program(tmp_path / "bin" / "ninja", "echo 1.13")
    assert "ninja" in needs.look().packages
    found = shutil.which("ninja", path=parts.environment(None)["PATH"])
    assert found == str(tmp_path / "bin" / "ninja")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nothing_begins_where_something_is_missing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    first, *lacks = done.stdout.splitlines()
    assert first == "make gpu (build, tests, sanitizer, timing) needs, and does not find:"
    assert any("torch for CUDA" in lack or "a GPU" in lack for lack in lacks) and not done.stderr


def test_tests_and_timing_on_the_cpu(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for part in ("tests", "timing"):  # one after the other, one report
        assert command.main([part, "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "report.json").read_text())
    assert (
        list(found["parts"]) == ["tests", "tests-persistent", "timing"]
        and found["versions"]["torch"] == torch.__version__
    )
    assert "passed" in found["parts"]["tests"]["last"]
    assert [reading["point"] for reading in found["timing"]] == [str(point) for point in timing.QUICK]
    for reading in found["timing"]:
        assert reading["deviation"] <= timing.TOLERANCE[reading["dtype"]]
        assert 0 < reading["error"]["ours"] < 2 * reading["error"]["torch.nn"]
        assert reading["torch_nn"] == "native"
        assert set(reading["ratio"]) == {"torch.nn", "native"} and reading["ms"]["ours"] > 0
        assert reading["point"] in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert f"| {timing.QUICK[0].regime} | float32 |" in capfd.readouterr().out  # to be pasted


def test_it_stops_after_a_part_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    failing = parts.Part((sys.executable, "-c", "print('here is why'); raise SystemExit(3)"), 30)
    never = parts.Part((sys.executable, "-c", "raise SystemExit('begun')"), 30)
    monkeypatch.setattr(command, "parts", lambda *_: {"tests": failing, "timing": never})
    assert command.main(["--device", "cpu", "--limit", "9", "--out", str(tmp_path)]) == 1
    assert f"ARGS='tests timing --device cpu --limit 9.0 --out {tmp_path}'" in capsys.readouterr().out
    found = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert found["tests"]["status"] == 3 and found["tests"]["last"] == "here is why" and "timing" not in found


def test_what_has_passed_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Even if it is of the same kind as what fails; the command that is told may be pasted as it is."""
    out, passes = tmp_path / "a folder", parts.Part((sys.executable, "-c", "pass"), 30)
    failing = parts.Part((sys.executable, "-c", "raise SystemExit(3)"), 30)
    each = {"tests": passes, "tests-persistent": failing, "timing": passes}
    monkeypatch.setattr(command, "parts", lambda *_: each)
    assert command.main(["--device", "cpu", "--out", str(out)]) == 1
    make, gpu, *settings = shlex.split(capsys.readouterr().out.splitlines()[-1])
    (words,) = (shlex.split(setting[5:]) for setting in settings if setting.startswith("ARGS="))
    assert (make, gpu) == ("make", "gpu") and words[:2] == ["tests-persistent", "timing"]
    assert words[2:] == ["--device", "cpu", "--out", str(out)]
    each["tests-persistent"] = passes
    assert command.main(words) == 0
    assert "tests: begun" not in capsys.readouterr().out
    found = json.loads((out / "report.json").read_text())["parts"]
    assert {name: part["status"] for name, part in found.items()} == dict.fromkeys(each, 0)


def test_parts_are_chosen_by_kind_or_name_and_told_as_short_as_can_be() -> None:
    names = list(parts.parts(Path("out"), "cuda"))
    assert command.chosen(names, [], "cuda") == names
    assert command.chosen(names, ["tests"], "cuda") == ["build", "tests", "tests-persistent"]
    assert command.chosen(names, ["sanitizer-racecheck", "timing"], "cpu") == ["timing"]
    racecheck = names.index("sanitizer-racecheck")
    left = ["sanitizer-racecheck", "sanitizer-synccheck", "sanitizer-initcheck", "timing"]
    assert command.shortest(names[racecheck:], names) == left
    assert command.shortest(names[racecheck - 1 :], names) == ["sanitizer", "timing"]


def test_parts_of_other_sources_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where git tells nothing."""
    passes = parts.Part((sys.executable, "-c", "pass"), 30)
    monkeypatch.setattr(command, "parts", lambda *_: {"tests": passes, "timing": passes})
    monkeypatch.setattr(command, "commit", lambda: "")
    for sources, kept in (("a", ["timing"]), ("a", ["timing", "tests"]), ("b", ["timing"])):
        monkeypatch.setattr(command, "digest", lambda: sources)
        assert command.main([kept[-1], "--device", "cpu", "--out", str(tmp_path)]) == 0
        assert list(json.loads((tmp_path / "report.json").read_text())["parts"]) == kept


def test_the_digest_is_of_the_sources(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "csrc/cuda/a.cu", "fusedrnn/a.py", "tests/a.py", "benchmarks/a.py"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    first = report.digest(tmp_path)
    (tmp_path / "fusedrnn" / "_ops.so").touch()
    assert report.digest(tmp_path) == first
    for name in ("setup.py", "csrc/cuda/a.cu", "tests/a.py"):
        (tmp_path / name).write_text("changed")
        assert report.digest(tmp_path) != first, name
        (tmp_path / name).write_text("")
    (tmp_path / "csrc/cuda/a.cu").rename(tmp_path / "csrc/cuda/b.cu")
    assert report.digest(tmp_path) != first


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["tests", "--device", "cpu"], "is damaged"), (["--publish"], "is damaged"), (["--publish"], "no report.json")],
)
def test_a_report_that_cannot_be_read_is_an_error_of_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if said == "is damaged":
        (tmp_path / "report.json").write_text('{"parts": {"te')
    assert command.main([*arguments, "--out", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line and str(tmp_path) in line


STOPPED = """
import sys
from benchmarks.gpu import __main__ as command, parts
code = "import os, sys, time; print(os.getpid(), file=open(sys.argv[1], 'w'), flush=True); time.sleep(60)"
part = parts.Part((sys.executable, "-c", code, sys.argv[1]), 60)
command.parts = lambda *_: {"tests": part, "tests-persistent": part}
command.versions = lambda built: {}
raise SystemExit(command.main(["--device", "cpu", "--out", sys.argv[2]]))
"""


def until(holds: Callable[[], bool]) -> None:
    limit = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.05)


def ended(process: str) -> bool:
    """Whether it is gone, or a zombie."""
    state = Path("/proc") / process / "stat"
    return not state.exists() or state.read_text().split()[2] == "Z"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_part_too(number: signal.Signals, tmp_path: Path) -> None:
    file = tmp_path / "process"
    running = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(file), str(tmp_path)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    until(lambda: file.exists() and file.read_text().endswith("\n"))
    running.send_signal(number)
    told, errors = running.communicate(timeout=60)
    assert running.returncode == 128 + number and "Traceback" not in errors
    until(lambda: ended(file.read_text().strip()))
    *_, line = told.splitlines()
    assert line.startswith(f"stopped by {number.name}. To go on from there: make gpu") and "'tests --device cpu" in line
    assert json.loads((tmp_path / "report.json").read_text())["parts"]["tests"]["status"] is None


def test_signals_that_are_ignored_stay_so() -> None:
    """SIGHUP under nohup, say."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with parts.signals() as came:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)
    assert came == [signal.SIGTERM] and signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_takes_a_python_whose_path_has_a_space(tmp_path: Path) -> None:
    python = program(tmp_path / "a folder" / "python", 'echo "ran: $*"')
    # Not `make test`'s own settings, which would make it say which folder it enters.
    own = {name: value for name, value in os.environ.items() if "MAKE" not in name and name != "MFLAGS"}
    command = ["make", "gpu", f"PYTHON={python}", "ARGS=--quick"]
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True)
    assert done.stdout == "ran: -m benchmarks.gpu --quick\n", done.stderr


def test_the_gpu_is_the_one_that_torch_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the first that nvidia-smi knows of; without a name that both know, what torch tells alone."""
    program(tmp_path / "nvidia-smi", 'echo "$1" | grep -q id=GPU-12ab && echo "580.1, 1 MHz" || echo "another"')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    properties = types.SimpleNamespace(uuid="12ab")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "the second GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)
    assert report.gpu() == {"name": "the second GPU", "driver_version": "580.1", "clocks.sm": "1 MHz"}
    del properties.uuid
    assert report.gpu() == {"name": "the second GPU"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert report.gpu() == {}


def test_a_part_that_is_cut_off_fails_or_is_missing(tmp_path: Path) -> None:
    slow = parts.Part((sys.executable, "-uc", "import time; print('begun'); time.sleep(60)"), 3)
    found = parts.run("slow", slow, tmp_path)
    assert found["seconds"] < 30 and found | {"seconds": 0} == {"status": None, "seconds": 0, "last": "begun"}
    child = tmp_path / "child"
    code = f"""
import pathlib, subprocess, time
pathlib.Path({str(child)!r}).write_text(str(subprocess.Popen(["sleep", "60"]).pid))
time.sleep(60)
"""
    assert parts.run("parent", parts.Part((sys.executable, "-c", code), 3), tmp_path)["status"] is None
    until(lambda: ended(child.read_text()))  # the signal is sent, not yet obeyed
    limited = parts.parts(tmp_path, "cuda", limit=100)
    assert limited["build"].seconds is None and {p.seconds for n, p in limited.items() if n != "build"} == {100}


def test_progress_is_told_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(parts, "REPORT_EVERY", 0.0)
    code = "import time\nfor i in range(3):\n print(f'[{i + 1}/3] c++ -c file', flush=True)\n time.sleep(0.8)"
    pattern = parts.parts(tmp_path, "cuda", built=tmp_path)["build"].progress
    assert parts.run("build", parts.Part((sys.executable, "-c", code), None, (), pattern), tmp_path)["status"] == 0
    assert capsys.readouterr().out.splitlines() == ["build: 1/3", "build: 2/3", "build: 3/3"]


def test_a_build_of_its_own_comes_before_the_checkouts(tmp_path: Path) -> None:
    """Even where Python runs in the checkout; and the checkout's stays as it was."""
    package = tmp_path / "lib" / "fusedrnn"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("print('of its own')")
    settings = os.environ | parts.environment(tmp_path)
    program = [sys.executable, "-c", "import fusedrnn, benchmarks.gpu.parts"]
    done = subprocess.run(program, cwd=ROOT, env=settings, capture_output=True, text=True)
    assert done.stdout.strip() == "of its own", done.stderr
    build = " ".join(parts.parts(tmp_path, "cuda", built=tmp_path)["build"].command)
    assert "--inplace" not in build and f"--build-lib {tmp_path}/lib" in build
    assert torch.__version__ in parts.folder().name


def test_unknown_parts_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["tset"])
    assert "no such part: tset" in capsys.readouterr().err


def test_a_result_that_is_wrong_is_no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timing.TOLERANCE, "float32", -1.0)
    with pytest.raises(RuntimeError, match="from torch.nn's"):
        timing.measure(timing.QUICK[0], torch.device("cpu"), 4, 1)


def test_points_are_different_named_and_of_every_regime() -> None:
    names = [str(point) for point in timing.POINTS]
    assert len(set(names)) == len(names) >= 150
    for kind in ("gru", "P128", "L3", "ragged", "bidirectional", "tf32", "float16"):
        assert any(kind in name for name in names), kind
    for regime in timing.SIZES:
        kinds = {(p.cell, p.dtype, p.mode) for p in timing.POINTS if p.regime == regime}
        assert kinds >= {(c, d, m) for c in ("lstm", "gru") for d in timing.DTYPES for m in ("forward", "both")}
    assert not any(point.regime == "other" for point in timing.POINTS)


def test_the_way_is_set_before_the_clock_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, plan = [], os.environ.get("FUSEDRNN_CUDA_PLAN")

    class Clock(timing.Clock):
        def __call__(self, call: timing.Call) -> float:
            seen.append(os.environ.get("FUSEDRNN_CUDA_PLAN"))
            return super().__call__(call)

    monkeypatch.setattr(timing, "Clock", Clock)
    timing.measure(timing.QUICK[1], torch.device("cpu"), 4, 2)
    assert seen[0] == "auto" and os.environ.get("FUSEDRNN_CUDA_PLAN") == plan


@pytest.mark.skipif(not importlib.util.find_spec("flashrnn"), reason="FlashRNN is not installed")
@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_flashrnn_computes_torch_nns_layer(cell: str) -> None:
    """By the loop that it has for the CPU."""
    layer, x = getattr(nn, cell)(5, 8), torch.randn(3, 4, 5)
    forward, weights = opponents.flashrnn(layer, "float32", backend="vanilla")
    expected = layer(x.transpose(0, 1))[0].transpose(0, 1)
    torch.testing.assert_close(forward(x), expected)
    for ours, theirs in zip(
        torch.autograd.grad(forward(x).square().sum(), weights),
        torch.autograd.grad(expected.square().sum(), list(layer.parameters())), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_torchrls_kernels_get_their_arguments(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the signatures that TorchRL 0.14 has; the kernels themselves need a GPU."""
    layer, x, options = getattr(nn, cell)(5, 8), torch.randn(3, 4, 5), {}

    def kernel(x, *given, **keywords):
        *states, w_ih, w_hh, b_ih, b_hh, is_init = given
        assert all(state.shape == (3, 4, 8) and not state.any() for state in states) and not is_init.any()
        options.update(keywords)
        weights = dict(zip(layer.state_dict(), (w_ih, w_hh, b_ih, b_hh), strict=True))
        return (torch.func.functional_call(layer, weights, x.transpose(0, 1))[0].transpose(0, 1), *states)

    module = types.SimpleNamespace(lstm_triton=kernel, gru_triton=kernel)
    monkeypatch.setitem(sys.modules, "torchrl.modules.tensordict_module._rnn_triton", module)
    forward, _ = opponents.torchrl(layer, "tf32")
    torch.testing.assert_close(forward(x), layer(x.transpose(0, 1))[0].transpose(0, 1))
    assert options == {"compute_dtype": torch.float32, "input_precision": "tf32"}


def test_opponents_have_one_layer_of_some_cells() -> None:
    assert opponents.flashrnn(nn.RNN(3, 4), "bfloat16") is opponents.torchrl(nn.RNN(3, 4), "bfloat16") is None
    assert opponents.flashrnn(nn.LSTM(3, 4), "tf32") is opponents.torchrl(nn.LSTM(3, 4), "float16") is None
    point = replace(timing.QUICK[0], ragged=False, bidirectional=True)
    assert timing.opponent_call(lambda *_: 1 / 0, nn.LSTM(8, 8), torch.ones(1), torch.ones(1), point) is None


@pytest.mark.parametrize("mode", ["forward", "both"])
def test_an_opponent_is_held_against_torch_nn(mode: str) -> None:
    point = replace(timing.QUICK[0], ragged=False, mode=mode)
    layer = timing.layer_of(point, torch.device("cpu"))
    _, leaf, dy = timing.problem(point, 4, torch.device("cpu"))

    def opponent(theirs: nn.RNNBase, dtype: str, error: float = 0.0):
        weights = opponents.leaves_of(theirs, torch.float32)
        return (
            lambda x: (
                torch.func.functional_call(theirs, dict(zip(theirs.state_dict(), weights)), x.transpose(0, 1))[
                    0
                ].transpose(0, 1)
                + error
            ),
            weights,
        )

    found = timing.opponent_call(opponent, layer, leaf, dy, point)()
    expected = timing.call_of(layer, leaf, leaf, dy, mode)()
    if mode == "forward":
        torch.testing.assert_close(found.transpose(0, 1), expected)
    else:
        torch.testing.assert_close([found[0].transpose(0, 1), *found[1:]], list(expected))
    with pytest.raises(RuntimeError, match="from torch.nn's"):
        timing.opponent_call(lambda *given: opponent(*given, error=0.1), layer, leaf, dy, point)


def test_the_report_for_people_and_the_readme(tmp_path: Path) -> None:
    text = report.markdown(REPORT)
    assert "| timing | 0 | 1.0 | a/b |" in text and "gru failed: no memory" in text
    assert "lstm-both-H256-B32-bfloat16: flashrnn failed: RuntimeError: no" in text
    assert "| geometric mean of 2 | | | | 4.00 | 4.00 |" in text
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    for suffix in ("md", "png"):
        (tmp_path / f"report.{suffix}").write_text(text)
    readme = tmp_path / "README.md"
    begin, end = (mark.replace("benchmarks", "gpu") for mark in (page.BEGIN, page.END))
    readme.write_text(f"{begin}\nnothing yet\n{end}\n")
    written = report.publish(tmp_path, tmp_path / "results", readme)
    assert written.name == "2026-01-02-A-GPU.md"
    assert written.with_suffix(".json").exists() and written.with_suffix(".png").exists()
    assert "| 192 < H <= 512 | bfloat16 | cudnn | 4.00 (2.00) |" in readme.read_text()


@pytest.mark.parametrize(
    "change",
    [
        {"device": "cpu"},
        {"quick": True},
        {"parts": REPORT["parts"] | {"tests": {"status": 1, "seconds": 1.0, "last": ""}}},
        {"parts": {"timing": REPORT["parts"]["timing"]}},
    ],
    ids=("cpu", "quick", "tests failed", "no tests"),
)
def test_what_failed_or_had_no_gpu_is_not_published(change: dict, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(REPORT | change))
    with pytest.raises(report.Unusable, match="not to be published"):
        report.publish(tmp_path, tmp_path / "results", tmp_path / "README.md")
    assert not (tmp_path / "results").exists()
