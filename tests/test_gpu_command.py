"""The commands of a GPU machine, tried without one: what they write, and that a part that fails spoils no other."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_timing, report

READING = {
    "point": "lstm-both-H256-B32-bfloat16", "cell": "lstm", "hidden": 256, "mode": "both", "dtype": "bfloat16",
    "steps": 256, "torch_nn": "cudnn", "us_per_step": {"ours": 5.0}, "ratio": {"torch.nn": 2.0, "native": 4.0},
}  # fmt: skip
REPORT = {
    "date": "2026-01-02",
    "device": "cuda",
    "steps": 256,
    "parts": {name: {"status": 0, "seconds": 1.0, "last": "a|b"} for name in ("tests", "timing")},
    "gpu": {"before": {"name": "A GPU", "driver_version": "1"}, "after": {}},
    "versions": {"torch": "2"},
    "timing": [READING, READING | {"ratio": {"torch.nn": 8.0}}, {"point": "gru", "error": "no memory"}],
}


def test_tests_and_timing_on_the_cpu(tmp_path: Path) -> None:
    for part in ("tests", "timing"):  # one after the other, one report
        assert gpu.main([part, "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "report.json").read_text())
    assert list(found["parts"]) == ["tests", "timing"] and found["versions"]["torch"] == torch.__version__
    assert "passed" in found["parts"]["tests"]["last"]
    assert [reading["point"] for reading in found["timing"]] == [str(point) for point in gpu_timing.QUICK]
    for reading in found["timing"]:
        assert reading["deviation"] <= gpu_timing.TOLERANCE[reading["dtype"]]
        assert reading["torch_nn"] == "native"
        assert set(reading["ratio"]) == {"torch.nn", "native"} and reading["ms"]["ours"] > 0
        assert reading["point"] in (tmp_path / "report.md").read_text()


def test_a_part_that_is_cut_off_fails_or_is_missing(tmp_path: Path) -> None:
    slow = gpu.Part((sys.executable, "-uc", "import time; print('begun'); time.sleep(60)"), 3)
    assert gpu.run("slow", slow, tmp_path) | {"seconds": 0} == {"status": None, "seconds": 0, "last": "begun"}
    child = tmp_path / "child"
    code = f"""
import pathlib, subprocess, time
pathlib.Path({str(child)!r}).write_text(str(subprocess.Popen(["sleep", "60"]).pid))
time.sleep(60)
"""
    assert gpu.run("parent", gpu.Part((sys.executable, "-c", code), 3), tmp_path)["status"] is None
    state, limit = Path("/proc") / child.read_text() / "stat", time.monotonic() + 10
    while alive := state.exists() and state.read_text().split()[2] != "Z":  # the signal is sent, not yet obeyed
        assert time.monotonic() < limit, alive
        time.sleep(0.05)
    wrong = gpu.run("wrong", gpu.Part((sys.executable, "-c", "raise SystemExit(3)"), 30), tmp_path)
    assert wrong["status"] == 3
    missing = gpu.run("missing", gpu.Part(("no-such-tool",), 30, needs="no-such-tool"), tmp_path)
    assert missing["status"] is None and "not found" in missing["last"]


def test_unknown_parts_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["tset"])
    assert "no such part: tset" in capsys.readouterr().err


def test_a_result_that_is_wrong_is_no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_timing.TOLERANCE, "float32", -1.0)
    with pytest.raises(RuntimeError, match="from torch.nn's"):
        gpu_timing.measure(gpu_timing.QUICK[0], torch.device("cpu"), 4, 1)


def test_points_are_different_and_named() -> None:
    names = [str(point) for point in gpu_timing.POINTS]
    assert len(set(names)) == len(names) >= 40
    for kind in ("gru", "P128", "L3", "ragged", "bidirectional", "tf32", "float16"):
        assert any(kind in name for name in names), kind


def test_the_report_for_people_and_the_readme(tmp_path: Path) -> None:
    text = gpu.markdown(REPORT)
    assert "| timing | 0 | 1.0 | a/b |" in text and "gru failed: no memory" in text
    assert "| geometric mean of 2 | | | 4.00 | 4.00 |" in text
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    (tmp_path / "report.md").write_text(text)
    readme = tmp_path / "README.md"
    begin, end = (mark.replace("benchmarks", "gpu") for mark in (report.BEGIN, report.END))
    readme.write_text(f"{begin}\nnothing yet\n{end}\n")
    written = gpu.publish(tmp_path, tmp_path / "results", readme)
    assert written.name == "2026-01-02-A-GPU.md" and written.with_suffix(".json").exists()
    assert "| LSTM | both | bfloat16 | H >= 256 | cudnn | 2 | 4.00 | 2.00 |" in readme.read_text()


@pytest.mark.parametrize(
    "change",
    [
        {"device": "cpu"},
        {"parts": REPORT["parts"] | {"tests": {"status": 1, "seconds": 1.0, "last": ""}}},
        {"parts": {"timing": REPORT["parts"]["timing"]}},
    ],
    ids=("cpu", "tests failed", "no tests"),
)
def test_what_failed_or_had_no_gpu_is_not_published(change: dict, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(json.dumps(REPORT | change))
    with pytest.raises(RuntimeError, match="not to be published"):
        gpu.publish(tmp_path, tmp_path / "results", tmp_path / "README.md")
    assert not (tmp_path / "results").exists()
