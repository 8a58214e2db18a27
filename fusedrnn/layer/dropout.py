"""Dropout as recurrent networks use it: one mask a sequence, zoneout, and dropped weights.

In layer l, for each sample and unit, or for each weight, with b(p) one with probability p and zero otherwise:

- *variational* (Gal & Ghahramani 2016): x_t := m_x x_t and W_hh h_{t-1} := W_hh (m_h h_{t-1}) with the same masks
  m = b(1 - p)/(1 - p) at every step. What goes from h_{t-1} to h_t without a product (GRU, residual RNN) is not masked;
  of a cell without any product, u h_{t-1} := u (m_h h_{t-1}).
- *zoneout* (Krueger et al. 2017): h_t := k_t h_{t-1} + (1 - k_t) h'_t, where h'_t is what the cell gives and k_t = b(p)
  is drawn at every step; c_t likewise. h'_t is of the cell's c'_t. Outside training k_t is p, its mean.
- *weight drop* (Merity et al. 2018, after Wan et al. 2013): W_hh := b(1 - p)/(1 - p) W_hh, the same for the whole call.

The first and the last have their mean without a mask, so outside training they do nothing. Masks are drawn by torch, on
the layer's device: :func:`torch.manual_seed` repeats them. The kernels take them as they take weights. Gradients:
docs/derivations.md, section Z.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from ..cells import CellInfo
from .call import NOISELESS, LayerCall, Noise, Weights
from .segments import Segments


class Rates(NamedTuple):
    """Probabilities, of an element to be dropped or a state to be kept."""

    input: float = 0.0
    recurrent: float = 0.0
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    weight: float = 0.0

    def at(self, training: bool) -> Rates:
        """What is left of them outside training."""
        return self if training else Rates(zoneout_h=self.zoneout_h, zoneout_c=self.zoneout_c)


def rates(
    input_dropout: float, recurrent_dropout: float, zoneout: float | Sequence[float], weight_dropout: float, states: int
) -> Rates:
    """The arguments of :func:`fusedrnn.functional.recurrent`, for a cell of so many states.

    Raises:
        ValueError: no probability, or a pair for a cell with one state.
    """
    pair = tuple(zoneout) if isinstance(zoneout, (tuple, list)) else (zoneout,) * min(states, 2)
    if states > 2 and (len(pair) != 2 or pair[1] != 0):
        raise ValueError(
            f"zoneout must be (p, 0.0) for a cell of {states} states, of which h alone has zoneout, got {zoneout}"
        )
    if len(pair) != min(states, 2):
        what = ", or a pair of them, of h and of c" if states == 2 else ": the cell has one state"
        raise ValueError(f"zoneout must be a probability{what}, got {zoneout}")
    found = Rates(input_dropout, recurrent_dropout, *(*pair, 0.0)[:2], weight_dropout)
    names = ("input_dropout", "recurrent_dropout", "zoneout", "zoneout", "weight_dropout")
    for name, value in zip(names, found):
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
            raise ValueError(f"{name} must be a probability, from 0 to 1, got {value!r}")
    return found


def check_mask(cell: CellInfo, recurrent_dropout: float) -> None:
    """ValueError for a cell whose h goes other ways than through the products and one factor."""
    if recurrent_dropout and not cell.maskable:
        raise ValueError(
            f"recurrent_dropout is not defined for the cell {cell.name}: its first gates, or what its other gates"
            " multiply, depend on h otherwise than by the product and one factor"
        )


def kept_parts(zoneout: float | Sequence[float], states: int) -> tuple[float, float]:
    """Of h and of c, outside training. Raises as :func:`rates`."""
    return (0.0, 0.0) if isinstance(zoneout, float) and zoneout == 0 else rates(0.0, 0.0, zoneout, 0.0, states)[2:4]


def drop_input(x: Tensor, rate: float, batch_sizes: Tensor | None, layout: object) -> Tensor:
    """x (T, B, I) or (N, I), one mask for all steps of a sample."""
    if rate == 0:
        return x
    if batch_sizes is None:
        return x * _mask(x, rate, x.shape[1:])
    if isinstance(layout, Segments):  # of the same sample the same mask
        return x * _mask(x, rate, (layout.samples, x.size(1))).index_select(0, layout.rows % layout.samples)
    begins = torch.repeat_interleave(batch_sizes.cumsum(0) - batch_sizes, batch_sizes)
    sample = (torch.arange(x.size(0), device="cpu") - begins).to(x.device)
    return x * _mask(x, rate, (int(batch_sizes[0]), x.size(1))).index_select(0, sample)


def drop_weights(cell: CellInfo, weights: Sequence[Tensor], rate: float, directions: int) -> Sequence[Tensor]:
    """A layer's, each direction's W_hh with elements dropped."""
    if rate == 0:
        return weights
    dropped = (
        own._replace(w_hh=own.w_hh * _mask(own.w_hh, rate, own.w_hh.shape))
        for own in Weights.split(cell, weights, directions)
    )
    return [w for own in dropped for w in own.flat]


def draw(rates: Rates, training: bool, call: LayerCall, layout: object) -> Noise:
    """Masks for the states of a layer."""
    if rates.recurrent == rates.zoneout_h == rates.zoneout_c == 0:
        return NOISELESS
    check_mask(call.info, rates.recurrent)
    x, batch_sizes, directions, out, mask_h = call.x, call.batch_sizes, call.directions, call.width, None
    if rates.recurrent > 0:
        segments = layout if isinstance(layout, Segments) else None
        samples = segments.samples if segments else x.size(1) if batch_sizes is None else int(batch_sizes[0])
        mask_h = _mask(x, rates.recurrent, (directions, samples, out))
        mask_h = mask_h.index_select(1, segments.sample) if segments else mask_h

    def keep(rate: float, width: int) -> Tensor | None:
        if rate == 0:
            return None
        if training:
            return _bernoulli((*x.shape[:-1], width), rate, x.device)
        return x.new_full((1,) * (x.dim() - 1) + (width,), rate).expand(*x.shape[:-1], width)

    return Noise(mask_h, keep(rates.zoneout_h, directions * out), keep(rates.zoneout_c, directions * call.hidden))


def _mask(x: Tensor, rate: float, shape: Sequence[int]) -> Tensor:
    """Zero with probability ``rate``, else what makes the mean one; in the type of x."""
    kept = _bernoulli(shape, 1 - rate, x.device).to(x.dtype)
    return kept if rate == 1 else kept / (1 - rate)


def _bernoulli(shape: Sequence[int], p: float, device: torch.device) -> Tensor:
    # In float32 whatever the default type. (torch.bernoulli takes more than twice as long on the CPU.)
    return torch.rand(shape, dtype=torch.float32, device=device) < p
