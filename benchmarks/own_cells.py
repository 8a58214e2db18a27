"""The command ``python -m benchmarks.own_cells``: layers of a user's own cells (fusedrnn.cell) beside the same function
as a loop of torch operations, as TorchScript and under torch.compile, and beside the package's own layer of the cell.

All with the same weights. The loop multiplies the input of all steps at once, as a careful user would. torch.compile
unrolls it: its compilation takes minutes for a hundred steps, so it is left out unless ``--compile`` asks for it.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

import fusedrnn

from . import beside_loops
from .beside_loops import SHAPES, Beside, Data, title_of

__all__ = ["CELLS", "contenders"]


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


@fusedrnn.cell(gates="r z n")
def gru(x, rec, h):
    r, z = torch.sigmoid(x.r + rec.r), torch.sigmoid(x.z + rec.z)
    n = torch.tanh(x.n + r * rec.n)
    return (1 - z) * n + z * h


@fusedrnn.cell(gates="a")
def rnn(x, rec, h):
    return torch.tanh(x.a + rec.a)


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


def gru_loop(x: Tensor, weights: list[Tensor]) -> Tensor:
    w_ih, w_hh, b_ih, b_hh = weights
    h, steps = x.new_zeros(x.size(1), w_hh.size(1)), []
    for a in linear(x, w_ih, b_ih).unbind(0):
        x_r, x_z, x_n = a.chunk(3, 1)
        h_r, h_z, h_n = linear(h, w_hh, b_hh).chunk(3, 1)
        z = torch.sigmoid(x_z + h_z)
        h = (1 - z) * torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n) + z * h
        steps.append(h)
    return torch.stack(steps)


def rnn_loop(x: Tensor, weights: list[Tensor]) -> Tensor:
    w_ih, w_hh, b_ih, b_hh = weights
    h, steps = x.new_zeros(x.size(1), w_hh.size(1)), []
    for a in linear(x, w_ih, b_ih).unbind(0):
        h = torch.tanh(a + linear(h, w_hh, b_hh))
        steps.append(h)
    return torch.stack(steps)


#: For each the user's cell, the package's own layer and the loop.
CELLS = {
    "mgu": (mgu, fusedrnn.MGU, mgu_loop),
    "peephole_lstm": (peephole_lstm, fusedrnn.PeepholeLSTM, peephole_loop),
    "lstm": (lstm, fusedrnn.LSTM, lstm_loop),
    "gru": (gru, fusedrnn.GRU, gru_loop),
    "rnn": (rnn, fusedrnn.RNN, rnn_loop),
}


def contenders(name: str, shape: Sequence[int], mode: str, args: argparse.Namespace) -> Beside:
    """What there is to time; args.compile: torch.compile too."""
    data = Data.drawn(shape, mode)
    cell, built_in, loop = CELLS[name]
    sizes = shape[2:]
    ours, theirs = cell.Module(*sizes), built_in(*sizes)
    theirs.load_state_dict(ours.state_dict())
    weights = list(ours.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning))  # TorchScript's
        scripted = torch.jit.script(loop)
    calls = {
        "layer": data.of_layer(ours),
        "package": data.of_layer(theirs),
        "loop": data.of_loop(loop, weights),
        "TorchScript": data.of_loop(scripted, weights),
    }
    if args.compile:
        calls["torch.compile"] = data.of_loop(torch.compile(loop, dynamic=False), weights)
    return Beside(title_of(name, shape, mode), calls)


def main(argv: Sequence[str] | None = None) -> None:
    command = beside_loops.parser("own_cells", __doc__, CELLS)
    command.add_argument("--compile", action="store_true", help="torch.compile too")
    beside_loops.print_rows(command, argv, CELLS, SHAPES, contenders)


if __name__ == "__main__":
    main()
