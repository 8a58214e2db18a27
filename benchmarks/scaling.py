"""The command ``python -m benchmarks.scaling``: how the time of a layer grows with T, B and threads.

*Growth*: T, and B, doubled twice, one thread; the exponent p of time ~ T^p between the first and the last.
*Threads*: the speed-up of 2, 4, ... threads, as far as the machine has cores, beside what a model says, and the model
alone beyond. The model has two readings, the time of one thread and that of a meeting of two:

    t(n) = t(1) * share + meetings * m(n),   m(n) = m(2) * (n - 1)

share: of the thread with the most to do, by the plan (items of its team, vectors of units of a member, samples of a
slice). meetings: of its team. m(n): a member reads the flag of each other. The model knows no caches, no memory and no
clock that falls when more cores work: it says what the plan and the meetings leave, not what a machine gives.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

import fusedrnn
from fusedrnn import _C
from fusedrnn.cells import CELLS

from . import probes, report
from .cases import CELL_NAMES, Case, cell_names
from .measure import MIN_ROUNDS, Problem, Timer, make_layer, run_rounds

GROWTH = ((100, 32, 128, 128), (1000, 1, 128, 128), (50, 64, 256, 256))
SHAPES = (
    (100, 1, 64, 64),
    (100, 1, 256, 256),
    (100, 1, 1024, 1024),
    (1000, 8, 64, 64),
    (100, 32, 128, 128),
    (50, 64, 256, 256),
    (100, 32, 512, 512),
)
BEYOND = (8, 32, 64)  # threads that the model is asked for


def call(case: Case) -> Callable[[], object]:
    """Runs our layer on the case once."""
    torch.manual_seed(1)
    return Problem.of(case).call(make_layer(fusedrnn, case, torch.float32), torch.float32, case.mode)


def medians(calls: Sequence[tuple[Callable[[], object], int]], seconds: float, rounds: int) -> list[float]:
    """Seconds of each call with its number of threads, in turn."""
    timed, _ = run_rounds([Timer(function, threads) for function, threads in calls], seconds, rounds)
    return list(np.median(timed, axis=0))


def exponents(case: Case, seconds: float, rounds: int) -> tuple[float, float]:
    """p of time ~ T^p and of time ~ B^p, from one to four times as much."""
    T, B, I, H = case.shape
    shapes = [(T, B, I, H), (4 * T, B, I, H), (T, 4 * B, I, H)]
    calls = [(call(Case(case.cell, case.mode, shape)), 1) for shape in shapes]
    one, longer, wider = medians(calls, seconds, rounds)
    return math.log(longer / one, 4), math.log(wider / one, 4)


def model(case: Case, threads: int, one: float, meeting: float) -> tuple[float, dict]:
    """Seconds by the model, and the plan, from those of one thread and of a meeting of two."""
    T, B, I, H = case.shape
    info = CELLS[CELL_NAMES[case.cell]]
    gates, lanes = len(info.gates), _C.vector_bytes() // 4
    plan = probes.plan([B] * T, I, H, case.directions, gates, lanes, threads)
    teams, members, slices = plan["teams"], plan["members"], plan["slices"]
    bounds, vectors = plan["bounds"], -(-H // lanes)
    items = -(-case.directions * slices // teams)  # of the team with the most
    samples = max(high - low for low, high in zip(bounds, bounds[1:]))
    share = items / case.directions * (samples / B) * (-(-vectors // members) / vectors)
    products = 1 if info.first is None else 2
    meetings = items * T * products * (2 if case.mode == "train" else 1)
    return one * share + meetings * meeting * (members - 1), plan


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--cells", type=cell_names, metavar="NAMES", default="lstm", help="default: %(default)s")
    add("--mode", choices=("infer", "train"), default="infer")
    add("--threads", type=int, default=torch.get_num_threads(), help="the most to measure; default: torch's choice")
    add("--seconds", type=float, default=2.0, help="time for a row (default: %(default)s)")
    add("--rounds", type=int, default=MIN_ROUNDS, help="the fewest of a row (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.threads < 1 or args.rounds < 1:
        parser.error("--threads and --rounds must be at least 1")
    print(report.describe(report.machine(args.threads)), flush=True)
    counts = [n for n in (2**i for i in range(1, 9)) if n <= args.threads]

    print(f"\n{'growth, one thread':40} {'time ~ T^p':>12} {'time ~ B^p':>12}")
    for case in (Case(cell, args.mode, shape) for cell in args.cells for shape in GROWTH):
        over_time, over_batch = exponents(case, args.seconds, args.rounds)
        print(f"{case.name:40} {over_time:>12.2f} {over_batch:>12.2f}", flush=True)

    meeting = float(np.median([probes.meeting_seconds(2) for _ in range(15)])) if args.threads > 1 else 0.0
    print(f"\na meeting of two: {1e9 * meeting:.0f} ns" if meeting else "\nno second thread, no reading of a meeting")
    wide = [f"{n} threads" for n in counts] + [f"model, {n}" for n in BEYOND]
    print(f"{'speed-up over one thread (model)':40} {'1 thread':>10} " + " ".join(f"{text:>24}" for text in wide))
    for case in (Case(cell, args.mode, shape) for cell in args.cells for shape in SHAPES):
        function = call(case)
        one, *more = medians([(function, n) for n in (1, *counts)], args.seconds, args.rounds)
        columns = []
        for n, seconds in [*zip(counts, more), *((n, None) for n in BEYOND)]:
            expected, plan = model(case, n, one, meeting)
            shared = f"{plan['slices']}x{plan['members']}"
            found = f"{one / seconds:.2f} " if seconds else ""
            columns.append(f"{found}({one / expected:.2f}) {shared}")
        print(f"{case.name:40} {1e3 * one:>7.3g} ms " + " ".join(f"{text:>24}" for text in columns), flush=True)
    print("\nAfter the speed-up: slices of the batch x members of a team. Slices need no meetings.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
