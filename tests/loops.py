"""The reference: each cell as one plain torch expression a step, and a loop over layers, directions and time.

Everything here is differentiable by torch.autograd and shares nothing with the code under test. TWINS says, for each
cell of the registry, its step, our module classes and torch.nn's (None where there is no such class). Shapes:
x [B, I], states [B, H] each, w_ih [G H, I], w_hh [G H, H or P], b_ih and b_hh [G H] or None; of a cell with
parameters of its units these come last, w_unit [U H], or are w_hh [U H] if no product reads h.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fusedrnn

States = tuple[Tensor, ...]


def _rnn(x, states, w_ih, w_hh, b_ih, b_hh, *, activation) -> States:
    return (activation(linear(x, w_ih, b_ih) + linear(states[0], w_hh, b_hh)),)


def _residual_rnn(x, states, w_ih, w_hh, b_ih, b_hh) -> States:
    return (states[0] + torch.tanh(linear(x, w_ih, b_ih) + linear(states[0], w_hh, b_hh)),)


def _lstm(x, states, w_ih, w_hh, b_ih, b_hh) -> States:
    h, c = states
    i, f, g, o = (linear(x, w_ih, b_ih) + linear(h, w_hh, b_hh)).chunk(4, dim=1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(x, states, w_ih, w_hh, b_ih, b_hh) -> States:
    (h,) = states
    x_r, x_z, x_n = linear(x, w_ih, b_ih).chunk(3, dim=1)
    h_r, h_z, h_n = linear(h, w_hh, b_hh).chunk(3, dim=1)
    z = torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return ((h - n) * z + n,)  # as torch.nn: of an infinite gradient of h, n gets d - d z, NaN


def _gru_reset_before(x, states, w_ih, w_hh, b_ih, b_hh) -> States:
    (h,) = states
    x_r, x_z, x_n = linear(x, w_ih, b_ih).chunk(3, dim=1)
    w_r, w_z, w_n = w_hh.chunk(3)
    b_r, b_z, b_n = (None, None, None) if b_hh is None else b_hh.chunk(3)
    r = torch.sigmoid(x_r + linear(h, w_r, b_r))
    z = torch.sigmoid(x_z + linear(h, w_z, b_z))
    n = torch.tanh(x_n + linear(r * h, w_n, b_n))
    return ((h - n) * z + n,)  # likewise


def _mgu(x, states, w_ih, w_hh, b_ih, b_hh) -> States:
    (h,) = states
    x_f, x_n = linear(x, w_ih, b_ih).chunk(2, dim=1)
    w_f, w_n = w_hh.chunk(2)
    b_f, b_n = (None, None) if b_hh is None else b_hh.chunk(2)
    f = torch.sigmoid(x_f + linear(h, w_f, b_f))
    return (h + f * (torch.tanh(x_n + linear(f * h, w_n, b_n)) - h),)


def _peephole_lstm(x, states, w_ih, w_hh, b_ih, b_hh, w_unit) -> States:
    h, c = states
    i, f, g, o = (linear(x, w_ih, b_ih) + linear(h, w_hh, b_hh)).chunk(4, dim=1)
    p_i, p_f, p_o = w_unit.chunk(3)
    c_next = torch.sigmoid(f + p_f * c) * c + torch.sigmoid(i + p_i * c) * torch.tanh(g)
    return torch.sigmoid(o + p_o * c_next) * torch.tanh(c_next), c_next


def _indrnn(x, states, w_ih, u, b_ih, b_hh, *, activation) -> States:
    a = linear(x, w_ih, b_ih) + u * states[0]
    return (activation(a if b_hh is None else a + b_hh),)


def _layer_norm(v: Tensor, gain: Tensor) -> Tensor:
    mean = v.sum(1, keepdim=True) / v.shape[1]
    variance = ((v - mean) ** 2).sum(1, keepdim=True) / v.shape[1]
    return gain * (v - mean) / torch.sqrt(variance + 1e-5)


def _normed_gates(x, h, w_ih, w_hh, b_ih, b_hh, gains: Tensor, products: tuple) -> tuple[Tensor, Tensor]:
    """``products``: what is added to W_ih x and to W_hh h."""
    of_x, of_h = gains.chunk(2)
    by_x = _layer_norm(x @ w_ih.T + products[0], of_x) + (0.0 if b_ih is None else b_ih)
    return by_x, _layer_norm(h @ w_hh.T + products[1], of_h) + (0.0 if b_hh is None else b_hh)


def _layer_norm_lstm(x, states, w_ih, w_hh, b_ih, b_hh, w_unit, products=(0.0, 0.0)) -> States:
    h, c = states
    H = h.shape[1]
    by_x, by_h = _normed_gates(x, h, w_ih, w_hh, b_ih, b_hh, w_unit[: 8 * H], products)
    i, f, g, o = (by_x + by_h).chunk(4, dim=1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(_layer_norm(c, w_unit[8 * H : 9 * H]) + w_unit[9 * H :]), c


def _layer_norm_gru(x, states, w_ih, w_hh, b_ih, b_hh, w_unit, products=(0.0, 0.0)) -> States:
    (h,) = states
    by_x, by_h = _normed_gates(x, h, w_ih, w_hh, b_ih, b_hh, w_unit, products)
    (x_r, x_z, x_n), (h_r, h_z, h_n) = by_x.chunk(3, dim=1), by_h.chunk(3, dim=1)
    n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
    return ((h - n) * torch.sigmoid(x_z + h_z) + n,)


def _slstm(x, states, w_ih, w_hh, b_ih, b_hh) -> States:
    """Beck et al. 2024, equations 8 to 17 with those of A.2; at n = 0 what the authors' package does at the start."""
    h, c, n, m = states
    i, f, z, o = (linear(x, w_ih, b_ih) + linear(h, w_hh, b_hh)).chunk(4, dim=1)
    log_f = torch.minimum(f, torch.zeros_like(f)) - torch.log1p(torch.exp(-f.abs()))
    there = n > 0
    m_next = torch.where(there & (log_f + m > i), log_f + m, i)
    i_scaled = torch.exp(i - m_next)
    f_scaled = torch.where(there, torch.exp(torch.where(there, log_f + m - m_next, 0.0)), 0.0)
    c_next = f_scaled * c + i_scaled * torch.tanh(z)
    n_next = f_scaled * n + i_scaled
    return torch.sigmoid(o) * c_next / n_next, c_next, n_next, m_next


@dataclass(frozen=True)
class Twin:
    """What stands opposite a cell of the registry."""

    step: Callable[..., States]
    layer: Callable[..., nn.Module]
    cell: Callable[..., nn.Module] | None = None
    torch_layer: Callable[..., nn.Module] | None = None
    torch_cell: Callable[..., nn.Module] | None = None
    kink: bool = False  # whether its derivative jumps: there 16 bits may round to the other side, and differences fail
    rounding: float = 1.0  # margin in 16 bits: a norm of few c that differ little magnifies roundings


def _both(name: str, **options) -> dict[str, Callable[..., nn.Module]]:
    ours, theirs = partial(getattr(fusedrnn, name), **options), partial(getattr(nn, name), **options)
    our_cell, their_cell = getattr(fusedrnn, name + "Cell"), getattr(nn, name + "Cell")
    return {
        "layer": ours,
        "cell": partial(our_cell, **options),
        "torch_layer": theirs,
        "torch_cell": partial(their_cell, **options),
    }


TWINS: dict[str, Twin] = {
    "rnn_tanh": Twin(partial(_rnn, activation=torch.tanh), **_both("RNN", nonlinearity="tanh")),
    "rnn_relu": Twin(partial(_rnn, activation=torch.relu), kink=True, **_both("RNN", nonlinearity="relu")),
    "residual_rnn": Twin(_residual_rnn, fusedrnn.ResidualRNN),
    "lstm": Twin(_lstm, **_both("LSTM")),
    "gru": Twin(_gru, **_both("GRU")),
    "gru_reset_before": Twin(
        _gru_reset_before, partial(fusedrnn.GRU, reset_after=False), partial(fusedrnn.GRUCell, reset_after=False)
    ),
    "mgu": Twin(_mgu, fusedrnn.MGU, fusedrnn.MGUCell),
    "peephole_lstm": Twin(_peephole_lstm, fusedrnn.PeepholeLSTM, fusedrnn.PeepholeLSTMCell),
    "indrnn_tanh": Twin(
        partial(_indrnn, activation=torch.tanh),
        partial(fusedrnn.IndRNN, nonlinearity="tanh"),
        partial(fusedrnn.IndRNNCell, nonlinearity="tanh"),
    ),
    "indrnn_relu": Twin(
        partial(_indrnn, activation=torch.relu),
        partial(fusedrnn.IndRNN, nonlinearity="relu"),
        partial(fusedrnn.IndRNNCell, nonlinearity="relu"),
        kink=True,
    ),
    "layer_norm_lstm": Twin(_layer_norm_lstm, fusedrnn.LayerNormLSTM, fusedrnn.LayerNormLSTMCell, rounding=5.0),
    "layer_norm_gru": Twin(_layer_norm_gru, fusedrnn.LayerNormGRU, fusedrnn.LayerNormGRUCell),
    "slstm": Twin(_slstm, fusedrnn.SLSTM, fusedrnn.SLSTMCell, kink=True),
}


#: The names of initial states and of final ones, as far as a cell has them.
STATES, FINALS = ("h0", "c0", "n0", "m0"), ("h_n", "c_n", "n_n", "m_n")


def beside(cell: str) -> int:
    """The states besides h, which the ops take and give as one, side by side."""
    return len(fusedrnn.CELLS[cell].states) - 1


def several(cell: str) -> bool:
    """Whether hx is a tuple."""
    return beside(cell) > 0


def hx_of(tensors):
    """hx, of the initial states that are among these tensors by name."""
    states = tuple(tensors[name] for name in STATES if name in tensors)
    return None if not states else states if len(states) > 1 else states[0]


def with_noise(cell: str, options):
    """These options, zoneout as the cell takes it: with more than two states of h alone."""
    changes = beside(cell) > 1 and "zoneout" in options
    return {**options, "zoneout": (options["zoneout"], 0.0)} if changes else options


def of_op(tensors):
    """h0 and c0 as the ops take them, of the initial states that are among these tensors by name."""
    h, *others = [tensors[name] for name in STATES if name in tensors] or [None]
    return h, torch.cat(others, dim=-1) if others else None


def states_like(cell: str, state, *others):
    """hx, of this h and these further states, the last one as often as the cell has more of them."""
    return (
        (state, *others, *[others[-1] if others else state] * (beside(cell) - len(others))) if several(cell) else state
    )


def units_of(cell: str, w_hh: Tensor) -> int:
    """H."""
    info = fusedrnn.CELLS[cell]
    return len(w_hh) // len(info.gates if info.product else info.parameters)


def weight_shapes(cell: str, I: int, H: int, proj: int = 0, bias: bool = True) -> list[tuple[int, ...]]:
    """Of one direction, in the order of the ops."""
    info = fusedrnn.CELLS[cell]
    rows, units = len(info.gates) * H, (len(info.parameters) * H,)
    shapes = [(rows, I), (rows, proj or H) if info.product else units, *[(rows,)] * (2 * bias)]
    return shapes + [(proj, H)] * bool(proj) + [units] * (info.product and len(info.parameters) > 0)


def of_units(cell: str, module: nn.Module, suffix: str = "") -> list[Tensor]:
    """A step's last argument, of a cell that has parameters of its units besides w_hh."""
    info = fusedrnn.CELLS[cell]
    return [getattr(module, "weight_unit" + suffix)] if info.parameters and info.product else []


SINGLES = [name for name, twin in TWINS.items() if twin.cell]  # cells with a single-step module


def layer_loop(cell: str, module: nn.Module, input: Tensor | PackedSequence, hx=None, *, lengths=None, reset=None):
    """What ``module(input, hx, ...)`` has to return, for a batched tensor or a PackedSequence, without dropout."""
    if isinstance(input, PackedSequence):
        x, lengths = pad_packed_sequence(input)
    else:
        x = input.transpose(0, 1) if module.batch_first else input
        lengths = torch.full((x.shape[1],), x.shape[0]) if lengths is None else torch.as_tensor(lengths)
        reset = reset.T if reset is not None and module.batch_first else reset
    hx = _states(module, hx, x, cell)
    active = torch.arange(x.shape[0])[:, None, None] < lengths[:, None]
    finals = []
    for layer in range(module.num_layers):
        outputs = []
        for direction in range(2 if module.bidirectional else 1):
            suffix = f"_l{layer}" + ("_reverse" if direction else "")
            start = tuple(state[len(finals)] for state in hx)
            output, final = _run(cell, module, suffix, x, start, active, reset, reverse=bool(direction))
            outputs.append(output)
            finals.append(final)
        x = torch.cat(outputs, dim=2)
    last = tuple(torch.stack(states) for states in zip(*finals, strict=True))
    if isinstance(input, PackedSequence):
        output = pack_padded_sequence(x, lengths, enforce_sorted=input.sorted_indices is None)
    else:
        output = x.transpose(0, 1) if module.batch_first else x
    return output, last if several(cell) else last[0]


def cell_loop(cell: str, module: nn.Module, input: Tensor, hx=None):
    """What the cell module ``module(input, hx)`` has to return for a batched input."""
    zeros = input.new_zeros(input.shape[0], module.hidden_size)
    if hx is None:
        hx = states_like(cell, zeros)
    states = hx if several(cell) else (hx,)
    weights = [module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh, *of_units(cell, module)]
    new = TWINS[cell].step(input, states, *weights)
    return new if several(cell) else new[0]


def _states(module: nn.Module, hx, x: Tensor, cell: str) -> States:
    if hx is not None:
        return tuple(hx) if several(cell) else (hx,)
    rows = module.num_layers * (2 if module.bidirectional else 1)
    h0 = x.new_zeros(rows, x.shape[1], module.proj_size or module.hidden_size)
    return h0, *[x.new_zeros(rows, x.shape[1], module.hidden_size)] * beside(cell)


def _run(cell, module, suffix, x, states, active, reset, *, reverse):
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    weights = [*(getattr(module, name + suffix, None) for name in names), *of_units(cell, module, suffix)]
    projection = getattr(module, "weight_hr" + suffix, None)
    outputs = [None] * len(x)
    for t in reversed(range(len(x))) if reverse else range(len(x)):
        if reset is not None and t + reverse < len(x):
            cut = reset[t + reverse, :, None] & active[t + reverse]
            states = tuple(torch.where(cut, 0.0, state) for state in states)
        new = TWINS[cell].step(x[t], states, *weights)
        if projection is not None:
            new = (linear(new[0], projection), *new[1:])
        states = tuple(torch.where(active[t], after, before) for after, before in zip(new, states, strict=True))
        outputs[t] = torch.where(active[t], states[0], torch.zeros_like(states[0]))
    return torch.stack(outputs), states


@dataclass
class Steps:
    """What :func:`op_loop` gives: results, and of every row the tensors whose gradients are asked for."""

    y: Tensor
    h_n: Tensor
    c_n: Tensor | None
    c: Tensor | None  # c_t of every row; of more states besides h each direction's, side by side
    # h, c0, c1 ... and what goes on from them: sent_h, sent_c0 ...; cell_h; ih, hh, units; px, ph
    rows: dict[str, list[Tensor]]


class _Limited(torch.autograd.Function):
    """The identity, whose gradient is limited as what a step sends back is."""

    @staticmethod
    def forward(ctx, state: Tensor, clip: float, by_norm: bool) -> Tensor:
        ctx.clip, ctx.by_norm = clip, by_norm
        return state.view_as(state)

    @staticmethod
    def backward(ctx, d: Tensor):
        if not ctx.by_norm:
            return d.clamp(-ctx.clip, ctx.clip), None, None
        norm = d.norm()
        return d * ctx.clip / norm if norm > ctx.clip else d, None, None


def op_loop(
    cell: str, x: Tensor, batch_sizes: list[int] | None, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor],
    directions: int, noise: tuple[Tensor | None, ...] = (None,) * 3, bptt: int = 0, clip: float = 0.0,
    by_norm: bool = False,
) -> Steps:  # fmt: skip
    """A layer as the ops take it, one sample and one step at a time; each step has biases of its own, whose gradients
    are those of the gates, and parameters of its units; with norms also zeros that are added to its products.
    x (T, B, I) or (N, I), noise: mask_h, keep_h, keep_c."""
    sizes = [x.shape[1]] * x.shape[0] if batch_sizes is None else batch_sizes
    x, each, T, B = x.flatten(0, -2), len(weights) // directions, len(sizes), sizes[0]
    first = [sum(sizes[:t]) for t in range(T)]
    keeps = [None if k is None else k.flatten(0, -2) for k in noise[1:]]
    count = beside(cell)
    of_states = ("h", *(f"c{k}" for k in range(count)))
    kinds = (*of_states, *(f"sent_{name}" for name in of_states), "cell_h", "ih", "hh", "units", "px", "ph")
    rows: dict[str, list] = {name: [None] * (directions * len(x)) for name in kinds}
    finals: list[States] = []
    for d in range(directions):
        w_ih, w_hh, *others = weights[d * each : (d + 1) * each]
        b_ih, b_hh = others[:2] if len(others) > 1 else [w_ih[:, :0].sum(1)] * 2  # zeros
        projects = fusedrnn.CELLS[cell].projectable and len(others) % 2
        w_hr, parameters = (others[-1], []) if projects else (None, others[len(others) // 2 * 2 :])
        hidden = units_of(cell, w_hh)
        for b in range(B):
            starts = ((h0, hidden if w_hr is None else len(w_hr)), (c0, count * hidden))
            h, c = (x.new_zeros(1, n) if s is None else s[d, b, None] for s, n in starts)
            states = h, *(c.chunk(count, dim=1) if count else ())
            times = [t for t in range(T) if sizes[t] > b]
            for step, t in enumerate(reversed(times) if d else times):
                at = first[t] + b
                before = tuple(_Limited.apply(s, clip, by_norm) for s in states) if clip else states
                if bptt and step and (t + d) % bptt == 0:
                    before = tuple(s.detach() for s in before)
                own = b_ih.clone(), b_hh.clone()
                units = [p.clone() for p in parameters or [w_hh][w_hh.dim() - 1 :]]
                rows["units"][d * len(x) + at] = units[0] if units else None
                own_hh = w_hh if w_hh.dim() == 2 else units[0]
                masked = own_hh if noise[0] is None else own_hh * noise[0][d, b]
                more = {}
                if fusedrnn.CELLS[cell].norms:
                    more["products"] = tuple(w_ih[:, :0].sum(1) for _ in range(2))
                    rows["px"][d * len(x) + at], rows["ph"][d * len(x) + at] = more["products"]
                new = TWINS[cell].step(x[at, None], before, w_ih, masked, *own, *units[: len(parameters)], **more)
                if w_hr is not None:
                    new = (linear(new[0], w_hr), *new[1:])
                rows["cell_h"][d * len(x) + at] = new[0]
                parts = [None if k is None else k[at].chunk(directions)[d] for k in keeps]
                parts += [None] * (count - 1)
                states = tuple(s if k is None else k * a + (1 - k) * s for s, a, k in zip(new, before, parts))
                sent = tuple(s.clone() for s in states)  # to the next step, or the final states
                names = ("ih", "hh", *kinds[: 2 * len(states)])
                for name, value in zip(names, (*own, *states, *sent), strict=True):
                    rows[name][d * len(x) + at] = value
                states = sent
            finals.append((states[0], torch.cat(states[1:], dim=1)) if count else states)

    def joined(names: tuple[str, ...]) -> Tensor:
        parts = [rows[name][d * len(x) : (d + 1) * len(x)] for d in range(directions) for name in names]
        return torch.cat([torch.cat(part) for part in parts], dim=1)

    last = [torch.cat(s).unflatten(0, (directions, B)) for s in zip(*finals, strict=True)]
    c_n, c = (last[1], joined(of_states[1:])) if count else (None, None)
    return Steps(joined(of_states[:1]), last[0], c_n, c, rows)
