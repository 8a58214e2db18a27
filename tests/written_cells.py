"""Cells written as users write them, for the tests of ``fusedrnn.cell``; most are also in csrc/cells, by hand."""

from __future__ import annotations

import torch

import fusedrnn
from fusedrnn.user_cells import exp, log, maximum, minimum, relu, sigmoid, softplus, sqrt, square, tanh, where


@fusedrnn.cell(gates="h")
def rnn_tanh(x, rec, h):
    return tanh(x.h + rec.h)


@fusedrnn.cell(gates="h")
def rnn_relu(x, rec, h):
    return relu(x.h + rec.h)


@fusedrnn.cell(gates="g")
def residual_rnn(x, rec, h):
    return h + tanh(x.g + rec.g)


@fusedrnn.cell(gates="i f g o", states="h c")
def lstm(x, rec, h, c):
    i = torch.sigmoid(x.i + rec.i)
    f = torch.sigmoid(x.f + rec.f)
    g = torch.tanh(x.g + rec.g)
    o = torch.sigmoid(x.o + rec.o)
    c = f * c + i * g
    return o * torch.tanh(c), c


@fusedrnn.cell(gates="r z n")
def gru(x, rec, h):
    r = sigmoid(x.r + rec.r)
    z = sigmoid(x.z + rec.z)
    n = tanh(x.n + r * rec.n)
    return (1 - z) * n + z * h


@fusedrnn.cell(gates="r z n")
def gru_reset_before(x, rec, h):
    r = sigmoid(x.r + rec.r)
    z = sigmoid(x.z + rec.z)
    n = tanh(x.n + rec.n(r * h))
    return n + z * (h - n)


@fusedrnn.cell(gates="f n")
def mgu(x, rec, h):
    f = sigmoid(x.f + rec.f)
    n = tanh(x.n + rec.n(f * h))
    return (1 - f) * h + f * n


@fusedrnn.cell(gates="i f g o", states="h c", parameters="p_i p_f p_o")
def peephole_lstm(x, rec, h, c, p_i, p_f, p_o):
    i = sigmoid(x.i + rec.i + p_i * c)
    f = sigmoid(x.f + p_f * c + rec.f)
    g = tanh(x.g + rec.g)
    c = f * c + i * g
    o = sigmoid(x.o + rec.o + p_o * c)
    return o * tanh(c), c


@fusedrnn.cell(gates="h", parameters="u")
def indrnn_tanh(x, rec, h, u):
    return tanh(x.h + u * h)


@fusedrnn.cell(gates="h", parameters="u")
def indrnn_relu(x, rec, h, u):
    return relu(x.h + u * h)


#: Those of the registry, by the same names.
TWINS = {
    cell.name: cell
    for cell in (
        rnn_tanh, rnn_relu, residual_rnn, lstm, gru, gru_reset_before, mgu, peephole_lstm, indrnn_tanh, indrnn_relu,
    )
}  # fmt: skip


@fusedrnn.cell(gates="z n s", parameters="a b")
def every_operation(x, rec, h, a, b):
    z = 0.5 * sigmoid(x.z + rec.z) + exp(-square(h)) / 4
    n = softplus(x.n) - log(1 + exp(rec.n)) + sqrt(1 + a * a) * (x.s - rec.s) ** 3
    bent = where(h < n, a * n, maximum(h, b) - minimum(n, 0.1 * h))
    return z * bent + abs(n - h) / (2 + square(h)) - relu(h * b)


@fusedrnn.cell(gates="r z n", parameters="p w")
def gated_by_h(x, rec, h, p, w):
    """Two products; the first gates see h, and one sees the other."""
    r = sigmoid(x.r + rec.r + p * h)
    z = sigmoid(x.z + rec.z + w * h * h)
    mixed = r * z
    n = tanh(x.n + w + rec.n(mixed * h))
    return h + z * mixed * (n - h)


@fusedrnn.cell(gates="s a", parameters="p")
def one_gate_twice(x, rec, h, p):
    """Two products; the second stage needs two functions of one gate: its argument is saved."""
    s = x.s + rec.s
    keep, new = sigmoid(s), tanh(s)
    return keep * h + (1 - keep) * new * tanh(x.a + rec.a(keep * h)) * sigmoid(p)


@fusedrnn.cell(gates="i o", states="h c", parameters="p")
def awkward_memory(x, rec, h, c, p):
    """dc_of needs c_{t-1}, the candidate a parameter: both are saved."""
    i = sigmoid(x.i + rec.i)
    new = c * i + p * tanh(x.i + rec.i)
    return tanh(x.o + rec.o) * tanh(new * c + p), new


FURTHER = {cell.name: cell for cell in (every_operation, gated_by_h, one_gate_twice, awkward_memory)}
