"""The command ``python -m benchmarks.streaming``: a stream one step at a time, ``step`` beside torch.nn's ways.

Microseconds a step in inference mode, medians of interleaved rounds, one thread: torch.nn's layer called with T = 1,
its cell, our layer called with T = 1, and ``step``; torch.nn's times over that of ``step``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fusedrnn

from . import report
from .measure import MIN_ROUNDS, Disagreement, Timer, run_rounds

SHAPES = ((1, 128), (1, 32), (1, 512), (8, 128))  # B, H = I
STEPS = 50  # of a timed call
TOLERANCE = 1e-5
HEADER = f"{'case':18} {'layer, us':>9} {'cell':>7} {'ours, T=1':>9} {'step':>7}   layer / step, cell / step"


def contenders(name: str, B: int, H: int) -> dict[str, Callable[[], Tensor]]:
    """Streams of STEPS steps, each gives the last output."""
    torch.manual_seed(1)
    layer, ours, cell = getattr(nn, name)(H, H), getattr(fusedrnn, name)(H, H).eval(), getattr(nn, name + "Cell")(H, H)
    ours.load_state_dict(layer.state_dict())
    cell.load_state_dict({key.removesuffix("_l0"): value for key, value in layer.state_dict().items()})
    x = torch.randn(STEPS, B, H)

    def stream(step: Callable[[Tensor, Any], tuple[Tensor, Any]], inputs: Sequence[Tensor]) -> Callable[[], Tensor]:
        @torch.inference_mode()
        def call() -> Tensor:
            state = None
            for x_t in inputs:
                y, state = step(x_t, state)
            return y.reshape(B, H)

        return call

    def by_cell(x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        state = cell(x_t, state)
        return (state[0] if isinstance(state, tuple) else state), state

    steps, single = list(x.unsqueeze(1)), list(x)
    return {
        "layer": stream(layer, steps),
        "cell": stream(by_cell, single),
        "ours": stream(ours, steps),
        "step": stream(ours.step, single),
    }


def measure(name: str, B: int, H: int, seconds: float, min_rounds: int = MIN_ROUNDS) -> str:
    """A row."""
    calls = contenders(name, B, H)
    expected = calls["layer"]()
    for way, call in calls.items():
        if not (call() - expected).abs().max() <= TOLERANCE:
            raise Disagreement(f"{name}, B {B}, H {H}: {way} deviates")
    rounds, _ = run_rounds([Timer(call, 1) for call in calls.values()], seconds, min_rounds)
    us = 1e6 / STEPS * np.median(rounds, axis=0)
    ratios = np.median(rounds[:, :2] / rounds[:, 3:], axis=0)
    columns = f"{us[0]:9.1f} {us[1]:7.1f} {us[2]:9.1f} {us[3]:7.1f}   {ratios[0]:.2f}, {ratios[1]:.2f}"
    return f"{f'{name} B{B} H{H}':18} {columns}"


def rows(seconds: float) -> Iterator[str]:
    return (measure(name, B, H, seconds) for B, H in SHAPES for name in ("LSTM", "GRU", "RNN"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    return report.run_command("streaming", __doc__, argv, 2.0, 1, HEADER, rows)


if __name__ == "__main__":
    raise SystemExit(main())
