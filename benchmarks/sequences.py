"""The command ``python -m benchmarks.sequences``: ragged batches and resets inside a sequence, beside torch.nn.

*lengths*: padded input with random lengths, ours given ``lengths``; torch.nn packs, computes and pads. *reset*: ours
given ``reset``; torch.nn called a step at a time, its states set to zero in between, as sb3-contrib's recurrent
policies do (``_process_sequence``). Results are compared, then timed in turn: forward, or forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn

from . import report
from .cases import Case
from .measure import MIN_ROUNDS, Disagreement, Timer, make_layer, run_rounds

SHAPES = {"lengths": (200, 32, 128, 128), "reset": (128, 16, 256, 256)}
RESETS = 0.05  # of the steps
TOLERANCE = 1e-4  # of the largest value
HEADER = f"{'case':45} {'ms: fusedrnn':>12} {'torch.nn':>9}   ratio"
Call = Callable[[], list[Tensor]]


def by_lengths(layer: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    if isinstance(layer, (fusedrnn.LSTM, fusedrnn.GRU, fusedrnn.RNN)):
        return layer(x, lengths=lengths)[0]
    packed = layer(pack_padded_sequence(x, lengths, enforce_sorted=False))[0]
    return pad_packed_sequence(packed, total_length=x.size(0))[0]


def by_reset(layer: nn.Module, x: Tensor, reset: Tensor) -> Tensor:
    if isinstance(layer, (fusedrnn.LSTM, fusedrnn.GRU, fusedrnn.RNN)):
        return layer(x, reset=reset)[0]
    states = [x.new_zeros(1, x.size(1), layer.hidden_size)] * (2 if isinstance(layer, nn.LSTM) else 1)
    outputs = []
    for step, begins in zip(x.unsqueeze(1), reset, strict=True):
        states = [(1.0 - begins.float()).view(1, -1, 1) * state for state in states]
        y, last = layer(step, tuple(states) if len(states) > 1 else states[0])
        states = list(last) if isinstance(last, tuple) else [last]
        outputs.append(y)
    return torch.cat(outputs)


def contenders(what: str, case: Case) -> list[Call]:
    """Ours and torch.nn's call, which give the output and, in training, the gradients."""
    torch.manual_seed(1)
    T, B, I, H = case.shape
    x, dy = torch.randn(T, B, I), torch.randn(T, B, H)
    marks = torch.randint(1, T + 1, (B,)) if what == "lengths" else torch.rand(T, B) < RESETS
    ours, theirs = (make_layer(library, case, torch.float32) for library in (fusedrnn, nn))
    theirs.load_state_dict(ours.state_dict())
    compute = by_lengths if what == "lengths" else by_reset

    def call(layer: nn.Module) -> list[Tensor]:
        if case.mode == "infer":
            with torch.inference_mode():
                return [compute(layer, x, marks)]
        y = compute(layer, x, marks)
        return [y, *torch.autograd.grad(y, list(layer.parameters()), dy)]

    return [lambda layer=layer: call(layer) for layer in (ours, theirs)]


def measure(what: str, case: Case, seconds: float, min_rounds: int = MIN_ROUNDS) -> str:
    """A row: medians of interleaved rounds, torch.nn's time over ours with quartiles."""
    calls, threads = contenders(what, case), torch.get_num_threads()
    for i, (found, expected) in enumerate(zip(calls[0](), calls[1](), strict=True)):
        deviation = ((found - expected).abs().max() / expected.abs().max()).item()
        if not deviation <= TOLERANCE:
            raise Disagreement(f"{case.name}, {what}: result {i} deviates by {deviation:.1e} of its largest value")
    rounds, _ = run_rounds([Timer(call, threads) for call in calls], seconds, min_rounds)
    ours, theirs = 1e3 * np.median(rounds, axis=0)
    low, middle, high = np.percentile(rounds[:, 1] / rounds[:, 0], (25, 50, 75))
    return f"{what + ', ' + case.name:45} {ours:>12.1f} {theirs:>9.1f}   {middle:.2f} ({low:.2f}-{high:.2f})"


def rows(seconds: float) -> Iterator[str]:
    return (
        measure(what, Case(cell, mode, shape), seconds)
        for what, shape in SHAPES.items()
        for mode in ("train", "infer")
        for cell in ("lstm", "gru", "rnn")
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    return report.run_command("sequences", __doc__, argv, 5.0, torch.get_num_threads(), HEADER, rows)


if __name__ == "__main__":
    raise SystemExit(main())
