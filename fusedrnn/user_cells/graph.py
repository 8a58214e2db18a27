"""Graphs of elementwise operations: what a user's cell and its derivative are made of.

A node is an operation on nodes, a number, or a leaf: an argument of the cell's step. A graph holds each node once, so
that common subexpressions are shared, and every node stands after its arguments. Numbers are folded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import Place


def _softplus(v: Tensor) -> Tensor:  # log(1 + e^v); torch's softplus returns v itself above 20
    return torch.logaddexp(v, torch.zeros_like(v))


#: The closed list of operations, each as torch's. ``less`` and ``less_equal`` are conditions of ``where`` alone.
OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": torch.neg,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "exp": torch.exp,
    "log": torch.log,
    "relu": torch.relu,
    "softplus": _softplus,
    "sqrt": torch.sqrt,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "where": torch.where,
    "less": torch.lt,
    "less_equal": torch.le,
    "relu_gradient": lambda h, d: torch.where(h <= 0, torch.zeros_like(d), d),  # of derivatives alone
}
#: Dear to compute: their results are saved rather than computed again.
TRANSCENDENTAL = frozenset(("sigmoid", "tanh", "exp", "log", "softplus", "sqrt", "div"))
CONDITIONS = frozenset(("less", "less_equal"))
MOST_PARTS = 64  # terms of a sum, or factors of a product, that are looked at one by one


class Leaf(NamedTuple):
    """An argument of the step.

    ``kind`` is x, rec (by gate), state (t-1), unit (parameters); in derivatives also d (dL/d(state t)), dq, and what
    the second half of the backward pass is given: sent (drec of the first half), dunit.
    """

    kind: str
    index: int = 0


@dataclass(eq=False)
class Node:
    """``op`` is a key of OPERATIONS, "number" or "leaf"; ``place`` the user's line that made it."""

    op: str
    args: tuple[Node, ...]
    value: float | Leaf | None
    index: int
    place: Place | None

    @property
    def kind(self) -> str | None:
        """Of a leaf."""
        return self.value.kind if isinstance(self.value, Leaf) else None

    def is_number(self, *values: float) -> bool:
        """Whether this is one of these numbers, or any number."""
        return self.op == "number" and (not values or self.value in values)


class Graph:
    """Makes nodes. ``place`` is asked for the line to name in errors about a node."""

    def __init__(self, place: Callable[[], Place | None] = lambda: None) -> None:
        self.size = 0
        self.place = place
        self._nodes: dict[tuple, Node] = {}

    def _node(self, op: str, args: tuple[Node, ...], value: float | Leaf | None = None) -> Node:
        key = op, tuple(sorted(a.index for a in args) if op in ("add", "mul") else (a.index for a in args)), value
        if key not in self._nodes:
            self._nodes[key] = Node(op, args, value, self.size, self.place())
            self.size += 1
        return self._nodes[key]

    def number(self, value: float) -> Node:
        return self._node("number", (), float(value) + 0.0)  # -0.0 becomes 0.0, its equal

    def leaf(self, kind: str, index: int = 0) -> Node:
        return self._node("leaf", (), Leaf(kind, index))

    def make(self, op: str, *args: Node) -> Node:
        """The operation's node, in its simplest form."""
        if all(a.is_number() for a in args) and op not in CONDITIONS:
            numbers = (torch.tensor(a.value, dtype=torch.float64) for a in args)
            return self.number(OPERATIONS[op](*numbers).item())
        simpler = getattr(self, "_" + op, None)
        return (simpler and simpler(*args)) or self._node(op, args)

    def _add(self, a: Node, b: Node) -> Node | None:
        if a.is_number(0.0) or b.is_number(0.0):
            return b if a.is_number(0.0) else a
        if b.op == "neg":
            return self.make("sub", a, b.args[0])
        if a.op == "neg":
            return self.make("sub", b, a.args[0])
        return self._paired(a, b)

    def _sub(self, a: Node, b: Node) -> Node | None:
        if b.is_number(0.0):
            return a
        if a.is_number(0.0):
            return self.make("neg", b)
        return self.make("add", a, b.args[0]) if b.op == "neg" else None

    def _mul(self, a: Node, b: Node) -> Node | None:
        for one, other in ((a, b), (b, a)):
            if one.is_number(1.0):
                return other
            if one.is_number(-1.0):
                return self.make("neg", other)
            if one.op == "neg":
                return self.make("neg", self.make("mul", *((one.args[0], b) if one is a else (a, one.args[0]))))
        return None

    def _div(self, a: Node, b: Node) -> Node | None:
        return a if b.is_number(1.0) else None

    def _neg(self, a: Node) -> Node | None:
        if a.op == "sub":
            return self.make("sub", a.args[1], a.args[0])
        return a.args[0] if a.op == "neg" else None

    def _where(self, condition: Node, a: Node, b: Node) -> Node | None:
        return a if a is b else None

    def _paired(self, a: Node, b: Node) -> Node | None:
        """x.g and rec.g side by side, where a sum has both: whoever sees x.g + rec.g alone knows that dx is drec."""
        left, right = _terms(a), _terms(b)
        for near, far in ((left, right), (right, left)):
            for sign, x in near:
                rec = self._nodes.get(("leaf", (), Leaf("rec", x.value.index))) if x.kind == "x" else None
                if rec is None or sign < 0 or (1, rec) not in far or len(left) + len(right) == 2:
                    continue
                total = self._node("add", (x, rec))
                rest = [*left, *right]
                rest.remove((1, x))
                rest.remove((1, rec))
                for sign, term in rest:
                    total = self.make("add" if sign > 0 else "sub", total, term)
                return total
        return None


def _terms(node: Node) -> list[tuple[int, Node]]:
    """Of a sum: what is added and subtracted. x.g + rec.g is one term, and so is a sum of very many."""
    found, waiting = [], [(1, node)]
    while waiting:
        sign, term = waiting.pop()
        if term.op not in ("add", "sub") or is_pair(term):
            found.append((sign, term))
            continue
        if len(found) + len(waiting) > MOST_PARTS:  # v = v + v, again and again, has more than can be counted
            return [(1, node)]
        a, b = term.args
        waiting += [(-sign if term.op == "sub" else sign, b), (sign, a)]
    return found


def is_pair(node: Node) -> bool:
    """Whether it is x.g + rec.g of a gate."""
    return node.op == "add" and {a.value for a in node.args} in ({("x", g), ("rec", g)} for g in _indices(node))


def _indices(node: Node) -> set[int]:
    return {a.value.index for a in node.args if isinstance(a.value, Leaf)}


def holding(roots: Iterable[Node], is_one: Callable[[Node], bool], memory: dict[Node, bool]) -> None:
    """Into ``memory``, of each root and all it is computed from: whether it is such a node, or computed from one. What
    the memory has already stays, and is not looked behind.
    """
    for node in needed_for(roots, memory):
        if node not in memory:
            memory[node] = is_one(node) or any(memory[a] for a in node.args)


def needed_for(roots: Iterable[Node], known: Iterable[Node] = ()) -> list[Node]:
    """The roots and all that they are computed from, arguments first; what is ``known`` is there, not computed."""
    found, known = set(), set(known)
    waiting = list(roots)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting += () if node in known else node.args
    return sorted(found, key=lambda node: node.index)


def leaves(roots: Iterable[Node], known: Iterable[Node] = ()) -> set[Leaf]:
    """The leaves that the roots are computed from, without those behind what is ``known``."""
    known = set(known)
    return {node.value for node in needed_for(roots, known) if node.op == "leaf" and node not in known}


def evaluate(roots: Iterable[Node], known: Mapping[Node, Tensor]) -> list[Tensor]:
    """The roots' values as torch operations, differentiable. KeyError if they need a leaf that is not ``known``."""
    roots, values = list(roots), dict(known)
    like = next(iter(known.values()))
    for node in needed_for(roots, known):
        if node in values:
            continue
        if node.op == "number":
            wide = torch.full_like(like, node.value, dtype=torch.float64)  # of a type that has no such number: inf
            values[node] = wide.to(like.dtype)
        elif node.op == "leaf":
            raise KeyError(node.value)
        else:
            values[node] = OPERATIONS[node.op](*(values[a] for a in node.args))
    return [values[root] for root in roots]
