"""``python -m fusedrnn.compare`` passes for every cell, and fails when one entry of any of the three is wrong.

The honest runs go through ``main`` as a user's would; the wrong ones replace one engine by a corrupted copy.
"""

from __future__ import annotations

import numpy as np
import pytest
import tolerances
from loops import TWINS

from fusedrnn import compare
from fusedrnn.cells import CELLS

NAMES = ["y", "h_n", "c_n", "dx", "dh0", "dc0", "dW_ih", "dW_hh", "db_ih", "db_hh", "dW_hr", "da"]
SMALL = ["--time", "3", "--batch", "2", "--input", "3", "--hidden", "4"]


def test_every_cell_has_a_choice() -> None:
    assert {cell.registry for cell in compare.CHOICES.values()} == set(CELLS)


def test_tolerances_are_the_suite_s() -> None:
    assert compare.TOLERANCE.items() <= tolerances.TOLERANCE.items()


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("cell", compare.CHOICES)
def test_passes(cell: str, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([cell, "--dtype", dtype]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 120
    assert "\nPASS: " in out and "FAIL" not in out
    printed = {line.split()[0] for line in out.split(compare.HEADER)[1].split("\n\n")[0].splitlines() if line}
    info = CELLS[compare.CHOICES[cell].registry]
    names = {"y", "dx", *(f"d{weight}" for weight in compare.WEIGHTS)}
    names |= {name for state in info.states for name in (f"{state}_n", f"d{state}0")}
    names |= {"dW_hr"} if cell == "lstm_proj" else {"dW_unit"} if info.has_unit_weight else set()
    names |= {f"{name}[{gate}]" for gate in info.gates for name in ("da", "dW_ih", "dW_hh", "db_ih", "db_hh")}
    assert printed == names
    assert ("torch.nn has no such cell" in out) == (TWINS[compare.CHOICES[cell].registry].torch_layer is None)


@pytest.mark.parametrize("sizes", ["1 1 1 1", "2 1 17 33", "40 5 9 20"])
@pytest.mark.parametrize("cell", [name for name in compare.CHOICES if name not in ("lstm_proj", "rnn_relu")])
def test_passes_at_other_sizes(cell: str, sizes: str) -> None:
    options = zip(("--time", "--batch", "--input", "--hidden"), sizes.split(), strict=True)
    assert compare.main([cell, "--seed", "3", *(word for option in options for word in option)]) == 0


@pytest.mark.parametrize("wrong_by", [1e-6, np.nan])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("engine", ["reference", "torch", "fused"])
def test_fails_when_one_entry_is_wrong(
    engine: str, name: str, wrong_by: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = compare.ENGINES[engine]

    def corrupted(problem: compare.Problem) -> compare.Results:
        results = honest(problem)
        results[name] = results[name].copy()
        results[name].flat[-1] += wrong_by
        return results

    monkeypatch.setitem(compare.ENGINES, engine, corrupted)
    assert compare.main(["lstm_proj", *SMALL]) == 1
    verdict = capsys.readouterr().out.splitlines()[-1]
    by_gate = {"da": ["da[o]"], **{weight: [weight, f"{weight}[o]"] for weight in ("dW_ih", "dW_hh", "db_ih", "db_hh")}}
    expected = by_gate.get(name, [name])
    assert verdict.startswith(f"FAIL: {len(expected)} of ")
    assert verdict.endswith(": " + ", ".join(expected))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["gru", "--proj", "2"], "--proj: gru has no projection"),
        (["lstm", "--proj", "6"], "--proj must be smaller than --hidden, got 6 and 6"),
        (["lstm_proj", "--hidden", "1"], "--proj must be smaller than --hidden, got 1 and 1"),
        (["lstm", "--time", "0"], "must be at least 1, got 0"),
        (["lstm", "--seed", "-1"], "must be at least 0, got -1"),
        (["elman"], "invalid choice: 'elman'"),
    ],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        compare.main(argv)
    assert message in capsys.readouterr().err
