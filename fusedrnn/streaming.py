"""Inference one step at a time: what ``step`` of the sequence modules does.

A step of a small layer takes less time than its checks, its autograd Function and the look-up of its weights would. All
that is the same in every step is prepared at the first one (``Stepper`` of ``csrc/inference.h``), and what may have
changed is compared in C++: shapes, weights, modes of torch that want to see every op. No weight and no address of one is
kept from step to step.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _C, options
from .dropout import kept_parts
from .torch_internals import has_hooks, listed_weights, own_parameters, weight_names

__all__ = ["cell_of", "step", "steppers"]

_RNN, _LSTM, _GRU = torch.nn.RNN, torch.nn.LSTM, torch.nn.GRU  # people give these names to our classes


class _Prepared(NamedTuple):
    """A step that C++ has checked, and what of the module it depends on."""

    step: Any  # a capsule of _C.prepare_step
    cell: str
    options: options.FusedOptions


#: What is prepared, by module, not in it: copies and pickles hold nothing of it.
steppers: weakref.WeakKeyDictionary[torch.nn.Module, _Prepared] = weakref.WeakKeyDictionary()


def cell_of(module: torch.nn.RNNBase) -> str:
    """The registry's name of a sequence module's cell. (torch.nn's LSTM and GRU do not read their ``mode``.)"""
    if isinstance(module, _LSTM):
        return "lstm"
    if isinstance(module, _GRU):
        return options.gru_cell(module)
    return module.mode.lower() if isinstance(module, _RNN) else "residual_rnn"


def _draws(module: torch.nn.RNNBase, given: options.FusedOptions) -> bool:
    """Whether a call draws masks."""
    return module.training and bool(
        module.dropout or given.zoneout or given.input_dropout or given.recurrent_dropout or given.weight_dropout
    )


def _skips_forward(module: torch.nn.RNNBase, forwards: frozenset[Any]) -> bool:
    """Whether a step may do without calling the module: nobody listens, and ``forward`` is of fusedrnn."""
    return type(module).forward in forwards and "forward" not in vars(module) and not has_hooks(module)


def step(module: torch.nn.RNNBase, input: Tensor, hx: Any, forwards: frozenset[Any]) -> tuple[Tensor, Any]:
    """input (B, I) and states -> output (B, R) and states. ``forwards``: those whose work a prepared step does."""
    prepared, two = steppers.get(module), isinstance(module, _LSTM)
    if (
        prepared is not None
        and prepared.cell == cell_of(module)
        and prepared.options is module.fused_options
        and (hx is None or not two or (type(hx) is tuple and len(hx) == 2))
        and not torch.is_autocast_enabled("cpu")
        and not _draws(module, prepared.options)
        and _skips_forward(module, forwards)
    ):
        h0, c0 = hx if two and hx is not None else (hx, None)
        weights = own_parameters(module), weight_names(module), listed_weights(module)
        found = _C.step(prepared.step, input, h0, c0, *weights)
        if found is not None:
            y, h_n, c_n = found
            return y, (h_n, c_n) if two else h_n
    return _first_step(module, input, hx, forwards)


def _first_step(
    module: torch.nn.RNNBase, input: Tensor, hx: Any, forwards: frozenset[Any]
) -> tuple[Tensor, Any]:
    """By ``forward``, with its checks; what it has found right is prepared for the next."""
    if module.bidirectional:
        raise ValueError("step: a bidirectional module needs the whole sequence")
    if not isinstance(input, Tensor):
        raise TypeError(f"step: Expected input to be a tensor, got {type(input).__name__}")
    if input.dim() != 2:
        raise ValueError(f"step: Expected input to be 2D, (B, I), got {input.dim()}D instead")
    time = 1 if module.batch_first else 0
    with torch.no_grad():
        y, last = module(input.unsqueeze(time), hx)
    steppers.pop(module, None)
    parameters, given = own_parameters(module), options.of(module)
    weights = [parameters.get(name) for name in weight_names(module)]
    plain = all(own is weight for own, weight in zip(weights, listed_weights(module), strict=True))
    if plain and not _draws(module, given) and _skips_forward(module, forwards) and not torch.compiler.is_compiling():
        cell = cell_of(module)
        zoneout = kept_parts(given.zoneout, 2 if cell == "lstm" else 1)
        prepared = _C.prepare_step(input, weights, cell, module.num_layers, zoneout)
        if prepared is not None:
            steppers[module] = _Prepared(prepared, cell, given)
    return y.squeeze(time), last
