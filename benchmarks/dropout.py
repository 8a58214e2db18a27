"""The command ``python -m benchmarks.dropout``: a training step with dropout inside the recurrence.

Against the plain layer, and against what there is without kernels that take masks: a Python loop over torch.nn's cell
that masks or mixes the state after each step. Medians of interleaved rounds. torch.nn's weight drop is its own layer
with a dropped W_hh. Each side draws its masks anew at every step of training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import fusedrnn

from . import report
from .measure import MIN_ROUNDS, Timer, run_rounds

SHAPES = ((100, 32, 128), (50, 64, 256))
RATE = 0.2
VARIANTS: dict[str, dict[str, float]] = {
    "variational": {"input_dropout": RATE, "recurrent_dropout": RATE},
    "zoneout": {"zoneout": RATE},
    "weight drop": {"weight_dropout": RATE},
}
HEADER = f"{'case':32} {'plain, ms':>9} {'ours, ms':>9} {'over plain':>10} {'torch, ms':>10} {'torch over ours':>15}"


def training(layer: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, parameters: Sequence[Tensor]) -> Callable:
    return lambda: torch.autograd.grad(layer(x), parameters, dy)


def torch_way(cell: nn.Module, variant: str, x: Tensor) -> Tensor:
    """A loop over the cell: (T, B, I) -> (T, B, H)."""
    batch, hidden = x.size(1), cell.hidden_size
    two = isinstance(cell, nn.LSTMCell)
    state = (x.new_zeros(batch, hidden),) * (2 if two else 1)
    mask = 1.0
    if variant == "variational":
        x = x * functional.dropout(x.new_ones(x.shape[1:]), RATE)
        mask = functional.dropout(x.new_ones(batch, hidden), RATE)
    outputs = []
    for x_t in x:
        seen = state[0] * mask
        new = cell(x_t, (seen, state[1])) if two else (cell(x_t, seen),)
        if variant == "zoneout":
            new = tuple(torch.where(torch.rand_like(n) < RATE, s, n) for n, s in zip(new, state, strict=True))
        state = new
        outputs.append(state[0])
    return torch.stack(outputs)


def torch_weight_drop(layer: nn.RNNBase, x: Tensor) -> Tensor:
    dropped = {"weight_hh_l0": functional.dropout(layer.weight_hh_l0, RATE)}
    return torch.func.functional_call(layer, dropped, (x,))[0]


def measure(name: str, variant: str, shape: tuple[int, int, int], seconds: float, min_rounds: int = MIN_ROUNDS) -> str:
    """A row."""
    torch.manual_seed(1)
    steps, batch, size = shape
    x, dy = torch.randn(steps, batch, size), torch.randn(steps, batch, size)
    plain, own = getattr(fusedrnn, name)(size, size), getattr(fusedrnn, name)(size, size, **VARIANTS[variant])
    if variant == "weight drop":
        theirs = getattr(nn, name)(size, size)
        way = training(lambda x: torch_weight_drop(theirs, x), x, dy, list(theirs.parameters()))
    else:
        theirs = getattr(nn, f"{name}Cell")(size, size)
        way = training(lambda x: torch_way(theirs, variant, x), x, dy, list(theirs.parameters()))
    calls = [training(lambda x, m=m: m(x)[0], x, dy, list(m.parameters())) for m in (plain, own)]
    rounds, _ = run_rounds([Timer(call, torch.get_num_threads()) for call in (*calls, way)], seconds, min_rounds)
    times, ratios = 1e3 * np.median(rounds, axis=0), np.median(rounds[:, [1, 2]] / rounds[:, [0, 1]], axis=0)
    case = f"{name} {variant}, T{steps} B{batch} H{size}"
    return f"{case:32} {times[0]:9.2f} {times[1]:9.2f} {ratios[0]:10.2f} {times[2]:10.2f} {ratios[1]:15.2f}"


def rows(seconds: float) -> Iterator[str]:
    return (
        measure(name, variant, shape, seconds)
        for shape in SHAPES
        for name in ("LSTM", "GRU", "RNN")
        for variant in VARIANTS
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    return report.run_command("dropout", __doc__, argv, 3.0, torch.get_num_threads(), HEADER, rows)


if __name__ == "__main__":
    raise SystemExit(main())
