"""``python -m fusedrnn.gradflow``: its tasks, what it measures against autograd, and the command from end to end."""

from __future__ import annotations

import importlib.util
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Generator, nn

import fusedrnn
from fusedrnn import gradflow
from fusedrnn.gradflow import COPIED, SYMBOLS, TASKS, VARIANTS

NUMBER = r"(<1e-300|inf|nan|-?\d+(\.\d+)?(e[+-]?\d+)?)"
SMALL = {"steps": 3, "hidden": 5, "batch": 4}


def generator() -> Generator:
    return Generator().manual_seed(3)


# --- tasks ---


@pytest.mark.parametrize("lag", [3, 10, 11])
def test_adding_is_the_sum_of_two_marked_values(lag: int) -> None:
    x, target = gradflow.adding(lag, 200, generator())
    assert x.shape == (lag, 200, 2) and target.shape == (1, 200)
    values, marks = x.unbind(2)
    assert 0 <= values.min() and values.max() < 1 and values.std() > 0.25
    assert set(marks.unique().tolist()) == {0, 1}
    for half in (marks[: lag // 2], marks[lag // 2 :]):
        assert (half.sum(0) == 1).all()
        assert (half.sum(1) > 0).all()  # every step is marked for some sample
    for b in range(200):
        first, second = marks[:, b].nonzero().flatten().tolist()
        assert target[0, b].item() == pytest.approx((values[first, b] + values[second, b]).item())


def test_copy_asks_for_the_first_symbols_in_the_last_steps() -> None:
    lag = 7
    x, target = gradflow.copying(lag, 300, generator())
    assert x.shape == (lag + 2 * COPIED, 300, SYMBOLS + 2) and target.shape == (COPIED, 300)
    assert (x.sum(2) == 1).all()
    codes = x.argmax(2)
    assert torch.equal(codes[:COPIED], target) and set(target.unique().tolist()) == set(range(SYMBOLS))
    assert (codes[COPIED + lag] == SYMBOLS + 1).all()
    blanks = torch.cat([codes[COPIED : COPIED + lag], codes[COPIED + lag + 1 :]])
    assert (blanks == SYMBOLS).all()


@pytest.mark.parametrize("name", TASKS)
def test_a_blind_guess_costs_what_the_task_says(name: str) -> None:
    task = TASKS[name]
    _, target = task.draw(12, 20000, generator())
    best = target.mean() if name == "adding" else torch.zeros(SYMBOLS)
    guess = best.expand(*target.shape, task.output_size)
    assert task.loss(guess, target).item() == pytest.approx(task.blind, rel=0.03)


# --- what is measured ---


def layer(name: str) -> nn.RNNBase:
    torch.manual_seed(1)
    made = VARIANTS[name].make(2, 6)
    VARIANTS[name].start(made, 30)
    return made


@pytest.mark.parametrize("name", gradflow.UNGATED)
def test_products_are_autograd_s_and_under_the_bound(name: str) -> None:
    module, T, B = layer(name), 12, 3
    x = torch.randn(T, B, 2)
    norms, gamma, sigma = gradflow.products(module, x)
    assert norms.shape == (T + 1, B) and norms.dtype == torch.float64
    module = module.double()
    with torch.no_grad():
        h = module(x.double())[0]
    for k in (1, 2, 7, 12):
        for b in range(B):
            begin = h[T - k - 1, b] if k < T else torch.zeros(6, dtype=torch.float64)
            later = x[T - k :, b].double()
            J = torch.autograd.functional.jacobian(lambda h0: module(later, h0[None])[1][0], begin)
            assert norms[k, b].item() == pytest.approx(torch.linalg.svdvals(J)[0].item(), rel=1e-9)
    limit = torch.tensor([gradflow.bound(module, gamma, sigma, k) for k in range(T + 1)], dtype=torch.float64)
    assert (norms.amax(1) <= limit * (1 + 1e-12)).all()
    assert sigma == pytest.approx(torch.linalg.svdvals(module.weight_hh_l0)[0].item())
    slopes = 1 - (h.diff(dim=0, prepend=0 * h[:1]) if name == "residual_rnn" else h) ** 2
    assert gamma == slopes.max().item() < 1
    assert gradflow.bound(module, gamma, sigma, 2) == pytest.approx((gamma * sigma + (name == "residual_rnn")) ** 2)


def test_the_bound_overflows_to_inf() -> None:
    assert gradflow.bound(layer("rnn"), 1.0, 3.0, 1000) == math.inf


@pytest.mark.parametrize("other", [fusedrnn.LSTM(2, 3), fusedrnn.RNN(2, 3, 2), fusedrnn.RNN(2, 3, nonlinearity="relu")])
def test_products_refuses_other_layers(other: nn.RNNBase) -> None:
    with pytest.raises(ValueError, match="needs an RNN .tanh. or ResidualRNN of one layer and direction, got "):
        gradflow.products(other, torch.randn(4, 2, 2))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", VARIANTS)
def test_flow_is_the_gradient_that_autograd_gives(name: str, task: str) -> None:
    """Of every state of a loop over single steps; of the LSTM, c in the plain equations."""
    lag, B = 6, 3
    of = TASKS[task]
    run = gradflow.train(VARIANTS[name], of, lag, **SMALL | {"batch": B})
    found = gradflow.flow(run.layer, run.head, of, lag, batch=B, seed=5)
    assert len(found) == (lag if task == "adding" else lag + COPIED + 1) and found[0] == 1

    x, target = of.draw(lag, B, Generator().manual_seed(5))
    module, head = run.layer.double(), run.head.double()
    if isinstance(module, nn.LSTM):
        expected = lstm_cell_gradients(module, head, of, x.double(), target)
    else:
        h, states = None, []
        for x_t in x.double():
            _, h = module(x_t[None], h)
            states.append(h)
        loss = of.loss(head(torch.cat(states[-of.answers :])), target)
        expected = torch.stack([grad[0].norm(dim=1) for grad in torch.autograd.grad(loss, states)])
    back = expected[: len(x) - of.answers + 1].flip(0).log().mean(1).exp()
    torch.testing.assert_close(found, back / back[0], rtol=1e-9, atol=0)


def lstm_cell_gradients(
    module: nn.LSTM, head: nn.Linear, task: gradflow.Task, x: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """(T, B), || dL/dc_t || by torch.autograd through the plain equations (L1) to (L6)."""
    h = c = torch.zeros(x.size(1), module.hidden_size, dtype=x.dtype)
    outputs, states = [], []
    for x_t in x:
        a = x_t @ module.weight_ih_l0.T + module.bias_ih_l0 + h @ module.weight_hh_l0.T + module.bias_hh_l0
        i, f, g, o = a.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
        states.append(c)
    loss = task.loss(head(torch.stack(outputs[-task.answers :])), target)
    return torch.stack([grad.norm(dim=1) for grad in torch.autograd.grad(loss, states)])


def test_flow_says_nan_where_parameters_are() -> None:
    run = gradflow.train(VARIANTS["gru"], TASKS["adding"], 6, **SMALL)
    with torch.no_grad():
        run.layer.weight_hh_l0[0] = torch.nan
    assert gradflow.flow(run.layer, run.head, TASKS["adding"], 6, batch=4).isnan().all()
    assert math.isnan(gradflow.spectrum(run.layer)["r"][0]) and gradflow.spectrum(run.layer)["n"][1] > 0


def test_spectrum_of_each_gate() -> None:
    module = fusedrnn.GRU(2, 2)
    blocks = [[[0.0, 4.0], [1.0, 0.0]], [[3.0, 0.0], [0.0, -5.0]], [[0.0, 7.0], [0.0, 0.0]]]
    with torch.no_grad():
        module.weight_hh_l0.copy_(torch.tensor(blocks).flatten(0, 1))
    found = gradflow.spectrum(module)
    assert list(found) == ["r", "z", "n"]
    for gate, pair in {"r": (2, 4), "z": (5, 5), "n": (0, 7)}.items():
        assert found[gate] == pytest.approx(pair)


# --- training ---


@pytest.mark.parametrize("clip", gradflow.CLIPS)
def test_training_clips_as_it_says(clip: str) -> None:
    """One step of gradient descent at rate 1: the change of all parameters is the clipped gradient."""
    of = {"steps": 1, "hidden": 8, "batch": 4, "clip": clip, "optimizer": lambda p: torch.optim.SGD(p, lr=1.0)}
    run = gradflow.train(VARIANTS["residual_rnn"], TASKS["adding"], 20, **of)
    first = [p for module in run.start for p in module.parameters()]
    change = [p - q for p, q in zip(first, [*run.layer.parameters(), *run.head.parameters()], strict=True)]
    length = torch.cat([each.flatten() for each in change]).norm().item()
    assert run.norms[0] > 2
    assert length == pytest.approx(1.0 if clip == "norm" else run.norms[0], rel=1e-4)
    if clip == "step":
        of["clip"] = "none"
        assert run.norms[0] < gradflow.train(VARIANTS["residual_rnn"], TASKS["adding"], 20, **of).norms[0] / 2


def test_training_ends_when_the_task_is_learned_or_lost() -> None:
    easy = TASKS["adding"]._replace(blind=1e9)
    assert len(gradflow.train(VARIANTS["gru"], easy, 5, **SMALL | {"steps": 50}).losses) == 20
    explode = {"clip": "none", "optimizer": lambda p: torch.optim.SGD(p, lr=1e30)}
    lost = gradflow.train(VARIANTS["residual_rnn"], TASKS["adding"], 5, **SMALL | {"steps": 50} | explode)
    assert len(lost.losses) < 50 and not math.isfinite(lost.losses[-1])


def test_training_leaves_the_random_state_and_takes_a_known_clip() -> None:
    before = torch.get_rng_state()
    gradflow.train(VARIANTS["gru"], TASKS["copy"], 5, **SMALL)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="clip must be one of none, norm, step, got 'value'"):
        gradflow.train(VARIANTS["gru"], TASKS["copy"], 5, clip="value", **SMALL)


# --- the command ---

QUICK = ["--quick", "--lags", "6", "9", "--steps", "3", "--hidden", "5"]


def test_quick_prints_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert gradflow.main(QUICK) == 0
    out = capsys.readouterr().out
    titles = re.findall(r"^### (.*)$", out, re.M)
    assert [title.split(",")[:2] for title in titles[:4]] == [
        [task, f" lag {lag}"] for task in ("adding", "copy") for lag in (6, 9)
    ]
    assert all("at most 3 steps" in title for title in titles[:4])
    tables = re.findall(r"(?:^\|.*\n)+", out, re.M)
    assert len(tables) == len(titles) == 7
    for table in tables:
        header, rule, *rows = table.splitlines()
        assert len({line.count("|") for line in (header, rule, *rows)}) == 1
        for row in rows:
            for cell in row.strip("| ").split(" | ")[1:]:
                assert cell in gradflow.CLIPS or re.fullmatch(rf"{NUMBER}((, | / | \(){NUMBER}\)?)*", cell), row
                assert "nan" not in cell, row
    for table in tables[:4]:
        assert [row.split(" | ")[0].strip("| ") for row in table.splitlines()[2:]] == list(VARIANTS)
    gates = sum(len(gradflow.spectrum(layer(name))) for name in VARIANTS)
    assert len(tables[4].splitlines()) == 2 + gates
    assert len(tables[5].splitlines()) == 2 + 2 * len(gradflow.UNGATED)
    assert len(tables[6].splitlines()) == 2 + len(gradflow.CLIPPED) * len(gradflow.CLIPS)


def test_two_runs_print_the_same_and_another_seed_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*QUICK, "--cells", "rnn", "lstm_chrono", "--tasks", "copy"]
    printed = []
    for extra in ([], [], ["--seeds", "2"]):
        torch.rand(7)  # whatever random numbers were drawn before
        gradflow.main([*argv, *extra])
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]


def test_the_picture_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "pictures"
    gradflow.main([*QUICK, "--cells", "residual_rnn", "gru", "--out", str(out)])
    assert {file.name for file in out.iterdir()} == {
        "flow-adding.png",
        "flow-copy.png",
        "jacobian.png",
        "clipping.png",
    }
    for file in out.iterdir():
        data = file.read_bytes()
        assert data.startswith(b"\x89PNG") and 5_000 < len(data) < 100_000, file


def test_gated_cells_alone_have_no_table_of_products(capsys: pytest.CaptureFixture[str]) -> None:
    gradflow.main([*QUICK, "--cells", "lstm_f0"])
    out = capsys.readouterr().out
    assert "Products" not in out and "Clipping" not in out and "lstm_f0, o" in out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--cells", "elman"], "invalid choice: 'elman'"),
        (["--tasks", "sorting"], "invalid choice: 'sorting'"),
        (["--lags", "2"], "must be at least 3, got 2"),
        (["--steps", "0"], "must be at least 1, got 0"),
        (["--hidden", "-1"], "must be at least 1, got -1"),
        (["--seeds", "0"], "must be at least 1, got 0"),
        (["--lags", "10", "20", "30", "--steps", "1", "2"], "one number or one for each of 3 lags, got 2"),
    ],
)
def test_bad_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gradflow.main(argv)
    assert message in capsys.readouterr().err


def test_pictures_without_matplotlib_are_refused_before_any_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        gradflow.main(["--out", str(tmp_path / "pictures")])
    assert "--out needs matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "pictures").exists()


def test_help_says_how_long_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gradflow.main(["--help"])
    assert "19 minutes" in capsys.readouterr().out
