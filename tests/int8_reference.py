"""The arithmetic of layers with int8 weights, written out: rounding as the kernels round, the rest in float64.

One direction of one layer. Of x and h_{t-1} each row is scale * q; of an h that the cell bounds by 1 the scale is at
least 1/127, and of a step after the first just that, unless h_0 was above 1 and the cell keeps a part of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

BOUNDED = ("lstm", "rnn_tanh", "gru", "gru_reset_before", "mgu")


def scales_of(rows: Tensor, least: float) -> Tensor:
    """float32 (B, 1)."""
    sizes = rows.float().abs().amax(1, keepdim=True) / 127
    return sizes.clamp(min=torch.tensor(least, dtype=torch.float32))


def rounded(rows: Tensor, scales: Tensor) -> Tensor:
    """What a product reads of rows, in float64."""
    factors = torch.where(scales == 0, 0, 1 / scales)
    return (rows.float() * factors).round().double() * scales.double()


def matrix(weight: Tensor, scale: Tensor) -> Tensor:
    return weight.double() * scale.double().unsqueeze(1)


def layer(
    cell: str,
    x: Tensor,
    states: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor,
    b_hh: Tensor,
    w_hr: Tensor | None = None,
    keep: Sequence[float] = (0, 0),
) -> tuple[Tensor, list[Tensor]]:
    """x (T, B, I), states (B, R) and (B, H), matrices in float64 -> y (T, B, R) and the final states, in float64."""
    h, *rest = (s.double() for s in states)
    c = rest[0] if rest else None
    least = 1 / 127 if cell in BOUNDED and w_hr is None else 0.0
    b_ih, b_hh = b_ih.double(), b_hh.double()
    ys = []
    for x_t in x:
        gates = len(w_hh) // (w_hh.size(1) if w_hr is None else w_hr.size(1))
        scales = scales_of(h, least)
        xs = (rounded(x_t, scales_of(x_t, 0.0)) @ w_ih.T + b_ih).chunk(gates, 1)
        hs = (rounded(h, scales) @ w_hh.T + b_hh).chunk(gates, 1)
        if cell == "lstm":
            i, f, g, o = (a + b for a, b in zip(xs, hs, strict=True))
            c_next = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h_next = o.sigmoid() * c_next.tanh()
            if w_hr is not None:
                h_next = rounded(h_next, torch.tensor([[1 / 127]], dtype=torch.float32)) @ w_hr.T
            c = keep[1] * c + (1 - keep[1]) * c_next
        elif cell.startswith("gru"):
            r, z = ((a + b).sigmoid() for a, b in zip(xs[:2], hs[:2], strict=True))
            if cell == "gru":
                n = (xs[2] + r * hs[2]).tanh()
            else:
                size = w_hh.size(1)
                n = (xs[2] + rounded(r * h, scales) @ w_hh[2 * size :].T + b_hh[2 * size :]).tanh()
            h_next = n + z * (h - n)
        elif cell == "mgu":
            f, size = (xs[0] + hs[0]).sigmoid(), w_hh.size(1)
            n = (xs[1] + rounded(f * h, scales) @ w_hh[size:].T + b_hh[size:]).tanh()
            h_next = h + f * (n - h)
        else:
            a = xs[0] + hs[0]
            h_next = {"rnn_tanh": a.tanh(), "rnn_relu": a.relu(), "residual_rnn": h + a.tanh()}[cell]
        h = keep[0] * h + (1 - keep[0]) * h_next
        ys.append(h)
    return torch.stack(ys), [h] if c is None else [h, c]
