"""The command ``python -m benchmarks.streaming``: a stream one step at a time, ``step`` beside torch.nn's ways.

Microseconds a step in inference mode, medians of interleaved rounds, one thread: torch.nn's layer called with T = 1,
its cell, ONNX Runtime's ``run`` and, with all memory bound before, ``run_with_iobinding``, our layer called with T = 1,
and ``step``; the others' times over that of ``step``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fusedrnn

from . import onnx_runtime, report
from .measure import MIN_ROUNDS, Disagreement, Timer, run_rounds

SHAPES = ((1, 128), (1, 32), (1, 512), (8, 128))  # B, H = I
STEPS = 50  # of a timed call
TOLERANCE = 1e-5
COLUMNS = ("layer", "cell", "ORT", "ORT bound", "ours, T=1", "step")
HEADER = f"{'case':18} " + " ".join(f"{name:>9}" for name in COLUMNS) + "   us;  the others over step"


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
    calls = {
        "layer": stream(layer, steps),
        "cell": stream(by_cell, single),
        "ours, T=1": stream(ours, steps),
        "step": stream(ours.step, single),
    }
    states = [torch.zeros(1, B, H) for _ in range(1 + (name == "LSTM"))]
    session = onnx_runtime.session(ours, x[:1], states, 1)
    if session is not None:
        for way, of in (("ORT", onnx_runtime.stream), ("ORT bound", onnx_runtime.bound_stream)):
            theirs = of(session, x.unsqueeze(1), states)
            calls[way] = lambda theirs=theirs: torch.from_numpy(theirs()).reshape(B, H)
    return calls


def measure(name: str, B: int, H: int, seconds: float, min_rounds: int = MIN_ROUNDS) -> str:
    """A row."""
    calls = contenders(name, B, H)
    expected = calls["layer"]()
    for way, call in calls.items():
        if not (call() - expected).abs().max() <= TOLERANCE:
            raise Disagreement(f"{name}, B {B}, H {H}: {way} deviates")
    ways = [way for way in COLUMNS if way in calls]
    rounds, _ = run_rounds([Timer(calls[way], 1) for way in ways], seconds, min_rounds)
    us = dict(zip(ways, 1e6 / STEPS * np.median(rounds, axis=0)))
    ratios = ", ".join(f"{ratio:.2f}" for ratio in np.median(rounds[:, :-1] / rounds[:, -1:], axis=0))
    columns = " ".join(f"{us[way]:9.1f}" if way in us else f"{'none':>9}" for way in COLUMNS)
    return f"{f'{name} B{B} H{H}':18} {columns}   {ratios}"


def rows(seconds: float) -> Iterator[str]:
    return (measure(name, B, H, seconds) for B, H in SHAPES for name in ("LSTM", "GRU", "RNN"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    return report.run_command("streaming", __doc__, argv, 2.0, 1, HEADER, rows)


if __name__ == "__main__":
    raise SystemExit(main())
