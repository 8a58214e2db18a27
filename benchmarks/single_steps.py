"""The command ``python -m benchmarks.single_steps``: cells in a loop of Python, as attention decoders use them.

*infer*: STEPS steps in inference mode. *train*: STEPS steps, the sum of all h, and its gradients with respect to the
parameters and the inputs. *once*: the same of a single step. *function*: as *train*, ours by ``fusedrnn.functional``
with weights that are no module's, torch.nn's the module. Microseconds a step, medians of interleaved rounds;
results were compared first. torch.nn runs with one thread or with all, whichever is faster for it; fusedrnn with all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import geometric_mean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fusedrnn
from fusedrnn import functional

from . import report
from .measure import MIN_ROUNDS, Disagreement, Timer, run_rounds

SHAPES = ((1, 64), (1, 256), (8, 128), (32, 256), (64, 512), (128, 512))  # B, H = I
CELLS = ("LSTMCell", "GRUCell", "RNNCell")
STEPS = 20
TOLERANCE = 1e-4  # of the largest value
HEADER = f"{'case':24} {'mode':8} {'torch.nn, us':>15} {'fusedrnn':>9}   ratio (quartiles)"
Call = Callable[[], list[Tensor]]


def infer(cell: nn.Module, x: Tensor) -> Call:
    @torch.inference_mode()
    def call() -> list[Tensor]:
        state = None
        for x_t in inputs:
            state = cell(x_t, state)
        return list(state) if isinstance(state, tuple) else [state]

    inputs = list(x)
    return call


def train(cell: nn.Module, x: Tensor) -> Call:
    def call() -> list[Tensor]:
        state, outputs = before, []
        for x_t in inputs:
            state = cell(x_t, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return list(torch.autograd.grad(torch.stack(outputs).sum(), leaves))

    inputs = [x_t.requires_grad_() for x_t in x.clone()]
    leaves = [*inputs, *cell.parameters()]
    with torch.no_grad():
        before = cell(x[0], None)
    return call


def once(cell: nn.Module, x: Tensor) -> Call:
    return train(cell, x[:1])


FUNCTIONS = {"LSTMCell": functional.lstm_cell, "GRUCell": functional.gru_cell, "RNNCell": functional.rnn_cell}


class Function(nn.Module):
    """A cell's weights, and the functional cell."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.of, self.cell, self.weights = FUNCTIONS[type(cell).__name__], cell, list(cell.parameters())

    def forward(self, x: Tensor, state: Any) -> Any:
        return self.of(x, state, *self.weights)


def by_function(cell: nn.Module, x: Tensor) -> Call:
    return train(Function(cell) if isinstance(cell, fusedrnn.fused_module.FusedModule) else cell, x)


MODES = {"infer": infer, "train": train, "once": once, "function": by_function}


def contenders(name: str, mode: str, B: int, H: int) -> tuple[Call, Call]:
    """fusedrnn's call and torch.nn's, with the same weights and inputs."""
    torch.manual_seed(1)
    theirs, ours, x = getattr(nn, name)(H, H), getattr(fusedrnn, name)(H, H), torch.randn(STEPS, B, H)
    ours.load_state_dict(theirs.state_dict())
    return MODES[mode](ours, x), MODES[mode](theirs, x)


def check(name: str, ours: Call, theirs: Call) -> None:
    """Raises Disagreement where results differ."""
    for i, (found, expected) in enumerate(zip(ours(), theirs(), strict=True)):
        deviation = ((found - expected).abs().max() / expected.abs().max()).item()
        if not deviation <= TOLERANCE:
            raise Disagreement(f"{name}: result {i} deviates by {deviation:.1e} of its largest value")


def rows(seconds: float, min_rounds: int = MIN_ROUNDS) -> Iterator[str]:
    """A row a case, then the geometric mean and the lowest ratio of each mode."""
    threads, ratios = torch.get_num_threads(), {mode: [] for mode in MODES}
    for B, H in SHAPES:
        for name in CELLS:
            for mode in MODES:
                case, calls = f"{name} B{B} H{H}", contenders(name, mode, B, H)
                check(case, *calls)
                choices = [Timer(calls[1], n) for n in sorted({1, threads})]
                best = min(choices, key=lambda timer: min(timer.sample() for _ in range(3)))
                rounds, _ = run_rounds([Timer(calls[0], threads), best], seconds, min_rounds)
                us = 1e6 / (1 if mode == "once" else STEPS) * np.median(rounds, axis=0)
                low, ratio, high = np.quantile(rounds[:, 1] / rounds[:, 0], [0.25, 0.5, 0.75])
                ratios[mode].append(ratio)
                times = f"{us[1]:10.1f} ({best.threads}t) {us[0]:9.1f}"
                yield f"{case:24} {mode:8} {times}   {ratio:.2f} ({low:.2f}-{high:.2f})"
    for mode, of_mode in ratios.items():
        yield f"{mode}: geometric mean {geometric_mean(of_mode):.2f}, lowest {min(of_mode):.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    return report.run_command("single_steps", __doc__, argv, 0.5, torch.get_num_threads(), HEADER, rows)


if __name__ == "__main__":
    raise SystemExit(main())
