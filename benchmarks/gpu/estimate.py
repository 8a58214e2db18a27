"""The command ``python -m benchmarks.gpu.estimate``: what a step of the persistent kernels may take on an H100, by a
model of its cycles. Nothing of it was measured: ``make gpu`` measures.

The model counts a step's products, loads, instructions and barriers for the cluster that csrc/persistent/plan.h
chooses (``estimated_cycles`` there names its constants, and which of them are guesses). The floor is that of an ideal
kernel: its products at full rate, one exchange of h, nothing else.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from .. import probes

__all__ = ["page", "step"]

CLOCK = 1.755e9  # Hz, of an H100 that computes
MULTIPROCESSORS = {1: 132, 2: 132, 4: 128, 8: 120}  # that clusters of so many blocks can use; of 4: a guess
SAMPLES = 8  # of a cluster
SHARED = {9: 227 * 1024, 8: 163 * 1024}  # bytes of a block, by the GPU's major version: H100, A100
BATCHES = (1, 8, 16, 32, 64, 256)
#: Microseconds a step of an ideal kernel, LSTM, bfloat16, forward, by H and the batches above.
FLOOR = {
    64: (0.30, 0.38, 0.38, 0.38, 0.38, 0.38),
    128: (0.37, 0.44, 0.44, 0.44, 0.47, 0.52),
    256: (0.42, 0.56, 0.56, 0.56, 0.64, 0.79),
    512: (0.59, 0.70, 0.73, 0.80, 1.05, 2.5),
    1024: (0.69, 0.91, 1.0, 1.3, 2.0, 6.4),
}
HIDDEN = tuple(FLOOR)


def step(cell: str, dtype: str, hidden: int, batch: int, backward: bool) -> float | None:
    """Microseconds; None where there is no kernel."""
    plan = probes.persistent_plan(cell, dtype, hidden, backward, 9, SHARED[9])
    if plan["refusal"]:
        return None
    blocks = math.ceil(batch / SAMPLES) * plan["blocks"]
    return 1e6 * plan["cycles"] * math.ceil(blocks / MULTIPROCESSORS[plan["blocks"]]) / CLOCK


def largest(cell: str, dtype: str, major: int) -> int | None:
    """The largest H of the tables that both passes have a kernel for."""
    served = [
        hidden for hidden in HIDDEN
        if not any(probes.persistent_plan(cell, dtype, hidden, way, major, SHARED[major])["refusal"] for way in (0, 1))
    ]  # fmt: skip
    return max(served, default=None)


def _row(*texts: object) -> str:
    return "| " + " | ".join(map(str, texts)) + " |"


def page() -> str:
    """The tables, in Markdown."""
    lines = [
        "# Persistent kernels on an H100: estimates",
        "",
        "By `python -m benchmarks.gpu.estimate --out docs/gpu-estimates.md`. **Nothing here was measured.** A model",
        "counts products, loads, instructions and barriers of a step (`estimated_cycles` in `csrc/persistent/plan.h`;",
        f"its constants are guesses or come from the compiler's output), at {CLOCK / 1e9} GHz. It may well be wrong by",
        "a factor of two: it tells one layer from another, no kernel from a competitor's.",
        "",
        "LSTM, bfloat16, forward: microseconds a step, and in brackets the floor, an estimate too: the time of an",
        "ideal kernel with its products at full rate and one exchange of h. Where the model is below it, one is wrong.",
        "",
        _row("H", *(f"B = {batch}" for batch in BATCHES)),
        "|---|" + "---:|" * len(BATCHES),
    ]
    for hidden, floors in FLOOR.items():
        found = (step("lstm", "bfloat16", hidden, batch, False) for batch in BATCHES)
        texts = (f"{us:.2f} ({floor:.2f})" if us else "no kernel" for us, floor in zip(found, floors, strict=True))
        lines.append(_row(hidden, *texts))
    lines += [
        "",
        "Every cell and type at B = 32: microseconds a step, forward / backward.",
        "",
        _row("cell", "type", *(f"H = {hidden}" for hidden in HIDDEN)),
        "|---|---|" + "---:|" * len(HIDDEN),
    ]
    for cell in ("lstm", "gru", "rnn_tanh"):
        for dtype in ("bfloat16", "tf32", "float32"):
            texts = []
            for hidden in HIDDEN:
                both = (step(cell, dtype, hidden, 32, backward) for backward in (False, True))
                texts.append(" / ".join(f"{us:.2f}" if us else "none" for us in both))
            lines.append(_row(cell, dtype, *texts))
    lines += [
        "",
        "The largest of these H that both passes have a kernel for (others go step by step), which follows from the",
        "plan's sizes alone: an A100 has one block where an H100 has a cluster of up to eight.",
        "",
        _row("cell", "type", "H100", "A100"),
        "|---|---|---:|---:|",
    ]
    for cell in ("lstm", "gru", "rnn_tanh"):
        for dtype in ("bfloat16", "tf32", "float32"):
            lines.append(_row(cell, dtype, *(largest(cell, dtype, major) or "none" for major in (9, 8))))
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.estimate", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a file (default: print)")
    args = parser.parse_args(argv)
    if args.out:
        args.out.write_text(page())
    else:
        print(page(), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
