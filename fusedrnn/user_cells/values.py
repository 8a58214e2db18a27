"""The symbols that a user's function computes with: traced values, conditions, and the gates of ``x`` and ``rec``.

Arithmetic of Python, the functions below and torch's of the same names make nodes of the graph. What has no
elementwise meaning is refused at the user's line.
"""

from __future__ import annotations

import numbers
import operator
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from .errors import current_place, refuse
from .graph import OPERATIONS, Node
from .record import Trace

LIST = "sigmoid tanh relu exp log softplus sqrt square pow abs maximum minimum where, + - * / and comparisons"
_HIGHEST_POWER = 8

#: Other names that torch and Python give these operations.
_SAME = {
    "__add__": "add",
    "__radd__": "add",
    "__mul__": "mul",
    "__rmul__": "mul",
    "__sub__": "sub",
    "__truediv__": "div",
    "multiply": "mul",
    "subtract": "sub",
    "divide": "div",
    "true_divide": "div",
    "negative": "neg",
    "absolute": "abs",
    "rsub": "__rsub__",
    "rdiv": "__rtruediv__",
    "__rdiv__": "__rtruediv__",
    "lt": "less",
    "le": "less_equal",
    "gt": "greater",
    "ge": "greater_equal",
}
_REDUCTIONS = frozenset("sum mean max min prod norm var std amax amin softmax log_softmax cumsum logsumexp".split())
_READ = frozenset("item numpy tolist __array__".split())
_STOPPED = frozenset("detach data requires_grad".split())
_CONVERTED = frozenset("to type type_as float double half bfloat16 int long bool cpu cuda".split())
_OPTIONS = frozenset("alpha beta threshold rounding_mode out".split())
_OF_TENSORS = frozenset("shape dtype device layout grad grad_fn requires_grad is_cuda ndim T mT H".split())
_INSTEAD = {
    "clamp": "Write minimum(maximum(v, low), high).",
    "silu": "Write v * sigmoid(v).",
    "hardtanh": "Write minimum(maximum(v, -1), 1).",
    "leaky_relu": "Write maximum(v, 0.01 * v).",
    "rsqrt": "Write 1 / sqrt(v).",
    "reciprocal": "Write 1 / v.",
    "log1p": "Write log(1 + v).",
    "expm1": "Write exp(v) - 1.",
    "matmul": "The products with W_ih and W_hh are in x and rec; a gate called with a value multiplies that.",
}


def _no(what: str, instead: str) -> Callable[..., NoReturn]:
    """A method that refuses."""

    def method(self: object, *_: object, **__: object) -> NoReturn:
        refuse(what, instead)

    return method


_BRANCH = _no(
    "a branch on a traced value: its truth is not known when the function is traced",
    "Write where(condition, a, b), maximum(a, b) or minimum(a, b).",
)
_NUMBER = _no(
    "a traced value is no number, and cannot be made one",
    "Compute with the value itself, with the functions of fusedrnn.user_cells or torch.",
)
_STOP = _no(
    "a gradient cannot be stopped inside a cell: its gradient is that of all it computes",
    "Write the value itself, and detach what goes into the layer or comes out of it.",
)
_CONVERT = _no(
    "a value cannot be converted or moved: a cell computes in the type and on the device of its layer",
    "Write the value itself, and choose type and device where the layer is made.",
)
_INDEX = _no(
    "a traced value has no elements: it is one unit of one sample", "Write gates as x.NAME, states by their names."
)
_EQUAL = _no("== and != of a traced value", "Write where with <, <=, > or >=.")


class Value:
    """A value of one unit and one sample, as the user's function sees it."""

    __slots__ = ("_trace", "_node")
    __hash__ = object.__hash__

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: object, **_: object) -> Value:
        """A number of NumPy on the left is one of Python; there is nothing else of NumPy."""
        operation = {"add": operator.add, "subtract": operator.sub, "multiply": operator.mul,
                     "divide": operator.truediv}.get(ufunc.__name__)  # fmt: skip
        if operation is None or len(inputs) != 2 or not isinstance(inputs[0], numbers.Real):
            refuse("a function of NumPy", "Write that of fusedrnn.user_cells or torch.")
        return operation(float(inputs[0]), inputs[1])

    def __init__(self, trace: Trace, node: Node) -> None:
        self._trace, self._node = trace, node

    @property
    def node(self) -> Node:
        """What it stands for; asked for wherever the value is used."""
        return self._node

    def check(self, trace: Trace) -> None:
        """CellError if the value is of another cell's function."""
        if self._trace is not trace:
            refuse(f"values of two cells, {trace.name} and {self._trace.name}", "Use the function's own arguments.")

    @staticmethod
    def operation(name: str, *operands: object) -> Value:
        """The operation of this name, of values and numbers."""
        trace = next((o._trace for o in operands if isinstance(o, (Value, Condition))), None)
        if name == "where" and operands and isinstance(operands[0], bool):
            refuse("where of a bool of Python", "Write if and else: it is known when the function is traced.")
        if trace is None:
            refuse(f"{name} of no traced value", "Use Python's math for numbers.")
        if torch.is_grad_enabled() is not trace.with_gradients:
            refuse("no_grad in a cell: its gradient is that of all it computes", "A gradient cannot be stopped here.")
        if name == "where":
            condition, *operands = operands
            if len(operands) != 2 or not isinstance(condition, Condition):
                refuse("where without a condition", "Write where(a < b, value, other), with <, <=, > or >=.")
            condition.check(trace)
            return Value(trace, trace.graph.make("where", condition.node, *(_node(trace, o) for o in operands)))
        if name in ("less", "less_equal", "greater", "greater_equal"):
            a, b = (_node(trace, o) for o in (operands if name.startswith("less") else operands[::-1]))
            return Condition(trace, trace.graph.make(name.replace("greater", "less"), a, b))
        if name == "pow":
            return _power(trace, *operands)
        wanted = _OPERANDS.get(name)
        if wanted is None:
            refuse(f"{name} is no operation of a cell", _INSTEAD.get(name, f"There are {LIST}."))
        if len(operands) != wanted:
            values = f"{wanted} value{'s' if wanted > 1 else ''}"
            refuse(f"{name} takes {values}, not {len(operands)}", _without_option(name, "", ""))
        nodes = [_node(trace, o) for o in operands]
        if name == "__rsub__":
            name, nodes = "sub", nodes[::-1]
        elif name == "__rtruediv__":
            name, nodes = "div", nodes[::-1]
        elif name == "square":
            name, nodes = "mul", nodes * 2
        elif name == "abs":
            name, nodes = "maximum", [nodes[0], trace.graph.make("neg", nodes[0])]
        return Value(trace, trace.graph.make(name, *nodes))

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = _SAME.get(function.__name__, function.__name__)
        given = [a for a in args if isinstance(a, (Value, Condition))]
        if any(isinstance(a, (Gates, Products)) for a in args):
            refuse(f"torch.{name} of x or rec as a whole", "Take a gate of it: x.NAME, rec.NAME.")
        if name in ("max", "min") and len(args) == 2 and all(isinstance(a, Value) for a in args):
            name += "imum"
        elif name not in _KNOWN:
            _refuse_method(name)
        optional = {"relu": {"inplace": False}, "softplus": {"beta": 1, "threshold": 20}}.get(name, {})
        for key, value in (kwargs or {}).items():
            if isinstance(value, (Value, Condition)) or key not in optional or value != optional[key]:
                _refuse_option(f"torch.{name}", name, key, value)
        if not given:
            refuse(f"torch.{name} with a traced value by keyword", "Give it by position.")
        return cls.operation(name, *args)

    def __getattr__(self, name: str) -> Callable[..., Value]:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)  # Python and other libraries ask for what they may find
        if name == "data":
            _STOP(self)
        if name in _OF_TENSORS:
            refuse(f".{name} of a traced value: it is one unit of one sample, and no tensor", "Leave it out.")
        return lambda *args, **options: _method(self, name, args, options)

    def __setattr__(self, name: str, value: object) -> None:
        if name not in Value.__slots__:
            refuse(f"a traced value takes no attribute {name}", "Use a local variable.")
        object.__setattr__(self, name, value)

    __add__ = lambda self, other: Value.operation("add", self, other)
    __radd__ = lambda self, other: Value.operation("add", other, self)
    __mul__ = lambda self, other: Value.operation("mul", self, other)
    __rmul__ = lambda self, other: Value.operation("mul", other, self)
    __sub__ = lambda self, other: Value.operation("sub", self, other)
    __rsub__ = lambda self, other: Value.operation("sub", other, self)
    __truediv__ = lambda self, other: Value.operation("div", self, other)
    __rtruediv__ = lambda self, other: Value.operation("div", other, self)
    __neg__ = lambda self: Value.operation("neg", self)
    __pos__ = lambda self: self
    __abs__ = lambda self: Value.operation("abs", self)
    __pow__ = lambda self, exponent: Value.operation("pow", self, exponent)
    __lt__ = lambda self, other: Value.operation("less", self, other)
    __le__ = lambda self, other: Value.operation("less_equal", self, other)
    __gt__ = lambda self, other: Value.operation("greater", self, other)
    __ge__ = lambda self, other: Value.operation("greater_equal", self, other)
    __eq__ = __ne__ = _EQUAL
    __bool__ = _BRANCH
    __float__ = __int__ = __index__ = __complex__ = __array__ = __round__ = __trunc__ = __format__ = _NUMBER
    __getitem__ = __setitem__ = __delitem__ = __iter__ = __len__ = __contains__ = _INDEX
    __matmul__ = __rmatmul__ = _no("a matrix product", _INSTEAD["matmul"])
    __mod__ = __rmod__ = __floordiv__ = __rfloordiv__ = __divmod__ = __rdivmod__ = _no(
        "% // & | ^ ~ are no operations of a cell", f"There are {LIST}."
    )
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __invert__ = __mod__
    __rpow__ = _no("a number to the power of a traced value", "Write exp(v * l), with the number's logarithm l.")
    __call__ = _no("a value that is called", "Only gates of rec are called: rec.NAME(operand).")


class Condition:
    """A comparison of traced values. It has no use but in ``where``."""

    __slots__ = ("_trace", "node")
    __hash__ = object.__hash__
    __torch_function__ = Value.__torch_function__
    check = Value.check
    __bool__ = _BRANCH
    __and__ = __rand__ = __or__ = __ror__ = __xor__ = __rxor__ = __invert__ = _no(
        "conditions combined", "Put one where into the other: where(a, where(b, u, v), v)."
    )
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __neg__ = _no(
        "arithmetic with a condition", "Write where(condition, 1, 0)."
    )
    __pow__ = __rpow__ = __mod__ = __rmod__ = __floordiv__ = __rfloordiv__ = __matmul__ = __rmatmul__ = __neg__
    __abs__ = __pos__ = __neg__
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _no(
        "a comparison of conditions", "Put one where into another."
    )
    __float__ = __int__ = __index__ = __array__ = _NUMBER
    __getitem__ = __iter__ = __len__ = _INDEX

    def __init__(self, trace: Trace, node: Node) -> None:
        self._trace, self.node = trace, node

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        refuse(f".{name} of a condition: it is no value", "Write where(condition, v, 0).")


class Gates:
    """``x``: its attributes are the gates."""

    def __init__(self, trace: Trace, name: str) -> None:
        self.__dict__.update(_trace=trace, _name=name)

    def _leaf(self, gate: str) -> Node:
        if gate.startswith("__") and gate.endswith("__"):
            raise AttributeError(gate)
        trace: Trace = self._trace
        if gate not in trace.gates:
            known = ", ".join(f"{self._name}.{g}" for g in trace.gates)
            refuse(f"{self._name}.{gate}: there is no gate {gate}", f'Write one of {known}, or list it in gates="...".')
        return trace.graph.leaf(self._name, trace.gates.index(gate))

    def __getattr__(self, gate: str) -> Value:
        return Value(self._trace, self._leaf(gate))

    def __setattr__(self, name: str, value: object) -> None:
        refuse(f"{self._name}.{name} is written to", "Use a local variable.")

    __torch_function__ = Value.__torch_function__
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = __neg__ = _no(
        "x or rec as a whole: they hold the gates", "Take a gate of it: x.NAME, rec.NAME."
    )
    __abs__ = __pow__ = __matmul__ = __rmatmul__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __call__ = __neg__
    __float__ = __int__ = __index__ = __getitem__ = __setitem__ = __iter__ = __len__ = __neg__


class Products(Gates):
    """``rec``: its attributes are the gates, which may be called with what their rows of W_hh shall multiply."""

    def __getattr__(self, gate: str) -> Product:
        return Product(self._trace, self._leaf(gate))


class Product(Value):
    """``rec.NAME``, and ``rec.NAME(operand)``."""

    __slots__ = ()

    @property
    def node(self) -> Node:
        gate = self._node.value.index
        if gate in self._trace.operands:
            _refuse_both(self._trace.gates[gate])
        self._trace.plain.setdefault(gate, current_place())
        return self._node

    def __call__(self, *operands: object) -> Value:
        trace, gate = self._trace, self._node.value.index
        name = trace.gates[gate]
        if len(operands) != 1 or not isinstance(operands[0], Value):
            refuse(f"rec.{name}(...) takes one traced value", f"Write rec.{name}(operand).")
        operand = _node(trace, operands[0])
        if operand.kind == "state" and operand.value.index == 0:
            return self  # W_hh h_{t-1}, as without a call
        if gate in trace.plain:
            _refuse_both(name)
        for other, (before, _) in trace.operands.items():
            if before is not operand:
                refuse(
                    f"rec.{name} multiplies another operand than rec.{trace.gates[other]}",
                    "A cell has one operand beside h: call all gates with the same value.",
                )
        trace.operands.setdefault(gate, (operand, current_place()))
        return Value(trace, self._node)


def _refuse_both(gate: str) -> NoReturn:
    refuse(
        f"rec.{gate} is used as it is, and called with an operand",
        "A gate's rows of W_hh multiply one thing: list two gates for two products.",
    )


def _node(trace: Trace, operand: object) -> Node:
    """The node of a value or a number."""
    if isinstance(operand, Value):
        operand.check(trace)
        return operand.node
    if isinstance(operand, numbers.Real):
        number = operand if isinstance(operand, int) else float(operand)  # an int may be too large for a float
        if not abs(number) <= sys.float_info.max:
            refuse(f"the number {operand}", "Numbers of a cell are finite.")
        return trace.graph.number(float(operand))
    if isinstance(operand, Condition):
        refuse("a condition used as a value", "Write where(condition, 1, 0).")
    if isinstance(operand, Gates):
        refuse("x or rec as a whole: they hold the gates", "Take a gate of it: x.NAME, rec.NAME.")
    if isinstance(operand, torch.Tensor):
        refuse("a tensor in a cell", 'Make it a parameter: parameters="NAME". Numbers of Python may stand as they are.')
    refuse(f"a {type(operand).__name__} in a cell", "Values are traced values and numbers of Python.")


def _power(trace: Trace, base: object, exponent: object) -> Value:
    """Products, for a whole exponent; the square root for 1/2."""
    if isinstance(exponent, numbers.Real) and exponent == 0.5:
        return Value.operation("sqrt", base)
    if not isinstance(exponent, numbers.Real):
        refuse("a power whose exponent is no number", "Write exp(log(v) * exponent).")
    if exponent == 0 or exponent not in range(-_HIGHEST_POWER, _HIGHEST_POWER + 1):
        refuse(f"the power {exponent}", f"Exponents are 1/2 and whole numbers up to {_HIGHEST_POWER}.")
    make, node = trace.graph.make, _node(trace, base)

    def power(n: int) -> Node:
        if n == 1:
            return node
        half = power(n // 2)
        return make("mul", make("mul", half, half), node) if n % 2 else make("mul", half, half)

    result = power(int(abs(exponent)))
    return Value(trace, result if exponent > 0 else make("div", trace.graph.number(1), result))


def _refuse_option(called: str, name: str, key: str, value: object) -> NoReturn:
    if not isinstance(value, (Value, Condition)):
        refuse(f"{key}={value!r} of {called}", _without_option(name, key, value))
    if key in _OPTIONS:
        refuse(f"{key} of {called}", _without_option(name, key, value))
    refuse(f"{called} with a traced value by keyword, {key}", "Give it by position.")


def _without_option(name: str, key: str, value: object) -> str:
    """What to write in the place of an argument that an operation of a cell does not have."""
    if key == "inplace":
        return f"Write v = {name}(v): values do not change."
    number = key if not isinstance(value, numbers.Real) else f"{value}" if value >= 0 else f"({value})"
    if key == "alpha" and name in ("add", "sub", "__rsub__"):
        terms = {"add": f"a + {number} * b", "sub": f"a - {number} * b", "__rsub__": f"b - {number} * a"}
        return f"Write {terms[name]}."
    if key == "beta" and name == "softplus":
        return f"Write softplus({number} * v) / {number}."
    if name == "softplus":
        return "It is not supported: softplus(v) is log(1 + e^v). With a factor beta write softplus(beta * v) / beta."
    return f"It is not supported: write what it does to {name} with operations of a cell."


def _method(value: Value, name: str, args: tuple, options: dict) -> Value:
    """v.NAME(...), as a tensor would compute it."""
    if name in ("max", "min") and len(args) == 1 and isinstance(args[0], Value):
        name += "imum"
    if name not in _KNOWN:
        _refuse_method(name)
    for key, given in options.items():
        _refuse_option(name, name, key, given)
    return Value.operation(name, *((args[0], value, *args[1:]) if name == "where" and args else (value, *args)))


def _refuse_method(name: str) -> NoReturn:
    plain = name.strip("_")
    if name in ("__setitem__", "__getitem__"):
        _INDEX(None)
    if plain in _REDUCTIONS:
        refuse(
            f"{name} over units: a cell sees one unit of one sample",
            "Of two values there are maximum(a, b) and minimum(a, b). Sums over units are W_hh's.",
        )
    if plain in _STOPPED:
        _STOP(None)
    if plain in _CONVERTED:
        _CONVERT(None)
    if plain in _READ:
        _NUMBER(None)
    if name.endswith("_") and not name.startswith("_"):
        refuse(f"{name} works in place", f"Write v = v.{plain}(...): values do not change.")
    refuse(f"{name} is no operation of a cell", _INSTEAD.get(plain, f"There are {LIST}."))


_OPERANDS = {name: 1 for name in "neg sigmoid tanh exp log relu softplus sqrt square abs".split()}
_OPERANDS |= {name: 2 for name in "add sub mul div maximum minimum __rsub__ __rtruediv__".split()}
_KNOWN = frozenset((*_OPERANDS, "pow", "where", "less", "less_equal", "greater", "greater_equal"))
assert set(_OPERANDS) - {"square", "abs", "__rsub__", "__rtruediv__"} <= set(OPERATIONS)
