"""Inference one step at a time: what ``step`` of the sequence modules does.

A step of a small layer takes less time than its checks, its autograd Function and the look-up of its weights would. All
that is the same in every step is prepared at the first one (``Stepper`` of ``csrc/inference.h``), and what may have
changed is compared in C++: shapes, weights, modes of torch that want to see every op. No weight and no address of one
is kept from step to step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _C, options
from .dropout import kept_parts
from .torch_internals import unheard_weights

__all__ = ["cell_of", "step", "steppers"]

_RNN, _LSTM, _GRU = torch.nn.RNN, torch.nn.LSTM, torch.nn.GRU  # people give these names to our classes


class _Prepared(NamedTuple):
    """A step that C++ has checked, and what of the module it depends on."""

    step: Any  # a capsule of _C.prepare_step
    kind: tuple[type[torch.nn.RNNBase], Callable[..., Any], str]
    options: options.FusedOptions


def _kind(module: torch.nn.RNNBase) -> tuple[type[torch.nn.RNNBase], Callable[..., Any], str]:
    cls = type(module)
    return cls, cls.forward, module.mode


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


def step(module: torch.nn.RNNBase, input: Tensor, hx: Any, forwards: frozenset[Any]) -> tuple[Tensor, Any]:
    """input (B, I) and states -> output (B, R) and states. ``forwards``: those whose work a prepared step does."""
    prepared = steppers.get(module)
    if prepared is not None:
        call, kind, given = prepared
        weights = unheard_weights(module)
        if (
            weights is not None
            and given is module.fused_options
            and kind == _kind(module)
            and not (module.training and _draws(module, given))
            and not torch.is_autocast_enabled("cpu")
        ):
            h0, c0 = hx if type(hx) is tuple and len(hx) == 2 else (hx, None)
            found = _C.step(call, input, h0, c0, *weights)
            if found is not None:
                y, h_n, c_n = found
                if c_n.numel() == 0:  # the cell has h alone
                    return y, h_n
                if hx is None or c0 is not None:
                    return y, (h_n, c_n)
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
    weights, given = unheard_weights(module), options.of(module)
    usual = type(module).forward in forwards and not _draws(module, given)
    if weights is None or not usual or torch.compiler.is_compiling():
        return y.squeeze(time), last
    parameters, names, listed = weights
    own = [parameters.get(name) for name in names]
    if all(weight is other for weight, other in zip(own, listed, strict=True)):
        cell = cell_of(module)
        zoneout = kept_parts(given.zoneout, 2 if cell == "lstm" else 1)
        prepared = _C.prepare_step(input, own, cell, module.num_layers, zoneout)
        if prepared is not None:
            steppers[module] = _Prepared(prepared, _kind(module), given)
    return y.squeeze(time), last
