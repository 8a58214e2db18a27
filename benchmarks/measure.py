"""Builds a case for torch.nn and for fusedrnn from the same weights, checks that both agree, and times them.

The two are timed in turn within one process, round by round, so that both see the same state of the machine: the
figure that counts is the median of the ratios of the rounds. torch.nn runs with one thread or with all that are
given, whichever is faster for it; fusedrnn always with all. Times are of wall clocks, in seconds inside, in
milliseconds outside.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn
from fusedrnn.cells import CELLS

from . import probes
from .cases import CELL_NAMES, CHOICES, DTYPES, Case

__all__ = ["Disagreement", "Result", "check", "matmul_gflops", "measure"]

# The largest deviation from the same layer in float64, over the largest value of the tensor. Seen over 100 steps:
# 7e-15, 1e-6 (1e-4 for the residual cell, which magnifies) and 6e-3. A wrong term deviates by far more.
TOLERANCE = {"float64": 1e-12, "float32": 1e-3, "bfloat16": 3e-2}
SAMPLE_SECONDS = 0.02  # a call shorter than this is repeated
WARM_SECONDS = 0.05  # of calls after a pause
MIN_ROUNDS, MAX_ROUNDS = 7, 101

Call = Callable[[], Sequence[Tensor]]


class Disagreement(RuntimeError):
    """fusedrnn and the reference computed different things: there is nothing to time."""


@dataclass(frozen=True)
class Result:
    """What was measured. ``ratio`` is torch.nn's time over ours: the median of the rounds and its quartiles.

    ``peak_gflops`` is what all threads reached multiplying and adding in registers, in the same rounds. ``phases``:
    shares of the threads' time in each phase of the kernels and outside them, if the build has the timers.
    """

    case: Case
    rounds: int
    threads: int
    ours_ms: float
    gflops: float
    peak_gflops: float
    deviation: float
    torch_ms: float | None = None
    torch_threads: int | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    phases: dict[str, float] | None = None

    @property
    def percent(self) -> float:
        """Our matrix products alone, in percent of the peak of the processor's units for the case's dtype."""
        return 100 * self.gflops / (self.peak_gflops / (2 if self.case.dtype == "float64" else 1))


def make_layer(library, case: Case, dtype: torch.dtype) -> nn.Module:
    """The layer of a case from torch.nn or fusedrnn."""
    _, _, inputs, hidden = case.shape
    _, layer, own = CHOICES[case.cell]
    options = {"num_layers": case.layers, "bidirectional": case.directions == 2, "dtype": dtype, **own}
    if case.projection:
        options["proj_size"] = case.projection
    return getattr(library, layer)(inputs, hidden, **options)


@dataclass(frozen=True)
class Problem:
    """The data of a case: input, initial state, gradient of the output; and how a layer is called with them."""

    case: Case
    x: Tensor  # [T, B, I]
    hx: tuple[Tensor, ...]  # each [L * D, B, H or P]
    dy: Tensor  # [rows, D * (P or H)]

    @staticmethod
    def of(case: Case) -> Problem:
        generator = torch.Generator().manual_seed(1)
        T, B, I, H = case.shape
        out = case.projection or H

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        x = draw(T, B, I)
        names = CELLS[CELL_NAMES[case.cell]].states
        hx = tuple(draw(case.layers * case.directions, B, out if name == "h" else H) for name in names)
        hx = tuple(1 + state.abs() if name == "n" else state for name, state in zip(names, hx))  # it divides
        return Problem(case, x, hx, draw(sum(case.lengths()), case.directions * out))

    def call(self, layer: nn.Module, dtype: torch.dtype, mode: str) -> Call:
        """A function of no arguments that runs the layer once: its outputs (infer) or its gradients (train)."""
        hx = tuple(state.to(dtype) for state in self.hx)
        hx = hx if len(hx) > 1 else hx[0]
        x, dy = self.x.to(dtype), self.dy.to(dtype)
        packed = pack_padded_sequence(x, self.case.lengths()) if self.case.ragged else None
        leaf = (packed.data if packed else x).requires_grad_(mode == "train")
        argument = PackedSequence(leaf, packed.batch_sizes) if packed else leaf

        def forward() -> tuple[Tensor, ...]:
            output, state = layer(argument, hx)
            output = output.data if packed else output
            return (output, *state) if isinstance(state, tuple) else (output, state)

        if mode == "infer":
            return torch.inference_mode()(forward)
        wanted = [leaf, *layer.parameters()]
        return lambda: torch.autograd.grad(forward()[0].flatten(0, -2), wanted, dy)


def check(case: Case, ours: nn.Module, problem: Problem) -> float:
    """Compare outputs, and gradients if the case trains, with the same layer in float64; the largest deviation.

    The reference is torch.nn's layer, or our own where torch.nn has none. Raises Disagreement; not where torch.nn's
    layer of the case's type deviates half as far: with a ReLU rounding lets a gradient pass or stop.
    """
    library = nn if case.has_torch else fusedrnn

    def like_ours(dtype: torch.dtype) -> nn.Module:
        layer = make_layer(library, case, dtype)
        layer.load_state_dict(ours.state_dict())
        return layer

    reference = like_ours(torch.float64)
    parameters = ["d" + name for name, _ in ours.named_parameters()]
    deviation = 0.0
    for mode, names in (("infer", ["output", "h_n", "c_n"]), ("train", ["dx", *parameters])):
        if mode == "train" and case.mode == "infer":
            continue
        want = problem.call(reference, torch.float64, mode)()
        worst = _deviations(problem.call(ours, DTYPES[case.dtype], mode)(), want)
        allowed = [TOLERANCE[case.dtype]] * len(worst)
        if case.has_torch and not all(found <= most for found, most in zip(worst, allowed)):
            theirs = like_ours(DTYPES[case.dtype])
            of_torch = _deviations(problem.call(theirs, DTYPES[case.dtype], mode)(), want)
            allowed = [max(most, 2 * of) for most, of in zip(allowed, of_torch)]
        for name, found, most in zip(names, worst, allowed):
            if not found <= most:  # catches NaN
                raise Disagreement(
                    f"{case.name}: {name} deviates by {found:.1e} of its largest value, allowed {most:.0e} for"
                    f" {case.dtype}"
                )
            deviation = max(deviation, found)
    return deviation


def _deviations(found: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Of each, in parts of the largest value."""
    return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected)]


class Timer:
    """Times a call with its number of threads; a sample is the mean of enough calls to be measurable.

    With ``settle`` a sample first waits so many seconds, for another library's idle threads to stop spinning, and then
    calls until WARM_SECONDS have passed: after the pause the processor needs a while to reach its speed.
    """

    def __init__(self, call: Call, threads: int, settle: float = 0.0) -> None:
        self.call, self.threads, self.settle, self.repeats = call, threads, settle, 1
        self.spent = 0.0
        self.sample()
        self.repeats = max(1, math.ceil(SAMPLE_SECONDS / min(self.sample() for _ in range(2))))

    def sample(self) -> float:
        begin = time.perf_counter()
        if torch.get_num_threads() != self.threads:
            torch.set_num_threads(self.threads)
            self.call()  # wakes the threads
        if self.settle:
            time.sleep(self.settle)
            warm = time.perf_counter() + WARM_SECONDS
            while time.perf_counter() < warm:
                self.call()
        start = time.perf_counter()
        for _ in range(self.repeats):
            self.call()
        end = time.perf_counter()
        self.spent += end - begin  # with the call that wakes the threads: the timers of the phases see it too
        return (end - start) / self.repeats

    def phases(self) -> dict[str, float] | None:
        """Shares of the threads' time since the last call; None if the build has no timers."""
        seconds, total, self.spent = fusedrnn._C.phases(), self.spent * self.threads, 0.0
        if seconds is None or total == 0:
            return None
        shares = {phase: value / total for phase, value in seconds.items()}
        return shares | {"outside": 1 - sum(shares.values())}


def measure(case: Case, threads: int, seconds: float, min_rounds: int = MIN_ROUNDS) -> Result:
    """Check, then time a case for about ``seconds``, and at least ``min_rounds`` rounds. Raises Disagreement."""
    dtype = DTYPES[case.dtype]
    torch.manual_seed(1)
    torch.set_num_threads(threads)
    problem = Problem.of(case)
    ours = make_layer(fusedrnn, case, dtype)
    deviation = check(case, ours, problem)
    timers = [Timer(problem.call(ours, dtype, case.mode), threads)]
    if case.has_torch:
        theirs = make_layer(nn, case, dtype)
        theirs.load_state_dict(ours.state_dict())
        call = problem.call(theirs, dtype, case.mode)
        choices = [Timer(call, n) for n in sorted({1, threads})]
        timers.append(min(choices, key=lambda timer: min(timer.sample() for _ in range(3))))
    timers[0].phases()  # from here on
    rounds, peaks = run_rounds(timers, seconds, min_rounds)
    phases = timers[0].phases()
    torch.set_num_threads(threads)
    ours_seconds = float(np.median(rounds[:, 0]))
    result = {
        "case": case,
        "rounds": len(rounds),
        "threads": threads,
        "ours_ms": 1e3 * ours_seconds,
        "gflops": case.flops() / ours_seconds / 1e9,
        "peak_gflops": float(np.median(peaks)) / 1e9,
        "deviation": deviation,
        "phases": phases,
    }
    if case.has_torch:
        low, ratio, high = np.quantile(rounds[:, 1] / rounds[:, 0], [0.25, 0.5, 0.75]).tolist()
        result |= {"torch_ms": 1e3 * float(np.median(rounds[:, 1])), "torch_threads": timers[1].threads}
        result |= {"ratio": ratio, "ratio_low": low, "ratio_high": high}
    return Result(**result)


def run_rounds(timers: Sequence[Timer], seconds: float, min_rounds: int) -> tuple[np.ndarray, list[float]]:
    """Seconds a call, [rounds, timers]: each round times every timer once, in alternating order. And each round's peak
    in operations a second, with the threads of the first timer.
    """
    rounds: list[list[float]] = []
    peaks: list[float] = []
    probes.peak_flops(timers[0].threads)  # compiled at its first use
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        while len(rounds) < min_rounds or (time.perf_counter() < end and len(rounds) < MAX_ROUNDS):
            order = range(len(timers)) if len(rounds) % 2 == 0 else reversed(range(len(timers)))
            times = {i: timers[i].sample() for i in order}
            rounds.append([times[i] for i in range(len(timers))])
            peaks.append(probes.peak_flops(timers[0].threads))
    finally:
        gc.enable()
    return np.array(rounds), peaks


def matmul_gflops(threads: int, size: int = 1024) -> float:
    """torch.matmul of two float32 matrices in GFLOP/s, the best of a few: a yardstick for the products."""
    torch.set_num_threads(threads)
    a, b = torch.randn(2, size, size).unbind()
    timer = Timer(lambda: (a @ b,), threads)
    return 2 * size**3 / min(timer.sample() for _ in range(5)) / 1e9
