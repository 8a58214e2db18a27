"""Modules in the place of torch.nn's: same constructors, parameters, state_dict and errors, fused kernels inside.

``RNN``, ``LSTM``, ``GRU`` and the cells are subclasses of torch.nn's classes, so that code which asks
``isinstance(m, torch.nn.LSTM)`` goes on working. ``ResidualRNN`` and ``GRU(reset_after=False)`` have no counterpart
there. Nothing here computes: the modules check as torch.nn does and call :mod:`fusedrnn.functional`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.fx import Proxy, _symbolic_trace
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import has_torch_function

from ._C import PackedWeights, infer
from .autograd import PLAIN, recurrent_layer
from .cells import CELLS
from .functional import check_policy, recurrent, recurrent_cell
from .streaming import cell_of, step, steppers

__all__ = ["GRU", "GRUCell", "LSTM", "LSTMCell", "RNN", "RNNCell", "ResidualRNN"]

Lengths = Tensor | Sequence[int] | None


def _forward(
    module: torch.nn.RNNBase,
    cell: str,
    name: str,
    input: Tensor | PackedSequence,
    states: Sequence[Tensor] | None,
    lengths: Lengths = None,
    reset: Tensor | None = None,
    return_states: bool = False,
) -> tuple[Any, ...]:
    """What the sequence modules share: torch.nn's checks, in its order and words, then the layers."""
    ours = isinstance(module, _SequenceModule)
    policy = _policy(module) if ours else {}
    if lengths is None and reset is None and not return_states and not policy:
        short = _short_road(module, cell, input, states)
        if short is not None:
            return short
    module._update_flat_weights()
    two_states = len(CELLS[cell].states) == 2
    states = _as_states(states, cell)
    if isinstance(input, PackedSequence):
        # The caller's hx is checked before it is permuted: a larger batch would be cut down silently. While Dynamo or
        # an exporter traces, the number of samples is not known; the op checks it.
        checked = None if torch.compiler.is_compiling() else states
        _check_args(module, input.data, input.batch_sizes, checked, two_states)
    else:
        if input.dim() not in (2, 3):
            noun = "D tensor instead" if name == "RNN" else "D instead"
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {input.dim()}{noun}")
        dim, kind = input.dim(), "batched 3-D" if input.dim() == 3 else "unbatched 2-D"
        if states is not None and any(state.dim() != dim for state in states):
            ranks = ", ".join(f"{state.dim()}-D" for state in states)
            what, got = ("hx and cx", f"({ranks}) tensors") if two_states else ("hx", f"{ranks} tensor")
            raise RuntimeError(f"For {kind} input, {what} should also be {dim}-D but got {got}")
        batched = input if dim == 3 else input.unsqueeze(0 if module.batch_first else 1)
        _check_args(module, batched, None, states and [s if dim == 3 else s.unsqueeze(1) for s in states], two_states)
    return recurrent(
        cell,
        input,
        states,
        module._flat_weights,  # as torch.nn does: each look-up of a parametrized weight computes it anew
        num_layers=module.num_layers,
        bidirectional=module.bidirectional,
        dropout=module.dropout,
        training=module.training,
        batch_first=module.batch_first,
        lengths=lengths,
        reset=reset,
        return_states=return_states,
        owner=module if ours else None,
        **policy,
    )


#: Where Dynamo compiles the caller and has refused the module itself (torch._dynamo.config.allow_rnn): it would begin
#: anew at each function inside, without the gradients of a gradient. (To be asked in ``forward``, the refused frame.)
_untraced = torch.compiler.disable(_forward)


def _of_one_state(
    module: torch.nn.RNNBase, name: str, input: Tensor | PackedSequence, hx: Tensor | None, *options: Any
) -> tuple[Any, ...]:
    """:func:`_forward` for cells whose only state is h, which is no tuple then."""
    output, (h_n,), *states = _forward(module, cell_of(module), name, input, None if hx is None else (hx,), *options)
    return output, h_n, *states


_of_one_state_untraced = torch.compiler.disable(_of_one_state)


def _short_road(
    module: torch.nn.RNNBase, cell: str, input: Tensor | PackedSequence, states: Sequence[Tensor] | None
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """A dense batch through one layer, or in inference through several, checked by the kernel alone: a step is often
    all there is to do, and torch.nn's checks would take several times as long. None where anything is different: the
    long road knows, and words errors.
    """
    weights, parameters = module._flat_weights, module._parameters
    if not _is_plain(input, 3, states, weights, cell):
        return None
    if module.num_layers > 1 and (not _infers() or (module.dropout and module.training)):
        return None
    for name, weight in zip(module._flat_weights_names, weights):
        if parameters.get(name) is not weight:
            return None  # parametrized or replaced
    x = input.transpose(0, 1) if module.batch_first else input
    h0, c0 = (*(states or ()), None, None)[:2]
    try:
        result = _dense(module, cell, module.bidirectional, module.num_layers, x, h0, c0, weights)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError):
        return None
    if result is None:
        return None
    y, *finals = result
    return y.transpose(0, 1) if module.batch_first else y, tuple(finals[: len(CELLS[cell].states)])


def _infers() -> bool:
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def _dense(
    module: torch.nn.Module,
    cell: str,
    bidirectional: bool,
    num_layers: int,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor] | None:
    """A dense batch through one layer or, in inference, through several: y, h_n, c_n. None: by the long road.

    Of a cell, x is (B, I), without the time, and so are the states and results.
    """
    if _infers():
        result = infer(x, h0, c0, weights, cell, bidirectional, num_layers, _kept(module))
        if result is not None:
            return result
    elif not torch.compiler.is_compiling() and kept_aside:
        kept_aside.pop(module, None)
    if num_layers > 1:
        return None
    if x.dim() == 3:
        return recurrent_layer(cell, bidirectional, x, None, h0, c0, weights, PLAIN, module)[:3]
    x, h0, c0 = (None if t is None else t.unsqueeze(0) for t in (x, h0, c0))
    y, h_n, c_n, _ = recurrent_layer(cell, bidirectional, x, None, h0, c0, weights)
    return y[0], h_n[0], c_n[0] if c_n.size(0) else c_n


def _is_plain(
    input: Tensor | PackedSequence, dim: int, states: Sequence[Tensor] | None, weights: Sequence[Tensor], cell: str
) -> bool:
    """Whether input is a tensor of this rank, and hx, if given, a tuple of as many tensors as the cell has states;
    whether no cast and no forward-mode derivative is wanted, and no one overrides what torch's functions do.
    """
    return (
        type(input) is Tensor
        and input.dim() == dim
        and not torch.is_autocast_enabled("cuda" if input.is_cuda else "cpu")
        and (
            states is None
            or (type(states) is tuple and [type(state) for state in states] == [Tensor] * len(CELLS[cell].states))
        )
        and forward_ad._current_level < 0
        and not has_torch_function(weights)
    )


def _node(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Proxy | None:
    """The call as one node of a torch.fx graph, if it is traced: tracers know torch.nn's modules alone as leaves."""
    given = [*args, *kwargs.values()]
    for value in [*given, *(item for value in given if isinstance(value, (tuple, list)) for item in value)]:
        if isinstance(value, Proxy):
            return value.tracer.create_proxy("call_module", value.tracer.path_of_module(module), args, kwargs)
    return None


def _as_states(states: Sequence[Tensor] | None, cell: str) -> Sequence[Tensor] | None:
    """The caller's hx, the right number of tensors."""
    count = len(CELLS[cell].states)
    if states is None:
        return None
    if isinstance(states, Tensor):
        raise TypeError(f"hx of {cell} must be a tuple of {count} tensors, got a tensor")
    if len(states) != count:
        raise RuntimeError(f"{cell} expects {'two hidden states' if count == 2 else 'one hidden state'}")
    return states


def _check_args(
    module: torch.nn.RNNBase,
    input: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor] | None,
    two_states: bool,
) -> None:
    module.check_input(input, batch_sizes)
    if states is None:
        return
    if two_states:
        h_size = module.get_expected_hidden_size(input, batch_sizes)
        module.check_hidden_size(states[0], h_size, "Expected hidden[0] size {}, got {}")
        c_size = module.get_expected_cell_size(input, batch_sizes)
        module.check_hidden_size(states[1], c_size, "Expected hidden[1] size {}, got {}")
    else:
        module.check_hidden_size(states[0], module.get_expected_hidden_size(input, batch_sizes))


_KEPT = "_packed_weights"  # attribute of a module that has been used for inference

#: What is kept of other people's modules (:mod:`fusedrnn.patch`), until they train: their pickles hold nothing of ours.
kept_aside: weakref.WeakKeyDictionary[torch.nn.Module, PackedWeights] = weakref.WeakKeyDictionary()


def _kept(module: torch.nn.Module) -> PackedWeights:
    """The packed weights of a module, from call to call."""
    if isinstance(module, _FusedModule):
        return vars(module).get(_KEPT) or vars(module).setdefault(_KEPT, PackedWeights())
    return kept_aside.get(module) or kept_aside.setdefault(module, PackedWeights())


_POLICY = ("grad_clip", "grad_clip_mode", "bptt_steps", "recompute")


def _policy(module: torch.nn.RNNBase) -> dict[str, Any]:
    """What of it differs from the defaults."""
    if module.grad_clip is None and module.bptt_steps is None and module.recompute == "none":
        return {}
    own = {name: getattr(module, name) for name in _POLICY}
    return {name: value for name, value in own.items() if value != getattr(_SequenceModule, name)}


def _policy_text(module: torch.nn.RNNBase) -> str:
    values = _policy(module) if isinstance(module, _SequenceModule) else {}
    return "".join(f", {name}={value!r}" for name, value in values.items())


class _FusedModule:
    """What our modules do not share with torch.nn's: packed weights for inference, of which copies and pickles of a
    module hold none, and an answer to TorchScript.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _symbolic_trace._is_fx_tracing_flag and (node := _node(self, args, kwargs)) is not None:
            return node  # with the hooks
        return torch.nn.Module.__call__(self, *args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> torch.nn.Module:  # by .to(), .double(), .share_memory() ...
        vars(self).pop(_KEPT, None)
        steppers.pop(self, None)
        return super()._apply(*args, **kwargs)

    def train(self, mode: bool = True) -> torch.nn.Module:
        """As in torch.nn. Training frees what inference has kept."""
        if mode:
            vars(self).pop(_KEPT, None)
        return super().train(mode)

    def __prepare_scriptable__(self) -> torch.nn.Module:  # by torch.jit.script
        raise NotImplementedError(
            f"fusedrnn.{type(self).__name__} cannot be compiled by TorchScript: use torch.export.export, or"
            " fusedrnn.revert(model), which makes torch.nn modules of fusedrnn's, before torch.jit.script"
        )


class _SequenceModule(_FusedModule):
    """What our sequence modules do not share with torch.nn's.

    Their forward has further arguments, by name: ``lengths``, ``reset`` and ``return_states``. How the backward pass is
    done is told to the constructor, by name, or by attributes of these names: ``grad_clip``, ``grad_clip_mode``,
    ``bptt_steps``, ``recompute``. All as in :func:`fusedrnn.functional.recurrent`.
    """

    grad_clip: float | None = None
    grad_clip_mode: str = "value"
    bptt_steps: int | None = None
    recompute: str = "none"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        policy = {name: kwargs.pop(name) for name in _POLICY if name in kwargs}
        super().__init__(*args, **kwargs)
        for name, value in policy.items():
            setattr(self, name, value)
        check_policy(*(getattr(self, name) for name in _POLICY))

    def step(
        self, input: Tensor, hx: Tensor | tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
        """One step of a stream, for inference: input (B, I), states as forward's -> output (B, R), states.

        The same numbers as ``forward`` of one step, without gradients, and sooner: what does not change from step to
        step is prepared at the first one, for its batch size. Weights are read where they lie, so that changes of their
        values are seen. Where nothing can be prepared (a GPU, float16, autocast, parametrized weights, dropout in
        training) it is a call of ``forward``.

        >>> state = None
        >>> for x_t in stream:
        ...     y_t, state = lstm.step(x_t, state)

        Raises:
            ValueError: the module is bidirectional, or input has no two dimensions.
        """
        return step(self, input, hx)

    def extra_repr(self) -> str:
        """As in torch.nn, and what differs from the defaults."""
        return super().extra_repr() + _policy_text(self)

    def _init_flat_weights(self) -> None:
        super()._init_flat_weights()
        self._drop_weak_references()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._drop_weak_references()

    def _drop_weak_references(self) -> None:
        """torch.nn asks a weak reference to each weight whether it changed, and torch.utils.swap_tensors refuses a
        tensor that has one. Look-ups in the list of weights, which the module holds anyway, answer as well.
        """
        self._flat_weight_refs = [partial(getitem, self._flat_weights, i) for i in range(len(self._flat_weights))]

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels read the parameters where they are. Kept because callers use it."""


class RNN(_SequenceModule, torch.nn.RNN):
    """Simple recurrent network in the place of :class:`torch.nn.RNN`, nonlinearity 'tanh' or 'relu'.

    h_t = g(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)

    Arguments, parameters, shapes and errors are torch.nn.RNN's: input (T, B, I) or PackedSequence, h_0 (L*D, B, H)
    -> output (T, B, D*H), h_n (L*D, B, H). Derivation: docs/derivations.md, section R.
    """

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None, *,
        lengths: Lengths = None, reset: Tensor | None = None, return_states: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        call = _of_one_state if is_compiling() or not get_eval_frame_callback() else _of_one_state_untraced
        return call(self, "RNN", input, hx, lengths, reset, return_states)


class LSTM(_SequenceModule, torch.nn.LSTM):
    """Long short-term memory in the place of :class:`torch.nn.LSTM`, with ``proj_size``.

    i, f, o = sigmoid(...), g = tanh(...) of W_ih x_t + b_ih + W_hh h_{t-1} + b_hh;
    c_t = f * c_{t-1} + i * g,  h_t = o * tanh(c_t), projected: h_t = W_hr (o * tanh(c_t))

    Arguments, parameters, shapes and errors are torch.nn.LSTM's: input (T, B, I) or PackedSequence, (h_0, c_0) of
    (L*D, B, R), (L*D, B, H) -> output (T, B, D*R), (h_n, c_n); R is proj_size, or H without.
    Derivation: docs/derivations.md, section L.
    """

    def forward(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None, *,
        lengths: Lengths = None, reset: Tensor | None = None, return_states: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        call = _forward if is_compiling() or not get_eval_frame_callback() else _untraced
        return call(self, "lstm", "LSTM", input, hx, lengths, reset, return_states)


_TorchGRU, _TorchGRUCell = torch.nn.GRU, torch.nn.GRUCell  # people give these names of torch.nn to our classes


class GRU(_SequenceModule, _TorchGRU):
    """Gated recurrent unit in the place of :class:`torch.nn.GRU`, and with ``reset_after=False`` as first published.

    r, z = sigmoid(...), h_t = (1 - z) * n + z * h_{t-1} with
    n = tanh(W_in x_t + b_in + r * (W_hn h_{t-1} + b_hn))      (reset_after=True, torch.nn)
    n = tanh(W_in x_t + b_in + W_hn (r * h_{t-1}) + b_hn)      (reset_after=False, Cho et al. 2014)

    The other arguments, parameters, shapes and errors are torch.nn.GRU's: input (T, B, I) or PackedSequence,
    h_0 (L*D, B, H) -> output (T, B, D*H), h_n (L*D, B, H). Derivation: docs/derivations.md, sections G and H.
    """

    reset_after: bool = True  # also for instances made by torch.nn.GRU's constructor or an old pickle

    def __init__(self, *args: Any, reset_after: bool = True, **kwargs: Any) -> None:
        _SequenceModule.__init__(self, *args, **kwargs)
        self.reset_after = reset_after

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None, *,
        lengths: Lengths = None, reset: Tensor | None = None, return_states: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        call = _of_one_state if is_compiling() or not get_eval_frame_callback() else _of_one_state_untraced
        return call(self, "GRU", input, hx, lengths, reset, return_states)

    def extra_repr(self) -> str:
        return _TorchGRU.extra_repr(self) + _policy_text(self) + ("" if self.reset_after else ", reset_after=False")


class ResidualRNN(_SequenceModule, torch.nn.RNNBase):
    """Residual recurrent network: h_t = h_{t-1} + tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh).

    Arguments, parameters and shapes as :class:`torch.nn.GRU`'s, with one gate: W_ih (H, I), W_hh (H, H).
    Derivation, and why it can explode: docs/derivations.md, section S.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("proj_size argument is only supported for LSTM, not ResidualRNN")
        _SequenceModule.__init__(self, "RNN_TANH", *args, **kwargs)  # the parameters of one gate
        if self.proj_size:
            raise ValueError(f"ResidualRNN cannot be projected, got proj_size {self.proj_size}")
        self.mode = "RESIDUAL_RNN"

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None, *,
        lengths: Lengths = None, reset: Tensor | None = None, return_states: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        call = _of_one_state if is_compiling() or not get_eval_frame_callback() else _of_one_state_untraced
        return call(self, "ResidualRNN", input, hx, lengths, reset, return_states)


def _forward_cell(
    module: torch.nn.RNNCellBase, cell: str, name: str, input: Tensor, states: Sequence[Tensor] | None
) -> tuple[Tensor, ...]:
    """What the single-step modules share."""
    short = _short_road_of_cell(module, cell, input, states)
    if short is not None:
        return short
    if input.dim() not in (1, 2):
        raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    count, states = len(CELLS[cell].states), _as_states(states, cell)
    for index, state in enumerate(states or ()):
        if state.dim() not in (1, 2):
            what = f"hx[{index}]" if count == 2 else "hidden"
            raise ValueError(f"{name}: Expected {what} to be 1D or 2D, got {state.dim()}D instead")
    batched = input.dim() == 2
    if states is not None:
        states = [state if batched else state.unsqueeze(0) for state in states]
    result = recurrent_cell(
        cell,
        input if batched else input.unsqueeze(0),
        states or (None,) * count,
        module.weight_ih,
        module.weight_hh,
        module.bias_ih,
        module.bias_hh,
    )
    return result if batched else tuple(state.squeeze(0) for state in result)


def _short_road_of_cell(
    module: torch.nn.RNNCellBase, cell: str, input: Tensor, states: Sequence[Tensor] | None
) -> tuple[Tensor, ...] | None:
    """As :func:`_short_road`, for a batch through a cell."""
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if module.bias else ("weight_ih", "weight_hh")
    weights = [module._parameters.get(name) for name in names]
    if not _is_plain(input, 2, states, weights, cell):
        return None
    h0, c0 = (*(states or ()), None, None)[:2]
    try:
        result = _dense(module, cell, False, 1, input, h0, c0, weights)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError):
        return None
    if result is None:
        return None
    _, h, c = result
    return (h, c) if len(CELLS[cell].states) == 2 else (h,)


class RNNCell(_FusedModule, torch.nn.RNNCell):
    """One step of :class:`RNN`, in the place of :class:`torch.nn.RNNCell`: input (B, I), h (B, H) -> h (B, H)."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        cell = f"rnn_{self.nonlinearity}"
        return _forward_cell(self, cell, "RNNCell", input, None if hx is None else (hx,))[0]


class LSTMCell(_FusedModule, torch.nn.LSTMCell):
    """One step of :class:`LSTM`, in the place of :class:`torch.nn.LSTMCell`: input (B, I), (h, c) -> (h, c)."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        return _forward_cell(self, "lstm", "LSTMCell", input, hx)


class GRUCell(_FusedModule, _TorchGRUCell):
    """One step of :class:`GRU`, in the place of :class:`torch.nn.GRUCell`: input (B, I), h (B, H) -> h (B, H)."""

    reset_after: bool = True

    def __init__(self, *args: Any, reset_after: bool = True, **kwargs: Any) -> None:
        _TorchGRUCell.__init__(self, *args, **kwargs)
        self.reset_after = reset_after

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        cell = "gru" if self.reset_after else "gru_reset_before"
        return _forward_cell(self, cell, "GRUCell", input, None if hx is None else (hx,))[0]

    def extra_repr(self) -> str:
        return _TorchGRUCell.extra_repr(self) + ("" if self.reset_after else ", reset_after=False")
