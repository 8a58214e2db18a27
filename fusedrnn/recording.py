"""The gradient's flow through time made visible: :class:`record_gradients`.

The backward kernel gives the norms of what it has in hand at each step: of what later steps send to h_t and c_t, of
dL/dh_t and dL/dc_t, all paths summed, and of each gate's gradient. Nothing is computed twice, and nothing is kept but
the norms.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .cells import CELLS
from .segments import Segments
from .torch_internals import backward_pass, transformed

__all__ = ["LayerGradients", "Owner", "interested", "record_gradients"]


class Owner(NamedTuple):
    """Whom a call of a layer belongs to. ``layout``: how its rows lie, if not as (T, B).

    The graph of a call holds this, so the module, which may hold an output of the call, is held weakly.
    """

    module: weakref.ref[nn.Module]
    layer: int = 0
    layout: Segments | Sequence[Tensor | None] | None = None


#: :attr:`LayerGradients.verdict` by :attr:`LayerGradients.change`, the first whose limit is not below it.
VERDICTS = ((1e-3, "vanishing"), (0.1, "falling"), (10.0, "steady"), (1e3, "growing"), (math.inf, "exploding"))
_LEGEND = (
    "verdict, by the change: up to 0.001 vanishing, to 0.1 falling, to 10 steady, to 1000 growing, beyond it or not"
    " finite exploding"
)


@dataclass(frozen=True)
class LayerGradients:
    """The norms of one layer and direction in one call and backward pass, on the CPU. NaN where a sample has no step.

    A step back in time is a linear map of the gradient of the state: what step t sends to the state before it, over
    what has come to the state of t, is the factor of that step, whatever the loss adds at other steps.

    Attributes:
        name: of the module in the model; "" for the model itself.
        layer: which of its layers, from 0.
        direction: "forward" or "reverse".
        h: (T, B), || dL/dh_t ||, all paths: what y_t and h_{t+1} send, before it enters step t.
        c: (T, B), || dL/dc_t || likewise, for the LSTM; None for other cells.
        gates: (T, B) each, || dL/d(W_ih x_t + b_ih) || of the gate, by its name.
        from_y: (T, B), || dL/dy_t ||, what comes to h_t from outside: the loss, the layer above.
        sent_h: (T, B), the norm of what later steps (at the last one h_n) send to h_t: dL/dh_t without dL/dy_t.
        sent_c: (T, B), likewise of c_t, for the LSTM; None for other cells.
        backward: which backward pass of the block, from 0.
        call: which call of the module in that pass, from 0, the last one first.
        several: whether the block has several passes, and whether the module several calls in them.
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
    backward: int = 0
    call: int = 0
    several: tuple[bool, bool] = (False, False)
    not_finite: bool = False

    @property
    def label(self) -> str:
        """``name.layer``, the direction, and which pass and call, if there are several."""
        parts = [f"{self.name or 'model'}.l{self.layer}"]
        parts += ["reverse"] * (self.direction == "reverse")
        parts += [f"pass {self.backward}"] * self.several[0] + [f"call {self.call}"] * self.several[1]
        return " ".join(parts)

    def _back(self, norms: Tensor) -> Tensor:
        """(T, B) in the direction's order: row k is k steps back from each sample's last step, NaN where there is none.
        """
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
        come = self._back(self.h)
        norms, steps = come if norms is None else self._back(norms), len(come)
        lag = torch.arange(steps, device=norms.device).unsqueeze(1)
        there = ~come.isnan()
        begin = (come != 0).logical_and(there).to(torch.uint8).argmax(0)
        from_begin = norms.gather(0, (lag + begin).clamp(max=steps - 1)).where(lag + begin < there.sum(0), torch.nan)
        from_begin[:, come.nan_to_num(0).eq(0).all(0)] = torch.nan  # no gradient came to any step
        mean = from_begin.clamp(min=torch.finfo(self.h.dtype).tiny).log().nanmean(1).exp()
        return mean[: int(mean.isfinite().logical_or(mean.isinf()).sum())]

    @property
    def enters(self) -> str:
        """Where gradients enter from outside, by y_t or h_n: "at the last step", "at every step", "at N% of the steps",
        "nowhere".
        """
        from_y = self._back(self.from_y)
        here, steps = from_y > 0, int((~from_y.isnan()).sum())
        here[0] |= self._back(self.sent_h)[0] > 0
        if not here.any():
            return "nowhere"
        if not here[1:].any():
            return "at the last step"
        return "at every step" if int(here.sum()) == steps else f"at {100 * int(here.sum()) / steps:.0f}% of the steps"

    @property
    def decay(self) -> float:
        """The factor by which a step back changes the gradient of the state: the geometric mean over samples and steps
        of || what the step sends back || / || what has come to it ||, of h and c together for the LSTM. A step to which
        nothing comes does not count, nor one that sends nothing at all, as before a reset, unless all are so: then 0.
        NaN if there is none.
        """
        come, sent = self._back(self.h), self._back(self.sent_h)
        if self.sent_c is not None:
            of_c = self._back(self.sent_c)
            come, sent = torch.hypot(come, of_c), torch.hypot(sent, of_c)
        come, sent = come[:-1], sent[1:]
        factors = (sent / come)[come.isfinite() & sent.isfinite() & (come > 0)]
        passing = factors[factors > 0]
        return float(passing.log().mean().exp()) if len(passing) else 0.0 if len(factors) else math.nan

    @property
    def steps(self) -> int:
        """Steps back of the longest sample."""
        return max(0, int((~self.h.isnan()).sum(0).max()) - 1) if self.h.numel() else 0

    @property
    def change(self) -> float:
        """What is left, of 1, after all steps back: :attr:`decay` to the power of :attr:`steps`."""
        return self.decay**self.steps if self.steps else math.nan

    @property
    def ends(self) -> tuple[float, float]:
        """The geometric mean over samples of :attr:`h`, at the last step that a gradient comes to and at the farthest.
        """
        norms = self.by_lag()
        return (float(norms[0]), float(norms[-1])) if len(norms) else (math.nan, math.nan)

    @property
    def memory(self) -> float:
        """Steps after which 1/e of the gradient is left, 1 / -log(:attr:`decay`); NaN if it does not fall."""
        return -1 / math.log(self.decay) if 0 < self.decay < 1 else math.nan

    @property
    def verdict(self) -> str:
        """By :attr:`change`: "vanishing" (to 0.001), "falling" (to 0.1), "steady" (to 10), "growing" (to 1000),
        "exploding" (beyond, or a norm that is not finite); "unknown" where no step sends anything to another.
        """
        if self.not_finite:
            return "exploding"
        if math.isnan(self.change):
            return "unknown"
        return next(word for limit, word in VERDICTS if self.change <= limit)


_TOO_LARGE = (
    "clip the whole gradient (torch.nn.utils.clip_grad_norm_), or what a step sends back (grad_clip=, bptt_steps= of"
    " the layer); smaller recurrent weights, fusedrnn.init.orthogonal_, a gated cell"
)
_ADVICE = {
    "vanishing": "steps beyond the memory do not train: an LSTM or GRU with a bias on the gate that keeps"
    " (fusedrnn.init.chrono_, forget_bias_), fusedrnn.init.orthogonal_, or shorter sequences",
    "growing": _TOO_LARGE,
    "exploding": _TOO_LARGE,
    "unknown": "no gradient passed from a step to the one before: a loss at the last step, y[-1].sum().backward(),"
    " shows what would",
}
_active: list[record_gradients] = []
_lock = threading.Lock()


class _Call(NamedTuple):
    """What a layer's backward pass has left."""

    module: nn.Module
    layer: int
    layout: Segments | Sequence[Tensor | None] | None
    cell: str
    norms: Tensor
    from_y: Tensor
    shape: torch.Size
    batch_sizes: Tensor | None
    backward: int
    call: int


class record_gradients:
    """Records the norms of the gradients through time of every backward pass inside the block.

    >>> with fusedrnn.record_gradients(model) as rec:
    ...     loss.backward()
    >>> print(rec.summary())
    >>> rec.plot("flow.png")

    The forward pass may lie before the block. :attr:`layers` holds a :class:`LayerGradients` for each layer and
    direction of each call and backward pass, in the order in which they ran: the last layer first. What a layer's steps
    send to one another is told apart from what comes to each from outside, the loss or the layer above, so that the
    factor a step is measured with a loss at the last step and with one at every step alike.

    It records fusedrnn's sequence modules in ``model``, under any patch of the weights, on any thread; not single-step
    cells, compiled modules, or torch.nn's modules patched to our kernels.

    Args:
        model: a module that is or holds fusedrnn's RNN, LSTM, GRU or ResidualRNN.

    Raises:
        ValueError: there is no such module in it.
        RuntimeError: a backward pass inside torch.func's transforms, whose numbers belong to no single call.
    """

    def __init__(self, model: nn.Module) -> None:
        from .modules import _SequenceModule

        self._names = {module: name for name, module in model.named_modules() if isinstance(module, _SequenceModule)}
        if not self._names:
            raise ValueError("record_gradients: the model has no fusedrnn.RNN, LSTM, GRU or ResidualRNN")
        self._raw: list[_Call] = []
        self._layers: list[LayerGradients] = []
        self._passes: dict[int, int] = {}  # their numbers in the block by torch's
        self._calls: dict[tuple[int, nn.Module, int], int] = {}

    def __enter__(self) -> record_gradients:
        with _lock:
            _active.append(self)
        return self

    def __exit__(self, *args: Any) -> None:
        with _lock:
            _active.remove(self)

    def add(
        self, owner: Owner, cell: str, norms: Tensor, dy: Tensor | None, x: Tensor, batch_sizes: Tensor | None
    ) -> None:
        """A layer's norms (D, N, 2 * states + gates), as the kernel gives them, and dL/dy (T, B, D*R) or (N, D*R)."""
        if transformed():
            raise RuntimeError("record_gradients cannot look into torch.func.vmap, grad and the like")
        with _lock:
            module, layer, layout = owner.module(), owner.layer, owner.layout
            number = self._passes.setdefault(backward_pass(), len(self._passes))
            call = self._calls.get((number, module, layer), 0)
            self._calls[number, module, layer] = call + 1
            directions, rows, _ = norms.shape
            from_y = norms.new_zeros(directions, rows)
            if dy is not None and rows > 0:
                each = dy.detach().reshape(rows, directions, -1)
                from_y = torch.linalg.vector_norm(each, dim=2, dtype=norms.dtype).t()
            self._raw.append(
                _Call(module, layer, layout, cell, norms.detach(), from_y, x.shape, batch_sizes, number, call)
            )
            self._layers = []

    @property
    def layers(self) -> list[LayerGradients]:
        """Of each backward pass, call, layer and direction, in the order in which they ran."""
        with _lock:
            if not self._layers:
                several = len(self._passes) > 1, any(raw.call for raw in self._raw)
                self._layers = [layer for raw in self._raw for layer in self._laid_out(raw, several)]
            return self._layers

    def _laid_out(self, raw: _Call, several: tuple[bool, bool]) -> list[LayerGradients]:
        info, found, states = CELLS[raw.cell], [], len(CELLS[raw.cell].states)
        for d, rows in enumerate(raw.norms.cpu()):
            rows = torch.cat([rows, raw.from_y[d].cpu().unsqueeze(1)], dim=1)
            values = _by_sample(rows, raw.layout, raw.shape, raw.batch_sizes).unbind(2)
            found.append(
                LayerGradients(
                    self._names[raw.module],
                    raw.layer,
                    ("forward", "reverse")[d],
                    h=values[states],
                    c=values[states + 1] if states == 2 else None,
                    gates=dict(zip(info.gates, values[2 * states : -1], strict=True)),
                    from_y=values[-1],
                    sent_h=values[0],
                    sent_c=values[1] if states == 2 else None,
                    backward=raw.backward,
                    call=raw.call,
                    several=several,
                    not_finite=not bool(rows.isfinite().all()),
                )
            )
        return found

    def wants(self, owner: Owner) -> bool:
        """Whether the call is one of the model's."""
        return owner.module() in self._names

    def summary(self) -> str:
        """A table: for each layer and direction where gradients enter, the norm of dL/dh at the last step that they
        come to and at the farthest, the factor a step, what that makes over all steps, the memory in steps, a verdict;
        how the verdict is made, and what to try.
        """
        layers = self._recorded()
        names = "layer", "gradients enter", "last", "farthest", "factor a step", "steps", "change", "memory", "verdict"
        rows = [names]
        for each in layers:
            last, farthest = (f"{norm:.3g}" for norm in each.ends)
            memory = "-" if math.isnan(each.memory) else f"{each.memory:.1f}"
            numbers = (last, farthest, f"{each.decay:.4f}", f"{each.steps}", f"{each.change:.3g}", memory)
            rows.append((each.label, each.enters, *numbers, each.verdict))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        words = (0, 1, len(widths) - 1)
        lines = [
            "  ".join(f"{text:{width}}" if i in words else f"{text:>{width}}" for i, (text, width) in enumerate(
                zip(row, widths, strict=True)
            )).rstrip()
            for row in rows
        ]  # fmt: skip
        lines += [_LEGEND]
        verdicts = dict.fromkeys(layer.verdict for layer in layers)
        return "\n".join(lines + [f"{verdict}: {_ADVICE[verdict]}" for verdict in verdicts if verdict in _ADVICE])

    def plot(self, file: str | Path | None = None, *, layer: int = -1) -> Any:
        """|| dL/dh_t || over the steps back in time, a line a layer, with what is sent through time dashed; the gates
        of one layer; a heat map of it by step and sample.

        Args:
            file: where to write the picture, in the format of its suffix; None: nowhere.
            layer: which of :attr:`layers` the gates and the heat map are of; the default is the last one, the first
                layer of a stack.

        Returns:
            The matplotlib figure.

        Raises:
            RuntimeError: nothing was recorded.
            ModuleNotFoundError: there is no matplotlib.
        """
        layers = self._recorded()
        from matplotlib.figure import Figure

        figure = Figure(figsize=(16, 4), layout="constrained")
        lines, gates, heat = figure.subplots(1, 3)
        shown = layers[layer]
        tiny = torch.finfo(shown.h.dtype).tiny

        def draw(axes: Any, values: Tensor, begin: int = 0, **style: Any) -> Any:
            seen = values.where(values > 2 * tiny, torch.nan)[begin:]  # a zero has no place on the axis
            return axes.semilogy(range(begin, begin + len(seen)), seen, **style)[0]

        for each in layers:
            line = draw(lines, each.by_lag(), label=f"{each.label}: {each.decay:.3f} a step, {each.verdict}")
            draw(lines, each.by_lag(each.sent_h), 1, linestyle="--", color=line.get_color())
        lines.set(ylabel="geometric mean over samples", title="|| dL/dh ||; dashed: what later steps send")
        for name, norms in shown.gates.items():
            draw(gates, shown.by_lag(norms), label=name)
        gates.set(title=f"|| dL/d(gate) ||, {shown.label}")
        for axes in (lines, gates):
            axes.set(xlabel="steps back from the end of the sequence")
            axes.legend(fontsize="small")
            axes.grid(alpha=0.3)
        image = heat.imshow(shown.h.clamp(min=tiny).log10().T, aspect="auto", interpolation="nearest", origin="lower")
        heat.set(xlabel="step t", ylabel="sample", title=f"log10 || dL/dh_t ||, {shown.label}")
        figure.colorbar(image, ax=heat)
        if file is not None:
            figure.savefig(file, dpi=120)
        return figure

    def _recorded(self) -> list[LayerGradients]:
        layers = self.layers
        if not layers:
            raise RuntimeError(
                "record_gradients: no backward pass of the model's recurrent layers ran inside the block (or they were"
                " compiled, which is not recorded)"
            )
        return layers


def interested(owner: Owner | None) -> Sequence[record_gradients]:
    """The recordings under way that the call is for. (What Dynamo has compiled is nobody's.)"""
    if owner is None or not _active:
        return ()
    return [recorder for recorder in _active if recorder.wants(owner)]


def _by_sample(
    rows: Tensor, layout: Segments | Sequence[Tensor | None] | None, shape: torch.Size, batch_sizes: Tensor | None
) -> Tensor:
    """(N, Q), as the rows of a call lie, to (T, B, Q), NaN where there is none."""
    if batch_sizes is None:
        return rows.unflatten(0, shape[:2])
    if isinstance(layout, Segments):
        found = rows.new_full((layout.steps * layout.samples, rows.size(1)), torch.nan)
        return found.index_copy(0, layout.rows.cpu(), rows).unflatten(0, (layout.steps, layout.samples))
    sizes = batch_sizes.tolist()
    found = rows.new_full((len(sizes), sizes[0], rows.size(1)), torch.nan)
    for t, step in enumerate(rows.split(sizes)):
        found[t, : len(step)] = step
    unsorted = None if layout is None else layout[1]
    return found if unsorted is None else found[:, unsorted.cpu()]
