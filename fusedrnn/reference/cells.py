"""One time step of each cell, forward and backward, in NumPy: docs/derivations.md line by line.

Layout, torch.nn's: samples are rows. x is (B, I), a state (B, H) or, projected, (B, R), W_ih (G*H, I),
W_hh (G*H, R or H), a bias (G*H,) or None. Arithmetic is float64, whatever comes in.
Each ``*_forward`` returns the new states and a cache; each ``*_backward`` takes the gradients of the new states,
all paths summed, and the cache. It returns a dictionary: ``dx``, ``dh_prev``, (``dc_prev``), ``dW_ih``, ``dW_hh``,
``db_ih`` and ``db_hh`` where there are biases, ``dW_hr`` where there is a projection, ``dW_unit`` where units have
parameters besides, and the gate gradients ``da_ih`` and ``da_hh`` (B, G*H), the gradients of W_ih x + b_ih and of
W_hh h + b_hh; with layer normalisation of W_ih x and of W_hh h.
"""

from __future__ import annotations

import numpy as np

__all__ = [
    "gru_cell_backward",
    "gru_cell_forward",
    "indrnn_cell_backward",
    "indrnn_cell_forward",
    "layer_norm_gru_cell_backward",
    "layer_norm_gru_cell_forward",
    "layer_norm_lstm_cell_backward",
    "layer_norm_lstm_cell_forward",
    "lstm_cell_backward",
    "lstm_cell_forward",
    "mgu_cell_backward",
    "mgu_cell_forward",
    "peephole_lstm_cell_backward",
    "peephole_lstm_cell_forward",
    "residual_rnn_cell_backward",
    "residual_rnn_cell_forward",
    "rnn_cell_backward",
    "rnn_cell_forward",
    "slstm_cell_backward",
    "slstm_cell_forward",
]

Array = np.ndarray
Gradients = dict[str, Array]


def sigmoid(a: Array) -> Array:
    """1 / (1 + exp(-a)), in the form that cannot overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * a))


def linear(v: Array, W: Array, b: Array | None) -> Array:
    """W v + b for each row v: (B, I) -> (B, G*H), in float64."""
    product = np.asarray(v, np.float64) @ np.asarray(W, np.float64).T
    return product if b is None else product + b


def linear_backward(da: Array, v: Array, W: Array) -> tuple[Array, Array, Array]:
    """dv, dW and db of ``linear`` from da, by (C1); sums over the rows are sums over the samples."""
    return da @ W, da.T @ v, da.sum(axis=0)


def through_weights(da_ih: Array, da_hh: Array, x: Array, h_prev: Array, weights: tuple) -> Gradients:
    """The gradients of a step's inputs and parameters from those of its two affine maps: (R5), (R8) to (R11)."""
    W_ih, W_hh, b_ih, b_hh = weights
    dx, dW_ih, db_ih = linear_backward(da_ih, x, W_ih)
    dh_prev, dW_hh, db_hh = linear_backward(da_hh, h_prev, W_hh)
    grads = {"dx": dx, "dh_prev": dh_prev, "dW_ih": dW_ih, "dW_hh": dW_hh, "da_ih": da_ih, "da_hh": da_hh}
    if b_ih is not None:
        grads["db_ih"] = db_ih
    if b_hh is not None:
        grads["db_hh"] = db_hh
    return grads


def rnn_cell_forward(
    x: Array,
    h_prev: Array,
    W_ih: Array,
    W_hh: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
    nonlinearity: str = "tanh",
) -> tuple[Array, tuple]:
    """h_t = phi(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), phi tanh or relu. Returns (h_t, cache)."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    a = linear(x, W_ih, b_ih) + linear(h_prev, W_hh, b_hh)  # (R1)
    h = np.tanh(a) if nonlinearity == "tanh" else np.maximum(a, 0.0)  # (R2), (R3)
    return h, (x, h_prev, h, nonlinearity, (W_ih, W_hh, b_ih, b_hh))


def rnn_cell_backward(dh: Array, cache: tuple) -> Gradients:
    """Gradients of one step from dh (B, H) = dL/dh_t."""
    x, h_prev, h, nonlinearity, weights = cache
    da = dh * (1.0 - h * h) if nonlinearity == "tanh" else dh * (h > 0.0)  # (R4)
    return through_weights(da, da, x, h_prev, weights)  # (R5)


def residual_rnn_cell_forward(
    x: Array, h_prev: Array, W_ih: Array, W_hh: Array, b_ih: Array | None = None, b_hh: Array | None = None
) -> tuple[Array, tuple]:
    """h_t = h_{t-1} + tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh). Returns (h_t, cache)."""
    g = np.tanh(linear(x, W_ih, b_ih) + linear(h_prev, W_hh, b_hh))  # (S1)
    return h_prev + g, (x, h_prev, g, (W_ih, W_hh, b_ih, b_hh))  # (S2)


def residual_rnn_cell_backward(dh: Array, cache: tuple) -> Gradients:
    """Gradients of one step from dh (B, H) = dL/dh_t."""
    x, h_prev, g, weights = cache
    da = dh * (1.0 - g * g)  # (S3)
    grads = through_weights(da, da, x, h_prev, weights)
    grads["dh_prev"] = grads["dh_prev"] + dh  # (S4)
    return grads


def lstm_cell_forward(
    x: Array,
    h_prev: Array,
    c_prev: Array,
    W_ih: Array,
    W_hh: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
    W_hr: Array | None = None,
) -> tuple[Array, Array, tuple]:
    """One step of the LSTM, gates i, f, g, o; with W_hr (R, H) the output is projected. Returns (h_t, c_t, cache)."""
    a = linear(x, W_ih, b_ih) + linear(h_prev, W_hh, b_hh)
    a_i, a_f, a_g, a_o = np.split(a, 4, axis=1)
    i = sigmoid(a_i)  # (L1)
    f = sigmoid(a_f)  # (L2)
    g = np.tanh(a_g)  # (L3)
    o = sigmoid(a_o)  # (L4)
    c = f * c_prev + i * g  # (L5)
    m = o * np.tanh(c)  # (L6)
    h = m if W_hr is None else linear(m, W_hr, None)  # (L7)
    return h, c, (x, h_prev, c_prev, i, f, g, o, c, m, (W_ih, W_hh, b_ih, b_hh), W_hr)


def lstm_cell_backward(dh: Array, dc: Array, cache: tuple) -> Gradients:
    """Gradients of one step from dh (B, R or H) = dL/dh_t and dc (B, H), what reaches c_t other than by h_t."""
    x, h_prev, c_prev, i, f, g, o, c, m, weights, W_hr = cache
    dm = dh if W_hr is None else dh @ W_hr  # (L15)
    tanh_c = np.tanh(c)
    dc = dc + dm * o * (1.0 - tanh_c * tanh_c)  # (L8)
    da_i = dc * g * i * (1.0 - i)  # (L9)
    da_f = dc * c_prev * f * (1.0 - f)  # (L10)
    da_g = dc * i * (1.0 - g * g)  # (L11)
    da_o = dm * tanh_c * o * (1.0 - o)  # (L12)
    da = np.concatenate([da_i, da_f, da_g, da_o], axis=1)
    grads = through_weights(da, da, x, h_prev, weights)  # (L14)
    grads["dc_prev"] = dc * f  # (L13)
    if W_hr is not None:
        grads["dW_hr"] = dh.T @ m  # (L16)
    return grads


def gru_cell_forward(
    x: Array,
    h_prev: Array,
    W_ih: Array,
    W_hh: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
    reset_after: bool = True,
) -> tuple[Array, tuple]:
    """One step of the GRU, gates r, z, n. Returns (h_t, cache).

    ``reset_after`` True is torch.nn's form, n = tanh(W_in x + b_in + r * (W_hn h + b_hn)); False is the original
    paper's, n = tanh(W_in x + b_in + W_hn (r * h) + b_hn).
    """
    H = W_hh.shape[1]
    a_ih = linear(x, W_ih, b_ih)
    a_hh = linear(h_prev, W_hh, b_hh)
    r = sigmoid(a_ih[:, :H] + a_hh[:, :H])  # (G1), (H1)
    z = sigmoid(a_ih[:, H : 2 * H] + a_hh[:, H : 2 * H])  # (G2), (H2)
    if reset_after:
        rec_n = a_hh[:, 2 * H :]
        n = np.tanh(a_ih[:, 2 * H :] + r * rec_n)  # (G3)
    else:
        q = r * h_prev  # (H3)
        rec_n = linear(q, W_hh[2 * H :], None if b_hh is None else b_hh[2 * H :])
        n = np.tanh(a_ih[:, 2 * H :] + rec_n)  # (H4)
    h = (1.0 - z) * n + z * h_prev  # (G4), (H5)
    return h, (x, h_prev, r, z, n, rec_n, reset_after, (W_ih, W_hh, b_ih, b_hh))


def gru_cell_backward(dh: Array, cache: tuple) -> Gradients:
    """Gradients of one step from dh (B, H) = dL/dh_t, either form."""
    *_, reset_after, _ = cache
    return _reset_after_backward(dh, cache) if reset_after else _reset_before_backward(dh, cache)


def mgu_cell_forward(
    x: Array, h_prev: Array, W_ih: Array, W_hh: Array, b_ih: Array | None = None, b_hh: Array | None = None
) -> tuple[Array, tuple]:
    """One step of the minimal gated unit, gates f, n. Returns (h_t, cache)."""
    H = W_hh.shape[1]
    a_ih = linear(x, W_ih, b_ih)
    f = sigmoid(a_ih[:, :H] + linear(h_prev, W_hh[:H], None if b_hh is None else b_hh[:H]))  # (U1)
    q = f * h_prev  # (U2)
    n = np.tanh(a_ih[:, H:] + linear(q, W_hh[H:], None if b_hh is None else b_hh[H:]))  # (U3)
    return (1.0 - f) * h_prev + f * n, (x, h_prev, f, n, (W_ih, W_hh, b_ih, b_hh))  # (U4)


def mgu_cell_backward(dh: Array, cache: tuple) -> Gradients:
    """Gradients of one step from dh (B, H) = dL/dh_t."""
    x, h_prev, f, n, weights = cache
    W_hh = weights[1]
    W_hf, W_hn = np.split(W_hh, 2)
    da_n = dh * f * (1.0 - n * n)  # (U5)
    dq = da_n @ W_hn  # (U7)
    da_f = (dh * (n - h_prev) + dq * h_prev) * f * (1.0 - f)  # (U6), (U8)
    da = np.concatenate([da_f, da_n], axis=1)
    grads = through_weights(da, da, x, h_prev, weights)
    grads["dh_prev"] = dh * (1.0 - f) + dq * f + da_f @ W_hf  # (U9)
    grads["dW_hh"] = np.concatenate([da_f.T @ h_prev, da_n.T @ (f * h_prev)])  # (U10)
    return grads


def peephole_lstm_cell_forward(
    x: Array,
    h_prev: Array,
    c_prev: Array,
    W_ih: Array,
    W_hh: Array,
    W_unit: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
) -> tuple[Array, Array, tuple]:
    """One step of the LSTM with peepholes, W_unit (3*H): p_i, p_f, p_o. Returns (h_t, c_t, cache)."""
    a = linear(x, W_ih, b_ih) + linear(h_prev, W_hh, b_hh)
    a_i, a_f, a_g, a_o = np.split(a, 4, axis=1)
    p_i, p_f, p_o = np.split(np.asarray(W_unit, np.float64), 3)
    i = sigmoid(a_i + p_i * c_prev)  # (Q1)
    f = sigmoid(a_f + p_f * c_prev)  # (Q2)
    g = np.tanh(a_g)  # (Q3)
    c = f * c_prev + i * g  # (Q4)
    o = sigmoid(a_o + p_o * c)  # (Q5)
    h = o * np.tanh(c)  # (Q6)
    return h, c, (x, h_prev, c_prev, (i, f, g, o), c, (p_i, p_f, p_o), (W_ih, W_hh, b_ih, b_hh))


def peephole_lstm_cell_backward(dh: Array, dc: Array, cache: tuple) -> Gradients:
    """Gradients of one step from dh (B, H) and dc (B, H), what reaches c_t from later than step t."""
    x, h_prev, c_prev, (i, f, g, o), c, (p_i, p_f, p_o), weights = cache
    tanh_c = np.tanh(c)
    da_o = dh * tanh_c * o * (1.0 - o)  # (Q7)
    dc = dc + dh * o * (1.0 - tanh_c * tanh_c) + p_o * da_o  # (Q8)
    da_i = dc * g * i * (1.0 - i)  # (Q9)
    da_f = dc * c_prev * f * (1.0 - f)  # (Q10)
    da_g = dc * i * (1.0 - g * g)  # (Q11)
    da = np.concatenate([da_i, da_f, da_g, da_o], axis=1)
    grads = through_weights(da, da, x, h_prev, weights)  # (Q14), (L18)
    grads["dc_prev"] = dc * f + p_i * da_i + p_f * da_f  # (Q12)
    grads["dW_unit"] = np.concatenate([da_i * c_prev, da_f * c_prev, da_o * c], axis=1).sum(axis=0)  # (Q13)
    return grads


def slstm_cell_forward(
    x: Array,
    h_prev: Array,
    c_prev: Array,
    n_prev: Array,
    m_prev: Array,
    W_ih: Array,
    W_hh: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
) -> tuple[Array, Array, Array, Array, tuple]:
    """One step of the sLSTM, gates i, f, z, o. Returns (h_t, c_t, n_t, m_t, cache)."""
    a = linear(x, W_ih, b_ih) + linear(h_prev, W_hh, b_hh)
    a_i, a_f, a_z, a_o = np.split(a, 4, axis=1)
    there = n_prev > 0.0
    carried = np.where(there, m_prev - np.logaddexp(0.0, -a_f), -np.inf)  # (X1)
    m = np.maximum(carried, a_i)  # (X2)
    i = np.exp(a_i - m)  # (X3)
    f = np.exp(carried - m)  # (X4)
    z = np.tanh(a_z)  # (X5)
    o = sigmoid(a_o)  # (X6)
    c = f * c_prev + i * z  # (X7)
    n = f * n_prev + i  # (X8)
    h = o * (c / n)  # (X9)
    cache = (x, h_prev, (c_prev, n_prev), (i, f, z, o), sigmoid(-a_f), carried > a_i, (c, n), (W_ih, W_hh, b_ih, b_hh))
    return h, c, n, m, cache


def slstm_cell_backward(dh: Array, dc: Array, dn: Array, dm: Array, cache: tuple) -> Gradients:
    """Gradients of one step from dh and from dc, dn, dm, what reaches c_t, n_t, m_t from later, (B, H) each."""
    x, h_prev, (c_prev, n_prev), (i, f, z, o), fades, carries, (c, n), weights = cache
    share = dh * o / n
    dc = dc + share  # (X11)
    dn = dn - share * c / n  # (X12)
    of_i = (dc * z + dn) * i  # (X14), the part by (X3)
    of_f = (dc * c_prev + dn * n_prev) * f  # (X15), the part by (X4)
    dm = dm - of_i - of_f  # (X13)
    dcarried = of_f + np.where(carries, dm, 0.0)  # (X15)
    da_i = of_i + np.where(carries, 0.0, dm)  # (X14)
    da_f = dcarried * fades  # (X16)
    da_z = dc * i * (1.0 - z * z)  # (X17)
    da_o = dh * (c / n) * o * (1.0 - o)  # (X18)
    da = np.concatenate([da_i, da_f, da_z, da_o], axis=1)
    grads = through_weights(da, da, x, h_prev, weights)  # (X20), (L18)
    return grads | {"dc_prev": dc * f, "dn_prev": dn * f, "dm_prev": dcarried}  # (X19)


def indrnn_cell_forward(
    x: Array,
    h_prev: Array,
    W_ih: Array,
    W_hh: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
    nonlinearity: str = "tanh",
) -> tuple[Array, tuple]:
    """h_t = phi(W_ih x_t + b_ih + u * h_{t-1} + b_hh), phi tanh or relu, u = W_hh (H). Returns (h_t, cache)."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    u = np.asarray(W_hh, np.float64)
    a = linear(x, W_ih, b_ih) + u * h_prev + (0.0 if b_hh is None else b_hh)  # (I1)
    h = np.tanh(a) if nonlinearity == "tanh" else np.maximum(a, 0.0)  # (I2), (I3)
    return h, (x, h_prev, h, nonlinearity, W_ih, u, b_ih is not None, b_hh is not None)


def indrnn_cell_backward(dh: Array, cache: tuple) -> Gradients:
    """Gradients of one step from dh (B, H) = dL/dh_t."""
    x, h_prev, h, nonlinearity, W_ih, u, has_b_ih, has_b_hh = cache
    da = dh * (1.0 - h * h) if nonlinearity == "tanh" else dh * (h > 0.0)  # (I4)
    dx, dW_ih, db = linear_backward(da, x, W_ih)  # (R8), (R9), (R11)
    grads = {"dx": dx, "dW_ih": dW_ih, "da_ih": da, "da_hh": da}
    grads["dW_hh"] = (da * h_prev).sum(axis=0)  # (I5)
    grads["dh_prev"] = u * da  # (I6)
    return grads | ({"db_ih": db} if has_b_ih else {}) | ({"db_hh": db} if has_b_hh else {})


NORM_EPSILON = 1e-5


def normalised(v: Array) -> tuple[Array, Array]:
    """Each row of v (B, n) with mean 0 and variance 1, and the scale (B, 1) that made it so."""
    d = v - v.mean(axis=1, keepdims=True)  # (N1)
    scale = 1.0 / np.sqrt((d * d).mean(axis=1, keepdims=True) + NORM_EPSILON)  # (N2)
    return d * scale, scale  # (N3)


def normalised_backward(d: Array, normed: Array, scale: Array) -> Array:
    """The gradient of v (B, n) from that of it normalised."""
    means = d.mean(axis=1, keepdims=True), (d * normed).mean(axis=1, keepdims=True)
    return scale * (d - means[0] - normed * means[1])  # (N4)


def _normed_arguments(x: Array, h_prev: Array, weights: tuple, gains: Array) -> tuple[Array, Array, tuple]:
    """The gates' arguments by x and by h (B, G*H), and a cache."""
    W_ih, W_hh, b_ih, b_hh = weights
    gain_x, gain_h = np.split(gains, 2)
    x_normed, x_scale = normalised(linear(x, W_ih, None))
    h_normed, h_scale = normalised(linear(h_prev, W_hh, None))
    by_x = gain_x * x_normed + (0.0 if b_ih is None else b_ih)  # (N5)
    by_h = gain_h * h_normed + (0.0 if b_hh is None else b_hh)  # (N6)
    return by_x, by_h, (x, h_prev, gain_x, gain_h, x_normed, h_normed, x_scale, h_scale, weights)


def _normed_arguments_backward(da_x: Array, da_h: Array, cache: tuple) -> Gradients:
    """From the gradients of both arguments: those of what the products are made of, and of the gains."""
    x, h_prev, gain_x, gain_h, x_normed, h_normed, x_scale, h_scale, (W_ih, W_hh, b_ih, b_hh) = cache
    dp_x = normalised_backward(gain_x * da_x, x_normed, x_scale)  # (N7), (N4)
    dp_h = normalised_backward(gain_h * da_h, h_normed, h_scale)  # (N7), (N4)
    grads = through_weights(dp_x, dp_h, x, h_prev, (W_ih, W_hh, None, None))  # (N24)
    grads |= {} if b_ih is None else {"db_ih": da_x.sum(axis=0)}
    grads |= {} if b_hh is None else {"db_hh": da_h.sum(axis=0)}
    grads["dW_unit"] = np.concatenate([(da_x * x_normed).sum(axis=0), (da_h * h_normed).sum(axis=0)])  # (N8)
    return grads


def layer_norm_lstm_cell_forward(
    x: Array,
    h_prev: Array,
    c_prev: Array,
    W_ih: Array,
    W_hh: Array,
    W_unit: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
) -> tuple[Array, Array, tuple]:
    """One step of the LSTM with layer normalisation, W_unit (10*H): the gains of W_ih x and of W_hh h by gate, then
    gain and bias of c. Returns (h_t, c_t, cache).
    """
    W_unit, H = np.asarray(W_unit, np.float64), c_prev.shape[1]
    by_x, by_h, cache = _normed_arguments(x, h_prev, (W_ih, W_hh, b_ih, b_hh), W_unit[: 8 * H])
    gain_c, bias_c = np.split(W_unit[8 * H :], 2)
    a_i, a_f, a_g, a_o = np.split(by_x + by_h, 4, axis=1)
    i, f, g, o = sigmoid(a_i), sigmoid(a_f), np.tanh(a_g), sigmoid(a_o)  # (N9), (N10), (N11), (N12)
    c = f * c_prev + i * g  # (N13)
    c_normed, c_scale = normalised(c)
    tanh_m = np.tanh(gain_c * c_normed + bias_c)  # (N14)
    return o * tanh_m, c, (c_prev, (i, f, g, o), tanh_m, gain_c, c_normed, c_scale, cache)  # (N15)


def layer_norm_lstm_cell_backward(dh: Array, dc: Array, cache: tuple) -> Gradients:
    """Gradients of one step from dh (B, H) and dc (B, H), what reaches c_t from later than step t."""
    c_prev, (i, f, g, o), tanh_m, gain_c, c_normed, c_scale, cache = cache
    dm = dh * o * (1.0 - tanh_m * tanh_m)  # (N16)
    dc = dc + normalised_backward(gain_c * dm, c_normed, c_scale)  # (N17)
    da_i = dc * g * i * (1.0 - i)  # (N18)
    da_f = dc * c_prev * f * (1.0 - f)  # (N19)
    da_g = dc * i * (1.0 - g * g)  # (N20)
    da_o = dh * tanh_m * o * (1.0 - o)  # (N21)
    da = np.concatenate([da_i, da_f, da_g, da_o], axis=1)
    grads = _normed_arguments_backward(da, da, cache)
    grads["dc_prev"] = dc * f  # (N22)
    grads["dW_unit"] = np.concatenate([grads["dW_unit"], (dm * c_normed).sum(axis=0), dm.sum(axis=0)])  # (N23)
    return grads


def layer_norm_gru_cell_forward(
    x: Array,
    h_prev: Array,
    W_ih: Array,
    W_hh: Array,
    W_unit: Array,
    b_ih: Array | None = None,
    b_hh: Array | None = None,
) -> tuple[Array, tuple]:
    """One step of the GRU with layer normalisation, W_unit (6*H): the gains of W_ih x and of W_hh h by gate. Returns
    (h_t, cache).
    """
    by_x, by_h, cache = _normed_arguments(x, h_prev, (W_ih, W_hh, b_ih, b_hh), np.asarray(W_unit, np.float64))
    (x_r, x_z, x_n), (h_r, h_z, h_n) = np.split(by_x, 3, axis=1), np.split(by_h, 3, axis=1)
    r, z = sigmoid(x_r + h_r), sigmoid(x_z + h_z)  # (N25), (N26)
    n = np.tanh(x_n + r * h_n)  # (N27)
    return n + z * (h_prev - n), (h_prev, r, z, n, h_n, cache)  # (N28)


def layer_norm_gru_cell_backward(dh: Array, cache: tuple) -> Gradients:
    """Gradients of one step from dh (B, H) = dL/dh_t."""
    h_prev, r, z, n, h_n, cache = cache
    da_n = dh * (1.0 - z) * (1.0 - n * n)  # (N29)
    da_r = da_n * h_n * r * (1.0 - r)  # (N31)
    da_z = dh * (h_prev - n) * z * (1.0 - z)  # (N32)
    da_x, da_h = (np.concatenate([da_r, da_z, last], axis=1) for last in (da_n, da_n * r))  # (N30)
    grads = _normed_arguments_backward(da_x, da_h, cache)
    grads["dh_prev"] = grads["dh_prev"] + dh * z  # (N33)
    return grads


def _reset_after_backward(dh: Array, cache: tuple) -> Gradients:
    x, h_prev, r, z, n, rec_n, _, weights = cache
    da_n = dh * (1.0 - z) * (1.0 - n * n)  # (G5)
    drec_n = da_n * r  # (G6)
    da_r = da_n * rec_n * r * (1.0 - r)  # (G7)
    da_z = dh * (h_prev - n) * z * (1.0 - z)  # (G8)
    da_ih = np.concatenate([da_r, da_z, da_n], axis=1)
    da_hh = np.concatenate([da_r, da_z, drec_n], axis=1)
    grads = through_weights(da_ih, da_hh, x, h_prev, weights)
    grads["dh_prev"] = grads["dh_prev"] + dh * z  # (G9), (G10)
    return grads


def _reset_before_backward(dh: Array, cache: tuple) -> Gradients:
    x, h_prev, r, z, n, _, _, weights = cache
    W_hh = weights[1]
    H = W_hh.shape[1]
    W_rz, W_hn = W_hh[: 2 * H], W_hh[2 * H :]
    da_n = dh * (1.0 - z) * (1.0 - n * n)  # (H6)
    da_z = dh * (h_prev - n) * z * (1.0 - z)  # (H7)
    dq = da_n @ W_hn  # (H9)
    da_r = dq * h_prev * r * (1.0 - r)  # (H10)
    da_rz = np.concatenate([da_r, da_z], axis=1)
    da = np.concatenate([da_rz, da_n], axis=1)
    grads = through_weights(da, da, x, h_prev, weights)
    grads["dh_prev"] = dh * z + dq * r + da_rz @ W_rz  # (H8), (H11), (H12)
    grads["dW_hh"] = np.concatenate([da_rz.T @ h_prev, da_n.T @ (r * h_prev)])  # (H13)
    return grads
