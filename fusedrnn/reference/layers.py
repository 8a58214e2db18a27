"""A whole layer, one direction: the cells of ``cells.py`` through time, forward and backward.

x is (T, B, I), h0 (B, H) or, projected, (B, R), c0 (B, H). ``*_forward`` returns y (T, B, H or R), the final states
and the caches; ``*_backward`` takes dy and, optionally, the gradients of the final states. Its dictionary holds
``dx``, ``dh0``, (``dc0``), the parameters' gradients summed over time, and ``da_ih``, ``da_hh`` (T, B, G*H).
A reverse direction is the same layer on x[::-1]; a ragged batch is one call a sample (section P of the derivation).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import cells
from .cells import Array, Gradients

__all__ = [
    "gru_backward",
    "gru_forward",
    "indrnn_backward",
    "indrnn_forward",
    "layer_norm_gru_backward",
    "layer_norm_gru_forward",
    "layer_norm_lstm_backward",
    "layer_norm_lstm_forward",
    "lstm_backward",
    "lstm_forward",
    "mgu_backward",
    "mgu_forward",
    "peephole_lstm_backward",
    "peephole_lstm_forward",
    "residual_rnn_backward",
    "residual_rnn_forward",
    "rnn_backward",
    "rnn_forward",
    "slstm_backward",
    "slstm_forward",
]


def _forward(step: Callable, x: Array, states: list[Array], *weights: Array | None, **options) -> tuple:
    y, caches = [], []
    for x_t in x:
        *states, cache = step(x_t, *states, *weights, **options)
        y.append(states[0])
        caches.append(cache)
    return np.stack(y), *states, caches


def _backward(step: Callable, dy: Array, caches: list, d_states: dict[str, Array]) -> Gradients:
    """Steps T to 1. ``d_states`` holds what reaches h_t (and c_t) from later than step t."""
    over_time = {"dx": [], "da_ih": [], "da_hh": []}
    sums: Gradients = {}
    for dy_t, cache in zip(dy[::-1], caches[::-1], strict=True):
        d_states["dh"] = d_states["dh"] + dy_t  # (R6)
        grads = step(*d_states.values(), cache)
        d_states = {name: grads.pop(f"{name}_prev") for name in d_states}
        for name, steps in over_time.items():
            steps.append(grads.pop(name))
        for name, grad in grads.items():
            sums[name] = sums.get(name, 0.0) + grad  # (R9) to (R11)
    stacked = {name: np.stack(steps[::-1]) for name, steps in over_time.items()}
    return stacked | {f"{name}0": grad for name, grad in d_states.items()} | sums  # dh0: (R7)


def _or_zero(grad: Array | None) -> Array | float:
    return 0.0 if grad is None else np.asarray(grad, np.float64)


def rnn_forward(
    x: Array,
    h0: Array,
    W_ih: Array,
    W_hh: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
    nonlinearity: str = "tanh",
) -> tuple[Array, Array, list]:
    """The simple recurrent layer, equations (R1) to (R3). Returns (y, h_n, caches)."""
    return _forward(cells.rnn_cell_forward, x, [h0], W_ih, W_hh, b_ih, b_hh, nonlinearity=nonlinearity)


def rnn_backward(dy: Array, caches: list, dh_n: Array | None = None) -> Gradients:
    """Gradients of ``rnn_forward``, equations (R4) to (R11)."""
    return _backward(cells.rnn_cell_backward, dy, caches, {"dh": _or_zero(dh_n)})


def residual_rnn_forward(
    x: Array, h0: Array, W_ih: Array, W_hh: Array, b_ih: Array | None = None, b_hh: Array | None = None
) -> tuple[Array, Array, list]:
    """The residual recurrent layer, equations (S1) and (S2). Returns (y, h_n, caches)."""
    return _forward(cells.residual_rnn_cell_forward, x, [h0], W_ih, W_hh, b_ih, b_hh)


def residual_rnn_backward(dy: Array, caches: list, dh_n: Array | None = None) -> Gradients:
    """Gradients of ``residual_rnn_forward``, equations (S3) and (S4)."""
    return _backward(cells.residual_rnn_cell_backward, dy, caches, {"dh": _or_zero(dh_n)})


def lstm_forward(
    x: Array,
    h0: Array,
    c0: Array,
    W_ih: Array,
    W_hh: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
    W_hr: Array | None = None,
) -> tuple[Array, Array, Array, list]:
    """The LSTM layer, equations (L1) to (L7). Returns (y, h_n, c_n, caches)."""
    return _forward(cells.lstm_cell_forward, x, [h0, c0], W_ih, W_hh, b_ih, b_hh, W_hr)


def lstm_backward(dy: Array, caches: list, dh_n: Array | None = None, dc_n: Array | None = None) -> Gradients:
    """Gradients of ``lstm_forward``, equations (L8) to (L18)."""
    d_states = {"dh": _or_zero(dh_n), "dc": _or_zero(dc_n)}
    return _backward(cells.lstm_cell_backward, dy, caches, d_states)


def gru_forward(
    x: Array,
    h0: Array,
    W_ih: Array,
    W_hh: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
    reset_after: bool = True,
) -> tuple[Array, Array, list]:
    """The GRU layer, equations (G1) to (G4), or (H1) to (H5) if not ``reset_after``. Returns (y, h_n, caches)."""
    return _forward(cells.gru_cell_forward, x, [h0], W_ih, W_hh, b_ih, b_hh, reset_after=reset_after)


def gru_backward(dy: Array, caches: list, dh_n: Array | None = None) -> Gradients:
    """Gradients of ``gru_forward``, equations (G5) to (G11), or (H6) to (H13)."""
    return _backward(cells.gru_cell_backward, dy, caches, {"dh": _or_zero(dh_n)})


def mgu_forward(
    x: Array, h0: Array, W_ih: Array, W_hh: Array, b_ih: Array | None = None, b_hh: Array | None = None
) -> tuple[Array, Array, list]:
    """The layer of minimal gated units, equations (U1) to (U4). Returns (y, h_n, caches)."""
    return _forward(cells.mgu_cell_forward, x, [h0], W_ih, W_hh, b_ih, b_hh)


def mgu_backward(dy: Array, caches: list, dh_n: Array | None = None) -> Gradients:
    """Gradients of ``mgu_forward``, equations (U5) to (U10)."""
    return _backward(cells.mgu_cell_backward, dy, caches, {"dh": _or_zero(dh_n)})


def peephole_lstm_forward(
    x: Array,
    h0: Array,
    c0: Array,
    W_ih: Array,
    W_hh: Array,
    W_unit: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
) -> tuple[Array, Array, Array, list]:
    """The LSTM layer with peepholes, equations (Q1) to (Q6). Returns (y, h_n, c_n, caches)."""
    return _forward(cells.peephole_lstm_cell_forward, x, [h0, c0], W_ih, W_hh, W_unit, b_ih, b_hh)


def peephole_lstm_backward(dy: Array, caches: list, dh_n: Array | None = None, dc_n: Array | None = None) -> Gradients:
    """Gradients of ``peephole_lstm_forward``, equations (Q7) to (Q14)."""
    d_states = {"dh": _or_zero(dh_n), "dc": _or_zero(dc_n)}
    return _backward(cells.peephole_lstm_cell_backward, dy, caches, d_states)


def slstm_forward(
    x: Array,
    h0: Array,
    c0: Array,
    n0: Array,
    m0: Array,
    W_ih: Array,
    W_hh: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
) -> tuple[Array, Array, Array, Array, Array, list]:
    """The sLSTM layer, equations (X1) to (X9). Returns (y, h_n, c_n, n_n, m_n, caches)."""
    return _forward(cells.slstm_cell_forward, x, [h0, c0, n0, m0], W_ih, W_hh, b_ih, b_hh)


def slstm_backward(
    dy: Array,
    caches: list,
    dh_n: Array | None = None,
    dc_n: Array | None = None,
    dn_n: Array | None = None,
    dm_n: Array | None = None,
) -> Gradients:
    """Gradients of ``slstm_forward``, equations (X11) to (X20)."""
    given = {"dh": dh_n, "dc": dc_n, "dn": dn_n, "dm": dm_n}
    return _backward(cells.slstm_cell_backward, dy, caches, {name: _or_zero(d) for name, d in given.items()})


def indrnn_forward(
    x: Array,
    h0: Array,
    W_ih: Array,
    W_hh: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
    nonlinearity: str = "tanh",
) -> tuple[Array, Array, list]:
    """The layer of independently recurrent units, equations (I1) to (I3). Returns (y, h_n, caches)."""
    return _forward(cells.indrnn_cell_forward, x, [h0], W_ih, W_hh, b_ih, b_hh, nonlinearity=nonlinearity)


def indrnn_backward(dy: Array, caches: list, dh_n: Array | None = None) -> Gradients:
    """Gradients of ``indrnn_forward``, equations (I4) to (I6)."""
    return _backward(cells.indrnn_cell_backward, dy, caches, {"dh": _or_zero(dh_n)})


def layer_norm_lstm_forward(
    x: Array,
    h0: Array,
    c0: Array,
    W_ih: Array,
    W_hh: Array,
    W_unit: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
) -> tuple[Array, Array, Array, list]:
    """The LSTM layer with layer normalisation, equations (N1) to (N15). Returns (y, h_n, c_n, caches)."""
    return _forward(cells.layer_norm_lstm_cell_forward, x, [h0, c0], W_ih, W_hh, W_unit, b_ih, b_hh)


def layer_norm_lstm_backward(
    dy: Array, caches: list, dh_n: Array | None = None, dc_n: Array | None = None
) -> Gradients:
    """Gradients of ``layer_norm_lstm_forward``, equations (N16) to (N24)."""
    d_states = {"dh": _or_zero(dh_n), "dc": _or_zero(dc_n)}
    return _backward(cells.layer_norm_lstm_cell_backward, dy, caches, d_states)


def layer_norm_gru_forward(
    x: Array,
    h0: Array,
    W_ih: Array,
    W_hh: Array,
    W_unit: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
) -> tuple[Array, Array, list]:
    """The GRU layer with layer normalisation, equations (N25) to (N28). Returns (y, h_n, caches)."""
    return _forward(cells.layer_norm_gru_cell_forward, x, [h0], W_ih, W_hh, W_unit, b_ih, b_hh)


def layer_norm_gru_backward(dy: Array, caches: list, dh_n: Array | None = None) -> Gradients:
    """Gradients of ``layer_norm_gru_forward``, equations (N29) to (N33)."""
    return _backward(cells.layer_norm_gru_cell_backward, dy, caches, {"dh": _or_zero(dh_n)})
