"""Train one character-level language model twice, with torch.nn and with fusedrnn, and compare.

The two runs start from the same weights and read the same batches, so their loss curves must be the same up
to rounding; the exit status is 1 if they are not. By default the text is the source code of the running
Python's standard library. Writes char_lm.png to --out: both curves, and their difference.

    python examples/char_lm.py --cell gru --hidden 128 --steps 100
    python examples/char_lm.py --text a.txt b.txt
"""

from __future__ import annotations

import argparse
import math
import statistics
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fusedrnn

CLASSES = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN"}
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}

# How far two losses of the same step may lie apart, in nats: within EARLY_STEPS, and later. Rounding is all that
# differs, but training magnifies it, slowly at first and then exponentially: torch.nn.LSTM against itself, with its
# initial weights changed by one unit in the last place, stays within 1e-6 for 100 steps and is 1e-2 apart at step
# 300. So the early steps tell whether two layers are the same; later ones can only show a gross error. Seen between
# the two here, float32, LSTM, GRU and RNN: 7e-7 in 25 steps; 2e-2, 4e-2 and 1e-2 in 400.
EARLY_STEPS = 25
TOLERANCE = {"float32": (1e-4, 2e-1), "float64": (1e-12, 1e-6), "bfloat16": (1e-2, 2e-1)}
VALIDATION_PART = 0.1  # of the text, its end
VALIDATION_CHUNKS = 20  # at most
WARM_UP_STEPS = 10  # not counted in characters per second


class CharModel(nn.Module):
    """Embedding, recurrent layers, linear head: logits of the next character and the new state."""

    def __init__(self, library, cell: str, vocabulary: int, embedding: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, embedding)
        # The one line that differs: library is torch.nn or fusedrnn, as in
        #     self.recurrent = torch.nn.LSTM(embedding, hidden, num_layers=layers)
        #     self.recurrent = fusedrnn.LSTM(embedding, hidden, num_layers=layers)
        # A finished model changes with fusedrnn.convert(model).
        self.recurrent = getattr(library, CLASSES[cell])(embedding, hidden, num_layers=layers)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, characters: Tensor, state=None) -> tuple[Tensor, Tensor | tuple[Tensor, Tensor]]:
        """characters [T, B] -> logits [T, B, vocabulary] and the state after the last step."""
        output, state = self.recurrent(self.embed(characters), state)
        return self.head(output), state


@dataclass
class Run:
    """What one training run gave: a loss (nats per character) and a time (seconds) for each step."""

    name: str
    model: CharModel
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    validation: float = math.nan

    def characters_per_second(self, characters: int) -> float:
        """The rate of the median step of ``characters``, the first steps left out."""
        warm_up = min(WARM_UP_STEPS, len(self.seconds) // 2)
        return characters / statistics.median(self.seconds[warm_up:])


def read_text(files: Sequence[Path] | None) -> tuple[str, str]:
    """The text of the files (or of Python's standard library) and a few words on where it comes from."""
    source = f"{len(files)} file(s)" if files else "the standard library of this Python"
    files = files or sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    return "\n".join(texts), source


def make_streams(text: str, batch: int, seq: int) -> tuple[list[str], Tensor, Tensor]:
    """The vocabulary, and the training and validation text as [length, B]: B streams of consecutive text."""
    vocabulary = sorted(set(text))
    number = {character: i for i, character in enumerate(vocabulary)}
    codes = torch.tensor([number[character] for character in text])
    held_out = int(len(codes) * VALIDATION_PART)
    if held_out < batch * (seq + 1):
        needed = math.ceil(batch * (seq + 1) / VALIDATION_PART)
        raise ValueError(
            f"the text has {len(text)} characters; --batch {batch} --seq {seq} need at least {needed}"
            " (a tenth is kept for validation)"
        )
    parts = codes[:-held_out], codes[-held_out:]
    train, validation = (part[: len(part) // batch * batch].view(batch, -1).t().contiguous() for part in parts)
    return vocabulary, train, validation


def chunks(streams: Tensor, seq: int, count: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """``count`` pieces of T = seq steps: input, target (the next characters), whether the text starts anew."""
    per_pass = (len(streams) - 1) // seq
    for step in range(count):
        at = step % per_pass * seq
        yield streams[at : at + seq], streams[at + 1 : at + seq + 1], at == 0


def detach(state: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """The same state with no history: backpropagation stops at the chunk's first step."""
    return tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy in nats per character, in float32 or wider."""
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def train(run: Run, streams: Tensor, args: argparse.Namespace) -> None:
    """Truncated backpropagation through time with Adam; the state is carried from chunk to chunk."""
    optimizer = torch.optim.Adam(run.model.parameters(), lr=args.lr)
    state = None
    bar = tqdm(chunks(streams, args.seq, args.steps), run.name, args.steps, unit="step", mininterval=0.5)
    for characters, target, fresh in bar:
        start = time.perf_counter()
        logits, state = run.model(characters, None if fresh else detach(state))
        loss = loss_of(logits, target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), args.clip)
        optimizer.step()
        run.losses.append(loss.item())
        run.seconds.append(time.perf_counter() - start)
        bar.set_postfix_str(f"loss {run.losses[-1]:.3f}, {characters.numel() / run.seconds[-1]:,.0f} chars/s", False)


@torch.inference_mode()
def validate(model: CharModel, streams: Tensor, seq: int) -> float:
    """Mean loss on held-out text, in bits per character."""
    losses, state = [], None
    for characters, target, _ in chunks(streams, seq, min(VALIDATION_CHUNKS, (len(streams) - 1) // seq)):
        logits, state = model(characters, state)
        losses.append(loss_of(logits, target).item())
    return statistics.fmean(losses) / math.log(2)


@torch.inference_mode()
def sample(model: CharModel, vocabulary: list[str], prompt: Tensor, length: int, args: argparse.Namespace) -> str:
    """``length`` characters drawn one at a time after ``prompt`` [T, 1]: T=1 calls, the state handed on."""
    generator = torch.Generator().manual_seed(args.seed)
    logits, state = model(prompt)
    drawn = []
    for _ in range(length):
        probabilities = torch.softmax(logits[-1].double() / args.temperature, dim=-1)
        drawn.append(torch.multinomial(probabilities, 1, generator=generator))  # [1, 1]
        logits, state = model(drawn[-1], state)
    return "".join(vocabulary[code.item()] for code in drawn)


def plot(runs: Sequence[Run], title: str, file: Path) -> None:
    """Both loss curves, overlaid, and below them the absolute difference on a logarithmic axis."""
    from matplotlib.figure import Figure  # no pyplot: needs no display

    theirs, ours = runs
    figure = Figure(figsize=(8, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    steps = range(1, len(ours.losses) + 1)
    top.plot(steps, theirs.losses, color="#f2a65a", linewidth=5, label=theirs.name)
    top.plot(steps, ours.losses, color="#1b3a5c", linewidth=1.2, label=ours.name)
    top.set(title=title, ylabel="training loss, nats per character")
    top.legend()
    gaps = [abs(a - b) or math.nan for a, b in zip(theirs.losses, ours.losses)]  # a log axis has no zero
    bottom.semilogy(steps, gaps, ".", color="#1b3a5c", markersize=3)
    bottom.set(xlabel="step", ylabel="absolute difference")
    for axes in (top, bottom):
        axes.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def report(runs: Sequence[Run], args: argparse.Namespace) -> bool:
    """Print the curves side by side, validation and speed; whether the curves agree."""
    theirs, ours = runs
    gaps = [abs(a - b) for a, b in zip(theirs.losses, ours.losses)]
    print(f"\n{'step':>6}  {theirs.name:>10}  {ours.name:>10}  difference   (training loss, nats per character)")
    for row in sorted({round(i * (args.steps - 1) / 11) for i in range(12)}):
        print(f"{row + 1:6}  {theirs.losses[row]:10.5f}  {ours.losses[row]:10.5f}  {gaps[row]:10.1e}")
    rates = [run.characters_per_second(args.batch * args.seq) for run in runs]
    print()
    for run, rate in zip(runs, rates):
        print(f"{run.name}: validation {run.validation:.4f} bits per character, trained {rate:,.0f} characters/s")
    print(
        f"speed: {rates[1] / rates[0]:.2f} times that of {theirs.name}: median steps of two runs, one after the other,"
        " with embedding, head and optimizer (make bench times the layers alone, interleaved)"
    )
    if not all(map(math.isfinite, gaps)):
        print("losses: NOT FINITE")
        return False
    agree = True
    early, later = TOLERANCE[args.dtype]
    for title, end, allowed in ((f"first {EARLY_STEPS} steps", EARLY_STEPS, early), ("all steps", None, later)):
        worst = max(range(len(gaps[:end])), key=gaps.__getitem__)
        agree = agree and gaps[worst] <= allowed
        print(f"losses: {title}: largest difference {gaps[worst]:.1e} at step {worst + 1}, allowed {allowed:.0e}")
    print("losses: the curves agree" if agree else "losses: THE CURVES DIFFER")
    return agree


def parser() -> argparse.ArgumentParser:
    """The command line."""

    def positive(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
        return int(text)

    def above_zero(text: str) -> float:
        if not float(text) > 0:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return float(text)

    result = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = result.add_argument
    add("--text", type=Path, nargs="+", metavar="FILE", help="text to learn (default: Python's standard library)")
    add("--cell", choices=CLASSES, default="lstm", help="default: %(default)s")
    add("--layers", type=positive, default=1, help="default: %(default)s")
    add("--hidden", type=positive, default=256, help="units of a layer (default: %(default)s)")
    add("--embedding", type=positive, default=64, help="default: %(default)s")
    add("--batch", type=positive, default=32, help="streams of text read side by side (default: %(default)s)")
    add("--seq", type=positive, default=100, help="characters between two updates (default: %(default)s)")
    add("--steps", type=positive, default=400, help="updates (default: %(default)s)")
    add("--lr", type=above_zero, default=3e-3, help="Adam's learning rate (default: %(default)s)")
    add("--clip", type=above_zero, default=1.0, help="largest gradient norm (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    add("--seed", type=int, default=1, help="default: %(default)s")
    add("--threads", type=positive, help="default: what torch chooses")
    add("--sample", type=int, default=300, metavar="N", help="characters to generate (default: %(default)s)")
    add("--temperature", type=above_zero, default=0.7, help="of the sample (default: %(default)s)")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="where char_lm.png goes (default: %(default)s)")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; 0 if the loss curves agree, 1 if not."""
    arguments = parser()
    args = arguments.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        text, source = read_text(args.text)
        vocabulary, training, validation = make_streams(text, args.batch, args.seq)
    except (OSError, ValueError) as error:
        arguments.error(str(error))
    runs = []
    for name, library in (("torch.nn", nn), ("fusedrnn", fusedrnn)):
        torch.manual_seed(args.seed)
        model = CharModel(library, args.cell, len(vocabulary), args.embedding, args.hidden, args.layers)
        runs.append(Run(name, model.to(DTYPES[args.dtype])))
    theirs, ours = runs
    ours.model.load_state_dict(theirs.model.state_dict())  # the same initial weights
    parameters = sum(p.numel() for p in ours.model.parameters())
    title = f"{CLASSES[args.cell]}, {args.layers} layer(s) of {args.hidden}, {args.dtype}"
    print(f"text: {source}, {len(text):,} characters, {len(vocabulary)} different ones")
    print(f"model: {title}, {parameters:,} parameters; torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    for run in runs:
        train(run, training, args)
        run.validation = validate(run.model, validation, args.seq)
    agree = report(runs, args)
    if agree and args.sample > 0:
        prompt = validation[: args.seq, :1]
        print(f"\n{ours.name} goes on after {''.join(vocabulary[c] for c in prompt[-30:, 0])!r}:")
        print(sample(ours.model, vocabulary, prompt, args.sample, args))
    file = args.out / "char_lm.png"
    plot(runs, title, file)
    print(f"\nplot: {file}")
    return 0 if agree else 1


if __name__ == "__main__":
    raise SystemExit(main())
