"""The command ``python -m benchmarks.own_cells``: layers of a user's own cells (fusedrnn.cell) beside the same function
as a loop of torch operations, as TorchScript and under torch.compile, and beside the package's own layer of the cell.

All in turn in one process, with the same weights, after their outputs and gradients were compared. The loop multiplies
the input of all steps at once, as a careful user would. torch.compile unrolls it: its compilation takes minutes for a
hundred steps, so it is left out unless ``--compile`` asks for it.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

import fusedrnn

from . import report
from .measure import MIN_ROUNDS, Disagreement, Timer, run_rounds

__all__ = ["CELLS", "contenders", "measure"]

TOLERANCE = 1e-4  # of the largest value, in float32
SHAPES = ((100, 32, 128, 128), (100, 1, 128, 128))  # T, B, I, H
Call = Callable[[], Sequence[Tensor]]


@fusedrnn.cell(gates="f n")
def mgu(x, rec, h):
    f = torch.sigmoid(x.f + rec.f)
    n = torch.tanh(x.n + rec.n(f * h))
    return (1 - f) * h + f * n


@fusedrnn.cell(gates="i f g o", states="h c", parameters="p_i p_f p_o")
def peephole_lstm(x, rec, h, c, p_i, p_f, p_o):
    i = torch.sigmoid(x.i + rec.i + p_i * c)
    f = torch.sigmoid(x.f + rec.f + p_f * c)
    c = f * c + i * torch.tanh(x.g + rec.g)
    o = torch.sigmoid(x.o + rec.o + p_o * c)
    return o * torch.tanh(c), c


@fusedrnn.cell(gates="i f g o", states="h c")
def lstm(x, rec, h, c):
    i, f = torch.sigmoid(x.i + rec.i), torch.sigmoid(x.f + rec.f)
    c = f * c + i * torch.tanh(x.g + rec.g)
    return torch.sigmoid(x.o + rec.o) * torch.tanh(c), c


def mgu_loop(x: Tensor, weights: list[Tensor]) -> Tensor:
    w_ih, w_hh, b_ih, b_hh = weights
    hidden = w_hh.size(1)
    h, steps = x.new_zeros(x.size(1), hidden), []
    for a in linear(x, w_ih, b_ih).unbind(0):
        x_f, x_n = a.chunk(2, 1)
        f = torch.sigmoid(x_f + linear(h, w_hh[:hidden], b_hh[:hidden]))
        h = (1 - f) * h + f * torch.tanh(x_n + linear(f * h, w_hh[hidden:], b_hh[hidden:]))
        steps.append(h)
    return torch.stack(steps)


def peephole_loop(x: Tensor, weights: list[Tensor]) -> Tensor:
    w_ih, w_hh, b_ih, b_hh, unit = weights
    p_i, p_f, p_o = unit.chunk(3)
    h, steps = x.new_zeros(x.size(1), w_hh.size(1)), []
    c = h
    for a in linear(x, w_ih, b_ih).unbind(0):
        a_i, a_f, a_g, a_o = (a + linear(h, w_hh, b_hh)).chunk(4, 1)
        c = torch.sigmoid(a_f + p_f * c) * c + torch.sigmoid(a_i + p_i * c) * torch.tanh(a_g)
        h = torch.sigmoid(a_o + p_o * c) * torch.tanh(c)
        steps.append(h)
    return torch.stack(steps)


def lstm_loop(x: Tensor, weights: list[Tensor]) -> Tensor:
    w_ih, w_hh, b_ih, b_hh = weights
    h, steps = x.new_zeros(x.size(1), w_hh.size(1)), []
    c = h
    for a in linear(x, w_ih, b_ih).unbind(0):
        a_i, a_f, a_g, a_o = (a + linear(h, w_hh, b_hh)).chunk(4, 1)
        c = torch.sigmoid(a_f) * c + torch.sigmoid(a_i) * torch.tanh(a_g)
        h = torch.sigmoid(a_o) * torch.tanh(c)
        steps.append(h)
    return torch.stack(steps)


#: For each the user's cell, the package's own layer and the loop.
CELLS = {
    "mgu": (mgu, fusedrnn.MGU, mgu_loop),
    "peephole_lstm": (peephole_lstm, fusedrnn.PeepholeLSTM, peephole_loop),
    "lstm": (lstm, fusedrnn.LSTM, lstm_loop),
}


def contenders(name: str, shape: Sequence[int], mode: str, compiled: bool) -> dict[str, Call]:
    """What there is to time: each gives its outputs (infer) or its gradients (train)."""
    torch.manual_seed(1)
    T, B, I, H = shape
    cell, built_in, loop = CELLS[name]
    ours, theirs = cell.Module(I, H), built_in(I, H)
    theirs.load_state_dict(ours.state_dict())
    x, dy = torch.randn(T, B, I), torch.randn(T, B, H)
    weights = [w.detach().requires_grad_(mode == "train") for w in ours.parameters()]

    def layer(module: torch.nn.Module) -> Call:
        parameters = list(module.parameters())
        if mode == "train":
            return lambda: torch.autograd.grad(module(x)[0], parameters, dy)
        return torch.no_grad()(lambda: [module(x)[0]])

    def of_loop(function: Callable[[Tensor, list[Tensor]], Tensor]) -> Call:
        if mode == "train":
            return lambda: torch.autograd.grad(function(x, weights), weights, dy)
        return torch.no_grad()(lambda: [function(x, weights)])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning))  # TorchScript's
        calls = {"own cell": layer(ours), "package": layer(theirs), "loop": of_loop(loop)}
        calls["TorchScript"] = of_loop(torch.jit.script(loop))
    if compiled:
        calls["torch.compile"] = of_loop(torch.compile(loop, dynamic=False))
    return calls


def check(title: str, calls: dict[str, Call]) -> None:
    """Raises Disagreement where a contender's results are not the loop's."""
    expected = calls["loop"]()
    for contender, call in calls.items():
        for found, right in zip(call(), expected, strict=True):
            deviation = ((found - right).abs().max() / right.abs().max()).item()
            if not deviation <= TOLERANCE:
                raise Disagreement(f"{title}: {contender} deviates by {deviation:.1e} of the largest value")


def measure(
    name: str, shape: Sequence[int], mode: str, seconds: float, compiled: bool = False, min_rounds: int = MIN_ROUNDS
) -> dict[str, dict[str, float]]:
    """Milliseconds, medians of interleaved rounds; each time over that of the own cell, medians of the rounds'."""
    calls, threads = contenders(name, shape, mode, compiled), torch.get_num_threads()
    for _ in range(2):  # TorchScript and torch.compile specialise
        check(f"{name} {mode}", calls)
    rounds, _ = run_rounds([Timer(call, threads) for call in calls.values()], seconds, min_rounds)
    return {
        "ms": {each: 1e3 * float(np.median(rounds[:, i])) for i, each in enumerate(calls)},
        "ratio": {each: float(np.median(rounds[:, i] / rounds[:, 0])) for i, each in enumerate(calls) if i},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.own_cells", description=__doc__.splitlines()[0])
    parser.add_argument("cells", nargs="*", default=list(CELLS), help=f"of {', '.join(CELLS)}")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for the rounds of a case")
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.cells if name not in CELLS]:
        parser.error(f"no such cell: {', '.join(unknown)}; there are {', '.join(CELLS)}")
    print(report.describe(report.machine(torch.get_num_threads())), flush=True)
    print(f"{'case':38} {'ms: own cell':>12}   over the own cell", flush=True)
    for name, shape, mode in product(args.cells, SHAPES, ("train", "infer")):
        found = measure(name, shape, mode, args.seconds, args.compile)
        T, B, I, H = shape
        ratios = ", ".join(f"{each} {ratio:.2f}" for each, ratio in found["ratio"].items())
        print(f"{f'{name} {mode} T{T} B{B} I{I} H{H}':38} {found['ms']['own cell']:>12.2f}   {ratios}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
