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

from . import dropout
from ._C import Stepper

__all__ = ["cell_of", "step", "steppers"]

#: What is prepared, by module, not in it: copies and pickles hold nothing of it.
steppers: weakref.WeakKeyDictionary[torch.nn.Module, Stepper] = weakref.WeakKeyDictionary()


def cell_of(module: torch.nn.RNNBase) -> str:
    """The registry's name of a sequence module's cell."""
    return module.mode.lower() if getattr(module, "reset_after", True) else "gru_reset_before"


def step(module: torch.nn.RNNBase, input: Tensor, hx: Any) -> tuple[Tensor, Any]:
    """input (B, I) and states -> output (B, R) and states."""
    stepper, two = steppers.get(module), module.mode == "LSTM"
    if stepper is not None and not torch.is_autocast_enabled("cpu") and not dropout.active(module):
        h0, c0 = hx if two and hx is not None else (hx, None)
        found = stepper.step(input, h0, c0, module._parameters, module._flat_weights_names)
        if found is not None:
            y, h_n, c_n = found
            return y, (h_n, c_n) if two else h_n
    return _first_step(module, input, hx)


def _first_step(module: torch.nn.RNNBase, input: Tensor, hx: Any) -> tuple[Tensor, Any]:
    """By ``forward``, with its checks; what it has found right is prepared for the next."""
    if module.bidirectional:
        raise ValueError("step: a bidirectional module needs the whole sequence")
    if input.dim() != 2:
        raise ValueError(f"step: Expected input to be 2D, (B, I), got {input.dim()}D instead")
    time = 1 if module.batch_first else 0
    with torch.no_grad():
        y, last = module(input.unsqueeze(time), hx)
    steppers.pop(module, None)
    weights = [module._parameters.get(name) for name in module._flat_weights_names]
    plain = all(own is weight for own, weight in zip(weights, module._flat_weights, strict=True))
    dropping = module.dropout > 0 and module.training and module.num_layers > 1
    if plain and not dropping and not dropout.active(module) and not torch.compiler.is_compiling():
        stepper = Stepper.make(input, weights, cell_of(module), module.num_layers)
        if stepper is not None:
            steppers[module] = stepper
    return y.squeeze(time), last
