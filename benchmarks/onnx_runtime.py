"""A layer of ours in ONNX Runtime, for the commands that time it beside us. None where it is not installed."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import fusedrnn

try:
    import onnx
    import onnxruntime
except ImportError:
    onnxruntime = None


def session(layer: nn.Module, x: Tensor, states: Sequence[Tensor], threads: int, *, int8: bool = False):
    """An ``InferenceSession`` of inputs x, h[, c]. ``int8``: by ``quantize_dynamic``, None if that changes nothing."""
    if onnxruntime is None:
        return None
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file, small = Path(folder) / "plain.onnx", Path(folder) / "small.onnx"
        logging.disable(logging.WARNING)
        torch.onnx.export(
            layer, (x, tuple(states) if len(states) == 2 else states[0]), file, dynamo=True, verbose=False,
            external_data=False, custom_translation_table=fusedrnn.onnx.table(),
            input_names=["x", "h", "c"][: 1 + len(states)],
            output_names=["y", "h_n", "c_n"][: 1 + len(states)],
        )  # fmt: skip
        if int8:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            # Without VNNI its products of 8 bits overflow 16; then its documentation asks for weights of 7 bits.
            vnni = any("vnni" in name for name in fusedrnn._C.supported_isas())
            quantize_dynamic(file, small, weight_type=QuantType.QInt8, reduce_range=not vnni)
            file = small
        logging.disable(logging.NOTSET)
        if int8 and all(node.op_type != "DynamicQuantizeLSTM" for node in onnx.load(file).graph.node):
            return None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])


def stream(run, x: Tensor, states: Sequence[Tensor]) -> Callable[[], np.ndarray]:
    """A stream of the session's steps x[t], (1, B, I) each: the states of one are the next one's. Its last y."""
    inputs, names = [t.numpy() for t in x], ["h", "c"][: len(states)]

    def call() -> np.ndarray:
        state = [s.numpy() for s in states]
        for x_t in inputs:
            y, *state = run.run(None, dict(zip(["x", *names], [x_t, *state])))
        return y

    return call


def bound_stream(run, x: Tensor, states: Sequence[Tensor]) -> Callable[[], np.ndarray]:
    """The same with all inputs and outputs in memory that is bound once: a step copies x[t] there."""
    value = onnxruntime.OrtValue.ortvalue_from_numpy
    x_t, names = np.zeros_like(x[0].numpy()), ["h", "c"][: len(states)]
    given, y = value(x_t), value(np.zeros((*x.shape[1:3], states[0].size(2)), np.float32))
    both = [[value(s.numpy().copy()) for s in states] for _ in range(2)]
    bindings = []
    for before, after in (both, both[::-1]):
        binding = run.io_binding()
        binding.bind_ortvalue_input("x", given)
        binding.bind_ortvalue_output("y", y)
        for name, old, new in zip(names, before, after, strict=True):
            binding.bind_ortvalue_input(name, old)
            binding.bind_ortvalue_output(f"{name}_n", new)
        bindings.append(binding)
    inputs = [t.numpy() for t in x]

    def call() -> np.ndarray:
        for state, s in zip(both[0], states, strict=True):
            state.update_inplace(s.numpy())
        for step, x_t in enumerate(inputs):
            given.update_inplace(x_t)
            run.run_with_iobinding(bindings[step % 2])
        return y.numpy()

    return call
