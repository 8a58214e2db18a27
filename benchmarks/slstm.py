"""The command ``python -m benchmarks.slstm``: SLSTM beside a loop of torch operations, and with ``--peers`` beside the
step of its authors' package (xlstm, where it is installed), in the same loop.

All in turn in one process, with the same weights, after their outputs and gradients were compared. Both loops multiply
the input of all steps at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid

import fusedrnn

from . import report
from .measure import MIN_ROUNDS, Timer, run_rounds
from .own_cells import Call, check

__all__ = ["contenders"]

SHAPES = ((100, 32, 128, 128), (100, 1, 128, 128))  # T, B, I, H
Step = Callable[[Tensor, Tensor], Tensor]  # (arguments of the gates, states (4, B, H)) -> states


def step(a: Tensor, states: Tensor) -> Tensor:
    """By the paper, with the beginning of the authors' package."""
    _, c, n, m = states
    a_i, a_f, a_z, a_o = a.chunk(4, 1)
    carried = logsigmoid(a_f) + m
    m = torch.where(n == 0, a_i, torch.maximum(carried, a_i))
    i, f = torch.exp(a_i - m), torch.exp(torch.minimum(carried - m, torch.zeros_like(m)))
    c, n = f * c + i * torch.tanh(a_z), f * n + i
    return torch.stack([torch.sigmoid(a_o) * c / n, c, n, m])


def step_of_xlstm() -> Step:
    """The authors' own, without their products."""
    from xlstm.blocks.slstm.src.vanilla.slstm import slstm_forward_pointwise

    def of_xlstm(a: Tensor, states: Tensor) -> Tensor:
        return slstm_forward_pointwise(a, torch.zeros_like(a), a.new_zeros(1, a.size(1)), states, {})[0]

    return of_xlstm


def contenders(shape: Sequence[int], mode: str, peers: bool) -> dict[str, Call]:
    """What there is to time: each gives its outputs (infer) or its gradients (train)."""
    torch.manual_seed(1)
    T, B, I, H = shape
    module = fusedrnn.SLSTM(I, H)
    x, dy, weights = torch.randn(T, B, I), torch.randn(T, B, H), list(module.parameters())

    def loop(own: Step) -> Tensor:
        w_ih, w_hh, b_ih, b_hh = weights
        states, outputs = x.new_zeros(4, B, H), []
        for a in linear(x, w_ih, b_ih).unbind(0):
            states = own(a + linear(states[0], w_hh, b_hh), states)
            outputs.append(states[0])
        return torch.stack(outputs)

    def timed(function: Callable[[], Tensor]) -> Call:
        if mode == "train":
            return lambda: torch.autograd.grad(function(), weights, dy)
        return torch.no_grad()(lambda: [function()])

    calls = {"package": timed(lambda: module(x)[0]), "loop": timed(lambda: loop(step))}
    if peers:
        own = step_of_xlstm()
        calls["xlstm"] = timed(lambda: loop(own))
    return calls


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slstm", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="time for the rounds of a case")
    parser.add_argument("--peers", action="store_true", help="the step of xlstm too, which must be installed")
    args = parser.parse_args(argv)
    print(report.describe(report.machine(torch.get_num_threads())), flush=True)
    print(f"{'case':38} {'ms: package':>12}   over the package", flush=True)
    for shape, mode in product(SHAPES, ("train", "infer")):
        calls, threads = contenders(shape, mode, args.peers), torch.get_num_threads()
        check(f"slstm {mode}", calls)
        rounds, _ = run_rounds([Timer(call, threads) for call in calls.values()], args.seconds, MIN_ROUNDS)
        times = dict(zip(calls, torch.as_tensor(rounds).median(0).values.tolist(), strict=True))
        T, B, I, H = shape
        ratios = ", ".join(f"{each} {t / times['package']:.2f}" for each, t in times.items() if each != "package")
        print(f"{f'slstm {mode} T{T} B{B} I{I} H{H}':38} {1e3 * times['package']:>12.2f}   {ratios}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
