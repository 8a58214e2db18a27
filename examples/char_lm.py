"""Train one character-level language model twice, with torch.nn and with fusedrnn, and compare.

The two runs start from the same weights and read the same batches, so their loss curves must be the same up
to rounding; the exit status is 1 if they are not. By default the text is the source code of the running
Python's standard library. Writes char_lm.png to --out: both curves, and their difference.

    python examples/char_lm.py --cell gru --hidden 128 --steps 100
    python examples/char_lm.py --text a.txt b.txt
    python examples/char_lm.py --steps 1000 --checkpoint out/run      # again: goes on where it was interrupted
    torchrun --nproc-per-node=2 examples/char_lm.py                   # each process reads a part of the batch
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import sysconfig
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
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
CHECKPOINT_STEPS = 100  # between two checkpoints


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
    """One training run: what goes from step to step, and a loss (nats per character) and a time (seconds) for each.

    ``state`` holds the recurrent states after the last step of all streams, [1 or 2, L, B, H]. ``state_dict`` and
    ``load_state_dict`` are what torch.distributed.checkpoint asks for.
    """

    name: str
    model: CharModel
    optimizer: torch.optim.Optimizer
    state: Tensor
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    validation: float = math.nan

    def characters_per_second(self, characters: int) -> float:
        """The rate of the median step of ``characters``, the first steps left out."""
        warm_up = min(WARM_UP_STEPS, len(self.seconds) // 2)
        return characters / statistics.median(self.seconds[warm_up:])

    def state_dict(self) -> dict:
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.model, self.optimizer)
        progress = {"state": self.state, "losses": self.losses, "seconds": self.seconds}
        return {"model": model, "optimizer": optimizer, **progress}

    def load_state_dict(self, saved: dict) -> None:
        from torch.distributed.checkpoint.state_dict import set_state_dict

        model, optimizer = saved["model"], saved["optimizer"]
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)
        self.state, self.losses, self.seconds = saved["state"], saved["losses"], saved["seconds"]


class Processes:
    """Those that torchrun started, of which this one has number ``rank``; without torchrun one."""

    def __init__(self) -> None:
        self.count, self.rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)

    def mean(self, loss: Tensor) -> float:
        """Over all processes, each of which has as much of the batch."""
        loss = loss.detach().clone()
        if self.count > 1:
            dist.all_reduce(loss)
        return loss.item() / self.count

    def own(self, streams: Tensor, dim: int = 1) -> Tensor:
        """This process's part of the batch."""
        return streams.chunk(self.count, dim)[self.rank].contiguous()

    def all(self, part: Tensor, dim: int) -> Tensor:
        """The whole batch, from the parts."""
        parts = [torch.empty_like(part) for _ in range(self.count)]
        dist.all_gather(parts, part)
        return torch.cat(parts, dim)


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


def chunks(streams: Tensor, seq: int, count: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Pieces ``first`` to ``count`` of T = seq steps: input, target (the next characters), if the text starts anew."""
    per_pass = (len(streams) - 1) // seq
    for step in range(first, count):
        at = step % per_pass * seq
        yield streams[at : at + seq], streams[at + 1 : at + seq + 1], at == 0


def detach(state: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
    """The same state with no history: backpropagation stops at the chunk's first step."""
    return tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()


def loss_of(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy in nats per character, in float32 or wider."""
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def train(run: Run, streams: Tensor, processes: Processes, args: argparse.Namespace) -> None:
    """Truncated backpropagation through time with Adam; the state is carried from chunk to chunk."""
    model = DistributedDataParallel(run.model) if processes.count > 1 else run.model
    done = len(run.losses)
    state = processes.own(run.state, dim=2).unbind()
    state = state if len(state) > 1 else state[0]
    pieces = chunks(processes.own(streams), args.seq, args.steps, done)
    bar = tqdm(pieces, run.name, args.steps, initial=done, unit="step", mininterval=0.5, disable=processes.rank > 0)
    for characters, target, fresh in bar:
        start = time.perf_counter()
        logits, state = model(characters, None if fresh else detach(state))
        loss = loss_of(logits, target)
        run.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), args.clip)
        run.optimizer.step()
        run.losses.append(processes.mean(loss))
        run.seconds.append(time.perf_counter() - start)
        rate = characters.numel() * processes.count / run.seconds[-1]
        bar.set_postfix_str(f"loss {run.losses[-1]:.3f}, {rate:,.0f} chars/s", False)
        if args.checkpoint and (len(run.losses) % CHECKPOINT_STEPS == 0 or len(run.losses) == args.steps):
            states = torch.stack(state) if isinstance(state, tuple) else state[None]
            run.state = processes.all(states.detach(), dim=2)
            save(run, args.checkpoint)


def save(run: Run, folder: Path) -> None:
    """A checkpoint in a folder of its own, named by the number of steps."""
    import torch.distributed.checkpoint as checkpoint  # a second, which a run without checkpoints need not wait

    checkpoint.save({"run": run}, checkpoint_id=folder / run.name / f"{len(run.losses):06}")


def resume(run: Run, folder: Path, steps: int) -> None:
    """Go on from the last checkpoint of at most ``steps`` steps, if there is one; its .metadata was written last."""
    import torch.distributed.checkpoint as checkpoint

    complete = (file.parent for file in (folder / run.name).glob("*/.metadata"))
    found = sorted(folder for folder in complete if int(folder.name) <= steps)
    if found:
        checkpoint.load({"run": run}, checkpoint_id=found[-1])
        print(f"{run.name}: goes on after step {len(run.losses)}, from {found[-1]}")


def check_settings(args: argparse.Namespace, text: str) -> None:
    """The checkpoints of a folder are of one model, one text and one way to train; its settings.json says which."""
    free = ("checkpoint", "out", "sample", "steps", "temperature", "threads")
    settings = {name: value for name, value in vars(args).items() if name not in free}
    settings["text"] = f"{len(text)} characters, crc32 {zlib.crc32(text.encode()):08x}"
    file = args.checkpoint / "settings.json"
    if file.exists():
        known = json.loads(file.read_text())
        if differ := [f"{name} {known.get(name)}" for name in settings if known.get(name) != settings[name]]:
            raise ValueError(f"--checkpoint {args.checkpoint} holds a run with {', '.join(differ)}")
    args.checkpoint.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=2) + "\n")


@torch.inference_mode()
def validate(model: CharModel, streams: Tensor, processes: Processes, seq: int) -> float:
    """Mean loss on held-out text, in bits per character."""
    losses, state = [], None
    count = min(VALIDATION_CHUNKS, (len(streams) - 1) // seq)
    for characters, target, _ in chunks(processes.own(streams), seq, count):
        logits, state = model(characters, state)
        losses.append(processes.mean(loss_of(logits, target)))
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
    add("--checkpoint", type=Path, metavar="DIR", help="save there, go on from what is there (default: neither)")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="where char_lm.png goes (default: %(default)s)")
    return result


def compare(args: argparse.Namespace, text: str, source: str) -> int:
    """Train both models and compare them; the exit status."""
    processes = Processes()
    if args.batch % processes.count:
        raise ValueError(f"--batch {args.batch} cannot be shared by {processes.count} processes")
    vocabulary, training, validation = make_streams(text, args.batch, args.seq)
    if args.checkpoint and processes.rank == 0:
        check_settings(args, text)
    runs = []
    for name, library in (("torch.nn", nn), ("fusedrnn", fusedrnn)):
        torch.manual_seed(args.seed)
        model = CharModel(library, args.cell, len(vocabulary), args.embedding, args.hidden, args.layers)
        model.to(DTYPES[args.dtype])
        state = torch.zeros(2 if args.cell == "lstm" else 1, args.layers, args.batch, args.hidden)
        optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
        runs.append(Run(name, model, optimizer, state.to(DTYPES[args.dtype])))
    theirs, ours = runs
    ours.model.load_state_dict(theirs.model.state_dict())  # the same initial weights
    parameters = sum(p.numel() for p in ours.model.parameters())
    title = f"{CLASSES[args.cell]}, {args.layers} layer(s) of {args.hidden}, {args.dtype}"
    workers = f"{processes.count} process(es) of " * (processes.count > 1) + f"{torch.get_num_threads()} thread(s)"
    print(f"text: {source}, {len(text):,} characters, {len(vocabulary)} different ones")
    print(f"model: {title}, {parameters:,} parameters; torch {torch.__version__}, {workers}")
    for run in runs:
        if args.checkpoint:
            resume(run, args.checkpoint, args.steps)
        train(run, training, processes, args)
        run.validation = validate(run.model, validation, processes, args.seq)
    agree = report(runs, args)
    if processes.rank == 0:
        if agree and args.sample > 0:
            prompt = validation[: args.seq, :1]
            print(f"\n{ours.name} goes on after {''.join(vocabulary[c] for c in prompt[-30:, 0])!r}:")
            print(sample(ours.model, vocabulary, prompt, args.sample, args))
        file = args.out / "char_lm.png"
        plot(runs, title, file)
        print(f"\nplot: {file}")
    return 0 if agree else 1


def join(args: argparse.Namespace) -> None:
    """Make the process group: of those that torchrun started, or of one, since checkpoints ask for a group."""
    launched = dist.is_torchelastic_launched()
    if launched or args.checkpoint:
        # Imported before the group exists. Otherwise DistributedDataParallel and checkpoints import them later, and
        # default arguments in them keep the group and its threads, which may abort the interpreter when it ends.
        import torch.distributed.checkpoint
        import torch.distributed.nn  # noqa: F401

        one = {} if launched else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group("gloo", **one)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; 0 if the loss curves agree, 1 if not."""
    arguments = parser()
    args = arguments.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    join(args)
    try:
        with contextlib.redirect_stdout(sys.stdout if Processes().rank == 0 else None):
            return compare(args, *read_text(args.text))
    except (OSError, ValueError) as error:
        arguments.error(str(error))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(main())
