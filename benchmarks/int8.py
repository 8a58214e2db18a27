"""The command ``python -m benchmarks.int8``: inference with int8 weights beside ours in float32, torch.ao and ONNX.

*T100*: one call. *step*: one step of a stream, ``step`` of our modules. *int8* and *bfloat16* are ours by
:func:`fusedrnn.quantize`, *float32* ours as it is; *torch.ao* is ``torch.ao.quantization.quantize_dynamic`` (LSTM and
GRU; of an RNN it has none), *ORT* ``quantize_dynamic`` of ONNX Runtime (LSTM), each of the same module. Results are
compared with float64 first. Microseconds, medians of interleaved rounds; torch.nn and torch.ao run with one thread or
with all, whichever is faster, the others with all. A ratio is a time over that of our int8.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from statistics import geometric_mean

import numpy as np
import torch
from torch import Tensor, nn

import fusedrnn

from . import onnx_runtime, report
from .measure import MIN_ROUNDS, Disagreement, Timer, run_rounds

SHAPES = ((1, 256), (1, 512), (1, 1024), (8, 512), (32, 256), (64, 512))  # B, H = I
CELLS = ("LSTM", "GRU", "RNN")
TOLERANCE = 0.1  # of the largest output; int8 rounds to 1/127
SETTLE_SECONDS = 0.15  # the threads of ONNX Runtime spin for 60 ms
OURS, COLUMNS = ("float32", "bfloat16", "int8"), ("torch.nn", "float32", "bfloat16", "torch.ao", "ORT", "int8")
Call = Callable[[], np.ndarray]


def _called(layer: nn.Module, x: Tensor, state: object) -> Call:
    @torch.inference_mode()
    def call() -> np.ndarray:
        return layer(x, state)[0].numpy()

    return call


def _stepped(layer: nn.Module, x: Tensor, state: object) -> Call:
    def call() -> np.ndarray:
        return layer.step(x[0], state)[0].numpy()[None]

    return call


def _torch_ao(layer: nn.Module) -> nn.Module | None:
    """The layer by torch.ao's dynamic quantization; None where torch has none."""
    try:
        from torch.ao.quantization import quantize_dynamic
    except ImportError:  # it is to be deleted
        return None
    if type(layer) not in (nn.LSTM, nn.GRU):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantize_dynamic(nn.Sequential(layer), {type(layer)}, dtype=torch.qint8)[0]


def _onnx_runtime(layer: nn.Module, x: Tensor, states: Sequence[Tensor], threads: int) -> Call | None:
    """The same by ONNX Runtime's, whose kernel is an LSTM's; None where it is not installed."""
    session = onnx_runtime.session(layer, x, states, threads, int8=True)
    if session is None:
        return None
    feed = dict(zip([i.name for i in session.get_inputs()], [t.numpy() for t in (x, *states)], strict=True))
    return lambda: session.run(None, feed)[0]


def contenders(
    name: str, steps: int, B: int, H: int, threads: int, columns: Sequence[str] = COLUMNS
) -> dict[str, Call]:
    """By column, with the same weights, input and states, those of ``columns`` that there are."""
    torch.manual_seed(1)
    theirs = getattr(nn, name)(H, H).eval()
    ours = getattr(fusedrnn, name)(H, H).eval()
    ours.load_state_dict(theirs.state_dict())
    small, half = copy.deepcopy(ours), copy.deepcopy(ours)
    fusedrnn.quantize(small, "int8")
    fusedrnn.quantize(half, "bfloat16")
    x, states = torch.randn(steps, B, H), [torch.randn(1, B, H).tanh() for _ in range(1 + (name == "LSTM"))]
    state = tuple(states) if len(states) == 2 else states[0]
    run = _stepped if steps == 1 else _called
    wide = [s.double() for s in states]
    exact = copy.deepcopy(theirs).double()(x.double(), tuple(wide) if len(wide) == 2 else wide[0])
    calls = {name: run(own, x, state) for name, own in {"int8": small, "bfloat16": half, "float32": ours}.items()}
    if "torch.nn" in columns:
        calls["torch.nn"] = _called(theirs, x, state)
    if "torch.ao" in columns and (ao := _torch_ao(theirs)) is not None:
        calls["torch.ao"] = _called(ao, x, state)
    if "ORT" in columns and (ort := _onnx_runtime(ours, x, states, threads)) is not None:
        calls["ORT"] = ort
    want = exact[0].detach().numpy()
    for column, call in calls.items():
        deviation = np.abs(call().reshape(want.shape) - want).max() / np.abs(want).max()
        if not deviation <= TOLERANCE:
            raise Disagreement(f"{name} B{B} H{H}: {column} deviates by {deviation:.1e} of the largest output")
    return calls


def rows(seconds: float, columns: Sequence[str] = COLUMNS, min_rounds: int = MIN_ROUNDS) -> Iterator[str]:
    """A header, a row a case, then the geometric mean of each column."""
    threads, ratios = torch.get_num_threads(), {name: [] for name in columns[:-1]}
    settle = SETTLE_SECONDS if "ORT" in columns else 0.0
    yield f"{'case':20} {' '.join(f'{name:>9}' for name in columns)}   {', '.join(columns[:-1])} over int8"
    for B, H in SHAPES:
        for name in CELLS:
            for steps in (100, 1):
                calls = contenders(name, steps, B, H, threads, columns)
                timers = [Timer(calls["int8"], threads, settle)]
                others = [column for column in columns[:-1] if column in calls]
                for column in others:
                    counts = sorted({1, threads}) if column.startswith("torch") else [threads]
                    choices = [Timer(calls[column], count, settle) for count in counts]
                    timers.append(min(choices, key=lambda timer: min(timer.sample() for _ in range(2))))
                rounds, _ = run_rounds(timers, seconds, min_rounds)
                us = dict(zip(["int8", *others], 1e6 * np.median(rounds, axis=0)))
                found = [float(np.median(rounds[:, i + 1] / rounds[:, 0])) for i in range(len(others))]
                for column, ratio in zip(others, found):
                    ratios[column].append(ratio)
                times = " ".join(f"{us[column]:9.1f}" if column in us else f"{'none':>9}" for column in columns)
                what = f"{name} {'step' if steps == 1 else f'T{steps}'} B{B} H{H}"
                yield f"{what:20} {times}   {', '.join(f'{ratio:.2f}' for ratio in found)}"
    for column, of in ratios.items():
        if of:
            yield f"{column} over int8: geometric mean {geometric_mean(of):.2f}, lowest {min(of):.2f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="time for the rounds of a row (default: %(default)s)"
    )
    parser.add_argument("--ours", action="store_true", help="ours alone, which takes a tenth of the time")
    args = parser.parse_args(argv)
    print(report.describe(report.machine(torch.get_num_threads())), flush=True)
    for row in rows(args.seconds, OURS if args.ours else COLUMNS):
        print(row, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
