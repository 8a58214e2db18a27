"""The smallest set of values from which others can be computed again: a minimum cut.

Values flow along the graph from sources, which are gone later (x and rec), to what is wanted then. A set of nodes that
every such path crosses suffices, since all that lies behind it can be computed from it. Edges of a flow network are
the nodes, each with the price of keeping it; by the max-flow min-cut theorem the cheapest set is found by filling
paths until none is left (Ford and Fulkerson 1956). Graphs here have tens of nodes.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable

from .graph import Node, needed_for

_UNLIMITED = 1 << 40
_SOURCE, _SINK = "source", "sink"


def cheapest_cut(
    wanted: Iterable[Node], gone: Callable[[Node], bool], price: Callable[[Node], int | None], known: Iterable[Node]
) -> list[Node]:
    """Nodes to keep, so that ``wanted`` can be computed from these, what is ``known`` and leaves that are not gone.

    ``price`` is None for what cannot be kept. Of several cheapest sets it is the one nearest to what is wanted.
    """
    wanted, known = set(wanted) - set(known), set(known)
    room: dict = defaultdict(dict)

    def edge(start, end, size: int) -> None:
        room[start][end] = size
        room[end].setdefault(start, 0)

    for node in needed_for(wanted, known):
        if node in known:
            continue
        cost = price(node)
        edge((node, "in"), (node, "out"), _UNLIMITED if cost is None else cost)
        if gone(node):
            edge(_SOURCE, (node, "in"), _UNLIMITED)
        if node in wanted:
            edge((node, "out"), _SINK, _UNLIMITED)
        for a in node.args:
            if a not in known:
                edge((a, "out"), (node, "in"), _UNLIMITED)
    while path := _path(room):
        size = min(room[a][b] for a, b in path)
        assert size < _UNLIMITED, "a value that is wanted can neither be kept nor computed"
        for a, b in path:
            room[a][b] -= size
            room[b][a] += size
    ahead = _reaching_the_sink(room)
    cut = {v[0] for v in room if v[1:] == ("in",) and v not in ahead and (v[0], "out") in ahead}
    return sorted(cut, key=lambda node: node.index)


def _path(room: dict) -> list[tuple] | None:
    """Edges with room from the source to the sink, as few as possible."""
    before = {_SOURCE: None}
    waiting = deque([_SOURCE])
    while waiting and _SINK not in before:
        at = waiting.popleft()
        for to, size in room[at].items():
            if size > 0 and to not in before:
                before[to] = at
                waiting.append(to)
    if _SINK not in before:
        return None
    path, at = [], _SINK
    while before[at] is not None:
        path.append((before[at], at))
        at = before[at]
    return path


def _reaching_the_sink(room: dict) -> set:
    found, waiting = {_SINK}, [_SINK]
    while waiting:
        at = waiting.pop()
        for start in list(room[at]):
            if start not in found and room[start].get(at, 0) > 0:
                found.add(start)
                waiting.append(start)
    return found
