"""Proof of the NumPy reference: central differences for every gradient, torch.autograd by name, published values.

The last part proves the proof: every sign in every backward function of the reference is flipped once, and each
flip must fail the central-difference check.
"""

from __future__ import annotations

import ast
import inspect
import types
from dataclasses import dataclass
from functools import cache

import numpy as np
import pytest
import torch
from tolerances import TOLERANCE

from fusedrnn import reference
from fusedrnn.cells import CELLS, CellInfo
from fusedrnn.compare import CHOICES
from fusedrnn.reference import cells, layers, textbook

T, B, I, H, R = 3, 2, 3, 4, 2

EXACT = TOLERANCE[torch.float64]
# Central differences with step 3e-6 err by truncation (step^2) and by rounding (1 / step), 7e-10 at most here.
NUMERICAL = 1e-8


@dataclass(frozen=True)
class Case:
    """A cell as the tests see it: its function names' stem, its entry in the registry, and options."""

    stem: str
    info: CellInfo
    options: dict
    projection: bool

    def problem(self, scope: str, bias: bool, seed: int = 0) -> tuple[dict, list]:
        """The arguments by name, and a random gradient for each output, of the ``cell`` or of the ``layer``."""
        rng = np.random.default_rng(seed)
        rec = R if self.projection else H
        suffix = "_prev" if scope == "cell" else "0"
        shapes = {"x": (B, I) if scope == "cell" else (T, B, I)}
        shapes |= {state + suffix: (B, rec if state == "h" else H) for state in self.info.states}
        rows, units = len(self.info.gates) * H, (len(self.info.parameters) * H,)
        shapes |= {"W_ih": (rows, I), "W_hh": (rows, rec) if self.info.product else units}
        shapes |= {"W_unit": units} if self.info.has_unit_weight else {}
        shapes |= {"b_ih": (rows,), "b_hh": (rows,)} if bias else {}
        shapes |= {"W_hr": (R, H)} if self.projection else {}
        outputs = [shapes[state + suffix] for state in self.info.states]
        outputs = outputs if scope == "cell" else [(T, B, rec), *outputs]
        arrays = {name: 0.5 * rng.standard_normal(shape) for name, shape in shapes.items()}
        return arrays, [rng.standard_normal(shape) for shape in outputs]

    def forward(self, scope: str, arrays: dict, module: types.ModuleType = reference) -> tuple[list, list]:
        """Outputs, and what the backward function needs."""
        name = f"{self.stem}_cell_forward" if scope == "cell" else f"{self.stem}_forward"
        *outputs, caches = getattr(module, name)(**arrays, **self.options)
        return outputs, caches

    def backward(self, scope: str, d_outputs: list, caches: list, module: types.ModuleType = reference) -> dict:
        if scope == "cell":
            return getattr(module, f"{self.stem}_cell_backward")(*d_outputs, caches)
        dy, *d_final = d_outputs
        return getattr(module, f"{self.stem}_backward")(dy, caches, *d_final)


CASES = {
    name: Case(cell.stem, CELLS[cell.registry], cell.options, projection=name.endswith("_proj"))
    for name, cell in CHOICES.items()
}


def test_every_cell_has_a_reference() -> None:
    assert {cell.registry for cell in CHOICES.values()} == set(CELLS)


@cache
def numerical_gradients(name: str, scope: str, bias: bool) -> dict[str, np.ndarray]:
    """(L(v + s) - L(v - s)) / 2s for each element v, L the sum of all outputs times their random gradients."""
    case, step = CASES[name], 3e-6
    arrays, d_outputs = case.problem(scope, bias)

    def loss() -> float:
        outputs, _ = case.forward(scope, arrays)
        return sum(float((out * d_out).sum()) for out, d_out in zip(outputs, d_outputs, strict=True))

    grads = {}
    for argument, array in arrays.items():
        grad = grads["d" + argument] = np.empty_like(array)
        for index in np.ndindex(array.shape):
            value = array[index]
            array[index] = value + step
            above = loss()
            array[index] = value - step
            grad[index] = (above - loss()) / (2 * step)
            array[index] = value
    return grads


def largest_errors(name: str, scope: str, bias: bool, module: types.ModuleType = reference) -> dict[str, float]:
    """By gradient, the largest difference of the reference's backward from central differences."""
    case = CASES[name]
    arrays, d_outputs = case.problem(scope, bias)
    _, caches = case.forward(scope, arrays, module)
    grads = case.backward(scope, d_outputs, caches, module)
    expected = numerical_gradients(name, scope, bias)
    assert grads.keys() == expected.keys() | {"da_ih", "da_hh"}
    assert all(grads[key].shape == value.shape for key, value in expected.items())
    return {key: float(np.abs(grads[key] - value).max()) for key, value in expected.items()}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("scope", ["cell", "layer"])
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_central_differences(name: str, scope: str, bias: bool) -> None:
    errors = largest_errors(name, scope, bias)
    assert max(errors.values()) < NUMERICAL, errors


@pytest.mark.parametrize("name", CASES)
def test_gate_gradients(name: str) -> None:
    """da_ih is the gradient of inputs added straight to the gates; da_hh sums to db_hh, but where norms are between."""
    case = CASES[name]
    arrays, d_outputs = case.problem("layer", bias=True)
    grads = case.backward("layer", d_outputs, case.forward("layer", arrays)[1])
    width = len(case.info.gates) * H
    probed = arrays | {
        "x": np.concatenate([arrays["x"], np.zeros((T, B, width))], axis=2),
        "W_ih": np.concatenate([arrays["W_ih"], np.eye(width)], axis=1),
    }
    probe = case.backward("layer", d_outputs, case.forward("layer", probed)[1])
    np.testing.assert_allclose(grads["da_ih"], probe["dx"][..., I:], rtol=0, atol=EXACT)
    if not case.info.norms:
        np.testing.assert_allclose(grads["da_hh"].sum((0, 1)), grads["db_hh"], rtol=0, atol=EXACT)


def test_missing_final_gradients_are_zero() -> None:
    case = CASES["lstm"]
    arrays, (dy, dh_n, dc_n) = case.problem("layer", bias=True)
    _, caches = case.forward("layer", arrays)
    left_out = layers.lstm_backward(dy, caches)
    zeros = layers.lstm_backward(dy, caches, np.zeros_like(dh_n), np.zeros_like(dc_n))
    for key, value in zeros.items():
        np.testing.assert_array_equal(left_out[key], value)


def test_unknown_nonlinearity_is_an_error() -> None:
    arrays, _ = CASES["rnn"].problem("layer", bias=True)
    with pytest.raises(ValueError, match="nonlinearity must be 'tanh' or 'relu', got 'sine'"):
        reference.rnn_forward(**arrays, nonlinearity="sine")


# --- torch.autograd, name by name ---

TORCH = {
    "rnn": lambda **kw: torch.nn.RNN(I, H, **kw),
    "rnn_relu": lambda **kw: torch.nn.RNN(I, H, nonlinearity="relu", **kw),
    "lstm": lambda **kw: torch.nn.LSTM(I, H, **kw),
    "lstm_proj": lambda **kw: torch.nn.LSTM(I, H, proj_size=R, **kw),
    "gru": lambda **kw: torch.nn.GRU(I, H, **kw),
}
PARAMETERS = {"W_ih": "weight_ih", "W_hh": "weight_hh", "b_ih": "bias_ih", "b_hh": "bias_hh", "W_hr": "weight_hr"}


def leaf(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.copy()).requires_grad_()


def weights_of(module: torch.nn.RNNBase, suffix: str, grad: bool = False) -> dict[str, np.ndarray]:
    """The parameters (or their gradients) of one layer and direction, by the reference's names."""
    found = {name: getattr(module, theirs + suffix, None) for name, theirs in PARAMETERS.items()}
    return {name: (p.grad if grad else p.detach()).numpy() for name, p in found.items() if p is not None}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", TORCH)
def test_agrees_with_torch_by_name(name: str, bias: bool) -> None:
    case = CASES[name]
    arrays, d_outputs = case.problem("layer", bias)
    module = TORCH[name](bias=bias, dtype=torch.float64)
    for ours, theirs in PARAMETERS.items():
        if ours in arrays:
            module.get_parameter(theirs + "_l0").data = torch.from_numpy(arrays[ours].copy())
    x, *states = (leaf(arrays[key]) for key in ("x", "h0", "c0") if key in arrays)
    hx = tuple(state[None] for state in states)
    y, h_n = module(x, hx if len(hx) == 2 else hx[0])
    outputs = [y, *(state[0] for state in (h_n if isinstance(h_n, tuple) else (h_n,)))]
    torch.autograd.backward(outputs, list(map(torch.from_numpy, d_outputs)))

    ours, caches = case.forward("layer", arrays)
    grads = case.backward("layer", d_outputs, caches)
    for mine, theirs in zip(ours, outputs, strict=True):
        np.testing.assert_allclose(mine, theirs.detach().numpy(), rtol=0, atol=EXACT)
    expected = {key: leaf.grad.numpy() for key, leaf in zip(("x", "h0", "c0"), (x, *states))}
    expected |= weights_of(module, "_l0", grad=True)
    for key, value in expected.items():
        np.testing.assert_allclose(grads["d" + key], value, rtol=0, atol=EXACT, err_msg=key)


def test_ragged_and_reverse_by_sample() -> None:
    """Section P: a packed bidirectional batch is, sample by sample, the layer on x[:length] and its reverse."""
    torch.manual_seed(0)
    lengths, rng = [3, 1, 2], np.random.default_rng(0)
    module = torch.nn.LSTM(I, H, bidirectional=True, dtype=torch.float64)
    x, dy = leaf(rng.standard_normal((3, 3, I))), rng.standard_normal((3, 3, 2 * H))
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    y, _ = torch.nn.utils.rnn.pad_packed_sequence(module(packed)[0])
    y.backward(torch.from_numpy(dy))

    zeros = np.zeros((1, H))
    weights = {suffix: weights_of(module, suffix) for suffix in ("_l0", "_l0_reverse")}
    summed = {suffix: dict.fromkeys(ws, 0.0) for suffix, ws in weights.items()}
    for b, length in enumerate(lengths):
        x_b, dy_b = x.detach().numpy()[:length, b : b + 1], dy[:length, b : b + 1]
        y_b, dx_b = [], 0.0
        for suffix, way, half in (("_l0", 1, slice(H)), ("_l0_reverse", -1, slice(H, None))):
            out, _, _, caches = reference.lstm_forward(x_b[::way], zeros, zeros, **weights[suffix])
            grads = reference.lstm_backward(dy_b[::way, :, half], caches)
            y_b.append(out[::way])
            dx_b = dx_b + grads["dx"][::way]
            for key in summed[suffix]:
                summed[suffix][key] = summed[suffix][key] + grads["d" + key]
        y_b = np.concatenate(y_b, axis=2)
        np.testing.assert_allclose(y_b[:, 0], y.detach().numpy()[:length, b], rtol=0, atol=EXACT)
        np.testing.assert_allclose(dx_b[:, 0], x.grad.numpy()[:length, b], rtol=0, atol=EXACT)
    for suffix, grads in summed.items():
        for key, expected in weights_of(module, suffix, grad=True).items():
            np.testing.assert_allclose(grads[key], expected, rtol=0, atol=EXACT, err_msg=key + suffix)


# --- the textbook layout ---


def test_textbook_rnn_gives_the_published_values() -> None:
    """np.random.seed(1), draws in the published order; the values are printed there with 8 and 12 digits."""
    np.random.seed(1)
    x, a0 = np.random.randn(3, 10, 4), np.random.randn(5, 10)
    shapes = {"Wax": (5, 3), "Waa": (5, 5), "Wya": (2, 5), "ba": (5, 1), "by": (2, 1)}
    parameters = {name: np.random.randn(*shape) for name, shape in shapes.items()}
    da = np.random.randn(5, 10, 4)
    a, y, caches = textbook.rnn_forward(x, a0, parameters)
    grads = textbook.rnn_backward(da, caches)
    np.testing.assert_allclose(grads["dx"][1][2], [-2.07101689, -0.59255627, 0.02466855, 0.01483317], rtol=0, atol=5e-9)
    np.testing.assert_allclose(grads["da0"][2][3], -0.314942375127, rtol=0, atol=5e-13)
    assert {key: value.shape for key, value in grads.items()} == {
        "dx": (3, 10, 4),
        "da0": (5, 10),
        "dWax": (5, 3),
        "dWaa": (5, 5),
        "dba": (5, 1),
    }
    assert y.shape == (2, 10, 4)
    np.testing.assert_allclose(y.sum(axis=0), 1.0, rtol=0, atol=EXACT)
    a_1, y_1, cache = textbook.rnn_cell_forward(x[:, :, 0], a0, parameters)
    np.testing.assert_allclose(a_1, a[:, :, 0], rtol=0, atol=EXACT)
    np.testing.assert_allclose(y_1, y[:, :, 0], rtol=0, atol=EXACT)
    step = textbook.rnn_cell_backward(da[:, :, 0], cache)
    first_only = textbook.rnn_backward(da[:, :, :1], textbook.rnn_forward(x[:, :, :1], a0, parameters)[2])
    np.testing.assert_allclose(step["da_prev"], first_only["da0"], rtol=0, atol=EXACT)
    np.testing.assert_allclose(step["dxt"], first_only["dx"][:, :, 0], rtol=0, atol=EXACT)


def textbook_lstm_problem() -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    rng = np.random.default_rng(5)
    parameters = {f"W{gate}": rng.standard_normal((H, H + I)) for gate in "fico"}
    parameters |= {f"b{gate}": rng.standard_normal((H, 1)) for gate in "fico"}
    return rng.standard_normal((I, B, T)), rng.standard_normal((H, B)), rng.standard_normal((H, B)), parameters


def test_textbook_lstm_is_its_equations() -> None:
    """The textbook's own formulas, on the concatenation [a_prev; x], written out here."""
    x, a, c, parameters = textbook_lstm_problem()
    ours, c_n, _ = textbook.lstm_forward(x, a, parameters, c)
    for t in range(T):
        both = np.concatenate([a, x[:, :, t]])
        f, i, o = (1 / (1 + np.exp(-(parameters[f"W{k}"] @ both + parameters[f"b{k}"]))) for k in "fio")
        c = f * c + i * np.tanh(parameters["Wc"] @ both + parameters["bc"])
        a = o * np.tanh(c)
        np.testing.assert_allclose(ours[:, :, t], a, rtol=0, atol=EXACT)
    np.testing.assert_allclose(c_n, c, rtol=0, atol=EXACT)


def test_textbook_lstm_round_trip() -> None:
    """Parameters come back unchanged; results and gradients are those of torch's layout, rearranged."""
    x, a0, c0, parameters = textbook_lstm_problem()
    weights = textbook.lstm_from_textbook(parameters)
    back = textbook.lstm_to_textbook(**weights)
    assert back.keys() == parameters.keys()
    for key, value in parameters.items():
        np.testing.assert_array_equal(back[key], value)
    split = textbook.lstm_to_textbook(weights["W_ih"], weights["W_hh"], 0.25 * weights["b_ih"], 0.75 * weights["b_ih"])
    for key, value in parameters.items():
        np.testing.assert_allclose(split[key], value, rtol=0, atol=EXACT)

    rng = np.random.default_rng(6)
    da, dc_n = rng.standard_normal((H, B, T)), rng.standard_normal((H, B))
    _, _, caches = textbook.lstm_forward(x, a0, parameters, c0)
    grads = textbook.lstm_backward(da, caches, dc_n)
    _, _, _, torch_caches = reference.lstm_forward(x.T, a0.T, c0.T, **weights)
    expected = reference.lstm_backward(da.T, torch_caches, None, dc_n.T)
    as_torch = textbook.lstm_from_textbook({key[1:]: value for key, value in grads.items() if key[1:] in parameters})
    for key in ("W_ih", "W_hh", "b_ih"):
        np.testing.assert_array_equal(as_torch[key], expected["d" + key])
    for ours, theirs in (("dx", "dx"), ("da0", "dh0"), ("dc0", "dc0")):
        np.testing.assert_array_equal(grads[ours], expected[theirs].T)
    assert grads["dWf"].shape == (H, H + I) and grads["dbf"].shape == (H, 1)


def test_textbook_lstm_cell_is_one_step() -> None:
    x, a0, c0, parameters = textbook_lstm_problem()
    da, dc = np.random.default_rng(7).standard_normal((2, H, B))
    a, c, cache = textbook.lstm_cell_forward(x[:, :, 0], a0, c0, parameters)
    step = textbook.lstm_cell_backward(da, dc, cache)
    seq, c_n, caches = textbook.lstm_forward(x[:, :, :1], a0, parameters, c0)
    grads = textbook.lstm_backward(da[:, :, None], caches, dc)
    np.testing.assert_array_equal(a, seq[:, :, 0])
    np.testing.assert_array_equal(c, c_n)
    renamed = {"dxt": grads["dx"][:, :, 0], "da_prev": grads["da0"], "dc_prev": grads["dc0"]}
    for key, value in step.items():
        np.testing.assert_array_equal(value, renamed.get(key, grads.get(key)), err_msg=key)


# --- the proof of the proof: no sign of a backward function may be wrong unnoticed ---


def negated(node: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.USub(), node)


class Mutator(ast.NodeTransformer):
    """Flips the ``target``-th sign: a plus or minus, or the whole value of a gradient assigned or returned."""

    def __init__(self, target: int) -> None:
        self.target, self.count, self.line = target, 0, 0

    def hit(self, node: ast.AST) -> bool:
        self.count += 1
        if self.count - 1 == self.target:
            self.line = node.lineno
        return self.count - 1 == self.target

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self.generic_visit(node) if "backward" in node.name or node.name == "through_weights" else node

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        if isinstance(node.op, ast.Add | ast.Sub) and self.hit(node):
            node.op = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
        return self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        (target,) = node.targets
        is_gradient = isinstance(target, ast.Subscript) or isinstance(target, ast.Name) and target.id.startswith("d")
        if is_gradient and self.hit(node):
            node.value = negated(node.value)
        return self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> ast.AST:
        if isinstance(node.value, ast.Tuple):
            node.value.elts = [negated(value) if self.hit(value) else value for value in node.value.elts]
        return self.generic_visit(node)


def mutant(target: int) -> tuple[types.ModuleType, int, int]:
    """cells.py with one sign flipped, the line of the flip, and how many signs there are."""
    mutator = Mutator(target)
    tree = ast.fix_missing_locations(mutator.visit(ast.parse(inspect.getsource(cells))))
    module = types.ModuleType("mutant")
    exec(compile(tree, "mutant", "exec"), module.__dict__)
    return module, mutator.line, mutator.count


SIGNS = mutant(-1)[2]


def test_unmutated_source_passes() -> None:
    module, *_ = mutant(-1)
    for name in CASES:
        assert max(largest_errors(name, "cell", True, module).values()) < NUMERICAL


@pytest.mark.parametrize("target", range(SIGNS))
def test_a_flipped_sign_is_caught(target: int) -> None:
    module, line, _ = mutant(target)
    errors = {name: max(largest_errors(name, "cell", True, module).values()) for name in CASES}
    assert max(errors.values()) > 1e4 * NUMERICAL, f"cells.py:{line} {errors}"
