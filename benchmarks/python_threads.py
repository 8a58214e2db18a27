"""The command ``python -m benchmarks.python_threads``: several Python threads call one shared layer at once.

For each number of Python threads: the calls a second of all of them, how often that is what one does, and how many of
the threads were ready, on average. A thread is ready while it runs or waits for a core (Linux's schedstat); else it
waits for a lock, Python's above all. On cores that other work shares, calls a second say little; the ready threads
are then the most that the calls would scale to with a core each.
"""

from __future__ import annotations

import argparse
import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fusedrnn

from . import report
from .cases import MODES, Case, cell_names
from .measure import MIN_ROUNDS, Problem, make_layer

SHAPES = ((100, 32, 128, 128), (100, 1, 64, 64), (1, 1, 128, 128))
NUMBERS = (1, 2, 4)


def ready_seconds() -> float:
    """How long this thread has run or waited for a core; NaN where the system does not tell."""
    file = Path(f"/proc/self/task/{threading.get_native_id()}/schedstat")
    ran, waited = map(int, file.read_text().split()[:2]) if file.exists() else (math.nan, math.nan)
    return (ran + waited) / 1e9


def together(call: Callable[[], object], number: int, threads: int, seconds: float) -> tuple[float, float]:
    """Calls a second of ``number`` Python threads, each of ``threads`` of torch's; how many were ready, on average."""
    barrier, found = threading.Barrier(number), []

    def work() -> None:
        torch.set_num_threads(threads)
        call()
        barrier.wait()
        ready, start, calls, elapsed = ready_seconds(), time.perf_counter(), 0, 0.0
        while elapsed < seconds:
            call()
            calls, elapsed = calls + 1, time.perf_counter() - start
        found.append((calls / elapsed, (ready_seconds() - ready) / elapsed))

    workers = [threading.Thread(target=work) for _ in range(number)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return tuple(np.sum(found, axis=0))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.python_threads", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--cells", type=cell_names, metavar="NAMES", default="lstm,gru", help="default: %(default)s")
    add("--threads", type=int, default=1, help="torch.set_num_threads in each (default: %(default)s)")
    add("--seconds", type=float, default=0.2, help="of a reading (default: %(default)s)")
    add("--rounds", type=int, default=MIN_ROUNDS, help="readings of each, in turn (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.threads < 1 or args.rounds < 1:
        parser.error("--threads and --rounds must be at least 1")
    print(report.describe(report.machine(args.threads)))
    columns = " ".join(f"{f'{number} thread(s)':>24}" for number in NUMBERS)
    print(f"\n{'calls/s (times those of one) ready':45} {columns}")
    for case in (Case(cell, mode, shape) for shape in SHAPES for mode in MODES for cell in args.cells):
        libraries = {"torch.nn": nn, "fusedrnn": fusedrnn} if case.has_torch else {"fusedrnn": fusedrnn}
        calls = {
            name: Problem.of(case).call(make_layer(library, case, torch.float32), torch.float32, case.mode)
            for name, library in libraries.items()
        }
        readings = {(name, number): [] for number in NUMBERS for name in calls}
        for _ in range(args.rounds):
            for (name, number), found in readings.items():
                found.append(together(calls[name], number, args.threads, args.seconds))
        for name in calls:
            medians = [np.median(readings[name, number], axis=0) for number in NUMBERS]
            texts = (f"{rate:.0f} ({rate / medians[0][0]:.2f}) {ready:.2f}" for rate, ready in medians)
            print(f"{case.name:35} {name:9} " + " ".join(f"{text:>24}" for text in texts), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
