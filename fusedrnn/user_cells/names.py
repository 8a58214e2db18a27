"""The names of values in the struct: the user's own, dv for the gradient of v, x_f and rec_f for a gate's arguments."""

from __future__ import annotations

from .contract import Draft
from .graph import OPERATIONS, Node

_KEYWORDS = """alignas alignof and and_eq asm auto bitand bitor bool break case catch char class co_await co_return
co_yield compl concept const const_cast consteval constexpr constinit continue decltype default delete do double
dynamic_cast else enum explicit export extern false float for friend goto if inline int long mutable namespace new
noexcept not not_eq nullptr operator or or_eq private protected public register reinterpret_cast requires return short
signed sizeof static static_assert static_cast struct switch template this thread_local throw true try typedef typeid
typename union unsigned using virtual void volatile wchar_t while xor xor_eq"""
_OF_THE_STRUCT = """x rec state saved prev cur d dx drec unit dunit q dq late V Values Bound forward forward_first
finish backward backward_first dc_of candidate recurrent_operand tangent output relu_gradient fusedrnn user std"""
_MACROS = frozenset(("assert", "errno", "linux", "unix", "stdin", "stdout", "stderr"))
RESERVED = frozenset((*_KEYWORDS.split(), *_OF_THE_STRUCT.split(), *OPERATIONS))


def name_values(draft: Draft) -> dict[Node, str]:
    """Names of nodes, each once, none a word of C++ or of the struct."""
    trace, graph = draft.trace, draft.graph
    names: dict[Node, str] = {}
    taken = set(RESERVED)

    def give(node: Node | None, name: str) -> None:
        if node is None or node in names or node.is_number() or not name.isascii():
            return
        if name in _MACROS or (name.isupper() and len(name) > 2):  # NAN, M_PI: such are macros of C
            name += "_"
        while name in taken:
            name += "_"
        taken.add(name)
        names[node] = name

    for node, name in sorted(trace.names.items(), key=lambda item: item[0].index):
        give(node, name if not name.startswith("_") else "t" + name)
    for gate, name in enumerate(trace.gates):
        for kind in ("x", "rec"):
            give(graph.leaf(kind, gate), f"{kind}_{name}")
    for state, node in zip(trace.states, trace.results, strict=True):
        give(node, state)
    of_values = dict(names)
    if len(trace.results) > 1:
        give(draft.gradients.get(trace.results[1]), f"d{trace.states[1]}")
    for gate, name in enumerate(trace.gates):
        total = graph.make("add", draft.x(gate), draft.rec(gate))
        if total in draft.gradients:
            give(draft.gradients[total], f"da_{name}")
    for k, state in enumerate(trace.states):
        gradient = draft.gradients.get(graph.leaf("state", k))
        if gradient is not None and gradient.op != "leaf":
            give(gradient, f"d{state}_before")
    for node, name in of_values.items():
        gradient = draft.gradients.get(node)
        if gradient is not None and gradient.op != "leaf":
            give(gradient, "d" + name)
    return names
