"""``python -m fusedrnn.compare CELL``: NumPy reference, torch.autograd and the fused kernel side by side, by name.

One layer, one direction, random data, a loss that touches every output. For each output and each gradient, whole and
by gate, the table shows one entry from each of the three (the one where they differ most), the largest absolute
difference of each pair, and the tolerance. The exit status is 0 if no difference exceeds its tolerance, else 1.
Below float64, compare the residual cell over short sequences: it amplifies roundings as it does gradients, (S7).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fusedrnn
from fusedrnn import reference
from fusedrnn.cells import CELLS
from fusedrnn.layer import differentiable
from fusedrnn.layer.call import LayerCall

Array = np.ndarray
Results = dict[str, Array]

# A difference may be TOLERANCE[dtype] * max(1, largest absolute value of the reference). The reference is float64
# throughout; torch and the kernel round to dtype at every step.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5, torch.bfloat16: 6e-2}

WEIGHTS = {"W_ih": "weight_ih_l0", "W_hh": "weight_hh_l0", "b_ih": "bias_ih_l0", "b_hh": "bias_hh_l0"}
PROJECTION = {"W_hr": "weight_hr_l0"}
OF_UNITS = {"W_unit": "weight_unit_l0"}
STATES = ("h0", "c0", "n0", "m0")


@dataclass(frozen=True)
class Cell:
    """One choice of the command line: its stem in ``reference``, its name in the registry, torch's counterpart."""

    stem: str
    registry: str
    torch_class: type[nn.RNNBase] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    projected: bool = False  # also without --proj


CHOICES = {
    "lstm": Cell("lstm", "lstm", nn.LSTM),
    "lstm_proj": Cell("lstm", "lstm", nn.LSTM, projected=True),
    "gru": Cell("gru", "gru", nn.GRU),
    "gru_reset_before": Cell("gru", "gru_reset_before", options={"reset_after": False}),
    "rnn": Cell("rnn", "rnn_tanh", nn.RNN),
    "rnn_relu": Cell("rnn", "rnn_relu", nn.RNN, options={"nonlinearity": "relu"}),
    "residual_rnn": Cell("residual_rnn", "residual_rnn"),
    "mgu": Cell("mgu", "mgu"),
    "peephole_lstm": Cell("peephole_lstm", "peephole_lstm"),
    "indrnn": Cell("indrnn", "indrnn_tanh"),
    "indrnn_relu": Cell("indrnn", "indrnn_relu", options={"nonlinearity": "relu"}),
    "layer_norm_lstm": Cell("layer_norm_lstm", "layer_norm_lstm"),
    "layer_norm_gru": Cell("layer_norm_gru", "layer_norm_gru"),
    "slstm": Cell("slstm", "slstm"),
}


@dataclass(frozen=True)
class Problem:
    """A cell, its inputs and parameters by name, and the gradients that reach the outputs y, h_n, c_n and so on."""

    cell: Cell
    dtype: torch.dtype
    arrays: dict[str, Array]
    d_outputs: dict[str, Array]

    @staticmethod
    def random(cell: Cell, T: int, B: int, I: int, H: int, P: int, seed: int, dtype: torch.dtype) -> Problem:
        """torch.nn's initial distribution for the parameters, normal for all else, each rounded to ``dtype``."""
        rng = np.random.default_rng(seed)
        info = CELLS[cell.registry]
        rows, bound = len(info.gates) * H, H**-0.5
        normal = {"x": (T, B, I), "h0": (B, P or H)} | {f"{state}0": (B, H) for state in info.states[1:]}
        units = (len(info.parameters) * H,)
        uniform = {
            "W_ih": (rows, I),
            "W_hh": (rows, P or H) if info.product else units,
            "b_ih": (rows,),
            "b_hh": (rows,),
        }
        uniform |= {"W_hr": (P, H)} if P else {"W_unit": units} if info.has_unit_weight else {}
        outputs = {"y": (T, B, P or H)} | {state + "_n": normal[state + "0"] for state in info.states}

        def rounded(values: Array) -> Array:
            return torch.from_numpy(values).to(dtype).double().numpy()

        arrays = {name: rounded(rng.standard_normal(shape)) for name, shape in normal.items()}
        arrays |= {"n0": rounded(1 + arrays["n0"] ** 2)} if "n0" in arrays else {}  # it divides
        arrays |= {name: rounded(rng.uniform(-bound, bound, shape)) for name, shape in uniform.items()}
        return Problem(
            cell, dtype, arrays, {name: rounded(rng.standard_normal(shape)) for name, shape in outputs.items()}
        )

    def with_gate_inputs(self) -> Problem:
        """The same problem with further inputs, all zero, added straight to the gates: their dx is da."""
        x, W_ih = self.arrays["x"], self.arrays["W_ih"]
        x = np.concatenate([x, np.zeros((*x.shape[:2], len(W_ih)))], axis=2)
        W_ih = np.concatenate([W_ih, np.eye(len(W_ih))], axis=1)
        return Problem(self.cell, self.dtype, self.arrays | {"x": x, "W_ih": W_ih}, self.d_outputs)


def reference_results(problem: Problem) -> Results:
    """Outputs, gradients and da of the NumPy reference, in float64."""
    cell = problem.cell
    forward, backward = (getattr(reference, f"{cell.stem}_{way}") for way in ("forward", "backward"))
    *outputs, caches = forward(**problem.arrays, **cell.options)
    dy, *d_final = problem.d_outputs.values()
    grads = backward(dy, caches, *d_final)
    found = dict(zip(problem.d_outputs, outputs, strict=True))
    return found | {"d" + name: grads["d" + name] for name in problem.arrays} | {"da": grads["da_ih"]}


def torch_layer(cell: Cell, x: Tensor, states: list[Tensor], weights: dict[str, nn.Parameter]) -> list[Tensor]:
    """y and the final states by torch.nn, or by the plain loop where torch.nn has no such cell."""
    if cell.torch_class is None:
        found = differentiable.layer(LayerCall(cell.registry, x, [s[None] for s in states], list(weights.values())))
        return [found.y, *(state[0] for state in found.finals)]
    P = len(weights["W_hr"]) if "W_hr" in weights else 0
    options = cell.options | ({"proj_size": P} if P else {})
    module = cell.torch_class(x.shape[2], len(weights["W_ih"]) // len(CELLS[cell.registry].gates), **options)
    for name, weight in weights.items():
        setattr(module, (WEIGHTS | PROJECTION)[name], weight)
    hx = tuple(state[None] for state in states)
    y, final = module(x, hx if len(hx) == 2 else hx[0])
    return [y, *(state[0] for state in (final if isinstance(final, tuple) else (final,)))]


def fused_layer(cell: Cell, x: Tensor, states: list[Tensor], weights: dict[str, nn.Parameter]) -> list[Tensor]:
    """y and the final states by the fused kernel."""
    hx = [state[None] for state in states]
    y, final = fusedrnn.functional.recurrent(cell.registry, x, hx, list(weights.values()))
    return [y, *(state[0] for state in final)]


def autograd_results(problem: Problem, layer: Callable[..., list[Tensor]]) -> Results:
    """Outputs, gradients and da of a layer that torch.autograd differentiates."""

    def run(problem: Problem) -> tuple[list[Tensor], dict[str, Tensor]]:
        tensors = {name: torch.from_numpy(array).to(problem.dtype) for name, array in problem.arrays.items()}
        leaves = {name: nn.Parameter(tensor) for name, tensor in tensors.items()}
        states = [leaves[name] for name in STATES if name in leaves]
        weights = {name: leaves[name] for name in (*WEIGHTS, *PROJECTION, *OF_UNITS) if name in leaves}
        outputs = layer(problem.cell, leaves["x"], states, weights)
        d_outputs = [torch.from_numpy(array).to(problem.dtype) for array in problem.d_outputs.values()]
        grads = torch.autograd.grad(outputs, list(leaves.values()), d_outputs)
        return outputs, dict(zip(leaves, grads, strict=True))

    outputs, grads = run(problem)
    _, probed = run(problem.with_gate_inputs())
    found = dict(zip(problem.d_outputs, outputs, strict=True)) | {"d" + name: grad for name, grad in grads.items()}
    found["da"] = probed["x"][..., problem.arrays["x"].shape[2] :]
    return {name: value.detach().double().numpy() for name, value in found.items()}


ENGINES: dict[str, Callable[[Problem], Results]] = {
    "reference": reference_results,
    "torch": lambda problem: autograd_results(problem, torch_layer),
    "fused": lambda problem: autograd_results(problem, fused_layer),
}


def by_gate(results: Results, gates: Sequence[str]) -> Results:
    """``results`` with da, and after the whole gradients the rows of each gate: dW_ih[i] is those of gate i."""
    whole = {name: value for name, value in results.items() if name != "da"}
    parts = {"da": np.split(results["da"], len(gates), axis=2)}
    parts |= {"d" + name: np.split(results["d" + name], len(gates)) for name in WEIGHTS}
    return whole | {f"{name}[{gate}]": part for name, of in parts.items() for gate, part in zip(gates, of, strict=True)}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    shape: tuple[int, ...]
    sample: tuple[float, float, float]
    differences: tuple[float, float, float]
    tolerance: float

    @property
    def passed(self) -> bool:
        return all(difference <= self.tolerance for difference in self.differences)  # NaN fails

    def __str__(self) -> str:
        sample = " ".join(f"{value:13.6e}" for value in self.sample)
        differences = " ".join(f"{value:9.2e}" for value in self.differences)
        verdict = "PASS" if self.passed else "FAIL"
        return f"{self.name:<9} {self.shape!s:<15} {sample} {differences} {self.tolerance:8.1e} {verdict}"


HEADER = (
    f"{'name':<9} {'shape':<15} {'reference':>13} {'torch':>13} {'fused':>13} "
    f"{'|ref-tor|':>9} {'|ref-fus|':>9} {'|tor-fus|':>9} {'tol':>8}"
)


def compare(name: str, ref: Array, torch_: Array, fused: Array, tolerance: float) -> Row:
    """The row of one quantity. The sample is the entry where two of the three differ most."""
    if not ref.shape == torch_.shape == fused.shape:
        raise ValueError(f"{name}: shapes differ: reference {ref.shape}, torch {torch_.shape}, fused {fused.shape}")
    pairs = np.stack([np.abs(ref - torch_), np.abs(ref - fused), np.abs(torch_ - fused)])
    at = np.unravel_index(pairs.max(axis=0).argmax(), ref.shape)
    largest = tuple(float(pair.max()) for pair in pairs)
    sample = (float(ref[at]), float(torch_[at]), float(fused[at]))
    return Row(name, ref.shape, sample, largest, tolerance * max(1.0, float(np.abs(ref).max())))


def at_least(least: int) -> Callable[[str], int]:
    """The type of an argument."""

    def integer(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {text}")
        return int(text)

    return integer


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fusedrnn.compare", description=__doc__.split("\n\n")[1])

    parser.add_argument("cell", choices=CHOICES)
    for name, default in (("time", 7), ("batch", 3), ("input", 5), ("hidden", 6)):
        parser.add_argument(f"--{name}", type=at_least(1), default=default, metavar="N", help=f"default {default}")
    parser.add_argument("--proj", type=at_least(1), metavar="N", help="size of a projected output, below --hidden")
    parser.add_argument("--seed", type=at_least(0), default=0, help="default 0")
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}
    parser.add_argument("--dtype", choices=dtypes, default="float64", help="default float64")
    args = parser.parse_args(argv)
    args.dtype = dtypes[args.dtype]
    if CHOICES[args.cell].projected and args.proj is None:
        args.proj = max(1, args.hidden // 2)
    if args.proj and not CELLS[CHOICES[args.cell].registry].projectable:
        parser.error(f"--proj: {args.cell} has no projection")
    if args.proj and args.proj >= args.hidden:
        parser.error(f"--proj must be smaller than --hidden, got {args.proj} and {args.hidden}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table. Returns 0 if every difference is within its tolerance, else 1."""
    args = parse(argv)
    cell = CHOICES[args.cell]
    problem = Problem.random(
        cell, args.time, args.batch, args.input, args.hidden, args.proj or 0, args.seed, args.dtype
    )
    gates = CELLS[cell.registry].gates
    results = [by_gate(ENGINES[engine](problem), gates) for engine in ("reference", "torch", "fused")]

    theirs = f"torch.nn.{cell.torch_class.__name__}" if cell.torch_class else "a plain loop of torch operations"
    print(f"{args.cell}: T={args.time} B={args.batch} I={args.input} H={args.hidden}", end="")
    print(f" P={args.proj}" if args.proj else "", f"{str(args.dtype).removeprefix('torch.')} seed={args.seed}")
    print("reference: NumPy float64, fusedrnn.reference")
    print(f"torch:     torch.autograd through {theirs}", end="")
    print("" if cell.torch_class else ": torch.nn has no such cell")
    print(f"fused:     fusedrnn.functional.recurrent({cell.registry!r}, ...), instruction set {fusedrnn._C.isa()}\n")
    print(HEADER)
    rows = [compare(name, *(found[name] for found in results), TOLERANCE[args.dtype]) for name in results[0]]
    for row in rows:
        print(row)
    failed = [row.name for row in rows if not row.passed]
    if failed:
        print(f"\nFAIL: {len(failed)} of {len(rows)} exceed their tolerance: {', '.join(failed)}")
        return 1
    worst = max(max(row.differences) / row.tolerance for row in rows)
    print(f"\nPASS: {len(rows)} quantities; the largest difference is {worst:.1e} of its tolerance")
    return 0


if __name__ == "__main__":
    sys.exit(main())
