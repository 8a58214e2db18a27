"""How the package hangs together: who imports whom, and how much a function is given."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "fusedrnn"
CSRC = PACKAGE.parent / "csrc"
SOURCES = sorted(file for file in CSRC.rglob("*") if file.suffix in (".h", ".cpp", ".inl", ".cu"))
FILES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}

#: From below to above: what stands in a row imports from its own folder and from rows before it. The modules that
#: people run stand above the package itself, ``__init__``.
ROWS = (
    ("extension",), ("_C",), ("cells", "torch_internals"), ("layer",), ("options",), ("inference",), ("functional",),
    ("insight",), ("fused_module",), ("single_step",), ("modules", "quantized"),
    ("further_modules", "user_cells"), ("convert", "init", "onnx", "patch", "reference"), ("quantize",), ("__init__",),
    ("compare", "info"), ("gradflow",),
)  # fmt: skip
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row}

#: What people call: torch.nn's signatures, all that a layer can be told, all that an experiment can.
PUBLIC = {"functional.recurrent", *(f"modules.{name}.__init__" for name in ("RNN", "LSTM", "GRU", "FusedRNNBase"))}
PUBLIC |= {"further_modules.IndRNN.__init__", "gradflow.train", "quantized.QuantizedRecurrent.__init__"}
PUBLIC |= {"further_modules.SLSTM.__init__", "reference.cells.slstm_cell_forward", "reference.layers.slstm_forward"}
MOST_ARGUMENTS = 8


def imports(name: str) -> set[str]:
    """The modules of the package that a module imports, at its top or inside a function."""
    file, found = FILES[name], set()
    package = name.split(".") if file.name == "__init__.py" and name != "__init__" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {"__init__" for alias in node.names if alias.name.split(".")[0] == "fusedrnn"}
        if not isinstance(node, ast.ImportFrom):
            continue
        parts = (node.module or "").split(".") if node.module else []
        if node.level:
            parts = package[: len(package) - node.level + 1] + parts
        elif parts[:1] == ["fusedrnn"]:
            parts = parts[1:]
        else:
            continue
        for alias in node.names:
            inside = ".".join([*parts, alias.name])
            found.add(inside if inside in FILES else ".".join(parts) or "__init__")
    return found - {name}


def row(name: str) -> int:
    return RANK[name.split(".")[0]]


@pytest.mark.parametrize("name", FILES)
def test_no_import_runs_back_up(name: str) -> None:
    for other in imports(name):
        same = name.split(".")[0] == other.split(".")[0]
        assert same or row(other) < row(name), f"{name} imports {other}"


def test_no_imports_run_in_a_circle() -> None:
    order = TopologicalSorter({name: imports(name) for name in FILES}).static_order()
    assert set(FILES) <= set(order)  # CycleError otherwise


def functions(name: str) -> dict[str, ast.FunctionDef]:
    """Those of a module, of its classes and inside others, by name."""

    def below(node: ast.AST, prefix: str) -> dict[str, ast.FunctionDef]:
        found = {}
        for each in ast.iter_child_nodes(node):
            inner = f"{prefix}.{each.name}" if isinstance(each, (ast.FunctionDef, ast.ClassDef)) else prefix
            found |= {inner: each} if isinstance(each, ast.FunctionDef) else {}
            found |= below(each, inner)
        return found

    return below(ast.parse(FILES[name].read_text(encoding="utf-8")), name)


@pytest.mark.parametrize("name", FILES)
def test_no_function_is_given_more_than_eight_values(name: str) -> None:
    for function, node in functions(name).items():
        given = [a for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg != "self"]
        assert function in PUBLIC or len(given) <= MOST_ARGUMENTS, f"{function}: {len(given)}"


def test_what_may_be_given_more_is_there() -> None:
    known = {function for name in FILES for function in functions(name)}
    assert PUBLIC <= known


def arguments(text: str, begin: int) -> tuple[int, int]:
    """How many stand in the parentheses that open before ``begin``, and where these close."""
    depth, angles, count, end = 1, 0, 1, begin
    while depth and end < len(text):
        c = text[end]
        depth += (c in "([{") - (c in ")]}")
        angles += (c == "<") - (c == ">" and angles > 0 and text[end - 1] != "-")
        count += c == "," and depth == 1 and angles == 0
        end += 1
    return count, end


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.name)
def test_no_function_of_csrc_is_given_more_than_eight_values(file: Path) -> None:
    for name, count in definitions(file.read_text(encoding="utf-8")):
        assert count <= MOST_ARGUMENTS, f"{name}: {count}"


def definitions(text: str) -> Iterator[tuple[str, int]]:
    """Functions, constructors and lambdas, by parentheses and a body, and how many values they are given."""
    text = re.sub(r"//.*", "", text)
    for match in re.finditer(r"(\]|operator\(\)|\b(?!if\b|for\b|while\b|switch\b)[A-Za-z_]\w*)\s*\(", text):
        count, end = arguments(text, match.end())
        if re.match(
            r"\s*(const\b|noexcept\b|FUSEDRNN_INLINE_LAMBDA\b|->[\w:<>*& ]+|\s)*(:[^;{}]*(\{[^{}]*\}[^;{}]*)*)?\{",
            text[end:],
        ):
            yield match[1], count


def test_every_kind_of_definition_is_seen() -> None:
    for kind in (
        "void f(V) {",
        "const auto f = [&](V) {",
        "int operator()(V) const {",
        "A(V) : a_(a), b_{b} {",
        "auto f(V) -> int {",
    ):
        assert [
            count for _, count in definitions(kind.replace("(V)", "(int a, B<int, int> b, int c)")) if count > 1
        ] == [3], kind


def test_a_new_mask_touches_few_files() -> None:
    """By CONTRIBUTING's recipe for what every step reads; the equation and the tests' loop come in addition."""
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    recipe = text.partition("Something that every step reads")[2].partition("Another weight")[0]
    files = set(re.findall(r"`((?:fusedrnn|csrc)/[\w/]+\.(?:py|h|cpp|inl))`", recipe))
    assert 8 < len(files) <= 12 and all((PACKAGE.parent / file).exists() for file in files)
