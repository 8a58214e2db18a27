"""Inference one step at a time: what ``step`` of the sequence modules does.

A step of a small layer takes less time than its checks, its autograd Function and the look-up of its weights would. All
that is the same in every step is prepared at the first one (``Stepper`` of ``csrc/inference.h``), and what may have
changed is compared in C++: shapes, weights, modes of torch that want to see every op. No weight and no address of one
is kept from step to step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import _C, options
from ..cells import CELLS
from ..layer.autograd import in_place
from ..layer.dropout import kept_parts
from ..torch_internals import CALLS, heard, kept_weights, runs
from . import cache
from .plain_call import form_of


class _Prepared(NamedTuple):
    """A step that C++ has checked, and what of the module it depends on."""

    step: Any  # a capsule of _C.prepare_step
    kind: tuple[Any, ...]  # what else forward reads of the module
    options: options.FusedOptions
    calls: tuple[tuple[str, Any], ...]  # what a call of forward would run


def _kind(module: torch.nn.RNNBase) -> tuple[Any, ...]:
    """What ``forward`` reads of a module besides its weights and options."""
    return type(module), module.mode, form_of(module, 2)


def _draws(module: torch.nn.RNNBase, given: options.FusedOptions) -> bool:
    """Whether a call draws masks."""
    return module.training and bool(
        module.dropout or given.zoneout or given.input_dropout or given.recurrent_dropout or given.weight_dropout
    )


class Usual(NamedTuple):
    """Methods whose work a prepared step does."""

    call: Any
    forwards: frozenset[Any]


def step(module: torch.nn.RNNBase, input: Tensor, hx: Any, usual: Usual) -> tuple[Tensor, Any]:
    """input (B, I) and states -> output (B, R) and states."""
    if is_compiling():
        return _by_forward(module, input, hx)
    kept = cache.cached.get(module)
    prepared = None if kept is None else kept.step
    if (
        prepared is not None
        and prepared.options is module.fused_options
        and prepared.kind == _kind(module)
        and not (module.training and _draws(module, prepared.options))
        and not torch.is_autocast_enabled("cpu")
        and not heard(module)
    ):
        weights = kept_weights(module, prepared.calls)
        found = None if weights is None else _C.step(prepared.step, input, hx, weights)
        if found is not None:
            return found
    if kept is not None:
        kept.step = None
    result = _by_forward(module, input, hx)
    _prepare(module, input, usual)
    return result


def _by_forward(module: torch.nn.RNNBase, input: Tensor, hx: Any) -> tuple[Tensor, Any]:
    """With its checks."""
    if module.bidirectional:
        raise ValueError("step: a bidirectional module needs the whole sequence")
    if not isinstance(input, Tensor):
        raise TypeError(f"step: Expected input to be a tensor, got {type(input).__name__}")
    if input.dim() != 2:
        raise ValueError(f"step: Expected input to be 2D, (B, I), got {input.dim()}D instead")
    time = 1 if module.batch_first else 0
    with torch.no_grad():
        y, last = module(input.unsqueeze(time), hx)
        return in_place(Tensor.squeeze_, Tensor.squeeze, y, time), last  # no view: people call methods in place


def _prepare(module: torch.nn.RNNBase, input: Tensor, usual: Usual) -> None:
    """The next step of as many samples, where it would do no more than ``forward``, which has found all right."""
    given, forward = options.of(module), type(module).forward
    calls = (*runs(module), *CALLS, ("__call__", usual.call), ("forward", forward))
    weights = kept_weights(module, calls)
    if forward not in usual.forwards or weights is None or heard(module) or _draws(module, given):
        return
    cell = options.cell_of(module)
    if CELLS[cell].eager or CELLS[cell].beside > 1:
        return
    zoneout = kept_parts(given.zoneout, len(CELLS[cell].states))
    kind = _kind(module)
    prepared = _C.prepare_step(input, weights, cell, kind[-1], zoneout)
    if prepared is not None:
        cache.find(module).step = _Prepared(prepared, kind, given, calls)
