"""The functions that a cell may call. Each takes traced values and numbers; torch's of the same names do the same."""

from __future__ import annotations

from .values import Condition, Value

Operand = Value | float


def sigmoid(v: Operand) -> Value:
    """1 / (1 + e^-v)."""
    return Value.operation("sigmoid", v)


def tanh(v: Operand) -> Value:
    """The hyperbolic tangent."""
    return Value.operation("tanh", v)


def relu(v: Operand) -> Value:
    """max(v, 0)."""
    return Value.operation("relu", v)


def exp(v: Operand) -> Value:
    """e^v."""
    return Value.operation("exp", v)


def log(v: Operand) -> Value:
    """The natural logarithm."""
    return Value.operation("log", v)


def softplus(v: Operand) -> Value:
    """log(1 + e^v)."""
    return Value.operation("softplus", v)


def sqrt(v: Operand) -> Value:
    """The square root."""
    return Value.operation("sqrt", v)


def square(v: Operand) -> Value:
    """v * v."""
    return Value.operation("square", v)


def maximum(a: Operand, b: Operand) -> Value:
    """The larger of two; of two equal ones each gets half the gradient, as in torch."""
    return Value.operation("maximum", a, b)


def minimum(a: Operand, b: Operand) -> Value:
    """The smaller of two; of two equal ones each gets half the gradient, as in torch."""
    return Value.operation("minimum", a, b)


def where(condition: Condition, a: Operand, b: Operand) -> Value:
    """``a`` where the condition holds, else ``b``. The condition is ``<``, ``<=``, ``>`` or ``>=`` of traced values."""
    return Value.operation("where", condition, a, b)
