"""What ``make gpu`` found: as data, for people, and as a picture. Ratios are an opponent's time over ours."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import geometric_mean

from .parts import ROOT, environment, smi

__all__ = ["Unusable", "commit", "digest", "gpu", "markdown", "plot", "publish", "read", "summary", "versions", "write"]

SUFFIXES = {".cpp", ".cu", ".cuh", ".h", ".inl", ".py"}
FACTS = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw"
VERSIONS = """
import json, platform, torch, fusedrnn
print(json.dumps({"fusedrnn": fusedrnn.__version__, "torch": torch.__version__, "cuda": torch.version.cuda,
                  "cudnn": torch.backends.cudnn.version(), "python": platform.python_version()}))
"""
MODES = ("forward", "both")


class Unusable(RuntimeError):
    """A report is missing or damaged, or not to be published."""


def gpu() -> dict[str, str]:
    """The name of the GPU that torch takes, and what nvidia-smi tells of it now; empty without one."""
    import torch

    if not torch.cuda.is_available():
        return {}
    command, values = smi(FACTS), []
    if command:
        told = subprocess.run([*command, "--format=csv,noheader"], capture_output=True, text=True, check=False)
        values = told.stdout.strip().split(", ") if told.returncode == 0 else []
    return {"name": torch.cuda.get_device_name()} | dict(zip(FACTS.split(","), values))


def commit() -> str:
    """The commit of the checkout, with a mark if it was changed; empty where git cannot tell."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""


def digest(root: Path = ROOT) -> str:
    """Of the sources that are built, run and tested: it tells their versions apart where git does not."""
    files = [root / "setup.py", root / "pyproject.toml"]
    for folder in ("csrc", "fusedrnn", "benchmarks", "tests"):
        files += (path for path in sorted((root / folder).rglob("*")) if path.suffix in SUFFIXES)
    each = (f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files)
    return hashlib.sha256("\n".join(each).encode()).hexdigest()


def versions(built: Path | None = None) -> dict[str, str]:
    """Of the packages, asked in another process: the extension may be new, or missing."""
    told = subprocess.run(
        [sys.executable, "-c", VERSIONS], cwd=ROOT, env=os.environ | environment(built), capture_output=True, text=True
    )
    return json.loads(told.stdout) if told.returncode == 0 else {"error": told.stderr.strip().rpartition("\n")[2]}


def timed(report: dict) -> list[dict]:
    """The points that were measured."""
    return [reading for reading in report["timing"] if "ratio" in reading]


def head(report: dict) -> list[str]:
    """The machine and the parts."""
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
        status = "none: cut off" if found["status"] is None else found["status"]
        lines.append(f"| {name} | {status} | {found['seconds']} | {found['last'].replace('|', '/')} |")
    return lines


def summary(report: dict) -> str:
    """The table of points alike, by regime and type: over torch.nn, geometric mean (least) of each cell and mode."""
    facts, alike, ways = report["gpu"]["before"], {}, {}
    for reading in timed(report):
        key = (reading["regime"], reading["dtype"])
        column = (reading["cell"], reading["mode"])
        alike.setdefault(key, {}).setdefault(column, []).append(reading["ratio"]["torch.nn"])
        ways.setdefault(key, set()).add(reading["torch_nn"])
    columns = sorted({column for cells in alike.values() for column in cells}, key=lambda c: (c[0], MODES.index(c[1])))
    names = (f"{cell.upper()}, {'forward' if mode == 'forward' else 'with backward'}" for cell, mode in columns)
    lines = [
        f"{facts.get('name', 'no GPU')}, driver {facts.get('driver_version', 'none')}, torch"
        f" {report['versions'].get('torch')}, {report['date']}. torch.nn's time over ours, geometric mean (and least)"
        f" of points alike, T = {report['steps']}; above 1 we are faster.",
        "",
        f"| regime | type | torch.nn runs | {' | '.join(names)} |",
        f"|---|---|---|{'---:|' * len(columns)}",
    ]
    for (regime, dtype), cells in alike.items():
        found = (cells.get(column) for column in columns)
        texts = (f"{geometric_mean(ratios):.2f} ({min(ratios):.2f})" if ratios else "" for ratios in found)
        lines.append(f"| {regime} | {dtype} | {', '.join(sorted(ways[regime, dtype]))} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def points(report: dict) -> list[str]:
    """Each point: how exact, the time of a step of both our ways, and all opponents."""
    readings = timed(report)
    opponents = list(dict.fromkeys(name for reading in readings for name in reading["ratio"]))
    lines = [
        "",
        "Ratios: an opponent's time over ours, medians of interleaved rounds; above 1 we are faster. Ours takes the",
        "sooner way, as FUSEDRNN_CUDA_PLAN=auto finds it. Error: of the output against float64, in the Euclidean norm,",
        "ours and torch.nn's.",
        "",
        f"| point | error | torch.nn runs | us a step | {' | '.join(opponents)} |",
        f"|---|---|---|---:|{'---:|' * len(opponents)}",
    ]
    for reading in readings:
        ratios = (f"{reading['ratio'][name]:.2f}" if name in reading["ratio"] else "" for name in opponents)
        error = f"{reading['error']['ours']:.1e}, {reading['error']['torch.nn']:.1e}"
        step = f"{reading['us_per_step']['ours']:.2f}"
        lines.append(f"| {reading['point']} | {error} | {reading['torch_nn']} | {step} | {' | '.join(ratios)} |")
    means = []
    for name in opponents:
        ratios = [reading["ratio"][name] for reading in readings if name in reading["ratio"]]
        means.append(f"{geometric_mean(ratios):.2f}")
    return [*lines, f"| geometric mean of {len(readings)} | | | | {' | '.join(means)} |"]


def failures(report: dict) -> list[str]:
    """Points that gave no reading, and opponents that failed at a point."""
    lines = []
    for reading in report["timing"]:
        if "failure" in reading:
            lines += ["", f"{reading['point']} failed: {reading['failure']}"]
        for name, error in reading.get("failed", {}).items():
            lines += ["", f"{reading['point']}: {name} failed: {error}"]
    return lines


def markdown(report: dict) -> str:
    """The report for people: the machine, the parts, the table of points alike, and each point."""
    lines = head(report)
    if timed(report):
        lines += ["", summary(report).rstrip("\n"), *points(report)]
    return "\n".join(lines + failures(report)) + "\n"


def plot(report: dict, file: Path) -> None:
    """A picture of :func:`summary`: rows are regimes, columns types, a panel each cell and mode. Needs matplotlib."""
    from matplotlib.figure import Figure

    readings = timed(report)
    regimes, dtypes = (list(dict.fromkeys(reading[key] for reading in readings)) for key in ("regime", "dtype"))
    panels = sorted(
        {(reading["cell"], reading["mode"]) for reading in readings}, key=lambda p: (p[0], MODES.index(p[1]))
    )
    figure = Figure(figsize=(2.6 + 0.85 * len(dtypes) * len(panels), 1.8 + 0.42 * len(regimes)), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (cell, mode) in zip(all_axes, panels, strict=True):
        axes.set_title(f"{cell.upper()}, {'forward' if mode == 'forward' else 'with backward'}", fontsize=9)
        axes.set_xticks(range(len(dtypes)), dtypes, fontsize=7, rotation=30)
        axes.set_yticks(range(len(regimes)), regimes, fontsize=8)
        grid = [[float("nan")] * len(dtypes) for _ in regimes]
        for row, column in ((r, c) for r in range(len(regimes)) for c in range(len(dtypes))):
            key = (cell, mode, regimes[row], dtypes[column])
            ratios = [
                reading["ratio"]["torch.nn"] for reading in readings
                if (reading["cell"], reading["mode"], reading["regime"], reading["dtype"]) == key
            ]  # fmt: skip
            if ratios:
                grid[row][column] = math.log2(geometric_mean(ratios))
                axes.text(column, row, f"{geometric_mean(ratios):.2f}", ha="center", va="center", fontsize=8)
        axes.imshow(grid, vmin=-3, vmax=3, cmap="RdBu", alpha=0.7, aspect="auto")
    facts = report["gpu"]["before"]
    figure.suptitle(
        f"torch.nn's time over ours (blue: we are faster). {facts.get('name', 'no GPU')}, torch"
        f" {report['versions'].get('torch')}, {report['date']}", fontsize=9,
    )  # fmt: skip
    figure.savefig(file, dpi=130)


def write(report: dict, out: Path) -> str:
    """Add what the timing has written, write report.json, report.md and, with matplotlib, report.png. Returns what a
    person may paste into an issue.
    """
    timing = out / "timing.jsonl"
    report["timing"] = [json.loads(line) for line in timing.read_text().splitlines()] if timing.exists() else []
    report["steps"] = max((reading.get("steps", 0) for reading in report["timing"]), default=0)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "report.md").write_text(markdown(report))
    if timed(report) and importlib.util.find_spec("matplotlib"):
        plot(report, out / "report.png")
    return "\n".join([*head(report), "", summary(report), *failures(report)])


def read(out: Path) -> dict:
    """The report in ``out``.

    Raises:
        Unusable: there is none, or it is damaged.
    """
    file = out / "report.json"
    if not file.exists():
        raise Unusable(f"no report.json in {out}: make gpu writes one")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise Unusable(f"{file} is damaged ({error}): delete it, or name another folder with --out") from error


def publish(out: Path, results: Path, readme: Path) -> Path:
    """Copy the report of ``out`` into ``results``, by its GPU and date, and renew a page's table from it.

    Raises:
        Unusable: there is none, it is not of a GPU, a part of it failed, or the tests or the timing are missing.
    """
    report = read(out)
    facts = report["gpu"]["before"]
    failed = [name for name, found in report["parts"].items() if found["status"] != 0]
    failed += [f"no {name}" for name in ("tests", "timing") if name not in report["parts"]]
    failed += ["quick"] if report.get("quick") else []
    if report["device"] != "cuda" or not facts or failed:
        raise Unusable(f"not to be published: {', '.join(failed) or 'no GPU'}")
    from ..report import update_readme  # (needs the extension, which `build` may have to make first)

    results.mkdir(parents=True, exist_ok=True)
    name = f"{report['date']}-{facts['name'].replace(' ', '-')}"
    for suffix in ("json", "md", "png"):
        if (out / f"report.{suffix}").exists():
            shutil.copyfile(out / f"report.{suffix}", results / f"{name}.{suffix}")
    update_readme(readme, summary(report), "gpu")
    return results / f"{name}.md"
