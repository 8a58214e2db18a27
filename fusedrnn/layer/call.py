"""One call of a layer as one value, and the only place that spells the ops' arguments.

``torch.ops.fusedrnn.layer_forward`` and ``layer_backward`` take and give their tensors one after another
(``csrc/ops.cpp``), as torch's tools want them: lists of optional tensors are not traced by torch.jit, and a negative
view in one is not resolved. Here they have names: a new mask is a field of :class:`Noise`, a new result of the backward
pass one of :class:`Gradients`. T steps, B samples, N rows of all steps, I input, H hidden, R = H or the projection, D
directions.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..cells import CELLS, CellInfo

layer_forward = torch.ops.fusedrnn.layer_forward.default
layer_backward = torch.ops.fusedrnn.layer_backward.default


class Noise(NamedTuple):
    """Masks and zoneout of a layer's states. None: nothing.

    Attributes:
        mask_h: (D, B, R), the factor of h_{t-1} in all products, in the type of x.
        keep_h: (T, B, D*R) or (N, D*R), the part of h_{t-1} in h_t, in the type of x or boolean.
        keep_c: (T, B, D*H) or (N, D*H), the part of c_{t-1} in c_t, likewise.
    """

    mask_h: Tensor | None = None
    keep_h: Tensor | None = None
    keep_c: Tensor | None = None

    @property
    def any(self) -> bool:
        return any(t is not None for t in self)

    def for_op(self, x: Tensor) -> Noise:
        """In the type of x, as the kernels take it; what is saved for the backward pass is not."""
        if all(t is None for t in self[1:]):
            return self
        return Noise(*(None if t is None else t.to(x.dtype) for t in self))


class Options(NamedTuple):
    """What a layer gives and saves, and how its backward pass departs from the gradient.

    Attributes:
        states: whether c_t of every step is wanted.
        recompute: whether the backward pass computes the gates again instead of saving them.
        bptt_steps, clip, clip_by_norm: what a step sends back (csrc/problem.h); 0: all of it.
        batch_first: whether y is (B, T, D*R), laid out in memory as (T, B, D*R). Turned in the layer, where y is not
            saved yet for the backward pass: a view would refuse methods in place that torch.nn's output allows.
    """

    states: bool = False
    recompute: bool = False
    bptt_steps: int = 0
    clip: float = 0.0
    clip_by_norm: bool = False
    batch_first: bool = False

    @property
    def limited(self) -> bool:
        """Whether the backward pass gives something else than the gradient."""
        return self.bptt_steps > 0 or self.clip > 0


class Owner(NamedTuple):
    """The module that a call of a layer belongs to. ``layout``: how its rows lie, if not as (T, B): a
    :class:`segments.Segments`, or a PackedSequence's sorted and unsorted indices.

    The graph of a call holds this, so the module, which may hold an output of the call, is held weakly.
    """

    module: weakref.ref[nn.Module]
    layer: int = 0
    layout: Any = None


NOISELESS, PLAIN = Noise(), Options()


class Weights(NamedTuple):
    """The weights of one direction, or their shapes or gradients. None: the layer has no such weight. A layer's list
    holds the others in this order, one direction after the other.
    """

    w_ih: Any  # (G*H, I)
    w_hh: Any  # (G*H, R); (U*H), the units' parameters, where gates multiply no h
    b_ih: Any = None  # (G*H)
    b_hh: Any = None  # (G*H)
    w_hr: Any = None  # (R, H)
    w_unit: Any = None  # (U*H), the units' parameters

    @staticmethod
    def counts(cell: CellInfo) -> tuple[int, ...]:
        """How many a direction may have."""
        return (3, 5) if cell.has_unit_weight else (2, 3, 4, 5) if cell.projectable else (2, 4)

    @staticmethod
    def named(cell: CellInfo) -> str:
        """What a direction has, for messages."""
        last = ", w_unit" if cell.has_unit_weight else "[, w_hr]" if cell.projectable else ""
        return f"w_ih, w_hh[, b_ih, b_hh]{last}"

    @classmethod
    def split(cls, cell: CellInfo, flat: Sequence[Any], directions: int) -> list[Weights]:
        """From a layer's list, those of each direction; from a stack's, of each layer and direction."""
        each = len(flat) // directions
        biases, last = 4 if each >= 4 else 2, "w_unit" if cell.has_unit_weight else "w_hr"
        parts = [flat[d * each : (d + 1) * each] for d in range(directions)]
        return [cls(*p[:biases], **{last: p[-1]} if each % 2 else {}) for p in parts]

    @property
    def flat(self) -> list[Any]:
        """What the layer has of them."""
        return [w for w in self if w is not None]


class Leaves(NamedTuple):
    """The tensors that a layer may be differentiated by, or their gradients or tangents. None: zero, or no such tensor.

    Attributes:
        x: (T, B, I) or (N, I).
        states: h_0 (D, B, R) and, for cells with more states, those, (D, B, H) each.
        weights: a layer's list (:class:`Weights`).
    """

    x: Tensor | None
    states: Sequence[Tensor | None]
    weights: Sequence[Tensor | None]

    @property
    def flat(self) -> list[Tensor | None]:
        return [self.x, *self.states, *self.weights]

    @classmethod
    def of(cls, cell: str, flat: Sequence[Any]) -> Leaves:
        count = 1 + len(CELLS[cell].states)
        return cls(flat[0], flat[1:count], flat[count:])


class Outputs(NamedTuple):
    """y (T, B, D*R) or (N, D*R); the final states, shaped as the initial ones; c_t of every step, if asked for:
    with more states than two, each direction's all, side by side (:func:`parted_rows`).
    """

    y: Tensor
    finals: Sequence[Tensor]
    c: Tensor | None = None


class OutputGradients(NamedTuple):
    """dL/dy, dL/dc_t of every step, dL/d(final states). None: zero. Flattened in this order."""

    y: Tensor | None
    c: Tensor | None
    finals: Sequence[Tensor | None]

    @property
    def flat(self) -> list[Tensor | None]:
        return [self.y, self.c, *self.finals]

    @classmethod
    def of(cls, y: Any, c: Any, *finals: Any) -> OutputGradients:
        return cls(y, c, finals)


class Needs(NamedTuple):
    """Which gradients are wanted besides those of the initial states; the last two are of each row."""

    x: bool
    weights: bool
    gates: bool = False
    norms: bool = False


class Gradients(NamedTuple):
    """What the backward pass gives; empty tensors and lists for what was not wanted.

    Attributes:
        x, states, weights: those of the arguments.
        gates: (D, N, blocks*H), dL/d(W_hh h + b_hh) of all gates, then dL/d(W_ih x + b_ih) of the last ``split``, then
            what the row adds to the gradients of the units' parameters; of a cell with norms dL/d(W_hh h) and
            dL/d(W_ih x), and last those of the gates' arguments, of all gates by h, of ``argument_split`` by x.
        h: (D, N, R), dL/dh_t of a projected layer.
        norms: (D, N, 2*states + G), for :class:`fusedrnn.record_gradients`.
    """

    x: Tensor
    states: Sequence[Tensor]
    weights: Sequence[Tensor]
    gates: Tensor
    h: Tensor
    norms: Tensor


def joined(states: Sequence[Any]) -> tuple[Any, Any]:
    """A cell's states, or their gradients, as the ops take them: h, and all others in one tensor, side by side. None
    among these is zero; if all are, or there is none, so is what they make.
    """
    h, *others = states
    if len(others) < 2 or all(s is None for s in others):
        return h, others[0] if others else None
    some = next(s for s in others if s is not None)
    return h, torch.cat([torch.zeros_like(some) if s is None else s for s in others], dim=-1)


def parted(cell: CellInfo, h: Any, c: Any) -> tuple[Any, ...]:
    """The inverse. Of what is no tensor, such as the dimension that is mapped, each state has the same."""
    if cell.beside < 2:
        return (h, c)[: len(cell.states)]
    return h, *(c.chunk(cell.beside, dim=-1) if isinstance(c, Tensor) else (c,) * cell.beside)


def _apart(cell: CellInfo, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """Likewise, each in memory of its own: people change results in place."""
    states = parted(cell, h, c)
    return states if cell.beside < 2 else (h, *(s.clone(memory_format=torch.contiguous_format) for s in states[1:]))


def parted_rows(cell: CellInfo, c: Tensor | None, directions: int) -> tuple[Tensor | None, ...]:
    """The states besides h of every step, (T, B, D*H) or (N, D*H) each, from those of the ops, which have each
    direction's side by side.
    """
    if c is None or cell.beside < 2:
        return (c,) * cell.beside
    parts = c.chunk(directions * cell.beside, dim=-1)
    return tuple(torch.cat(parts[k :: cell.beside], dim=-1) for k in range(cell.beside))


_STATIC, _MASKS = 4, len(Noise._fields)
_NO_STATIC, _NO_MASKS = (None,) * _STATIC, (None,) * (1 + _MASKS)  # batch_sizes among the masks


class LayerCall(NamedTuple):
    """What one layer, all directions, computes with. ``flat`` lists it, and ``of`` makes it of the list."""

    cell: str
    x: Tensor
    states: Sequence[Tensor | None]
    weights: Sequence[Tensor]
    bidirectional: bool = False
    batch_sizes: Tensor | None = None
    noise: Noise = NOISELESS
    options: Options = PLAIN
    owner: Owner | None = None
    scales: Sequence[Tensor] | None = None  # of matrices of a smaller type (fusedrnn.functional.recurrent)

    @property
    def info(self) -> CellInfo:
        return CELLS[self.cell]

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def leaves(self) -> Leaves:
        return Leaves(self.x, self.states, self.weights)

    @property
    def by_direction(self) -> list[Weights]:
        return Weights.split(self.info, self.weights, self.directions)

    @property
    def hidden(self) -> int:
        """H."""
        return self.weights[1].size(0) // self.info.blocks

    @property
    def width(self) -> int:
        """R."""
        return self.weights[1].size(1) if self.info.product else self.hidden

    @property
    def x_rows(self) -> int:
        """The dimension of the samples in x and y: 1, or 0 for packed rows."""
        return 1 if self.batch_sizes is None else 0

    @property
    def rows(self) -> list[int]:
        """Samples of each step."""
        return [self.x.size(1)] * self.x.size(0) if self.batch_sizes is None else self.batch_sizes.tolist()

    @property
    def flat(self) -> tuple[Any, ...]:
        """Four values that are no tensors, then the tensors; of a call that may have gradients, so without scales."""
        cell, x, states, weights, bidirectional, batch_sizes, noise, options, owner, _ = self
        return (cell, bidirectional, options, owner, x, batch_sizes, *noise, *states, *weights)

    @classmethod
    def of(cls, cell: str, bidirectional: Any, options: Any, owner: Any, *tensors: Any) -> LayerCall:
        begin, end = 2 + _MASKS, 2 + _MASKS + len(CELLS[cell].states)
        noise, (x, batch_sizes) = Noise(*tensors[2:begin]), tensors[:2]
        return cls(cell, x, tensors[begin:end], tensors[end:], bidirectional, batch_sizes, noise, options, owner)

    @staticmethod
    def leaves_of(flat: Sequence[Any]) -> tuple[Any, ...]:
        """From a list in the order of ``flat``, what belongs to the leaves, in the order of ``leaves.flat``."""
        return (flat[_STATIC], *flat[_STATIC + 2 + _MASKS :])

    @staticmethod
    def with_leaves(leaves: Sequence[Any]) -> tuple[Any, ...]:
        """The inverse: a list in the order of ``flat``, with None for what is no leaf."""
        return (*_NO_STATIC, leaves[0], *_NO_MASKS, *leaves[1:])

    def forward(self, save: bool) -> tuple[Outputs, Tensor]:
        """By the kernel: the outputs, without c, and what the backward pass needs, empty if it is not to be saved."""
        cell, x, states, weights, bidirectional, batch_sizes, noise, _, _, scales = self
        h0, c0 = joined(states)
        more = noise.for_op(x) if scales is None else (*noise.for_op(x), scales)
        y, h_n, c_n, saved = layer_forward(x, batch_sizes, h0, c0, weights, cell, bidirectional, save, *more)
        return Outputs(y, _apart(self.info, h_n, c_n)), saved

    def backward(self, gradients: OutputGradients, y: Tensor, saved: Tensor, needs: Needs) -> Gradients:
        """By the kernel; ``y`` and ``saved`` as :meth:`forward` gave them."""
        cell, x, states, weights, bidirectional, batch_sizes, noise, options, _, _ = self
        dy, dc, finals = gradients
        (h0, c0), (dh_n, dc_n) = joined(states), joined(finals)
        dx, dh0, dc0, dweights, dgates, dh, norms = layer_backward(
            dy, dh_n, dc_n, dc, x, batch_sizes, h0, c0, weights, y, saved, cell, bidirectional, *needs,
            options.bptt_steps, options.clip, options.clip_by_norm, *noise.for_op(x),
        )  # fmt: skip
        return Gradients(dx, _apart(self.info, dh0, dc0), dweights, dgates, dh, norms)


def _call_of_op(cell: str, bidirectional: bool, tensors: Sequence[Any], noise: Noise) -> LayerCall:
    if cell not in CELLS:
        raise ValueError(
            f"unknown cell '{cell}': if it is one of your own (fusedrnn.cell), import the module that makes it, and"
            " make one layer of it, before a program that has it runs"
        )
    x, batch_sizes, h0, c0, weights = tensors
    if c0 is not None and len(CELLS[cell].states) == 1:
        raise RuntimeError(f"cell {cell} has no c0")
    return LayerCall(cell, x, parted(CELLS[cell], h0, c0), weights, bidirectional, batch_sizes, noise)


class ForwardArguments(NamedTuple):
    """The arguments of layer_forward, or a value for each of its tensors, such as the dimension that is mapped. (torch
    hands all on by position, and leaves out defaults at the end.)
    """

    call: LayerCall
    save: Any

    @classmethod
    def of(cls, *args: Any, cell: str | None = None) -> ForwardArguments:
        """``cell``: whose arguments they are like, if they do not say."""
        *tensors, name, bidirectional, save = args[:8]
        masks, scales = args[8 : 8 + _MASKS], args[8 + _MASKS :]
        call = _call_of_op(cell or name, bidirectional, tensors, Noise(*masks))
        return cls(call._replace(scales=scales[0]) if scales else call, save)


class BackwardArguments(NamedTuple):
    """Those of layer_backward, likewise; of ``call.options`` the limits alone."""

    call: LayerCall
    gradients: OutputGradients
    y: Any
    saved: Any
    needs: Needs

    @classmethod
    def of(cls, *args: Any, cell: str | None = None) -> BackwardArguments:
        dy, dh_n, dc_n, dc, *tensors, y, saved, name, bidirectional = args[:13]
        limits = 13 + len(Needs._fields)
        call = _call_of_op(cell or name, bidirectional, tensors, Noise(*args[limits + 3 :]))
        call = call._replace(options=Options(False, False, *args[limits : limits + 3]))
        gradients = OutputGradients(dy, dc, parted(call.info, dh_n, dc_n))
        return cls(call, gradients, y, saved, Needs(*args[13:limits]))
