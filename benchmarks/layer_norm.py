"""The command ``python -m benchmarks.layer_norm``: LayerNormLSTM and LayerNormGRU beside a Python loop of torch
operations with torch's own layer_norm, and beside the plain layer of the same sizes.

All in turn in one process, after outputs and gradients of layer and loop were compared. The loop multiplies and
normalises the input of all steps at once, as a careful user would. ``--compile``: the loop under torch.compile too,
which unrolls it: its compilation takes minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear

import fusedrnn

from . import beside_loops
from .beside_loops import Beside, Data, title_of

__all__ = ["CELLS", "contenders"]

GAIN_OF_H = 0.1  # with gains of one roundings grow from step to step, and nothing can be compared
SHAPES = (*beside_loops.SHAPES, (100, 32, 512, 512))


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


def contenders(name: str, shape: Sequence[int], mode: str, args: argparse.Namespace) -> Beside:
    """What there is to time; args.compile: torch.compile too."""
    data = Data.drawn(shape, mode)
    ours, plain, loop = CELLS[name]
    sizes = shape[2:]
    module = ours(*sizes)
    with torch.no_grad():
        of_all_gates = module.bias_ih_l0.numel()
        module.weight_unit_l0[of_all_gates : 2 * of_all_gates] = GAIN_OF_H
    weights = list(module.parameters())
    calls = {
        "layer": data.of_layer(module),
        "plain layer": data.of_layer(plain(*sizes)),
        "loop": data.of_loop(loop, weights),
    }
    if args.compile:
        calls["torch.compile"] = data.of_loop(torch.compile(loop, dynamic=False), weights)
    return Beside(title_of(name, shape, mode), calls, others=frozenset({"plain layer"}))


def main(argv: Sequence[str] | None = None) -> None:
    command = beside_loops.parser("layer_norm", __doc__, CELLS)
    command.add_argument("--compile", action="store_true", help="torch.compile too")
    beside_loops.print_rows(command, argv, CELLS, SHAPES, contenders)


if __name__ == "__main__":
    main()
