"""What the norms of a layer's gradients through time say: :class:`LayerGradients`.

How far a gradient reaches is measured over stretches of steps into which nothing else comes, and nowhere else. From
what is measured a verdict follows, by limits that are written here, or none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

#: :attr:`LayerGradients.verdict` by :attr:`LayerGradients.change`, the first whose limit is not below it.
VERDICTS = ((1e-3, "vanishing"), (0.1, "falling"), (10.0, "steady"), (1e3, "growing"), (math.inf, "exploding"))
#: What enters from outside does not count up to this part of the gradient there, over all steps together.
NEGLIGIBLE = 1e-3
#: Over fewer steps nothing is called steady: the first step back may be unlike all others, as an LSTM's from h to c.
FEW = 10
#: What a step sends may be a little below the limit that cut it: it is rounded to 16 bits.
ROUNDED = 1 - 2**-7
LEGEND = (
    "a row is of one sample: of the one whose gradient grows most, if one grows tenfold, else of the median one, among"
    " the longest stretches\n"
    "last, farthest: the norm of the gradient of the state at the last step that one comes to and at the farthest, 0 if"
    " what counts ends before it; outside, sent: at the farthest, of what enters there and of what later steps send\n"
    "steps, change, factor a step: over the longest stretch of steps where nothing enters and grad_clip cuts nothing\n"
    "verdict, by the change: up to 0.001 vanishing, to 0.1 falling, to 10 steady, to 1000 growing, beyond it exploding;"
    f" unknown if it does not grow and is less than half of the way back, or is steady for less than {FEW} steps;"
    " clipped if grad_clip is why; not finite if some norm is not, and nothing exploded; none if no gradient came"
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
        further: (T, B) each, || dL/ds_t || of the states s besides h and c, by their names: n and m of the SLSTM.
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
    further: dict[str, Tensor] = field(default_factory=dict, repr=False)
    backward: int = 0
    call: int = 0
    several: tuple[bool, bool] = (False, False)
    cut: bool = False
    clip: float = 0.0

    @property
    def state(self) -> Tensor:
        """(T, B), the norm of the gradient of the whole state: of h and c together where there is c."""
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
        """(T, B), by lag: whether there enters, by y_t, c_t or the final state, what over all steps may be more than
        this part of the gradient.
        """
        outside = self._back(self.outside)
        here = (outside > (part / len(outside) * self._back(self.state) if part else 0)) | outside.isinf()
        here[:1] |= self._back(self.sent)[:1] > 0
        return here

    @property
    def enters(self) -> str:
        """Where gradients enter from outside, by y_t, c_t or the final state: "at the last step", "at every step",
        "at K of N steps" of all samples, "nowhere".
        """
        here, steps = self._entering(), int((~self.h.isnan()).sum())
        if not here.any():
            return "nowhere"
        if not here[1:].any():
            return "at the last step"
        return "at every step" if int(here.sum()) == steps else f"at {int(here.sum())} of {steps} steps"

    def _cut_by_clip(self) -> Tensor:
        """(T, B), by lag: whether ``grad_clip`` may have cut what the step before sends there. By value it may have
        where the norm is at least the limit of an element.
        """
        sent_h, sent_c = self._back(self.sent_h), self._back(self.sent_h if self.sent_c is None else self.sent_c)
        here = torch.maximum(sent_h, sent_c) >= (ROUNDED * self.clip or math.inf)
        here[:1] = False  # the final state's
        return here

    @cached_property
    def _stretch(self) -> _Stretch:
        """Of the sample that a summary is about."""
        come, tiny = self._back(self.state), torch.finfo(self.h.dtype).tiny
        there = come.isfinite() & (come > 0)
        if not there.any():
            return _Stretch()
        if not self.cut:
            # Where it has vanished, if not because the square of its norm is no number of the type.
            there[1:] |= (come[1:] == 0) & (come[:-1] > math.sqrt(tiny))
        lag = torch.arange(len(come), device=come.device).unsqueeze(1)
        free = there & ~self._entering(NEGLIGIBLE) & ~self._cut_by_clip()
        free[0] = False
        length, end = (lag - lag.where(~free, 0).cummax(0).values).max(0)
        norms = come.clamp(min=tiny).log()
        change = (norms.gather(0, end.unsqueeze(0)) - norms.gather(0, (end - length).unsqueeze(0)))[0]
        way = (there * lag).amax(0) - there.to(torch.uint8).argmax(0)
        # Those with a long stretch, or a long way if none has a stretch, in the order of their changes.
        measure = length if length.any() else way
        long = (2 * measure >= measure.max()).nonzero()[:, 0]
        long = long[change[long].argsort()]
        sample = int(long[-1] if change[long[-1]] > math.log(10) else long[(len(long) - 1) // 2])
        return _Stretch(sample, int(length[sample]), float(change[sample]), int(way[sample]))

    @property
    def decay(self) -> float:
        """The factor by which a step back changes :attr:`state`: the geometric mean over the longest stretch of steps
        of one sample where nothing enters. NaN if there is none. The sample: of those whose stretch is at least half as
        long as the longest, the one that grows most if one grows tenfold, else the median one by its change.
        """
        return math.exp(self._stretch.log_change / self.steps) if self.steps else math.nan

    @property
    def steps(self) -> int:
        """Of this stretch."""
        return self._stretch.steps

    @property
    def change(self) -> float:
        """The norm measured at the far end of this stretch over the one at the near end."""
        log = self._stretch.log_change
        return math.nan if self.steps == 0 else math.exp(log) if log < 700 else math.inf

    @property
    def ends(self) -> tuple[float, float]:
        """:attr:`state` at this sample's last step that a gradient comes to and at its farthest."""
        return self._at_end(self.state, 0), self.farthest(self.state)

    def farthest(self, norms: Tensor) -> float:
        """``norms`` at this sample's farthest step."""
        return self._at_end(norms, -1)

    def _at_end(self, norms: Tensor, end: int) -> float:
        if self._stretch.sample is None:
            return math.nan
        come = self._back(self.state)[:, self._stretch.sample]
        begin = int((come > 0).to(torch.uint8).argmax())
        return float(self._back(norms)[:, self._stretch.sample][begin : len(come) - int(come.isnan().sum())][end])

    @property
    def memory(self) -> float:
        """Steps after which 1/e of the gradient is left, 1 / -log(:attr:`decay`); NaN if it does not fall."""
        return -1 / math.log(self.decay) if 0 < self.decay < 1 else math.nan

    @property
    def verdict(self) -> str:
        """By :attr:`change`: "vanishing" (to 0.001), "falling" (to 0.1), "steady" (to 10), "growing" (to 1000),
        "exploding" (beyond). "not finite" if some norm is not and nothing exploded: the loss was not, or a weight.
        "none" if no gradient came.

        "unknown" if nothing grows and the stretch is less than half of the way that the gradient makes back in time, or
        it is steady over less than 10 steps: with a loss at every step nothing tells how far one reaches. "clipped" if
        ``grad_clip`` is why.
        """
        verdict = next((word for limit, word in VERDICTS if self.change <= limit), "unknown")
        if verdict != "exploding" and self.state.isinf().any():
            return "not finite"
        if self._stretch.sample is None:
            return "none"
        long = 2 * self.steps >= self._stretch.way and (verdict != "steady" or self.steps >= FEW)
        if verdict in ("growing", "exploding") or long:
            return verdict
        return "clipped" if (self._cut_by_clip() & ~self._entering(NEGLIGIBLE)).any() else "unknown"


class _Stretch(NamedTuple):
    """Of a sample, None if no gradient came to any: steps where nothing enters, the logarithm of the change over them,
    and the steps back of the longest way that its gradient makes.
    """

    sample: int | None = None
    steps: int = 0
    log_change: float = math.nan
    way: int = 0


def _together(h: Tensor, c: Tensor | None) -> Tensor:
    return h if c is None else torch.hypot(h, c)


_TOO_LARGE = (
    "clip the whole gradient (torch.nn.utils.clip_grad_norm_), or what a step sends back (grad_clip=, bptt_steps= of"
    " the layer); smaller recurrent weights, fusedrnn.init.orthogonal_, a gated cell"
)
ADVICE = {
    "vanishing": "steps beyond the memory do not train: an LSTM or GRU with a bias on the gate that keeps"
    " (fusedrnn.init.chrono_, forget_bias_), fusedrnn.init.orthogonal_, or shorter sequences",
    "growing": _TOO_LARGE,
    "exploding": _TOO_LARGE,
    "unknown": "it cannot be told how far a gradient reaches, as gradients enter at most steps or pass few: record"
    " h_n[k].sum().backward(), of one layer and direction alone (k = layer * directions + direction), where h_n is the"
    " final state",
    "none": "no gradient came to the layer: is it a part of the loss",
    "clipped": "grad_clip decides what reaches the steps before: a larger limit, or none, shows how far a gradient"
    " reaches and whether it grows",
    "not finite": "look for it in the loss, the weights and the input (torch.autograd.set_detect_anomaly), or use a"
    " type of a wider range",
}
