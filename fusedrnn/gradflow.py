"""``python -m fusedrnn.gradflow``: what reaches how far back in time, measured before and after training.

Simple cells, residual cells, both GRUs and LSTMs, at several initialisations, on the adding problem and the copy task
[Hochreiter 1997] at several lags, trained with and without clipping. Prints the Markdown tables of
docs/gradient-flow.md: the gradient's norm over the lag, and the loss; the spectral radius and the largest singular
value of each gate's block of W_hh; the product of Jacobians (R13) beside the bounds (R15) and (S7); three ways of
clipping. With --out it writes pictures, for which matplotlib is needed. All seeds are fixed: on one machine and thread
two runs print the same.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import itertools
import math
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot

import fusedrnn
from fusedrnn import init
from fusedrnn.cells import CELLS
from fusedrnn.compare import at_least

COPIED, SYMBOLS = 5, 8  # the copy task: so many of so many different ones
CLIPS = ("none", "norm", "step")
BOUND, RATE, DESCENT_RATE = 1.0, 1e-2, 0.05  # of clipping; of Adam; of plain gradient descent
ON: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}  # whatever torch's defaults


# --- tasks ---


class Task(NamedTuple):
    """A task whose answer is due in the last ``answers`` steps.

    Attributes:
        draw: (lag, batch, generator) to x (T, batch, input_size) and target (answers, batch).
        loss: (predictions (answers, batch, output_size), target) to a scalar.
        blind: the loss of the best answer that does not look at x.
    """

    input_size: int
    output_size: int
    answers: int
    draw: Callable[[int, int, Generator], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]
    blind: float


def adding(lag: int, batch: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """x (T, B, 2) of T = lag steps: a value, uniform on [0, 1), and a mark, 1 at one step of each half and 0 elsewhere.

    The target (1, B) is the sum of the two marked values. Its variance, 1/6, is the loss of a blind guess.
    """
    values, row = torch.rand(lag, batch, generator=generator, **ON), torch.arange(batch, device="cpu")
    marks = torch.zeros_like(values)
    for begin, end in ((0, lag // 2), (lag // 2, lag)):
        marks[torch.randint(begin, end, (batch,), generator=generator, device="cpu"), row] = 1
    return torch.stack([values, marks], 2), (values * marks).sum(0, keepdim=True)


def copying(lag: int, batch: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """x (T, B, SYMBOLS + 2), one-hot: COPIED random symbols, ``lag`` blanks, the call, COPIED - 1 blanks.

    T = lag + 2 COPIED. From the call on, in the last COPIED steps, the target (COPIED, B) is the symbols in order.
    """
    symbols = torch.randint(SYMBOLS, (COPIED, batch), generator=generator, device="cpu")
    codes = torch.full((lag + 2 * COPIED, batch), SYMBOLS, device="cpu")
    codes[:COPIED] = symbols
    codes[lag + COPIED] = SYMBOLS + 1
    return one_hot(codes, SYMBOLS + 2).float(), symbols


TASKS = {
    "adding": Task(2, 1, 1, adding, lambda found, target: mse_loss(found[..., 0], target.to(found.dtype)), 1 / 6),
    "copy": Task(
        SYMBOLS + 2,
        SYMBOLS,
        COPIED,
        copying,
        lambda found, target: cross_entropy(found.flatten(0, 1), target.flatten()),
        math.log(SYMBOLS),
    ),
}


# --- cells and how they start ---


class Variant(NamedTuple):
    """A layer and its initialisation; ``start`` changes torch.nn's, given the layer and the lag in steps."""

    make: Callable[..., nn.RNNBase]
    start: Callable[[nn.RNNBase, int], Any] = lambda module, lag: None


VARIANTS = {
    "rnn": Variant(fusedrnn.RNN),
    "rnn_orthogonal": Variant(fusedrnn.RNN, lambda module, lag: init.orthogonal_(module)),
    "rnn_x3": Variant(fusedrnn.RNN, lambda module, lag: module.weight_hh_l0.detach().mul_(3)),
    "residual_rnn": Variant(fusedrnn.ResidualRNN),
    "gru": Variant(fusedrnn.GRU),
    "gru_reset_before": Variant(partial(fusedrnn.GRU, reset_after=False)),
    "gru_chrono": Variant(fusedrnn.GRU, lambda module, lag: init.chrono_(module, lag)),
    "lstm_f0": Variant(fusedrnn.LSTM, lambda module, lag: init.forget_bias_(module, 0.0)),
    "lstm_f1": Variant(fusedrnn.LSTM, lambda module, lag: init.forget_bias_(module, 1.0)),
    "lstm_chrono": Variant(fusedrnn.LSTM, lambda module, lag: init.chrono_(module, lag)),
}
UNGATED = [name for name, variant in VARIANTS.items() if variant.make in (fusedrnn.RNN, fusedrnn.ResidualRNN)]
CLIPPED = ("rnn_x3", "residual_rnn", "gru", "lstm_f1")


@dataclasses.dataclass
class Run:
    """A layer and head in training, and in ``start`` as they began.

    Attributes:
        losses: the loss of each step made.
        norms: the length of the gradient of all parameters in each, before (J1).
    """

    layer: nn.RNNBase
    head: nn.Linear
    start: tuple[nn.RNNBase, nn.Linear]
    losses: list[float] = dataclasses.field(default_factory=list)
    norms: list[float] = dataclasses.field(default_factory=list)

    @property
    def loss(self) -> float:
        """The mean of the last 20 steps."""
        return statistics.fmean(self.losses[-20:])


def train(
    variant: Variant,
    task: Task,
    lag: int,
    *,
    steps: int,
    hidden: int,
    batch: int,
    seed: int = 0,
    clip: str = "norm",
    optimizer: Callable[..., torch.optim.Optimizer] = partial(torch.optim.Adam, lr=RATE),
) -> Run:
    """Train a new layer and a linear head for ``steps`` steps, or until the loss is not finite or 3 % of a blind guess.

    ``clip``: "none"; "norm", the gradient of all parameters at length BOUND at most, (J1); "step", the layer's own
    ``grad_clip``: what each sample sends back from step to step at length BOUND at most.

    Raises:
        ValueError: another ``clip``.
    """
    if clip not in CLIPS:
        raise ValueError(f"clip must be one of {', '.join(CLIPS)}, got {clip!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = variant.make(task.input_size, hidden, **ON)
        variant.start(layer, lag)
        head = nn.Linear(hidden, task.output_size, **ON)
    run = Run(layer, head, copy.deepcopy((layer, head)))
    if clip == "step":
        layer.fused_options = dataclasses.replace(layer.fused_options, grad_clip=BOUND, grad_clip_mode="norm")
    parameters = [*layer.parameters(), *head.parameters()]
    descent, generator = optimizer(parameters), Generator().manual_seed(seed)
    while len(run.losses) < steps and (len(run.losses) < 20 or run.loss > 0.03 * task.blind):
        x, target = task.draw(lag, batch, generator)
        loss = task.loss(head(layer(x)[0][-task.answers :]), target)
        descent.zero_grad()
        loss.backward()
        run.norms.append(nn.utils.clip_grad_norm_(parameters, BOUND if clip == "norm" else math.inf).item())
        run.losses.append(loss.item())
        descent.step()
        if not math.isfinite(run.losses[-1]):
            break
    layer.fused_options = dataclasses.replace(layer.fused_options, grad_clip=None)
    return run


# --- what is measured ---


def flow(layer: nn.RNNBase, head: nn.Linear, task: Task, lag: int, *, batch: int, seed: int = 1000) -> Tensor:
    """(K + 1), || dL/ds_{t-k} || / || dL/ds_t ||, k = 0 to K, t the first step of the answer, t - K the first of all.

    s is h, or the LSTM's c, which carries its gradient, (L22); the geometric mean over the samples, in float64, by
    :class:`fusedrnn.record_gradients`, to which a sample's norm below 2e-308 is 2e-308: means below 1e-150 or so may be
    too large. K is lag - 1 for adding and lag + COPIED for copy. NaN if parameters are.
    """
    layer, head = copy.deepcopy(layer).double(), copy.deepcopy(head).double()
    x, target = task.draw(lag, batch, Generator().manual_seed(seed))
    length = len(x) - task.answers + 1
    with fusedrnn.record_gradients(layer) as recorded:
        task.loss(head(layer(x.double())[0][-task.answers :]), target).backward()
    found = recorded.layers[0]
    if found.c is not None:
        found = dataclasses.replace(found, h=found.c)
    norms = found.by_lag()[task.answers - 1 :]
    return norms / norms[0] if len(norms) == length else norms.new_full((length,), torch.nan)


def spectrum(layer: nn.RNNBase) -> dict[str, tuple[float, float]]:
    """For each gate its block of W_hh: the spectral radius, max |eigenvalue|, and the largest singular value."""
    gates = CELLS[layer.mode.lower()].gates
    found = {}
    for gate, block in zip(gates, layer.weight_hh_l0.detach().double().chunk(len(gates)), strict=True):
        found[gate] = math.nan, math.nan
        if block.isfinite().all():
            radius = torch.linalg.eigvals(block).abs().max().item()
            found[gate] = radius, torch.linalg.matrix_norm(block, 2).item()
    return found


def products(layer: nn.RNNBase, x: Tensor) -> tuple[Tensor, float, float]:
    """(T + 1, B), the spectral norm of J_T J_{T-1} ... J_{T-k+1} for k = 0 to T; gamma; sigma_max; in float64.

    Simple cell, tanh: J_t = diag(1 - h_t^2) W_hh, (R13), and by (R15) the norm is at most (gamma sigma_max)^k. Residual
    cell: J_t = 1 + diag(1 - g_t^2) W_hh, (S5), and by (S7) at most (1 + gamma sigma_max)^k. gamma is the largest
    1 - h^2 or 1 - g^2 of all steps, units and samples. x is (T, B, I).

    Raises:
        ValueError: the layer is no simple or residual cell with tanh, one layer, one direction.
    """
    if layer.mode not in ("RNN_TANH", "RESIDUAL_RNN") or layer.num_layers > 1 or layer.bidirectional:
        raise ValueError(f"products needs an RNN (tanh) or ResidualRNN of one layer and direction, got {layer}")
    with torch.no_grad():
        h = copy.deepcopy(layer).double()(x.double())[0]
        W, one = layer.weight_hh_l0.double(), torch.eye(layer.hidden_size, dtype=torch.float64, device=x.device)
        residual = layer.mode == "RESIDUAL_RNN"
        slopes = 1 - (h.diff(dim=0, prepend=torch.zeros_like(h[:1])) if residual else h).square()  # (T, B, H)
        product = one.expand(x.size(1), -1, -1)
        norms = [torch.ones(x.size(1), dtype=torch.float64, device=x.device)]
        for slope in slopes.flip(0):
            product = product @ (slope.unsqueeze(2) * W + one * residual)
            finite = bool(product.isfinite().all())
            norms.append(torch.linalg.matrix_norm(product, 2) if finite else torch.full_like(norms[0], math.nan))
        sigma = torch.linalg.matrix_norm(W, 2).item() if W.isfinite().all() else math.nan
    return torch.stack(norms), slopes.max().item(), sigma


def bound(layer: nn.RNNBase, gamma: float, sigma: float, k: int) -> float:
    """(gamma sigma)^k of (R15) or, for the residual cell, (1 + gamma sigma)^k of (S7); inf where it overflows."""
    return float(torch.tensor(gamma * sigma + (layer.mode == "RESIDUAL_RNN"), dtype=torch.float64, device="cpu") ** k)


# --- tables ---


Key = tuple[str, str, int, str]  # task, cell, lag, clip
Product = tuple[str, str, nn.RNNBase, tuple[Tensor, float, float]]  # cell, "before" or "after", layer, products()


def _short(value: float) -> str:
    return "<1e-300" if 0 <= value < 1e-300 else f"{value:.0e}"


def _list(values: Iterable[float], form: str) -> str:
    return ", ".join(format(value, form) for value in values)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def flow_table(runs: dict[Key, list[Run]], flows: dict[Key, Tensor], cells: Sequence[str], task: str, lag: int) -> str:
    """Of one task and lag: the gradient's norm at the first step, before and after training; and the training."""
    header = ["cell", "before", "after, no clip", "after, clip", "a step, before", "a step, after, clip"]
    header += ["steps, no clip", "loss, no clip", "largest norm, no clip", "steps, clip", "loss, clip"]
    rows = []
    for cell in cells:
        of = [flows[task, cell, lag, when] for when in ("before", "none", "norm")]
        row = [cell, *(_short(float(norms[-1])) for norms in of)]
        row += [f"{float((norms[-1].log() / (len(norms) - 1)).exp()):.3f}" for norms in of[::2]]
        for clip in ("none", "norm"):
            group = runs[task, cell, lag, clip]
            row += [_list((len(run.losses) for run in group), "d"), _list((run.loss for run in group), ".3g")]
            if clip == "none":
                row.append(_list((max(run.norms) for run in group), ".0e"))
        rows.append(row)
    return _table(header, rows)


def spectrum_table(runs: dict[Key, list[Run]], cells: Sequence[str], tasks: Sequence[str], lag: int) -> str:
    """Spectral radius / largest singular value of each gate's block of W_hh, of seed 0, trained with clip "norm"."""
    rows = []
    for cell in cells:
        trained = [runs[task, cell, lag, "norm"][0] for task in tasks]
        columns = [spectrum(trained[0].start[0]), *(spectrum(run.layer) for run in trained)]
        for gate in columns[0]:
            rows.append([f"{cell}, {gate}", *(f"{column[gate][0]:.2f} / {column[gate][1]:.2f}" for column in columns)])
    return _table(["cell, gate", "before", *(f"after {task}" for task in tasks)], rows)


def product_table(found: Sequence[Product]) -> str:
    """The largest norm of a product of k Jacobians over 4 samples, and in brackets the bound."""
    ks = [k for k in (1, 10, 50, 200, 1000) if k < len(found[0][3][0])]
    rows = []
    for cell, when, layer, (norms, gamma, sigma) in found:
        (radius, _), *_ = spectrum(layer).values()
        row = [f"{cell}, {when}", f"{radius:.2f}", f"{sigma:.2f}", f"{gamma:.3f}"]
        for k in ks:
            row.append(f"{_short(float(norms[k].max()))} ({_short(bound(layer, gamma, sigma, k))})")
        rows.append(row)
    return _table(["cell", "spectral radius", "sigma_max", "gamma", *(f"k = {k}" for k in ks)], rows)


def clip_table(found: dict[tuple[str, str], list[Run]]) -> str:
    """Plain gradient descent with each way of clipping."""
    rows = []
    for (cell, clip), runs in found.items():
        steps = _list((len(run.losses) for run in runs), "d")
        largest = _list((max(run.norms) for run in runs), ".0e")
        rows.append([cell, clip, steps, largest, _list((run.loss for run in runs), ".3g")])
    return _table(["cell", "clip", "steps", "largest gradient norm", "loss"], rows)


# --- pictures ---


Panel = tuple[str, dict[str, list[Tensor]]]  # a title; for each label a curve, drawn solid, and others, dashed


def draw(file: Path, panels: Sequence[Sequence[Panel]], x: str, y: str, limits: tuple[float, float]) -> None:
    """Rows of panels with logarithmic y axes and one legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * len(panels[0]), 3.0 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), len(panels[0]), squeeze=False)
    for ax, (title, curves) in zip(axes.flat, itertools.chain(*panels), strict=True):
        for i, (label, lines) in enumerate(curves.items()):
            for j, line in enumerate(lines):
                style = {"linestyle": "--", "linewidth": 0.8} if j else {"label": label, "linewidth": 1.2}
                ax.semilogy(line.clamp(1e-30, 1e30), color=f"C{i % 10}", **style)
        ax.set_title(title, fontsize="medium")
        ax.set_ylim(*limits)
        ax.grid(alpha=0.3)
    for ax in axes[-1]:
        ax.set_xlabel(x)
    for ax in axes[:, 0]:
        ax.set_ylabel(y)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize="small", frameon=False)
    figure.savefig(file, dpi=65)


def pictures(
    args: argparse.Namespace,
    flows: dict[Key, Tensor],
    found: Sequence[Product],
    clipped: dict[tuple[str, str], list[Run]],
) -> None:
    """flow-TASK.png, jacobian.png and clipping.png in ``args.out``, of what there is."""
    for task in args.tasks:
        panels = [
            [
                (f"{task}, lag {lag}, {title}", {cell: [flows[task, cell, lag, when]] for cell in args.cells})
                for lag in args.lags
            ]
            for when, title in (("before", "before"), ("norm", "after"))
        ]
        draw(args.out / f"flow-{task}.png", panels, "k, steps back", "norm at k / norm at 0", (1e-20, 1e10))
    if found:
        curves: dict[str, dict[str, list[Tensor]]] = {"before": {}, "after": {}}
        for cell, when, layer, (norms, gamma, sigma) in found:
            limit = torch.tensor([bound(layer, gamma, sigma, k) for k in range(len(norms))], device="cpu")
            curves[when][cell] = [norms.amax(1), limit]
        panels = [[(f"{when} training", lines) for when, lines in curves.items()]]
        draw(args.out / "jacobian.png", panels, "k", "norm of k Jacobians; dashed: bound", (1e-20, 1e20))
    if clipped:
        cells = dict.fromkeys(cell for cell, _ in clipped)
        norms = {key: [torch.tensor(runs[0].norms, device="cpu")] for key, runs in clipped.items()}
        panels = [[(f"clip: {clip}", {cell: norms[cell, clip] for cell in cells}) for clip in CLIPS]]
        draw(args.out / "clipping.png", panels, "training step", "norm of the gradient, before (J1)", (1e-3, 1e12))


# --- the command ---


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fusedrnn.gradflow",
        description=__doc__.split("\n\n")[1],
        epilog="Without options it takes 19 minutes on two cores, with --quick a few seconds.",
    )

    parser.add_argument("--cells", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default all")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default both")
    parser.add_argument("--lags", nargs="+", type=at_least(3), metavar="N", help="default 50 200 1000")
    steps = "of training, one for all lags or one for each; default 600 400 30, with other lags 30000 / lag"
    parser.add_argument("--steps", nargs="+", type=at_least(1), metavar="N", help=steps)
    parser.add_argument("--hidden", type=at_least(1), metavar="N", help="default 64")
    parser.add_argument("--seeds", type=at_least(1), metavar="N", help="how many, from 0; default 2")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write pictures; none by default")
    parser.add_argument("--quick", action="store_true", help="small: what is not given is 10 20, 8, 16 and 1")
    args = parser.parse_args(argv)
    steps = [600, 400, 30] if args.lags is None else [max(1, 30000 // lag) for lag in args.lags]
    defaults = ([10, 20], [8], 16, 1) if args.quick else ([50, 200, 1000], steps, 64, 2)
    for name, value in zip(("lags", "steps", "hidden", "seeds"), defaults, strict=True):
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.steps = args.steps * len(args.lags) if len(args.steps) == 1 else args.steps
    if len(args.steps) != len(args.lags):
        parser.error(f"--steps must be one number or one for each of {len(args.lags)} lags, got {len(args.steps)}")
    args.batch = 8 if args.quick else 32
    if args.out is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--out needs matplotlib: pip install matplotlib")
    return args


def trainings(args: argparse.Namespace, key: Key, steps: int, optimizer: Callable[..., Any]) -> list[Run]:
    """One run a seed."""
    task, cell, lag, clip = key
    of = {"steps": steps, "hidden": args.hidden, "batch": args.batch, "clip": clip, "optimizer": optimizer}
    return [train(VARIANTS[cell], TASKS[task], lag, seed=seed, **of) for seed in range(args.seeds)]


def experiment(args: argparse.Namespace) -> tuple[dict[Key, list[Run]], dict[Key, Tensor]]:
    """The runs, one a seed, with clip "none" and "norm"; :func:`flow` after each and "before", geometric mean."""
    runs: dict[Key, list[Run]] = {}
    flows: dict[Key, Tensor] = {}
    steps = dict(zip(args.lags, args.steps, strict=True))
    for key in itertools.product(args.tasks, args.cells, steps, ("none", "norm")):
        task, cell, lag, clip = key
        print(f"training {cell} on {task}, lag {lag}, clip {clip}", file=sys.stderr)
        runs[key] = trainings(args, key, steps[lag], partial(torch.optim.Adam, lr=RATE))
        measured = {clip: [(run.layer, run.head) for run in runs[key]], "before": [run.start for run in runs[key]]}
        for when, models in measured.items():
            if (task, cell, lag, when) not in flows:
                found = [flow(*model, TASKS[task], lag, batch=args.batch) for model in models]
                flows[task, cell, lag, when] = torch.stack(found).log().mean(0).exp()
    return runs, flows


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables and, with --out, writes flow-TASK.png, jacobian.png and clipping.png. Returns 0."""
    args = parse(argv)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    versions = f"fusedrnn {fusedrnn.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{versions}, {torch.get_num_threads()} thread(s), instruction set {fusedrnn._C.isa()}")
    print(f"H={args.hidden} B={args.batch}, seeds 0 to {args.seeds - 1}, Adam at {RATE:g}, clip at {BOUND:g}\n")

    runs, flows = experiment(args)
    for task, (lag, steps) in itertools.product(args.tasks, zip(args.lags, args.steps, strict=True)):
        print(f"### {task}, lag {lag}, at most {steps} steps; blind guess {TASKS[task].blind:.3f}\n")
        print(flow_table(runs, flows, args.cells, task, lag))

    task, lag, steps = args.tasks[0], args.lags[len(args.lags) // 2], args.steps[len(args.lags) // 2]
    print(f"### Spectral radius / largest singular value, lag {lag}\n")
    print(spectrum_table(runs, args.cells, args.tasks, lag))

    found: list[Product] = []
    x, _ = TASKS[task].draw(lag, 4, Generator().manual_seed(1000))
    for cell in (cell for cell in args.cells if cell in UNGATED):
        run = runs[task, cell, lag, "norm"][0]
        found += [(cell, when, of, products(of, x)) for when, of in (("before", run.start[0]), ("after", run.layer))]
    if found:
        print(f"### Products of Jacobians (bound), {task}, lag {lag}\n")
        print(product_table(found))

    descent = partial(torch.optim.SGD, lr=DESCENT_RATE)
    pairs = itertools.product((cell for cell in CLIPPED if cell in args.cells), CLIPS)
    clipped = {(cell, clip): trainings(args, (task, cell, lag, clip), steps, descent) for cell, clip in pairs}
    if clipped:
        print(f"### Clipping, gradient descent at {DESCENT_RATE:g}, {task}, lag {lag}, at most {steps} steps\n")
        print(clip_table(clipped))
    if args.out is not None:
        pictures(args, flows, found, clipped)
    return 0


if __name__ == "__main__":
    sys.exit(main())
