"""Printed structs compiled with the system's compiler, for one double, and called as the drivers call them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fusedrnn.user_cells import UserCell

#: Reads x, rec, prev, unit, d, dq of one unit after another; writes what the functions of the cell write.
CALLS = """
template <class Cell>
void run(int n) {
  using namespace fusedrnn;
  constexpr int G = Cell::kGates, Z = Cell::kStates, U = Cell::kParameters, K = Cell::kSaved;
  constexpr bool two = 0 < Cell::kFirst && Cell::kFirst < G;
  for (int i = 0; i < n; ++i) {
    Values<double, G> x, rec, dx = {}, drec = {};
    Values<double, Z> state, prev, d, cur;
    UnitParameters<Cell, double> parameters = {};
    Values<double, K> saved;
    double dq, q = 0;
    const auto read = [](double* v, int count) { for (int k = 0; k < count; ++k) std::scanf("%lf", v + k); };
    const auto write = [](const double* v, int count) { for (int k = 0; k < count; ++k) std::printf("%.17g ", v[k]); };
    read(x, G), read(rec, G), read(prev, Z), read(parameters.value, U), read(d, Z), read(&dq, 1);
    for (int k = 0; k < Z; ++k) state[k] = prev[k];
    if constexpr (two) parameters.forward_first(x, rec, {prev[0]}, saved, q);
    parameters.forward(x, rec, state, saved);
    for (int k = 0; k < Z; ++k) cur[k] = K > 0 && k == 0 ? std::nan("") : state[k];
    if constexpr (Z == 2) cur[1] = Cell::candidate(saved, prev);
    parameters.backward(saved, prev, cur, d, dx, drec);
    if constexpr (two) {
      Values<double, 1> first = {d[0]};
      parameters.backward_first(saved, {prev[0]}, dq, first, dx, drec);
      d[0] = first[0], q = Cell::recurrent_operand(saved, {prev[0]});
    }
    write(state, Z), write(dx, G), write(drec, G), write(d, Z), write(parameters.gradient, U), write(&q, 1);
  }
}
"""


def run_struct(
    compiler: str,
    include: Path,
    folder: Path,
    cells: Mapping[str, UserCell],
    values: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, dict[str, Tensor]]:
    """Of each cell, results and gradients by the struct's names."""
    structs = "\n".join(re.sub("#pragma once", "", made.source()) for made in cells.values())
    calls = "\n".join(f"  run<fusedrnn::user::{made.struct}>({_count(values[n])});" for n, made in cells.items())
    top = '#include <cstdio>\n#include "functions.h"\n#include "unit_parameters.h"\n'
    program = folder / "cells.cpp"
    program.write_text(f"{top}{structs}{CALLS}int main() {{\n{calls}\n}}\n", encoding="utf-8")
    flags = ["-std=c++17", "-O0", "-Wall", "-Werror", "-Wno-unused-function", f"-I{include}"]
    subprocess.run([compiler, *flags, str(program), "-o", str(folder / "cells")], check=True)
    numbers = []
    for name, made in cells.items():
        states, units = len(made.states), len(made.parameters)
        order = [*_names(made, "x", "rec"), *_of("prev", states), *_of("unit", units), *_of("d", states), "dq"]
        numbers += torch.stack([values[name][key].flatten() for key in order], 1).flatten().tolist()
    text = " ".join(f"{v!r}" for v in numbers)
    output = subprocess.run([folder / "cells"], input=text, capture_output=True, check=True, text=True).stdout.split()
    found, at = {}, 0
    for name, made in cells.items():
        keys = [*_of("state", len(made.states)), *_names(made, "dx", "drec"), *_of("d", len(made.states))]
        keys += [*_of("dunit", len(made.parameters)), "q"]
        count = _count(values[name])
        block = torch.tensor([float(v) for v in output[at : at + count * len(keys)]], dtype=torch.float64)
        at += count * len(keys)
        columns = block.view(count, len(keys)).T
        found[name] = {k: c for k, c in zip(keys, columns, strict=True) if k != "q" or made.trace.operands}
    assert at == len(output)
    return found


def _count(values: Mapping[str, Tensor]) -> int:
    return values["x[0]"].numel()


def _names(made: UserCell, *kinds: str) -> list[str]:
    return [f"{kind}[{g}]" for kind in kinds for g in range(len(made.gates))]


def _of(kind: str, count: int) -> list[str]:
    return [f"{kind}[{k}]" for k in range(count)]
