"""The command ``python -m benchmarks.int8_quality``: what int8 costs on a task, beside float32 and bfloat16.

The models of ``examples/char_lm.py``, an LSTM and a GRU, trained as ``make demo`` trains them: bits per character of
held-out text, the same that the demo prints. And a bidirectional LSTM that puts the spaces back into text without any:
bits per character of held-out text, and wrong characters in percent. Each is trained once, in float32, and then judged
as it is, as a whole in bfloat16, and with ``fusedrnn.quantize``: its recurrent weights alone in bfloat16, and in int8.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

import fusedrnn

from . import report

HEADER = f"{'model':40} {'float32':>9} {'bfloat16':>9} {'weights':>9} {'int8':>9}   int8 - float32"


def _demo() -> ModuleType:
    """examples/char_lm.py, which is no package."""
    file = Path(__file__).parent.parent / "examples/char_lm.py"
    spec = importlib.util.spec_from_file_location("char_lm", file)
    module = sys.modules["char_lm"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def forms(model: nn.Module) -> dict[str, nn.Module]:
    """The model in each form, by its name."""
    half, small = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    fusedrnn.quantize(half, dtype="bfloat16")
    fusedrnn.quantize(small)
    whole = copy.deepcopy(model).to(torch.bfloat16)
    return {"float32": model, "bfloat16": whole, "weights": half, "int8": small}


def character_model(demo: ModuleType, text: str, cell: str, steps: int) -> tuple[nn.Module, Callable]:
    """The demo's model after ``steps`` updates, and its bits per held-out character."""
    args = demo.parser().parse_args(["--cell", cell, "--steps", str(steps)])
    processes = demo.Processes()
    vocabulary, training, validation = demo.make_streams(text, args.batch, args.seq)
    torch.manual_seed(args.seed)
    model = demo.CharModel(fusedrnn, cell, len(vocabulary), args.embedding, args.hidden, args.layers)
    state = torch.zeros(2 if cell == "lstm" else 1, args.layers, args.batch, args.hidden)
    run = demo.Run(cell, model, torch.optim.Adam(model.parameters(), lr=args.lr), state)
    demo.train(run, training, processes, args)
    return model, lambda form: [demo.validate(form, validation, processes, args.seq)]


class Spaces(nn.Module):
    """Characters (T, B) -> a logit for each: whether a space follows."""

    def __init__(self, vocabulary: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, 64)
        self.recurrent = fusedrnn.LSTM(64, hidden, bidirectional=True)
        self.head = nn.Linear(2 * hidden, 1)

    def forward(self, characters: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embed(characters))[0]).squeeze(2)


def space_model(demo: ModuleType, text: str, steps: int) -> tuple[nn.Module, Callable]:
    """A model after ``steps`` updates; bits per held-out character and wrong ones in percent."""
    T, B = 100, 32
    letters = [(a, b == " ") for a, b in zip(text, text[1:]) if a not in " \n"]
    vocabulary = {character: i for i, character in enumerate(sorted({a for a, _ in letters}))}
    codes = torch.tensor([[vocabulary[a], int(space)] for a, space in letters])
    held_out = len(codes) // 10
    pieces = [part[: len(part) // (T * B) * T * B].view(-1, B, T, 2) for part in (codes[:-held_out], codes[-held_out:])]
    training, validation = (part.permute(0, 2, 1, 3).contiguous() for part in pieces)
    torch.manual_seed(1)
    model = Spaces(len(vocabulary), 128)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    order = torch.randperm(len(training))
    for step in range(steps):
        batch = training[order[step % len(order)]]
        loss = nn.functional.binary_cross_entropy_with_logits(model(batch[..., 0]), batch[..., 1].float())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    @torch.inference_mode()
    def judged(form: nn.Module) -> list[float]:
        bits, wrong, judged = 0.0, 0, validation[:: max(1, len(validation) // 50)]
        for batch in judged:
            logits, spaces = form(batch[..., 0]).float(), batch[..., 1].float()
            bits += nn.functional.binary_cross_entropy_with_logits(logits, spaces).item() / math.log(2)
            wrong += ((logits > 0) != spaces.bool()).sum().item()
        return [bits / len(judged), 100 * wrong / judged[..., 0].numel()]

    return model, judged


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8_quality", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="updates of each model (default: %(default)s)")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="default: Python's standard library")
    args = parser.parse_args(argv)
    demo = _demo()
    text, source = demo.read_text(args.text)
    print(report.describe(report.machine(torch.get_num_threads())))
    print(f"text: {source}, {len(text):,} characters; {args.steps} updates", HEADER, sep="\n", flush=True)
    models = {
        "LSTM 256, bits per character": lambda: character_model(demo, text, "lstm", args.steps),
        "GRU 256, bits per character": lambda: character_model(demo, text, "gru", args.steps),
        "LSTM 2 x 128, spaces, bits per character": lambda: space_model(demo, text, args.steps),
    }
    for name, make in models.items():
        model, judged = make()
        columns = [judged(form) for form in forms(model).values()]
        for title, values in zip([name, "    wrong characters, %"], zip(*columns, strict=True)):
            numbers = " ".join(f"{value:9.4f}" for value in values)
            print(f"{title:40} {numbers}   {values[3] - values[0]:+.4f}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
