"""The gradient's flow through time made visible: :class:`record_gradients`.

The backward kernel gives the norms of what it has in hand at each step: of what later steps send to h_t and c_t, of
dL/dh_t and dL/dc_t, all paths summed, and of each gate's gradient. Nothing is computed twice, and nothing is kept but
the norms. What they say: :mod:`fusedrnn.insight.layer_gradients`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..cells import CELLS
from ..layer.call import LayerCall, OutputGradients, Owner, parted_rows
from ..layer.listeners import listening, lock
from ..layer.segments import Segments
from ..options import HasOptions
from ..torch_internals import backward_pass, transformed
from .layer_gradients import ADVICE, LEGEND, LayerGradients

_RNNBase = nn.RNNBase  # people give names of torch.nn to our classes


class _Call(NamedTuple):
    """What a layer's backward pass has left; ``fields`` of its :class:`LayerGradients`."""

    cell: str
    norms: Tensor
    outside: list[Tensor]
    layout: Segments | Sequence[Tensor | None] | None
    shape: torch.Size
    batch_sizes: Tensor | None
    fields: dict[str, Any]


def _is_eager(module: HasOptions) -> bool:
    return module._cell in CELLS and CELLS[module._cell].eager


class record_gradients:
    """Records the norms of the gradients through time of every backward pass inside the block.

    >>> with fusedrnn.record_gradients(model) as rec:
    ...     loss.backward()
    >>> print(rec.summary())
    >>> rec.plot("flow.png")

    The forward pass may lie before the block. :attr:`layers` holds a :class:`LayerGradients` for each layer and
    direction of each call and backward pass, in the order in which they ran: the last layer first. What a layer's steps
    send to one another is told apart from what comes to each from outside, the loss or the layer above. How far a
    gradient reaches is measured where nothing else comes in between, with a loss at the last step: in a stack
    ``h_n[k].sum().backward()`` for each layer and direction k of the final state.

    It records fusedrnn's sequence modules in ``model``, under any patch of the weights, on any thread; not single-step
    cells, compiled modules, or torch.nn's modules patched to our kernels. A checkpoint with ``use_reentrant=True`` runs
    backward passes of its own, which are counted as such.

    Args:
        model: a module that is or holds fusedrnn's RNN, LSTM, GRU or ResidualRNN.

    Raises:
        ValueError: there is no such module in it, or an eager one.
        RuntimeError: a backward pass inside torch.func's transforms, whose numbers belong to no single call, or on the
            meta device, where there are none.
    """

    def __init__(self, model: nn.Module) -> None:
        ours = [(name, module) for name, module in model.named_modules() if isinstance(module, HasOptions)]
        self._names = {module: name for name, module in ours if isinstance(module, _RNNBase)}
        if not self._names:
            raise ValueError("record_gradients: the model has no fusedrnn.RNN, LSTM, GRU or ResidualRNN")
        if eager := [name or type(module).__name__ for module, name in self._names.items() if _is_eager(module)]:
            raise ValueError(f"record_gradients: made with eager=True, without kernels that give norms: {eager}")
        self._raw: list[_Call] = []
        self._layers: list[LayerGradients] = []
        self._passes: dict[int, int] = {}  # their numbers in the block by torch's
        self._calls: dict[tuple[int, nn.Module, int], int] = {}

    def __enter__(self) -> record_gradients:
        with lock:
            listening.append(self)
        return self

    def __exit__(self, *args: Any) -> None:
        with lock:
            listening.remove(self)

    def add(self, call: LayerCall, gradients: OutputGradients, norms: Tensor) -> None:
        """A layer's norms (D, N, 2 * states + gates), as the kernel gives them, for these gradients of its outputs."""
        if transformed():
            raise RuntimeError("record_gradients cannot look into torch.func.vmap, grad and the like")
        if norms.is_meta:
            raise RuntimeError("record_gradients: gradients on the meta device have no norms")
        with lock:
            module, layer, layout = call.owner.module(), call.owner.layer, call.owner.layout
            number = self._passes.setdefault(backward_pass(), len(self._passes))
            index = self._calls[number, module, layer] = self._calls.get((number, module, layer), -1) + 1
            fields = {"name": self._names[module], "layer": layer, "backward": number, "call": index}
            fields["cut"] = call.options.bptt_steps > 0 or (isinstance(layout, Segments) and not layout.uncut)
            fields["clip"] = call.options.clip
            of_states = gradients.y, *parted_rows(call.info, gradients.c, call.directions)
            outside = [_norms_of(d, norms) for d in of_states]
            found = _Call(call.cell, norms.detach(), outside, layout, call.x.shape, call.batch_sizes, fields)
            self._raw.append(found)
            self._layers = []

    @property
    def layers(self) -> list[LayerGradients]:
        """Of each backward pass, call, layer and direction, in the order in which they ran."""
        with lock:
            if not self._layers:
                several = len(self._passes) > 1, any(raw.fields["call"] for raw in self._raw)
                self._layers = [layer for raw in self._raw for layer in self._laid_out(raw, several)]
            return self._layers

    def _laid_out(self, raw: _Call, several: tuple[bool, bool]) -> list[LayerGradients]:
        info, found, states = CELLS[raw.cell], [], len(CELLS[raw.cell].states)
        for d, rows in enumerate(raw.norms.cpu()):
            rows = torch.cat([rows, *(norms[d].cpu().unsqueeze(1) for norms in raw.outside)], dim=1)
            rows = rows.nan_to_num(torch.inf, torch.inf)  # NaN says that there is no step
            values = _by_sample(rows, raw.layout, raw.shape, raw.batch_sizes).unbind(2)
            found.append(
                LayerGradients(
                    **raw.fields,
                    direction=("forward", "reverse")[d],
                    h=values[states],
                    c=values[states + 1] if states > 1 else None,
                    gates=dict(zip(info.gates, values[2 * states : -states], strict=True)),
                    from_y=values[-states],
                    from_c=values[-states + 1] if states > 1 else None,
                    sent_h=values[0],
                    sent_c=values[1] if states > 1 else None,
                    further={name: values[states + k] for k, name in enumerate(info.states) if k > 1},
                    several=several,
                )
            )
        return found

    def wants(self, owner: Owner) -> bool:
        """Whether the call is one of the model's."""
        return owner.module() in self._names

    def summary(self) -> str:
        """A table: for each layer and direction where gradients enter; the norms at the last step that they come to and
        at the farthest, and there what enters apart from what later steps send; the steps of the longest stretch where
        nothing enters, the change over it, the factor a step, the memory in steps; a verdict. Below it how the verdict
        is made, and what to try.
        """
        layers = self._recorded()
        header = ("layer", "gradients enter", "last", "farthest", "outside", "sent", "steps", "change", "factor a step")
        rows = [(*header, "memory", "verdict")]
        for each in layers:
            norms = (*each.ends, each.farthest(each.outside), each.farthest(each.sent))
            change, factor, memory = (
                "-" if math.isnan(value) else format(value, form)
                for value, form in ((each.change, ".3g"), (each.decay, ".4f"), (each.memory, ".1f"))
            )
            ends = ("-" if math.isnan(norm) else f"{norm:.3g}" for norm in norms)
            numbers = (*ends, f"{each.steps}", change, factor, memory)
            rows.append((each.label, each.enters, *numbers, each.verdict))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        words = (0, 1, len(widths) - 1)
        lines = [
            "  ".join(f"{text:{width}}" if i in words else f"{text:>{width}}" for i, (text, width) in enumerate(
                zip(row, widths, strict=True)
            )).rstrip()
            for row in rows
        ]  # fmt: skip
        lines += [LEGEND]
        verdicts = dict.fromkeys(layer.verdict for layer in layers)
        return "\n".join(lines + [f"{verdict}: {ADVICE[verdict]}" for verdict in verdicts if verdict in ADVICE])

    def plot(self, file: str | Path | None = None, *, layer: int = -1) -> Any:
        """|| dL/dh_t || over the steps back in time, a line a layer, with what is sent through time dashed and what
        enters from outside dotted; the gates of one layer; a heat map of || dL/dh_t || by step and sample.

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
            return axes.semilogy(range(begin, begin + len(seen)), seen.numpy(), **style)[0]

        for each in layers:
            factor = f" {each.decay:.3f} a step," if each.steps else ""
            line = draw(lines, each.by_lag(), label=f"{each.label}:{factor} {each.verdict}")
            draw(lines, each.by_lag(each.sent_h), 1, linestyle="--", color=line.get_color())
            draw(lines, each.by_lag(each.from_y), linestyle=":", marker=".", markersize=3, color=line.get_color())
        title = "|| dL/dh ||; dashed: sent by later steps; dotted: from outside"
        lines.set(ylabel="geometric mean over samples", title=title)
        for name, norms in shown.gates.items():
            draw(gates, shown.by_lag(norms), label=name)
        gates.set(title=f"|| dL/d(gate) ||, {shown.label}")
        for axes in (lines, gates):
            axes.set(xlabel="steps back from the end of the sequence")
            axes.legend(fontsize="small")
            axes.grid(alpha=0.3)
        norms = shown.h.clamp(min=tiny).log10().T.numpy()
        image = heat.imshow(norms, aspect="auto", interpolation="nearest", origin="lower")
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


def _norms_of(d: Tensor | None, like: Tensor) -> Tensor:
    """(D, N), the norm of each direction's columns of d (T, B, D*H) or (N, D*H); zeros for None."""
    directions, rows, _ = like.shape
    if d is None or rows == 0:
        return like.new_zeros(directions, rows)
    return torch.linalg.vector_norm(d.detach().reshape(rows, directions, -1), dim=2, dtype=like.dtype).t()


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
