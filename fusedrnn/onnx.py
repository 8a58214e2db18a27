"""Export to ONNX: the layers become its standard operators LSTM, GRU and RNN.

    torch.onnx.export(model, (x,), "model.onnx", dynamo=True, custom_translation_table=fusedrnn.onnx.table())

One operator a layer, both directions, with PackedSequence input too (its ``sequence_lens``), made in the model or from
inputs of it. What the operators cannot say raises: a projection, other cells (ResidualRNN, MGU, IndRNN), bfloat16.
Needs onnxscript, which only this module imports.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .cells import CELLS
from .layer.call import ForwardArguments, LayerCall, Weights, layer_forward
from .torch_internals import PACKING_OPS

__all__ = ["table"]

# For each cell its operator, the order of ONNX's gates in ours, and attributes of the operator.
_OPERATORS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "rnn_tanh": ("RNN", "h", {"activations": ["Tanh"]}),
    "rnn_relu": ("RNN", "h", {"activations": ["Relu"]}),
    "lstm": ("LSTM", "iofg", {}),
    "peephole_lstm": ("LSTM", "iofg", {}),
    "gru": ("GRU", "zrn", {"linear_before_reset": 1}),
    "gru_reset_before": ("GRU", "zrn", {"linear_before_reset": 0}),
}


def table() -> dict[Callable, Callable]:
    """What ``torch.onnx.export(..., dynamo=True)`` takes as ``custom_translation_table``.

    Raises:
        ImportError: onnxscript is not installed.
    """
    try:
        from onnxscript import opset18 as op
    except ImportError as error:
        raise ImportError("export to ONNX needs the package onnxscript: pip install onnxscript") from error

    def fusedrnn_layer(*args):  # noqa: ANN002, ANN202
        call, _ = ForwardArguments.of(*args)
        if call.scales is not None:
            raise NotImplementedError("quantized layers are not exported to ONNX: export the model, quantize there")
        if call.noise.any:
            raise NotImplementedError("ONNX's recurrent operators have neither zoneout nor a mask on h")
        return _layer(op, call)

    def pack_padded_sequence(x, lengths, batch_first):  # noqa: ANN001, ANN202
        return _pack(op, x, lengths, batch_first)

    return {layer_forward: fusedrnn_layer} | {op: pack_padded_sequence for op in PACKING_OPS}


def _layer(op: Any, call: LayerCall) -> tuple[Any, Any, Any, Any]:
    """``layer_forward`` in ONNX's operators; ``saved`` and the c_n of cells without c are empty and go nowhere."""
    cell, x, weights, directions = call.cell, call.x, call.by_direction, call.directions
    _check(cell, weights[0], x.dtype)
    name, order, attributes = _OPERATORS[cell]
    hidden = weights[0].w_hh.shape[1]
    peepholes = [f"p_{gate}" for gate in order if f"p_{gate}" in CELLS[cell].parameters]

    def stack(*names: str, blocks: Sequence[str] = CELLS[cell].gates, order: Sequence[str] = order) -> Any:
        """[D, len(names) * G * H, ...]: these weights of each direction, gates in ONNX's order."""
        parts = [[getattr(own, name) for name in names] for own in weights]
        rows = [blocks.index(block) * hidden + unit for block in order for unit in range(hidden)]
        if all(_is_constant(part) for own in parts for part in own):
            return _stacked(parts, "".join(order), rows)
        if len(blocks) > 1:
            parts = [[op.Gather(part, op.Constant(value_ints=rows), axis=0) for part in own] for own in parts]
        return op.Concat(*(op.Unsqueeze(op.Concat(*own, axis=0), [0]) for own in parts), axis=0)

    w_ih, w_hh, bias = stack("w_ih"), stack("w_hh"), None if weights[0].b_ih is None else stack("b_ih", "b_hh")
    if "activations" in attributes:
        attributes = {"activations": attributes["activations"] * directions}
    lengths = active = None
    if call.batch_sizes is not None:
        x, lengths, active = _padded(op, x, call.batch_sizes)
    y, *states = getattr(op, name)(
        x,
        w_ih,
        w_hh,
        bias,
        lengths,
        *call.states,
        *([stack("w_unit", blocks=CELLS[cell].parameters, order=peepholes)] if peepholes else []),
        hidden_size=hidden,
        direction="bidirectional" if call.bidirectional else "forward",
        **attributes,
    )
    y = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), [0, 0, -1])  # [T, D, B, H] -> [T, B, D * H]
    if active is not None:
        y = op.Compress(op.Reshape(y, [-1, directions * hidden]), active, axis=0)
    nothing = op.Slice(states[0], [0], [0], [1])
    return y, *(*states, nothing)[:2], nothing


def _is_constant(weight: Any) -> bool:
    """Whether the value is a parameter, buffer or constant of the model, by the prefixes of torch.export. The arguments
    of a branch (torch.cond) have them too, but get their numbers from a caller; its graph has no name.
    """
    return (
        weight.producer() is None and str(weight.name).startswith(("p_", "b_", "c_")) and weight.graph.name is not None
    )


def _stacked(parts: Sequence[Sequence[Any]], order: str, rows: Sequence[int]) -> Any:
    """The constants ``parts[direction][i]``, their rows in the order of ``rows``, stacked: [D, rows of all i, ...].

    An initializer of the graph, which tools look for; the exporter folds small constants alone. Several
    calls of a layer, as of a cell in a loop, share it. Its numbers are computed when the file is written: before that
    the constants have none.
    """
    import onnx_ir as ir

    def numbers(value: Any) -> np.ndarray:
        if value.const_value is None:
            raise NotImplementedError(f"fusedrnn: the input {value.name} is taken for a parameter: rename it")
        return value.const_value.numpy()[rows]

    first = parts[0][0]
    name = ".".join([*(part.name for own in parts for part in own), order])
    initializers = first.graph.initializers
    if name not in initializers:
        shape = ir.Shape([len(parts), sum(part.shape[0] for part in parts[0]), *first.shape[1:]])
        tensor = ir.LazyTensor(
            lambda: ir.tensor(np.stack([np.concatenate([numbers(part) for part in own]) for own in parts])),
            dtype=first.dtype, shape=shape, name=name,
        )  # fmt: skip
        initializers[name] = ir.Value(name=name, shape=shape, type=first.type, const_value=tensor)
    return initializers[name]


def _check(cell: str, weights: Weights, dtype: Any) -> None:
    if cell not in _OPERATORS:
        raise NotImplementedError(f"ONNX has no operator for the cell {cell}")
    if weights.w_hr is not None:
        raise NotImplementedError("ONNX's LSTM has no projection (proj_size)")
    if dtype.name == "BFLOAT16":
        raise NotImplementedError("ONNX's recurrent operators do not take bfloat16: export the model in float32")


def _padded(op: Any, x: Any, batch_sizes: Any) -> tuple[Any, Any, Any]:
    """Packed rows [N, I] -> [T, B, I], the length of each sample [B], and which of the T * B rows are x's.

    Row t * B + b is row offset[t] + b of x where b < batch_sizes[t].
    """
    sizes = op.Cast(batch_sizes, to=7)  # int64, whatever the exporter takes it for
    column = op.Unsqueeze(sizes, [1])  # [T, 1]
    batch = op.Slice(sizes, [0], [1])  # [1]: the first step has every sample
    samples = op.Range(op.Constant(value_int=0), op.Squeeze(batch, [0]), op.Constant(value_int=1))
    active = op.Less(samples, column)  # [T, B]
    offset = op.Sub(op.CumSum(column, op.Constant(value_int=0)), column)
    row = op.Where(active, op.Add(offset, samples), op.Constant(value_int=0))
    lengths = op.ReduceSum(op.Cast(active, to=6), [0], keepdims=0)  # int32
    return op.Gather(x, row, axis=0), lengths, op.Reshape(active, [-1])


def _pack(op: Any, x: Any, lengths: Any, batch_first: bool) -> tuple[Any, Any]:
    """What ``torch.nn.utils.rnn.pack_padded_sequence`` calls once the lengths are sorted: data and batch_sizes."""
    zero, one, width = op.Constant(value_int=0), op.Constant(value_int=1), x.shape[2]
    x = op.Transpose(x, perm=[1, 0, 2]) if batch_first else x
    steps = op.Range(zero, op.ReduceMax(lengths, keepdims=0), one)
    active = op.Less(op.Unsqueeze(steps, [1]), lengths)  # [T, B]
    batch_sizes = op.ReduceSum(op.Cast(active, to=7), [1], keepdims=0)
    x = op.Slice(x, [0], op.Shape(steps))
    return op.Compress(op.Reshape(x, [-1, width]), op.Reshape(active, [-1]), axis=0), batch_sizes
