"""The functions that a cell may call. Each takes traced values and numbers; torch's of the same names do the same.

They take tensors, too: for a cell's function that is called with such, to look at what it computes.
"""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from .graph import OPERATIONS
from .values import Condition, Value

Operand = Value | float


def _of(name: str, *operands: Operand | Condition | Tensor) -> Value:
    tensors = [operand for operand in operands if isinstance(operand, Tensor)]
    if not tensors or not all(isinstance(operand, (Tensor, numbers.Real)) for operand in operands):
        return Value.operation(name, *operands)
    if name == "square":
        return torch.square(*tensors)
    if name in ("maximum", "minimum"):
        operands = tuple(o if isinstance(o, Tensor) else torch.full_like(tensors[0], o) for o in operands)
    return OPERATIONS[name](*operands)


def sigmoid(v: Operand) -> Value:
    """1 / (1 + e^-v)."""
    return _of("sigmoid", v)


def tanh(v: Operand) -> Value:
    """The hyperbolic tangent."""
    return _of("tanh", v)


def relu(v: Operand) -> Value:
    """max(v, 0)."""
    return _of("relu", v)


def exp(v: Operand) -> Value:
    """e^v."""
    return _of("exp", v)


def log(v: Operand) -> Value:
    """The natural logarithm."""
    return _of("log", v)


def softplus(v: Operand) -> Value:
    """log(1 + e^v)."""
    return _of("softplus", v)


def sqrt(v: Operand) -> Value:
    """The square root."""
    return _of("sqrt", v)


def square(v: Operand) -> Value:
    """v * v."""
    return _of("square", v)


def maximum(a: Operand, b: Operand) -> Value:
    """The larger of two; of two equal ones each gets half the gradient, as in torch."""
    return _of("maximum", a, b)


def minimum(a: Operand, b: Operand) -> Value:
    """The smaller of two; of two equal ones each gets half the gradient, as in torch."""
    return _of("minimum", a, b)


def where(condition: Condition, a: Operand, b: Operand) -> Value:
    """``a`` where the condition holds, else ``b``. The condition is ``<``, ``<=``, ``>`` or ``>=`` of traced values."""
    return _of("where", condition, a, b)
