"""The gradient's flow through time made visible: :class:`record_gradients`.

The backward kernel gives the norms of what it has in hand at each step: of dL/dh_t and dL/dc_t, all paths summed, and
of each gate's gradient. Nothing is computed twice, and nothing is kept but the norms.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .cells import CELLS
from .segments import Segments
from .torch_internals import transformed

__all__ = ["LayerGradients", "Owner", "interested", "record_gradients"]


class Owner(NamedTuple):
    """Whom a call of a layer belongs to. ``layout``: how its rows lie, if not as (T, B)."""

    module: nn.Module
    layer: int
    layout: Segments | Sequence[Tensor | None] | None = None


@dataclass(frozen=True)
class LayerGradients:
    """The norms of one layer and direction in one backward pass, on the CPU. NaN where a sample has no step.

    Attributes:
        name: of the module in the model; "" for the model itself.
        layer: which of its layers, from 0.
        direction: "forward" or "reverse".
        h: (T, B), || dL/dh_t ||, all paths: what y_t and h_{t+1} send, before it enters step t.
        c: (T, B), || dL/dc_t || likewise, for the LSTM; None for other cells.
        gates: (T, B) each, || dL/d(W_ih x_t + b_ih) || of the gate, by its name.
    """

    name: str
    layer: int
    direction: str
    h: Tensor
    c: Tensor | None
    gates: dict[str, Tensor] = field(repr=False)

    @property
    def label(self) -> str:
        """``name.layer`` and the direction."""
        return f"{self.name or 'model'}.l{self.layer}" + (" reverse" if self.direction == "reverse" else "")

    def by_lag(self) -> Tensor:
        """The geometric mean over samples of :attr:`h`, k steps back, for k = 0, 1, ... as far as there are steps.

        Back in the direction's own order, from each sample's last step that a gradient comes to: before it there is
        nothing to fall. After it a zero, as of a gradient that has vanished, counts as the smallest normal number.
        """
        norms = self.h.double()
        steps, samples = norms.shape
        count, lag = (~norms.isnan()).sum(0), torch.arange(steps).unsqueeze(1)  # a sample's steps come first
        back = (count - 1 - lag).clamp(min=0) if self.direction == "forward" else lag.expand(steps, samples)
        norms = norms.gather(0, back).where(lag < count, torch.nan)
        begin = (norms != 0).logical_and(lag < count).to(torch.uint8).argmax(0)
        from_begin = norms.gather(0, (lag + begin).clamp(max=steps - 1)).where(lag + begin < count, torch.nan)
        from_begin[:, from_begin[:1].eq(0).squeeze(0)] = torch.nan  # no gradient came to any step
        mean = from_begin.clamp(min=torch.finfo(self.h.dtype).tiny).log().nanmean(1).exp()
        return mean[: int(mean.isfinite().logical_or(mean.isinf()).sum())]

    @property
    def decay(self) -> float:
        """The factor by which the gradient changes a step back: exp of the slope of log :meth:`by_lag`, by least
        squares. NaN if a gradient came to fewer than two steps.
        """
        logs = self.by_lag().log()
        logs = logs[logs.isfinite()]
        if len(logs) < 2:
            return math.nan
        lag = torch.arange(len(logs), dtype=torch.float64)
        lag = lag - lag.mean()
        return float(((lag * logs).sum() / lag.square().sum()).exp())

    @property
    def memory(self) -> float:
        """Steps after which 1/e of the gradient is left, 1 / -log(:attr:`decay`); infinite if it does not fall."""
        return -1 / math.log(self.decay) if 0 < self.decay < 1 else math.nan if math.isnan(self.decay) else math.inf

    @property
    def verdict(self) -> str:
        """"vanishing" or "exploding" if by :attr:`decay` the gradient changes a thousandfold or more over the steps of
        :meth:`by_lag`, "exploding" also if it is not finite, "too short" below two steps, "healthy" else.
        """
        if self.not_finite:
            return "exploding"
        if math.isnan(self.decay):
            return "too short"
        change = (len(self.by_lag()) - 1) * math.log(self.decay)
        return "vanishing" if change < -math.log(1000) else "exploding" if change > math.log(1000) else "healthy"

    not_finite: bool = False


_ADVICE = {
    "vanishing": "steps beyond the memory do not train: an LSTM or GRU with a bias on the gate that keeps"
    " (fusedrnn.init.chrono_, forget_bias_), fusedrnn.init.orthogonal_, or shorter sequences",
    "exploding": "clip (torch.nn.utils.clip_grad_norm_), smaller recurrent weights, fusedrnn.init.orthogonal_, a gated"
    " cell",
}
_active: list[record_gradients] = []
_lock = threading.Lock()


class record_gradients:
    """Records the norms of the gradients through time of every backward pass inside the block.

    >>> with fusedrnn.record_gradients(model) as rec:
    ...     loss.backward()
    >>> print(rec.summary())
    >>> rec.plot("flow.png")

    The forward pass may lie before the block. :attr:`layers` holds a :class:`LayerGradients` for each layer and
    direction of each backward pass, in the order of the backward passes: the last layer first. For a loss at the last
    step alone a line shows how much of it reaches each step; with a loss at every step, the sum of what later steps
    send.

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
        self._raw: list[tuple[Owner, str, Tensor, torch.Size, Tensor | None]] = []
        self._layers: list[LayerGradients] = []

    def __enter__(self) -> record_gradients:
        with _lock:
            _active.append(self)
        return self

    def __exit__(self, *args: Any) -> None:
        with _lock:
            _active.remove(self)

    def add(self, owner: Owner | nn.Module, cell: str, norms: Tensor, x: Tensor, batch_sizes: Tensor | None) -> None:
        """A layer's norms (D, N, states + gates), as the kernel gives them."""
        if transformed():
            raise RuntimeError("record_gradients cannot look into torch.func.vmap, grad and the like")
        with _lock:
            own = owner if isinstance(owner, Owner) else Owner(owner, 0)
            self._raw.append((own, cell, norms.detach(), x.shape, batch_sizes))

    @property
    def layers(self) -> list[LayerGradients]:
        """Of each backward pass, layer and direction, in the order in which they ran."""
        with _lock:
            while self._raw:
                self._layers += self._laid_out(*self._raw.pop(0))
            return self._layers

    def _laid_out(
        self, owner: Owner, cell: str, norms: Tensor, shape: torch.Size, batch_sizes: Tensor | None
    ) -> list[LayerGradients]:
        info, found = CELLS[cell], []
        for d, rows in enumerate(norms.cpu()):
            values = _by_sample(rows, owner.layout, shape, batch_sizes).unbind(2)
            found.append(
                LayerGradients(
                    self._names[owner.module],
                    owner.layer,
                    ("forward", "reverse")[d],
                    values[0],
                    values[1] if len(info.states) == 2 else None,
                    dict(zip(info.gates, values[len(info.states) :], strict=True)),
                    not_finite=not bool(rows.isfinite().all()),
                )
            )
        return found

    def wants(self, owner: Owner | nn.Module) -> bool:
        """Whether the call is one of the model's."""
        return (owner.module if isinstance(owner, Owner) else owner) in self._names

    def summary(self) -> str:
        """A table: for each layer and direction the decay a step, the memory in steps, a verdict; and what to try."""
        layers = self._recorded()
        width = max(len("layer"), *(len(layer.label) for layer in layers))
        lines = [f"{'layer':{width}}  {'decay a step':>12}  {'memory, steps':>13}  verdict"]
        for layer in layers:
            lines.append(f"{layer.label:{width}}  {layer.decay:12.4f}  {layer.memory:13.1f}  {layer.verdict}")
        verdicts = dict.fromkeys(layer.verdict for layer in layers)
        lines += [f"{verdict}: {_ADVICE[verdict]}" for verdict in verdicts if verdict in _ADVICE]
        return "\n".join(lines)

    def plot(self, file: str | Path | None = None, *, layer: int = -1) -> Any:
        """|| dL/dh_t || over the steps back in time, a line a layer, beside a heat map by step and sample.

        Args:
            file: where to write the picture, in the format of its suffix; None: nowhere.
            layer: which of :attr:`layers` the heat map shows; the default is the last one, the first layer of a stack.

        Returns:
            The matplotlib figure.

        Raises:
            RuntimeError: nothing was recorded.
            ModuleNotFoundError: there is no matplotlib.
        """
        layers = self._recorded()
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4), layout="constrained")
        lines, heat = figure.subplots(1, 2)
        for each in layers:
            lines.semilogy(each.by_lag(), label=f"{each.label}: {each.decay:.3f} a step, {each.verdict}")
        lines.set(xlabel="steps back from the end of the sequence", ylabel="|| dL/dh ||, geometric mean over samples")
        lines.legend(fontsize="small")
        lines.grid(alpha=0.3)
        shown = layers[layer]
        tiny = torch.finfo(shown.h.dtype).tiny
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


def interested(owner: Owner | nn.Module | None) -> Sequence[record_gradients]:
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
