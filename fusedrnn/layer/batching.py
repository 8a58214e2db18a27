"""Batching rules of the ops: what ``torch.vmap`` and the transforms of ``torch.func`` make of a layer.

- Over inputs or gradients, weights shared: the mapped dimension becomes part of the batch, one call of the kernel.
- Per-sample weight gradients (``vmap(grad(...))``): the same call gives the gradients of the gates, and each weight's
  gradients are one batched product over all samples.
- Over weights, an ensemble: a call for each member, which has nothing to share with the others.
- ``is_grads_batched`` of autograd, which maps by other means, is brought to these rules.

Sample b of the mapped index v is sample b * V + v of the call, so that a ragged batch stays sorted by length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..torch_internals import add_batch_dim, batched_by_autograd, batching_level, remove_batch_dim
from .call import (
    BackwardArguments,
    ForwardArguments,
    Gradients,
    LayerCall,
    Needs,
    Noise,
    OutputGradients,
    joined,
    layer_backward,
    layer_forward,
)
from .differentiable import STEPS, previous

Dim = int | None


def _fold(t: Tensor | None, dim: Dim, axis: int, count: int) -> Tensor | None:
    """The mapped dimension, at ``dim`` or missing, into the one at ``axis`` of the rest."""
    if t is None:
        return None
    if dim is None:
        t = t.unsqueeze(axis + 1)
        t = t.expand(*t.shape[: axis + 1], count, *t.shape[axis + 2 :])
    else:
        t = t.movedim(dim, axis + 1)
    return t.flatten(axis, axis + 1)


def _unfold(t: Tensor, axis: int, count: int) -> Tensor:
    """The inverse: the mapped dimension is at ``axis + 1``."""
    return t.unflatten(axis, (t.size(axis) // count, count))


def _nothing(rule: Callable[..., tuple[Any, Any]], info: Any, in_dims: Any, args: Sequence[Any]) -> tuple[Any, Any]:
    """A map over no index: the shapes that one would have, without it."""

    def padded(arg: Any, dim: Any) -> Any:
        if isinstance(arg, (list, tuple)):
            return [padded(a, d) for a, d in zip(arg, dim, strict=True)]
        if not isinstance(arg, Tensor) or dim is None:
            return arg
        return arg.new_zeros([1 if axis == dim else size for axis, size in enumerate(arg.shape)])

    def emptied(t: Any, dim: Any) -> Any:
        if isinstance(t, (list, tuple)):
            return [emptied(one, d) for one, d in zip(t, dim, strict=True)]
        return t if dim is None else t.narrow(dim, 0, 0)

    args = [padded(arg, dim) for arg, dim in zip(args, in_dims, strict=True)]
    results, dims = rule(info._replace(batch_size=1), in_dims, *args)
    return tuple(emptied(t, dim) for t, dim in zip(results, dims, strict=True)), dims


def _one_by_one(op: Callable[..., Any], count: int, in_dims: Sequence[Any], args: Sequence[Any]) -> tuple[Any, Any]:
    """A call for each mapped index, the results stacked."""

    def select(arg: Any, dim: Any, v: int) -> Any:
        if isinstance(arg, (list, tuple)):
            return [select(a, d, v) for a, d in zip(arg, dim, strict=True)]
        return arg.select(dim, v) if isinstance(arg, Tensor) and dim is not None else arg

    members = [op(*(select(a, d, v) for a, d in zip(args, in_dims, strict=True))) for v in range(count)]
    stacked = [
        [torch.stack(parts) for parts in zip(*of, strict=True)] if isinstance(of[0], list) else torch.stack(of)
        for of in zip(*members, strict=True)
    ]
    return tuple(stacked), tuple([0] * len(s) if isinstance(s, list) else 0 for s in stacked)


def _folded(call: LayerCall, dims: LayerCall, count: int) -> LayerCall:
    """A call of the layer for all mapped indices, the weights shared."""
    rows = call.x_rows
    axes = [1] + [rows] * (len(call.noise) - 1)  # of the mask of all steps, and of those that each step has
    return call._replace(
        x=_fold(call.x, dims.x, rows, count),
        batch_sizes=None if call.batch_sizes is None else call.batch_sizes * count,
        noise=Noise(*(_fold(t, dim, axis, count) for t, dim, axis in zip(call.noise, dims.noise, axes, strict=True))),
        states=[_fold(s, dim, 1, count) for s, dim in zip(call.states, dims.states, strict=True)],
    )


def _mapped_first(in_dims: Sequence[Any], args: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The mapped dimension of every tensor in front: not the last one, by which states side by side are parted."""
    args = [t.movedim(dim, 0) if isinstance(t, Tensor) and dim is not None else t for t, dim in zip(args, in_dims)]
    return [0 if isinstance(t, Tensor) and dim is not None else dim for t, dim in zip(args, in_dims)], args


def _own_weights(dims: LayerCall) -> bool:
    """Whether the members of the map differ in more than what makes a larger batch."""
    return dims.batch_sizes is not None or any(dim is not None for dim in (*dims.weights, *(dims.scales or ())))


def _map_forward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    in_dims, args = _mapped_first(in_dims, args)
    call, save = ForwardArguments.of(*args)
    dims, count = ForwardArguments.of(*in_dims, cell=call.cell).call, info.batch_size
    if count == 0:
        return _nothing(_map_forward, info, in_dims, args)
    if _own_weights(dims):
        return _one_by_one(layer_forward, count, in_dims, args)
    (y, finals, _), saved = _folded(call, dims, count).forward(save)
    rows = call.x_rows
    h_n, c_n = (_unfold(s, 1, count) for s in _two(finals))
    return (_unfold(y, rows, count), h_n, c_n, _unfold(saved, 1, count)), (rows + 1, 2, 2, 2)


def _two(states: Sequence[Tensor]) -> Sequence[Tensor]:
    """As the ops give them: of a cell without c, an empty one."""
    h, c = joined(states)
    return h, h[:0] if c is None else c


def _map_backward(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
    in_dims, args = _mapped_first(in_dims, args)
    call, gradients, y, saved, needs = BackwardArguments.of(*args)
    dims, count, rows = BackwardArguments.of(*in_dims, cell=call.cell), info.batch_size, call.x_rows
    if count == 0:
        return _nothing(_map_backward, info, in_dims, args)
    if _own_weights(dims.call) or (needs.weights and call.noise.any):
        return _one_by_one(layer_backward, count, in_dims, args)
    axes = [rows, rows] + [1] * len(call.states)  # of dy, dc and the final states' gradients
    gradients = OutputGradients.of(
        *(_fold(t, d, axis, count) for t, d, axis in zip(gradients.flat, dims.gradients.flat, axes, strict=True))
    )
    call, y, saved = _folded(call, dims.call, count), _fold(y, dims.y, rows, count), _fold(saved, dims.saved, 1, count)
    found = call.backward(gradients, y, saved, Needs(needs.x, False, needs.weights or needs.gates, needs.norms))
    dweights = _weight_gradients(call, count, y, saved, found) if needs.weights else []
    dgates, dh = (t if needs.gates else t[:, :0] for t in (found.gates, found.h))
    states = (_unfold(s, 1, count) for s in _two(found.states))
    dx = _unfold(found.x, rows, count) if needs.x else found.x
    rest = (_unfold(t, 1, count) for t in (dgates, dh, found.norms))
    return (dx, *states, dweights, *rest), (rows + 1 if needs.x else None, 2, 2, [0] * len(dweights), 2, 2, 2)


torch.library.register_vmap("fusedrnn::layer_forward", _map_forward)
torch.library.register_vmap("fusedrnn::layer_backward", _map_backward)


def _weight_gradients(call: LayerCall, count: int, y: Tensor, saved: Tensor, gradients: Gradients) -> list[Tensor]:
    """Each weight's gradients (V, *) from the rows of all samples: x (N*V, I), y (N*V, D*R), the others (D, N*V, *)."""
    cell, rows, steps, hidden, out = call.cell, call.x_rows, call.rows, call.hidden, call.width
    x, y, h0, dgates, dh = call.x.flatten(0, rows), y.flatten(0, rows), call.states[0], gradients.gates, gradients.h
    gates, split, kept = len(call.info.gates), call.info.split, call.info.saved
    first, factors = gates if call.info.first is None else call.info.first, gates + split
    units = factors + len(call.info.parameters)
    found = []
    for d, weights in enumerate(call.by_direction):
        mine = _unfold(dgates[d], 0, count)  # (N, V, blocks * H)
        values = _unfold(saved[d], 0, count).split(hidden, dim=-1)  # those kept of the cell, then c_t, then more
        inputs = _unfold(x, 0, count)
        start = None if h0 is None else h0[d]
        before = _unfold(previous(y[:, d * out : (d + 1) * out], start, steps, reverse=d == 1), 0, count)

        def of(begin: int, end: int, mine: Tensor = mine) -> Tensor:
            return mine[..., begin * hidden : end * hidden]

        own = gates - split  # gates whose input part has the gradient of the recurrent part
        dw_ih = [_outer(of(0, own), inputs), _outer(of(gates, factors), inputs)]
        dw_hh = [_outer(of(0, first), before) if first else of(factors, units).sum(0)]
        if 0 < first < gates:
            dw_hh.append(_outer(of(first, gates), STEPS[cell].operand(values[:kept], before)))
        found += [torch.cat(dw_ih, dim=1) if split else dw_ih[0], torch.cat(dw_hh, dim=1)]
        if weights.b_ih is not None:
            # Columns of the arguments' gradients, by h for all gates and then by x for the last of them.
            begin, other = (units, call.info.argument_split) if call.info.norms else (0, split)
            of_h, of_x = of(begin, begin + gates).sum(0), of(begin + gates, begin + gates + other).sum(0)
            found += [torch.cat([of_h[:, : (gates - other) * hidden], of_x], dim=1), of_h]
        if weights.w_unit is not None:
            found.append(of(factors, units).sum(0))
        if weights.w_hr is not None:
            found.append(_outer(_unfold(dh[d], 0, count), STEPS[cell].output(values[:kept], values[kept])))
    return [g.to(x.dtype) for g in found]


def _outer(gradients: Tensor, operand: Tensor) -> Tensor:
    """(N, V, A), (N, V, B) -> (V, A, B), the sum over N of outer products."""
    return torch.bmm(gradients.permute(1, 2, 0), operand.to(gradients.dtype).transpose(0, 1))


def is_batched_by_autograd(*gradients: Tensor | None) -> bool:
    """Whether a backward pass computes many gradients at once: ``is_grads_batched``, ``jacobian(vectorize=True)``.

    Autograd maps by an older vmap, which knows no rule of an op and cannot loop over one that takes a list.
    """
    if torch.compiler.is_compiling():
        return False
    return any(g is not None and batched_by_autograd(g) for g in gradients)


def map_backward(backward: Callable[..., Sequence[Tensor | None]], *gradients: Tensor | None) -> list[Tensor | None]:
    """``backward`` of gradients that autograd has batched, by torch.vmap."""
    level = batching_level()
    batched = [is_batched_by_autograd(g) for g in gradients]
    plain = [remove_batch_dim(g, level) if b else g for g, b in zip(gradients, batched, strict=True)]
    found: list[Tensor | None] = []

    def wanted(*own: Tensor) -> list[Tensor]:
        given = iter(own)
        found[:] = backward(*(next(given) if b else g for g, b in zip(gradients, batched, strict=True)))
        return [t for t in found if t is not None]

    results = iter(torch.vmap(wanted)(*(g for g, b in zip(plain, batched, strict=True) if b)))
    return [None if t is None else add_batch_dim(next(results), level) for t in found]
