"""How exact the numbers are, and what becomes of numbers that are not ordinary.

The error of our float32 and bfloat16 against float64 on the same values is like torch.nn's own, at most a fifth larger
in the mean; for a cell that torch.nn lacks like a plain loop's, at most a third. NaN and Inf come out
where torch's do; denormals, saturated gates and constant input give no NaN of our own. ``pytest -s`` prints the
measured table.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from loops import STATES, TWINS
from parity import (
    DEVICE,
    EMULATED,
    STEPWISE,
    Case,
    Results,
    module_results,
    ragged,
    reference_results,
    run_ours,
    run_twin,
    twin,
)
from tolerances import assert_all_close, assert_close
from torch import Tensor, nn

import fusedrnn
from fusedrnn.cells import CELLS

# The processor's products of bfloat16 take subnormal numbers for zero.
SUBNORMALS_ARE_ZERO = fusedrnn._C.isa() in ("avx512_bf16", "amx")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
SEEDS = range(8)
MARGIN_ALL, MARGIN_EACH = 1.2, 1.5  # a mean over 8 seeds is itself random, good to 5 in a hundred, a single name to 20
# Against a loop, where torch.nn has no such cell: torch.matmul's sums are more exact on some processors; and where h
# grows, each step magnifies the rounding before it.
MARGINS_LOOP = 1.35, 1.7
MARGINS_STEPWISE_NORMS = 1.7, 2.2
ERROR_CASES = {
    "T20 B4 I16 H32": {"T": 20, "B": 4, "I": 16, "H": 32},
    "T40 B3 I24 H40, 2 layers": {"T": 40, "B": 3, "I": 24, "H": 40, "num_layers": 2},
    "T12 B6 I33 H65, ragged": {"T": 12, "B": 6, "I": 33, "H": 65},
    "T20 B1 I24 H48": {"T": 20, "B": 1, "I": 24, "H": 48},
    "T20 B2 I72 H72": {"T": 20, "B": 2, "I": 72, "H": 72},
}


def errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The relative error of each name, in the 2-norm."""
    return {name: ((found[name].double() - t).norm() / t.norm()).item() for name, t in exact.items()}


@pytest.mark.parametrize("seed", range(3))
def test_sums_over_many_rows_stay_exact(seed: int) -> None:
    """Weight and bias gradients over 1e5 rows, all terms positive: relative errors of one long sum would be 5e-6.

    With W_hh = 0 and positive input, relu lets everything through: dG is dy, and each gradient a plain sum.
    """
    generator = torch.Generator().manual_seed(seed)
    T, B, I, H = 500, 200, 3, 2
    x = torch.rand(T, B, I, generator=generator)
    dy = torch.rand(T, B, H, generator=generator)
    weights = [torch.rand(H, I, generator=generator), torch.zeros(H, H), torch.zeros(H), torch.zeros(H)]
    for weight in weights:
        weight.requires_grad_()
    y, _ = fusedrnn.functional.rnn(x, None, weights, nonlinearity="relu")
    found = torch.autograd.grad(y, weights, dy)
    h = torch.cat([torch.zeros(1, B, H), y[:-1].detach()])
    exact = [torch.einsum("tbh,tbi->hi", dy.double(), by.double()) for by in (x, h)] + 2 * [dy.double().sum((0, 1))]
    for name, a, b in zip(("dw_ih", "dw_hh", "db_ih", "db_hh"), found, exact, strict=True):
        assert ((a.double() - b) / b).abs().max().item() < 2e-6, name


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", ERROR_CASES)
@pytest.mark.parametrize("cell", CELLS)
def test_error_is_like_torch_nns(
    cell: str, shape: str, dtype: torch.dtype, record_property: Callable[[str, object], None]
) -> None:
    """Geometric means over the seeds of both errors, for the table; the median of their ratio, which is judged.

    (By rounding a relu may let through for one of the two what it stops for the other: one seed may be far off.)
    """
    logs: dict[str, list[tuple[float, float]]] = {}
    for seed in SEEDS:
        case = Case(cell, dtype=dtype, seed=seed, **ERROR_CASES[shape])
        case = ragged(case) if "ragged" in shape else case
        exact = run_twin(case, torch.float64)
        ours, theirs = errors(run_ours(case), exact), errors(run_twin(case), exact)
        for name in exact:
            logs.setdefault(name, []).append((math.log(ours[name]), math.log(theirs[name])))
    table = {name: torch.tensor(pairs).mean(dim=0).exp().tolist() for name, pairs in logs.items()}
    ratio = {name: math.exp(statistics.median(a - b for a, b in pairs)) for name, pairs in logs.items()}
    print(f"\n{cell}, {shape}, {dtype}: relative error against float64, {len(SEEDS)} seeds")
    for name, (ours, theirs) in table.items():
        print(f"  {name:16} ours {ours:.2e}  torch {theirs:.2e}  ratio {ratio[name]:.2f}")
        record_property(name, f"ours {ours:.2e} torch {theirs:.2e}")
    together = math.exp(sum(math.log(r) for r in ratio.values()) / len(ratio))
    print(f"  {'all':16} ratio {together:.2f}")
    margin_all, margin_each = (MARGIN_ALL, MARGIN_EACH) if TWINS[cell].torch_layer else MARGINS_LOOP
    if CELLS[cell].norms and STEPWISE:  # on the CPU it adds up a row's values one after the other
        margin_all, margin_each = MARGINS_STEPWISE_NORMS
    assert together <= margin_all
    assert max(ratio.values()) <= margin_each, ratio


def special_inputs(x: Tensor) -> dict[str, Tensor]:
    """x with a not so ordinary number in one place."""
    found = {}
    for name, value in (("nan", math.nan), ("inf", math.inf), ("minus inf", -math.inf)):
        for place in ((0, 0, 0), (2, 1, 3), (-1, -1, -1)):
            dirty = x.detach().clone()
            dirty[place] = value
            found[f"{name} at {place}"] = dirty
    found["inf and minus inf"] = x.detach().clone()
    found["inf and minus inf"][1, 0, :2] = torch.tensor([math.inf, -math.inf])
    found["a row of nan"] = x.detach().clone()
    found["a row of nan"][1] = math.nan
    return found


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_nan_and_inf_come_out_as_torchs(cell: str, dtype: torch.dtype) -> None:
    """Outputs and gradients alike in every place, through layers and directions."""
    case = Case(cell, T=4, B=3, I=6, H=19, num_layers=2, bidirectional=True, dtype=dtype)
    module = case.module()
    for label, x in special_inputs(case.tensors()["x"]).items():
        found = module_results(module, {"x": x})
        expected = reference_results(cell, module, {"x": x})
        assert not expected["y"].isfinite().all() or "inf" in label
        for name in expected:
            assert_close(f"{label}: {name}", found[name], expected[name], dtype)


class Side:
    """A layer and all that goes into it by name, on a device: a test changes single elements of that."""

    def __init__(self, case: Case, device: torch.device, layer: Callable[[nn.Module], Callable[..., Any]]) -> None:
        module, draw = case.module().to(device), torch.Generator().manual_seed(3)
        self.call = layer(module)
        small = {name: t.detach() / 8 for name, t in case.tensors().items()}  # few sums of the largest number overflow
        self.leaves = {name: t.to(device).requires_grad_() for name, t in small.items()}
        self.leaves |= module.named_parameters()
        shapes = {"y": (case.T, case.B, case.H)} | {f"{name[0]}_n": t.shape for name, t in small.items() if name != "x"}
        self.cotangents = {
            f"d{name}": (torch.randn(shape, generator=draw, dtype=torch.float64) / 8).to(device, case.dtype)
            for name, shape in shapes.items()
        }

    def place(self, name: str, index: int, value: float) -> float:
        """Sets an element, by its place in memory; returns what it was."""
        flat = (self.leaves | self.cotangents)[name].detach().view(-1)
        before = flat[index].item()
        flat[index] = value
        return before

    def states(self) -> Tensor | tuple[Tensor, ...]:
        states = tuple(self.leaves[name] for name in STATES if name in self.leaves)
        return states if len(states) > 1 else states[0]

    def results(self) -> Results:
        y, last = self.call(self.leaves["x"], self.states())
        outputs = (y, *last) if isinstance(last, tuple) else (y, last)
        gradients = torch.autograd.grad(outputs, list(self.leaves.values()), list(self.cotangents.values()))
        named = dict(zip((name[1:] for name in self.cotangents), outputs, strict=True))
        named |= {f"d{name}": gradient for name, gradient in zip(self.leaves, gradients, strict=True)}
        return {name: t.detach().cpu() for name, t in named.items()}

    def first_steps(self, steps: int) -> Tensor:
        """y of these steps alone, without gradients: so few rows are multiplied by weights that are not packed."""
        with torch.no_grad():
            return self.call(self.leaves["x"][:steps], self.states())[0].cpu()


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_one_number_that_is_not_ordinary(cell: str, dtype: torch.dtype) -> None:
    """In any argument: NaN, inf and -inf in the same elements of every output and gradient, the others alike.

    The reference computes in the same dtype: torch.nn's module, or the plain loop for the cells that torch.nn lacks.

    *Except* sums of several numbers near the largest: their order decides whether they overflow, and torch.nn has
    another one than the loop. The gradients of the parameters are such sums, over steps and samples, where a gradient
    of an output is the largest number, and with the ReLU where a parameter is: they are not compared there. With the
    ReLU h is as large as its parameters make it, so that a quarter of the largest number stands for it in these. Norms
    square numbers and add up a row: a number whose square is finite stands for the largest there. An infinite gradient
    of an output meets itself in such sums, whose order decides what is NaN: then gradients are not compared.
    """
    case = Case(cell, T=3, B=4, I=3, H=19, dtype=dtype)
    ours, reference = Side(case, DEVICE, lambda module: module), Side(case, torch.device("cpu"), partial(twin, cell))
    info = torch.finfo(dtype)
    parameters = [name for name in ours.leaves if name.startswith(("weight", "bias"))]
    for name, argument in (ours.leaves | ours.cotangents).items():
        grows = TWINS[cell].kink and name in parameters
        largest = info.max / 4 if grows else info.max**0.5 / 64 if CELLS[cell].norms else info.max
        values = (math.inf, -math.inf, math.nan, largest, -largest, info.smallest_normal / 4, -0.0)
        last = argument.numel() - 1
        places = (0, last) if EMULATED else (0, last // 3, last // 2 + 1, last)
        for index, value in itertools.product(places, values):
            ordinary = [side.place(name, index, value) for side in (ours, reference)]
            found, expected = ours.results(), reference.results()
            first, label = ours.first_steps(2), f"{name}[{index}] = {value}"
            assert_close(f"{label}: first steps", first, expected["y"][:2])
            if abs(value) == largest and (grows or name in ours.cotangents):
                expected = {result: t for result, t in expected.items() if result[1:] not in parameters}
            if case.cell == "slstm" and not abs(value) < largest:  # 0 times inf, in the order of its exponents
                expected = {result: t for result, t in expected.items() if not result.startswith("d")}
            if CELLS[cell].norms and name in ours.cotangents and not math.isfinite(value):
                expected = {result: t for result, t in expected.items() if f"d{result}" in ours.cotangents}
            for result, right in expected.items():
                assert_close(f"{label}: {result}", found[result], right, margin=4.0 if CELLS[cell].norms else 1.0)
            for side, before in zip((ours, reference), ordinary, strict=True):
                side.place(name, index, before)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float16), ids=str)
def test_relu_and_rounding_of_any_bits(dtype: torch.dtype) -> None:
    """With W_ih = 1 and h_0 = 0, y = relu(x_1 + x_2) to the bit, x_1 of random bits: NaN, infinities, subnormals too.

    16 bits are widened exactly and rounded once, to nearest, ties to even: x_2 is of random bits too, or about as large
    as what the rounding of x_1 drops, or x_1 again, which makes the largest numbers infinite.
    """
    module = fusedrnn.RNN(2, 19, nonlinearity="relu", bias=False, dtype=dtype).requires_grad_(False)
    module.weight_ih_l0.fill_(1.0)
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    draw = torch.randint(torch.iinfo(bits).min, torch.iinfo(bits).max, (2, 1, 4096), dtype=bits).view(dtype)
    draw[0, 0, -4:] = torch.tensor([math.inf, math.nan, torch.finfo(dtype).max, -0.0])
    rounded_off = draw[0] * torch.randint(5, draw[0].shape).to(dtype) * (torch.finfo(dtype).eps / 4)
    second = torch.cat([draw[1, :, :1024], rounded_off[:, 1024:3072], draw[0, :, 3072:]], dim=1)
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    expected = torch.relu(draw[0].to(wide) + second.to(wide)).to(dtype)
    y, _ = module.to(DEVICE)(torch.stack([draw[0], second], dim=2).to(DEVICE))
    assert expected.isnan().any() and expected.isinf().any() and (expected > 0).any()
    zero = 2 * torch.finfo(dtype).tiny if SUBNORMALS_ARE_ZERO and dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(y.cpu(), expected[..., None].expand_as(y), rtol=0.0, atol=zero, equal_nan=True)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", (*DTYPES, torch.float16), ids=str)
def test_overflow_of_the_relu(dtype: torch.dtype) -> None:
    """h grows by a little less than half of the largest number a step, for three steps, and shrinks by it afterwards.

    torch.nn's is inf from the third step on. So is ours, but for float16 on the CPU's own kernels, which compute all
    steps in float32 and round y alone (docs/limits.md). The gradient of W_hh tells of it in any case.
    """
    module = fusedrnn.RNN(1, 19, nonlinearity="relu", bias=False, dtype=dtype)
    with torch.no_grad():
        module.weight_ih_l0.fill_(1.0)
        module.weight_hh_l0.copy_(torch.eye(19))
    x = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0], dtype=dtype) * (0.45 * torch.finfo(dtype).max)
    x = x[:, None, None].repeat(1, 2, 1).requires_grad_()
    found, expected = module_results(module, {"x": x}), reference_results("rnn_relu", module, {"x": x}, dtype)
    assert expected["y"][2].isinf().all() and not expected["y"][2:].isfinite().any()
    if dtype == torch.float16 and not STEPWISE:
        wide = reference_results("rnn_relu", module, {"x": x}, torch.float32)["y"]
        expected["y"], expected["h_n"] = wide.to(dtype), wide[-1:].to(dtype)
        assert expected["y"][3].isfinite().all()
    for name in ("y", "h_n"):
        assert_close(name, found[name], expected[name])
    assert not found["dweight_hh_l0"].isfinite().any()


@pytest.mark.isa
@pytest.mark.parametrize("dtype", (*DTYPES[1:], torch.float16), ids=str)
def test_overflow_of_the_residual_rnn(dtype: torch.dtype) -> None:
    """From the largest number on, 1 is added a step: float32 h of 16-bit layers gets where their own type rounds off.

    A loop in 16 bits stays at the largest number for ever. So do float32 and bfloat16; float16 overflows in 16 steps.
    """
    module = fusedrnn.ResidualRNN(1, 19, bias=False, dtype=dtype).requires_grad_(False)
    module.weight_ih_l0.fill_(100.0)
    module.weight_hh_l0.zero_()
    largest = torch.finfo(dtype).max
    x, h0 = torch.ones(20, 2, 1, dtype=dtype), torch.full((1, 2, 19), largest, dtype=dtype)
    found = module_results(module, {"x": x, "h0": h0})["y"]
    expected = (torch.arange(1, 21, dtype=torch.float32) + largest).to(dtype)[:, None, None].expand(20, 2, 19)
    assert torch.equal(found.isfinite(), expected.isfinite())
    assert torch.equal(found[found.isfinite()], expected[expected.isfinite()])
    assert expected[-1].isfinite().all() == (dtype != torch.float16)


@pytest.mark.parametrize("cell", CELLS)
def test_nan_stays_in_its_row(cell: str) -> None:
    """A sick sample says nothing about the others in its batch, and nothing about earlier steps."""
    case = Case(cell, T=5, B=4, H=19, dtype=torch.float32)
    module, x = case.module(), case.tensors()["x"].detach()
    clean = module(x)[0]
    x[2, 1] = math.nan
    y = module(x)[0]
    assert y[2:, 1].isnan().all()
    y[2:, 1] = clean[2:, 1]
    torch.testing.assert_close(y, clean)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", [name for name in CELLS if not TWINS[name].kink])
def test_saturated_gates(cell: str, dtype: torch.dtype) -> None:
    """Gate inputs of +-1e4, by x and by the biases: the limits of the activations, no NaN, gradients that vanish."""
    case = Case(cell, T=5, B=4, I=3, H=19, dtype=dtype)
    module = case.module()
    signs = torch.tensor([-1.0, 1.0, 1.0])
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("bias"):
                parameter.copy_(5e3 * signs[torch.arange(parameter.numel()) % 3])
    tensors = case.tensors()
    tensors["x"] = (tensors["x"].detach() * 10).requires_grad_()
    found = module_results(module, tensors)
    assert all(t.isfinite().all() for t in found.values())
    assert_all_close(found, reference_results(cell, module, tensors), dtype)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_denormal_huge_and_constant_input(cell: str, dtype: torch.dtype) -> None:
    case = Case(cell, T=5, B=4, I=3, H=19, dtype=dtype)
    module = case.module()
    tiny = torch.finfo(dtype).smallest_normal
    shape = case.tensors()["x"].shape
    for value in (tiny / 4, -tiny / 2, 1.0, -1.0, 0.0, 1e4, -1e4):
        tensors = {"x": torch.full(shape, value, dtype=dtype).requires_grad_()}
        found = module_results(module, tensors)
        assert all(t.isfinite().all() for t in found.values()), value
        # A weight's gradient is x times f (1 - f), which is nothing but rounding where the gate f is next to one.
        assert_all_close(found, reference_results(cell, module, tensors), dtype, margin=max(1.0, abs(value) / 300))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_over_their_whole_range(dtype: torch.dtype) -> None:
    """One unit with weight 1: h is tanh of x itself, within the rounding of the dtype, odd and bounded."""
    module = Case("rnn_tanh", T=1, I=1, H=1, bias=False, dtype=dtype).module().requires_grad_(False)
    module.weight_ih_l0.fill_(1.0)
    x = torch.cat([torch.logspace(-44, 4, 4801, dtype=torch.float64), torch.linspace(0, 30, 3001, dtype=torch.float64)])
    x = torch.cat([x, -x]).to(dtype)
    h = module.to(DEVICE)(x[None, :, None].to(DEVICE))[0].flatten().cpu()
    exact = torch.tanh(x.double())
    ulp = 2.0 ** (exact.abs().clamp_min(torch.finfo(dtype).smallest_normal).log2().floor()) * torch.finfo(dtype).eps
    subnormal = exact.abs() < torch.finfo(dtype).smallest_normal
    judged = ~subnormal if SUBNORMALS_ARE_ZERO and dtype == torch.bfloat16 else torch.ones_like(subnormal)
    assert ((h.double() - exact).abs() / ulp)[judged].max() <= 4
    assert h.abs().max() <= 1
    half = len(h) // 2
    assert torch.equal(h[:half], -h[half:])


def test_residual_rnn_keeps_what_it_adds() -> None:
    """With zero weights h_t = h_{t-1}: the identity path is exact over any number of steps, and so is its gradient."""
    case = Case("residual_rnn", T=500, B=3, H=9, dtype=torch.float32)
    module, tensors = case.module(), case.tensors()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    y, last = module(tensors["x"], tensors["h0"])
    assert torch.equal(y, tensors["h0"].expand_as(y)) and torch.equal(last, tensors["h0"])
    (dh0,) = torch.autograd.grad(last.sum(), tensors["h0"])
    assert torch.equal(dh0, torch.ones_like(dh0))
