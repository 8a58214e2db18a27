"""Cells of a user's own beside those of the package, and one of every function that there is."""

from __future__ import annotations

import torch
from written_cells import TWINS as written

import fusedrnn
from fusedrnn.user_cells import exp, log, maximum, minimum, relu, sigmoid, softplus, sqrt, square, tanh, where

#: Cells of the package as a user would write them, and the package's layers of them.
LAYERS = {
    written["rnn_tanh"]: fusedrnn.RNN,
    written["lstm"]: fusedrnn.LSTM,
    written["gru"]: fusedrnn.GRU,
    written["mgu"]: fusedrnn.MGU,
    written["peephole_lstm"]: fusedrnn.PeepholeLSTM,
    written["indrnn_relu"]: fusedrnn.IndRNN,
}

#: Each with what it gives in torch; of x and of a parameter p, a half in the test.
FUNCTIONS = {
    exp: torch.exp,
    log: torch.log,
    sqrt: torch.sqrt,
    abs: torch.abs,
    softplus: lambda v: torch.where(v > 0, v, 0) + torch.log1p(torch.exp(-v.abs())),  # torch's is v above 20
    square: torch.square,
    sigmoid: torch.sigmoid,
    tanh: torch.tanh,
    relu: torch.relu,
}


@fusedrnn.cell(gates="a", parameters="p s")
def every_function(x, rec, h, p, s):
    """Unit j has function j, as s_j = j says; then come maximum, minimum and division."""
    result = p / x.a
    for j, choice in reversed([*enumerate([*(f(x.a) for f in FUNCTIONS), maximum(x.a, p), minimum(x.a, p)])]):
        result = where(s < j + 0.5, choice, result)
    return result
