"""The benchmark command: its registry, its count of operations, what it writes, and that it refuses wrong results.

Times are never asserted; every run here is far too short to mean anything.
"""

import json
import math
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import fusedrnn
from benchmarks import __main__ as command
from benchmarks import (
    beside_loops,
    cases,
    dropout,
    int8,
    int8_quality,
    layer_norm,
    limits,
    measure,
    memory,
    own_cells,
    per_sample,
    probes,
    python_threads,
    report,
    scaling,
    second_order,
    sequences,
    single_steps,
    slstm,
    streaming,
    through_time,
    works_with,
)  # fmt: skip
from benchmarks.cases import CASES, CELL_NAMES, REGIMES, Case
from fusedrnn import LSTM
from fusedrnn.cells import CELLS

TINY = (3, 2, 5, 7)


@pytest.fixture
def tiny(monkeypatch):
    """A registry of tiny cases, one of each kind, and samples of a single call."""
    chosen = [Case(cell, mode, TINY) for cell in CELL_NAMES for mode in cases.MODES]
    chosen += [
        Case("lstm", "train", TINY, layers=2, directions=2, projection=3),
        Case("gru", "train", (6, 4, 5, 7), ragged=True, main=True),
        Case("lstm", "infer", TINY, dtype="bfloat16"),
        Case("rnn", "train", TINY, dtype="float64"),
    ]
    monkeypatch.setattr(measure, "SAMPLE_SECONDS", 1e-9)
    monkeypatch.setattr(command, "CASES", {case.name: case for case in chosen})
    return chosen


def test_names_are_unique():
    assert len(list(cases._registry())) == len(CASES)


def test_every_cell_has_cases():
    assert set(CELL_NAMES.values()) == set(fusedrnn.CELLS)
    timed = {(case.cell, case.mode) for case in CASES.values()}
    assert timed == {(cell, mode) for cell in CELL_NAMES for mode in cases.MODES}


def test_the_default_set_is_three_shapes_of_three_cells_in_two_modes():
    main = [case for case in CASES.values() if case.main]
    shapes = {(100, 32, 128, 128), (50, 64, 256, 256), (1000, 8, 64, 64)}
    assert {(case.cell, case.mode, case.shape) for case in main} == {
        (cell, mode, shape) for cell in ("lstm", "gru", "rnn") for mode in cases.MODES for shape in shapes
    }
    assert command.choose(command.parser().parse_args([])) == main


@pytest.mark.parametrize("case, flops", [
    (Case("lstm", "infer", TINY), 6 * (2 * 28 * 5 + 2 * 28 * 7)),  # 6 rows; W_ih is 28 x 5, W_hh 28 x 7
    (Case("lstm", "train", TINY), 3 * 4032),
    (Case("gru", "infer", TINY), 6 * 2 * 21 * 12),
    (Case("rnn", "infer", TINY), 6 * 2 * 7 * 12),
    (Case("lstm", "infer", TINY, projection=3), 6 * (2 * 28 * 5 + 2 * 28 * 3 + 2 * 3 * 7)),
    (Case("rnn", "infer", TINY, layers=2, directions=2), 6 * 2 * 2 * (7 * 5 + 7 * 7 + 7 * 14 + 7 * 7)),
    (Case("rnn", "infer", (6, 4, 5, 7), ragged=True), (6 + 4 + 3 + 2) * 2 * 7 * 12),
])  # fmt: skip
def test_flops(case, flops):
    assert case.flops() == flops


def test_both_kinds_of_machine_have_a_table_in_the_readme():
    text = (Path(__file__).parent.parent / "README.md").read_text()
    names = {report.block({"avx512": there}) for there in (False, True)}
    assert len(names) == 2
    for name in names:
        table = text.split(report.BEGIN.replace("benchmarks", name))[1].split(report.END.replace("benchmarks", name))[0]
        assert table.count("\n| lstm ") == table.count("\n| gru ") == table.count("\n| rnn ") == 3


def test_a_choice_of_the_element_type():
    args = command.parser().parse_args(["--all", "--dtype", "bfloat16"])
    chosen = command.choose(args)
    assert {case.dtype for case in chosen} == {"bfloat16"} and len({case.name for case in chosen}) == len(chosen)
    assert {(case.cell, case.shape) for case in chosen} == {(case.cell, case.shape) for case in CASES.values()}


@pytest.mark.parametrize("case", [case for case in CASES.values() if case.ragged], ids=lambda case: case.name)
def test_ragged_lengths_never_increase(case):
    lengths = case.lengths()
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == case.shape[0] and lengths[-1] >= 1 and len(set(lengths)) > 1


def test_every_output_of_the_command(tiny, tmp_path, capsys):
    readme = tmp_path / "README.md"
    name = report.block({"avx512": "avx512" in fusedrnn._C.supported_isas()})
    begin, end = (marker.replace("benchmarks", name) for marker in (report.BEGIN, report.END))
    readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    files = {name: tmp_path / "out" / name for name in ("r.json", "r.png")}
    options = ["--all", "--quick", "--threads", "1", "--markdown", "--readme", str(readme)]
    options += ["--json", str(files["r.json"]), "--plot", str(files["r.png"])]
    assert command.main(options) == 0

    printed = capsys.readouterr().out
    assert all(case.name in printed for case in tiny)
    text = readme.read_text()
    assert text.startswith(f"before\n{begin}\n") and text.endswith(f"{end}\nafter\n")
    shapes = {case.name.replace(f"-{case.mode}-", " ", 1) for case in tiny if case.has_torch}
    assert "old" not in text and all(text.count(f"| {shape} |") == 1 for shape in shapes)
    assert files["r.png"].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    found = json.loads(files["r.json"].read_text())
    assert found["machine"]["isa"] == fusedrnn._C.isa() and found["machine"]["torch"] == torch.__version__
    assert [row["name"] for row in found["results"]] == [case.name for case in tiny]
    for row, case in zip(found["results"], tiny):
        assert row["rounds"] == 3 and row["ours_ms"] > 0
        assert row["gflops"] == pytest.approx(case.flops() / row["ours_ms"] / 1e6)
        assert row["percent"] == pytest.approx(
            100 * row["gflops"] / row["peak_gflops"] * (2 if case.dtype == "float64" else 1)
        )
        assert row["deviation"] <= measure.TOLERANCE[case.dtype]
        if case.has_torch:
            assert 0 < row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
            assert row["torch_ms"] > 0 and row["torch_threads"] == 1
        else:
            assert row["ratio"] is None and row["torch_ms"] is None


class WrongGradient(fusedrnn.GRU):
    """The right values, but gradients one percent too large."""

    def forward(self, x, hx=None):
        output, state = super().forward(x, hx)
        return 1.01 * output - 0.01 * output.detach(), state


def test_a_wrong_result_is_not_timed(tiny, monkeypatch, capsys):
    monkeypatch.setattr(fusedrnn, "GRU", WrongGradient)
    assert command.main(["--only", "^gru-infer", "--quick"]) == 0
    assert command.main(["--only", "^gru-train-T3", "--quick"]) == 1
    error = capsys.readouterr().err
    assert "gru-train-T3-B2-I5-H7: dx deviates by 1.0e-02" in error


def test_both_sides_start_each_round_in_turn():
    calls = []
    timers = [measure.Timer(lambda i=i: calls.append(i), torch.get_num_threads()) for i in (0, 1)]
    calls.clear()
    for timer in timers:
        timer.repeats = 1
    rounds, peaks = measure.run_rounds(timers, 0.0, 3)
    assert rounds.shape == (3, 2) and len(peaks) == 3
    assert calls == [0, 1, 1, 0, 0, 1]


def test_no_product_passes_the_peak():
    """A thread that only multiplies and adds does at least what a large product of torch reaches."""
    peak = max(probes.peak_flops(1, 0.02) for _ in range(5)) / 1e9
    if fusedrnn._C.isa() != "base":  # torch uses the CPU's best
        assert 0.9 * measure.matmul_gflops(1, 512) < peak
    assert 0.1 < peak < 1000


def test_the_summary_counts_losses():
    case = Case("rnn", "infer", TINY)
    results = [
        measure.Result(case, 3, 1, 1.0, 1.0, 2.0, 0.0, torch_ms=r, torch_threads=1, ratio=r, ratio_low=r, ratio_high=r)
        for r in (0.5, 2.0, 3.0)
    ]
    assert "2 faster, 1 slower; lowest ratio 0.50" in report.summary(results)


def test_regimes_are_geometric_means_of_cases_alike():
    def result(cell: str, mode: str, shape: tuple, ratio: float, gflops: float) -> measure.Result:
        case = Case(cell, mode, shape)
        return measure.Result(case, 3, 1, 1.0, gflops, 100.0, 0.0, ratio=ratio, ratio_low=ratio, ratio_high=ratio)

    assert all(case.regime in REGIMES for case in CASES.values())
    table = report.regimes([
        result("lstm", "infer", (50, 64, 9, 256), 1.0, 50.0),
        result("lstm", "infer", (20, 32, 9, 1024), 4.0, 50.0),
        result("gru", "infer", (20, 32, 9, 256), 3.0, 50.0),
        result("lstm", "train", (50, 64, 9, 256), 8.0, 20.0),
        result("rnn", "infer", (1, 1, 128, 128), 5.0, 1.0),
    ])  # fmt: skip
    assert table.splitlines()[2:] == [
        "| B >= 32, H >= 256 | 4 | 50 / 20 | 2.00 / 8.00 | 3.00 / - | - / - |",
        "| T = 1, B = 1, H = 128 | 1 | 1 / - | - / - | - / - | 5.00 / - |",
    ]


@pytest.mark.parametrize("text", ["", f"{report.END}\n{report.BEGIN}", f"{report.BEGIN}{report.BEGIN}{report.END}"])
def test_a_readme_without_markers_is_an_error(tmp_path, text):
    file = tmp_path / "README.md"
    file.write_text(text)
    with pytest.raises(ValueError, match="once"):
        report.update_readme(file, "table\n")
    assert file.read_text() == text


@pytest.mark.parametrize("options, message", [
    (["--cells", "lstm,clockwork"], "unknown clockwork"),
    (["--only", "("], "no regular expression"),
    (["--only", "nothing-has-this"], "no case matches"),
    (["--threads", "0"], "must be at least 1"),
    (["--phases"], "make phases"),
])  # fmt: skip
def test_bad_options_are_errors(capsys, monkeypatch, options, message):
    monkeypatch.setattr(fusedrnn._C, "phases", lambda: None)  # as in a build without timers
    with pytest.raises(SystemExit) as error:
        command.main(options)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_phases_are_shares_of_all_threads_time(capsys, monkeypatch):
    """Two threads that wait half of the time for each other, as a build with timers would report them."""
    timer = measure.Timer(lambda: time.sleep(0.01), 2)
    spent = timer.spent
    monkeypatch.setattr(fusedrnn._C, "phases", lambda: {"wait": spent, "cell": 0.4 * spent, "pack": 0.0})
    shares = timer.phases()
    assert shares == pytest.approx({"wait": 0.5, "cell": 0.2, "pack": 0.0, "outside": 0.3})
    assert timer.phases() is None  # nothing was timed since
    result = measure.Result(next(iter(CASES.values())), 3, 2, 1.0, 1.0, 1.0, 0.0, phases=shares)
    assert report.phases(result).split(", ") == ["    wait 50.0%", "outside 30.0%", "cell 20.0%"]


@pytest.mark.skipif(fusedrnn._C.phases() is None, reason="a build without timers (make sanitize-memory has them)")
def test_the_timers_see_every_phase_of_a_layer(threads):
    layer, x = fusedrnn.LSTM(64, 128, bidirectional=True), torch.randn(20, 32, 64, requires_grad=True)
    threads(4)  # two a direction: slices of the batch
    fusedrnn._C.phases()
    layer(x)[0].sum().backward()
    seconds = fusedrnn._C.phases()
    assert all(value > 0 for value in seconds.values()), seconds
    assert all(value == 0 for value in fusedrnn._C.phases().values())


def test_list_prints_names_only(capsys):
    assert command.main(["--list", "--cells", "gru", "--only", "ragged"]) == 0
    assert capsys.readouterr().out.split() == [
        name for name, case in CASES.items() if case.cell == "gru" and case.ragged
    ]


@pytest.mark.parametrize("cell", CELL_NAMES)
def test_kept_memory_is_what_the_cell_saves(cell):
    """Gates and c, in rows of whole cache lines, at most two more: and less than torch.nn keeps."""
    case = Case(cell, "train", (7, 3, 5, 64))
    found, info = memory.kept(fusedrnn, case), CELLS[CELL_NAMES[cell]]
    values = info.saved + len(info.states) - 1
    assert values <= found <= values + 2 * 16 / 64
    if case.has_torch and cell != "rnn_relu":
        assert found < memory.kept(torch.nn, case)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_memory_command_prints_both_libraries(capsys):
    name = "rnn-train-T200-B4-I32-H32"
    assert memory.main([name]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(name))
    assert len(row.split()) == 5 and all(float(value) >= 0 for value in row.split()[1:])
    with pytest.raises(SystemExit):
        memory.main(["no-such-case"])
    assert "no such case" in capsys.readouterr().err


def test_the_limits_are_readings(capsys):
    assert limits.main(["--rounds", "1", "--threads", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == 2 + 2 * len(limits.KILOBYTES) + 1
    assert all(0 < float(line.split()[-1]) < math.inf for line in lines)


def test_the_command_for_python_threads_prints_calls_and_ready_threads(capsys, monkeypatch):
    monkeypatch.setattr(python_threads, "SHAPES", (TINY,))
    assert python_threads.main(["--cells", "gru,residual", "--seconds", "0.01", "--rounds", "1"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "-T3-B2-" in line]
    assert [line.split()[:2] for line in rows] == [
        [f"{cell}-{mode}-T3-B2-I5-H7", name]
        for mode in cases.MODES
        for cell, name in (("gru", "torch.nn"), ("gru", "fusedrnn"), ("residual", "fusedrnn"))
    ]
    assert all("(1.00)" in line for line in rows)
    with pytest.raises(SystemExit):
        python_threads.main(["--cells", "nothing"])


def test_the_scaling_command_prints_readings_beside_the_model(capsys, monkeypatch):
    monkeypatch.setattr(scaling, "GROWTH", ((10, 4, 16, 16),))
    monkeypatch.setattr(scaling, "SHAPES", ((20, 4, 64, 96), (20, 16, 32, 32)))
    assert scaling.main(["--cells", "gru", "--threads", "2", "--seconds", "0.01", "--rounds", "1"]) == 0
    out = capsys.readouterr().out
    assert "gru-infer-T10-B4-I16-H16" in out and "a meeting of two" in out
    team, slices = (line for line in out.splitlines() if line.startswith("gru-infer-T20"))
    assert "1x2" in team and "2x1" in slices and "(2.00) 2x1" in slices
    case = Case("lstm", "infer", (100, 1, 256, 256))
    plan = probes.plan([1] * 100, 256, 256, 1, 4, fusedrnn._C.vector_bytes() // 4, 8)
    seconds, found = scaling.model(case, 8, 1.0, 1e-3)
    assert found == plan and seconds == pytest.approx(1 / plan["members"] + 100 * 1e-3 * (plan["members"] - 1))
    with pytest.raises(SystemExit):
        scaling.main(["--cells", "nothing"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_per_sample_gradients_are_compared_before_they_are_timed(capsys, monkeypatch):
    name, case = "gru-train-T5-B4-I8-H8", Case("gru", "train", (5, 4, 8, 8))
    monkeypatch.setattr(per_sample, "CASES", {name: case})
    assert per_sample.main([name, "--peak-of", "fusedrnn"]) == 0
    assert float(capsys.readouterr().out) >= 0
    monkeypatch.setattr(per_sample, "peak", lambda library, case: 1.0)  # processes of their own: slow to start
    assert per_sample.main([name, "--seconds", "0.01"]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert row[0] == name and all(float(value) > 0 for value in row[1:3]) and "loop" in row
    calls = per_sample.contenders(case)
    wrong = calls["fusedrnn"]()
    wrong["weight_hh_l0"][3] *= 1.01
    with pytest.raises(measure.Disagreement, match="weight_hh_l0"):
        per_sample.check(case, calls | {"fusedrnn": lambda: wrong})
    with pytest.raises(SystemExit):
        per_sample.main(["no-such-case"])


def test_second_derivatives_are_compared_before_they_are_timed(capsys, monkeypatch):
    cases = {case.name: case for cell in ("lstm", "rnn") for case in [Case(cell, "train", (5, 4, 8, 8))]}
    cells = {case.name: case for case in [second_order.CellCase("GRUCell", (5, 4, 8, 8))]}
    monkeypatch.setattr(second_order, "CASES", cases | cells)
    assert second_order.main([*cases, *cells, "--seconds", "0.01"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-8:]]
    assert [row[1] for row in rows] == ["penalty", "hvp", "jvp"] * 2 + ["penalty", "hvp"]
    assert rows[2][3:] == ["refused", "-"] and all(float(row[2]) > 0 for row in rows)
    calls = second_order.contenders(next(iter(cases.values())), "hvp")
    wrong = [t * 1.01 for t in calls["fusedrnn"]()]
    with pytest.raises(measure.Disagreement, match="result 0"):
        second_order.check(next(iter(cases.values())), calls | {"fusedrnn": lambda: wrong})
    with pytest.raises(SystemExit):
        second_order.main(["no-such-case"])


def test_sequences_are_compared_before_they_are_timed(capsys, monkeypatch):
    monkeypatch.setattr(sequences, "SHAPES", {"lengths": (9, 4, 8, 8), "reset": (9, 4, 8, 8)})
    assert sequences.main(["--seconds", "0.01"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["lengths,"] * 6 + ["reset,"] * 6 and all(float(row[2]) > 0 for row in rows)
    monkeypatch.setattr(sequences, "by_reset", lambda layer, x, reset: layer(x)[0] * (1 + isinstance(layer, LSTM)))
    with pytest.raises(measure.Disagreement, match="lstm-train.*reset"):
        sequences.measure("reset", Case("lstm", "train", (9, 4, 8, 8)), 0.01)


def test_streams_are_compared_before_they_are_timed(capsys, monkeypatch):
    monkeypatch.setattr(streaming, "SHAPES", ((2, 8),))
    assert streaming.main(["--seconds", "0.01"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["LSTM", "GRU", "RNN"] and all(
        float(value) > 0 for value in rows[0][3:9] if value != "none"
    )
    monkeypatch.setattr(fusedrnn.GRU, "step", lambda self, x, state: (x, state))
    with pytest.raises(measure.Disagreement, match="GRU, B 2, H 8: step deviates"):
        streaming.measure("GRU", 2, 8, 0.01)


def test_int8_is_compared_before_it_is_timed(capsys, monkeypatch):
    monkeypatch.setattr(int8, "SHAPES", ((2, 8),))
    monkeypatch.setattr(int8, "SETTLE_SECONDS", 0)
    assert int8.main(["--seconds", "0.01"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows[:6]] == ["LSTM", "LSTM", "GRU", "GRU", "RNN", "RNN"]
    assert all(float(value) > 0 for row in rows[:6] for value in row[4:10] if value != "none")
    assert [row[:3] for row in rows[6:8]] == [["torch.nn", "over", "int8:"], ["float32", "over", "int8:"]]
    monkeypatch.setattr(fusedrnn.QuantizedRecurrent, "step", lambda self, x, state: (x, state))
    with pytest.raises(measure.Disagreement, match="LSTM B2 H8: int8 deviates"):
        int8.contenders("LSTM", 1, 2, 8, 1)


def test_int8_is_judged_on_tasks(capsys, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 3000)
    assert int8_quality.main(["--steps", "2", "--text", str(file)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    assert [row[0] for row in rows] == ["LSTM", "GRU", "LSTM", "wrong"]
    for row in rows:
        exact, half, small, difference = map(float, row[-4:])
        assert abs(half - exact) < 0.05 * exact and abs(small - exact) < 0.05 * exact
        assert abs(small - exact - difference) < 2e-4


def test_cells_are_compared_before_they_are_timed(capsys, monkeypatch):
    monkeypatch.setattr(single_steps, "SHAPES", ((2, 8),))
    assert single_steps.main(["--seconds", "0.01"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    cells = [cell for cell in single_steps.CELLS for _ in single_steps.MODES]
    assert [row[0] for row in rows[:-4]] == cells and all(float(row[7]) > 0 for row in rows[:-4])
    assert [row[0] for row in rows[-4:]] == ["infer:", "train:", "once:", "function:"]
    monkeypatch.setattr(fusedrnn.GRUCell, "forward", lambda self, x, state=None: x * self.weight_hh.sum())
    with pytest.raises(measure.Disagreement, match="GRUCell B2 H8: result 0 deviates"):
        list(single_steps.rows(0.01))


@pytest.mark.usefixtures("added_cells_go")
@pytest.mark.parametrize(
    ("commands", "names"), [(layer_norm, ["lstm", "gru"]), (own_cells, ["mgu"]), (slstm, ["slstm", "slstm_4_heads"])]
)
def test_layers_are_compared_with_a_loop_before_they_are_timed(commands, names, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(commands, "SHAPES", ((4, 3, 5, 8),))
    monkeypatch.setenv("FUSEDRNN_CACHE", str(tmp_path))
    commands.main([*names, "--seconds", "0.01"])
    header, *rows = capsys.readouterr().out.splitlines()[1:]
    assert header.split() == ["case", "ms:", "layer", "over", "the", "layer"]
    assert [row.split()[:2] for row in rows] == [[name, mode] for name in names for mode in beside_loops.MODES]
    for row in rows:
        milliseconds, ratios = row.split("H8")[1].split(maxsplit=1)
        assert float(milliseconds) > 0 and "loop" in ratios
        assert all(float(ratio.split()[-1]) > 0 for ratio in ratios.split(", "))
    commands.main([*names, "--only", "train T9"])
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("mode", beside_loops.MODES)
@pytest.mark.parametrize("cell", slstm.CELLS)
def test_slstm_is_that_of_its_authors(cell, mode):
    pytest.importorskip("xlstm", reason="requirements-peers.txt")
    slstm.contenders(cell, (9, 3, 5, 8), mode, Namespace(peers=True)).check()


def test_a_layer_that_is_not_its_loop_is_not_timed():
    data = beside_loops.Data.drawn((4, 3, 5, 7), "infer")
    weight = torch.randn(7, 5)
    calls = {
        "layer": data.of_loop(lambda x, weights: x @ (weights[0] * 1.001).t(), [weight]),
        "loop": data.of_loop(lambda x, weights: x @ weights[0].t(), [weight]),
        "other": data.of_loop(lambda x, weights: x, [weight]),
    }
    with pytest.raises(measure.Disagreement, match="case: layer deviates by"):
        beside_loops.Beside("case", calls, others=frozenset({"other"})).measure(0.01)


def test_options_of_the_backward_pass_are_timed(capsys, monkeypatch):
    monkeypatch.setattr(through_time, "CASES", [Case("lstm", "train", (9, 4, 8, 8))])
    assert through_time.main(["--seconds", "0.01"]) == 0
    row = capsys.readouterr().out.splitlines()[-1].split()
    assert len(row) == 9 and all(float(value) > 0 for value in row[1:-1])
    assert float(row[-2]) >= 5 and float(row[-1]) == 0


def test_dropout_is_timed(capsys, monkeypatch):
    monkeypatch.setattr(dropout, "SHAPES", ((5, 3, 8),))
    assert dropout.main(["--seconds", "0.01"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 9 and all(float(value) > 0 for row in rows for value in row.split("H8")[1].split())


def test_the_readme_says_what_works():
    """Everything of ours but TorchScript, and of torch.nn what the table says: a new torch may change that."""
    found = works_with.readings()
    assert [name for name, (_, ours) in found.items() if ours != "yes"] == [list(works_with.ROWS)[-1]]
    page = (Path(__file__).parent.parent / "docs/works-with.md").read_text()
    table = page.split(report.BEGIN.replace("benchmarks", "works with"))[1].split("-->")[0]
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines() if line.startswith("| ")}
    for name, (theirs, _) in found.items():
        if not name.startswith("autocast"):  # oneDNN's types are the processor's
            assert (" | yes | " in rows[name]) == (theirs == "yes"), name
