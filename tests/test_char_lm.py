"""The demo of examples/char_lm.py in small: it trains, compares and plots, and it notices a wrong layer.

Each run goes through main() with a text of its own, so that the command line, the files and the exit status are the
ones a user meets.
"""

import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedrnn

EXAMPLE = Path(__file__).parent.parent / "examples" / "char_lm.py"
SMALL = ["--hidden", "13", "--embedding", "7", "--batch", "3", "--seq", "11", "--steps", "6", "--sample", "25"]

# Runs the example and prints the threads of the process group that are left: each of them may abort the interpreter's
# end, when it frees a tensor.
WATCHED = """
import runpy, sys
from pathlib import Path
try:
    runpy.run_path({!r}, run_name="__main__")
finally:
    names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    sys.__stdout__.write(f"at the end: {{[name for name in names if 'gloo' in name]}}\\n")
"""


@pytest.fixture(scope="module")
def char_lm():
    spec = importlib.util.spec_from_file_location("char_lm", EXAMPLE)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("".join(random.Random(1).choices("abc de\nfé", k=2000)), encoding="utf-8")
    return file


def is_png(file):
    return file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("options", [
    "--cell lstm", "--cell gru", "--cell rnn", "--cell lstm --layers 2 --dtype float64", "--cell gru --dtype bfloat16",
])  # fmt: skip
def test_trains_and_agrees(char_lm, text, tmp_path, capsys, options):
    out = tmp_path / "new" / "folder"
    assert char_lm.main(["--text", str(text), "--out", str(out), *SMALL, *options.split()]) == 0
    printed = capsys.readouterr().out
    assert "the curves agree" in printed
    assert printed.count("bits per character") == 2
    assert "fusedrnn goes on after" in printed
    assert is_png(out / "char_lm.png")


def test_the_standard_library_is_the_default_text(char_lm):
    text, source = char_lm.read_text(None)
    assert "standard library" in source
    assert len(text) > 1_000_000
    assert "def parse_args(self" in text
    assert char_lm.read_text(None)[0] == text


class WrongOutput(fusedrnn.LSTM):
    """Everything one percent too large."""

    def forward(self, x, hx=None):
        output, state = super().forward(x, hx)
        return 1.01 * output, state


class WrongGradient(fusedrnn.LSTM):
    """The right values, but the gradient of the output has the wrong sign."""

    def forward(self, x, hx=None):
        output, state = super().forward(x, hx)
        return (2 * output.detach() - output), state


class NoNumber(fusedrnn.LSTM):
    """NaN everywhere."""

    def forward(self, x, hx=None):
        output, state = super().forward(x, hx)
        return output * torch.nan, state


@pytest.mark.parametrize("layer, message", [
    (WrongOutput, "THE CURVES DIFFER"), (WrongGradient, "THE CURVES DIFFER"), (NoNumber, "NOT FINITE"),
])  # fmt: skip
def test_a_wrong_layer_is_noticed(char_lm, text, tmp_path, capsys, monkeypatch, layer, message):
    monkeypatch.setattr(fusedrnn, "LSTM", layer)
    assert char_lm.main(["--text", str(text), "--out", str(tmp_path), *SMALL]) == 1
    assert message in capsys.readouterr().out


def test_chunks_follow_one_another_and_start_anew(char_lm):
    streams = torch.arange(20).view(2, 10).t()  # [10, 2]: two streams of 10
    pieces = list(char_lm.chunks(streams, 4, 3))
    assert [fresh for _, _, fresh in pieces] == [True, False, True]
    assert pieces[1][0][:, 1].tolist() == [14, 15, 16, 17]
    assert pieces[1][1][:, 1].tolist() == [15, 16, 17, 18]
    assert torch.equal(pieces[2][0], pieces[0][0])


def test_streams_hold_consecutive_text(char_lm):
    text = "".join(chr(97 + i % 26) for i in range(1000))
    vocabulary, train, validation = char_lm.make_streams(text, 4, 5)
    assert vocabulary == sorted(set(text))
    assert train.shape == (225, 4) and validation.shape == (25, 4)
    assert "".join(vocabulary[code] for code in train[:, 1]) == text[225:450]
    assert "".join(vocabulary[code] for code in validation[:, 0]) == text[900:925]


def test_two_files_are_read_in_order(char_lm, tmp_path):
    for name, content in (("b", "second"), ("a", "first")):
        (tmp_path / name).write_text(content)
    assert char_lm.read_text([tmp_path / "a", tmp_path / "b"]) == ("first\nsecond", "2 file(s)")


@pytest.mark.parametrize("content, message", [
    (None, "No such file"),
    (b"", "the text has 0 characters; --batch 32 --seq 100 need at least 32320"),
    (b"too short", "the text has 9 characters"),
    (b"\xff\xfe\x00", "is not UTF-8 text"),
])  # fmt: skip
def test_unusable_text_is_an_error(char_lm, tmp_path, capsys, content, message):
    file = tmp_path / "text"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(SystemExit) as error:
        char_lm.main(["--text", str(file)])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("options", [
    "--steps 0", "--layers x", "--cell transformer", "--dtype int8", "--seq -3", "--temperature 0", "--clip -1"
])  # fmt: skip
def test_bad_options_are_errors(char_lm, capsys, options):
    with pytest.raises(SystemExit) as error:
        char_lm.main(options.split())
    assert error.value.code == 2
    assert options.split()[0] in capsys.readouterr().err


@pytest.fixture
def losses(char_lm, text, tmp_path, monkeypatch):
    """A function that runs the demo in small with more options, and returns the losses of both runs."""

    def run(*options):
        kept = []
        with monkeypatch.context() as patch:
            patch.setattr(char_lm, "plot", lambda runs, title, file: kept.extend(runs))
            assert char_lm.main(["--text", str(text), *SMALL, "--batch", "4", "--dtype", "float64", *options]) == 0
        return [run.losses for run in kept]

    return run


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_resumed_run_is_the_uninterrupted_one(char_lm, losses, tmp_path, capsys, cell, monkeypatch):
    monkeypatch.setattr(char_lm, "CHECKPOINT_STEPS", 2)
    expected = losses("--cell", cell)
    options = ("--cell", cell, "--checkpoint", str(tmp_path / "run"))
    assert losses(*options, "--steps", "3") == [row[:3] for row in expected]
    assert losses(*options, "--steps", "5") == [row[:5] for row in expected]
    assert "fusedrnn: goes on after step 3" in capsys.readouterr().out
    (tmp_path / "run" / "fusedrnn" / "000005" / ".metadata").unlink()  # as if interrupted while it was written
    assert losses(*options) == expected
    assert "fusedrnn: goes on after step 4" in capsys.readouterr().out
    assert losses(*options) == expected  # nothing left to do
    with pytest.raises(SystemExit):
        losses(*options, "--lr", "0.1")
    assert f"holds a run with lr {3e-3}" in capsys.readouterr().err


def test_two_processes(losses, text, tmp_path):
    """torchrun goes on with the checkpoint of one process, and one process with theirs: the same losses throughout."""
    expected = losses("--steps", "7")
    options = ("--checkpoint", str(tmp_path / "run"))
    losses(*options, "--steps", "3")
    watched = tmp_path / "watched.py"
    watched.write_text(WATCHED.format(str(EXAMPLE)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(watched)]
    small = [*SMALL, "--batch", "4", "--dtype", "float64", "--steps", "6", "--text", str(text), "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [*torchrun, *small, *options], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the curves agree") == 1 and "goes on after step 3" in done.stdout
    assert done.stdout.count("at the end: []") == 2, done.stdout
    assert is_png(tmp_path / "char_lm.png")
    for found, known in zip(losses(*options, "--steps", "7"), expected, strict=True):
        assert found == pytest.approx(known, rel=1e-12)
