"""Modules in the place of torch.nn's: same constructors, parameters, state_dict and errors, fused kernels inside.

``RNN``, ``LSTM``, ``GRU`` and the cells (:mod:`fusedrnn.single_step`) are subclasses of torch.nn's classes: code that
asks ``isinstance(m, torch.nn.LSTM)`` goes on working. ``GRU(reset_after=False)`` and the subclasses of
``FusedRNNBase``, such as ``ResidualRNN``, have no counterpart there. Nothing here computes: the modules check as
torch.nn does and call :mod:`fusedrnn.functional`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn.utils.rnn import PackedSequence

from . import options
from .cells import CELLS
from .functional import recurrent
from .fused_module import FusedModule, as_states
from .inference.plain_call import form_of, infers, plain_call
from .inference.streaming import Usual, step
from .layer.heads import block_diagonal
from .single_step import GRUCell, LSTMCell, RNNCell  # old pickles look for them here
from .torch_internals import (
    add_weight,
    flat_weights,
    forget_weight,
    own_checks,
    own_parameters,
    refer_strongly,
    usual_weights,
    weight_names,
    whole,
)

__all__ = ["FusedRNNBase", "GRU", "GRUCell", "LSTM", "LSTMCell", "RNN", "RNNCell", "ResidualRNN"]

_LSTM = torch.nn.LSTM  # people give the name to our class
Lengths = Tensor | Sequence[int] | None


def _forward(
    module: torch.nn.RNNBase,
    name: str,
    input: Tensor | PackedSequence,
    hx: Tensor | Sequence[Tensor] | None,
    lengths: Lengths = None,
    reset: Tensor | None = None,
    return_states: bool = False,
) -> tuple[Any, ...]:
    """What the sequence modules share: torch.nn's checks, in its order and words, then the layers. A cell with one
    state takes and gives it bare, not in a tuple.
    """
    ours = isinstance(module, _SequenceModule)
    own = options.active(module)
    cell = options.cell_of(module)
    info = CELLS[cell]
    many = len(info.states) > 1
    states = hx if many or hx is None else (hx,)
    if lengths is None and reset is None and not (return_states or info.eager):
        found = _plain(module, cell, input, states, own)
        if found is not None:
            return found[0], found[1:] if many else found[1]
    weights, names = flat_weights(module), weight_names(module)
    for weight_name, weight in zip(names, weights):
        if not isinstance(weight, Tensor):
            raise TypeError(f"{weight_name} must be a tensor, got {type(weight).__name__}")
    if len(weights) != len(names):
        raise RuntimeError(f"the module must have {len(names)} weights, {', '.join(names)}, got {len(weights)}")
    states = as_states(states, cell)
    if isinstance(input, PackedSequence):
        # The caller's hx is checked before it is permuted: a larger batch would be cut down silently. While Dynamo or
        # an exporter traces, the number of samples is not known; the op checks it.
        checked = None if is_compiling() else states
        _check_args(module, input.data, input.batch_sizes, checked, many)
    else:
        if input.dim() not in (2, 3):
            noun = "D tensor instead" if name == "RNN" else "D instead"
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {input.dim()}{noun}")
        dim, kind = input.dim(), "batched 3-D" if input.dim() == 3 else "unbatched 2-D"
        if states is not None and any(state.dim() != dim for state in states):
            ranks = ", ".join(f"{state.dim()}-D" for state in states)
            what, got = ("hx and cx", f"({ranks}) tensors") if many else ("hx", f"{ranks} tensor")
            raise RuntimeError(f"For {kind} input, {what} should also be {dim}-D but got {got}")
        batched = input if dim == 3 else input.unsqueeze(0 if module.batch_first else 1)
        _check_args(module, batched, None, states and [s if dim == 3 else s.unsqueeze(1) for s in states], many)
    weights = _with_heads(module, weights)
    expected = info.blocks * module.hidden_size, module.proj_size or module.hidden_size
    expected = expected if info.product else expected[:1]
    if weights[1].shape != expected:
        raise RuntimeError(f"weight_hh_l0 must have shape {list(expected)}, got {list(weights[1].shape)}")
    output, finals, *steps = recurrent(
        cell,
        input,
        states,
        weights,
        num_layers=module.num_layers,
        bidirectional=module.bidirectional,
        dropout=module.dropout,
        training=module.training,
        batch_first=module.batch_first,
        lengths=lengths,
        reset=reset,
        return_states=return_states,
        owner=module if ours else None,
        **own,
    )
    return output, finals if many else finals[0], *steps


def _with_heads(module: torch.nn.RNNBase, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """The weights with each W_hh that the module has by heads as the matrix it stands for."""
    heads = getattr(module, "num_heads", 1)
    if heads == 1:
        return weights
    shape = heads, CELLS[options.cell_of(module)].blocks * module.hidden_size // heads, module.hidden_size // heads
    found = list(weights)
    for i, name in enumerate(weight_names(module)):
        if name.startswith("weight_hh"):
            if found[i].shape != shape:
                raise RuntimeError(f"{name} must have shape {list(shape)}, got {list(found[i].shape)}")
            found[i] = block_diagonal(found[i])
    return found


def _plain(
    module: torch.nn.RNNBase,
    cell: str,
    input: Tensor | PackedSequence,
    states: Sequence[Tensor] | None,
    own: dict[str, Any],
) -> tuple[Tensor, ...] | None:
    """A dense batch through one layer or, in inference, through several, checked by the kernels alone. None where
    anything is different. ``own``: the options; in inference zoneout alone is allowed, where it is a number, no mask.
    """
    if is_compiling() or (own and not (infers() and not module.training and list(own) == ["zoneout"])):
        return None
    if len(CELLS[cell].states) > 2:
        return None  # C++ has no shorter way for them: the ops
    if module.num_layers > 1 and (not infers() or (module.dropout and module.training)):
        return None
    weights = usual_weights(module)
    if weights is None:
        return None  # computed or replaced, or checked by a subclass's own methods
    return plain_call(module, cell, form_of(module, 3), input, states, weights, own.get("zoneout", 0.0))


def _check_args(
    module: torch.nn.RNNBase,
    input: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor] | None,
    many: bool,
) -> None:
    """By torch.nn's methods, or those of a subclass or of the module itself. Without states torch.nn checks the zeros
    that it has made; here nobody looks at them but such a method.
    """
    as_lstm = many and not isinstance(module, FusedRNNBase)  # torch.nn.LSTM, or a class that copies its methods
    own = own_checks(module, _LSTM if as_lstm else torch.nn.RNNBase)
    if "permute_hidden" in own:
        name = type(module).__name__
        raise NotImplementedError(f"{name}: permute_hidden would not be called, as fusedrnn has no use for it")
    if states is None and not own:
        module.check_input(input, batch_sizes)
        return
    if states is None:
        sizes = [module.get_expected_hidden_size(input, batch_sizes)]
        sizes += [module.get_expected_cell_size(input, batch_sizes)] if as_lstm else []
        states = [input.new_zeros(size) for size in sizes]
    if as_lstm or not many:
        module.check_forward_args(input, tuple(states) if as_lstm else states[0], batch_sizes)
        return
    module.check_input(input, batch_sizes)
    for index, state in enumerate(states):
        expected = module.get_expected_hidden_size(input, batch_sizes)
        module.check_hidden_size(state, expected, f"Expected hidden[{index}] size {{}}, got {{}}")


class _SequenceModule(FusedModule):
    """What our sequence modules do not share with torch.nn's.

    Their forward has further arguments, by name: ``lengths``, ``reset`` and ``return_states``, as in
    :func:`fusedrnn.functional.recurrent`. The constructor takes the fields of :class:`fusedrnn.FusedOptions`, by name.
    """

    def __init__(self, arguments: dict[str, Any], cell: str | None = None) -> None:
        """``arguments``: names and values of our constructor's arguments; what torch.nn does not know is among
        ``others``, for it to word the error. ``cell``: the registry's name of one that torch.nn does not have.
        """
        given = {name: value for name, value in arguments.items() if name not in ("self", "others")}
        own = {name: given.pop(name) for name in options.FIELDS if name in given}
        given |= arguments.get("others", {})
        if cell is None:
            super().__init__(**given)
        else:
            vars(self)["reset_parameters"] = lambda: None  # not before they have their shapes
            super().__init__("RNN_TANH", **given)  # one gate
            del vars(self)["reset_parameters"]
            self.mode, info = cell.upper(), CELLS[cell]
            heads = getattr(self, "num_heads", 1)
            for name, one in own_parameters(self).items():
                shape = len(info.gates) * one.size(0), *one.shape[1:]
                if name.startswith("weight_hh") and not info.product:
                    shape = (info.blocks * one.size(0),)
                if name.startswith("weight_hh") and heads > 1:
                    shape = heads, shape[0] // heads, self.hidden_size // heads
                setattr(self, name, torch.nn.Parameter(one.new_empty(shape)))
            if info.has_unit_weight:
                add_weight(self, "weight_unit", len(info.parameters) * self.hidden_size)
            refer_strongly(self)
            self.reset_parameters()
        options.tell(self, own)

    def step(
        self, input: Tensor, hx: Tensor | tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
        """One step of a stream, for inference: input (B, I), states as forward's -> output (B, R), states.

        The same numbers as ``forward`` of one step, without gradients, and sooner: what does not change from step to
        step is prepared at the first one, for its batch size. Weights are read where they lie, so that changes of their
        values are seen. Where nothing can be prepared (a GPU, float16, autocast, parametrized weights, forward hooks,
        dropout in training, which draws new masks at every step) it is a call of ``forward``.

        >>> state = None
        >>> for x_t in stream:
        ...     y_t, state = lstm.step(x_t, state)

        Raises:
            ValueError, TypeError: the module is bidirectional, or input is no tensor of two dimensions.
        """
        return step(self, input, hx, _USUAL)

    def _init_flat_weights(self) -> None:
        super()._init_flat_weights()
        refer_strongly(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        refer_strongly(self)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        forget_weight(self, name)

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels read the parameters where they are. Kept because callers use it."""


class RNN(_SequenceModule, torch.nn.RNN):
    """Simple recurrent network in the place of :class:`torch.nn.RNN`, nonlinearity 'tanh' or 'relu'.

    h_t = g(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)

    Arguments, parameters, shapes and errors are torch.nn.RNN's: input (T, B, I) or PackedSequence, h_0 (L*D, B, H)
    -> output (T, B, D*H), h_n (L*D, B, H). Derivation: docs/derivations.md, section R.
    """

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "tanh",
        bias: bool = True, batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False,
        device: torch.device | str | int | None = None, dtype: torch.dtype | None = None, *,
        input_dropout: float = 0.0, recurrent_dropout: float = 0.0, zoneout: float | tuple[float, float] = 0.0,
        weight_dropout: float = 0.0, grad_clip: float | None = None, grad_clip_mode: str = "value",
        bptt_steps: int | None = None, recompute: str = "none", **others: Any,
    ) -> None:  # fmt: skip
        _SequenceModule.__init__(self, dict(locals()))

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None, *,
        lengths: Lengths = None, reset: Tensor | None = None, return_states: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        return whole(_forward, self, "RNN", input, hx, lengths, reset, return_states)


class LSTM(_SequenceModule, torch.nn.LSTM):
    """Long short-term memory in the place of :class:`torch.nn.LSTM`, with ``proj_size``.

    i, f, o = sigmoid(...), g = tanh(...) of W_ih x_t + b_ih + W_hh h_{t-1} + b_hh;
    c_t = f * c_{t-1} + i * g,  h_t = o * tanh(c_t), projected: h_t = W_hr (o * tanh(c_t))

    Arguments, parameters, shapes and errors are torch.nn.LSTM's: input (T, B, I) or PackedSequence, (h_0, c_0) of
    (L*D, B, R), (L*D, B, H) -> output (T, B, D*R), (h_n, c_n); R is proj_size, or H without.
    Derivation: docs/derivations.md, section L.
    """

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
        batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False, proj_size: int = 0,
        device: torch.device | str | int | None = None, dtype: torch.dtype | None = None, *,
        input_dropout: float = 0.0, recurrent_dropout: float = 0.0, zoneout: float | tuple[float, float] = 0.0,
        weight_dropout: float = 0.0, grad_clip: float | None = None, grad_clip_mode: str = "value",
        bptt_steps: int | None = None, recompute: str = "none", **others: Any,
    ) -> None:  # fmt: skip
        _SequenceModule.__init__(self, dict(locals()))

    def forward(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None, *,
        lengths: Lengths = None, reset: Tensor | None = None, return_states: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        return whole(_forward, self, "LSTM", input, hx, lengths, reset, return_states)


class GRU(_SequenceModule, torch.nn.GRU):
    """Gated recurrent unit in the place of :class:`torch.nn.GRU`, and with ``reset_after=False`` as first published.

    r, z = sigmoid(...), h_t = (1 - z) * n + z * h_{t-1} with
    n = tanh(W_in x_t + b_in + r * (W_hn h_{t-1} + b_hn))      (reset_after=True, torch.nn)
    n = tanh(W_in x_t + b_in + W_hn (r * h_{t-1}) + b_hn)      (reset_after=False, Cho et al. 2014)

    The other arguments, parameters, shapes and errors are torch.nn.GRU's: input (T, B, I) or PackedSequence,
    h_0 (L*D, B, H) -> output (T, B, D*H), h_n (L*D, B, H). Derivation: docs/derivations.md, sections G and H.
    """

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
        batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False,
        device: torch.device | str | int | None = None, dtype: torch.dtype | None = None, *,
        input_dropout: float = 0.0, recurrent_dropout: float = 0.0, zoneout: float | tuple[float, float] = 0.0,
        weight_dropout: float = 0.0, grad_clip: float | None = None, grad_clip_mode: str = "value",
        bptt_steps: int | None = None, recompute: str = "none", reset_after: bool = True, **others: Any,
    ) -> None:  # fmt: skip
        _SequenceModule.__init__(self, dict(locals()))

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None, *,
        lengths: Lengths = None, reset: Tensor | None = None, return_states: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        return whole(_forward, self, "GRU", input, hx, lengths, reset, return_states)


class FusedRNNBase(_SequenceModule, torch.nn.RNNBase):
    """A layer of a cell that torch.nn does not have: a subclass says which, ``_cell``, its name in the registry.

    Arguments, parameters and shapes are those of :class:`torch.nn.GRU`, with the cell's G gates in the place of three:
    weight_ih (G*H, I), weight_hh (G*H, H). Of a cell with several states, hx and the final states are tuples.
    Parameters of the units (:class:`CellInfo`) are weight_unit (U*H), or weight_hh (U*H) where gates multiply no h.
    """

    NAMED_LATER = ""  # in the place of a name: by the subclass's constructor

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls._cell not in (*CELLS, cls.NAMED_LATER):
            raise ValueError(f"_cell of {cls.__name__} must be one of {', '.join(CELLS)}, got {cls._cell!r}")

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
        batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False,
        device: torch.device | str | int | None = None, dtype: torch.dtype | None = None, *,
        input_dropout: float = 0.0, recurrent_dropout: float = 0.0, zoneout: float | tuple[float, float] = 0.0,
        weight_dropout: float = 0.0, grad_clip: float | None = None, grad_clip_mode: str = "value",
        bptt_steps: int | None = None, recompute: str = "none", **others: Any,
    ) -> None:  # fmt: skip
        if "proj_size" in others:
            raise ValueError(f"proj_size argument is only supported for LSTM, not {type(self).__name__}")
        if self._cell is None:
            raise TypeError(f"{type(self).__name__} has no cell: make a subclass that names one, _cell = 'gru'")
        _SequenceModule.__init__(self, dict(locals()), self._cell)

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | tuple[Tensor, Tensor] | None = None, *,
        lengths: Lengths = None, reset: Tensor | None = None, return_states: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        return whole(_forward, self, type(self).__name__, input, hx, lengths, reset, return_states)


class ResidualRNN(FusedRNNBase):
    """Residual recurrent network: h_t = h_{t-1} + tanh(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh).

    Arguments, parameters and shapes as :class:`torch.nn.GRU`'s, with one gate: W_ih (H, I), W_hh (H, H).
    Derivation, and why it can explode: docs/derivations.md, section S.
    """

    _cell = "residual_rnn"


_CLASSES = [cls for name in __all__ if issubclass(cls := globals()[name], _SequenceModule)]

#: Whose work ``step`` does without calling them. (A subclass with a ``forward`` of its own is called.)
_USUAL = Usual(FusedModule.__call__, frozenset(cls.forward for cls in _CLASSES))

_FORWARD = """Args:
    input: (T, B, I), or (B, T, I) with batch_first, or (T, I), or a PackedSequence.
    hx: the initial states as torch.nn takes them; None: zeros.
    lengths: None; the steps of each sample of a padded batch, (B,) integers from 0 to T in any order.
    reset: None; where a sample begins anew, (T, B) boolean, (B, T) with batch_first: the state before it is zero.
    return_states: False; whether to give the states of every layer at every step, too.

Returns:
    output and the final states as torch.nn gives them; with return_states, third, for each layer a tuple of its
    states. :func:`fusedrnn.functional.recurrent` says more.
"""
_ARGUMENTS = {
    "input_size": "I, the elements of x_t", "hidden_size": "H, the elements of h_t", "num_layers": "1; stacked layers",
    "nonlinearity": '"{}"; "tanh" or "relu"', "bias": "True; whether there are b_ih and b_hh",
    "batch_first": "False; whether input and output are (B, T, *) instead of (T, B, *)",
    "dropout": "0.0; probability, in training, on every element of the output of each layer but the last",
    "bidirectional": "False; whether a second direction goes from the last step to the first",
    "proj_size": "0; P, the elements of h_t = W_hr (o * tanh(c_t)), 0 for h_t as it is",
    "device": "of the parameters", "dtype": "of the parameters",
}  # fmt: skip


def document(cls: type[_SequenceModule]) -> type[_SequenceModule]:
    """The class, its docstrings with what all have in common."""
    if cls.__doc__:  # python -OO leaves docstrings out
        taken = inspect.signature(cls.__init__).parameters.items()
        own = [f"    {n}: {_ARGUMENTS[n].format(p.default)}." for n, p in taken if n in _ARGUMENTS]
        cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__), "", "Arguments, with their defaults:", *own])
        cls.__doc__ += options.documentation(*(() if cls is GRU else ("reset_after",)))
        cls.__init__.__doc__ = "As torch.nn's, and the options of the class, by name."
        cls.forward.__doc__ = _FORWARD
    return cls


for _cls in _CLASSES:
    document(_cls)
