"""The parts of ``make gpu``: a command each, run as a process of its own, with its output in a log and what it is at on
the terminal. The build is in a folder of its own for each torch and Python, apart from the checkout's.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from . import needs

__all__ = ["KINDS", "ROOT", "Part", "environment", "folder", "parts", "run", "signals", "smi", "watched"]

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("build", "tests", "sanitizer", "timing")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
POLL, REPORT_EVERY = 0.5, 15.0  # seconds, between looks at a log and between lines about it where there is no terminal


@dataclass(frozen=True)
class Part:
    """A command, the seconds that it may take (None: as long as it needs), what it needs in its environment, and a
    pattern that finds in a line of its output how far it is.
    """

    command: tuple[str, ...]
    seconds: float | None
    environment: tuple[tuple[str, str], ...] = ()
    progress: str = ""


def folder() -> Path:
    """Where the extension for the torch and the Python that run is built."""
    import torch

    return ROOT / "build" / f"gpu-torch{torch.__version__}-cuda{torch.version.cuda}-python{platform.python_version()}"


def environment(built: Path | None) -> dict[str, str]:
    """In which Python finds the package that was built in a folder before the checkout's, even in the checkout, and
    torch finds the ninja of this Python. What FUSEDRNN_CUDA_PLAN=auto measures is kept in that folder too, not where
    the user's own programs find it.
    """
    paths = [built / "lib", ROOT] if built else [ROOT]
    own = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    own["PATH"] = needs.path()
    return own | ({"XDG_CACHE_HOME": str(built / "cache")} if built else {})


def marked() -> list[str]:
    """The files that have tests for a device. Others may need packages that a GPU machine lacks."""
    marks = re.compile(r"mark\.(isa|device|cuda)\b")
    return [str(file) for file in sorted((ROOT / "tests").glob("test_*.py")) if marks.search(file.read_text())]


def parts(
    out: Path, device: str, quick: bool = False, limit: float | None = None, built: Path | None = None
) -> dict[str, Part]:
    """By name; each plan of the tests and each tool of the sanitizer is a part of its own. ``limit``: the most seconds
    for each part but the build.
    """
    python, here, percent = sys.executable, (("FUSEDRNN_TEST_DEVICE", device),), r"\[ *(\d+%)\]"

    def at_most(seconds: float) -> float:
        return seconds if limit is None else min(seconds, limit)

    build = (python, "setup.py", "build", "--build-base", str(built), "--build-lib", f"{built}/lib")
    pytest = (python, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "--rootdir", str(ROOT))
    tests = ("-m", "isa", "-k", "float16") if quick else ("-m", "isa or device or cuda", "--durations=20")
    if importlib.util.find_spec("xdist") and not quick:
        tests += ("-n", str(min(8, os.cpu_count() or 1)))
    tests += tuple(marked())
    # Our own kernels only: the tools are slow.
    kernels = [word for name in ("each_element", "persistent_loop") for word in ("--kernel-name", f"kns={name}")]
    sanitizer = (str(needs.sanitizer()), "--error-exitcode", "9", *kernels)
    small = (*pytest, "-o", "timeout=600", str(ROOT / "tests/test_cuda.py"), "-k", "small")
    persistent = (*here, ("FUSEDRNN_CUDA_PLAN", "persistent"))
    uncached = (*here, ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"))
    timing = (python, "-m", "benchmarks.gpu.timing", "--device", device, "--out", str(out / "timing.jsonl"))
    timing += ("--quick",) if quick else ("--seconds", str(max(30.0, at_most(1800) - 60)))
    return {
        "build": Part(build, None, (("FUSEDRNN_CUDA", "1"),), r"^\[(\d+/\d+)\]"),
        "tests": Part((*pytest, *tests), at_most(3600), here, percent),
        "tests-persistent": Part((*pytest, *tests), at_most(3600), persistent, percent),
        **{
            f"sanitizer-{tool}": Part((*sanitizer, "--tool", tool, *small), at_most(900), uncached, percent)
            for tool in TOOLS
        },
        "timing": Part(timing, at_most(1800), (), r"^(\d+ of \d+)"),
    }


class Progress:
    """What a log says of how far its process is, on one line of a terminal, or on a line now and then."""

    def __init__(self, name: str, log: Path, pattern: str) -> None:
        self.name, self.pattern, self.file = name, re.compile(pattern), log.open(errors="replace")
        self.terminal, self.told, self.shown = sys.stdout.isatty(), time.monotonic(), ""

    def look(self) -> None:
        if not self.pattern.pattern:
            return
        found = [match[1] for line in self.file.readlines() if (match := self.pattern.search(line))]
        now = time.monotonic()
        if found and found[-1] != self.shown and (self.terminal or now - self.told > REPORT_EVERY):
            print(f"\r{self.name}: {found[-1]} " if self.terminal else f"{self.name}: {found[-1]}",
                  end="" if self.terminal else "\n", flush=True)  # fmt: skip
            self.told, self.shown = now, found[-1]

    def end(self) -> None:
        self.file.close()
        if self.terminal and self.shown:
            print("\r", end="")


@contextmanager
def signals() -> Iterator[list[int]]:
    """The signals to stop that have come. They are noted, not obeyed at once: a part is ended with what it started."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    obeyed = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # nohup ignores SIGHUP
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in obeyed}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(
    name: str, part: Part, out: Path, cwd: Path = ROOT, built: Path | None = None, came: Sequence[int] = ()
) -> dict:
    """Run a part, its output in a log, until it ends, its time is over or a signal to stop ``came``: the exit status
    (None: cut off), the seconds, the last line.
    """
    start, log = time.monotonic(), out / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            part.command, cwd=cwd, env=os.environ | environment(built) | dict(part.environment), stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        progress = Progress(name, log, part.progress)
        try:
            while (status := process.poll()) is None:
                if came or (part.seconds is not None and time.monotonic() - start > part.seconds):
                    break
                time.sleep(POLL)
                progress.look()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with what it started
                process.wait()
            progress.end()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "last": lines[-1][:200] if lines else ""}


def smi(facts: str) -> list[str]:
    """The command that asks nvidia-smi for facts of the GPU that torch takes; its own order may be another. Empty:
    there is no nvidia-smi, no GPU, or no name that both have for it.
    """
    import torch

    uuid = getattr(torch.cuda.get_device_properties(), "uuid", None) if torch.cuda.is_available() else None
    if not uuid or not shutil.which("nvidia-smi"):
        return []
    return ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={facts}"]


@contextmanager
def watched(file: Path) -> Iterator[None]:
    """Clocks, power and reasons to slow down, twice a second, into a file; nothing without nvidia-smi."""
    command = smi("clocks.sm,power.draw,clocks_event_reasons.active")
    if not command:
        yield
        return
    with file.open("w") as out:
        watch = subprocess.Popen([*command, "--format=csv", "-lms", "500"], stdout=out, stderr=subprocess.STDOUT)
        try:
            yield
        finally:
            watch.terminate()
            watch.wait()
