"""What tests of inference share: a module's results as a list, by the ops alone, and compared bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
KEPT = FLOATS[:3]  # whose packed weights are kept: float16 goes by the ops


def tensors(result) -> list[Tensor]:
    """y, h_n[, c_n] of a module's result."""
    y, last = result
    return [y, *last] if isinstance(last, tuple) else [y, last]


def by_the_ops(module: nn.Module, x: Tensor) -> list[Tensor]:
    """What the module computes with nothing kept: gradients on, so that the ops do it."""
    with torch.enable_grad():
        return [t.detach() for t in tensors(module(x))]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Bit for bit."""
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(found, expected, strict=True))
