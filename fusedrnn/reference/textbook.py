"""The textbook layout of the RNN and the LSTM, on top of the reference in torch's layout.

Columns are samples: x is (n_x, m, T_x), a state (n_a, m), a sequence of states (n_a, m, T_x). Parameters come in
one dictionary. RNN: Wax (n_a, n_x), Waa (n_a, n_a), Wya (n_y, n_a), ba (n_a, 1), by (n_y, 1).
LSTM: Wf, Wi, Wc, Wo (n_a, n_a + n_x), each on the concatenation [h_prev; x], and bf, bi, bc, bo (n_a, 1); its gate
c is torch's g. Optional Wy, by are not used: they belong to a layer above.
"""

from __future__ import annotations

import numpy as np

from . import cells, layers
from .cells import Array

__all__ = [
    "lstm_backward",
    "lstm_cell_backward",
    "lstm_cell_forward",
    "lstm_forward",
    "lstm_from_textbook",
    "lstm_to_textbook",
    "rnn_backward",
    "rnn_cell_backward",
    "rnn_cell_forward",
    "rnn_forward",
]

GATES = ("i", "f", "c", "o")  # torch's order i, f, g, o in the textbook's letters


def lstm_from_textbook(parameters: dict[str, Array]) -> dict[str, Array]:
    """Textbook dictionary -> W_ih (4H, I), W_hh (4H, H), b_ih (4H,), b_hh = 0: torch has two biases, a book one."""
    W = np.concatenate([parameters[f"W{gate}"] for gate in GATES])
    b_ih = np.concatenate([parameters[f"b{gate}"].ravel() for gate in GATES])
    H = W.shape[0] // 4
    return {"W_ih": W[:, H:], "W_hh": W[:, :H], "b_ih": b_ih, "b_hh": np.zeros_like(b_ih)}


def lstm_to_textbook(
    W_ih: Array, W_hh: Array, b_ih: Array | None = None, b_hh: Array | None = None
) -> dict[str, Array]:
    """torch's parameters -> textbook dictionary. The two biases act only by their sum, which is the book's one."""
    b = sum((np.asarray(bias) for bias in (b_ih, b_hh) if bias is not None), np.zeros(len(W_ih)))
    W_gates = np.split(np.concatenate([W_hh, W_ih], axis=1), 4)
    b_gates = np.split(b[:, None], 4)
    return {f"W{gate}": W for gate, W in zip(GATES, W_gates)} | {f"b{gate}": v for gate, v in zip(GATES, b_gates)}


def _rnn_weights(parameters: dict[str, Array]) -> tuple[Array, Array, Array]:
    return parameters["Wax"], parameters["Waa"], parameters["ba"].ravel()


def _softmax_output(a: Array, parameters: dict[str, Array]) -> Array:
    """softmax(Wya a + by) over the classes: a (n_a, ...) -> (n_y, ...)."""
    logits = np.einsum("ya,a...->y...", parameters["Wya"], a)
    logits = logits + parameters["by"].reshape(-1, *[1] * (a.ndim - 1))
    weights = np.exp(logits - logits.max(axis=0))
    return weights / weights.sum(axis=0)


def rnn_cell_forward(xt: Array, a_prev: Array, parameters: dict[str, Array]) -> tuple[Array, Array, tuple]:
    """a_t = tanh(Wax x_t + Waa a_{t-1} + ba), y_t = softmax(Wya a_t + by). Returns (a_t, y_t, cache)."""
    a, cache = cells.rnn_cell_forward(xt.T, a_prev.T, *_rnn_weights(parameters))
    return a.T, _softmax_output(a.T, parameters), cache


def rnn_forward(x: Array, a0: Array, parameters: dict[str, Array]) -> tuple[Array, Array, list]:
    """All steps: a (n_a, m, T_x), y (n_y, m, T_x), caches."""
    a, _, caches = layers.rnn_forward(x.T, a0.T, *_rnn_weights(parameters))
    return a.T, _softmax_output(a.T, parameters), caches


def _rnn_parameter_gradients(grads: dict[str, Array]) -> dict[str, Array]:
    return {"dWax": grads["dW_ih"], "dWaa": grads["dW_hh"], "dba": grads["db_ih"][:, None]}


def rnn_cell_backward(da_next: Array, cache: tuple) -> dict[str, Array]:
    """Gradients dxt, da_prev, dWax, dWaa, dba of one step, from that of a_t."""
    grads = cells.rnn_cell_backward(da_next.T, cache)
    return {"dxt": grads["dx"].T, "da_prev": grads["dh_prev"].T} | _rnn_parameter_gradients(grads)


def rnn_backward(da: Array, caches: list) -> dict[str, Array]:
    """Gradients dx, da0, dWax, dWaa, dba, from da (n_a, m, T_x): what reaches each a_t from outside the recurrence."""
    grads = layers.rnn_backward(da.T, caches)
    return {"dx": grads["dx"].T, "da0": grads["dh0"].T} | _rnn_parameter_gradients(grads)


def lstm_cell_forward(
    xt: Array, a_prev: Array, c_prev: Array, parameters: dict[str, Array]
) -> tuple[Array, Array, tuple]:
    """One step of the LSTM. Returns (a_t, c_t, cache)."""
    a, c, cache = cells.lstm_cell_forward(xt.T, a_prev.T, c_prev.T, **lstm_from_textbook(parameters))
    return a.T, c.T, cache


def lstm_forward(
    x: Array, a0: Array, parameters: dict[str, Array], c0: Array | None = None
) -> tuple[Array, Array, list]:
    """All steps: a (n_a, m, T_x), the last c (n_a, m), caches. c0 is zero unless given."""
    c0 = np.zeros_like(a0) if c0 is None else c0
    a, _, c_n, caches = layers.lstm_forward(x.T, a0.T, c0.T, **lstm_from_textbook(parameters))
    return a.T, c_n.T, caches


def _lstm_parameter_gradients(grads: dict[str, Array]) -> dict[str, Array]:
    gates = lstm_to_textbook(grads["dW_ih"], grads["dW_hh"], grads["db_ih"])
    return {f"d{name}": grad for name, grad in gates.items()}


def lstm_cell_backward(da_next: Array, dc_next: Array, cache: tuple) -> dict[str, Array]:
    """Gradients dxt, da_prev, dc_prev, dWf, dbf, ... of one step, from those of a_t and c_t."""
    grads = cells.lstm_cell_backward(da_next.T, dc_next.T, cache)
    states = {"dxt": grads["dx"].T, "da_prev": grads["dh_prev"].T, "dc_prev": grads["dc_prev"].T}
    return states | _lstm_parameter_gradients(grads)


def lstm_backward(da: Array, caches: list, dc_n: Array | None = None) -> dict[str, Array]:
    """Gradients dx, da0, dc0, dWf, dbf, ... from da (n_a, m, T_x) and, optionally, that of the last c."""
    grads = layers.lstm_backward(da.T, caches, dc_n=None if dc_n is None else dc_n.T)
    states = {"dx": grads["dx"].T, "da0": grads["dh0"].T, "dc0": grads["dc0"].T}
    return states | _lstm_parameter_gradients(grads)
