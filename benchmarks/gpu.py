"""The command ``python -m benchmarks.gpu [PART ...]``: everything there is to run on a GPU machine, with one report.

Parts, in this order by default: ``build`` the extension in place, ``tests`` on the GPU, the ``sanitizer``'s tools over
a few of them, ``timing`` against torch.nn. Each is a process of its own with a limit of time, and what it finds goes
into ``report.json`` and ``report.md`` beside its log: a part that fails or is cut off leaves the others' results whole.
The limits of all but ``build`` add up to 7.75 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ("memcheck", "racecheck", "initcheck")
SMALL = ("tests/test_cuda.py", "-k", "small")  # what the sanitizer's tools run, our own kernels only: they are slow
FACTS = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw"
VERSIONS = """
import json, platform, torch, fusedrnn
print(json.dumps({"fusedrnn": fusedrnn.__version__, "torch": torch.__version__, "cuda": torch.version.cuda,
                  "cudnn": torch.backends.cudnn.version(), "python": platform.python_version()}))
"""


@dataclass(frozen=True)
class Part:
    """A command with the seconds it may take, what it needs in its environment, and a program it cannot do without."""

    command: tuple[str, ...]
    seconds: float
    environment: tuple[tuple[str, str], ...] = ()
    needs: str = ""


def parts(out: Path, device: str, quick: bool) -> dict[str, Part]:
    """The commands, by name; a tool of the sanitizer is a part of its own."""
    python, here, cuda = sys.executable, (("FUSEDRNN_TEST_DEVICE", device),), "1" if device == "cuda" else "0"
    pytest = (python, "-m", "pytest", "-v", "--tb=short", "--durations=20", "-p", "no:cacheprovider")
    tests = ("-m", "isa", "-k", "float16") if quick else ("-m", "isa or device or cuda")
    timing = (python, "-m", "benchmarks.gpu_timing", "--device", device, "--out", str(out / "timing.jsonl"))
    return {
        "build": Part((python, "setup.py", "build_ext", "--inplace"), 400, (("FUSEDRNN_CUDA", cuda),)),
        "tests": Part((*pytest, *tests, "tests"), 180, here),
        **{
            f"sanitizer-{tool}": Part(
                ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=each_element",
                 *pytest, "--timeout", "600", *SMALL),
                45, (*here, ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")), "compute-sanitizer",
            )
            for tool in TOOLS
        },
        "timing": Part((*timing, *(("--quick",) if quick else ("--seconds", "120"))), 150),
    }  # fmt: skip


def run(name: str, part: Part, out: Path) -> dict:
    """Run a part, its output in a log: the exit status (None: cut off, or not started), the seconds, the last line."""
    if part.needs and not shutil.which(part.needs):
        return {"status": None, "seconds": 0.0, "last": f"{part.needs} is not found"}
    start, log = time.monotonic(), out / f"{name}.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=os.environ | dict(part.environment), stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(part.seconds)
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(process.pid, signal.SIGKILL)  # with what it started
            process.wait()
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return {"status": status, "seconds": round(time.monotonic() - start, 1), "last": lines[-1] if lines else ""}


def gpu() -> dict[str, str]:
    """What nvidia-smi tells of the first GPU now; empty without one."""
    if not shutil.which("nvidia-smi"):
        return {}
    command = ["nvidia-smi", f"--query-gpu={FACTS}", "--format=csv,noheader"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    values = told.stdout.splitlines()[0].split(", ") if told.returncode == 0 and told.stdout else []
    return dict(zip(FACTS.split(","), values))


@contextmanager
def watched(file: Path) -> Iterator[None]:
    """Clocks, power and reasons to slow down, twice a second, into a file; nothing without nvidia-smi."""
    if not shutil.which("nvidia-smi"):
        yield
        return
    facts = "clocks.sm,power.draw,clocks_event_reasons.active"
    command = ["nvidia-smi", f"--query-gpu={facts}", "--format=csv", "-lms", "500"]
    with file.open("w") as out:
        watch = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            yield
        finally:
            watch.terminate()
            watch.wait()


def commit() -> str:
    """The commit of the checkout, with a mark if it was changed; empty where git cannot tell."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def versions() -> dict[str, str]:
    """Of the packages, asked in another process: the extension may be new, or missing."""
    told = subprocess.run([sys.executable, "-c", VERSIONS], cwd=ROOT, capture_output=True, text=True, check=False)
    return json.loads(told.stdout) if told.returncode == 0 else {"error": told.stderr.strip().rpartition("\n")[2]}


def markdown(report: dict) -> str:
    """The report for people: the machine, the parts, and each point with its ratios."""
    facts, packages = report["gpu"]["before"], report["versions"]
    lines = [
        f"# {facts.get('name', 'no GPU')}, {report['date']}",
        "",
        ", ".join(f"{key} {value}" for key, value in (packages | facts).items() if key != "name"),
        f"After: {', '.join(f'{key} {value}' for key, value in report['gpu']['after'].items() if key != 'name')}",
        "",
        "| part | exit status | seconds | last line |",
        "|---|---|---:|---|",
    ]
    for name, found in report["parts"].items():
        status = "none: cut off or not started" if found["status"] is None else found["status"]
        lines.append(f"| {name} | {status} | {found['seconds']} | {found['last'].replace('|', '/')} |")
    timed = [reading for reading in report["timing"] if "ratio" in reading]
    if timed:
        opponents = list(dict.fromkeys(name for reading in timed for name in reading["ratio"]))
        lines += [
            "",
            "Ratios: an opponent's time over ours, medians of interleaved rounds; above 1 we are faster.",
            "",
            f"| point | torch.nn runs | us per step | {' | '.join(opponents)} |",
            f"|---|---|---:|{'---:|' * len(opponents)}",
        ]
        for reading in timed:
            ratios = (f"{reading['ratio'][name]:.2f}" if name in reading["ratio"] else "" for name in opponents)
            step = f"{reading['us_per_step']['ours']:.2f}"
            lines.append(f"| {reading['point']} | {reading['torch_nn']} | {step} | {' | '.join(ratios)} |")
        means = []
        for name in opponents:
            ratios = [reading["ratio"][name] for reading in timed if name in reading["ratio"]]
            means.append(f"{geometric_mean(ratios):.2f}")
        lines.append(f"| geometric mean of {len(timed)} | | | {' | '.join(means)} |")
    for reading in report["timing"]:
        if "error" in reading:
            lines += ["", f"{reading['point']} failed: {reading['error']}"]
    return "\n".join(lines) + "\n"


def summary(report: dict) -> str:
    """The table for docs/speed.md: over torch.nn, geometric mean and least ratio of points alike."""
    facts, alike = report["gpu"]["before"], {}
    for reading in report["timing"]:
        if "ratio" in reading:
            size = "H >= 256" if reading["hidden"] >= 256 else "H < 256"
            key = (reading["cell"].upper(), reading["mode"], reading["dtype"], size, reading["torch_nn"])
            alike.setdefault(key, []).append(reading["ratio"]["torch.nn"])
    lines = [
        f"{facts.get('name', 'no GPU')}, driver {facts.get('driver_version', 'none')}, torch"
        f" {report['versions'].get('torch')}, {report['date']}; torch.nn's time over ours, T = {report['steps']}.",
        "",
        "| layers | mode | type | size | torch.nn runs | points | geometric mean | least |",
        "|---|---|---|---|---|---:|---:|---:|",
    ]
    for key, ratios in sorted(alike.items()):
        lines.append(f"| {' | '.join(key)} | {len(ratios)} | {geometric_mean(ratios):.2f} | {min(ratios):.2f} |")
    return "\n".join(lines) + "\n"


def publish(out: Path, results: Path, readme: Path) -> Path:
    """Copy the report of ``out`` into ``results``, by its GPU and date, and renew a page's table from it.

    Raises:
        RuntimeError: it is not of a GPU, a part of it failed, or the tests or the timing are missing.
    """
    from .report import update_readme  # needs the extension, which `build` may have to make first

    report = json.loads((out / "report.json").read_text())
    facts = report["gpu"]["before"]
    failed = [name for name, found in report["parts"].items() if found["status"] != 0]
    failed += [f"no {name}" for name in ("tests", "timing") if name not in report["parts"]]
    if report["device"] != "cuda" or not facts or failed:
        raise RuntimeError(f"not to be published: {', '.join(failed) or 'no GPU'}")
    results.mkdir(parents=True, exist_ok=True)
    name = f"{report['date']}-{facts['name'].replace(' ', '-')}"
    for suffix in ("json", "md"):
        shutil.copyfile(out / f"report.{suffix}", results / f"{name}.{suffix}")
    update_readme(readme, summary(report), "gpu")
    return results / f"{name}.md"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 1 if a part failed, was cut off or could not start."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="build, tests, sanitizer, timing (default: all)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a trial of the command")
    parser.add_argument("--quick", action="store_true", help="a few tests and two tiny points")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="a folder (default: %(default)s)")
    parser.add_argument("--publish", action="store_true", help="run nothing: take the report of --out into the project")
    args = parser.parse_args(argv)
    out = args.out.resolve()
    if args.publish:
        print(f"wrote {publish(out, ROOT / 'benchmarks' / 'results', ROOT / 'docs/speed.md')} and docs/speed.md")
        return 0
    available = parts(out, args.device, args.quick)
    kinds = list(dict.fromkeys(name.partition("-")[0] for name in available))
    unknown = sorted(set(args.parts) - set(kinds))
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(kinds)}")
    out.mkdir(parents=True, exist_ok=True)
    timing = out / "timing.jsonl"
    report = {"date": time.strftime("%Y-%m-%d"), "device": args.device, "commit": commit(), "parts": {}}
    if (out / "report.json").exists():  # parts of the same code run before stay
        earlier = json.loads((out / "report.json").read_text())
        if all(earlier.get(key) == report[key] for key in ("date", "device", "commit")):
            report["parts"] = earlier["parts"]
    report["gpu"] = {"before": gpu()}
    for name, part in available.items():
        if args.parts and name.partition("-")[0] not in args.parts:
            continue
        print(f"{name} ...", flush=True)
        if name == "timing":
            timing.unlink(missing_ok=True)
        with watched(out / f"{name}-clocks.csv"):
            report["parts"][name] = found = run(name, part, out)
        print(f"{name}: exit status {found['status']}, {found['seconds']} s: {found['last']}", flush=True)
    report["gpu"]["after"] = gpu()
    report["versions"] = versions()
    report["timing"] = [json.loads(line) for line in timing.read_text().splitlines()] if timing.exists() else []
    report["steps"] = max((reading.get("steps", 0) for reading in report["timing"]), default=0)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "report.md").write_text(markdown(report))
    print(f"wrote {out / 'report.json'} and report.md")
    return 0 if all(found["status"] == 0 for found in report["parts"].values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
