"""What ``fusedrnn.cell`` refuses: each error names the line of the user's function and says what to write instead."""

from __future__ import annotations

import linecache
import math

import numpy as np
import pytest
import torch

from fusedrnn import user_cells
from fusedrnn.user_cells import CellError, cell, maximum, relu, sigmoid, tanh

OTHER: list = []


@cell(gates="f")
def another(x, rec, h):
    OTHER.append(h)
    return sigmoid(x.f + rec.f) * h


#: By name: gates, states and parameters; the function's lines, the wrong one marked; words of the message.
WRONG: dict[str, tuple[dict[str, str], str, str]] = {
    "branch": ({}, "if h < 0:  # wrong\n    h = -h\nreturn h + tanh(x.f + rec.f)", "branch.*\n.*\n.*\nWrite where"),
    "chained": ({}, "return where(0 < h < 1, h, x.f + rec.f)  # wrong", "branch"),
    "max of Python": ({}, "return max(h, x.f + rec.f)  # wrong", "branch"),
    "written to": ({}, "h[0] = 1  # wrong\nreturn h", "no elements"),
    "in place": ({}, "h.add_(x.f)  # wrong\nreturn h", "add_ works in place"),
    "in place of torch": ({}, "return torch.relu_(x.f + rec.f)  # wrong", "relu_ works in place"),
    "sum": ({}, "return (x.f + rec.f) / h.sum()  # wrong", "sum over units"),
    "sum of torch": ({}, "return (x.f + rec.f) / torch.sum(h)  # wrong", "sum over units"),
    "mean": ({}, "return (x.f + rec.f) - torch.mean(h, dim=-1)  # wrong", "mean over units"),
    "max": ({}, "return (x.f + rec.f) / torch.max(h)  # wrong", "max over units"),
    "max with a dimension": ({}, "return (x.f + rec.f) / torch.max(h, -1)  # wrong", "max over units"),
    "max with a number": ({}, "return (x.f + rec.f) / h.max(0)  # wrong", "max over units"),
    "shape": ({}, "return (x.f + rec.f) / h.shape[0]  # wrong", "shape of a traced value"),
    "dtype": ({}, "return torch.zeros(2, dtype=h.dtype) * x.f + rec.f  # wrong", "dtype of a traced value"),
    "grad": ({}, "return h.grad * x.f + rec.f  # wrong", "grad of a traced value"),
    "format": ({}, "print(f'{h:.2f}')  # wrong\nreturn h + x.f + rec.f", "no number"),
    "no_grad": ({}, "with torch.no_grad():\n    f = sigmoid(x.f + rec.f)  # wrong\nreturn f * h", "no_grad in a cell"),
    "bool of Python": ({}, "return where(True, h, x.f + rec.f)  # wrong", "where of a bool.*\n.*\n.*\nWrite if"),
    "large number": ({}, "return 10**400 * x.f + rec.f  # wrong", "the number 10000"),
    "by keyword": ({}, "return torch.sigmoid(input=x.f + rec.f)  # wrong", "by keyword, input"),
    "norm": ({}, "return (x.f + rec.f) / torch.linalg.vector_norm(h)  # wrong", "no operation|norm"),
    "softmax": ({}, "return torch.nn.functional.softmax(x.f + rec.f, -1)  # wrong", "softmax over units"),
    "index": ({}, "return tanh(x.f + rec.f)[0]  # wrong", "no elements"),
    "loop": ({}, "for v in h:  # wrong\n    pass", "no elements"),
    "matmul": ({}, "return torch.matmul(h, h) + x.f + rec.f  # wrong", "matmul is no operation"),
    "@": ({}, "return h @ h + x.f + rec.f  # wrong", "a matrix product"),
    "cos": ({}, "return torch.cos(x.f + rec.f)  # wrong", "cos is no operation of a cell"),
    "method": ({}, "return (x.f + rec.f).cos()  # wrong", "cos is no operation of a cell"),
    "clamp": ({}, "return torch.clamp(x.f + rec.f, 0, 1)  # wrong", "minimum.maximum"),
    "an option": (
        {}, "return torch.nn.functional.softplus(x.f + rec.f, beta=2)  # wrong",
        "beta=2(.*\n)+Write softplus\\(2 \\* v\\) / 2",
    ),
    "an option by position": (
        {}, "return torch.nn.functional.softplus(x.f + rec.f, 2)  # wrong", "takes 1 value, not 2(.*\n)+It is not supp"
    ),
    "alpha": ({}, "return torch.add(x.f + rec.f, h, alpha=0.5)  # wrong", "alpha=0.5(.*\n)+Write a \\+ 0.5 \\* b"),
    "alpha of a method": ({}, "return (x.f + rec.f).add(h, alpha=2)  # wrong", "alpha=2(.*\n)+Write a \\+ 2 \\* b"),
    "alpha of sub": ({}, "return torch.sub(x.f + rec.f, h, alpha=-2)  # wrong", "(.*\n)+Write a - \\(-2\\) \\* b"),
    "alpha of rsub": ({}, "return torch.rsub(x.f + rec.f, h, alpha=2)  # wrong", "(.*\n)+Write b - 2 \\* a"),
    "a value for alpha": ({}, "return (x.f + rec.f).add(h, alpha=h)  # wrong", "alpha of add(.*\n)+Write a \\+ alpha"),
    "a value for beta": (
        {}, "return torch.nn.functional.softplus(x.f + rec.f, beta=h)  # wrong", "Write softplus\\(beta \\* v"
    ),
    "rounding": (
        {}, "return torch.div(x.f + rec.f, h, rounding_mode='floor')  # wrong", "rounding_mode(.*\n)+It is not support"
    ),
    "detach": ({}, "return x.f + rec.f + h.detach()  # wrong", "a gradient cannot be stopped inside a cell"),
    "detach of torch": ({}, "return x.f + rec.f + torch.detach(h)  # wrong", "a gradient cannot be stopped inside"),
    "data": ({}, "return x.f + rec.f + h.data  # wrong", "a gradient cannot be stopped inside"),
    "requires_grad_": ({}, "return x.f + rec.f + h.requires_grad_(False)  # wrong", "a gradient cannot be stopped"),
    "to": ({}, "return x.f + rec.f + h.to(torch.float64)  # wrong", "computes in the type and on the device of its"),
    "half": ({}, "return x.f + rec.f + h.half()  # wrong", "computes in the type and on the device of its"),
    "float of a condition": (
        {}, "return (h > 0).float() * (x.f + rec.f)  # wrong", "float of a condition(.*\n)+Write where\\(condition, v"
    ),
    "to of a condition": ({}, "return (h > 0).to(torch.float32) * (x.f + rec.f)  # wrong", "to of a condition"),
    "power of a condition": ({}, "return (h > 0) ** 2 * (x.f + rec.f)  # wrong", "arithmetic with a condition"),
    "power": ({}, "return (x.f + rec.f) ** 2.5  # wrong", "the power 2.5"),
    "power of": ({}, "return (x.f + rec.f) ** h  # wrong", "exponent is no number"),
    "remainder": ({}, "return (x.f + rec.f) % 2  # wrong", "no operations"),
    "equal": ({}, "return where(h == 0, h, x.f + rec.f)  # wrong", "== and !="),
    "conditions": ({}, "return where((h < 0) & (h > 1), h, x.f + rec.f)  # wrong", "conditions combined"),
    "condition": ({}, "return (h < 0) * h + x.f + rec.f  # wrong", "arithmetic with a condition"),
    "no condition": ({}, "return where(h, h, x.f + rec.f)  # wrong", "where without a condition"),
    "float": ({}, "return float(h) + x.f + rec.f  # wrong", "no number"),
    "int": ({}, "return int(h) + x.f + rec.f  # wrong", "no number"),
    "math": ({}, "return math.exp(h) + x.f + rec.f  # wrong", "no number"),
    "item": ({}, "return h.item() + x.f + rec.f  # wrong", "no number"),
    "numpy": ({}, "return np.asarray(h) + x.f  # wrong", "no number"),
    "function of numpy": ({}, "return np.tanh(x.f + rec.f)  # wrong", "a function of NumPy"),
    "tensor": ({}, "return torch.ones(3) * h + x.f + rec.f  # wrong", "tensor in a cell.*\n.*\n.*\nMake it"),
    "text": ({}, "return h + 'a'  # wrong", "a str in a cell"),
    "infinite": ({}, "return h + math.inf  # wrong", "the number inf"),
    "no gate": ({}, "return tanh(x.q + rec.f)  # wrong", "there is no gate q.*\n.*\n.*\nWrite one of x.f"),
    "no gate of rec": ({}, "return tanh(x.f + rec.q)  # wrong", "there is no gate q"),
    "x as a whole": ({}, "return tanh(x + rec.f)  # wrong", "x or rec as a whole"),
    "x of torch": ({}, "return torch.tanh(x)  # wrong", "as a whole"),
    "x called": ({}, "return tanh(x.f(h) + rec.f)  # wrong", "a value that is called"),
    "x written": ({}, "x.f = h  # wrong\nreturn h", "written to"),
    "another cell": ({}, "return OTHER[0] + x.f + rec.f  # wrong", "values of two cells"),
    "results": ({}, "return h, x.f + rec.f", "returns 2 values, of 1 states(.*\n)+Return one value for each: the new"),
    "results of two": ({"states": "h c"}, "return tanh(x.f + rec.f)", "returns 1 values, of 2 states"),
    "number returned": ({"states": "h c"}, "return tanh(x.f + rec.f + c), 0.0", "the new state c is a float"),
    "nothing returned": ({}, "h = h + x.f + rec.f", "the new state h is a NoneType"),
    "gate unused": ({"gates": "f n"}, "return tanh(x.f + rec.f)", "the gate n has no effect"),
    "parameter unused": ({"parameters": "p"}, "return tanh(x.f + rec.f)", "the parameter p has no effect"),
    "both": (
        {"gates": "f n"},
        "f = sigmoid(x.f + rec.f + rec.n)\nreturn f * h + (1 - f) * tanh(x.n + rec.n(f * h))  # wrong",
        "used as it is, and called",
    ),
    "both, the other way": (
        {"gates": "f n"}, "f = sigmoid(x.f + rec.f)\nn = tanh(x.n + rec.n(f * h))\nreturn f * h + n * rec.n  # wrong",
        "used as it is, and called",
    ),
    "two operands": (
        {"gates": "f n m"},
        "f = sigmoid(x.f + rec.f)\nn = tanh(x.n + rec.n(f * h))\nm = tanh(x.m + rec.m(h * h))  # wrong\nreturn n + m",
        "multiplies another operand than rec.n",
    ),
    "order": (
        {"gates": "n f"}, "f = sigmoid(x.f + rec.f)\nn = tanh(x.n + rec.n(f * h))  # wrong\nreturn f * h + (1 - f) * n",
        'the gate n is called.*\n.*\n.*\nList the called gates last: gates="f n"',
    ),
    "too late": (
        {"gates": "f n"},
        "f = sigmoid(x.f + rec.f)\nn = tanh(x.n + rec.n(f * x.n * h))  # wrong\nreturn f * h + (1 - f) * n",
        "computed from x.n",
    ),
    "split": (
        {"gates": "f n"},
        "f = sigmoid(x.f + rec.f)\nn = tanh(x.n + f * rec.n(f * h))  # wrong\nreturn f * h + (1 - f) * n",
        "x.n and rec.n are not used as their sum",
    ),
    "unbound": (
        {"gates": "f n"}, "f = sigmoid(x.f + rec.f)\nn = relu(x.n + rec.n(f * h))\nreturn f * h + (1 - f) * n  # wrong",
        "may be larger than 1",
    ),
    "all called": ({}, "return tanh(x.f + rec.f(h * 0.5))  # wrong", "no gate multiplies h itself"),
    "operand a number": ({}, "return tanh(x.f + rec.f(1.0))  # wrong", "takes one traced value"),
    "operand's parameter": (
        {"gates": "f n", "parameters": "p"},
        "f = sigmoid(x.f + rec.f)\nn = tanh(x.n + rec.n(f * sigmoid(p) * h))\nreturn f * h + (1 - f) * n",
        "the operand of a called gate uses a parameter",
    ),
    "two states, called": (
        {"states": "h c"}, "c = tanh(x.f + rec.f(c * c))  # wrong\nreturn tanh(c), c", "two states has one product"
    ),
    "two states, h": (
        {"states": "h c"}, "c = tanh(x.f + rec.f) + c\nreturn tanh(c) + h, c  # wrong", "h is used apart from its"
    ),
    "two states, c": ({"states": "h c"}, "return tanh(x.f + rec.f), c", "the new c is an argument as it came"),
    "no product": ({}, "return tanh(x.f + h)", "no gate uses rec"),
    "nine gates": ({"gates": "a b c d e f g i j"}, "return h", "9 gates"),
    "no gates": ({"gates": ""}, "return h", "0 gates"),
    "three states": ({"states": "h c m"}, "return h, c, m", "3 states"),
    "a name twice": ({"gates": "f f"}, "return h", "two gates are called f"),
    "no name": ({"gates": "f 2"}, "return h", "'2' is no name"),
    "a keyword": ({"gates": "f if"}, "return h", "'if' is no name"),
    "x as a state": ({"states": "x"}, "return x", "x is the name of two arguments"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told_with_its_line(name: str) -> None:
    options, body, message = WRONG[name]
    options = {"gates": "f", "states": "h", **options}
    arguments = ["x", "rec", *options["states"].split(), *options.get("parameters", "").split()]
    if len(set(arguments)) < len(arguments):
        arguments = ["x", "rec"]
    text = "\n    ".join([f"def wrong({', '.join(arguments)}):", *body.splitlines()])
    linecache.cache["<user>"] = (len(text), None, text.splitlines(keepends=True), "<user>")
    scope = {**vars(user_cells), "torch": torch, "np": np, "math": math, "OTHER": OTHER}
    exec(compile(text, "<user>", "exec"), scope)
    with pytest.raises(CellError, match=message) as raised:
        cell(**options)(scope["wrong"])
    lines = [i + 1 for i, line in enumerate(text.splitlines()) if line.endswith("# wrong")]
    assert raised.value.place == ("<user>", lines[0] if lines else 1, "wrong")
    assert f'File "<user>", line {raised.value.place.line}, in wrong' in str(raised.value)
    assert str(raised.value).splitlines()[-1].endswith((".", '".', ")."))


def test_the_source_line_is_shown() -> None:
    with pytest.raises(CellError) as raised:

        @cell(gates="f")
        def squashed(x, rec, h):
            return torch.cos(x.f + rec.f)

    assert "    return torch.cos(x.f + rec.f)" in str(raised.value)
    assert raised.value.place.file == __file__


@pytest.mark.parametrize(
    "arguments", ["x, rec", "x, rec, c", "x, rec, *h", "x, rec, h, **more", "x, rec, h=0", "rec, x, h"]
)
def test_arguments_are_x_rec_and_the_states(arguments: str) -> None:
    scope: dict = {}
    exec(f"def wrong({arguments}):\n    return h", scope)
    with pytest.raises(CellError, match=r"Write def wrong\(x, rec, h\)"):
        cell(gates="f")(scope["wrong"])


def test_a_cell_is_a_function_with_a_name() -> None:
    with pytest.raises(CellError, match="no function with a name"):
        cell(gates="f")(lambda x, rec, h: tanh(x.f + rec.f))
    with pytest.raises(CellError, match="no function with a name"):
        cell(gates="f")(torch.nn.Tanh())


def test_what_is_allowed() -> None:
    @cell(gates="f n")
    def allowed(x, rec, h):
        f = x.f
        f += rec.f  # binds the name anew
        f = sigmoid(f) * np.float32(0.5) + abs(relu(h) * 0)
        n = torch.where(h > 0, torch.maximum(x.n, h), rec.n(h)).tanh()
        return torch.add(f * h, (1 - f) * maximum(n, -1)) * torch.pow(n, 2)

    assert allowed.constants.kFirst == 2 and allowed.constants.kSplit == 1 and not allowed.trace.operands
    assert math.isclose(allowed.eager([torch.zeros(1)] * 2, [torch.zeros(1)] * 2, [torch.zeros(1)])[0].item(), 0)


def test_the_decorator_alone() -> None:
    with pytest.raises(TypeError, match="write @fusedrnn.cell"):

        @cell
        def forgotten(x, rec, h):
            return tanh(x.f + rec.f)


def test_numbers_of_numpy_are_numbers() -> None:
    """On either side."""
    two, half = np.float64(2), np.float32(0.5)

    @cell(gates="f")
    def of_numpy(x, rec, h):
        return two * tanh(x.f + rec.f) - half * h + h * half - (two - h) / two + (two + h) * (two / (two + h))

    @cell(gates="f")
    def of_python(x, rec, h):
        return 2 * tanh(x.f + rec.f) - 0.5 * h + h * 0.5 - (2 - h) / 2 + (2 + h) * (2 / (2 + h))

    assert of_numpy.equations == of_python.equations


def test_the_gradient_of_no_grad_is_not_asked_for() -> None:
    """A cell may be made where torch computes no gradients."""
    with torch.no_grad():
        made = cell(gates="f")(another.function)
    assert made.equations == another.equations


@pytest.mark.parametrize("kind", ["gates", "states", "parameters"])
@pytest.mark.parametrize("names", [3, [1, 2], torch.zeros(2), {"f": 1}])
def test_names_are_strings(kind: str, names: object) -> None:
    with pytest.raises(TypeError, match=f'{kind} must be names, such as {kind}="f n"'):
        cell(**{"gates": "f", kind: names})


@cell(gates="f n")
def mgu(x, rec, h):
    f = sigmoid(x.f + rec.f)
    n = tanh(x.n + rec.n(f * h))
    return (1 - f) * h + f * n


def test_a_cell_is_not_called() -> None:
    with pytest.raises(TypeError, match=r"mgu is a cell, and is not called.*mgu.Module\(16, 64, bias=False\)"):
        mgu(16, 64, bias=False)
    with pytest.raises(TypeError, match=r"mgu.Module\(input_size, hidden_size\)"):
        mgu(torch.zeros(2, 16))


def test_eager_says_how_many_values_it_takes() -> None:
    v = torch.zeros(2, 3)
    right = {"x": [v, v], "rec": [v, lambda q: q], "states": [v], "parameters": []}
    mgu.eager(**right)
    for name, values, message in (
        ("x", [v], r"x of mgu must be 2 values \(f, n\), got 1"),
        ("rec", [v], r"rec of mgu must be 2 values \(f, n\), got 1"),
        ("rec", [v] * 3, r"rec of mgu must be 2 values \(f, n\), got 3"),
        ("states", [], r"states of mgu must be 1 values \(h\), got 0"),
        ("parameters", [v], "parameters of mgu must be 0 values, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            mgu.eager(**right | {name: values})
    with pytest.raises(TypeError, match="rec.f of mgu must be a tensor, got function"):
        mgu.eager(**right | {"rec": [lambda q: q, v]})
    with pytest.raises(TypeError, match="rec.n of mgu must be a tensor, or a function of its operand, got int"):
        mgu.eager(**right | {"rec": [v, 1]})
