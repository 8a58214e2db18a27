"""``fusedrnn.cell``: constants like the cells written by hand, derivatives like autograd's, structs that compile."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from drawn_cells import functions, made_of
from hypothesis import HealthCheck, given, settings
from struct_program import run_struct
from torch import Tensor
from written_cells import FURTHER, TWINS

import fusedrnn
from fusedrnn import user_cells
from fusedrnn.user_cells import UserCell

ROOT = Path(__file__).parent.parent
COMPILER = shutil.which("c++")
ALL = TWINS | FURTHER


def arguments_of(cell: UserCell, B: int = 3, H: int = 5, scale: float = 1.0) -> dict[str, Tensor]:
    """x, rec, states, parameters and the gradients that come in, by the names of the struct's arguments."""
    draw = lambda: scale * torch.randn(B, H, dtype=torch.float64)
    counts = {"x": len(cell.gates), "rec": len(cell.gates), "prev": len(cell.states), "d": len(cell.states)}
    counts["unit"] = len(cell.parameters)
    values = {f"{kind}[{i}]": draw() for kind, count in counts.items() for i in range(count)}
    return values | {"dq": draw()}


def by_autograd(cell: UserCell, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results and gradients of the eager step. rec of a called gate is given, and q is a result like the states."""
    names = [name for name in values if name.split("[")[0] in ("x", "rec", "prev", "unit")]
    known = {name: values[name].clone().requires_grad_() for name in names}
    of = lambda kind: [known[name] for name in names if name.split("[")[0] == kind]
    operands: list[Tensor] = []

    def product(gate: int):
        return lambda q: operands.append(q) or known[f"rec[{gate}]"]

    called = cell.trace.operands
    rec = [product(g) if g in called else known[f"rec[{g}]"] for g in range(len(cell.gates))]
    results = cell.eager(of("x"), rec, of("prev"), of("unit"))
    loss = sum((values[f"d[{i}]"] * state).sum() for i, state in enumerate(results))
    loss = loss + (values["dq"] * operands[0]).sum() if operands else loss
    gradients = torch.autograd.grad(loss, [known[name] for name in names], allow_unused=True)
    found = {f"state[{i}]": state.detach() for i, state in enumerate(results)}
    if operands:
        found["q"] = operands[0].detach()
    for name, gradient in zip(names, gradients, strict=True):
        to = {"x": "dx", "rec": "drec", "prev": "d", "unit": "dunit"}[name.split("[")[0]]
        found[to + name[name.index("[") :]] = torch.zeros_like(known[name]) if gradient is None else gradient
    return found


def by_stages(cell: UserCell, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, as a driver calls the struct's functions: backward is given neither x nor rec."""
    stages = {stage.name: stage for stage in cell.stages}
    given = {name: value for name, value in values.items() if not name.startswith(("d[", "dq", "prev"))}
    prev = {name: value for name, value in values.items() if name.startswith(("prev", "unit"))}
    given |= {name.replace("prev", "state"): value for name, value in prev.items()}
    first = stages["forward_first"].run(given | prev) if "forward_first" in stages else {}
    after = first | stages["forward"].run({**given, **first})
    later = prev | {name: value for name, value in after.items() if name.startswith("saved")}
    later |= {name.replace("state", "cur"): value for name, value in after.items() if name.startswith("state")}
    if len(cell.states) == 1 and cell.constants.kSaved > 0:
        del later["cur[0]"]  # it is h after zoneout
    incoming = {name: value for name, value in values.items() if name.startswith("d[")}
    call = "dc_of(saved, cur, d, unit)" if cell.parameters else "dc_of(saved, cur, d)"
    no_prev = {name: value for name, value in later.items() if not name.startswith("prev")} | incoming
    dc = {call: stages["dc_of"].run(no_prev)["return"]} if "dc_of" in stages else {}
    found = stages["backward"].run(later | incoming | dc)
    if "backward_first" in stages:
        found |= stages["backward_first"].run(later | found | {"dq": values["dq"]})
        operand = {name: value for name, value in later.items() if name.startswith(("saved", "prev"))}
        assert torch.equal(stages["recurrent_operand"].run(operand)["return"], after["q"])
    if "candidate" in stages:
        memory = {name: value for name, value in later.items() if name.startswith(("saved", "prev[1]"))}
        torch.testing.assert_close(stages["candidate"].run(memory)["return"], after["state[1]"], rtol=1e-13, atol=1e-14)
    return {name: value for name, value in (after | found).items() if not name.startswith("saved")}


def assert_same(cell: UserCell, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """All results by name; of a cell with two states dL/dh_{t-1} is what goes past the product: 0."""
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        given = found[name].expand_as(value)
        torch.testing.assert_close(given, value, rtol=1e-12, atol=1e-12, msg=lambda text: f"{cell.name} {name}: {text}")


@pytest.mark.parametrize("name", TWINS)
def test_constants_are_those_of_the_cell_written_by_hand(name: str) -> None:
    headers = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "csrc/cells").glob("*.h"))
    struct = headers.partition(f'kName = "{name}";')[2].partition("template")[0]
    by_hand = {key: int(value) for key, value in re.findall(r"\b(k\w+) = (\d+)", struct)}
    ours = TWINS[name].constants
    for key in ("kGates", "kStates", "kSaved", "kFirst", "kSplit", "kParameters"):
        assert getattr(ours, key) == by_hand[key], key
    assert f"Bound::{ours.kBound};" in struct


@pytest.mark.parametrize("name", ALL)
def test_the_derived_backward_pass_is_autograds(name: str) -> None:
    values = arguments_of(ALL[name])
    assert_same(ALL[name], by_stages(ALL[name], values), by_autograd(ALL[name], values))


LONG = {
    "tanh": lambda v, h: torch.tanh(v) * 0.5 + 0.4,
    "sums": lambda v, h: v + h - torch.sigmoid(v),
    "terms": lambda v, h: v + h,
    "products": lambda v, h: v * torch.sigmoid(h + v),
    "halves": lambda v, h: torch.where(v < h, -0.9 * v, torch.maximum(v * 0.8, h / 2)),
    "twice": lambda v, h: v + v,
    "squares": lambda v, h: v * v,
}


@pytest.mark.parametrize("name", LONG)
def test_chains_of_operations_may_be_long(name: str) -> None:
    @fusedrnn.cell(gates="f")
    def chained(x, rec, h):
        v = torch.sigmoid(x.f + rec.f) * 0.9
        for _ in range(200):
            v = LONG[name](v, h)
        return v * 2.0**-200 if name == "twice" else v

    assert chained.source().count("{") == chained.source().count("}")
    values = arguments_of(chained)
    assert_same(chained, by_stages(chained, values), by_autograd(chained, values))


def test_an_operand_may_be_a_long_product() -> None:
    @fusedrnn.cell(gates="f n")
    def of_a_product(x, rec, h):
        f, q = torch.sigmoid(x.f + rec.f), h
        for _ in range(200):
            q = f * -q
        return f * h + (1 - f) * torch.tanh(x.n + rec.n(q))

    values = arguments_of(of_a_product)
    assert_same(of_a_product, by_stages(of_a_product, values), by_autograd(of_a_product, values))


@pytest.mark.parametrize("name", TWINS)
def test_the_eager_step_is_the_librarys(name: str) -> None:
    """Against the plain steps of loops.py, products and biases included."""
    from loops import TWINS as LOOPS

    made, B, H, I = TWINS[name], 3, 5, 4
    rows = len(made.gates) * H
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)
    x, w_ih, b_ih, b_hh, units = draw(B, I), draw(rows, I), draw(rows), draw(rows), draw(len(made.parameters) * H)
    w_hh, states = draw(rows, H), tuple(draw(B, H) for _ in made.states)
    gates = torch.nn.functional.linear(x, w_ih, b_ih)
    product = made.constants.kFirst > 0
    parameters = units.chunk(len(made.parameters)) if made.parameters else ()
    found = made.step(gates, states, w_hh if product else None, b_hh, parameters)
    weights = [w_ih, w_hh, b_ih, b_hh, *([units] if made.parameters else [])] if product else [w_ih, units, b_ih, b_hh]
    wanted = LOOPS[name].step(x, states, *weights)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# ---- drawn cells -------------------------------------------------------------------------------------------------


@settings(suppress_health_check=list(HealthCheck))
@given(functions())
def test_drawn_cells_have_autograds_gradients(drawn: tuple[str, dict[str, str]]) -> None:
    made = made_of(*drawn)
    assert made.constants.kSaved == 0 or made.constants.kSaved >= made.constants.kGates
    values = arguments_of(made, 2, 3, scale=0.7)
    assert_same(made, by_stages(made, values), by_autograd(made, values))
    assert made.source().count("{") == made.source().count("}")


# ---- the text ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_structs_compile_and_compute_what_the_eager_step_does(tmp_path: Path) -> None:
    values = {name: arguments_of(made, 1, 4) for name, made in ALL.items()}
    found = run_struct(COMPILER, ROOT / "csrc/cells", tmp_path, ALL, values)
    for name, made in ALL.items():
        assert_same(made, found[name], by_autograd(made, values[name]))


def test_the_text_is_the_same_in_every_process() -> None:
    line = (
        "import sys, written_cells as w; sys.stdout.write(''.join(c.source() for c in (w.TWINS | w.FURTHER).values()))"
    )
    run = lambda seed: subprocess.run(
        [sys.executable, "-c", line], capture_output=True, check=True, cwd=ROOT / "tests",
        env={"PYTHONPATH": str(Path(fusedrnn.__file__).parent.parent), "PYTHONHASHSEED": seed},
    ).stdout  # fmt: skip
    assert run("1") == run("2") == "".join(made.source() for made in ALL.values()).encode()


@pytest.mark.parametrize("name", ALL)
def test_the_function_takes_tensors(name: str) -> None:
    """To step through it with a debugger."""
    cell, (B, H), draw = ALL[name], (2, 5), lambda *_: 0.2 + 0.6 * torch.rand(2, 5, dtype=torch.float64)
    weight = torch.randn(H, H, dtype=torch.float64)
    x = {gate: draw() for gate in cell.gates}
    rec = {g: (lambda q: q @ weight) if i in cell.trace.operands else draw() for i, g in enumerate(cell.gates)}
    states, parameters = list(map(draw, cell.states)), list(map(draw, cell.parameters))
    found = cell.function(SimpleNamespace(**x), SimpleNamespace(**rec), *states, *parameters)
    if not cell.trace.product:
        rec = {gate: torch.zeros(B, H, dtype=torch.float64) for gate in cell.gates}
    expected = cell.eager(list(x.values()), list(rec.values()), states, parameters)
    torch.testing.assert_close(found if isinstance(found, tuple) else (found,), expected, rtol=1e-12, atol=1e-12)


def test_functions_of_tensors_and_numbers() -> None:
    v = torch.tensor([-1.0, 0.5, 30.0], dtype=torch.float64, requires_grad=True)
    for name in ("sigmoid", "tanh", "relu", "exp", "square"):
        torch.testing.assert_close(getattr(user_cells, name)(v), getattr(torch, name)(v))
    assert user_cells.maximum(v, 0).tolist() == [0, 0.5, 30] and user_cells.minimum(1.0, v).tolist() == [-1, 0.5, 1]
    assert user_cells.where(v < 0, 0.0, v).tolist() == [0, 0.5, 30]
    torch.testing.assert_close(user_cells.softplus(v), torch.log1p(v.exp()))


def test_lines_fit_and_equations_are_numbered() -> None:
    for made in ALL.values():
        assert max(map(len, made.source().splitlines())) <= 120
        assert [line.split()[0] for line in made.equations] == [f"({i + 1})" for i in range(len(made.equations))]
