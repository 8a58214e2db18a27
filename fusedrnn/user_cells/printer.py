"""A cell's stages as a C++ struct, written as those of csrc/cells are: a line an equation, with its number.

Values have the user's names; the gradient of v is dv. A value that has no name and is used once stands inside the
expression that uses it. The text depends on the function alone: it is the same in every process.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from .contract import Constants, Draft, Stage
from .expressions import Cpp, Plain, text_of
from .graph import CONDITIONS, Node, needed_for
from .names import RESERVED, name_values

_COLUMNS = 120
_LONGEST = 56  # of an expression inside another; a longer one gets a line
_SIGNATURES = {
    "forward_first": "const G& x, const G& rec, const 1& prev, K& saved, V& q, const U& unit",
    "forward": "const G& x, const G& rec, Z& state, K& saved, const U& unit",
    "dc_of": "const K& saved, const Z& cur, const Z& d, const U& unit",
    "backward": "const K& saved, const Z& prev, const Z& cur, Z& d, G& dx, G& drec, const U& unit, U& dunit",
    "backward_first": "const K& saved, const 1& prev, const V& dq, 1& d, G& dx, G& drec, const U& unit, U& dunit",
    "candidate": "const K& saved, const Z& prev",
    "recurrent_operand": "const K& saved, const 1& prev",
}


@dataclass
class Printed:
    """The struct's text, and its equations: (number, text), those of the forward pass first."""

    text: str = ""
    equations: dict[Node, tuple[int, str]] = field(default_factory=dict)
    forward: int = 0  # how many are of the forward pass


def print_struct(draft: Draft, constants: Constants, stages: Iterable[Stage], source: str) -> Printed:
    """The file: a comment with the user's source and the equations, and the struct."""
    names, printed, bodies = name_values(draft), Printed(), []
    for stage in stages:
        bodies += ["", *_Function(draft, constants, stage, names, printed).lines()]
        if stage.name == "forward":
            printed.forward = len(printed.equations)
    struct = struct_name(draft.trace.name)
    c = constants
    lines = [*_header(draft, printed, source), "#pragma once", "", '#include "cell.h"', ""]
    lines += ["namespace fusedrnn::user {", "", f"struct {struct} {{"]
    lines += [f'  static constexpr const char* kName = "{draft.trace.name}";']
    lines += [
        f"  static constexpr int kGates = {c.kGates}, kStates = {c.kStates}, kSaved = {c.kSaved}, kFirst = {c.kFirst}, "
        f"kSplit = {c.kSplit};",
        f"  static constexpr int kParameters = {c.kParameters}, kLate = {c.kLate};",
        f"  static constexpr Bound kBound = Bound::{c.kBound};",
        f"  static constexpr bool kProjectable = {'true' if c.kProjectable else 'false'};",
        *bodies,
        "};",
        "",
        "}  // namespace fusedrnn::user",
        "",
    ]
    printed.text = "\n".join(lines)
    return printed


def struct_name(name: str) -> str:
    """peephole_lstm: PeepholeLstm."""
    found = "".join(part[:1].upper() + part[1:] for part in name.split("_"))
    return found if found[:1].isalpha() and found not in RESERVED else f"Cell{found}"


def _header(draft: Draft, printed: Printed, source: str) -> list[str]:
    trace = draft.trace
    lines = [f"{trace.name}: a cell of the user's own, by the contract of csrc/cells/cell.h. Printed from", ""]
    lines += [*("  " + line for line in source.rstrip().splitlines()), ""]
    called = [trace.gates[gate] for gate in sorted(trace.operands)]
    about = "x_g is W_ih x[t] + b_ih of gate g, rec_g is W_hh h[t-1] + b_hh"
    if called:
        about += "; of " + ", ".join(called) + " it is W_hh q + b_hh"
    if not trace.product:
        about = "x_g is W_ih x[t] + b_ih of gate g, rec_g is b_hh"
    lines += [about + ". Forward:"]
    equations = list(printed.equations.values())
    lines += [f"  ({number}) {text}" for number, text in equations[: printed.forward]]
    lines += ["", "dv is the gradient of the loss with respect to v, da_g that of both x_g and rec_g. dh[t-1] is here"]
    lines += ["without what goes through the products of W_hh. Backward:"]
    lines += [f"  ({number}) {text}" for number, text in equations[printed.forward :]]
    return [f"// {line}".rstrip() for line in lines]


@dataclass
class _Function:
    """A stage as a function of the struct."""

    draft: Draft
    constants: Constants
    stage: Stage
    names: dict[Node, str]
    printed: Printed

    def __post_init__(self) -> None:
        self.writes = [w for w in self.stage.writes if self.stage.reads.get(w[1]) != w[0]]
        self.roots = [node for _, node in self.writes]
        self.needed = [node for node in needed_for(self.roots, self.stage.reads) if node.op != "number"]
        self.cpp = Cpp({node: name for node, name in self.stage.reads.items()})
        self.plain = Plain(self.draft, self.stage)
        self.local = self._locals()

    def _locals(self) -> dict[Node, str]:
        """Values that get a line, and their names."""
        uses: dict[Node, int] = {}
        computed = [node for node in self.needed if node not in self.stage.reads]
        for node in computed:
            for a in node.args:
                uses[a] = uses.get(a, 0) + 1
        targets = {node: [to for to, n in self.writes if n is node] for node in self.roots}
        found: dict[Node, str] = {}
        for node in self.needed:
            if node in self.stage.reads:
                self._read(node, found, uses)
                continue
            if node.op == "leaf" or node.op in CONDITIONS:
                continue
            once = node in targets and not uses.get(node) and _is_one(targets[node])
            named = node in self.draft.trace.names
            text = text_of(node, {**self.cpp.leaves, **found}, self.cpp)[0]
            shared = uses.get(node, 0) + (node in targets) > 1 or (node in targets and not _is_one(targets[node]))
            if not once and (named or shared or (len(text) > _LONGEST and uses.get(node))):
                found[node] = self._name(node, found)
        return found

    def _read(self, node: Node, found: dict[Node, str], uses: dict[Node, int]) -> None:
        """Saved values have names where they are used; other arguments stand as they are."""
        if self.stage.reads[node].startswith("dc_of") or (
            self.stage.reads[node].startswith("saved") and node in self.names and uses.get(node)
        ):
            found[node] = self._name(node, found)

    def _name(self, node: Node, found: dict[Node, str]) -> str:
        if node not in self.names:
            taken, n = set(self.names.values()), 1
            while f"t{n}" in taken:
                n += 1
            self.names[node] = f"t{n}"
        return self.names[node]

    def lines(self) -> list[str]:
        body: list[tuple[str, str]] = []  # code and comment
        known: dict[Node, str] = {}
        saved = []
        for node, name in self.local.items():
            if node in self.stage.reads and self.stage.reads[node].startswith("saved"):
                known[node] = name
                saved.append(f"{name} = {self.stage.reads[node]}")
        body += [(f"const V {', '.join(saved)};", "")] if saved else []
        for node in self.needed:
            if node not in self.local or node in known:
                continue
            value = self.stage.reads.get(node) or self._text(node, known)
            left = self.plain.name(node, self.local[node])
            body.append((f"const V {self.local[node]} = {value};", self._number(node, known, left)))
            known[node] = self.local[node]
        body += self._assignments(known)
        return [*self._signature(body), *_aligned(body), "  }"]

    def _assignments(self, known: dict[Node, str]) -> list[tuple[str, str]]:
        lines: list[tuple[str, str]] = []
        for targets, node in _joined(self.writes):
            value, comment = self._text(node, known), ""
            if node not in known and not node.is_number() and node.op != "leaf":
                comment = self._number(node, known, self.plain.target(targets))
            if targets == ["return"]:
                lines.append((f"return {value};", comment))
                continue
            code = f"{' = '.join(targets)} = {value}"
            before = lines[-1] if lines else ("", "")
            if targets[0].startswith("saved") and not comment and before[0].startswith("saved") and not before[1]:
                lines[-1] = f"{before[0].rstrip(';')}, {code};", ""
            else:
                lines.append((f"{code};", comment))
        return lines

    def _text(self, node: Node, known: dict[Node, str]) -> str:
        return text_of(node, {**self.cpp.leaves, **known}, self.cpp)[0]

    def _number(self, node: Node, known: dict[Node, str], left: str) -> str:
        equations = self.printed.equations
        if node not in equations:
            others = {n: self.plain.name(n, name) for n, name in (known | self.plain.leaves).items() if n is not node}
            right = text_of(node, others, self.plain)[0]
            equations[node] = len(equations) + 1, f"{left} = {right}"
        return f"({equations[node][0]})"

    def _signature(self, body: list[tuple[str, str]]) -> list[str]:
        code = " ".join(line for line, _ in body)
        sizes = {"G": self.constants.kGates, "K": self.constants.kSaved, "Z": self.constants.kStates}
        sizes |= {"U": self.constants.kParameters, "1": 1}
        parameters = []
        for parameter in _SIGNATURES[self.stage.name].split(", "):
            size, name = re.fullmatch(r"(?:const )?(\w)& (\w+)", parameter).groups()
            if size == "U" and self.constants.kParameters == 0:
                continue
            kind = "V&" if size == "V" else f"Values<V, {sizes[size]}>&"
            used = re.search(rf"\b{name}\b", code)
            parameters.append(("const " if "const" in parameter else "") + kind + (f" {name}" if used else ""))
        result = "V" if self.roots and self.writes[0][0] == "return" else "void"
        start = f"  FUSEDRNN_INLINE static {result} {self.stage.name}("
        return ["  template <class V>", *_wrapped(start, parameters)]


def _is_one(targets: list[str]) -> bool:
    """Whether these are written in one line: dx[g] = drec[g] = v."""
    return len(targets) == 1 or (len(targets) == 2 and targets[0] == targets[1].replace("drec", "dx"))


def _joined(writes: list[tuple[str, Node]]) -> list[tuple[list[str], Node]]:
    found: list[tuple[list[str], Node]] = []
    for target, node in writes:
        if found and found[-1][1] is node and _is_one([*found[-1][0], target]):
            found[-1][0].append(target)
        else:
            found.append(([target], node))
    return found


def _wrapped(start: str, parameters: list[str]) -> list[str]:
    lines = [start]
    for i, parameter in enumerate(parameters):
        part = parameter + (") {" if i == len(parameters) - 1 else ",")
        if len(lines[-1]) + len(part) + 1 > _COLUMNS:
            lines.append(" " * (len(start) - 1))
        lines[-1] += part if lines[-1] == start else " " + part
    return lines


def _aligned(body: list[tuple[str, str]]) -> list[str]:
    """Comments of lines that follow one another begin in one column."""
    lines: list[str] = []
    for i, (code, comment) in enumerate(body):
        start = end = i
        while start > 0 and body[start - 1][1]:
            start -= 1
        while end < len(body) and body[end][1]:
            end += 1
        width = max((len(c) for c, _ in body[start:end]), default=0)
        lines.append(f"    {code:{width if comment else 0}}" + (f"  // {comment}" if comment else ""))
    return lines
