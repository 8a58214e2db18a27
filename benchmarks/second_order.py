"""The command ``python -m benchmarks.second_order``: derivatives of gradients, beside torch.nn's.

*penalty*: the gradient of the input, squared, differentiated by input and parameters, as WGAN-GP does. *hvp*: the
product of the Hessian by all parameters and a vector. *jvp*: the tangent of the outputs along the input, forward mode.
The whole of each is timed, first forward pass included, with the same weights, in turn, after results were compared.
Cells in a loop of Python, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

import fusedrnn

from . import report
from .cases import Case
from .measure import MIN_ROUNDS, Disagreement, Timer, make_layer, run_rounds

SHAPES = (
    (1, 8, 32, 32), (50, 16, 32, 32), (100, 4, 64, 64), (50, 32, 128, 128), (20, 64, 256, 256), (20, 128, 512, 512)
)  # fmt: skip
CELL_SHAPES = ((1, 8, 32), (20, 8, 32), (20, 1, 64), (20, 32, 256), (5, 128, 512))  # T, B, H = I


@dataclass(frozen=True)
class CellCase:
    """A cell that makes T steps in a loop of Python."""

    cell: str
    shape: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        return f"{self.cell}-" + "-".join(f"{letter}{size}" for letter, size in zip("TBIH", self.shape))

    def make(self, library: ModuleType) -> nn.Module:
        return Loop(getattr(library, self.cell)(*self.shape[2:]))


class Loop(nn.Module):
    """A cell as a layer."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        state, outputs = None, []
        for x_t in x:
            state = self.cell(x_t, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs), state


_LAYERS = [Case(cell, "train", shape) for cell in ("lstm", "gru", "rnn") for shape in SHAPES]
_CELLS = [CellCase(cell, (T, B, H, H)) for cell in ("LSTMCell", "GRUCell", "RNNCell") for T, B, H in CELL_SHAPES]
CASES: dict[str, Case | CellCase] = {case.name: case for case in (*_LAYERS, *_CELLS)}
TOLERANCE = 1e-3  # of the largest value: second derivatives in float32
HEADER = f"{'case':30} {'what':8} {'ms: fusedrnn':>12} {'torch.nn':>9}   ratio"
Call = Callable[[], list[Tensor]]


def penalty(layer: nn.Module, x: Tensor, dy: Tensor) -> Call:
    x = x.clone().requires_grad_()

    def call() -> list[Tensor]:
        (dx,) = torch.autograd.grad(layer(x)[0], x, dy, create_graph=True)
        return list(torch.autograd.grad(dx.square().sum(), [x, *layer.parameters()]))

    return call


def hvp(layer: nn.Module, x: Tensor, dy: Tensor) -> Call:
    parameters = list(layer.parameters())

    def call() -> list[Tensor]:
        gradients = torch.autograd.grad(layer(x)[0], parameters, dy, create_graph=True)
        return list(torch.autograd.grad(gradients, parameters, parameters))

    return call


def tangent(layer: nn.Module, x: Tensor, dy: Tensor) -> Call:
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    return lambda: [jvp(lambda x: functional_call(layer, parameters, (x,))[0], (x,), (x,))[1]]


WHAT = {"penalty": penalty, "hvp": hvp, "jvp": tangent}


def contenders(case: Case | CellCase, what: str) -> dict[str, Call]:
    """Calls by library. Of torch.nn's LSTM forward mode is refused in float32: there is none."""
    torch.manual_seed(1)
    T, B, I, H = case.shape
    x, dy = torch.randn(T, B, I), torch.randn(T, B, H)
    libraries = fusedrnn, nn
    if isinstance(case, CellCase):
        ours, theirs = map(case.make, libraries)
    else:
        ours, theirs = (make_layer(library, case, torch.float32) for library in libraries)
    theirs.load_state_dict(ours.state_dict())
    calls = {"fusedrnn": WHAT[what](ours, x, dy)}
    return calls if what == "jvp" and case.cell == "lstm" else calls | {"torch.nn": WHAT[what](theirs, x, dy)}


def check(case: Case | CellCase, calls: dict[str, Call]) -> None:
    """Raises Disagreement where results differ."""
    if "torch.nn" not in calls:
        return
    for i, (found, expected) in enumerate(zip(calls["fusedrnn"](), calls["torch.nn"](), strict=True)):
        scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)  # of one step dW_hh is zero
        deviation = ((found - expected).abs().max() / scale).item()
        if not deviation <= TOLERANCE:
            raise Disagreement(f"{case.name}: result {i} deviates by {deviation:.1e} of its largest value")


def measure(case: Case | CellCase, what: str, seconds: float, min_rounds: int = MIN_ROUNDS) -> str:
    """A row: medians of interleaved rounds, torch.nn's time over ours."""
    calls, threads = contenders(case, what), torch.get_num_threads()
    check(case, calls)
    rounds, _ = run_rounds([Timer(call, threads) for call in calls.values()], seconds, min_rounds)
    ms = [f"{1e3 * float(np.median(rounds[:, i])):.1f}" for i in range(len(calls))]
    ratio = f"{float(np.median(rounds[:, 1] / rounds[:, 0])):.2f}" if len(calls) > 1 else "-"
    return f"{case.name:30} {what:8} {ms[0]:>12} {(ms[1] if len(calls) > 1 else 'refused'):>9}   {ratio}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.second_order", description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--seconds", type=float, default=2.0, help="time for the rounds of a row")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.cases if name not in CASES]:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    print(report.describe(report.machine(torch.get_num_threads())), HEADER, sep="\n", flush=True)
    for name in args.cases:
        for what in WHAT if isinstance(CASES[name], Case) else ("penalty", "hvp"):
            print(measure(CASES[name], what, args.seconds), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
