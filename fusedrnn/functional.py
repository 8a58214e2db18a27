"""Recurrent layers as functions, for people who hold their own weights.

:func:`lstm`, :func:`gru`, :func:`rnn` run stacked layers over sequences; :func:`recurrent` does so for any cell of
:data:`fusedrnn.cells.CELLS`; :func:`lstm_cell`, :func:`gru_cell`, :func:`rnn_cell` make one step. Equations and their
derivation: ``docs/derivations.md``. Below them :class:`fusedrnn.layer.autograd.RecurrentLayer` is one call of the fused
kernel, forward and backward.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout as _dropout
from torch.nn.utils.rnn import PackedSequence

from .cells import CELLS
from .inference.plain_call import plain_cell
from .layer.autograd import RecurrentLayer, in_place, recurrent_layer
from .layer.call import LayerCall, Owner, Weights, parted_rows
from .layer.dropout import Rates, draw, drop_input, drop_weights
from .layer.ops import KERNEL_DTYPES
from .layer.segments import Segments, cut
from .options import documentation, of_layer

__all__ = ["RecurrentLayer", "gru", "gru_cell", "lstm", "lstm_cell", "recurrent", "recurrent_cell", "rnn", "rnn_cell"]


def _check_devices(x: Tensor, *tensors: Tensor | None) -> None:
    """All on the one device of x, and on one that there are kernels for, and dense."""
    for tensor in (x, *tensors):
        if tensor is not None and (tensor.layout != torch.strided or tensor.is_nested):
            kind = "nested" if tensor.is_nested else tensor.layout
            raise NotImplementedError(f"input, hidden state and weights must be dense tensors, got a {kind} one")
    devices = {x.device, *(tensor.device for tensor in tensors if tensor is not None)}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise RuntimeError(f"input, hidden state and weights must be on one device, got {names}")
    if x.device.type not in ("meta", *KERNEL_DTYPES):
        devices = ", ".join(KERNEL_DTYPES)
        raise NotImplementedError(f"this build of fusedrnn runs on {devices}, got tensors on {x.device}")


def _stack(
    stack: LayerCall,
    num_layers: int,
    dropout: float,
    drop: Rates,
    training: bool,
    owner: torch.nn.Module | None,
    layout: Segments | Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, tuple[Tensor, ...], list[tuple[Tensor, ...]]]:
    """Stacked layers, as a call with the states and weights of all, on time-major or packed rows: the output, the final
    states, (L*D, B, *) each, and each layer's states at every step, if the options ask for them.
    """
    _check_devices(stack.x, *stack.states, *stack.weights, *(stack.scales or ()))
    directions, each = stack.directions, len(stack.weights) // num_layers
    each_scales = len(stack.scales or ()) // num_layers
    x, options = stack.x, stack.options
    finals: list[tuple[Tensor, ...]] = []
    steps: list[tuple[Tensor, ...]] = []
    for layer in range(num_layers):
        last, own = layer + 1 == num_layers, slice(layer * directions, (layer + 1) * directions)
        call = stack._replace(
            x=drop_input(x, drop.input, stack.batch_sizes, layout),
            states=[None if s is None else s if num_layers == 1 else s[own] for s in stack.states],
            weights=drop_weights(stack.info, stack.weights[layer * each : (layer + 1) * each], drop.weight, directions),
            scales=None if stack.scales is None else stack.scales[layer * each_scales : (layer + 1) * each_scales],
            options=options if last else options._replace(batch_first=False),
            owner=None if owner is None or torch.compiler.is_compiling() else Owner(weakref.ref(owner), layer, layout),
        )
        x, final, c = recurrent_layer(call._replace(noise=draw(drop, training, call, layout)))
        finals.append(tuple(final))
        steps.append((x, *parted_rows(call.info, c, directions)))
        if dropout and training and not last:
            x = _dropout(x, dropout, training=True)
    return x, finals[0] if num_layers == 1 else tuple(map(torch.cat, zip(*finals, strict=True))), steps


def _autocast(x: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Everything in autocast's dtype where autocast is on for the device of x."""
    kind = x.device.type
    if kind in KERNEL_DTYPES and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return tuple(t.to(dtype) if t is not None and t.dtype != torch.float64 else t for t in (x, *tensors))
    return (x, *tensors)


def _check_cell_and_weights(cell: str, weights: Sequence[Tensor]) -> None:
    """What everything after relies on."""
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}")
    for index, weight in enumerate(weights):
        if not isinstance(weight, Tensor):
            raise TypeError(f"weights[{index}] must be a tensor, got {type(weight).__name__}")
    for name, weight, dims in zip(("w_ih", "w_hh"), weights, (2, 1 + CELLS[cell].product)):
        if weight.dim() != dims:
            raise RuntimeError(f"{name} must have {dims} dimension{'s' * (dims > 1)}, got {weight.dim()}")


def _check_hidden_sizes(cell: str, weights: Sequence[Tensor], parts: int) -> None:
    """One H and R for all layers and directions, ``parts`` of them, whose states lie in one tensor."""
    first = weights[1].shape
    for layer, (_, w_hh, *_) in enumerate(Weights.split(CELLS[cell], weights, parts)):
        if w_hh.shape != first:
            raise RuntimeError(
                f"w_hh must have one shape in all layers and directions, {list(first)}, got {list(w_hh.shape)} in the"
                f" weights of number {layer}"
            )


def _check_states(
    cell: str, states: Sequence[Tensor | None], rows: int, batch: tuple[int, ...], weights: Sequence[Tensor]
) -> None:
    """The initial states' shapes, before anything is cut out of them."""
    hidden = weights[1].size(0) // CELLS[cell].blocks
    out = weights[1].size(1) if CELLS[cell].product else hidden  # R: H or P
    for name, state in zip(CELLS[cell].states, states, strict=True):
        expected = (rows, *batch, out if name == "h" else hidden)
        if state is not None and state.shape != expected:
            raise RuntimeError(f"{name}0 must have shape {list(expected)}, got {list(state.shape)}")


def recurrent(
    cell: str,
    input: Tensor | PackedSequence,
    hx: Tensor | Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_first: bool = False,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    return_states: bool = False,
    owner: torch.nn.Module | None = None,
    scales: Sequence[Tensor] | None = None,
    **options: Any,
) -> tuple[Any, ...]:
    """Stacked recurrent layers of any registered cell.

    Args:
        cell: a name of :data:`fusedrnn.cells.CELLS`.
        input: (T, B, I), or (B, T, I) if ``batch_first``, or (T, I) unbatched, or a PackedSequence.
        hx: the initial states, one tensor for each state of the cell: h_0 (L*D, B, R) and, for the LSTM, c_0
            (L*D, B, H); without the B dimension for unbatched input; None for zeros. R is H, or P with a projection.
        weights: for each layer and direction w_ih (G*H, I or D*R), w_hh (G*H, R)[, b_ih (G*H), b_hh (G*H)]
            [, w_hr (P, H)], in the order of ``torch.nn.LSTM._flat_weights``; gates in torch.nn's order. Of a cell with
            parameters of its units (:class:`CellInfo`), vectors of H, the last is w_unit (U*H); where gates multiply
            no h, they are w_hh (U*H).
        dropout: probability, on the output of every layer but the last, if ``training``.
        lengths: the steps of each sample, (B,) integers from 0 to T in any order, on any device. The output is zero
            beyond a sample's end, the final states are those of its own last step (without a step, the initial ones),
            and a reverse direction starts there. The numbers are those of a PackedSequence; steps beyond the end are
            neither computed nor read.
        reset: (T, B) boolean, (B, T) if ``batch_first``: where a sample begins anew. Before a marked step the state of
            every layer is zero, s_{t-1} := 0, and no gradient passes: what was one sequence is several, laid end to
            end. Of these the first starts with the initial state and the last gives the final one; in a reverse
            direction, which starts each at its own end, the last and the first.
            Both are cuts, known to the processor before it computes: tensors on a GPU are copied to the host.
        return_states: whether to give the states of every layer at every step, too. They are differentiable.
        owner: the module by which :class:`fusedrnn.record_gradients` knows the call.
        scales: for each layer and direction s_ih (G*H), s_hh (G*H)[, s_hr (P)], if the matrices are int8: row r of one
            is ``scale[r] * w[r]``. An empty list, if they are bfloat16. Both for inference, everything else in float32:
            :func:`fusedrnn.quantize`.
        options: by name, those of :class:`fusedrnn.FusedOptions` but ``reset_after``, which the name of the cell says.

    Returns:
        The output, (T, B, D*R) laid out as the input, and the final states, shaped as the initial ones. With
        ``return_states``, third, for each layer a tuple of its states at every step, h_t (before dropout) and, for the
        LSTM, c_t, laid out as the output.

        ``grad_clip`` and ``bptt_steps`` make the backward pass give something else than the gradient. To bound the
        gradient of all parameters instead, which keeps its direction: ``torch.nn.utils.clip_grad_norm_``.

    Raises:
        RuntimeError: a second derivative, or one in forward mode, with ``grad_clip`` or ``bptt_steps``.
        RuntimeError, ValueError, TypeError: a shape, device or dtype that does not fit; the message names the argument.
    """
    _check_cell_and_weights(cell, weights)
    names = CELLS[cell].states
    states: Sequence[Tensor | None] = (hx,) if isinstance(hx, Tensor) else (None,) * len(names) if hx is None else hx
    if len(states) != len(names):
        raise RuntimeError(f"{cell} expects {len(names)} hidden state(s) ({', '.join(names)}), got {len(states)}")
    policy, drop = of_layer(options, len(names))
    policy = policy._replace(states=return_states)
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be a probability, from 0 to 1, got {dropout}")
    directions = 2 if bidirectional else 1
    parts = num_layers * directions
    each, rest = divmod(len(weights), parts) if parts > 0 else (0, 0)
    if rest or each not in Weights.counts(CELLS[cell]):
        raise ValueError(
            f"weights must hold {Weights.named(CELLS[cell])} for each of {num_layers} layer(s) x {directions} "
            f"direction(s), got {len(weights)} tensors"
        )
    each_scales = 3 if CELLS[cell].projectable and each % 2 else 2
    if scales and len(scales) != parts * each_scales:
        raise ValueError(
            f"scales must hold {'s_ih, s_hh, s_hr'[: 6 * each_scales - 2]} for each of {num_layers} layer(s) x "
            f"{directions} direction(s), got {len(scales)} tensors"
        )
    _check_hidden_sizes(cell, weights, parts)
    packed = input if isinstance(input, PackedSequence) else None
    x = input.data if packed is not None else input
    unbatched = packed is None and x.dim() == 2
    if (lengths is not None or reset is not None) and (unbatched or packed is not None):
        kind = "unbatched input" if unbatched else "a PackedSequence"
        raise ValueError(f"lengths and reset are for a padded batch of three dimensions, got {kind}")
    if packed is None:
        if x.dim() not in (2, 3):
            raise ValueError(f"input must have 2 (unbatched) or 3 dimensions, got {x.dim()}")
        x = x.unsqueeze(1) if unbatched else x.transpose(0, 1) if batch_first else x
    if any(s is not None for s in states) and not (packed is not None and torch.compiler.is_compiling()):
        batch = () if unbatched else (int(packed.batch_sizes[0]) if packed is not None else x.size(1),)
        _check_states(cell, states, parts, batch, weights)
    if unbatched:
        states = [None if s is None else s.unsqueeze(1) for s in states]
    elif packed is not None and packed.sorted_indices is not None:
        states = [None if s is None else s.index_select(1, packed.sorted_indices) for s in states]

    if scales is None:
        x, *rest = _autocast(x, *states, *weights)
        states, weights = rest[: len(names)], rest[len(names) :]
    stack = LayerCall(cell, x, states, weights, bidirectional, options=policy, scales=scales)
    how = num_layers, dropout, drop.at(training), training

    def results(y: Tensor, finals: tuple[Tensor, ...], steps: list[tuple[Tensor, ...]], laid_out: Callable) -> tuple:
        given = laid_out(y), finals
        return (*given, [tuple(map(laid_out, own)) for own in steps]) if return_states else given

    if lengths is not None or reset is not None:
        marks = reset.t() if batch_first and isinstance(reset, Tensor) and reset.dim() == 2 else reset
        segments = cut(lengths, marks, x.size(0), x.size(1), x.device)
        if not segments.whole:
            sizes = segments.batch_sizes if torch.compiler.is_compiling() or len(segments.batch_sizes) else None
            own = [segments.initial(s, directions) for s in states]
            stack = stack._replace(x=segments.gather(x), states=own, batch_sizes=sizes)
            y, finals, steps = _stack(stack, *how, owner, segments)
            finals = tuple(segments.final(s, before, directions) for s, before in zip(finals, states, strict=True))
            turn = partial(torch.transpose, dim0=0, dim1=1) if batch_first else lambda t: t
            return results(y, finals, steps, lambda t: turn(segments.scatter(t)))
    sizes, layout = (None, None) if packed is None else (packed.batch_sizes, packed[2:])
    turned = batch_first and packed is None and not (unbatched or return_states)
    stack = stack._replace(batch_sizes=sizes, options=policy._replace(batch_first=turned))
    y, finals, steps = _stack(stack, *how, owner, layout)
    if packed is not None:
        if packed.unsorted_indices is not None:
            finals = tuple(s.index_select(1, packed.unsorted_indices) for s in finals)
        return results(y, finals, steps, lambda t: PackedSequence(t, *packed[1:]))
    if unbatched:
        return results(y, tuple(s.squeeze(1) for s in finals), steps, lambda t: t.squeeze(1))
    return results(y, finals, steps, lambda t: t.transpose(0, 1) if batch_first and not turned else t)


recurrent.__doc__ = recurrent.__doc__ and inspect.cleandoc(recurrent.__doc__) + documentation("reset_after")


def lstm(
    input: Tensor | PackedSequence, hx: Sequence[Tensor] | None, weights: Sequence[Tensor], **options: Any
) -> tuple[Any, ...]:
    """Long short-term memory, with projection where ``w_hr`` is given. Gates i, f, g, o.

    c_t = f * c_{t-1} + i * g,  h_t = o * tanh(c_t)  [then h_t = W_hr h_t]

    ``hx`` is (h_0, c_0) or None; returns ``output, (h_n, c_n)``. The options and the rest as in :func:`recurrent`.
    """
    return recurrent("lstm", input, hx, weights, **options)


def gru(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    reset_after: bool = True,
    **options: Any,
) -> tuple[Any, ...]:
    """Gated recurrent unit. Gates r, z, n; h_t = (1 - z) * n + z * h_{t-1}.

    ``reset_after=True`` (torch.nn): n = tanh(x_n + r * (W_hn h_{t-1} + b_hn)).
    ``reset_after=False`` (the original paper): n = tanh(x_n + W_hn (r * h_{t-1}) + b_hn).

    ``hx`` is h_0 or None; returns ``output, h_n``. The options and the rest as in :func:`recurrent`.
    """
    cell = "gru" if reset_after else "gru_reset_before"
    y, (h_n,), *states = recurrent(cell, input, hx, weights, **options)
    return y, h_n, *states


def rnn(
    input: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    **options: Any,
) -> tuple[Any, ...]:
    """Simple recurrent network, h_t = g(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh), g = tanh or relu.

    ``hx`` is h_0 or None; returns ``output, h_n``. The options and the rest as in :func:`recurrent`.
    """
    y, (h_n,), *states = recurrent(_rnn_cell_name(nonlinearity), input, hx, weights, **options)
    return y, h_n, *states


def _rnn_cell_name(nonlinearity: str) -> str:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    return f"rnn_{nonlinearity}"


def check_states_of_step(hx: Sequence[Tensor | None], batch: int, hidden_size: int) -> None:
    """States of a single step are (B, H), or None. Raises RuntimeError, with the messages of torch.nn's cells."""
    for index, state in enumerate(hx):
        if state is None:
            continue
        if state.dim() != 2:
            raise RuntimeError(f"Expected 2D hidden{index} (batch x hidden_size), but got {state.dim()}D tensor")
        if state.size(0) != batch:
            raise RuntimeError(f"Input batch size {batch} doesn't match hidden{index} batch size {state.size(0)}")
        if state.size(1) != hidden_size:
            raise RuntimeError(
                f"hidden{index} has inconsistent hidden_size: got {state.size(1)}, expected {hidden_size}"
            )


def recurrent_cell(
    cell: str,
    input: Tensor,
    hx: Sequence[Tensor | None],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    w_unit: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """One step of any registered cell: input (B, I), each state (B, H) or None for zeros -> the next states (B, H).

    Of two biases one may be None, for zeros; both: the cell has none. ``w_unit`` (U*H): the parameters of the units, of
    a cell that has them besides ``w_hh``.

    Raises:
        RuntimeError, TypeError: sizes or dtypes that do not fit, with the messages of torch.nn's cells; a weight that
            is no tensor.
    """
    for name, weight in (("w_ih", w_ih), ("w_hh", w_hh)):
        if not isinstance(weight, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(weight).__name__}")
    if (b_ih is None) != (b_hh is None):
        b_ih = torch.zeros_like(b_hh) if b_ih is None else b_ih
        b_hh = torch.zeros_like(b_ih) if b_hh is None else b_hh
    weights = [w for w in (w_ih, w_hh, b_ih, b_hh, w_unit) if w is not None]
    found = plain_cell(cell, input, hx, weights)
    if found is not None:
        return found
    _check_cell_and_weights(cell, weights)
    if len(hx) != len(CELLS[cell].states):
        raise RuntimeError(f"{cell} expects {len(CELLS[cell].states)} hidden state(s), got {len(hx)}")
    if input.dim() != 2:
        raise RuntimeError(f"Expected 2D input (batch x feature), but got {input.dim()}D input")
    x, *rest = _autocast(input, *hx, *weights)
    hx, weights = rest[: len(hx)], rest[len(hx) :]
    if x.size(1) != w_ih.size(1):
        raise RuntimeError(f"input has inconsistent input_size: got {x.size(1)} expected {w_ih.size(1)}")
    check_states_of_step(hx, x.size(0), w_hh.size(0) // CELLS[cell].blocks)
    for tensor in (*hx, *weights):
        if tensor is not None and tensor.dtype != x.dtype:
            raise RuntimeError(f"input, hidden state and weights must have one dtype, got {x.dtype} and {tensor.dtype}")
    _check_devices(x, *hx, *weights)
    states = [None if s is None else s.unsqueeze(0) for s in hx]
    found = recurrent_layer(LayerCall(cell, x.unsqueeze(0), states, weights))
    return tuple(in_place(Tensor.squeeze_, Tensor.squeeze, s, 0) for s in found.finals)


def lstm_cell(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One LSTM step: input (B, I), hx = (h, c) of (B, H) each -> (h, c). Equations: :func:`lstm`."""
    return recurrent_cell("lstm", input, (None, None) if hx is None else hx, w_ih, w_hh, b_ih, b_hh)


def gru_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    reset_after: bool = True,
) -> Tensor:
    """One GRU step: input (B, I), hx (B, H) -> h (B, H). Equations: :func:`gru`."""
    return recurrent_cell("gru" if reset_after else "gru_reset_before", input, (hx,), w_ih, w_hh, b_ih, b_hh)[0]


def rnn_cell(
    input: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
) -> Tensor:
    """One RNN step: input (B, I), hx (B, H) -> h (B, H). Equation: :func:`rnn`."""
    return recurrent_cell(_rnn_cell_name(nonlinearity), input, (hx,), w_ih, w_hh, b_ih, b_hh)[0]
