"""The command ``python -m benchmarks.through_time``: what a training step costs with the options of the backward pass.

Times over those of the plain step, medians of interleaved rounds: with the norms recorded, with gates computed again
(and the values that autograd keeps for each step, sample and unit, beside input and output), with a limit on each
element or on the norm of what a step sends back, and truncated every 25 steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

import fusedrnn

from . import report
from .cases import Case
from .measure import MIN_ROUNDS, Timer, make_layer, run_rounds
from .memory import kept

SHAPES = ((100, 32, 128, 128), (50, 64, 256, 256), (1000, 8, 64, 64), (100, 1, 64, 64))
CASES = [Case(cell, "train", shape) for shape in SHAPES for cell in ("lstm", "gru", "rnn")]
OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "recorded": {},
    "recompute": {"recompute": "gates"},
    "by value": {"grad_clip": 1.0},
    "by norm": {"grad_clip": 1.0, "grad_clip_mode": "norm"},
    "truncated": {"bptt_steps": 25},
}
_NAMES = " ".join(f"{name:>9}" for name in list(OPTIONS)[1:])
HEADER = f"{'case':30} {'plain, ms':>9} {_NAMES}   kept: plain, again"


def step(case: Case, name: str) -> Callable[[], None]:
    """A training step with an option."""
    torch.manual_seed(1)
    T, B, I, H = case.shape
    layer, x, dy = make_layer(fusedrnn, case, torch.float32), torch.randn(T, B, I), torch.randn(T, B, H)
    layer.fused_options = fusedrnn.FusedOptions(**OPTIONS[name])
    parameters = list(layer.parameters())

    def plain() -> None:
        torch.autograd.grad(layer(x)[0], parameters, dy)

    def recorded() -> None:
        with fusedrnn.record_gradients(layer):
            plain()

    return recorded if name == "recorded" else plain


def measure(case: Case, seconds: float, min_rounds: int = MIN_ROUNDS) -> str:
    """A row."""
    threads = torch.get_num_threads()
    rounds, _ = run_rounds([Timer(step(case, name), threads) for name in OPTIONS], seconds, min_rounds)
    ratios = np.median(rounds[:, 1:] / rounds[:, :1], axis=0)
    values = kept(fusedrnn, case), kept(fusedrnn, case, recompute="gates")
    columns = " ".join(f"{ratio:9.2f}" for ratio in ratios)
    return f"{case.name:30} {1e3 * np.median(rounds[:, 0]):9.2f} {columns}   {values[0]:11.1f}  {values[1]:.1f}"


def rows(seconds: float) -> Iterator[str]:
    return (measure(case, seconds) for case in CASES)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    return report.run_command("through_time", __doc__, argv, 4.0, torch.get_num_threads(), HEADER, rows)


if __name__ == "__main__":
    raise SystemExit(main())
