"""What the commands share that time a layer beside loops of torch operations (own_cells, layer_norm, slstm): the calls,
their comparison, the rounds and the rows that are printed.

All contenders of a case are timed in turn in one process, after their outputs (infer) or gradients (train) were
compared with the loop's.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import torch
from torch import Tensor

from . import report
from .measure import MIN_ROUNDS, Disagreement, Timer, run_rounds

__all__ = ["MODES", "SHAPES", "Beside", "Call", "Data", "Reading", "parser", "print_rows", "title_of"]

MODES = ("train", "infer")
SHAPES = ((100, 32, 128, 128), (100, 1, 128, 128))  # T, B, I, H
Call = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Data:
    """What every contender of a case is given."""

    mode: str
    x: Tensor  # (T, B, I)
    dy: Tensor  # (T, B, H)

    @classmethod
    def drawn(cls, shape: Sequence[int], mode: str) -> Data:
        T, B, I, H = shape
        return cls(mode, torch.randn(T, B, I), torch.randn(T, B, H))

    def call(self, function: Callable[[], Tensor], weights: Iterable[Tensor]) -> Call:
        """Of a function that gives the layer's outputs: in training, the gradients of these weights."""
        weights = list(weights)
        if self.mode == "train":
            return lambda: torch.autograd.grad(function(), weights, self.dy)
        return torch.no_grad()(lambda: [function()])

    def of_layer(self, module: torch.nn.Module) -> Call:
        return self.call(lambda: module(self.x)[0], module.parameters())

    def of_loop(self, loop: Callable[[Tensor, list[Tensor]], Tensor], weights: Iterable[Tensor]) -> Call:
        weights = [weight.detach().requires_grad_(self.mode == "train") for weight in weights]
        return self.call(lambda: loop(self.x, weights), weights)


@dataclass(frozen=True)
class Reading:
    """Medians of interleaved rounds: milliseconds of the first contender, each other's time over the first's."""

    milliseconds: float
    ratios: dict[str, float]


@dataclass(frozen=True)
class Beside:
    """The contenders of a case. The first is the layer, one is ``loop``; those in ``others`` compute something else."""

    title: str
    calls: dict[str, Call]
    tolerance: float = 1e-4  # of the largest value, in float32
    others: frozenset[str] = field(default_factory=frozenset)

    def check(self) -> None:
        """Raises Disagreement where a contender's results are not the loop's."""
        expected = self.calls["loop"]()
        for contender in self.calls.keys() - self.others:
            for found, right in zip(self.calls[contender](), expected, strict=True):
                deviation = ((found - right).abs().max() / right.abs().max()).item()
                if not deviation <= self.tolerance:
                    raise Disagreement(f"{self.title}: {contender} deviates by {deviation:.1e} of the largest value")

    def measure(self, seconds: float, min_rounds: int = MIN_ROUNDS) -> Reading:
        """Compares, then times."""
        for _ in range(2):  # TorchScript and torch.compile specialise
            self.check()
        threads = torch.get_num_threads()
        rounds, _ = run_rounds([Timer(call, threads) for call in self.calls.values()], seconds, min_rounds)
        ratios = np.median(rounds / rounds[:, :1], axis=0)
        return Reading(
            1e3 * float(np.median(rounds[:, 0])),
            {name: float(ratios[i]) for i, name in enumerate(self.calls) if i},
        )


def parser(command: str, description: str, cells: Iterable[str]) -> argparse.ArgumentParser:
    """The options that the commands share."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{command}", description=description.splitlines()[0])
    made.add_argument("cells", nargs="*", metavar="cell", help=f"of {', '.join(cells)}; all of them if none is named")
    made.add_argument("--only", default="", metavar="REGEX", help="cases whose title has it: 'train T100 B32 I128'")
    made.add_argument("--seconds", type=float, default=3.0, help="time for the rounds of a case")
    return made


def print_rows(
    command: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    cells: Iterable[str],
    shapes: Iterable[Sequence[int]],
    contenders: Callable[[str, Sequence[int], str, argparse.Namespace], Beside],
) -> None:
    """Runs the command: a row for each cell, shape and mode."""
    args, cells = command.parse_args(argv), list(cells)
    if unknown := [name for name in args.cells if name not in cells]:
        command.error(f"no such cell: {', '.join(unknown)}; there are {', '.join(cells)}")
    print(report.describe(report.machine(torch.get_num_threads())), flush=True)
    print(f"{'case':38} {'ms: layer':>10}   over the layer", flush=True)
    for name, shape, mode in product(args.cells or cells, shapes, MODES):
        if not re.search(args.only, title_of(name, shape, mode)):
            continue
        torch.manual_seed(1)
        beside = contenders(name, shape, mode, args)
        reading = beside.measure(args.seconds)
        ratios = ", ".join(f"{each} {ratio:.2f}" for each, ratio in reading.ratios.items())
        print(f"{beside.title:38} {reading.milliseconds:>10.2f}   {ratios}", flush=True)


def title_of(name: str, shape: Sequence[int], mode: str) -> str:
    T, B, I, H = shape
    return f"{name} {mode} T{T} B{B} I{I} H{H}"
