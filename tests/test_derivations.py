"""docs/derivations.md and the code agree on the numbers of the equations, and its Jacobians are right.

A number is defined where the document sets it as \\text{(X1)}, once and in order; csrc, fusedrnn and docs name only
numbers that are defined, and every line of csrc/cells that computes something names one. Masks, zoneout, clipping and
norms are computed in csrc/cells/rules.h alone. The Jacobians, which no kernel needs, are written out here and held to
the reference's backward functions.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import TOLERANCE

from fusedrnn import reference

ROOT = Path(__file__).parents[1]
DERIVATIONS = (ROOT / "docs/derivations.md").read_text(encoding="utf-8")
EQUATIONS = re.findall(r"\\text\{\(([A-Z]\d+)\)\}", DERIVATIONS)
TABLES = re.findall(r"^\*\*(M\d+)\. ", DERIVATIONS, re.MULTILINE)
SOURCES = (".py", ".h", ".inl", ".cpp", ".cu", ".md")
# Macros that GitHub does not render, so that formulas cannot change the page.
REFUSED = "operatorname|DeclareMathOperator|newcommand|renewcommand|def|let|require|href|class|style|cssId|unicode"
# Assignments and results that only name, load or keep a value.
PLUMBING = (
    r"\bone = V\(1\)$|\b\w+ = (saved|late)\[\d\]$|^(saved|late)\[\d\] = [\w\[\]]+$|= at\(j\)$"
    r"|^return (past|sum)$"
)


def test_equations_are_numbered_once_and_in_order() -> None:
    for letter in {number[0] for number in EQUATIONS}:
        numbers = [int(number[1:]) for number in EQUATIONS if number[0] == letter]
        assert numbers == list(range(1, len(numbers) + 1)), letter


@pytest.mark.parametrize(
    "file",
    sorted([p for top in ("csrc", "fusedrnn", "docs") for p in (ROOT / top).rglob("*") if p.suffix in SOURCES]),
    ids=lambda f: f.name,
)
def test_every_number_that_is_cited_is_an_equation(file: Path) -> None:
    assert set(re.findall(r"\(([A-Z]\d+)\)", file.read_text(encoding="utf-8"))) <= {*EQUATIONS, *TABLES}


def test_every_section_is_in_the_list() -> None:
    opening = DERIVATIONS[: DERIVATIONS.index("## Notation")]
    for letter, title in re.findall(r"^## ([A-Z])\. (.*)$", DERIVATIONS, re.MULTILINE):
        anchor = re.sub(r"[^a-z0-9 -]", "", f"{letter}. {title}".lower()).replace(" ", "-")
        assert f"[{letter}](#{anchor})" in opening


@pytest.mark.parametrize("file", sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("*.md")]), ids=lambda f: f.name)
def test_formulas_are_those_that_github_renders(file: Path) -> None:
    """No macro that it refuses, and no inline formula that goes on in the next line."""
    text = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not re.findall(rf"\\(?:{REFUSED})\b", text)
    for formula in re.findall(r"\$\$.*?\$\$", text, re.DOTALL):
        assert "\n" not in formula, formula
    for line in re.sub(r"\$\$.*?\$\$|`[^`\n]*`", "", text).splitlines():
        assert line.count("$") % 2 == 0, line


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if heading:
            lines = file.read_text(encoding="utf-8").splitlines()
            titles = [line.lstrip("#").strip().lower() for line in lines if line.startswith("#")]
            assert heading in {re.sub(r"[^\w -]", "", title).replace(" ", "-") for title in titles}, target


def test_the_readme_is_short_and_the_index_whole() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    assert all(f"({page.name})" in index for page in (ROOT / "docs").glob("*.md") if page.name != "README.md")


def test_every_module_is_in_the_table() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    files = {file.relative_to(ROOT) for file in (ROOT / "fusedrnn").rglob("*.py") if file.name != "__init__.py"}
    modules = {f"`{file}`" for file in files if file.parts[1] != "reference"}
    assert {name for name in modules if name not in table} == set()


def test_every_line_of_the_cells_names_its_equation() -> None:
    """Each statement that computes carries a number: an assignment or a result, constants and plumbing apart."""
    others = ("cell.h", "dual.h", "functions.h", "registry.h", "unit_parameters.h")
    files = {file for file in (ROOT / "csrc/cells").glob("*.h") if file.name not in others}
    assert len(files) >= 4
    for file in files:
        text = file.read_text(encoding="utf-8")
        for line in text[text.index("template <class V>") :].splitlines():  # what is before: the scalars' functions
            if computes(line):
                assert re.search(r"\([A-Z]\d+\)", line), f"{file.name}: {line.strip()}"


def computes(line: str) -> bool:
    """Whether some assignment or result in it is more than a name, a load or a store."""
    code = line.partition("//")[0].strip()
    parts = (
        [] if code.startswith(("for (", "static constexpr")) else [part.strip(" {}") for part in re.split("[;,]", code)]
    )
    return any(re.search(r"(?<![=<>!])=(?!=)|^return\b", part) and not re.search(PLUMBING, part) for part in parts)


def test_what_a_line_computes_is_seen() -> None:
    for line in (
        "d[0] += dx[0] * saved[1];",
        "saved[0] = r, dx[1] = d[0] * r;",
        "const V one = V(1), a = one - r;",
        "return a;",
    ):
        assert computes(line), line
    for line in (
        "const V i = saved[0], f = saved[1], one = V(1);",
        "late[0] = o, late[1] = state[1];",
        "if (a == b) {",
    ):
        assert not computes(line), line


def test_what_surrounds_a_cell_is_computed_in_one_place() -> None:
    """Masks, zoneout, clipping by value and by norm, norms: the drivers call csrc/cells/rules.h."""
    rules = {"Z1", "Z2", "Z3", "Z4", "P5", "P6"}
    naming = {
        file.relative_to(ROOT / "csrc").as_posix(): numbers
        for file in (ROOT / "csrc").rglob("*")
        if file.suffix in SOURCES
        and (numbers := rules & set(re.findall(r"\(([A-Z]\d+)\)", file.read_text(encoding="utf-8"))))
    }
    assert naming == {"cells/rules.h": rules}
    for name in ("masked", "zoneout", "zoneout_backward", "clipped", "clip_factor", "sum_of_squares"):
        for driver in ("cpu", "stepwise"):
            text = "".join(f.read_text(encoding="utf-8") for f in sorted((ROOT / "csrc" / driver).iterdir()))
            assert re.search(rf"\b{name}[<(]", text), f"{driver} does not call {name}"


# --- the Jacobians: state t by state t-1 of one sample, H = 5 ---

H, I = 5, 3


def problem(gates: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """A step's arguments but for the states, and a state; each the same for H samples."""
    rng = np.random.default_rng(gates)
    weights = {"W_ih": (gates * H, I), "W_hh": (gates * H, H), "b_ih": (gates * H,), "b_hh": (gates * H,)}
    arguments = {name: rng.standard_normal(shape) for name, shape in weights.items()}
    return arguments | {"x": np.tile(rng.standard_normal(I), (H, 1))}, rng.standard_normal(H)


def assert_equal(ours: np.ndarray, formula: np.ndarray) -> None:
    np.testing.assert_allclose(ours, formula, rtol=0, atol=TOLERANCE[torch.float64])


ROWS = np.eye(H)  # sample k gets the gradient e_k, so its gradient of the earlier state is row k of the Jacobian
diag = np.diag


def test_jacobian_of_the_simple_cell() -> None:
    arguments, h_prev = problem(1)
    h, cache = reference.rnn_cell_forward(h_prev=np.tile(h_prev, (H, 1)), **arguments)
    J = reference.rnn_cell_backward(ROWS, cache)["dh_prev"]
    assert_equal(J, diag(1 - h[0] ** 2) @ arguments["W_hh"])  # (R13)


def test_jacobian_of_the_residual_cell() -> None:
    arguments, h_prev = problem(1)
    h, cache = reference.residual_rnn_cell_forward(h_prev=np.tile(h_prev, (H, 1)), **arguments)
    J = reference.residual_rnn_cell_backward(ROWS, cache)["dh_prev"]
    assert_equal(J, np.eye(H) + diag(1 - (h[0] - h_prev) ** 2) @ arguments["W_hh"])  # (S5)


def test_jacobian_of_the_lstm() -> None:
    arguments, h_prev = problem(4)
    c_prev = np.random.default_rng(0).standard_normal(H)
    states = {"h_prev": np.tile(h_prev, (H, 1)), "c_prev": np.tile(c_prev, (H, 1))}
    _, c, cache = reference.lstm_cell_forward(**states, **arguments)
    i, f, g, o = (gate[0] for gate in cache[3:7])
    W_hi, W_hf, W_hg, W_ho = np.split(arguments["W_hh"], 4)
    K = diag(g * i * (1 - i)) @ W_hi + diag(c_prev * f * (1 - f)) @ W_hf + diag(i * (1 - g**2)) @ W_hg  # (L19)
    tanh_c = np.tanh(c[0])
    E = diag(o * (1 - tanh_c**2))
    from_c = reference.lstm_cell_backward(0 * ROWS, ROWS, cache)
    assert_equal(from_c["dc_prev"], diag(f))  # (L20)
    assert_equal(from_c["dh_prev"], K)
    from_h = reference.lstm_cell_backward(ROWS, 0 * ROWS, cache)
    assert_equal(from_h["dc_prev"], E @ diag(f))  # (L21)
    assert_equal(from_h["dh_prev"], E @ K + diag(tanh_c * o * (1 - o)) @ W_ho)


@pytest.mark.parametrize("reset_after", [True, False])
def test_jacobian_of_the_gru(reset_after: bool) -> None:
    arguments, h_prev = problem(3)
    _, cache = reference.gru_cell_forward(h_prev=np.tile(h_prev, (H, 1)), **arguments, reset_after=reset_after)
    r, z, n, v_n = (value[0] for value in cache[2:6])
    W_hr, W_hz, W_hn = np.split(arguments["W_hh"], 3)
    if reset_after:
        candidate = diag(r) @ W_hn + diag(v_n * r * (1 - r)) @ W_hr  # (G12)
    else:
        candidate = W_hn @ (diag(r) + diag(h_prev * r * (1 - r)) @ W_hr)  # (H14)
    J = diag(z) + diag((1 - z) * (1 - n**2)) @ candidate + diag((h_prev - n) * z * (1 - z)) @ W_hz
    assert_equal(reference.gru_cell_backward(ROWS, cache)["dh_prev"], J)
