"""The command ``python -m benchmarks``: choose cases, measure each, print and write what was found.

Exit status 1 if a case computes something wrong, 2 for a bad command line.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import fusedrnn

from . import report
from .cases import CASES, CELL_NAMES, DTYPES, Case, cell_names
from .measure import MIN_ROUNDS, Disagreement, measure


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time fusedrnn against torch.nn. Without a choice of cases: the three main shapes of each cell.",
        allow_abbrev=False,
    )
    add = result.add_argument
    add("--all", action="store_true", help="every case of the registry")
    add("--only", metavar="REGEX", help="every case of the registry whose name has a match")
    add("--cells", type=cell_names, metavar="NAMES", help=f"only these, separated by commas: {', '.join(CELL_NAMES)}")
    add("--dtype", choices=DTYPES, help="this element type in place of each chosen case's own")
    add("--list", action="store_true", help="print the names of the chosen cases and stop")
    add("--quick", action="store_true", help="three rounds a case: a look, no figure to report")
    add("--seconds", type=float, default=2.0, help="time for the rounds of a case (default: %(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(), help="default: what torch chooses")
    add("--phases", action="store_true", help="where the time goes; needs the timers of the build of `make phases`")
    add("--markdown", action="store_true", help="print the table in Markdown too")
    add("--regimes", action="store_true", help="print geometric means of cases alike too")
    add("--json", type=Path, metavar="FILE", help="write machine and results")
    add("--plot", type=Path, metavar="FILE", help="write a chart of the ratios (PNG)")
    add("--readme", type=Path, metavar="FILE", help="put a table of shapes between the markers of this file")
    return result


def choose(args: argparse.Namespace) -> list[Case]:
    """The cases a command line asks for, in the registry's order. Raises ValueError."""
    cells = args.cells or list(CELL_NAMES)
    try:
        pattern = re.compile(args.only or "")
    except re.error as error:
        raise ValueError(f"--only: {args.only!r} is no regular expression: {error}") from error
    everything = args.all or args.only is not None
    chosen = [
        case
        for case in CASES.values()
        if case.cell in cells and (everything or case.main) and pattern.search(case.name)
    ]
    if args.dtype:  # of cases that differ in it alone, one
        alike = [replace(case, dtype=args.dtype, main=False) for case in chosen]
        chosen = list({case.name: case for case in alike}.values())
    if not chosen:
        raise ValueError("no case matches; --all --list prints them all")
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    arguments = parser()
    args = arguments.parse_args(argv)
    try:
        cases = choose(args)
    except ValueError as error:
        arguments.error(str(error))
    if args.threads < 1:
        arguments.error(f"--threads must be at least 1, got {args.threads}")
    if args.phases and fusedrnn._C.phases() is None:
        arguments.error("--phases: this build of fusedrnn has no timers; run `make phases`")
    if args.list:
        print("\n".join(case.name for case in cases))
        return 0
    info = report.machine(args.threads)
    print(report.describe(info), report.HEADER, sep="\n", flush=True)
    results = []
    for case in cases:
        try:
            results.append(measure(case, args.threads, *((0.0, 3) if args.quick else (args.seconds, MIN_ROUNDS))))
        except Disagreement as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(report.line(results[-1]), flush=True)
        if args.phases:
            print(report.phases(results[-1]), flush=True)
    print(report.summary(results))
    if args.regimes:
        print("", report.regimes(results), sep="\n")
    if args.markdown:
        print("", report.markdown(results, info), sep="\n")
    if args.json:
        report.write_json(args.json, results, info)
    if args.readme:
        report.update_readme(args.readme, report.by_shape(results, info), report.block(info))
    if args.plot:
        from .plot import plot  # matplotlib takes a second to load

        plot(args.plot, results, info)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
