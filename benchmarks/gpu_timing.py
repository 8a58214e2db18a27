"""The command ``python -m benchmarks.gpu_timing``: fusedrnn against torch.nn on a GPU, layer by layer.

Opponents: ``torch.nn`` as it is, and what it runs, cuDNN or kernels of its own; ``native``, torch.nn with cuDNN
switched off. All take each point in turn, round by round; a ratio is the median of the rounds' own ratios. Times are of
CUDA events around whole calls, so they hold what the processor adds between kernels; ``graph`` is a call replayed from
a CUDA graph, where it adds nothing. Microseconds per step are the slope between T/2 and T steps. One JSON line a point.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn

__all__ = ["POINTS", "Point", "measure"]

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Largest deviation from torch.nn's output, over its largest value.
TOLERANCE = {"float32": 1e-3, "tf32": 3e-2, "bfloat16": 5e-2, "float16": 3e-2}
STEPS, ROUNDS, WARM_CALLS = 256, 9, 3

Call = Callable[[], object]


@dataclass(frozen=True)
class Point:
    """A layer, its batch and what is done with it: ``forward`` without gradients, or ``both`` with backward."""

    cell: str
    hidden: int
    batch: int
    dtype: str
    mode: str
    layers: int = 1
    bidirectional: bool = False
    projection: int = 0
    ragged: bool = False

    def __str__(self) -> str:
        extra = [f"L{self.layers}"] * (self.layers > 1) + ["bidirectional"] * self.bidirectional
        extra += [f"P{self.projection}"] * (self.projection > 0) + ["ragged"] * self.ragged
        return "-".join([self.cell, self.mode, f"H{self.hidden}", f"B{self.batch}", self.dtype, *extra])


def _points() -> Iterator[Point]:
    """The most telling first: a run that is cut off has them."""
    kinds = ({}, {"layers": 3}, {"bidirectional": True}, {"ragged": True})
    for cell, hidden, dtype, mode in itertools.product(
        ("lstm", "gru"), (256, 1024), ("bfloat16", "tf32", "float16"), ("forward", "both")
    ):
        yield Point(cell, hidden, 32, dtype, mode)
    for cell, kind, mode in itertools.product(("lstm", "gru", "rnn"), kinds[1:], ("forward", "both")):
        yield Point(cell, 512, 32, "bfloat16", mode, **kind)
    for mode in ("forward", "both"):
        yield Point("lstm", 512, 32, "bfloat16", mode, projection=128)
    for cell, hidden, batch, dtype, mode in itertools.product(
        ("lstm", "gru", "rnn"), (512, 128, 2048, 64), (1, 128), ("bfloat16", "float32"), ("forward", "both")
    ):
        yield Point(cell, hidden, batch, dtype, mode)


POINTS = tuple(_points())
QUICK = (Point("lstm", 8, 2, "float32", "both", ragged=True), Point("gru", 8, 2, "bfloat16", "forward"))


class Clock:
    """Milliseconds of a call on a device."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def __call__(self, call: Call) -> float:
        if not self.cuda:
            start = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - start)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


def layer_of(point: Point, device: torch.device) -> nn.Module:
    """torch.nn's layer of the point."""
    torch.manual_seed(0)
    options = {"num_layers": point.layers, "bidirectional": point.bidirectional}
    if point.projection:
        options["proj_size"] = point.projection
    layer = getattr(nn, point.cell.upper())(point.hidden, point.hidden, **options)
    layer = layer.to(device, DTYPES[point.dtype]).train(point.mode == "both")
    # torch.nn leaves bfloat16 weights apart, and cuDNN then copies them at each call: together, it is at its best.
    cudnn = torch.backends.cudnn
    with mock.patch.object(cudnn, "CUDNN_TENSOR_DTYPES", {*cudnn.CUDNN_TENSOR_DTYPES, torch.bfloat16}):
        layer.flatten_parameters()
    return layer


def problem(point: Point, steps: int, device: torch.device) -> tuple[Tensor | PackedSequence, Tensor, Tensor]:
    """The layer's argument, the leaf in it and the gradient of the output."""
    x = torch.randn(steps, point.batch, point.hidden, device=device, dtype=DTYPES[point.dtype])
    if point.ragged:
        lengths = [max(1, round(steps * (point.batch - b) / point.batch)) for b in range(point.batch)]
        packed = pack_padded_sequence(x, torch.tensor(lengths))
        x = packed.data
    leaf = x.detach().requires_grad_(point.mode == "both")
    argument = PackedSequence(leaf, packed.batch_sizes) if point.ragged else leaf
    width = (point.projection or point.hidden) * (2 if point.bidirectional else 1)
    return argument, leaf, torch.randn(*leaf.shape[:-1], width, device=device, dtype=leaf.dtype)


def call_of(layer: nn.Module, argument: Tensor | PackedSequence, leaf: Tensor, dy: Tensor, mode: str) -> Call:
    """One call of the layer: its output, or the gradients of its input and parameters."""

    def forward() -> Tensor:
        y = layer(argument)[0]
        return y.data if isinstance(y, PackedSequence) else y

    if mode == "both":
        leaves = [leaf, *layer.parameters()]
        return lambda: torch.autograd.grad(forward(), leaves, dy)

    def infer() -> Tensor:
        with torch.no_grad():
            return forward()

    return infer


def without_cudnn(call: Call) -> Call:
    def native() -> object:
        with torch.backends.cudnn.flags(enabled=False):
            return call()

    return native


def replayed(call: Call) -> Call | None:
    """The call captured in a CUDA graph; None if it cannot be."""
    stream = torch.cuda.Stream()
    try:
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def path_of(call: Call) -> str:
    """What torch.nn runs: ``cudnn``, or ``native``, its own kernels, where it does not take cuDNN for the case."""
    with torch.profiler.profile() as profile:
        call()
    return "cudnn" if any("cudnn_rnn" in event.key for event in profile.key_averages()) else "native"


def calls_of(point: Point, steps: int, device: torch.device) -> tuple[dict[str, Call], float, str]:
    """What is timed, by name; how far our output is from torch.nn's; what torch.nn runs."""
    theirs = layer_of(point, device)
    ours = copy.deepcopy(theirs)
    left = fusedrnn.convert(ours).left
    if left:
        raise RuntimeError(f"{point}: not converted: {left[0].reason}")
    argument, leaf, dy = problem(point, steps, device)
    layers = {"ours": ours, "torch.nn": theirs}
    calls = {name: call_of(layer, argument, leaf, dy, point.mode) for name, layer in layers.items()}
    with torch.no_grad():
        found, expected = (call_of(layer, argument, leaf, dy, "forward")() for layer in (ours, theirs))
    deviation = ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
    calls["native"] = without_cudnn(calls["torch.nn"])
    path = path_of(calls["torch.nn"])
    if device.type == "cuda":
        for name in ("ours", "torch.nn"):
            captured = replayed(calls[name])
            if captured:
                calls[f"{name} graph"] = captured
    return calls, deviation, path


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """float32 products, torch's and cuDNN's, rounded to TF32 or not."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=on):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def measure(point: Point, device: torch.device, steps: int = STEPS, rounds: int = ROUNDS) -> dict:
    """Medians of the rounds: milliseconds a call, microseconds a step, and for each opponent its time over ours.

    Raises:
        RuntimeError: our output is not torch.nn's.
    """
    with tf32(point.dtype == "tf32"):
        return _measure(point, device, steps, rounds)


def _measure(point: Point, device: torch.device, steps: int, rounds: int) -> dict:
    clock, calls = Clock(device), {}
    for length in (steps // 2, steps):
        calls[length], deviation, path = calls_of(point, length, device)
        if not deviation <= TOLERANCE[point.dtype]:
            raise RuntimeError(f"{point}: our output is {deviation:.1e} of its largest value from torch.nn's")
    for _ in range(WARM_CALLS):
        for call in (*calls[steps // 2].values(), *calls[steps].values()):
            call()
    names = [name for name in calls[steps] if name in calls[steps // 2]]
    times = {(name, length): [] for length in calls for name in names}
    for _ in range(rounds):
        for name, length in times:
            times[name, length].append(clock(calls[length][name]))
    whole = {name: times[name, steps] for name in names}
    slope = {
        name: 1e3 * (statistics.median(whole[name]) - statistics.median(times[name, steps // 2])) / (steps - steps // 2)
        for name in names
    }
    return {
        "point": str(point),
        **asdict(point),
        "steps": steps,
        "rounds": rounds,
        "deviation": deviation,
        "torch_nn": path,
        "ms": {name: statistics.median(values) for name, values in whole.items()},
        "us_per_step": slope,
        "ratio": {
            name: statistics.median(theirs / ours for theirs, ours in zip(values, whole["ours"], strict=True))
            for name, values in whole.items()
            if name != "ours"
        },
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 1 if a point failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_timing", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a trial of the script")
    parser.add_argument("--seconds", type=float, default=240, help="stop after about so long (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two tiny points and few steps")
    parser.add_argument("--out", type=Path, help="a file for the JSON lines (default: print them)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    device, deadline, failed = torch.device(args.device), time.monotonic() + args.seconds, 0
    out = args.out.open("w") if args.out else None
    for point in QUICK if args.quick else POINTS:
        if time.monotonic() > deadline:
            print(f"stopped after {args.seconds:.0f} s, before {point}")
            break
        try:
            reading = measure(point, device, *((8, 3) if args.quick else ()))
        except RuntimeError as error:  # the next point may still work
            failed += 1
            reading = {"point": str(point), "error": str(error).partition("\n")[0]}
        print(json.dumps(reading), file=out, flush=True)
        if out:
            print(reading.get("error") or f"{point}: " + ", ".join(f"{n} {r:.2f}" for n, r in reading["ratio"].items()))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
