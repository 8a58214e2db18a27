"""Recurrent modules for inference whose matrices are int8 or bfloat16: what :func:`fusedrnn.quantize` makes of others.

*int8*: row r of a matrix is ``weight_scale[r] * weight[r]``, weight in [-127, 127]. In each product x and h_{t-1} are
int8 too: a row is scale * q, with the scale max |x| / 127, or 1/127 for an h that its cell bounds by 1 (``Bound`` of
``csrc/cells/cell.h``). Sums are int32, the same on every processor.
*bfloat16*: the matrices alone; they are multiplied in float32.
Biases, the cell and its states are float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils.rnn import PackedSequence

from . import _C
from .cells import CELLS
from .functional import check_states_of_step, recurrent
from .fused_module import Called, as_states
from .inference import cache
from .inference.plain_call import form_of, plain_call
from .layer.autograd import in_place, wants_gradient
from .layer.call import Weights
from .layer.dropout import kept_parts, rates
from .torch_internals import heard, own_buffers

__all__ = ["QuantizedCell", "QuantizedRecurrent"]


#: Elements of a row of int8 weights: so many products have a sum in int32 (csrc/layer.h).
MOST_INT8 = 1 << 16


def small_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """torch.int8 or torch.bfloat16, by itself or its name. Raises ValueError."""
    for known in (torch.int8, torch.bfloat16):
        if dtype in (known, str(known).removeprefix("torch.")):
            return known
    raise ValueError(f"dtype must be 'int8' or 'bfloat16', got {dtype!r}")


def short(dtype: torch.dtype) -> str:
    """Its name without torch's."""
    return str(dtype).removeprefix("torch.")


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (rows, K) of any floating type as int8, and the scale of each row, float32: max |row| / 127."""
    weight = weight.detach().float()
    scale = weight.abs().amax(1) / 127
    factor = torch.where(scale > 0, scale, 1).unsqueeze(1)
    return (weight / factor).round().clamp(-127, 127).to(torch.int8), scale


class _Quantized(Called, nn.Module):
    """What both modules share: buffers in the place of parameters, named as torch.nn's, and no training.

    Buffers, for each layer and direction: ``weight_ih``, ``weight_hh``[, ``weight_hr``] int8 or bfloat16; of int8 the
    name and ``_scale``, float32 of each row; ``bias_ih``, ``bias_hh`` float32; with the endings of torch.nn's names.
    """

    def __init__(self, cell: str, input_size: int, hidden_size: int, bias: bool, dtype: torch.dtype | str) -> None:
        if cell not in CELLS:
            raise ValueError(f"cell must be one of {', '.join(CELLS)}, got {cell!r}")
        if not CELLS[cell].has_small_weights:
            raise ValueError(f"{cell} has no kernels for matrices in int8 or bfloat16")
        for name, size in (("input_size", input_size), ("hidden_size", hidden_size)):
            least = 1 if name == "hidden_size" else 0
            if not isinstance(size, int) or size < least:
                raise ValueError(f"{name} must be an integer from {least} on, got {size!r}")
        super().__init__()
        self.training = False
        self.cell, self.input_size, self.hidden_size, self.bias = cell, input_size, hidden_size, bias
        self.dtype = small_dtype(dtype)
        self._weight_names: list[str] = []
        self._scale_names: list[str] = []

    def _add(self, end: str, shapes: Weights) -> None:
        """Buffers of zeros, of one layer and direction."""
        for field, shape in zip(Weights._fields, shapes, strict=True):
            if shape is None:
                continue
            name = {"w": "weight", "b": "bias"}[field[0]] + field[1:] + end
            matrix = len(shape) == 2
            dtype = self.dtype if matrix else torch.float32
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device="cpu"))
            self._weight_names.append(name)
            if matrix and self.dtype == torch.int8:
                self.register_buffer(f"{name}_scale", torch.zeros(shape[0], dtype=torch.float32, device="cpu"))
                self._scale_names.append(f"{name}_scale")

    @torch.no_grad()
    def take(self, weights: Iterable[Tensor]) -> None:
        """Copy, and of matrices quantize, the weights of a layer, in the order of ``torch.nn.LSTM._flat_weights``."""
        for name, weight in zip(self._weight_names, weights, strict=True):
            own = getattr(self, name)
            if own.dtype == torch.int8:
                values, scale = quantized(weight)
                own.copy_(values)
                getattr(self, f"{name}_scale").copy_(scale)
            else:
                own.copy_(weight)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As in torch.nn, but a matrix of another kind is an error, and nothing is copied: int8 without its scales, or
        whole numbers in the place of bfloat16, are other weights. float32 is rounded to bfloat16.
        """
        given = {name: state_dict.get(prefix + name) for name in self._weight_names}
        wrong = [
            f"{prefix}{name} must be {short(self.dtype)}, got {t.dtype}: load into the model before it is quantized"
            for name, t in given.items()
            if isinstance(t, Tensor) and t.dim() == 2 and (t.dtype == torch.int8) != (self.dtype == torch.int8)
        ]
        if wrong:
            args[-1].extend(wrong)  # error_msgs, which load_state_dict raises
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _lists(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and scales, in the order in which kernels take them."""
        own, found = own_buffers(self), []
        for names in (self._weight_names, self._scale_names):
            found.append([own[n] if n in own else getattr(self, n) for n in names])  # computed, or no buffer any more
        return found[0], found[1]

    def _shapes(self, input_size: int, proj_size: int = 0) -> Weights:
        rows, width = len(CELLS[self.cell].gates) * self.hidden_size, proj_size or self.hidden_size
        bias = (rows,) if self.bias else None
        w_hr = (proj_size, self.hidden_size) if proj_size else None
        return Weights((rows, input_size), (rows, width), bias, bias, w_hr)

    @property
    def nonlinearity(self) -> str:
        """ "tanh" or "relu", of an RNN alone, as torch.nn's."""
        family, _, activation = self.cell.partition("_")
        if family != "rnn":
            raise AttributeError(f"{self.cell} has no nonlinearity to choose")
        return activation

    @property
    def _two_states(self) -> bool:
        return len(CELLS[self.cell].states) == 2

    def _states(self, hx: Any) -> Sequence[Tensor] | None:
        return as_states(hx if self._two_states or hx is None else (hx,), self.cell)

    def _check_input(self, x: Any) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"input must be a tensor or a PackedSequence, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"input must have a floating dtype, got {x.dtype}")
        if x.dim() == 0 or x.size(-1) != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {list(x.shape)}"
            )

    def train(self, mode: bool = True) -> _Quantized:
        """As in torch.nn, but this module stays in eval: it has nothing to train, and drops nothing. What inference has
        kept is freed for training.
        """
        if mode:
            cache.forget(self)
        super().train(mode)
        self.training = False
        return self

    def _apply(self, *args: Any, **kwargs: Any) -> _Quantized:
        """As in torch.nn, but .to(dtype), .half() and so on change no type."""
        cache.forget(self)
        before = dict(own_buffers(self))
        super()._apply(*args, **kwargs)
        for name, buffer in before.items():
            after = own_buffers(self)[name]
            if buffer is not None and after.dtype != buffer.dtype:
                setattr(self, name, buffer.to(after.device))
        return self


def _in_float32(x: Tensor, states: Sequence[Tensor] | None) -> tuple[Tensor, Sequence[Tensor] | None]:
    return x.float(), None if states is None else tuple(s.float() for s in states)


class QuantizedRecurrent(_Quantized):
    """Stacked recurrent layers for inference, matrices in int8 or bfloat16, made of an LSTM, GRU, RNN or ResidualRNN.

    Calls, shapes and results are those of :class:`fusedrnn.LSTM` and the others, with ``lengths``, ``reset`` and
    ``return_states``, and ``step`` for streams; no dropout. Input and states of another floating type than float32 are
    computed in float32, and the results are in their type.

    With int8 a row of x that has a NaN or an infinity gives NaN.

    Args:
        cell: the name of a cell in :data:`fusedrnn.CELLS`.
        input_size, hidden_size, num_layers, bias, batch_first, bidirectional, proj_size: as of torch.nn.LSTM.
        zoneout: of h, or of h and c, the share of the old state in the new one.
        dtype: of the matrices, "int8" or "bfloat16", or torch's.
    """

    def __init__(
        self, cell: str, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
        batch_first: bool = False, bidirectional: bool = False, proj_size: int = 0,
        zoneout: float | tuple[float, float] = 0.0, dtype: torch.dtype | str = "int8",
    ) -> None:  # fmt: skip
        super().__init__(cell, input_size, hidden_size, bias, dtype)
        if num_layers < 1:
            raise ValueError(f"num_layers must be greater than zero, got {num_layers}")
        if proj_size and not (CELLS[cell].projectable and 0 < proj_size < hidden_size):
            raise ValueError(f"proj_size must be below hidden_size, and of an LSTM, got {proj_size} for {cell}")
        rates(0.0, 0.0, zoneout, 0.0, len(CELLS[cell].states))  # raises
        self.num_layers, self.batch_first, self.bidirectional = num_layers, batch_first, bidirectional
        self.proj_size, self.zoneout = proj_size, zoneout
        ends = ("", "_reverse")[: 1 + bidirectional]
        width = (proj_size or hidden_size) * len(ends)
        for layer in range(num_layers):
            for end in ends:
                self._add(f"_l{layer}{end}", self._shapes(width if layer else input_size, proj_size))

    def forward(
        self, input: Tensor | PackedSequence, hx: Any = None, *,
        lengths: Tensor | Sequence[int] | None = None, reset: Tensor | None = None, return_states: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        """As :meth:`fusedrnn.LSTM.forward`. A gradient of the results raises RuntimeError."""
        packed = input if isinstance(input, PackedSequence) else None
        x, states = input if packed is None else packed.data, self._states(hx)
        self._check_input(x)
        dtype = x.dtype
        if dtype != torch.float32:
            x, states = _in_float32(x, states)
        y, finals, *steps = self._layers(x if packed is None else packed._replace(data=x), states, lengths, reset,
                                         return_states)  # fmt: skip
        if dtype != torch.float32:
            y = y.to(dtype)
            finals = tuple(s.to(dtype) for s in finals)
            steps = [[tuple(s.to(dtype) for s in own) for own in steps[0]]] if steps else []
        return y, finals if self._two_states else finals[0], *steps

    def _layers(self, input: Any, states: Any, lengths: Any, reset: Any, return_states: bool) -> tuple[Any, ...]:
        weights, scales = self._lists()
        dense = isinstance(input, Tensor) and lengths is reset is None and not return_states
        if dense and not is_compiling() and not wants_gradient(input, states or ()):
            found = plain_call(self, self.cell, form_of(self, 3), input, states, weights, self.zoneout, scales)
            if found is not None:
                return found[0], found[1:]
        return recurrent(
            self.cell, input, states, weights, num_layers=self.num_layers, bidirectional=self.bidirectional,
            batch_first=self.batch_first, lengths=lengths, reset=reset, return_states=return_states,
            zoneout=self.zoneout, scales=scales,
        )  # fmt: skip

    def step(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """One step of a stream: input (B, I), states as forward's -> output (B, R), states, as
        :meth:`fusedrnn.LSTM.step`.

        Raises:
            ValueError, TypeError: the module is bidirectional, or input is no tensor of two dimensions.
        """
        usual = type(self).forward is _FORWARD and "forward" not in vars(self)
        kept = cache.find(self) if usual and not (is_compiling() or heard(self)) else None
        if kept is not None:
            weights, scales = self._lists()
            form = form_of(self, 2)
            key, prepared = (form, self.cell, self.zoneout), kept.step
            if prepared is not None and prepared[0] == key:
                found = _C.step(prepared[1], input, hx, weights, scales)
                if found is not None:
                    return found
            kept.step = None
        if self.bidirectional:
            raise ValueError("step: a bidirectional module needs the whole sequence")
        self._check_input(input)
        if input.dim() != 2:
            raise ValueError(f"step: Expected input to be 2D, (B, I), got {input.dim()}D instead")
        time = 1 if self.batch_first else 0
        with torch.no_grad():
            y, last = self(input.unsqueeze(time), hx)
        if kept is not None:
            parts = kept_parts(self.zoneout, len(CELLS[self.cell].states))
            prepared = _C.prepare_step(input, weights, self.cell, form, parts, scales)
            kept.step = None if prepared is None else (key, prepared)
        return in_place(Tensor.squeeze_, Tensor.squeeze, y, time), last

    def flatten_parameters(self) -> None:
        """Does nothing. Kept because callers of torch.nn's modules use it."""

    def extra_repr(self) -> str:
        """As torch.nn's, with the cell."""
        text = f"{self.cell}, {self.input_size}, {self.hidden_size}"
        text += f", proj_size={self.proj_size}" if self.proj_size else ""
        text += f", num_layers={self.num_layers}" if self.num_layers > 1 else ""
        for name in ("bias", "batch_first", "bidirectional"):
            text += f", {name}={getattr(self, name)}" if getattr(self, name) != (name == "bias") else ""
        return text + (f", zoneout={self.zoneout}" if self.zoneout else "") + f", {short(self.dtype)}"

    @property
    def mode(self) -> str:
        """The cell, as torch.nn's modules name it: "LSTM", "GRU", "RNN_TANH", "RNN_RELU"."""
        return "GRU" if self.cell.startswith("gru") else self.cell.upper()  # either GRU, as in ours

    @property
    def dropout(self) -> float:
        """0: nothing is trained."""
        return 0.0


_FORWARD = QuantizedRecurrent.forward  # whose work ``step`` does without calling it


class QuantizedCell(_Quantized):
    """One step for inference, matrices in int8 or bfloat16, in the place of an LSTMCell, GRUCell or RNNCell.

    Calls, shapes and results are those of :class:`fusedrnn.LSTMCell` and the others.

    Args:
        cell: the name of a cell in :data:`fusedrnn.CELLS`.
        input_size, hidden_size, bias: as of torch.nn.LSTMCell.
        dtype: of the matrices, "int8" or "bfloat16", or torch's.
    """

    def __init__(
        self, cell: str, input_size: int, hidden_size: int, bias: bool = True, dtype: torch.dtype | str = "int8"
    ) -> None:
        super().__init__(cell, input_size, hidden_size, bias, dtype)
        self._add("", self._shapes(input_size))

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """Input (B, I) or (I,), h or (h, c) of (B, H) or (H,) -> the same. A gradient of them raises RuntimeError."""
        states = self._states(hx)
        self._check_input(input)
        if input.dim() not in (1, 2):
            raise ValueError(f"{type(self).__name__}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        for state in states or ():
            if state.dim() != input.dim():
                raise ValueError(f"For {input.dim()}D input, hx should also be {input.dim()}D, got {state.dim()}D")
        x, dtype = input, input.dtype
        if dtype != torch.float32:
            x, states = _in_float32(x, states)
        if input.dim() == 1:
            x, states = x.unsqueeze(0), None if states is None else tuple(s.unsqueeze(0) for s in states)
        finals = tuple(s.to(dtype) for s in self._one(x, states))
        if input.dim() == 1:
            finals = tuple(in_place(Tensor.squeeze_, Tensor.squeeze, s, 0) for s in finals)
        return finals if self._two_states else finals[0]

    def _one(self, x: Tensor, states: tuple[Tensor, ...] | None) -> Sequence[Tensor]:
        weights, scales = self._lists()
        if not is_compiling() and not wants_gradient(x, states or ()):
            form = 2, 1, 1, self.input_size, self.hidden_size, self.hidden_size
            found = plain_call(self, self.cell, form, x, states, weights, scales=scales)
            if found is not None:
                return found[1:]
        check_states_of_step(states or (), x.size(0), self.hidden_size)
        given = None if states is None else tuple(s.unsqueeze(0) for s in states)
        _, finals = recurrent(self.cell, x.unsqueeze(0), given, weights, scales=scales)
        return [in_place(Tensor.squeeze_, Tensor.squeeze, s, 0) for s in finals]

    def extra_repr(self) -> str:
        """As torch.nn's, with the cell."""
        bias = "" if self.bias else ", bias=False"
        return f"{self.cell}, {self.input_size}, {self.hidden_size}{bias}, {short(self.dtype)}"
