"""Expressions as text: C++ of the struct, and the plain equations of its comment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from .contract import Draft, Stage
from .graph import Leaf, Node

_SUM, _PRODUCT, _ATOM = 1, 2, 3  # how tightly an expression holds together
_INFIX = {"add": ("+", _SUM), "sub": ("-", _SUM), "mul": ("*", _PRODUCT), "div": ("/", _PRODUCT)}
_COMPARED = {"less": "<", "less_equal": "<="}


class Style(Protocol):
    """How numbers, minus signs and leaves without a name are written."""

    def number(self, value: float) -> str: ...
    def negative(self, text: str) -> str: ...
    def leaf(self, leaf: Leaf) -> str: ...


def text_of(node: Node, known: Mapping[Node, str], style: Style) -> tuple[str, int]:
    """The expression, and how tightly it holds together. What is ``known`` is written by its name."""
    if node in known:
        return known[node], _ATOM
    if node.op == "number":
        return style.number(node.value), _ATOM
    if node.op == "leaf":
        return style.leaf(node.value), _ATOM
    parts = [text_of(a, known, style) for a in node.args]
    if node.op in _INFIX:
        sign, tight = _INFIX[node.op]
        (left, of_left), (right, of_right) = parts
        left = left if of_left >= tight else f"({left})"
        right = right if of_right > tight else f"({right})"  # the order of rounding stays the user's
        return f"{left} {sign} {right}", tight
    if node.op == "neg":
        text, tight = parts[0]
        return style.negative(text if tight > _SUM else f"({text})"), _SUM
    if node.op in _COMPARED:
        return f"{parts[0][0]} {_COMPARED[node.op]} {parts[1][0]}", _SUM
    return f"{node.op}({', '.join(text for text, _ in parts)})", _ATOM


class Cpp:
    """``leaves``: nodes that are in an argument of the function."""

    def __init__(self, leaves: Mapping[Node, str]) -> None:
        self.leaves = leaves

    def number(self, value: float) -> str:
        return f"V({int(value)})" if value == int(value) and abs(value) < 1 << 31 else f"V({value!r})"

    def negative(self, text: str) -> str:
        return f"V(0) - {text}"  # vector types have no minus of one value

    def leaf(self, leaf: Leaf) -> str:
        raise AssertionError(leaf)


class Plain:
    """x_f, rec_f, h[t-1], h[t], dh[t], da_f, in one stage."""

    def __init__(self, draft: Draft, stage: Stage) -> None:
        self.trace, self.stage = draft.trace, stage
        #: Values that have a name of their own in equations, whatever the struct calls them.
        self.leaves = {node: f"{name}[t]" for name, node in zip(self.trace.states, self.trace.results, strict=True)}
        self.before = "t-1" if stage.name == "backward_first" else "t"  # of d: it goes on with what backward left

    def name(self, node: Node, name: str) -> str:
        """Of a value that the struct calls ``name``."""
        return self.leaves.get(node, name)

    def number(self, value: float) -> str:
        return str(int(value)) if value == int(value) and abs(value) < 1 << 31 else repr(value)

    def negative(self, text: str) -> str:
        return f"-{text}"

    def leaf(self, leaf: Leaf) -> str:
        trace, i = self.trace, leaf.index
        match leaf.kind:
            case "x" | "rec":
                return f"{leaf.kind}_{trace.gates[i]}"
            case "state":
                return f"{trace.states[i]}[t-1]"
            case "unit":
                return trace.parameters[i]
            case "d":
                return f"d{trace.states[i]}[{self.before}]"
            case "sent":
                return f"da_{trace.gates[i]}"
            case "dunit":
                return f"d{trace.parameters[i]}"
        return leaf.kind

    def target(self, targets: list[str]) -> str:
        """The left side of an equation, from what the function writes."""
        trace = self.trace
        if len(targets) == 2:
            return f"da_{trace.gates[_index(targets[0])]}"
        kind, i = targets[0].partition("[")[0], _index(targets[0])
        match kind:
            case "dx" | "drec":
                return f"{kind}_{trace.gates[i]}"
            case "state" | "cur":
                return f"{trace.states[i]}[t]"
            case "d":
                return f"d{trace.states[i]}[t-1]"
            case "dunit":
                return f"d{trace.parameters[i]}"
        return {"recurrent_operand": "q", "dc_of": f"d{trace.states[-1]}"}.get(self.stage.name, kind)


def _index(argument: str) -> int:
    return int(argument.partition("[")[2].rstrip("]") or 0)
