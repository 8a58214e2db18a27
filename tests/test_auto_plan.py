"""``FUSEDRNN_CUDA_PLAN=auto`` on the emulated GPU: both ways on the call's own data, held against one another; the
sooner one is kept.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = """
import sys, torch, fusedrnn
assert fusedrnn._C.isa() == "persistent"
torch.backends.cudnn.allow_tf32 = False
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    for name, options in (("LSTM", {}), ("GRU", {"bidirectional": True}), ("RNN", {})):
        ours = getattr(fusedrnn, name)(5, 12, dtype=dtype, **options)
        theirs = getattr(torch.nn, name)(5, 12, **options)
        theirs.load_state_dict(ours.state_dict())
        for lengths in (None, torch.tensor([4, 3, 1])):
            x = torch.randn(4, 3, 5)
            found = []
            for layer, input in ((ours, x.to(dtype)), (ours, x.to(dtype)), (theirs, x)):
                input = input.clone().requires_grad_()
                given = input if lengths is None else torch.nn.utils.rnn.pack_padded_sequence(input, lengths)
                y = layer(given)[0]
                y = y if lengths is None else y.data
                found.append([y, *torch.autograd.grad(y.float().square().sum(), [input, *layer.parameters()])])
            for a, b, c in zip(*found):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
                torch.testing.assert_close(a.float(), c, rtol=0.1 if dtype != torch.float32 else 1e-3,
                                           atol=0.1 if dtype != torch.float32 else 1e-4)
# Of two products, and of float64: there is no kernel for many steps.
fusedrnn.GRU(5, 12, reset_after=False)(torch.randn(4, 3, 5))
fusedrnn.LSTM(5, 12, dtype=torch.float64)(torch.randn(4, 3, 5, dtype=torch.float64))
"""


def run(code: str, cache: Path, plan: str) -> subprocess.CompletedProcess:
    settings = {"FUSEDRNN_CPU_ISA": "persistent", "FUSEDRNN_CUDA_PLAN": plan, "XDG_CACHE_HOME": str(cache)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | settings, capture_output=True, text=True
    )


def test_both_ways_are_measured_once_and_kept(tmp_path: Path) -> None:
    done = run(PROGRAM, tmp_path, "auto")
    assert done.returncode == 0, done.stderr
    file = tmp_path / "fusedrnn" / "choices.txt"
    first, *lines = file.read_text().splitlines()
    kinds = [line.split("\t")[1] for line in lines]
    cells = [f"{cell} {dtype}" for dtype in ("float32", "bfloat16") for cell in ("lstm", "gru", "rnn_tanh")]
    expected = [
        f"{cell} {what} T4 B4 H12 D{2 if 'gru' in cell else 1}{ragged}"
        for cell in cells for ragged in ("", " ragged") for what in ("forward", "backward")
    ]  # fmt: skip
    assert first == "fusedrnn choices 1" and kinds == expected
    for line in lines:
        machine, _, way, stepwise, persistent, failure = line.split("\t")
        assert machine == "emulated" and failure == ""  # their results agree
        assert way == ("persistent" if float(persistent) < float(stepwise) else "stepwise")
    again = run(PROGRAM, tmp_path, "auto")
    assert again.returncode == 0 and file.read_text().splitlines() == [first, *lines]


def test_a_chaotic_network_condemns_no_kernel(tmp_path: Path) -> None:
    """Both ways are right, and their results are far apart after 60 steps: the first ones say that they agree."""
    code = """
import torch, fusedrnn
torch.backends.cudnn.allow_tf32 = False
torch.manual_seed(0)
layer, results = fusedrnn.RNN(8, 64), []
torch.nn.init.normal_(layer.weight_hh_l0, std=3 / 8)
x = torch.randn(60, 4, 8)
for length in (60, 8):
    y = layer(x[:length].requires_grad_())[0]
    y.sum().backward()
"""
    done = run(code, tmp_path, "auto")
    assert done.returncode == 0 and "deviate" not in done.stderr, done.stderr
    lines = (tmp_path / "fusedrnn" / "choices.txt").read_text().splitlines()[1:]
    assert len(lines) == 4 and all(line.endswith("\t") for line in lines)  # no failure


def test_each_call_goes_by_the_settings_of_its_time(tmp_path: Path) -> None:
    """In deterministic mode what is known is taken, and nothing is measured; TF32 is another kind of call."""
    code = """
import torch, fusedrnn
layer, x = fusedrnn.LSTM(3, 4), torch.ones(2, 1, 3, requires_grad=True)
torch.use_deterministic_algorithms(True)
y = layer(x)[0]
torch.use_deterministic_algorithms(False)
torch.backends.cudnn.rnn.fp32_precision = "ieee"
y.sum().backward()
torch.use_deterministic_algorithms(True)
layer(x)[0].sum().backward()
torch.use_deterministic_algorithms(False)
torch.backends.cudnn.rnn.fp32_precision = "tf32"
layer(x)
"""
    done = run(code, tmp_path, "auto")
    assert done.returncode == 0, done.stderr
    _, *lines = (tmp_path / "fusedrnn" / "choices.txt").read_text().splitlines()
    kinds = [line.split("\t")[1] for line in lines]
    assert kinds == ["lstm float32 backward T2 B1 H4 D1", "lstm float32 tf32 forward T2 B1 H4 D1"]


UNDECIDED = {
    "nan in x": ("layer(torch.full_like(x, float('nan')))", []),
    "gradients beyond float16": (
        "layer.half()(x.half())[0].backward(torch.full((4, 3, 16), 6e4).half())",
        ["lstm float16 forward T4 B4 H16 D1"],
    ),
}


@pytest.mark.parametrize(("code", "kinds"), UNDECIDED.values(), ids=UNDECIDED)
def test_results_that_are_not_finite_decide_nothing(code: str, kinds: list[str], tmp_path: Path) -> None:
    setup = "import torch, fusedrnn\nlayer, x = fusedrnn.LSTM(3, 16), torch.ones(4, 3, 3, requires_grad=True)\n"
    done = run(setup + code, tmp_path, "auto")
    assert done.returncode == 0, done.stderr
    file = tmp_path / "fusedrnn" / "choices.txt"
    lines = file.read_text().splitlines()[1:] if file.exists() else []
    assert [line.split("\t")[1] for line in lines] == kinds


@pytest.mark.parametrize("plan", ["", "stepwise", "persistent"])
def test_nothing_is_measured_by_another_plan(plan: str, tmp_path: Path) -> None:
    done = run("import torch, fusedrnn; fusedrnn.LSTM(3, 4)(torch.ones(2, 1, 3))", tmp_path, plan)
    assert done.returncode == 0 and not list(tmp_path.iterdir())


def test_a_plan_that_is_none(tmp_path: Path) -> None:
    done = run("import torch, fusedrnn; fusedrnn.LSTM(3, 4)(torch.ones(2, 1, 3))", tmp_path, "fast")
    assert "RuntimeError: FUSEDRNN_CUDA_PLAN must be stepwise, persistent or auto, got 'fast'" in done.stderr
