"""Recurrent weights by heads: units of a head multiply the state of their own head alone."""

from __future__ import annotations

from torch import Tensor


def block_diagonal(weight: Tensor) -> Tensor:
    """W_hh (G*H, H) from the blocks of its heads (N, G*H/N, H/N), each with its gates' rows one gate after another.

    Head k of gate g: rows g*H + k*H/N on, columns k*H/N on. All other elements are zero, and stay so: their gradient
    is not asked for. The product costs what that of a full matrix costs.
    """
    heads, rows, units = weight.shape
    gates = rows // units
    whole = weight.new_zeros(gates, heads, units, heads, units)
    blocks = weight.view(heads, gates, units, units).permute(1, 2, 3, 0)  # the heads last, as a diagonal has them
    whole.diagonal(dim1=1, dim2=3).copy_(blocks)
    return whole.view(gates * heads * units, heads * units)
