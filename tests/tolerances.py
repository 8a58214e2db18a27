"""The one table of tolerances, keyed by dtype, and the comparison that reads it.

Tensors are compared on the scale of the expected one: |actual - expected| <= tol * max(1, max |expected|). A gradient
is a long sum with cancellation, so a bound on each entry's own magnitude would say nothing about the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Both sides round in an order of their own, over up to 130 steps and sums over T * B rows.
TOLERANCE: dict[torch.dtype, float] = {
    torch.float64: 1e-11,  # eps 2e-16
    torch.float32: 3e-5,  # eps 1e-7
    torch.float16: 1e-2,  # eps 1e-3
    torch.bfloat16: 6e-2,  # eps 8e-3; states and gates are stored in bfloat16 at every step, by torch.nn as well
}


def assert_close(
    name: str, actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None, margin: float = 1.0
) -> None:
    """Same shape, same NaN and infinities, no difference above ``margin * TOLERANCE[dtype]`` (default: actual's)."""
    dtype = dtype or actual.dtype
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.layout == expected.layout == torch.strided
    finite = expected[expected.isfinite()]
    scale = max(1.0, finite.abs().max().item()) if finite.numel() else 1.0
    torch.testing.assert_close(
        actual.to(expected.dtype),
        expected,
        rtol=0.0,
        atol=margin * TOLERANCE[dtype] * scale,
        equal_nan=True,
        msg=lambda text: f"{name}: {text}",
    )


def assert_all_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: torch.dtype | None = None, margin: float = 1.0
) -> None:
    """:func:`assert_close` for two dictionaries of tensors with the same names."""
    assert list(actual) == list(expected)
    for name in expected:
        assert_close(name, actual[name], expected[name], dtype, margin)
