"""The way of a GPU that is measured at first use and kept (``csrc/stepwise/choice.h``), with a device that times and
fails on demand.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import probes

MACHINE = "NVIDIA H100, driver 580.65, CUDA 13000, fusedrnn 0.1.0"
KIND = "lstm float32 forward T128 B32 H256 D1"
HEADER = "fusedrnn choices 1\n"


class Device:
    """Seconds of each way, what the ways report when run, by how much results deviate; counts what it is asked."""

    def __init__(
        self, stepwise: float = 2.0, persistent: float = 1.0, deviation: float | None = 0.1, fails: dict | None = None
    ) -> None:
        self.times = {"stepwise": stepwise, "persistent": persistent}
        self.deviates, self.fails, self.room = deviation, fails or {}, True
        self.asked: list[str] = []
        self.inside = 0

    def begin(self) -> bool:
        return self.room

    def run(self, way: str) -> str:
        assert self.inside == 0, "two trials at once"
        self.inside += 1
        self.asked.append(way)
        self.inside -= 1
        return self.fails.get(way, "")

    def seconds(self, way: str) -> float:
        self.asked.append(f"{way} timed")
        return self.times[way]

    def deviation(self) -> float | None:
        return self.deviates


@pytest.fixture
def debugged(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """What FUSEDRNN_DEBUG has printed."""
    monkeypatch.setenv("FUSEDRNN_DEBUG", "1")
    return lambda: capfd.readouterr().err


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "fusedrnn" / "choices.txt"


def choices(file: Path | str, machine: str = MACHINE):
    return probes.Choices(str(file), machine)


@pytest.mark.parametrize(("seconds", "way"), [((2.0, 1.0), "persistent"), ((1.0, 2.0), "stepwise")])
def test_the_sooner_one_is_taken_and_kept(file: Path, seconds: tuple[float, float], way: str) -> None:
    found, device = choices(file), Device(*seconds)
    assert found.choose(KIND, None) == "stepwise" and found.known() == {}  # it could not wait
    assert found.choose(KIND, device) == way
    assert device.asked[:2] == ["stepwise", "persistent"] and device.asked.count("persistent timed") == 5
    asked = len(device.asked)
    assert found.choose(KIND, device) == found.choose(KIND, None) == way and len(device.asked) == asked
    assert found.known() == {KIND: (way, *seconds, "")}
    again = choices(file)  # another process
    assert again.choose(KIND, None) == way and again.known() == found.known()
    assert found.take_remarks() == again.take_remarks() == []


def test_kinds_are_measured_apart(file: Path) -> None:
    found = choices(file)
    for i in range(4):
        assert found.choose(f"{KIND} {i}", Device(persistent=1.0 + i)) == ("persistent" if i == 0 else "stepwise")
    assert len(choices(file).known()) == 4


FAILURES = {
    "launch": (Device(fails={"persistent": "too many resources"}), "too many resources"),
    "deviation": (Device(deviation=1.5), "results deviate by 1.5"),
    "nan": (Device(deviation=float("nan")), "results deviate by nan"),
    "inf": (Device(deviation=float("inf")), "results deviate by inf"),
}


@pytest.mark.parametrize(("device", "why"), FAILURES.values(), ids=FAILURES)
def test_what_fails_is_dropped_with_one_word(file: Path, device: Device, why: str) -> None:
    found = choices(file)
    assert found.choose(KIND, device) == "stepwise"
    (told,) = found.take_remarks()
    assert why in told and KIND in told and "python -m fusedrnn.info" in told and found.take_remarks() == []
    assert not any("timed" in asked for asked in device.asked)
    again = choices(file)
    assert again.choose(KIND, Device()) == "stepwise" and why in again.known()[KIND][3]
    assert again.take_remarks() == []  # told by the process that saw it


def test_a_call_that_fails_anyway_decides_nothing(file: Path) -> None:
    device = Device(fails={"stepwise": "out of memory"})
    found = choices(file)
    assert found.choose(KIND, device) == "stepwise" and found.known() == {} and not file.exists()
    assert found.choose(KIND, Device()) == "persistent"


@pytest.mark.parametrize("reason", ["no memory for results of its own", "results that are not finite"])
def test_a_call_that_shows_nothing_decides_nothing(file: Path, reason: str) -> None:
    device = Device(deviation=None) if "finite" in reason else Device()
    device.room = "memory" not in reason
    found = choices(file)
    assert found.choose(KIND, device) == "stepwise" and found.known() == {} and not file.exists()
    assert found.take_remarks() == [] and ("persistent" in device.asked) == device.room
    assert found.choose(KIND, Device()) == "persistent"


@pytest.mark.parametrize("reason", ["no memory", "not finite"])
def test_what_shows_nothing_is_not_tried_for_ever(file: Path, reason: str) -> None:
    device, found = Device(deviation=None), choices(file)
    device.room = "memory" not in reason
    begun: list[bool] = []
    device.begin = lambda: begun.append(True) or device.room
    for _ in range(10):
        assert found.choose(KIND, device) == "stepwise"
    assert len(begun) == 3 and not file.exists() and found.take_remarks() == []
    assert choices(file).choose(KIND, Device()) == "persistent"  # another process


def test_of_another_machine(file: Path) -> None:
    choices(file).choose(KIND, Device())
    other = choices(file, MACHINE.replace("580", "590"))
    assert other.choose(KIND, None) == "stepwise"
    assert other.choose(KIND, Device(1.0, 2.0)) == "stepwise"
    assert choices(file).choose(KIND, None) == "persistent" and other.take_remarks() == []


LINE = f"{MACHINE}\t{KIND}\tpersistent\t2\t1\t\n"


@pytest.mark.parametrize(
    "wrong",
    [
        "no fields\n", LINE.replace("persistent", "sideways"), LINE.replace("\t2\t", "\tsoon\t"),
        LINE.replace("\t2\t", "\t-2\t"), LINE.replace("\t2\t", "\tnan\t"), LINE.replace("\t2\t", "\t\t"),
        LINE.replace("\t\n", "\tit failed\n"), LINE.replace(KIND, ""), "\0\xff\n",
    ],
)  # fmt: skip
def test_wrong_lines_are_passed_over(file: Path, wrong: str, debugged: Callable[[], str]) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(HEADER + wrong + LINE.replace("H256", "H64"), encoding="latin-1")
    found = choices(file)
    assert list(found.known()) == [KIND.replace("H256", "H64")]
    assert debugged() == f"fusedrnn: {file}: 1 line(s) that are no choices: ignored\n" and not found.take_remarks()
    assert found.choose(KIND, Device()) == "persistent" and choices(file).choose(KIND, None) == "persistent"


def test_a_line_that_was_cut_off(file: Path) -> None:
    """By a crash: what comes after it begins a new line."""
    file.parent.mkdir(parents=True)
    file.write_text(HEADER + LINE[:40])
    found = choices(file)
    found.choose(KIND, Device())
    assert choices(file).choose(KIND, None) == "persistent"
    assert file.read_text() == HEADER + LINE[:40] + "\n" + LINE


def test_the_last_of_several_counts_and_headers_may_be_many(file: Path) -> None:
    """Two processes that began the file at the same time."""
    file.parent.mkdir(parents=True)
    file.write_text(HEADER + LINE + HEADER + LINE.replace("persistent", "stepwise"))
    found = choices(file)
    assert found.choose(KIND, None) == "stepwise" and found.take_remarks() == []


@pytest.mark.parametrize("contents", [b"\x7fELF and so on", b"fusedrnn choices 2\n", b"x" * 2_000_000])
def test_a_file_of_something_else_is_left_alone(
    file: Path, contents: bytes, debugged: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file.parent.mkdir(parents=True)
    file.write_bytes(contents)
    found = choices(file)
    assert found.choose(KIND, Device()) == found.choose(KIND, None) == "persistent"
    assert debugged() == f"fusedrnn: {file} is not a file of choices that can be read: ignored\n"
    assert file.read_bytes() == contents and found.take_remarks() == []
    monkeypatch.delenv("FUSEDRNN_DEBUG")
    choices(file)
    assert debugged() == ""  # nobody else is told


def test_a_pipe_in_its_place_is_not_waited_for(file: Path, debugged: Callable[[], str]) -> None:
    file.parent.mkdir(parents=True)
    os.mkfifo(file)
    assert choices(file).choose(KIND, Device()) == "persistent"
    assert debugged() == f"fusedrnn: {file} is not a file of choices that can be read: ignored\n"


def test_a_file_that_has_grown_begins_anew(file: Path, debugged: Callable[[], str]) -> None:
    """Every build and driver adds its lines: those of this one stay."""
    old = MACHINE.replace("580", "570")
    lines = [f"{old}\t{KIND} {i:04}\tpersistent\t2\t1\t\n" for i in range((2**20 - 200) // (len(LINE) + 5))]
    file.parent.mkdir(parents=True)
    file.write_text(HEADER + "".join(lines) + LINE)
    found = choices(file)
    assert found.choose(KIND, None) == "persistent"
    while file.stat().st_size > 2**19 and len(found.known()) < 100:
        found.choose(f"{KIND} {len(found.known())}", Device())
    assert choices(file).known() == found.known() and 1 < len(found.known()) < 100
    file.write_text(HEADER + "".join(lines) + "".join(lines[:100]))  # by a build that did not look
    found = choices(file)
    assert "begins anew" in debugged() and found.known() == {}
    found.choose(KIND, Device())
    assert file.read_text() == HEADER + LINE


def test_where_no_file_can_be(tmp_path: Path, debugged: Callable[[], str]) -> None:
    """A folder in its place, a file in the place of its folder: what is measured holds for this process."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    places = {tmp_path / "folder": "is not a file of choices", tmp_path / "file" / "choices": "cannot be written"}
    for place, told in places.items():
        found = choices(place)
        assert found.choose(KIND, Device()) == found.choose(KIND, None) == "persistent"
        found.choose(KIND + " more", Device())
        (remark,) = debugged().splitlines()
        assert told in remark and found.take_remarks() == []
    nowhere = choices("")
    assert nowhere.choose(KIND, Device()) == "persistent" and nowhere.take_remarks() == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_file_that_is_read_only(file: Path, debugged: Callable[[], str]) -> None:
    choices(file).choose(KIND, Device())
    file.chmod(stat.S_IRUSR)
    found = choices(file)
    assert found.choose(KIND + " more", Device()) == "persistent" and "cannot be written" in debugged()


def test_what_has_tabs_and_lines_in_it(file: Path) -> None:
    found = choices(file, "a\tGPU\n")
    device = Device(fails={"persistent": "line\none\ttwo"})
    assert found.choose("a\tkind\n", device) == "stepwise"
    assert choices(file, "a\tGPU\n").known() == {"a kind ": ("stepwise", 0, 0, "line one two")}


def test_threads_measure_once(file: Path) -> None:
    found, device, ways = choices(file), Device(), []
    kinds = [f"{KIND} {i % 3}" for i in range(12)]
    workers = [threading.Thread(target=lambda k=kind: ways.append(found.choose(k, device))) for kind in kinds]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert ways == ["persistent"] * 12 and device.asked.count("persistent") == 3
    assert len(choices(file).known()) == 3


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/cache")
    monkeypatch.setenv("HOME", "/home/me")
    assert probes.choices_file() == "/somewhere/cache/fusedrnn/choices.txt"
    for relative in ("cache", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert probes.choices_file() == "/home/me/.cache/fusedrnn/choices.txt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    assert probes.choices_file() == ""


def test_what_a_kind_depends_on() -> None:
    def kind(cell="gru", dtype=0, tf32=False, T=100, B=20, H=256, N=2000, D=1, what="forward") -> str:
        return probes.call_kind(cell, dtype, tf32, T, B, H, N, D, what)

    assert kind() == kind(T=65, B=32, N=65 * 32) == "gru float32 forward T128 B32 H256 D1"
    others = [kind(cell="lstm"), kind(dtype=2), kind(tf32=True), kind(T=129, N=129 * 20), kind(B=33, N=3300)]
    others += [kind(H=255), kind(N=1999), kind(D=2), kind(what="backward")]
    assert len({kind(), *others}) == 10
    assert kind(dtype=2, tf32=True) == kind(dtype=2)  # of float32 alone
