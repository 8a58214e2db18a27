"""The command ``python -m benchmarks.gpu.timing``: fusedrnn against torch.nn and others on a GPU, layer by layer.

``ours`` takes the way that FUSEDRNN_CUDA_PLAN=auto finds the sooner; ``stepwise`` and ``persistent`` are both ways,
the latter where there is a kernel. Opponents: ``torch.nn`` as it is, and what it runs, cuDNN or kernels of its own;
``native``, torch.nn with cuDNN switched off; those of opponents.py. All take each point in turn, round by round; a
ratio is the median of the rounds' own ratios. Times are of CUDA events around whole calls, so they hold what the
processor adds between kernels; ``graph`` is a call replayed from a CUDA graph, where it adds nothing. Microseconds a
step are the slope between T/2 and T steps. Errors are of the output against float64. One JSON line a point.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
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

from .opponents import Opponent, available

__all__ = ["POINTS", "Point", "measure", "tf32"]

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

    @property
    def regime(self) -> str:
        """Of SIZES, or what is special about the layer."""
        kinds = {"stacked": self.layers > 1, "bidirectional": self.bidirectional, "ragged": self.ragged}
        kinds["projected"] = self.projection > 0
        if special := [name for name, there in kinds.items() if there]:
            return ", ".join(special)
        return next((name for name, sizes in SIZES.items() if (self.hidden, self.batch) in sizes), "other")

    def __str__(self) -> str:
        extra = [f"L{self.layers}"] * (self.layers > 1) + ["bidirectional"] * self.bidirectional
        extra += [f"P{self.projection}"] * (self.projection > 0) + ["ragged"] * self.ragged
        return "-".join([self.cell, self.mode, f"H{self.hidden}", f"B{self.batch}", self.dtype, *extra])


# (H, B) of each regime: cuDNN takes another kernel in each, by its own rules or for want of one.
SIZES = {
    "192 < H <= 512": ((256, 32), (512, 32), (512, 128)),
    "B = 1": ((256, 1), (1024, 1)),
    "768 <= H <= 1024": ((768, 16), (1024, 32)),
    "H = 128": ((128, 32), (128, 128)),
    "128 < H <= 192": ((192, 32), (192, 128)),
    "H <= 64": ((64, 32), (64, 128)),
    "B >= 256, H >= 1024": ((1024, 256), (2048, 256)),
}
KINDS = ({"layers": 3}, {"bidirectional": True}, {"ragged": True})


def _points() -> Iterator[Point]:
    """The most telling first: a run that is cut off has them, and of each regime a size before any has two."""
    cells, modes = ("lstm", "gru"), ("forward", "both")
    rounds = itertools.zip_longest(*SIZES.values())
    for hidden, batch in (size for sizes in rounds for size in sizes if size):
        for dtype, cell, mode in itertools.product(("bfloat16", "tf32", "float16", "float32"), cells, modes):
            yield Point(cell, hidden, batch, dtype, mode)
        if (hidden, batch) == (256, 32):
            for cell, kind, mode in itertools.product((*cells, "rnn"), KINDS, modes):
                yield Point(cell, 512, 32, "bfloat16", mode, **kind)
    for mode in modes:
        yield Point("lstm", 512, 32, "bfloat16", mode, projection=128)
    for (hidden, batch), mode in itertools.product(((128, 32), (512, 32), (256, 1)), modes):
        yield Point("rnn", hidden, batch, "bfloat16", mode)


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


#: FUSEDRNN_CUDA_PLAN of those that go by it.
PLANS = {"ours": "auto", "stepwise": "stepwise", "persistent": "persistent"}


def go_by(plan: str | None) -> None:
    """What the kernels read in each of their calls; outside of what is timed."""
    if plan:
        os.environ["FUSEDRNN_CUDA_PLAN"] = plan


def opponent_call(opponent: Opponent, layer: nn.RNNBase, leaf: Tensor, dy: Tensor, point: Point) -> Call | None:
    """The call of opponents.py; None if it has no such layer."""
    if point.layers > 1 or point.bidirectional or point.ragged or point.projection:
        return None
    made = opponent(layer, point.dtype)
    if made is None:
        return None
    forward, weights = made
    x = leaf.detach().transpose(0, 1).contiguous().requires_grad_(point.mode == "both")
    with torch.no_grad():
        found, expected = forward(x.detach()).transpose(0, 1).double(), layer(leaf)[0].double()
    deviation = ((found - expected).abs().max() / expected.abs().max()).item()
    if not deviation <= TOLERANCE[point.dtype]:
        raise RuntimeError(f"its output is {deviation:.1e} of the largest value from torch.nn's")
    gradient = dy.transpose(0, 1).to(forward(x).dtype).contiguous()
    if point.mode == "both":
        return lambda: torch.autograd.grad(forward(x), [x, *weights], gradient)

    def infer() -> Tensor:
        with torch.no_grad():
            return forward(x)

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


def runs(call: Call, name: str) -> bool:
    """Whether an operation or a kernel of a call has this in its name."""
    with torch.profiler.profile() as profile:
        call()
    return any(name in event.key for event in profile.key_averages())


@dataclass
class Contest:
    """What is timed at a point, by name; what failed, by name, and why; errors and what torch.nn runs."""

    calls: dict[str, Call]
    deviation: float  # of our output from torch.nn's, over its largest value
    error: dict[str, float]  # against float64, in the Euclidean norm
    path: str  # cudnn, or native: kernels of torch's own, where it does not take cuDNN for the case
    failed: dict[str, str]


def exact_output(layer: nn.RNNBase, argument: Tensor | PackedSequence) -> Tensor:
    """In float64, from the same numbers."""
    wide, packed = copy.deepcopy(layer).double(), isinstance(argument, PackedSequence)
    y = wide(PackedSequence(argument.data.double(), argument.batch_sizes) if packed else argument.double())[0]
    return y.data if packed else y


def contest(point: Point, steps: int, device: torch.device) -> Contest:
    """Everyone at a point."""
    theirs = layer_of(point, device)
    ours = copy.deepcopy(theirs)
    left = fusedrnn.convert(ours).left
    if left:
        raise RuntimeError(f"{point}: not converted: {left[0].reason}")
    argument, leaf, dy = problem(point, steps, device)
    layers = {"ours": ours, "torch.nn": theirs}
    calls = {name: call_of(layer, argument, leaf, dy, point.mode) for name, layer in layers.items()}
    go_by("auto")
    calls["ours"]()  # measures
    with torch.no_grad():
        theirs_found = call_of(theirs, argument, leaf, dy, "forward")().double()
        found = call_of(ours, argument, leaf, dy, "forward")().double()
        exact = exact_output(theirs, argument)
    deviation = ((found - theirs_found).abs().max() / theirs_found.abs().max()).item()
    error = {
        name: ((y - exact).norm() / exact.norm()).item() for name, y in (("ours", found), ("torch.nn", theirs_found))
    }
    calls["native"] = without_cudnn(calls["torch.nn"])
    path = "cudnn" if runs(calls["torch.nn"], "cudnn_rnn") else "native"
    failed = {}
    if device.type == "cuda":
        for name in ("ours", "torch.nn"):
            captured = replayed(calls[name])
            if captured:
                calls[f"{name} graph"] = captured
        calls["stepwise"] = calls["ours"]
        go_by("persistent")
        if runs(calls["ours"], "persistent_loop"):
            calls["persistent"] = calls["ours"]
        for name, opponent in available().items():
            try:
                call = opponent_call(opponent, theirs, leaf, dy, point)
                if call:
                    call()
                    calls[name] = call
            except Exception as failure:  # whatever someone else's package raises; the others go on
                failed[name] = f"{type(failure).__name__}: {failure}".partition("\n")[0]
    return Contest(calls, deviation, error, path, failed)


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
    with tf32(point.dtype == "tf32"), mock.patch.dict(os.environ):
        return _measure(point, device, steps, rounds)


def _measure(point: Point, device: torch.device, steps: int, rounds: int) -> dict:
    clock, calls = Clock(device), {}
    for length in (steps // 2, steps):
        all_there = contest(point, length, device)
        calls[length] = all_there.calls
        if not all_there.deviation <= TOLERANCE[point.dtype]:
            raise RuntimeError(f"our output is {all_there.deviation:.1e} of its largest value from torch.nn's")
    for _ in range(WARM_CALLS):
        for name, call in (*calls[steps // 2].items(), *calls[steps].items()):
            go_by(PLANS.get(name))
            call()
    names = [name for name in calls[steps] if name in calls[steps // 2]]
    times = {(name, length): [] for length in calls for name in names}
    for _ in range(rounds):
        for name, length in times:
            go_by(PLANS.get(name))
            times[name, length].append(clock(calls[length][name]))
    whole = {name: times[name, steps] for name in names}
    slope = {
        name: 1e3 * (statistics.median(whole[name]) - statistics.median(times[name, steps // 2])) / (steps - steps // 2)
        for name in names
    }
    return {
        "point": str(point),
        **asdict(point),
        "regime": point.regime,
        "steps": steps,
        "rounds": rounds,
        "deviation": all_there.deviation,
        "error": all_there.error,
        "torch_nn": all_there.path,
        "failed": all_there.failed,
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
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.timing", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a trial of the script")
    parser.add_argument("--seconds", type=float, default=240, help="stop after about so long (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two tiny points and few steps")
    parser.add_argument("--out", type=Path, help="a file for the JSON lines (default: print them)")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU")
    device, deadline, failed = torch.device(args.device), time.monotonic() + args.seconds, 0
    out = args.out.open("w") if args.out else None
    points = QUICK if args.quick else POINTS
    for number, point in enumerate(points, 1):
        if time.monotonic() > deadline:
            print(f"stopped after {args.seconds:.0f} s, before {point}")
            break
        try:
            reading = measure(point, device, *((8, 3) if args.quick else ()))
        except RuntimeError as error:  # the next point may still work
            failed += 1
            reading = {"point": str(point), "failure": str(error).partition("\n")[0]}
        print(json.dumps(reading), file=out, flush=True)
        if out:
            ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in reading.get("ratio", {}).items())
            print(f"{number} of {len(points)} {point}: {ratios or reading['failure']}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
