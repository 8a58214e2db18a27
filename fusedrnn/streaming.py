"""Inference one step at a time: what ``step`` of the sequence modules does.

A step of a small layer takes less time than its checks, its autograd Function and the look-up of its weights would. All
that is the same in every step is prepared at the first one (``Stepper`` of ``csrc/inference.h``), and what may have
changed is compared in C++: the shapes, the weights' places, modes of torch that want to see every op.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from . import options
from ._C import Stepper
from .dropout import kept_parts

__all__ = ["cell_of", "step", "steppers"]

#: What is prepared, by module, not in it, and what for: copies and pickles hold nothing of it.
steppers: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Stepper, Any]] = weakref.WeakKeyDictionary()


def cell_of(module: torch.nn.RNNBase) -> str:
    """The registry's name of a sequence module's cell."""
    return module.mode.lower() if getattr(module, "reset_after", True) else "gru_reset_before"


def _purpose(module: torch.nn.RNNBase) -> Any:
    """The attributes that a prepared step depends on. None: no step can be prepared."""
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    if module.training and (
        module.zoneout or module.input_dropout or module.recurrent_dropout or module.weight_dropout or module.dropout
    ):
        return None
    zoneout = tuple(module.zoneout) if isinstance(module.zoneout, list) else module.zoneout
    return module.mode, module.mode == "GRU" and module.reset_after, zoneout


def step(module: torch.nn.RNNBase, input: Tensor, hx: Any) -> tuple[Tensor, Any]:
    """input (B, I) and states -> output (B, R) and states."""
    prepared, two = steppers.get(module), module.mode == "LSTM"
    if prepared is not None and not torch.is_autocast_enabled("cpu") and _purpose(module) == prepared[1]:
        h0, c0 = hx if two and type(hx) is tuple and len(hx) == 2 else (hx, None)
        try:
            found = prepared[0].step(input, h0, c0, module._parameters, module._flat_weights_names)
        except TypeError:
            found = None  # forward words it
        if found is not None and (not two or hx is None or c0 is not None):
            y, h_n, c_n = found
            return y, (h_n, c_n) if two else h_n
    return _first_step(module, input, hx)


def _first_step(module: torch.nn.RNNBase, input: Tensor, hx: Any) -> tuple[Tensor, Any]:
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
    weights = [module._parameters.get(name) for name in module._flat_weights_names]
    plain = all(own is weight for own, weight in zip(weights, module._flat_weights, strict=True))
    purpose, cell = _purpose(module), cell_of(module)
    if plain and purpose is not None and not torch.compiler.is_compiling():
        zoneout = kept_parts(options.active(module).get("zoneout", 0.0), 2 if cell == "lstm" else 1)
        stepper = Stepper.make(input, weights, cell, module.num_layers, zoneout)
        if stepper is not None:
            steppers[module] = stepper, purpose
    return y.squeeze(time), last
