"""A user's function, run once with symbols in the place of tensors: the graph of what it computes.

The function sees ``x`` and ``rec``, whose attributes are the gates, and the states and parameters as traced values.
All else that Python or torch can do with a value is refused, at the user's line, with what to write instead.
"""

from __future__ import annotations

import inspect
import keyword
import sys
from collections.abc import Callable, Sequence

from .errors import Place
from .graph import Node, leaves, needed_for
from .record import Trace
from .values import Gates, Products, Value

MOST_GATES, MOST_STATES, MOST_PARAMETERS = 4, 2, 8


def trace(
    function: Callable, gates: Sequence[str], states: Sequence[str], parameters: Sequence[str], place: Place
) -> Trace:
    """Runs the function with symbols. CellError, with the line, where it does what a cell cannot."""
    made = Trace(function.__name__, tuple(gates), tuple(states), tuple(parameters), place)
    _check_names(made)
    _check_signature(function, made)
    x, rec = Gates(made, "x"), Products(made, "rec")
    values = [Value(made, made.graph.leaf("state", i)) for i in range(len(states))]
    values += [Value(made, made.graph.leaf("unit", i)) for i in range(len(parameters))]
    result, local = _run(function, x, rec, *values)
    made.results = _results(made, result)
    for name, value in local.items():
        if isinstance(value, Value) and not value.node.is_number() and value.node.op != "leaf":
            made.names.setdefault(value.node, name)
    made.product = any(leaf.kind == "rec" for leaf in leaves(made.results))
    if not made.product:
        _add_bias(made)
    return made


def _check_names(made: Trace) -> None:
    for kind, names, most in (
        ("gate", made.gates, MOST_GATES),
        ("state", made.states, MOST_STATES),
        ("parameter", made.parameters, MOST_PARAMETERS),
    ):
        if len(names) > most or (not names and kind != "parameter"):
            least = 0 if kind == "parameter" else 1
            raise made.fail(f"{len(names)} {kind}s", f"A cell has {least} to {most} {kind}s.")
        for name in names:
            if not name.isidentifier() or not name.isascii() or name.startswith("_") or keyword.iskeyword(name):
                raise made.fail(f"{name!r} is no name of a {kind}", f'Write names with spaces between: {kind}s="f n".')
            if names.count(name) > 1:
                raise made.fail(f"two {kind}s are called {name}", "Give each a name of its own.")
    arguments = ("x", "rec", *made.states, *made.parameters)
    for name in arguments:
        if arguments.count(name) > 1:
            raise made.fail(f"{name} is the name of two arguments", "Give each a name of its own.")


def _check_signature(function: Callable, made: Trace) -> None:
    expected = ["x", "rec", *made.states, *made.parameters]
    given = list(inspect.signature(function).parameters.values())
    plain = all(p.kind is p.POSITIONAL_OR_KEYWORD and p.default is p.empty for p in given)
    if not plain or [p.name for p in given] != expected:
        raise made.fail(
            f"its arguments are ({', '.join(str(p) for p in given)})",
            f"Write def {made.name}({', '.join(expected)}): x, rec, then the states and the parameters by name.",
        )


def _run(function: Callable, *arguments: object) -> tuple[object, dict[str, object]]:
    """What the function returns, and its local variables as it does."""
    local: dict[str, object] = {}

    def watch(frame, event: str, _) -> None:
        if event == "return" and frame.f_code is function.__code__:
            local.update(frame.f_locals)

    before = sys.getprofile()
    sys.setprofile(watch)
    try:
        result = function(*arguments)
    finally:
        sys.setprofile(before)
    return result, local


def _results(made: Trace, result: object) -> tuple[Node, ...]:
    given = result if isinstance(result, (tuple, list)) else (result,)
    wanted = ", ".join(f"the new {state}" for state in made.states)
    if len(given) != len(made.states):
        raise made.fail(
            f"it returns {len(given)} values, of {len(made.states)} states", f"Return one value for each: {wanted}."
        )
    for state, value in zip(made.states, given, strict=True):
        if not isinstance(value, Value) or value.node.is_number():
            what = f"a {type(value).__name__}" if not isinstance(value, Value) else "a number"
            raise made.fail(f"the new state {state} is {what}", "Return a value computed from x, rec and the states.")
        value.check(made)
    return tuple(value.node for value in given)


def _add_bias(made: Trace) -> None:
    """A cell without a product: rec is b_hh alone, and is added to x wherever that stands."""
    graph, new = made.graph, {}
    for node in needed_for((*made.results, *made.names)):
        if node.kind == "x":
            new[node] = graph.make("add", node, graph.leaf("rec", node.value.index))
        elif node.args:
            new[node] = graph.make(node.op, *(new.get(a, a) for a in node.args))
            new[node].place = new[node].place or node.place
    made.results = tuple(new.get(node, node) for node in made.results)
    made.names = {new.get(node, node): name for node, name in made.names.items()}
