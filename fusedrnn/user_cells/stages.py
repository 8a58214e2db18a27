"""The stages of a cell: with one product or none, and with two (csrc/cells/cell.h)."""

from __future__ import annotations

from .bound import Ranges
from .contract import Constants, Draft, Stage, Write, check_use, needs, splits, to_keep
from .derive import adjoints
from .graph import Node, holding, leaves, needed_for
from .record import Trace


def plan(trace: Trace) -> tuple[Draft, Constants, tuple[Stage, ...]]:
    """The struct of a traced cell. CellError where the contract has no room for it."""
    check_use(trace)
    draft = Draft(trace)
    return _two_products(draft) if trace.operands else _one_product(draft)


# ---- one product or none -----------------------------------------------------------------------------------------


def _one_product(draft: Draft) -> tuple[Draft, Constants, tuple[Stage, ...]]:
    trace, graph = draft.trace, draft.graph
    product, two = trace.product, len(trace.states) == 2
    _check_states(draft)
    if not product and (two or not trace.parameters):
        raise trace.fail(
            "no gate uses rec, so that no weight multiplies h",
            "Such a cell has one state, and parameters in the place of W_hh; else write x.NAME + rec.NAME.",
        )
    seeds: dict[Node, Node] = {}
    for i, result in enumerate(trace.results):
        seeds[result] = graph.make("add", seeds[result], graph.leaf("d", i)) if result in seeds else graph.leaf("d", i)
    gradients = draft.gradients = adjoints(graph, seeds)
    writes = _gradients_of_gates(draft, draft.gates) + _gradients_of_units(draft)
    dc = gradients[trace.results[1]] if two else None
    writes += [("d[1]", draft.zero_or(gradients.get(graph.leaf("state", 1))))] if two else []
    writes += [("d[0]", draft.zero_or(gradients.get(graph.leaf("state", 0))))]
    reads = _choose_saved(draft, [node for _, node in writes], dc)

    forward = Stage("forward", draft.arguments("x", "rec", "state", "unit"), _after_saved(draft, 0))
    stages = [forward]
    reads |= draft.read_saved() | draft.arguments("unit", "d")
    prev = draft.arguments("prev")
    if two:
        of_dc = draft.read_saved() | draft.arguments("unit", "d") | {trace.results[1]: "cur[1]"}
        stages.append(Stage("dc_of", of_dc, (("return", dc),)))
        if dc not in reads:
            reads[dc] = "dc_of(saved, cur, d, unit)" if trace.parameters else "dc_of(saved, cur, d)"
    stages.append(Stage("backward", prev | reads, tuple(writes)))
    if two:
        of_candidate = {graph.leaf("state", 1): "prev[1]"} | draft.read_saved()
        stages.append(Stage("candidate", of_candidate, (("return", trace.results[1]),)))
    split = splits(draft)
    constants = _constants(draft, len(trace.gates) if product else 0, len(trace.gates) - min(split) if split else 0)
    return draft, constants, tuple(stages)


def _choose_saved(draft: Draft, gradients: list[Node], dc: Node | None) -> dict[Node, str]:
    """Sets ``draft.saved``; returns what backward reads of the states at t."""
    trace, gates = draft.trace, len(draft.gates)
    of_inputs = lambda node: node.kind in ("x", "rec")
    if dc is None:
        wanted = needs(gradients)
        if not to_keep(wanted, of_inputs, trace.results, 0):
            return {trace.results[0]: "cur[0]"}
        draft.saved = to_keep(wanted, of_inputs, (), gates)  # not h_t: what backward sees of it is after zoneout
        draft.fill_saved(gates)
        return {}
    c = trace.results[1]
    draft.saved = to_keep(needs([*gradients, dc], [dc]) | needs([dc]), of_inputs, [c], gates)
    of_states = lambda node: node.kind in ("x", "rec", "state")
    draft.saved += to_keep(needs([dc]), of_states, [c, *draft.saved], 0)  # dc_of sees no state at t-1
    of_units = lambda node: node.kind in ("x", "rec", "unit")
    draft.saved += to_keep([c], of_units, draft.saved, 0)  # candidate sees no parameter
    draft.fill_saved(gates)
    return {c: "cur[1]"}


def _check_states(draft: Draft) -> None:
    """Two states: h_{t-1} goes into the product alone, and c is new at each step."""
    trace = draft.trace
    if len(trace.states) < 2:
        return
    h, c = trace.states
    for node in needed_for(trace.results):
        if any(a.kind == "state" and a.value.index == 0 for a in node.args):
            raise trace.fail(
                f"{h} is used apart from its product",
                f"Of a cell with two states {h} goes into rec alone; what goes around the product is in {c}.",
                node.place,
            )
    for name, result in zip(trace.states, trace.results, strict=True):
        if result.op == "leaf":
            raise trace.fail(f"the new {name} is an argument as it came", "Return a value that the step computes.")


# ---- two products ------------------------------------------------------------------------------------------------


def _two_products(draft: Draft) -> tuple[Draft, Constants, tuple[Stage, ...]]:
    """The first gates and q before the second product, the others after it.

    A mask of the layer is on h where products read it: in q and in what the first gates are computed from. So what is
    saved of the first stage depends on h by the first gates' arguments alone, and the gradient of these arguments,
    drec, is all that the second half of the backward pass needs of the first.
    """
    trace, graph = draft.trace, draft.graph
    first = _check_calls(draft)
    (h,), q = trace.results, next(iter(trace.operands.values()))[0]
    rest = range(first, len(trace.gates))
    arguments = [_argument(draft, gate) for gate in range(first)]

    gradients = draft.gradients = adjoints(graph, {h: graph.leaf("d")}, arguments)
    late = [w for g, a in enumerate(arguments) for w in _of_both(g, draft.zero_or(gradients.get(a)))]
    late = _gradients_of_gates(draft, rest) + late + _gradients_of_units(draft)
    late.append(("d[0]", draft.zero_or(gradients.get(graph.leaf("state")))))

    sent = {a: graph.leaf("sent", gate) for gate, a in enumerate(arguments)}
    through_q = adjoints(graph, {**sent, q: graph.leaf("dq")})
    draft.gradients = {**through_q, **gradients}
    early = [w for g, a in enumerate(arguments) if through_q[a] is not sent[a] for w in _of_both(g, through_q[a])]
    for kind, to, indices in (("unit", "dunit", draft.units), ("state", "d", range(1))):
        for k in indices:
            if part := through_q.get(graph.leaf(kind, k)):
                early.append((f"{to}[{k}]", graph.make("add", graph.leaf(to, k), part)))

    _choose_saved_of_two(draft, arguments, (late, early), q)
    in_second = lambda index: index >= first
    in_first = lambda index: index < first
    unit = draft.arguments("unit")
    carried = draft.read_saved(first)
    stages = (
        Stage(
            "forward_first",
            draft.arguments("x", "rec", of=in_first) | draft.arguments("prev") | unit,
            (*draft.write_saved(0, first), ("q", q)),
        ),
        Stage(
            "forward",
            draft.arguments("x", "rec", of=in_second) | draft.arguments("state") | unit | carried,
            _after_saved(draft, first),
        ),
        Stage("backward", draft.arguments("prev") | unit | draft.arguments("d") | draft.read_saved(), tuple(late)),
        Stage(
            "backward_first",
            draft.arguments("prev", "unit", "d", "dq", "sent", "dunit") | carried,
            tuple(early),
        ),
        Stage("recurrent_operand", draft.arguments("prev") | carried, (("return", q),)),
    )
    if any(leaf.kind == "unit" for leaf in leaves([q], carried)):
        raise trace.fail(
            "the operand of a called gate uses a parameter", "Use the parameter in a gate, and the gate in the operand."
        )
    return draft, _constants(draft, first, 0), stages


def _choose_saved_of_two(draft: Draft, arguments: list[Node], writes: tuple[list[Write], ...], q: Node) -> None:
    first, gates = len(arguments), len(draft.gates)
    late, early = ([node for _, node in some] for some in writes)
    direct = lambda node: bool(leaves([node], arguments) - _of_units(draft)) and node not in arguments
    in_first = lambda node: not direct(node) or node in arguments
    wanted = {draft.trace.results[0], q} | needs(late) | needs(early)
    draft.saved = to_keep(wanted, lambda node: node in arguments, (), first, in_first)
    draft.fill_saved(first)
    carried = [node for node in draft.saved if node is not None]
    of_rest = lambda node: node.kind in ("x", "rec") and node.value.index >= first
    draft.saved += to_keep(needs(late), of_rest, carried, gates - first)
    draft.fill_saved(gates)


def _of_units(draft: Draft) -> set:
    return {draft.graph.leaf("unit", k).value for k in draft.units}


def _check_calls(draft: Draft) -> int:
    """kFirst. CellError if the called gates are not the last, or what they multiply comes too late."""
    trace = draft.trace
    names, called = trace.gates, sorted(trace.operands)
    first = len(names) - len(called)
    operand, place = trace.operands[called[0]]
    if len(trace.states) > 1:
        raise trace.fail("a cell of two states has one product", "Use rec as it is, without calling a gate.", place)
    if first == 0:
        raise trace.fail("no gate multiplies h itself", "Use rec of one gate, at least, as it is.", place)
    wrong = [gate for gate in called if gate < first]
    if wrong:
        order = [g for i, g in enumerate(names) if i not in called] + [names[g] for g in called]
        raise trace.fail(
            f"the gate {names[wrong[0]]} is called, and stands before gates that are not",
            f'List the called gates last: gates="{" ".join(order)}".',
            trace.operands[wrong[0]][1],
        )
    for leaf in sorted(leaves([operand])):
        if leaf.kind in ("x", "rec") and leaf.index >= first:
            raise trace.fail(
                f"the operand is computed from {leaf.kind}.{names[leaf.index]}, of a gate that multiplies it",
                f"It may use the gates {', '.join(names[:first])}, the state and parameters.",
                place,
            )
    for gate in splits(draft):
        raise trace.fail(
            f"x.{names[gate]} and rec.{names[gate]} are not used as their sum",
            "In a cell with a called gate write x.NAME + rec.NAME, for each gate.",
            next((n.place for n in needed_for(trace.results) if draft.rec(gate) in n.args), None),
        )
    ranges = Ranges(operand, *trace.results)
    for node, what in ((trace.results[0], "the new state"), (operand, "the operand")):
        if not ranges.within(node):
            raise trace.fail(
                f"{what} of a cell with a called gate may be larger than 1 and than {trace.states[0]}",
                "Let it be a product of a sigmoid and the state, or their mean with a tanh: f * h + (1 - f) * n.",
                node.place,
            )
    return first


def _argument(draft: Draft, gate: int) -> Node:
    """What a first gate's x and rec come in by: their sum, or that and what else, of h and parameters, is added."""
    total = draft.graph.make("add", draft.x(gate), draft.rec(gate))
    roots = (*draft.trace.results, *(operand for operand, _ in draft.trace.operands.values()))
    users = [node for node in needed_for(roots) if total in node.args]
    if len(users) == 1 and total not in roots and users[0].op in ("add", "sub") and users[0].args[0] is total:
        other = users[0].args[1]
        if other is not total and not any(leaf.kind in ("x", "rec") for leaf in leaves([other])):
            return users[0]
    return total


# ---- what both share ---------------------------------------------------------------------------------------------


def _of_both(gate: int, d: Node) -> list[Write]:
    return [(f"dx[{gate}]", d), (f"drec[{gate}]", d)]


def _gradients_of_gates(draft: Draft, gates: range) -> list[Write]:
    found = []
    for gate in gates:
        found += [(f"dx[{gate}]", draft.zero_or(draft.gradients.get(draft.x(gate))))]
        found += [(f"drec[{gate}]", draft.zero_or(draft.gradients.get(draft.rec(gate))))]
    return found


def _gradients_of_units(draft: Draft) -> list[Write]:
    unit = lambda k: draft.graph.leaf("unit", k)
    return [(f"dunit[{k}]", draft.zero_or(draft.gradients.get(unit(k)))) for k in draft.units]


def _after_saved(draft: Draft, start: int) -> tuple[Write, ...]:
    states = [(f"state[{i}]", node) for i, node in enumerate(draft.trace.results)]
    return (*draft.write_saved(start, len(draft.saved)), *states)


def _constants(draft: Draft, first: int, split: int) -> Constants:
    h = draft.trace.results[0]
    return Constants(
        kGates=len(draft.gates),
        kStates=len(draft.trace.states),
        kSaved=len(draft.saved),
        kFirst=first,
        kSplit=split,
        kParameters=len(draft.units),
        kBound=Ranges(h).name(h),
    )


# ---- what the layer does to it -------------------------------------------------------------------------------------


def is_maskable(trace: Trace, stages: tuple[Stage, ...]) -> bool:
    """Whether a mask of h_{t-1} before the first gates is one of what the products read: h goes into the first gates by
    the product alone, and into the operand of the others as one factor.
    """
    first = next((stage for stage in stages if stage.name == "forward_first"), None)
    if first is None:
        return True
    h = trace.graph.leaf("state", 0)
    return all(_is_factor(node, h) if to == "q" else h not in needed_for([node]) for to, node in first.writes)


def _is_factor(node: Node, h: Node) -> bool:
    """Whether the node is h times what does not depend on h."""
    depends: dict[Node, bool] = {}
    holding([node], lambda n: n is h, depends)
    while node is not h:
        if node.op not in ("neg", "mul", "div"):
            return False
        ways = [a for a in node.args if depends[a]]
        if len(ways) != 1 or (node.op == "div" and ways[0] is not node.args[0]):
            return False
        node = ways[0]
    return True
