"""Writes results: the machine they hold for, lines on the terminal, a Markdown table, JSON, a page's table.

A page keeps the table between the lines BEGIN and END, which ``update_readme`` finds and fills in.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import geometric_mean

import torch

import fusedrnn
from fusedrnn.info import cores, processor

from .cases import REGIMES
from .measure import Result, matmul_gflops

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
HEADER = f"{'case':54} {'torch.nn':>15} {'fusedrnn':>10} {'ratio (quartiles)':>22} {'GFLOP/s':>8} {'% of peak':>9}"
HOW_TO_READ = (
    "Ratio: torch.nn's time over ours, the median of interleaved rounds, with quartiles; below 1 we are slower."
    " torch.nn has the better of 1 and all threads (in brackets). GFLOP/s: ours, the matrix products alone."
    " Peak: what all threads reach in the same rounds multiplying and adding in registers."
)


def machine(threads: int) -> dict[str, str | int | float]:
    """Processor, instruction set in use, versions, threads, date and the yardstick of the products."""
    return {
        "cpu": processor(),
        "cores": cores(),
        "isa": fusedrnn._C.isa(),
        "avx512": "avx512" in fusedrnn._C.supported_isas(),
        "threads": threads,
        "fusedrnn": fusedrnn.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.date.today().isoformat(),
        "matmul_gflops": round(matmul_gflops(threads), 1),
    }


def describe(info: dict) -> str:
    """The machine in one line."""
    return (
        f"{info['cpu']}, {info['cores']} core(s), {info['isa']}, {info['threads']} thread(s); fusedrnn"
        f" {info['fusedrnn']}, torch {info['torch']}, Python {info['python']}, {info['system']}; {info['date']};"
        f" torch.matmul of 1024x1024 float32: {info['matmul_gflops']:.0f} GFLOP/s"
    )


def run_command(
    name: str, doc: str, argv: Sequence[str] | None, seconds: float, threads: int, header: str,
    rows: Callable[[float], Iterable[str]],
) -> int:  # fmt: skip
    """A command whose only option is the time for a row: the machine, a header and the rows as they come."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=doc.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=seconds, help="time for the rounds of a row")
    args = parser.parse_args(argv)
    print(describe(machine(threads)), header, sep="\n", flush=True)
    for row in rows(args.seconds):
        print(row, flush=True)
    return 0


def _short(value: float) -> str:
    """Three digits, or the whole number."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def line(result: Result) -> str:
    """One line of the terminal's table, below HEADER."""
    torch_time, ratio = "none", ""
    if result.ratio is not None:
        torch_time = f"{_short(result.torch_ms)} ms ({result.torch_threads}t)"
        ratio = f"{result.ratio:.2f} ({result.ratio_low:.2f}-{result.ratio_high:.2f})"
    ours = f"{_short(result.ours_ms)} ms"
    reached = f"{_short(result.gflops):>8} {result.percent:>9.0f}"
    return f"{result.case.name:54} {torch_time:>15} {ours:>10} {ratio:>22} {reached}"


def phases(result: Result) -> str:
    """Where the threads' time went, the largest share first."""
    shares = sorted(result.phases.items(), key=lambda item: -item[1])
    return "    " + ", ".join(f"{name} {100 * share:.1f}%" for name, share in shares if share >= 0.001)


def summary(results: Sequence[Result]) -> str:
    """How many cases are faster and slower, and which is the slowest."""
    compared = [result for result in results if result.ratio is not None]
    if not compared:
        return f"{len(results)} case(s), none that torch.nn has"
    worst = min(compared, key=lambda result: result.ratio)
    slower = sum(result.ratio < 1 for result in compared)
    return (
        f"{len(compared)} case(s) against torch.nn: {len(compared) - slower} faster, {slower} slower;"
        f" lowest ratio {worst.ratio:.2f} ({worst.case.name})"
    )


def markdown(results: Sequence[Result], info: dict) -> str:
    """The table with a paragraph on how to read it."""
    rows = [
        f"{describe(info)}.",
        "",
        HOW_TO_READ,
        "",
        "| case | torch.nn, ms | fusedrnn, ms | ratio | GFLOP/s | % of peak |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for result in results:
        torch_time, ratio = "not there", ""
        if result.ratio is not None:
            torch_time = f"{_short(result.torch_ms)} ({result.torch_threads})"
            ratio = _ratio(result)
        rows.append(
            f"| {result.case.name} | {torch_time} | {_short(result.ours_ms)} | {ratio} | {_short(result.gflops)}"
            f" | {result.percent:.0f} |"
        )
    return "\n".join(rows) + "\n"


def by_shape(results: Sequence[Result], info: dict) -> str:
    """A shorter table: inference and training of a shape in one row. Of cases that torch.nn has."""
    rows = [
        f"{describe(info)}.",
        "",
        "| case | infer, ms: torch.nn / fusedrnn | ratio | train, ms | ratio | % of peak |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    modes: dict[str, dict[str, Result]] = {}
    for result in results:
        if result.ratio is not None:
            modes.setdefault(result.case.name.replace(f"-{result.case.mode}-", " ", 1), {})[result.case.mode] = result
    for name, own in modes.items():
        cells = []
        for found in (own.get("infer"), own.get("train")):
            cells += [f"{_short(found.torch_ms)} / {_short(found.ours_ms)}", _ratio(found)] if found else ["", ""]
        rows.append(f"| {name} | {' | '.join(cells)} | {' / '.join(f'{r.percent:.0f}' for r in own.values())} |")
    return "\n".join(rows) + "\n"


def _ratio(result: Result) -> str:
    return f"**{result.ratio:.2f}** ({result.ratio_low:.2f}-{result.ratio_high:.2f})"


def regimes(results: Sequence[Result]) -> str:
    """Geometric means of cases alike, in Markdown: percent of the float32 peak, and the ratios of each cell."""
    cells, modes = ("lstm", "gru", "rnn"), ("infer", "train")
    rows = [
        "| regime, infer / train | cases | % of peak | LSTM | GRU | RNN |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for regime in REGIMES:
        alike = [result for result in results if result.case.regime == regime and result.case.cell in cells]
        if not alike:
            continue

        def mean(mode: str, cell: str | None = None, alike: list[Result] = alike) -> str:
            chosen = [r for r in alike if r.case.mode == mode and cell in (None, r.case.cell)]
            if not chosen:
                return "-"
            if cell is None:
                return f"{geometric_mean(r.percent for r in chosen):.0f}"
            return f"{geometric_mean(r.ratio for r in chosen):.2f}"

        row = [" / ".join(mean(mode, cell) for mode in modes) for cell in (None, *cells)]
        rows.append(f"| {regime} | {len(alike)} | " + " | ".join(row) + " |")
    return "\n".join(rows)


def block(info: dict, name: str = "benchmarks") -> str:
    """Which of a page's tables a machine's figures belong in: processors with AVX-512, which torch.nn uses whatever we
    do, have one of their own.
    """
    return f"{name}-avx512" if info["avx512"] else name


def update_readme(file: Path, table: str, name: str = "benchmarks") -> None:
    """Put ``table`` between the markers of ``file``; ValueError if they are not there, once and in order."""
    begin, end = BEGIN.replace("benchmarks", name), END.replace("benchmarks", name)
    text = file.read_text(encoding="utf-8")
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"{file} must have the line {begin} once and {end} once after it")
    head, rest = text.split(begin)
    file.write_text(f"{head}{begin}\n{table}{end}{rest.split(end)[1]}", encoding="utf-8")


def write_json(file: Path, results: Sequence[Result], info: dict) -> None:
    """Machine and results, one object a case: the fields of Case and Result, the case's name and its operations."""
    rows = [
        asdict(result) | {"name": result.case.name, "flops": result.case.flops(), "percent": result.percent}
        for result in results
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"machine": info, "results": rows}, indent=1) + "\n", encoding="utf-8")
