"""The command ``python -m benchmarks.limits``: what this machine can do, the yardsticks of docs/performance.md.

Multiply-adds in registers, reading from each level of cache, and meetings of a team, with one thread and with all.
Medians of rounds, all yardsticks in turn: a shared machine changes its speed within seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np
import torch

from . import probes, report

KILOBYTES = (16, 128, 256, 512, 1024, 4096, 8192, 32768)  # read by each thread


def yardsticks(threads: int) -> dict[str, Callable[[], float]]:
    """Functions that take one reading each, by name and unit."""
    counts = sorted({1, threads})
    found = {f"multiply-adds, {n} thread(s), GFLOP/s": lambda n=n: probes.peak_flops(n) / 1e9 for n in counts}
    for kilobytes in KILOBYTES:
        for n in counts:
            found[f"reading {kilobytes} KiB a thread, {n} thread(s), GB/s"] = lambda n=n, kilobytes=kilobytes: (
                probes.read_bandwidth(n, kilobytes) / 1e9
            )
    if threads > 1:
        found[f"a meeting of {threads}, ns"] = lambda: probes.meeting_seconds(threads) * 1e9
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: what torch chooses")
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.threads < 1 or args.rounds < 1:
        parser.error("--threads and --rounds must be at least 1")
    print(report.describe(report.machine(args.threads)))
    sticks = yardsticks(args.threads)
    readings = [[read() for read in sticks.values()] for _ in range(args.rounds)]
    print(f"{'':44} {'median':>8} {'lowest':>8} {'highest':>8}")
    for name, column in zip(sticks, np.array(readings).T):
        print(f"{name:44} {np.median(column):8.0f} {column.min():8.0f} {column.max():8.0f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
