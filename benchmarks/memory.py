"""The command ``python -m benchmarks.memory``: the memory of a training step beside torch.nn's.

*Kept*: what autograd holds between forward and backward beside the layer's input, output and parameters, counted in
values of four bytes for each step, sample and unit. *Peak*: how far the memory of a fresh process rises during its
first two steps (VmHWM of /proc, which a write to clear_refs sets back; Linux only), after a tiny layer has loaded the
libraries.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import fusedrnn

from . import report
from .cases import CASES, Case
from .measure import Problem, make_layer

SHAPES = ((100, 32, 128, 128), (50, 64, 256, 256), (1000, 8, 64, 64), (100, 32, 512, 512))
DEFAULT = [Case(cell, "train", shape).name for shape in SHAPES for cell in ("lstm", "gru", "rnn")]
HEADER = (
    f"{'case':34} {'kept, values a step, sample, unit':>36} {'peak, MiB':>26}\n"
    f"{'':34} {'torch.nn':>20} {'fusedrnn':>15} {'torch.nn':>13} {'fusedrnn':>12}"
)


def kept(library, case: Case, **options: object) -> float:
    """Values autograd keeps for each step, sample and unit, each storage once; ``options``: of a layer of ours."""
    layer, problem = make_layer(library, case, torch.float32), Problem.of(case)
    if options:
        layer.fused_options = fusedrnn.FusedOptions(**options)
    x = problem.x.float().requires_grad_()
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hx = tuple(state.float() for state in problem.hx)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output, _ = layer(x, hx if len(hx) > 1 else hx[0])
    for known in (x, output, *hx, *layer.parameters()):
        storages.pop(known.untyped_storage().data_ptr(), None)
    T, B, _, H = case.shape
    return sum(storages.values()) / (4 * T * B * H)


def rise(step: Callable[[], object]) -> float:
    """MiB by which this process's memory rises in two steps."""

    def field(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) / 1024

    Path("/proc/self/clear_refs").write_text("5")
    before = field("VmRSS")
    for _ in range(2):
        step()
    return field("VmHWM") - before


def peak_here(library, case: Case) -> float:
    """The rise of two training steps."""
    tiny = make_layer(library, Case(case.cell, "train", (2, 2, 4, 4)), torch.float32)
    tiny(torch.randn(2, 2, 4))[0].sum().backward()
    layer, problem = make_layer(library, case, torch.float32), Problem.of(case)
    return rise(problem.call(layer, torch.float32, "train"))


def peak(library: str, case: Case) -> float:
    """The same in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", "--peak-of", library, case.name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=DEFAULT, help="names of cases that train (default: four shapes)")
    parser.add_argument("--peak-of", choices=("torch", "fusedrnn"), help="print the peak of one library here, and stop")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.cases if name not in CASES or CASES[name].mode != "train"]:
        parser.error(f"no such case that trains: {', '.join(unknown)}; python -m benchmarks --all --list prints all")
    libraries = {"torch": nn, "fusedrnn": fusedrnn}
    if args.peak_of:
        print(peak_here(libraries[args.peak_of], CASES[args.cases[0]]))
        return 0
    print(report.describe(report.machine(torch.get_num_threads())), HEADER, sep="\n", flush=True)
    for name in args.cases:
        case = CASES[name]
        values = [kept(library, case) for library in libraries.values()]
        peaks = [peak(library, case) for library in libraries]
        print(f"{name:34} {values[0]:20.1f} {values[1]:15.1f} {peaks[0]:13.0f} {peaks[1]:12.0f}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
