"""One layer in plain torch operations: what derivatives beyond the first gradient are made of.

Forward mode and derivatives beyond the second take this loop through time and torch's own autograd: the same numbers,
any device, any order, at the speed of a Python loop. The second derivative (``second_order.py``) takes its steps alone.
Equations: ``docs/derivations.md``; tests hold :func:`layer` equal to the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid

from ..cells import CELLS
from .call import LayerCall, Leaves, OutputGradients, Outputs, Weights

States = tuple[Tensor, ...]
Parameters = tuple[Tensor, ...]  # of the units, each of (H), or the same for all rows
Recurrent = Callable[[Tensor, int, int], Tensor]  # (h, first, last) -> W_hh h + b_hh of these gates


def _rnn_tanh(act: Any, x: Tensor, rec: Recurrent, h: Tensor) -> States:
    return (act.tanh(x + rec(h, 0, 1)),)  # (R1), (R2)


def _rnn_relu(act: Any, x: Tensor, rec: Recurrent, h: Tensor) -> States:
    return (act.relu(x + rec(h, 0, 1)),)  # (R1), (R3)


def _residual_rnn(act: Any, x: Tensor, rec: Recurrent, h: Tensor) -> States:
    return (h + act.tanh(x + rec(h, 0, 1)),)  # (S1), (S2)


def _lstm(act: Any, x: Tensor, rec: Recurrent, h: Tensor, c: Tensor) -> States:
    a_i, a_f, a_g, a_o = (x + rec(h, 0, 4)).chunk(4, dim=1)
    i, f, g, o = act.sigmoid(a_i), act.sigmoid(a_f), act.tanh(a_g), act.sigmoid(a_o)  # (L1), (L2), (L3), (L4)
    c = f * c + i * g  # (L5)
    return o * torch.tanh(c), c  # (L6)


def _gru(act: Any, x: Tensor, rec: Recurrent, h: Tensor) -> States:
    sizes = [2 * h.size(1), h.size(1)]
    x_gates, x_n = x.split(sizes, dim=1)
    rec_gates, rec_n = rec(h, 0, 3).split(sizes, dim=1)
    r, z = act.sigmoid(x_gates + rec_gates).chunk(2, dim=1)  # (G1), (G2)
    n = act.tanh(x_n + r * rec_n)  # (G3)
    return (n + z * (h - n),)  # (G4)


def _gru_reset_before(act: Any, x: Tensor, rec: Recurrent, h: Tensor) -> States:
    x_gates, x_n = x.split([2 * h.size(1), h.size(1)], dim=1)
    r, z = act.sigmoid(x_gates + rec(h, 0, 2)).chunk(2, dim=1)  # (H1), (H2)
    n = act.tanh(x_n + rec(r * h, 2, 3))  # (H3), (H4)
    return (n + z * (h - n),)  # (H5)


def _mgu(act: Any, x: Tensor, rec: Recurrent, h: Tensor) -> States:
    x_f, x_n = x.chunk(2, dim=1)
    f = act.sigmoid(x_f + rec(h, 0, 1))  # (U1)
    n = act.tanh(x_n + rec(f * h, 1, 2))  # (U2), (U3)
    return (h + f * (n - h),)  # (U4)


def _peephole_lstm(act: Any, x: Tensor, rec: Recurrent, h: Tensor, c: Tensor, units: Parameters) -> States:
    a_i, a_f, a_g, a_o = (x + rec(h, 0, 4)).chunk(4, dim=1)
    p_i, p_f, p_o = units
    i, f, g = act.sigmoid(a_i + p_i * c), act.sigmoid(a_f + p_f * c), act.tanh(a_g)  # (Q1), (Q2), (Q3)
    c = f * c + i * g  # (Q4)
    return act.sigmoid(a_o + p_o * c) * torch.tanh(c), c  # (Q5), (Q6)


def _indrnn_tanh(act: Any, x: Tensor, rec: Recurrent, h: Tensor, units: Parameters) -> States:
    return (act.tanh(x + rec(h, 0, 1) + units[0] * h),)  # (I1), (I2)


def _indrnn_relu(act: Any, x: Tensor, rec: Recurrent, h: Tensor, units: Parameters) -> States:
    return (act.relu(x + rec(h, 0, 1) + units[0] * h),)  # (I1), (I3)


def _slstm(act: Any, x: Tensor, rec: Recurrent, h: Tensor, c: Tensor, n: Tensor, m: Tensor) -> States:
    a_i, a_f, a_z, a_o = (x + rec(h, 0, 4)).chunk(4, dim=1)
    none = n <= 0  # there is no state before
    carried = m + logsigmoid(a_f)  # (X1)
    m = torch.where(none | (a_i >= carried), a_i, carried)  # (X2)
    i = torch.exp(a_i - m)  # (X3)
    f = torch.where(none, 0, torch.exp(torch.where(none, 0, carried - m)))  # (X4)
    z, o = torch.tanh(a_z), torch.sigmoid(a_o)  # (X5), (X6)
    c, n = f * c + i * z, f * n + i  # (X7), (X8)
    return o * (c / n), c, n, m  # (X9)


_NORM_EPSILON = 1e-5


def _normalised(rows: Tensor, gain: Tensor, bias: Tensor | None) -> Tensor:
    """Layer normalisation of each row, written out: the third derivative of torch's own is wrong."""
    v = rows - rows.mean(dim=1, keepdim=True)  # (N1)
    v = gain * (v * (v.square().mean(dim=1, keepdim=True) + _NORM_EPSILON).rsqrt())  # (N2), (N3)
    return v if bias is None else v + bias  # (N5), (N6), (N14)


def _layer_norm_lstm(act: Any, x: Tensor, rec: Recurrent, h: Tensor, c: Tensor, units: Parameters) -> States:
    a_i, a_f, a_g, a_o = (x + rec(h, 0, 4)).chunk(4, dim=1)  # both normalised: (N5), (N6)
    i, f, g, o = act.sigmoid(a_i), act.sigmoid(a_f), act.tanh(a_g), act.sigmoid(a_o)  # (N9), (N10), (N11), (N12)
    c = f * c + i * g  # (N13)
    return o * torch.tanh(_normalised(c, *units)), c  # (N15)


class Step(NamedTuple):
    """One step of a cell, and how the saved values (each a unit's, as csrc/cells orders them) take part in it."""

    # (activations, W_ih x + b_ih of all gates, :data:`Recurrent`, states[, :data:`Parameters`]) -> states. With norms
    # both products come normalised, and of the parameters those of c alone.
    of: Callable[..., States]
    operand: Callable[[States, Tensor], Tensor] | None = None  # (saved, h_{t-1}) -> q, of a cell with two products
    output: Callable[[States, Tensor], Tensor] | None = None  # (saved, c_t) -> h_t before its projection
    # The gates' values among the saved ones, in the order in which ``of`` asks ``activations`` for them. None: there
    # are not all, and :class:`KnownActivations` cannot stand for them.
    gates: tuple[int, ...] | None = None
    product: int | None = None  # W_hh h + b_hh of the last gate, where its value matters apart from an activation


STEPS: dict[str, Step] = {
    "rnn_tanh": Step(_rnn_tanh, gates=()),
    "rnn_relu": Step(_rnn_relu, gates=()),
    "residual_rnn": Step(_residual_rnn, gates=(0,)),
    "lstm": Step(_lstm, output=lambda saved, c: saved[3] * torch.tanh(c), gates=(0, 1, 2, 3)),  # (L6)
    "gru": Step(_gru, gates=(0, 1, 3), product=2),
    "gru_reset_before": Step(_gru_reset_before, operand=lambda saved, h: saved[0] * h, gates=(0, 1, 2)),  # (H3)
    "peephole_lstm": Step(_peephole_lstm, gates=(0, 1, 2, 3)),
    "indrnn_tanh": Step(_indrnn_tanh, gates=()),
    "indrnn_relu": Step(_indrnn_relu, gates=()),
    "layer_norm_lstm": Step(_layer_norm_lstm),
    "layer_norm_gru": Step(_gru),  # (N25), (N26), (N27), (N28)
    "mgu": Step(_mgu, operand=lambda saved, h: saved[0] * h, gates=(0, 1)),  # (U2)
    "slstm": Step(_slstm),
}


class KnownActivations:
    """In the place of ``torch`` in a step: activations whose values the forward pass has kept. What they are applied to
    is not read; all derivatives are there.
    """

    def __init__(self, values: Sequence[Tensor]) -> None:
        self._values = iter(values)  # each a unit's

    def sigmoid(self, a: Tensor) -> Tensor:
        return self._next(a, torch.ops.aten.sigmoid_backward)

    def tanh(self, a: Tensor) -> Tensor:
        return self._next(a, torch.ops.aten.tanh_backward)

    def relu(self, a: Tensor) -> Tensor:
        return self._next(a, partial(torch.ops.aten.threshold_backward, threshold=0))

    def _next(self, a: Tensor, backward: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        values = [next(self._values)]
        while len(values) * values[0].size(1) < a.size(1):
            values.append(next(self._values))
        return _Known.apply(a, torch.cat(values, dim=1), backward)


class _Known(torch.autograd.Function):
    """``value``, as that of an activation of ``a``: ``backward(d, value)`` is its derivative by a, times d."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, value: Tensor, backward: Callable[[Tensor, Tensor], Tensor]) -> Tensor:  # noqa: D102
        found = value.detach()
        ctx.of = backward
        ctx.save_for_backward(found)
        return found

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:  # noqa: D102
        return ctx.of(d, *ctx.saved_tensors), None, None


def layer(call: LayerCall) -> Outputs:
    """What :meth:`LayerCall.forward` computes, without what it saves, and for cells with c all c_t, (T, B, D*H) or
    (N, D*H).
    """
    rows, x = call.rows, call.x
    noise, steps, finals = call.noise.for_op(x), [], []
    for d, weights in enumerate(call.by_direction):
        start = [None if s is None else s[d] for s in call.states]
        keeps = [
            None if k is None else k.flatten(0, -2).chunk(call.directions, 1)[d].split(rows)
            for k in (noise.keep_h, noise.keep_c)
        ]
        keeps += [None] * (call.info.beside - 1)
        mask = None if noise.mask_h is None else noise.mask_h[d]
        states, final = _direction(call.cell, bool(d), x, rows, start, weights, mask, keeps)
        steps.append(states)
        finals.append(final)
    y, *c = (torch.cat(own, dim=-1) for own in ([s[0] for s in steps], [t for s in steps for t in s[1:]]) if own)
    y, *c = (state.reshape(*x.shape[:-1], state.size(-1)) for state in (y, *c))
    return Outputs(y, tuple(map(torch.stack, zip(*finals, strict=True))), *c)


Numbered = dict[int, Tensor]  # tensors by their places in a flat list, without those that are None


def numbered(flat: Sequence[Tensor | None]) -> Numbered:
    return {i: t for i, t in enumerate(flat) if t is not None}


def gradients(call: LayerCall, cotangents: Numbered, leaves: Numbered) -> Numbered:
    """The gradients of ``leaves`` (of :class:`Leaves`) from those of the outputs, ``cotangents`` (of
    :class:`OutputGradients`). The tensors of ``call`` among the leaves are not read.
    """

    def outputs(leaves: Numbered) -> Numbered:
        of_all = Leaves.of(call.cell, [leaves.get(i) for i in range(len(call.leaves.flat))])
        found = layer(call._replace(**of_all._asdict()))
        flat = OutputGradients(found.y, found.c, found.finals).flat
        return {i: flat[i] for i in cotangents}

    return torch.func.vjp(outputs, leaves)[1](cotangents)[0]


def _direction(
    cell: str,
    reverse: bool,
    x: Tensor,
    rows: Sequence[int],
    start: Sequence[Tensor | None],
    weights: Weights,
    mask: Tensor | None,
    keeps: Sequence[Sequence[Tensor] | None],
) -> tuple[States, States]:
    """One direction: each state at all steps, rows in the order of time, and at the end. ``mask`` (B, R): of h in the
    products; ``keeps``: for each state the part of the one before, by steps.
    """
    w_ih, w_hh, b_ih, b_hh, w_hr, w_unit = weights
    info, step = CELLS[cell], STEPS[cell].of
    gates, hidden = len(info.gates), w_hh.size(0) // info.blocks
    w_unit = w_unit if info.product else w_hh
    units = () if w_unit is None else (w_unit.chunk(len(info.parameters)),)
    projections = linear(x.flatten(0, -2), w_ih, None if info.norms else b_ih)
    if info.norms:
        gain_x, gain_h, of_c = w_unit.split([gates * hidden, gates * hidden, w_unit.size(0) - 2 * gates * hidden])
        projections = _normalised(projections, gain_x, b_ih)  # (N5)
        units = (of_c.chunk(2),) if info.norms == 2 else ()
    projections = projections.split(list(rows))
    parts: dict[int, tuple[Tensor, Tensor | None]] = {}  # cut once: the gradient of each cut has the size of the whole

    def masked(h: Tensor) -> Tensor:
        return h if mask is None else h * mask[: h.size(0)]  # (Z1)

    def recurrent(h: Tensor, first: int, last: int) -> Tensor:
        if not info.product:
            return x.new_zeros(()) if b_hh is None else b_hh
        if info.norms:
            return _normalised(linear(masked(h), w_hh), gain_h, b_hh)  # (N6)
        if first not in parts:
            part = slice(first * hidden, last * hidden)
            whole = last - first == gates
            parts[first] = (w_hh, b_hh) if whole else (w_hh[part], None if b_hh is None else b_hh[part])
        return linear(masked(h), *parts[first])

    sizes = (w_hh.size(1) if info.product else hidden, *[hidden] * info.beside)
    start = [x.new_zeros(rows[0], size) if s is None else s for s, size in zip(start, sizes)]
    # Samples beyond those of a step have ended (forward) or not begun (reverse).
    count = rows[-1] if reverse else rows[0]
    states, ended = tuple(s[:count] for s in start), []
    steps: list[States] = [()] * len(rows)
    for t in reversed(range(len(rows))) if reverse else range(len(rows)):
        if rows[t] > count:
            states = tuple(torch.cat([s, first[count : rows[t]]]) for s, first in zip(states, start, strict=True))
        elif rows[t] < count:
            ended.append(tuple(s[rows[t] :] for s in states))
            states = tuple(s[: rows[t]] for s in states)
        count = rows[t]
        read = states if info.product else (masked(states[0]), *states[1:])
        before, states = states, step(torch, projections[t], recurrent, *read, *units)
        if w_hr is not None:
            states = (linear(states[0], w_hr), *states[1:])
        states = tuple(
            s if keep is None else keep[t] * last + (1 - keep[t]) * s for s, last, keep in zip(states, before, keeps)
        )  # (Z2)
        steps[t] = states
    finals = tuple(torch.cat(parts) for parts in zip(states, *reversed(ended), strict=True))
    return tuple(map(torch.cat, zip(*steps, strict=True))), finals


def previous(state: Tensor, start: Tensor | None, rows: Sequence[int], reverse: bool) -> Tensor:
    """The state before every row's step, (N, *), in the order of a direction; ``start``: before the first, or zeros."""
    if start is None:
        start = state.new_zeros(rows[0], state.size(1))
    if rows[-1] == rows[0]:  # dense: they do not increase
        count = rows[0]
        return torch.cat([state[count:], start] if reverse else [start, state[: state.size(0) - count]])
    offset, parts = [0], []
    for count in rows:
        offset.append(offset[-1] + count)
    for t, count in enumerate(rows):
        before = t + 1 if reverse else t - 1
        known = min(count, rows[before]) if 0 <= before < len(rows) else 0
        parts += [state[offset[before] : offset[before] + known]] if known else []
        parts += [start[known:count]] if known < count else []
    return torch.cat(parts)
