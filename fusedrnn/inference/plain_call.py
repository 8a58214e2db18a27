"""A call with plain tensors, of a module or a functional cell: checked by the kernels' own predicate alone (``fits`` of
``csrc/inference.h``).

A step of a small layer is often all there is to do, and torch.nn's checks in Python would take several times as long.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._C import fits, infer, packed_weights, train_cell
from ..cells import CELLS
from ..layer.autograd import in_place, recurrent_layer
from ..layer.call import PLAIN, LayerCall, Options, Owner
from ..layer.dropout import kept_parts
from ..options import HasOptions
from ..torch_internals import dual_level
from . import cache

_BATCH_FIRST = Options(batch_first=True)


#: What a module says of its layers, which the tensors have to fit: dimensions of the input, 3 for (T, B, I) or 2 for
#: (B, I) of a single step; layers; directions; I; H; R, the projection or H. (Made in every call: no named tuple.)
Form = tuple[int, int, int, int, int, int]


def form_of(module: nn.RNNBase, dim: int) -> Form:
    """Of a sequence module."""
    hidden = module.hidden_size
    directions = 2 if module.bidirectional else 1
    return dim, module.num_layers, directions, module.input_size, hidden, module.proj_size or hidden


def infers() -> bool:
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def plain_call(
    module: nn.Module,
    cell: str,
    form: Form,
    input: Tensor,
    states: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    zoneout: float | Sequence[float] = 0.0,
    scales: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...] | None:
    """y and the final states, shaped as the initial ones. None where anything is different: the checks of torch.nn say
    what is wrong, if anything is.

    Args:
        module: whose packed weights are kept, and the owner of the call. Its ``batch_first`` says how (T, B, *) lie.
        zoneout: in inference alone.
        scales: of matrices of a smaller type, which are for inference.
    """
    if dual_level() >= 0 or CELLS[cell].beside > 1:
        return None
    dim, layers, directions, *_ = form
    batch_first = dim == 3 and module.batch_first
    if batch_first:
        if type(input) is not Tensor or input.dim() != 3:
            return None
        input = input.transpose(0, 1)
    if scales is not None or infers():
        parts = kept_parts(zoneout, len(CELLS[cell].states))
        found = infer(input, states, weights, cell, form, cache.find(module).packed, parts, scales)
        if found is not None:
            if batch_first:
                found[0].transpose_(0, 1)
            return found
        if scales is not None or any(parts):
            return None
    elif dim == 2 and not torch.compiler.is_compiling():
        kept = cache.find(module)
        if not isinstance(module, HasOptions):  # torch.nn's, patched: it trains
            kept.forget_packed()
        found = train_cell(input, states, weights, cell, form, kept.sums)
        if found is not None:
            return found[0], *found
    elif cache.cached and not isinstance(module, HasOptions):
        cache.forget(module)
    if layers > 1 or not fits(input, states, weights, cell, form):
        return None
    given: Sequence[Any] = states or (None,) * len(CELLS[cell].states)
    if dim == 3:
        options, owner = _BATCH_FIRST if batch_first else PLAIN, Owner(weakref.ref(module))
        call = LayerCall(cell, input, given, weights, directions == 2, options=options, owner=owner)
        outputs = recurrent_layer(call)
        return outputs.y, *outputs.finals
    given = [None if s is None else s.unsqueeze(0) for s in given]
    finals = recurrent_layer(LayerCall(cell, input.unsqueeze(0), given, weights)).finals
    finals = [in_place(Tensor.squeeze_, Tensor.squeeze, s, 0) for s in finals]
    return finals[0], *finals


def plain_cell(
    cell: str, input: Tensor, states: Sequence[Tensor | None], weights: Sequence[Tensor]
) -> tuple[Tensor, ...] | None:
    """One step with weights that are no module's: the next states. None where anything is different, as above."""
    info = CELLS.get(cell)
    if (
        info is None
        or info.eager
        or info.beside > 1
        or len(states) != len(info.states)
        or any(w.dim() != 2 for w in weights[:2])
    ):
        return None
    if torch.compiler.is_compiling() or dual_level() >= 0:
        return None
    given = None if all(s is None for s in states) else tuple(states)
    hidden = weights[1].size(1)
    form = 2, 1, 1, weights[0].size(-1), hidden, hidden
    if infers():
        found = infer(input, given, weights, cell, form, packed_weights(), (0.0, 0.0))
        return None if found is None else found[1:]
    return train_cell(input, given, weights, cell, form, cache.sums_of(weights[1]))
