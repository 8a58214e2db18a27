"""What the norms of a layer's gradients through time say: :class:`LayerGradients`.

How far a gradient reaches is measured over stretches of steps into which nothing else comes, and nowhere else. From
what is measured a verdict follows, by limits that are written here, or none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["ADVICE", "LEGEND", "NEGLIGIBLE", "VERDICTS", "LayerGradients"]

#: :attr:`LayerGradients.verdict` by the change over the stretch, the first whose limit is not below it.
VERDICTS = ((1e-3, "vanishing"), (0.1, "falling"), (10.0, "steady"), (1e3, "growing"), (math.inf, "exploding"))
#: What enters a step from outside does not count up to this part of the gradient there.
NEGLIGIBLE = 1e-3
#: A stretch of fewer steps than these is judged by what they would make of its factor.
FEW = 10
#: What a step sends may be a little below the limit that cut it: it is rounded to 16 bits.
ROUNDED = 1 - 2**-7
LEGEND = (
    "last, farthest: the norm of the gradient of the state at the last step that one comes to and at the farthest;"
    " outside, sent: at the farthest, of what enters there and of what later steps send\n"
    "steps, change, factor a step: over the longest stretch of steps where nothing enters and grad_clip cuts nothing\n"
    f"verdict, by the change, over {FEW} steps at least: up to 0.001 vanishing, to 0.1 falling, to 10 steady, to 1000"
    " growing, beyond it exploding; unknown if it does not grow and is less than half of the way back, clipped if"
    " grad_clip is why; not finite if some norm is not, and nothing exploded"
)


@dataclass(frozen=True)
class LayerGradients:
    """The norms of one layer and direction in one call and backward pass, on the CPU. NaN where a sample has no step,
    infinite where a norm is not finite.

    A step back in time is a linear map of the gradient of the state. What it does to a gradient shows only where
    nothing is added on the way: :attr:`decay`, :attr:`change` and the rest are of such stretches. With a loss at every
    step the norms tell nothing of the kind: what has just entered may fall quickly, what has come from far slowly.

    Attributes:
        name: of the module in the model; "" for the model itself.
        layer: which of its layers, from 0.
        direction: "forward" or "reverse".
        h: (T, B), || dL/dh_t ||, all paths: what y_t and h_{t+1} send, before it enters step t.
        c: (T, B), || dL/dc_t || likewise, for the LSTM; None for other cells.
        gates: (T, B) each, || dL/d(W_ih x_t + b_ih) || of the gate, by its name.
        from_y: (T, B), || dL/dy_t ||, what comes to h_t from outside: the loss, the layer above.
        from_c: (T, B), likewise to c_t, if ``return_states`` gave it to a loss, for the LSTM; None for other cells.
        sent_h: (T, B), the norm of what later steps (at the last one h_n) send to h_t: dL/dh_t without dL/dy_t.
        sent_c: (T, B), likewise of c_t, for the LSTM; None for other cells.
        backward: which backward pass of the block, from 0.
        call: which call of the module in that pass, from 0, the last one first.
        several: whether the block has several passes, and whether the module several calls in them.
        cut: whether steps may send nothing by ``reset`` or ``bptt_steps``. Where they may not, a zero has vanished.
        clip: ``grad_clip``, 0 for none.
    """

    name: str
    layer: int
    direction: str
    h: Tensor
    c: Tensor | None
    gates: dict[str, Tensor] = field(repr=False)
    from_y: Tensor = field(repr=False)
    sent_h: Tensor = field(repr=False)
    sent_c: Tensor | None = field(repr=False)
    from_c: Tensor | None = field(repr=False)
    backward: int = 0
    call: int = 0
    several: tuple[bool, bool] = (False, False)
    cut: bool = False
    clip: float = 0.0

    @property
    def state(self) -> Tensor:
        """(T, B), the norm of the gradient of the whole state: of h and c together for the LSTM."""
        return _together(self.h, self.c)

    @property
    def outside(self) -> Tensor:
        """(T, B), the norm of what comes to it from outside."""
        return _together(self.from_y, self.from_c)

    @property
    def sent(self) -> Tensor:
        """(T, B), the norm of what later steps send to it."""
        return _together(self.sent_h, self.sent_c)

    @property
    def label(self) -> str:
        """``name.layer``, the direction, and which pass and call, if there are several."""
        parts = [f"{self.name or 'model'}.l{self.layer}"]
        parts += ["reverse"] * (self.direction == "reverse")
        parts += [f"pass {self.backward}"] * self.several[0] + [f"call {self.call}"] * self.several[1]
        return " ".join(parts)

    def _back(self, norms: Tensor) -> Tensor:
        """(T, B) in the direction's order: row k is k steps back from a sample's last step, NaN where it has none."""
        norms = norms.double()
        steps, samples = norms.shape
        count = (~self.h.isnan()).sum(0)  # a sample's steps come first
        lag = torch.arange(steps, device=norms.device).unsqueeze(1)
        back = (count - 1 - lag).clamp(min=0) if self.direction == "forward" else lag.expand(steps, samples)
        return norms.gather(0, back).where(lag < count, torch.nan)

    def by_lag(self, norms: Tensor | None = None) -> Tensor:
        """The geometric mean over samples of ``norms``, by default :attr:`h`, k steps back, for k = 0, 1, ... as far as
        there are steps.

        Back in the direction's order, from each sample's last step that a gradient comes to: before it there is nothing
        to fall. After it a zero, as of a gradient that has vanished, counts as the smallest normal number. With a loss
        at every step it is the sum of what all of them send.
        """
        come = self._back(self.state)
        norms, steps = self._back(self.h if norms is None else norms), len(come)
        lag = torch.arange(steps, device=norms.device).unsqueeze(1)
        there = ~come.isnan()
        begin = (come != 0).logical_and(there).to(torch.uint8).argmax(0)
        from_begin = norms.gather(0, (lag + begin).clamp(max=steps - 1)).where(lag + begin < there.sum(0), torch.nan)
        from_begin[:, come.nan_to_num(0).eq(0).all(0)] = torch.nan  # no gradient came to any step
        mean = from_begin.clamp(min=torch.finfo(self.h.dtype).tiny).log().nanmean(1).exp()
        return mean[: int(mean.isfinite().logical_or(mean.isinf()).sum())]

    def _entering(self, part: float = 0.0) -> Tensor:
        """(T, B), by lag: whether more than this part of the gradient enters there by y_t, c_t or the final state."""
        outside = self._back(self.outside)
        here = (outside > (part * self._back(self.state) if part else 0)) | outside.isinf()
        here[:1] |= self._back(self.sent)[:1] > 0
        return here

    @property
    def enters(self) -> str:
        """Where gradients enter from outside, by y_t, c_t or the final state: "at the last step", "at every step",
        "at N% of the steps", "nowhere".
        """
        here, steps = self._entering(), int((~self.h.isnan()).sum())
        if not here.any():
            return "nowhere"
        if not here[1:].any():
            return "at the last step"
        return "at every step" if int(here.sum()) == steps else f"at {100 * int(here.sum()) / steps:.0f}% of the steps"

    def _cut_by_clip(self) -> Tensor:
        """(T, B), by lag: whether ``grad_clip`` may have cut what the step before sends there. By value it may have
        where the norm is at least the limit of an element.
        """
        sent_h, sent_c = self._back(self.sent_h), self._back(self.sent_h if self.sent_c is None else self.sent_c)
        here = torch.maximum(sent_h, sent_c) >= (ROUNDED * self.clip or math.inf)
        here[:1] = False  # the final state's
        return here

    @cached_property
    def _stretch(self) -> tuple[float, int, int]:
        """:attr:`decay`, :attr:`steps`, and the steps back of the longest way that a gradient makes."""
        if self.h.numel() == 0:
            return math.nan, 0, 0
        come, tiny = self._back(self.state), torch.finfo(self.h.dtype).tiny
        there = come.isfinite() & (come > 0)
        if not self.cut:
            # Where it has vanished, if not because the square of its norm is no number of the type.
            there[1:] |= (come[1:] == 0) & (come[:-1] > math.sqrt(tiny))
        lag = torch.arange(len(come), device=come.device).unsqueeze(1)
        free = there & ~self._entering(NEGLIGIBLE) & ~self._cut_by_clip()
        free[0] = False
        length, end = (lag - lag.where(~free, 0).cummax(0).values).max(0)
        norms = come.clamp(min=tiny).log()
        change = norms.gather(0, end.unsqueeze(0)) - norms.gather(0, (end - length).unsqueeze(0))
        steps = int(length.sum())
        decay = math.exp(float(change[0, length > 0].sum()) / steps) if steps else math.nan
        return decay, int(length.max()), max(0, int(there.sum(0).max()) - 1)

    @property
    def decay(self) -> float:
        """The factor by which a step back changes :attr:`state`: the geometric mean over the steps of each sample's
        longest stretch where nothing enters. NaN if there is none.
        """
        return self._stretch[0]

    @property
    def steps(self) -> int:
        """Of the longest of these stretches."""
        return self._stretch[1]

    @property
    def change(self) -> float:
        """What is left, of 1, at its end: :attr:`decay` to the power of :attr:`steps`. If all samples' stretches are of
        that length it is the norm measured at the far end over the one measured at the near end.
        """
        return _power(self.decay, self.steps)

    @property
    def ends(self) -> tuple[float, float]:
        """:attr:`state` at the last step that a gradient comes to and at the farthest: geometric means over samples."""
        return self._seen(self.state, 0), self.farthest(self.state)

    def farthest(self, norms: Tensor) -> float:
        """Their geometric mean over samples at the farthest step."""
        return self._seen(norms, -1)

    def _seen(self, norms: Tensor, lag: int) -> float:
        norms = self.by_lag(norms)
        seen = float(norms[lag]) if len(norms) else math.nan
        return 0.0 if seen <= 2 * torch.finfo(self.h.dtype).tiny else seen

    @property
    def memory(self) -> float:
        """Steps after which 1/e of the gradient is left, 1 / -log(:attr:`decay`); NaN if it does not fall."""
        return -1 / math.log(self.decay) if 0 < self.decay < 1 else math.nan

    @property
    def verdict(self) -> str:
        """By :attr:`change`, or what 10 steps make of :attr:`decay` if there are fewer: "vanishing" (to 0.001),
        "falling" (to 0.1), "steady" (to 10), "growing" (to 1000), "exploding" (beyond). "not finite" if some norm is
        not and nothing exploded: the loss was not, or a weight.

        "unknown" if nothing grows and the stretch is less than half of the way that gradients make back in time: with a
        loss at every step nothing tells how far one reaches. "clipped" if ``grad_clip`` is why.
        """
        decay, steps, way = self._stretch
        change = _power(decay, max(steps, FEW))
        verdict = next((word for limit, word in VERDICTS if change <= limit), "unknown")
        if verdict != "exploding" and self.state.isinf().any():
            return "not finite"
        if verdict in ("growing", "exploding") or 2 * steps >= way:
            return verdict
        return "clipped" if (self._cut_by_clip() & ~self._entering(NEGLIGIBLE)).any() else "unknown"


def _together(h: Tensor, c: Tensor | None) -> Tensor:
    return h if c is None else torch.hypot(h, c)


def _power(base: float, exponent: int) -> float:
    if math.isnan(base):
        return math.nan
    log = math.log(base) * exponent if base > 0 else -math.inf
    return math.exp(log) if log < 700 else math.inf


_TOO_LARGE = (
    "clip the whole gradient (torch.nn.utils.clip_grad_norm_), or what a step sends back (grad_clip=, bptt_steps= of"
    " the layer); smaller recurrent weights, fusedrnn.init.orthogonal_, a gated cell"
)
ADVICE = {
    "vanishing": "steps beyond the memory do not train: an LSTM or GRU with a bias on the gate that keeps"
    " (fusedrnn.init.chrono_, forget_bias_), fusedrnn.init.orthogonal_, or shorter sequences",
    "growing": _TOO_LARGE,
    "exploding": _TOO_LARGE,
    "unknown": "it cannot be told how far a gradient reaches, as gradients enter at most steps or pass none: record"
    " h_n[k].sum().backward(), of one layer and direction alone (k = layer * directions + direction), where h_n is the"
    " final state",
    "clipped": "grad_clip decides what reaches the steps before: a larger limit, or none, shows how far a gradient"
    " reaches and whether it grows",
    "not finite": "look for what is not in the loss, the weights and the input (torch.autograd.set_detect_anomaly), or"
    " use a type of a wider range",
}
