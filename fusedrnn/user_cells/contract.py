"""A traced cell in the form of csrc/cells/cell.h: its constants, and what each of its functions reads and writes.

A :class:`Stage` is one function of the struct: nodes that it finds in its arguments, and nodes that it writes into
them. The printer writes stages as C++; ``Stage.run`` computes them on tensors. Of the forward pass, backward has the
states, the parameters and what was saved, but neither x nor rec. What is saved is the smallest set of values from
which all that the derivative needs can be computed again (cut.py). Where there is room anyway, as the contract wants
at least as many saved values as gates, results of transcendental functions are saved rather than computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .cut import cheapest_cut
from .graph import CONDITIONS, TRANSCENDENTAL, Graph, Node, evaluate, holding, leaves, needed_for
from .record import Trace

Write = tuple[str, Node]


@dataclass(frozen=True)
class Constants:
    """Those of the struct, as csrc/cells/cell.h explains them."""

    kGates: int
    kStates: int
    kSaved: int
    kFirst: int
    kSplit: int
    kParameters: int
    kBound: str
    kLate: int = 0
    kProjectable: bool = False


@dataclass(frozen=True)
class Stage:
    """A function of the struct.

    Attributes:
        reads: nodes that are in an argument, such as ``saved[0]``, or the result of a call of ``dc_of``.
        writes: arguments and what goes into them, in this order; "return" for the function's result.
    """

    name: str
    reads: Mapping[Node, str]
    writes: tuple[Write, ...]

    def run(self, arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What it writes, from the arguments by the names in ``reads``. KeyError if it needs another."""
        known = {node: arguments[name] for node, name in self.reads.items() if name in arguments}
        return dict(zip((name for name, _ in self.writes), evaluate((n for _, n in self.writes), known), strict=True))


@dataclass
class Draft:
    """What is known of a cell while its stages are made."""

    trace: Trace
    gradients: dict[Node, Node] = field(default_factory=dict)  # dL/dv of v, for names
    saved: list[Node | None] = field(default_factory=list)  # None: nothing, only to have kGates of them

    @property
    def graph(self) -> Graph:
        return self.trace.graph

    @property
    def gates(self) -> range:
        return range(len(self.trace.gates))

    @property
    def units(self) -> range:
        return range(len(self.trace.parameters))

    def x(self, gate: int) -> Node:
        return self.graph.leaf("x", gate)

    def rec(self, gate: int) -> Node:
        return self.graph.leaf("rec", gate)

    def zero_or(self, node: Node | None) -> Node:
        return self.graph.number(0) if node is None else node

    def arguments(self, *kinds: str, of: Callable[[int], bool] = lambda index: True) -> dict[Node, str]:
        """Leaves of these kinds by what the struct calls them: x, rec, state, prev, unit, d, dq, sent, dunit."""
        counts = {"x": self.gates, "rec": self.gates, "sent": self.gates, "unit": self.units, "dunit": self.units}
        found = {}
        for kind in kinds:
            for i in counts.get(kind, range(len(self.trace.states))):
                name = "dq" if kind == "dq" else f"{'drec' if kind == 'sent' else kind}[{i}]"
                if kind not in ("x", "rec") or of(i):
                    found[self.graph.leaf("state" if kind == "prev" else kind, i)] = name
        return found

    def read_saved(self, end: int | None = None) -> dict[Node, str]:
        return {node: f"saved[{k}]" for k, node in enumerate(self.saved[:end]) if node is not None}

    def write_saved(self, start: int, end: int) -> list[Write]:
        return [(f"saved[{k}]", self.zero_or(self.saved[k])) for k in range(start, end)]

    def fill_saved(self, count: int) -> None:
        self.saved += [None] * (count - len(self.saved))


def needs(gradients: Iterable[Node], known: Iterable[Node] = ()) -> set[Node]:
    """The values of the forward pass that these gradients are computed from; those ``known`` are there."""
    gradients, moving = list(gradients), {}
    holding(gradients, lambda node: node.kind in ("d", "dq", "sent", "dunit"), moving)
    found = {node for node in gradients if not moving[node]}
    for node in needed_for(gradients, known):
        if moving[node] and node not in known:
            found |= {a for a in node.args if not moving[a]}
    return {node for node in found if not node.is_number()}


def to_keep(
    wanted: Iterable[Node], gone: Callable[[Node], bool], known: Iterable[Node], room: int,
    may: Callable[[Node], bool] = lambda node: True,
) -> list[Node]:  # fmt: skip
    """The fewest values to keep, or those that save transcendental functions, if these are no more than ``room``."""
    wanted, known = list(wanted), set(known)
    many = 1 << 10  # one value less is worth more than any preference among values

    def price(node: Node) -> int | None:
        if node.op in CONDITIONS or node.is_number() or not may(node):
            return None
        return many + (0 if node.op in TRANSCENDENTAL else 1 if node.op in ("leaf", "relu") else 2)

    behind = {node: False for node in known}
    holding(wanted, gone, behind)
    fewest = cheapest_cut(wanted, gone, price, known)
    whole = cheapest_cut(wanted, lambda n: gone(n) or (n.op in TRANSCENDENTAL and may(n) and behind[n]), price, known)
    return whole if len(whole) <= max(len(fewest), room) else fewest


def splits(draft: Draft) -> list[int]:
    """Gates whose x and rec are used otherwise than in their sum: drec is not dx."""
    roots = (*draft.trace.results, *(operand for operand, _ in draft.trace.operands.values()))
    users: dict[Node, list[Node]] = {}
    for node in needed_for(roots):
        for a in set(node.args):
            users.setdefault(a, []).append(node)
    found = []
    for gate in draft.gates:
        x, rec = draft.x(gate), draft.rec(gate)
        of_x, of_rec = users.get(x, []), users.get(rec, [])
        together = of_x == of_rec and len(of_x) == 1 and of_x[0].op == "add"
        if not together or x in roots or rec in roots:
            found.append(gate)
    return found


def check_use(trace: Trace) -> None:
    """CellError for a gate, parameter or state that does nothing, and for numbers in the place of results."""
    used = leaves((*trace.results, *(operand for operand, _ in trace.operands.values())))
    for gate, name in enumerate(trace.gates):
        if not {("x", gate), ("rec", gate)} & used:
            raise trace.fail(f"the gate {name} has no effect", f"Use x.{name} and rec.{name}, or do not list it.")
    for k, name in enumerate(trace.parameters):
        if ("unit", k) not in used:
            raise trace.fail(f"the parameter {name} has no effect", "Use it, or do not list it.")
