"""``python -m benchmarks.cell_choice``: what each cell does to gradients over time, and what it learns in a few steps.

Prints the four Markdown tables of docs/derivations.md, section M: gradient norms over a lag (float64, no training);
clipping; the adding problem and the next character of Python's own standard library; counting beyond the length
trained on (float32). All seeds are fixed: beside rounding, only the times depend on the machine.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss, one_hot
from tqdm import tqdm

import fusedrnn


@dataclass(frozen=True)
class Variant:
    """A cell and how it starts: ``keep`` is added to the bias of the gate that keeps the state (LSTM f, GRU z)."""

    name: str
    make: Callable[..., nn.RNNBase]
    keep: float = 0.0

    def module(self, input_size: int, hidden_size: int, scale: float = 1.0, **options) -> nn.RNNBase:
        """The layer at torch's default initialisation, W_hh times ``scale``, the bias moved by ``keep``."""
        module = self.make(input_size, hidden_size, **options)
        with torch.no_grad():
            module.weight_hh_l0 *= scale
            module.bias_ih_l0[hidden_size : 2 * hidden_size] += self.keep  # f and z are both the second gate
        return module


RNN, RESIDUAL = Variant("rnn_tanh", fusedrnn.RNN), Variant("residual_rnn", fusedrnn.ResidualRNN)
GRU, LSTM = Variant("gru", fusedrnn.GRU), Variant("lstm", fusedrnn.LSTM)
GRU_BEFORE = Variant("gru_reset_before", partial(fusedrnn.GRU, reset_after=False))


def keeping(variant: Variant, keep: float) -> Variant:
    """The variant with ``keep`` added to the bias of f or z."""
    return Variant(f"{variant.name}, {'f' if variant is LSTM else 'z'} bias +{keep:g}", variant.make, keep)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    header = list(header)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)) + "\n"


# --- gradients over a lag ---

LAGS = (10, 50, 100, 200)
SCALES = (1.0, 3.0)


def gradient_ratios(variant: Variant, lag: int, scale: float, seeds: int = 3) -> dict[str, float]:
    """||dL/ds_0|| / ||dL/dh_lag|| for each state s: the geometric mean over samples and seeds.

    L is a random linear function of h_lag alone; x is normal, I=16, H=64, B=32.
    """
    I, H, B = 16, 64, 32
    logs: dict[str, list[Tensor]] = {"h": [], "c": []}
    for seed in range(seeds):
        torch.manual_seed(seed)
        module = variant.module(I, H, scale, dtype=torch.float64)
        count = 2 if isinstance(module, nn.LSTM) else 1
        states = [torch.zeros(1, B, H, dtype=torch.float64, requires_grad=True) for _ in range(count)]
        y, _ = module(torch.randn(lag, B, I, dtype=torch.float64), tuple(states) if count == 2 else states[0])
        dh = torch.randn(B, H, dtype=torch.float64)
        grads = torch.autograd.grad(y[-1], states, dh)
        for name, grad in zip(logs, grads):
            logs[name].append((grad[0].norm(dim=1) / dh.norm(dim=1)).log().mean())
    return {name: torch.stack(values).mean().exp().item() for name, values in logs.items() if values}


def gradient_table() -> str:
    """One row a variant and state, one column a scale of W_hh and a lag."""
    columns, rows = [(scale, lag) for scale in SCALES for lag in LAGS], []
    kept = [keeping(variant, 3.0) for variant in (GRU, GRU_BEFORE, LSTM)]
    for variant in tqdm([RNN, RESIDUAL, GRU, GRU_BEFORE, LSTM, *kept], desc="gradients", leave=False):
        measured = [gradient_ratios(variant, lag, scale) for scale, lag in columns]
        for state in measured[0]:
            rows.append([variant.name, f"{state}_0", *(f"{ratios[state]:.0e}" for ratios in measured)])
    return table(["cell", "to", *(f"x{scale:g}, lag {lag}" for scale, lag in columns)], rows)


# --- tasks: a loss of (layer, head, generator) ---


def adding_loss(layer: nn.RNNBase, head: nn.Linear, generator: torch.Generator) -> Tensor:
    """Input (value, mark); the target is the sum of the two marked values, one in each half. Blind guess: 1/6."""
    T, B = 50, 32
    values, marks, row = torch.rand(T, B, generator=generator), torch.zeros(T, B), torch.arange(B)
    marks[torch.randint(0, T // 2, (B,), generator=generator), row] = 1
    marks[torch.randint(T // 2, T, (B,), generator=generator), row] = 1
    y, _ = layer(torch.stack([values, marks], dim=2))
    return mse_loss(head(y[-1])[:, 0], (values * marks).sum(0))


def character_loss(layer: nn.RNNBase, head: nn.Linear, generator: torch.Generator, *, text: Tensor) -> Tensor:
    """Cross-entropy, in nats, of the next character at every step of random windows of the text."""
    T, B = 64, 16
    codes = text[torch.randint(0, len(text) - T, (B,), generator=generator) + torch.arange(T + 1)[:, None]]
    y, _ = layer(one_hot(codes[:-1], 128).float())
    return cross_entropy(head(y).flatten(0, 1), codes[1:].flatten())


def counting(layer: nn.RNNBase, head: nn.Linear, generator: torch.Generator, T: int, B: int) -> tuple[Tensor, Tensor]:
    """Logits and target (T, B): have there been more ones than zeros so far?"""
    bits = torch.randint(0, 2, (T, B), generator=generator)
    y, _ = layer(one_hot(bits, 2).float())
    return head(y)[..., 0], ((2 * bits - 1).cumsum(0) > 0).float()


def counting_loss(layer: nn.RNNBase, head: nn.Linear, generator: torch.Generator) -> Tensor:
    return binary_cross_entropy_with_logits(*counting(layer, head, generator, T=COUNTED, B=32))


COUNTED = 32


@dataclass
class Run:
    """A layer and head in training; ``losses`` and ``norms`` (before clipping) have one entry for each step made."""

    layer: nn.RNNBase
    head: nn.Linear
    step: Callable[[Run], None]
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """The mean of the last 20 steps."""
        return statistics.fmean(self.losses[-20:])


@dataclass(frozen=True)
class Task:
    """A loss, the sizes around the layer and the length of training: ``steps``, or until the loss is below ``goal``."""

    loss: Callable[..., Tensor]
    input_size: int
    hidden_size: int
    output_size: int
    steps: int
    rate: float = 1e-2
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam
    goal: float = 0.0

    def start(self, variant: Variant, seed: int = 0, clip: float = 1.0) -> Run:
        torch.manual_seed(seed)
        layer = variant.module(self.input_size, self.hidden_size)
        head = nn.Linear(self.hidden_size, self.output_size)
        parameters = [*layer.parameters(), *head.parameters()]
        optimizer = self.optimizer(parameters, self.rate)
        generator = torch.Generator().manual_seed(seed)

        def step(run: Run) -> None:
            loss = self.loss(layer, head, generator)
            optimizer.zero_grad()
            loss.backward()
            run.norms.append(nn.utils.clip_grad_norm_(parameters, clip).item())
            optimizer.step()
            run.losses.append(loss.item())

        return Run(layer, head, step)

    def train(self, variant: Variant, seed: int, clip: float = 1.0) -> Run:
        run = self.start(variant, seed, clip)
        while len(run.losses) < self.steps and (len(run.losses) < 20 or not run.loss < self.goal):
            run.step(run)
        return run

    def times(self, variants: Iterable[Variant], rounds: int = 60) -> list[float]:
        """Median milliseconds of a training step of each variant, the variants taking turns."""
        runs = [(self.start(variant), []) for variant in variants]
        for _ in range(rounds):
            for run, times in runs:
                start = time.perf_counter()
                run.step(run)
                times.append(1e3 * (time.perf_counter() - start))
        return [statistics.median(times) for _, times in runs]

    def parameters(self, variant: Variant) -> int:
        """Of the layer, without the head."""
        return sum(p.numel() for p in variant.module(self.input_size, self.hidden_size).parameters())


def clipping_table() -> str:
    """The adding problem by plain gradient descent, with and without a bound on the gradient's norm."""
    task, rows = Task(adding_loss, 2, 32, 1, steps=200, optimizer=torch.optim.SGD), []
    for variant in tqdm([RESIDUAL, GRU], desc="clipping", leave=False):
        for clip in (math.inf, 1.0):
            runs = [task.train(variant, seed, clip) for seed in range(2)]
            largest = ", ".join(f"{max(run.norms):.0e}" for run in runs)
            rows.append([variant.name, f"{clip:g}", largest, ", ".join(f"{run.loss:.2f}" for run in runs)])
    return table(["cell", "bound", "largest gradient norm, by seed", "MSE, by seed"], rows)


def standard_library(files: int = 40) -> Tensor:
    """The text of the first ``files`` modules of the running Python's standard library, as ASCII codes."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:files]
    text = "".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)
    return torch.tensor(list(text.encode("ascii", "replace")))


def task_table() -> str:
    """Parameters of the layer, time a step (forward, backward, clipping, Adam) and progress on two tasks."""
    adding = Task(adding_loss, 2, 32, 1, steps=800, goal=0.05)
    characters = Task(partial(character_loss, text=standard_library()), 128, 128, 128, steps=150, rate=5e-3)
    variants, rows = [RNN, RESIDUAL, GRU, GRU_BEFORE, LSTM, keeping(LSTM, 1.0)], []
    timed = zip(variants, adding.times(variants), characters.times(variants), strict=True)
    for variant, adding_ms, characters_ms in tqdm(timed, desc="tasks", total=len(variants), leave=False):
        runs = [adding.train(variant, seed) for seed in range(3)]
        reached = ", ".join(str(len(run.losses)) if run.loss < adding.goal else f"({run.loss:.2f})" for run in runs)
        nats = ", ".join(f"{characters.train(variant, seed).loss:.2f}" for seed in range(2))
        sizes = [f"{task.parameters(variant):,}" for task in (adding, characters)]
        rows.append([variant.name, sizes[0], f"{adding_ms:.1f}", reached, sizes[1], f"{characters_ms:.1f}", nats])
    adding_columns = ["adding: parameters", "ms a step", "steps, by seed"]
    return table(["cell", *adding_columns, "characters: parameters", "ms a step", "nats, by seed"], rows)


def counting_table() -> str:
    """Accuracy on the last 32 of T steps for T = 32, the length of training, and 4 and 16 times that."""
    task, rows = Task(counting_loss, 2, 8, 1, steps=1500), []
    for variant in tqdm([RNN, GRU, GRU_BEFORE, LSTM, keeping(LSTM, 1.0)], desc="counting", leave=False):
        row = [variant.name]
        runs = [task.train(variant, seed) for seed in range(3)]
        for T in (COUNTED, 4 * COUNTED, 16 * COUNTED):
            accuracies = []
            for run in runs:
                with torch.no_grad():
                    logits, target = counting(run.layer, run.head, torch.Generator().manual_seed(9), T, B=200)
                accuracies.append(((logits > 0) == (target > 0))[-COUNTED:].float().mean().item())
            row.append(", ".join(f"{accuracy:.2f}" for accuracy in accuracies))
        rows.append(row)
    return table(["cell", *(f"T={n * COUNTED}, by seed" for n in (1, 4, 16))], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    torch.set_num_threads(parser.parse_args().threads)
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{versions}, {torch.get_num_threads()} thread(s), instruction set {fusedrnn._C.isa()}\n")
    for make in (gradient_table, clipping_table, task_table, counting_table):
        print(make(), flush=True)


if __name__ == "__main__":
    main()
