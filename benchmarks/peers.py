"""The command ``python -m benchmarks.peers``: inference beside ONNX Runtime and OpenVINO, in turn in one process.

Each case of the registry that ONNX's LSTM, GRU or RNN operator can say (one layer, float32, padded) becomes a model of
that one operator, with the weights of our module and initial states as inputs. Outputs are compared before anything is
timed. All libraries have the same number of threads. `make bench-peers` installs what it needs.

Some shapes in bfloat16, too: torch.nn's and our layer are of that type, and OpenVINO computes the same model in it (its
hint; on a processor that does not multiply bfloat16 it says that it computes in float32, and so do we, inside). ONNX
Runtime has no such kernels. int8: ``python -m benchmarks.int8``.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import fusedrnn
from fusedrnn.cells import CELLS

from . import report
from .cases import CASES, CELL_NAMES, DTYPES, Case, cell_names
from .measure import MIN_ROUNDS, Disagreement, Problem, Timer, make_layer, run_rounds

# Where ONNX's operator has gate g of ours: LSTM i, o, f, c; GRU z, r, h. https://onnx.ai/onnx/operators
ORDER = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "gru_before": (1, 0, 2), "rnn": (0,), "rnn_relu": (0,)}
OPERATOR = {"lstm": "LSTM", "gru": "GRU", "gru_before": "GRU", "rnn": "RNN", "rnn_relu": "RNN"}
PEERS = {"onnxruntime": onnxruntime.__version__, "openvino": openvino.__version__.split("-")[0]}
HEADER = (
    f"{'case':40} {'torch.nn':>9} {'ORT':>9} {'OpenVINO':>9} {'fusedrnn':>9}   torch.nn, ORT, OpenVINO over fusedrnn"
)
# Each library has threads of its own, which spin for a while when they have nothing to do: ONNX Runtime's for 60 ms,
# and whoever comes next shares a core with it for so long.
SETTLE_SECONDS = 0.15
SHAPES = {  # timed without --only: one of each regime, as CASES has them
    (100, 32, 128, 128), (50, 64, 256, 256), (1000, 8, 64, 64), (100, 1, 64, 64), (100, 1, 256, 256),
    (1000, 1, 128, 128), (100, 1, 1024, 1024), (100, 7, 80, 100), (100, 32, 512, 512), (1, 1, 128, 128),
}  # fmt: skip
BFLOAT16_SHAPES = {(100, 32, 128, 128), (50, 64, 256, 256), (100, 32, 512, 512), (100, 1, 256, 256)}
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of the largest value


def can_say(case: Case) -> bool:
    """Whether the case is one operator of ONNX."""
    plain = case.layers == 1 and not case.ragged and not case.projection and case.dtype in TOLERANCE
    return plain and case.mode == "infer" and case.cell in OPERATOR


def onnx_model(case: Case, layer: nn.Module) -> bytes:
    """A model of one operator with the layer's weights: X [T, B, I], states [D, B, H] -> Y [T, D, B, H], Y_h[, Y_c]."""
    T, B, I, H = case.shape
    order, two_states = ORDER[case.cell], len(CELLS[CELL_NAMES[case.cell]].states) == 2
    suffixes = ["_l0", "_l0_reverse"][: case.directions]

    def stacked(*names: str) -> np.ndarray:
        def one(name: str) -> np.ndarray:
            gates = np.split(layer.get_parameter(name).detach().float().numpy(), len(order))
            return np.concatenate([gates[g] for g in order])

        return np.stack([np.concatenate([one(name + suffix) for name in names]) for suffix in suffixes])

    weights = {"W": stacked("weight_ih"), "R": stacked("weight_hh"), "B": stacked("bias_ih", "bias_hh")}
    states = ["initial_h", "initial_c"][: 1 + two_states]
    finals = ["Y_h", "Y_c"][: 1 + two_states]
    attributes = {"hidden_size": H, "direction": "bidirectional" if case.directions == 2 else "forward"}
    if OPERATOR[case.cell] == "GRU":
        attributes["linear_before_reset"] = int(case.cell == "gru")
    if OPERATOR[case.cell] == "RNN":
        attributes["activations"] = [{"rnn": "Tanh", "rnn_relu": "Relu"}[case.cell]] * case.directions
    node = helper.make_node(OPERATOR[case.cell], ["X", "W", "R", "B", "", *states], ["Y", *finals], **attributes)
    one_state = [case.directions, B, H]
    graph = helper.make_graph(
        [node],
        case.name,
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, [T, B, I])]
        + [helper.make_tensor_value_info(name, TensorProto.FLOAT, one_state) for name in states],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, [T, case.directions, B, H])]
        + [helper.make_tensor_value_info(name, TensorProto.FLOAT, one_state) for name in finals],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)])
    model.ir_version = 8
    onnx.checker.check_model(model)
    return model.SerializeToString()


def peer_calls(case: Case, layer: nn.Module, threads: int) -> dict[str, Callable[[], list[np.ndarray]]]:
    """For each peer a function of no arguments that runs the model once: Y and the final states."""
    problem, model = Problem.of(case), onnx_model(case, layer)
    inputs = [tensor.float().numpy() for tensor in (problem.x, *problem.hx)]
    bfloat16 = case.dtype == "bfloat16"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = dict(zip([argument.name for argument in session.get_inputs()], inputs))
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
    }
    core = openvino.Core()
    request = core.compile_model(core.read_model(model, b""), "CPU", settings).create_infer_request()

    def infer() -> list[np.ndarray]:
        outputs = request.infer(inputs, share_inputs=True, share_outputs=True)
        return [outputs[i] for i in range(1 + len(problem.hx))]

    return {"openvino": infer} if bfloat16 else {"onnxruntime": lambda: session.run(None, feed), "openvino": infer}


def measure(case: Case, threads: int, seconds: float, min_rounds: int = MIN_ROUNDS) -> dict:
    """Check the peers against our float64, then time all in turn: milliseconds and ratios over ours, medians."""
    torch.manual_seed(1)
    torch.set_num_threads(threads)
    problem = Problem.of(case)
    dtype = DTYPES[case.dtype]
    ours = make_layer(fusedrnn, case, dtype)
    exact = make_layer(fusedrnn, case, torch.float64)
    exact.load_state_dict(ours.state_dict())
    want = [tensor.numpy() for tensor in problem.call(exact, torch.float64, "infer")()]
    calls: dict[str, Callable] = {"fusedrnn": problem.call(ours, dtype, "infer")}
    peers = peer_calls(case, ours, threads)
    for name, call in peers.items():
        got = [np.asarray(array) for array in call()]
        T, B, _, H = case.shape
        got[0] = got[0].transpose(0, 2, 1, 3).reshape(T, B, case.directions * H)
        worst = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, want, strict=True))
        if not worst <= TOLERANCE[case.dtype]:
            raise Disagreement(f"{case.name}: {name} deviates by {worst:.1e} of the largest value")
        calls[name] = call
    if case.has_torch:
        theirs = make_layer(nn, case, dtype)
        theirs.load_state_dict(ours.state_dict())
        calls["torch"] = problem.call(theirs, dtype, "infer")
    timers = [Timer(call, threads, settle=SETTLE_SECONDS) for call in calls.values()]
    rounds, peaks = run_rounds(timers, seconds, min_rounds)
    ours_seconds = float(np.median(rounds[:, 0]))
    return {
        "name": case.name,
        "rounds": len(rounds),
        "ms": {name: 1e3 * float(np.median(rounds[:, i])) for i, name in enumerate(calls)},
        "ratio": {name: float(np.median(rounds[:, i] / rounds[:, 0])) for i, name in enumerate(calls) if i},
        "percent": 100 * case.flops() / ours_seconds / float(np.median(peaks)),
    }


def line(result: dict) -> str:
    """One line of the terminal's table, below HEADER."""
    columns = ("torch", *PEERS, "fusedrnn")
    times = " ".join(f"{result['ms'][name]:9.3f}" if name in result["ms"] else f"{'none':>9}" for name in columns)
    ratios = ", ".join(f"{result['ratio'][name]:.2f}" for name in columns if name in result["ratio"])
    return f"{result['name']:40} {times}   {ratios}"


def best(result: dict) -> float:
    """The ratio of the better of the peers that have the case."""
    return min(result["ratio"][peer] for peer in PEERS if peer in result["ratio"])


def summary(results: Sequence[dict]) -> str:
    """How often we are ahead of the better peer, and where not."""
    behind = [r["name"] for r in results if best(r) < 1]
    where = f", behind in {', '.join(behind)}" if behind else ""
    return f"{len(results)} case(s): ahead of the better of ORT and OpenVINO in {len(results) - len(behind)}{where}"


def markdown(results: Sequence[dict], info: dict) -> str:
    """The table with a line on the machine."""
    versions = ", ".join(f"{name} {version}" for name, version in PEERS.items())
    rows = [
        f"{report.describe(info)}; {versions}.",
        "",
        "Inference, milliseconds, medians of interleaved rounds, all with the same threads. Ratio: the better of ONNX"
        " Runtime and OpenVINO over fusedrnn, the smaller median of ratios; below 1 we are slower.",
        "",
        "| case | torch.nn | ONNX Runtime | OpenVINO | fusedrnn | ratio |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        times = [f"{r['ms'][n]:.3g}" if n in r["ms"] else "not there" for n in ("torch", *PEERS, "fusedrnn")]
        rows.append(f"| {r['name']} | {' | '.join(times)} | **{best(r):.2f}** |")
    return "\n".join(rows) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", metavar="REGEX", help="every case whose name has a match; without: ten shapes of each cell")
    add("--cells", type=cell_names, metavar="NAMES", default="lstm,gru,rnn", help="default: %(default)s")
    add("--seconds", type=float, default=2.0, help="time for the rounds of a case (default: %(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(), help="default: what torch chooses")
    add("--readme", type=Path, metavar="FILE", help="put the table between the markers of this file")
    args = parser.parse_args(argv)
    said = [case for case in CASES.values() if can_say(case)]
    usual = [case for case in said if case.shape in SHAPES and case.directions == 1 and case.dtype == "float32"]
    alike = [c for c in usual if c.shape in BFLOAT16_SHAPES and c.cell in ("lstm", "gru")]
    usual += [replace(case, dtype="bfloat16", main=False) for case in alike]
    if args.only is not None:
        everything = {case.name: case for case in (*said, *usual)}
        usual = [case for name, case in everything.items() if re.search(args.only, name)]
    cases = [case for case in usual if case.cell in args.cells]
    if not cases:
        parser.error("no case matches")
    info = report.machine(args.threads)
    print(report.describe(info), PEERS, HEADER, sep="\n", flush=True)
    results = []
    for case in cases:
        try:
            results.append(measure(case, args.threads, args.seconds))
        except Disagreement as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(line(results[-1]), flush=True)
    print(summary(results))
    if args.readme:
        report.update_readme(args.readme, markdown(results, info), report.block(info, "peers"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
