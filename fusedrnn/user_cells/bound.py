"""How large h can become: Bound of csrc/cells/cell.h, by intervals and by recognising means.

x, rec, parameters and states have no bound of their own; a sigmoid is in [0, 1], a tanh in [-1, 1]. A mean of h_{t-1}
and of what is in [-1, 1] is no larger than the larger of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .graph import MOST_PARTS, Node, needed_for

Interval = tuple[float, float]
_ALL: Interval = (-math.inf, math.inf)
_SHAPES: dict[str, Interval] = {
    "sigmoid": (0.0, 1.0),
    "tanh": (-1.0, 1.0),
    "exp": (0.0, math.inf),
    "softplus": (0.0, math.inf),
    "sqrt": (0.0, math.inf),
}


class Ranges:
    """Of the values that some roots are computed from."""

    def __init__(self, *roots: Node) -> None:
        self._interval: dict[Node, Interval] = {}
        self._within: dict[Node, bool] = {}
        for node in needed_for(roots):
            self._interval[node] = self._of(node)
            self._within[node] = self._is_within(node)

    def name(self, h: Node) -> str:
        """Of the Bound: kOne, kPrevious or kNone."""
        return "kOne" if self.in_one(h) else "kPrevious" if self._within[h] else "kNone"

    def in_one(self, node: Node) -> bool:
        """Whether it is in [-1, 1]."""
        low, high = self._interval[node]
        return -1 <= low and high <= 1

    def within(self, node: Node) -> bool:
        """Whether its size is at most 1, or that of h_{t-1} if that is more."""
        return self._within[node]

    def _of(self, node: Node) -> Interval:
        if node.op == "number":
            return node.value, node.value
        given = [self._interval[a] for a in node.args]
        if mean := _mean(node, self._is_weight):
            a, b = (self._of_product(v) for v in mean)
            return min(a[0], b[0]), max(a[1], b[1])
        match node.op:
            case "add":
                return given[0][0] + given[1][0], given[0][1] + given[1][1]
            case "sub":
                return given[0][0] - given[1][1], given[0][1] - given[1][0]
            case "mul":
                ends = [_times(a, b) for a in given[0] for b in given[1]]
                square = node.args[0] is node.args[1]
                return max(min(ends), 0.0) if square else min(ends), max(ends)
            case "neg":
                return -given[0][1], -given[0][0]
            case "relu":
                return max(given[0][0], 0.0), max(given[0][1], 0.0)
            case "maximum":
                return max(given[0][0], given[1][0]), max(given[0][1], given[1][1])
            case "minimum":
                return min(given[0][0], given[1][0]), min(given[0][1], given[1][1])
            case "where":
                return min(given[1][0], given[2][0]), max(given[1][1], given[2][1])
        return _SHAPES.get(node.op, _ALL)

    def _is_weight(self, factors: Product) -> bool:
        low, high = self._of_product(factors)
        return 0 <= low and high <= 1

    def _is_within(self, node: Node) -> bool:
        if self.in_one(node) or (node.kind == "state" and node.value.index == 0):
            return True
        given = [self._within[a] for a in node.args]
        if mean := _mean(node, self._is_weight):
            return all(self._is_product_within(v) for v in mean)
        match node.op:
            case "neg" | "relu" | "maximum" | "minimum":
                return all(given)
            case "where":
                return all(given[1:])
            case "mul":
                return self._is_product_within(_factors(node))
        return False

    def _is_product_within(self, factors: Product) -> bool:
        """All in [-1, 1], but for one that may be as large as h_{t-1}."""
        large = [f for f in factors if not self.in_one(f)]
        return not large or (len(large) == 1 and self._within[large[0]])

    def _of_product(self, factors: Product) -> Interval:
        low, high = 1.0, 1.0
        for f in factors:
            ends = [_times(a, b) for a in (low, high) for b in self._interval[f]]
            low, high = min(ends), max(ends)
        return low, high


def _times(a: float, b: float) -> float:
    return 0.0 if a == 0 or b == 0 else a * b


Product = list[Node]


def _mean(node: Node, is_weight: Callable[[Product], bool]) -> tuple[Product, Product] | None:
    """a, b of w * a + (1 - w) * b in either order, of b + w * (a - b) or b - w * (b - a), where w is in [0, 1].

    All may be products: their factors.
    """
    if node.op not in ("add", "sub"):
        return None
    for q, p in (node.args, node.args[::-1])[: 1 if node.op == "sub" else 2]:
        for f, others in _each_factor(p):
            if f.op == "sub" and f.args[node.op == "add"] is q and is_weight(others):
                return [f.args[node.op == "sub"]], [q]
            for v, b in _each_factor(q) if node.op == "add" else ():
                if v.op == "sub" and v.args[0].is_number(1.0) and v.args[1] is f and is_weight([f]):
                    return others, b
    return None


def _factors(node: Node) -> Product:
    """Of a product; those of its two sides alone where there are very many."""
    found, waiting = [], [node]
    while waiting:
        factor = waiting.pop()
        if factor.op != "mul":
            found.append(factor)
        elif len(found) + len(waiting) > MOST_PARTS:  # v = v * v, again and again, has more than can be counted
            return [*node.args]
        else:
            waiting += factor.args[::-1]
    return found


def _each_factor(node: Node) -> list[tuple[Node, Product]]:
    """Each factor of a product, with the others."""
    factors = _factors(node)
    return [(f, factors[:i] + factors[i + 1 :]) for i, f in enumerate(factors) if len(factors) > 1]
