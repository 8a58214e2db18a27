"""The command ``python -m benchmarks.per_sample``: the gradients of every sample apart, as differential privacy and
influence functions need them.

*fusedrnn*: ``torch.func.vmap(torch.func.grad(loss))``. *loop*: torch.nn's layer, a sample after the other. *Opacus*:
its DPLSTM, DPGRU or DPRNN in a GradSampleModule, if it is installed (requirements-peers.txt). All in turn in one
process, with the same weights, after their gradients were compared; the peak of memory each in a process of its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import fusedrnn

from . import report
from .cases import Case
from .measure import MIN_ROUNDS, Disagreement, Timer, make_layer, run_rounds
from .memory import rise

SHAPES = ((50, 32, 64, 64), (100, 64, 128, 128))
CASES = {case.name: case for shape in SHAPES for cell in ("lstm", "gru", "rnn") if (case := Case(cell, "train", shape))}
TOLERANCE = 1e-4  # of the largest value, between libraries, in float32
LIBRARIES = ("fusedrnn", "loop", "opacus")
HEADER = (
    f"{'case':30} {'ms: fusedrnn':>12} {'loop':>8} {'opacus':>8} {'MiB: fusedrnn':>14} {'loop':>5} {'opacus':>6}"
    "   over fusedrnn"
)
Gradients = Callable[[], dict[str, Tensor]]


def by_map(layer: nn.Module, x: Tensor, dy: Tensor) -> Gradients:
    """One mapped call."""
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor, dy: Tensor) -> Tensor:
        return (functional_call(layer, parameters, (x.unsqueeze(1),))[0].squeeze(1) * dy).sum()

    each = vmap(grad(loss), (None, 1, 1))
    return lambda: each(parameters, x, dy)


def by_loop(layer: nn.Module, x: Tensor, dy: Tensor) -> Gradients:
    """A call a sample."""
    parameters = dict(layer.named_parameters())

    def gradients() -> dict[str, Tensor]:
        each = []
        for b in range(x.size(1)):
            loss = (layer(x[:, b : b + 1])[0] * dy[:, b : b + 1]).sum()
            each.append(torch.autograd.grad(loss, list(parameters.values())))
        return {name: torch.stack(parts) for name, parts in zip(parameters, zip(*each, strict=True), strict=True)}

    return gradients


def by_opacus(layer: nn.Module, x: Tensor, dy: Tensor) -> Gradients:
    """Opacus's layer with the weights of ``layer``, its hooks and one backward pass."""
    warnings.filterwarnings("ignore", message="Full backward hook")  # of its own hooks, at each call
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.grad_sample import GradSampleModule
        from opacus.layers import DPGRU, DPLSTM, DPRNN

        theirs = {"LSTM": DPLSTM, "GRU": DPGRU, "RNN": DPRNN}[type(layer).__name__](layer.input_size, layer.hidden_size)
        theirs.load_state_dict(layer.state_dict())
        module = GradSampleModule(theirs, batch_first=False, loss_reduction="sum")

    def gradients() -> dict[str, Tensor]:
        module.zero_grad(set_to_none=True)
        (module(x)[0] * dy).sum().backward()
        parameters = module._module.state_dict(keep_vars=True)
        return {name: parameter.grad_sample for name, parameter in parameters.items()}

    return gradients


def contenders(case: Case) -> dict[str, Gradients]:
    """What there is to time, by name."""
    torch.manual_seed(1)
    T, B, I, H = case.shape
    x, dy = torch.randn(T, B, I), torch.randn(T, B, H)
    ours, theirs = (make_layer(library, case, torch.float32) for library in (fusedrnn, nn))
    theirs.load_state_dict(ours.state_dict())
    calls = {"fusedrnn": by_map(ours, x, dy), "loop": by_loop(theirs, x, dy)}
    if importlib.util.find_spec("opacus"):
        calls["opacus"] = by_opacus(theirs, x, dy)
    return calls


def check(case: Case, calls: dict[str, Gradients]) -> None:
    """Raises Disagreement where the gradients are not the loop's."""
    expected = calls["loop"]()
    for library, call in calls.items():
        found = call()
        for name, t in expected.items():
            deviation = ((found[name] - t).abs().max() / t.abs().max()).item()
            if not deviation <= TOLERANCE:
                raise Disagreement(f"{case.name}: {library}: {name} deviates by {deviation:.1e} of its largest value")


def measure(case: Case, seconds: float, min_rounds: int = MIN_ROUNDS) -> dict:
    """Milliseconds, medians of interleaved rounds; the loop's and Opacus's time over ours, medians of the rounds'."""
    calls, threads = contenders(case), torch.get_num_threads()
    check(case, calls)
    rounds, _ = run_rounds([Timer(call, threads) for call in calls.values()], seconds, min_rounds)
    return {
        "ms": {name: 1e3 * float(np.median(rounds[:, i])) for i, name in enumerate(calls)},
        "ratio": {name: float(np.median(rounds[:, i] / rounds[:, 0])) for i, name in enumerate(calls) if i},
    }


def peak(library: str, case: Case) -> float:
    """MiB by which a fresh process's memory rises in two calls."""
    command = [sys.executable, "-m", "benchmarks.per_sample", "--peak-of", library, case.name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.per_sample", description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for the rounds of a case")
    parser.add_argument("--peak-of", choices=LIBRARIES, help="print one library's peak, and stop")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.cases if name not in CASES]:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    if args.peak_of:
        case = CASES[args.cases[0]]
        contenders(Case(case.cell, "train", (2, 2, 4, 4)))[args.peak_of]()  # loads what it needs
        print(rise(contenders(case)[args.peak_of]))
        return 0
    print(report.describe(report.machine(torch.get_num_threads())), HEADER, sep="\n", flush=True)
    for name in args.cases:
        found = measure(CASES[name], args.seconds)
        peaks = {library: peak(library, CASES[name]) for library in found["ms"]}
        ms = [f"{found['ms'][library]:.1f}" if library in found["ms"] else "none" for library in LIBRARIES]
        mib = [f"{peaks[library]:.0f}" if library in peaks else "none" for library in LIBRARIES]
        ratios = ", ".join(f"{library} {ratio:.2f}" for library, ratio in found["ratio"].items())
        columns = f"{ms[0]:>12} {ms[1]:>8} {ms[2]:>8} {mib[0]:>14} {mib[1]:>5} {mib[2]:>6}"
        print(f"{name:30} {columns}   {ratios}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
