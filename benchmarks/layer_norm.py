"""The command ``python -m benchmarks.layer_norm``: LayerNormLSTM and LayerNormGRU beside a Python loop of torch
operations with torch's own layer_norm, and beside the plain layer of the same sizes.

All in turn in one process, after outputs and gradients of layer and loop were compared. The loop multiplies and
normalises the input of all steps at once, as a careful user would. ``--compile``: the loop under torch.compile too,
which unrolls it: its compilation takes minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

import fusedrnn

from . import report
from .measure import MIN_ROUNDS, Disagreement, Timer, run_rounds

__all__ = ["CELLS", "contenders", "measure"]

TOLERANCE = 2e-3  # of the largest value, in float32: norms of c magnify roundings, over a hundred steps
SHAPES = ((100, 32, 128, 128), (100, 1, 128, 128), (100, 32, 512, 512))  # T, B, I, H
Call = Callable[[], Sequence[Tensor]]


def _normed(rows: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(rows, gain.shape, gain, bias)


def lstm_loop(x: Tensor, weights: list[Tensor]) -> Tensor:
    w_ih, w_hh, b_ih, b_hh, unit = weights
    hidden = w_hh.size(1)
    gain_x, gain_h, gain_c, bias_c = unit.split([4 * hidden, 4 * hidden, hidden, hidden])
    h, steps = x.new_zeros(x.size(1), hidden), []
    c = h
    for a in _normed(linear(x, w_ih), gain_x, b_ih).unbind(0):
        a_i, a_f, a_g, a_o = (a + _normed(linear(h, w_hh), gain_h, b_hh)).chunk(4, 1)
        c = torch.sigmoid(a_f) * c + torch.sigmoid(a_i) * torch.tanh(a_g)
        h = torch.sigmoid(a_o) * torch.tanh(_normed(c, gain_c, bias_c))
        steps.append(h)
    return torch.stack(steps)


def gru_loop(x: Tensor, weights: list[Tensor]) -> Tensor:
    w_ih, w_hh, b_ih, b_hh, unit = weights
    gain_x, gain_h = unit.chunk(2)
    h, steps = x.new_zeros(x.size(1), w_hh.size(1)), []
    for a in _normed(linear(x, w_ih), gain_x, b_ih).unbind(0):
        x_r, x_z, x_n = a.chunk(3, 1)
        h_r, h_z, h_n = _normed(linear(h, w_hh), gain_h, b_hh).chunk(3, 1)
        z = torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
        h = n + z * (h - n)
        steps.append(h)
    return torch.stack(steps)


#: For each the layer, the plain one and the loop.
CELLS = {
    "lstm": (fusedrnn.LayerNormLSTM, fusedrnn.LSTM, lstm_loop),
    "gru": (fusedrnn.LayerNormGRU, fusedrnn.GRU, gru_loop),
}


def contenders(name: str, shape: Sequence[int], mode: str, compiled: bool) -> dict[str, Call]:
    """What there is to time: each gives its outputs (infer) or its gradients (train)."""
    torch.manual_seed(1)
    T, B, I, H = shape
    ours, plain, loop = CELLS[name]
    module = ours(I, H)
    x, dy = torch.randn(T, B, I), torch.randn(T, B, H)
    weights = [w.detach().requires_grad_(mode == "train") for w in module.parameters()]

    def layer(module: torch.nn.Module) -> Call:
        parameters = list(module.parameters())
        if mode == "train":
            return lambda: torch.autograd.grad(module(x)[0], parameters, dy)
        return torch.no_grad()(lambda: [module(x)[0]])

    def of_loop(function: Callable[[Tensor, list[Tensor]], Tensor]) -> Call:
        if mode == "train":
            return lambda: torch.autograd.grad(function(x, weights), weights, dy)
        return torch.no_grad()(lambda: [function(x, weights)])

    calls = {"layer": layer(module), "plain layer": layer(plain(I, H)), "loop": of_loop(loop)}
    if compiled:
        calls["torch.compile"] = of_loop(torch.compile(loop, dynamic=False))
    return calls


def check(title: str, calls: dict[str, Call]) -> None:
    """Raises Disagreement where the layer's results are not the loop's."""
    for contender in {*calls} - {"plain layer", "loop"}:
        for found, right in zip(calls[contender](), calls["loop"](), strict=True):
            deviation = ((found - right).abs().max() / right.abs().max()).item()
            if not deviation <= TOLERANCE:
                raise Disagreement(f"{title}: {contender} deviates by {deviation:.1e} of the largest value")


def measure(
    name: str, shape: Sequence[int], mode: str, seconds: float, compiled: bool = False, min_rounds: int = MIN_ROUNDS
) -> dict[str, tuple[float, float]]:
    """Of each contender the milliseconds, and its time over that of the layer: medians of interleaved rounds."""
    calls, threads = contenders(name, shape, mode, compiled), torch.get_num_threads()
    check(f"{name} {mode}", calls)
    rounds, _ = run_rounds([Timer(call, threads) for call in calls.values()], seconds, min_rounds)
    return {
        each: (1e3 * float(np.median(rounds[:, i])), float(np.median(rounds[:, i] / rounds[:, 0])))
        for i, each in enumerate(calls)
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer_norm", description=__doc__.splitlines()[0])
    parser.add_argument("cells", nargs="*", default=list(CELLS), help=f"of {', '.join(CELLS)}")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for the rounds of a case")
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.cells if name not in CELLS]:
        parser.error(f"no such cell: {', '.join(unknown)}; there are {', '.join(CELLS)}")
    print(report.describe(report.machine(torch.get_num_threads())), flush=True)
    print(f"{'case':34} {'ms: layer':>10}   over the layer", flush=True)
    for name, shape, mode in product(args.cells, SHAPES, ("train", "infer")):
        found = measure(name, shape, mode, args.seconds, args.compile)
        T, B, I, H = shape
        ratios = ", ".join(f"{each} {ratio:.2f}" for each, (_, ratio) in found.items() if each != "layer")
        print(f"{f'{name} {mode} T{T} B{B} I{I} H{H}':34} {found['layer'][0]:>10.2f}   {ratios}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
