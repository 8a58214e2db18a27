"""The derivative of a graph by reverse accumulation, as nodes of the same graph.

Rules (C2) to (C4) of docs/derivations.md. Derivatives of activations are written with their values, (C5), so that the
argument need not be kept; at kinks they are torch's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .graph import CONDITIONS, Graph, Node, needed_for


def adjoints(graph: Graph, seeds: Mapping[Node, Node], ends: Iterable[Node] = ()) -> dict[Node, Node]:
    """dL/dv of every v that the seeds' keys are computed from.

    ``seeds`` maps a node to the part of its gradient that comes from outside; gradients go no further than ``ends``.
    """
    ends = set(ends)
    gradient = dict(seeds)
    for node in reversed(needed_for(seeds, ends)):
        if node in gradient and node not in ends:
            for argument, part in _parts(graph, node, gradient[node]):
                if argument.op != "number":
                    before = gradient.get(argument)
                    gradient[argument] = part if before is None else _sum(graph, before, part)
    return gradient


def _sum(graph: Graph, a: Node, b: Node) -> Node:
    """a + b; d * v + d * w is written d * (v + w)."""
    sign, product = ("sub", b.args[0]) if b.op == "neg" else ("add", b)
    if a.op == product.op == "mul" and a.args[0] is product.args[0]:
        return graph.make("mul", a.args[0], graph.make(sign, a.args[1], product.args[1]))
    return graph.make("add", a, b)


def _parts(graph: Graph, node: Node, d: Node) -> list[tuple[Node, Node]]:
    """What each argument of ``node`` gets of its gradient ``d``."""
    make, number = graph.make, graph.number
    one, zero = number(1), number(0)
    a, b = (*node.args, *(node,) * 2)[:2]
    match node.op:
        case "add":
            return [(a, d), (b, d)]
        case "sub":
            return [(a, d), (b, make("neg", d))]
        case "mul" if a is b:
            return [(a, make("mul", make("mul", number(2), d), a))]
        case "mul":
            return [(a, make("mul", d, b)), (b, make("mul", d, a))]
        case "div":
            part = make("div", d, b)
            return [(a, part), (b, make("neg", make("mul", part, node)))]
        case "neg":
            return [(a, make("neg", d))]
        case "sigmoid":
            return [(a, make("mul", make("mul", d, node), make("sub", one, node)))]
        case "tanh":
            return [(a, make("mul", d, make("sub", one, make("mul", node, node))))]
        case "exp":
            return [(a, make("mul", d, node))]
        case "log":
            return [(a, make("div", d, a))]
        case "relu":
            return [(a, make("relu_gradient", node, d))]
        case "softplus":
            return [(a, make("mul", d, make("sigmoid", a)))]
        case "sqrt":
            return [(a, make("div", make("mul", number(0.5), d), node))]
        case "maximum" | "minimum":  # of two that are equal, each gets a half
            half = make("mul", number(0.5), d)
            low, high = (b, a) if node.op == "maximum" else (a, b)  # a is the result where low < high
            a_only, b_only = make("less", low, high), make("less", high, low)
            return [
                (a, make("where", a_only, d, make("where", b_only, zero, half))),
                (b, make("where", b_only, d, make("where", a_only, zero, half))),
            ]
        case "where":
            condition, a, b = node.args
            return [(a, make("where", condition, d, zero)), (b, make("where", condition, zero, d))]
    assert node.op == "leaf" or node.op in CONDITIONS, node.op
    return []
