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

from . import _C
from .cells import CELLS
from .differentiable import previous
from .torch_internals import add_batch_dim, batched_by_autograd, batching_level, remove_batch_dim

__all__ = ["is_batched_by_autograd", "map_backward"]

_CONSTANTS = {entry["name"]: entry for entry in _C.cells()}
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


_NOISE = 5  # place of the first mask among the optional arguments of layer_backward


def _fold_noise(noise: Sequence[Tensor | None], dims: Sequence[Dim], rows: int, count: int) -> list[Tensor | None]:
    """mask_h, keep_h, keep_c, or none of them."""
    return [_fold(t, dim, axis, count) for t, dim, axis in zip(noise, dims, (1, rows, rows))]


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


def _map_forward(
    info: Any,
    in_dims: Sequence[Any],
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    cell: str,
    bidirectional: bool,
    save: bool,
    *noise: Tensor | None,
) -> tuple[Any, Any]:
    op, count = torch.ops.fusedrnn.layer_forward.default, info.batch_size
    args = x, batch_sizes, h0, c0, weights, cell, bidirectional, save, *noise
    if count == 0:
        return _nothing(_map_forward, info, in_dims, args)
    x_dim, sizes_dim, h0_dim, c0_dim, weight_dims, _, _, _, *noise_dims = in_dims
    if sizes_dim is not None or any(d is not None for d in weight_dims):
        return _one_by_one(op, count, in_dims, args)
    rows = 1 if batch_sizes is None else 0
    y, h_n, c_n, saved = op(
        _fold(x, x_dim, rows, count),
        None if batch_sizes is None else batch_sizes * count,
        _fold(h0, h0_dim, 1, count),
        _fold(c0, c0_dim, 1, count),
        weights,
        cell,
        bidirectional,
        save,
        *_fold_noise(noise, noise_dims, rows, count),
    )
    results = tuple(_unfold(t, axis, count) for t, axis in ((y, rows), (h_n, 1), (c_n, 1), (saved, 1)))
    return results, (rows + 1, 2, 2, 2)


def _map_backward(
    info: Any,
    in_dims: Sequence[Any],
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    y: Tensor,
    saved: Tensor,
    cell: str,
    bidirectional: bool,
    need_x: bool,
    need_weights: bool,
    *rest: Any,  # need_gates to clip_by_norm and noise, as far as the caller gave them
) -> tuple[Any, Any]:
    op, count = torch.ops.fusedrnn.layer_backward.default, info.batch_size
    dy_dim, dh_dim, dc_n_dim, dc_dim, x_dim, sizes_dim, h0_dim, c0_dim, weight_dims, y_dim, saved_dim, *_ = in_dims
    flags = cell, bidirectional, need_x, need_weights, *rest
    args = dy, dh_n, dc_n, dc, x, batch_sizes, h0, c0, weights, y, saved, *flags
    need_gates = bool(rest) and rest[0]
    limits, noise, noise_dims = rest[1:_NOISE], rest[_NOISE:], in_dims[len(args) - len(rest[_NOISE:]) :]
    if count == 0:
        return _nothing(_map_backward, info, in_dims, args)
    if sizes_dim is not None or any(d is not None for d in weight_dims):
        return _one_by_one(op, count, in_dims, args)
    if need_weights and any(t is not None for t in noise):
        return _one_by_one(op, count, in_dims, args)
    rows = 1 if batch_sizes is None else 0
    dy, dc, x, y = (_fold(t, d, rows, count) for t, d in ((dy, dy_dim), (dc, dc_dim), (x, x_dim), (y, y_dim)))
    dh_n, dc_n, h0, c0, saved = (
        _fold(t, d, 1, count)
        for t, d in ((dh_n, dh_dim), (dc_n, dc_n_dim), (h0, h0_dim), (c0, c0_dim), (saved, saved_dim))
    )
    sizes = None if batch_sizes is None else batch_sizes * count
    dx, dh0, dc0, _, dgates, dh, norms = op(
        dy, dh_n, dc_n, dc, x, sizes, h0, c0, weights, y, saved, cell, bidirectional, need_x, False,
        need_weights or need_gates, *limits, *_fold_noise(noise, noise_dims, rows, count),
    )  # fmt: skip
    dweights: list[Tensor] = []
    if need_weights:
        steps = [x.size(1)] * x.size(0) if sizes is None else sizes.tolist()
        dweights = _weight_gradients(cell, count, steps, x.flatten(0, rows), h0, weights, y.flatten(0, rows), saved,
                                     dgates, dh)  # fmt: skip
    if not need_gates:
        dgates, dh = dgates[:, :0], dh[:, :0]
    results = (
        _unfold(dx, rows, count) if need_x else dx,
        *(_unfold(t, 1, count) for t in (dh0, dc0)),
        dweights,
        *(_unfold(t, 1, count) for t in (dgates, dh, norms)),
    )
    return results, (rows + 1 if need_x else None, 2, 2, [0] * len(dweights), 2, 2, 2)


torch.library.register_vmap("fusedrnn::layer_forward", _map_forward)
torch.library.register_vmap("fusedrnn::layer_backward", _map_backward)


def _weight_gradients(
    cell: str,
    count: int,
    steps: Sequence[int],
    x: Tensor,
    h0: Tensor | None,
    weights: Sequence[Tensor],
    y: Tensor,
    saved: Tensor,
    dgates: Tensor,
    dh: Tensor,
) -> list[Tensor]:
    """Each weight's gradients (V, *) from the rows of all samples: x (N*V, I), y (N*V, D*R), the others (D, N*V, *)."""
    directions = dgates.size(0)
    each, constants = len(weights) // directions, _CONSTANTS[cell]
    gates, first, split = constants["gates"], constants["first"], constants["split"]
    found = []
    for d in range(directions):
        hidden, out = weights[1].size(0) // gates, weights[1].size(1)
        mine = _unfold(dgates[d], 0, count)  # (N, V, (gates + split) * H)
        kept = _unfold(saved[d], 0, count)
        inputs = _unfold(x, 0, count)
        start = None if h0 is None else h0[d]
        before = _unfold(previous(y[:, d * out : (d + 1) * out], start, steps, reverse=d == 1), 0, count)

        def of(begin: int, end: int, mine: Tensor = mine, hidden: int = hidden) -> Tensor:
            return mine[..., begin * hidden : end * hidden]

        own = gates - split  # gates whose input part has the gradient of the recurrent part
        dw_ih = [_outer(of(0, own), inputs), _outer(of(gates, gates + split), inputs)]
        dw_hh = [_outer(of(0, first), before)]
        if first < gates:
            reset = CELLS[cell].gates.index("r")
            dw_hh.append(_outer(of(first, gates), kept[..., reset * hidden : (reset + 1) * hidden] * before))
        found += [torch.cat(dw_ih, dim=1) if split else dw_ih[0], torch.cat(dw_hh, dim=1)]
        if each >= 4:
            sums = mine.sum(0)
            input_sums = torch.cat([sums[:, : own * hidden], sums[:, gates * hidden :]], dim=1)
            found += [input_sums, sums[:, : gates * hidden]]
        if each % 2:
            o, c = CELLS[cell].gates.index("o"), CELLS[cell].saved
            unprojected = kept[..., o * hidden : (o + 1) * hidden] * kept[..., c * hidden : (c + 1) * hidden].tanh()
            found.append(_outer(_unfold(dh[d], 0, count), unprojected))
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
