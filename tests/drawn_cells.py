"""Cells drawn at random, as users write them: texts of functions, for hypothesis."""

from __future__ import annotations

import hypothesis.strategies as st

from fusedrnn.user_cells import (
    UserCell,
    cell,
    exp,
    maximum,
    minimum,
    relu,
    sigmoid,
    softplus,
    sqrt,
    tanh,
    where,
)  # fmt: skip


@st.composite
def expressions(draw: st.DrawFn, known: list[str], depth: int = 3) -> str:
    """Python of a bounded value, of the values ``known``."""
    if depth == 0 or draw(st.integers(0, 5)) == 0:
        return draw(st.sampled_from(known))
    v = lambda: draw(expressions(known, depth - 1))
    kind = draw(st.sampled_from(("sum", "product", "sigmoid", "tanh", "quotient", "exp", "max", "where", "other")))
    match kind:
        case "sum":
            return f"({v()} {draw(st.sampled_from('+-'))} {v()})"
        case "product":
            return f"({v()} * {v()})"
        case "quotient":
            return f"({v()} / (1.5 + sigmoid({v()})))"
        case "exp":
            return f"exp(tanh({v()}))"
        case "max":
            return f"{draw(st.sampled_from(('maximum', 'minimum')))}({v()}, {v()})"
        case "where":
            return f"where({v()} {draw(st.sampled_from(('<', '<=', '>', '>=')))} {v()}, {v()}, {v()})"
        case "other":
            return draw(st.sampled_from(("relu({})", "softplus({})", "abs({})", "sqrt(1 + {0} * {0})", "-{}"))).format(
                v()
            )
    return f"{kind}({v()})"


@st.composite
def functions(draw: st.DrawFn) -> tuple[str, dict[str, str]]:
    """A function's text, and the names of its gates, states and parameters."""
    gates, parameters = "i f g o".split()[: draw(st.integers(1, 4))], ["p", "q"][: draw(st.integers(0, 2))]
    states = draw(st.sampled_from((["h"], ["h", "c"])))
    two_products = len(states) == 1 and len(gates) > 1 and draw(st.booleans())
    seen = [states[-1], *parameters]  # h of two states goes into its product alone
    lines = []
    for k, gate in enumerate(gates):
        last = two_products and k == len(gates) - 1
        rec = f"rec.{gate}(sigmoid({draw(expressions(seen))}) * h)" if last else f"rec.{gate}"
        if last:  # the operand may use no parameter but by a gate
            rec = f"rec.{gate}({draw(st.sampled_from([*gates[:k]]))}_ * h)"
        split = not two_products and draw(st.integers(0, 4)) == 0
        argument = f"x.{gate} * {rec} + x.{gate}" if split else f"x.{gate} + {rec}"
        extra = f" + {draw(expressions(seen[:1], 1))}" if draw(st.booleans()) else ""
        name = "sigmoid" if two_products and not last else draw(st.sampled_from(("sigmoid", "tanh", "softplus")))
        lines.append(f"{gate}_ = {name}({argument}{extra})")
        seen.append(f"{gate}_")
    used = " + ".join((*(f"0.1 * {gate}_" for gate in gates), *(f"{p} * 0.2" for p in parameters)))
    if len(states) == 2:
        lines += [f"c = {draw(expressions(seen))} * 0.3 + {used} + 0.5 * c"]
        seen.append("c")
        lines += [f"return {draw(expressions(seen))} + 0.1 * c, c"]
    elif two_products:
        lines += [
            f"new = tanh({draw(expressions(seen))} + {used})",
            f"return {gates[0]}_ * h + (1 - {gates[0]}_) * new",
        ]
    else:
        lines += [f"return {draw(expressions(seen))} + {used}"]
    head = f"def drawn({', '.join(['x', 'rec', *states, *parameters])}):"
    names = {"gates": " ".join(gates), "states": " ".join(states), "parameters": " ".join(parameters)}
    return "\n    ".join([head, *lines]) + "\n", names


def made_of(text: str, names: dict[str, str]) -> UserCell:
    scope = {f.__name__: f for f in (exp, maximum, minimum, relu, sigmoid, softplus, sqrt, tanh, where)}
    exec(compile(text, "<drawn>", "exec"), scope)
    return cell(**names)(scope["drawn"])
