"""Export to ONNX: standard operators, and ONNX Runtime computes our numbers from the file."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnxruntime.quantization import quantize_dynamic
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves

import fusedrnn

T, B, N = Dim("T"), Dim("B"), Dim("N")
TOLERANCE = 1e-5


def layers(**options) -> nn.ModuleDict:
    """Every kind of layer that ONNX has, H = 5."""
    return nn.ModuleDict(
        {
            "lstm": fusedrnn.LSTM(4, 5, **options),
            "peephole_lstm": fusedrnn.PeepholeLSTM(4, 5, **options),
            "gru": fusedrnn.GRU(4, 5, **options),
            "gru_reset_before": fusedrnn.GRU(4, 5, reset_after=False, **options),
            "rnn_tanh": fusedrnn.RNN(4, 5, **options),
            "rnn_relu": fusedrnn.RNN(4, 5, nonlinearity="relu", **options),
        }
    )


class Each(nn.Module):
    """All modules on one input; hx, if given, is (h, c), of which all but the LSTMs take h."""

    def __init__(self, modules: nn.ModuleDict) -> None:
        super().__init__()
        self.each = modules

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> dict:
        own = {name: hx if hx is None or "lstm" in name else hx[0] for name in self.each}
        return {name: module(x, own[name]) for name, module in self.each.items()}


class Packed(nn.Module):
    """A layer on the parts of a PackedSequence: the rows of all steps and the number of rows of each."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, data: Tensor, batch_sizes: Tensor) -> tuple:
        y, last = self.layer(PackedSequence(data, batch_sizes))
        return y.data, last


def exported(model: nn.Module, args: tuple, dynamic_shapes: Sequence | None = None) -> torch.onnx.ONNXProgram:
    return torch.onnx.export(
        model.eval(),
        args,
        dynamo=True,
        dynamic_shapes=dynamic_shapes,
        custom_translation_table=fusedrnn.onnx.table(),
        verbose=False,
    )


def assert_same(model: nn.Module, program: torch.onnx.ONNXProgram, *inputs: tuple) -> None:
    """What ONNX Runtime computes from the file is what the model computes."""
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]
    for args in inputs:
        found = session.run(None, dict(zip(names, [t.numpy() for t in tree_leaves(args)], strict=True)))
        with torch.no_grad():
            expected = tree_leaves(model(*args))
        for index, (ours, theirs) in enumerate(zip(expected, found, strict=True)):
            theirs = torch.from_numpy(theirs)
            torch.testing.assert_close(
                theirs, ours, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda text, at=index: f"output {at}: {text}"
            )


def operators(program: torch.onnx.ONNXProgram) -> dict[str, int]:
    """How many of each recurrent operator the graph has."""
    return dict(Counter(node.op_type for node in program.model.graph if node.op_type in ("LSTM", "GRU", "RNN", "Loop")))


def test_every_layer_without_states() -> None:
    model = Each(layers())
    program = exported(model, (torch.randn(3, 2, 4),), ({0: T, 1: B},))
    assert operators(program) == {"LSTM": 2, "GRU": 2, "RNN": 2}
    assert_same(model, program, *((torch.randn(*shape, 4),) for shape in ((3, 2), (7, 3), (1, 1))))


def test_every_layer_stacked_in_both_directions_with_states() -> None:
    model = Each(layers(num_layers=2, bidirectional=True, batch_first=True))

    def args(batch: int, steps: int) -> tuple:
        return torch.randn(batch, steps, 4), (torch.randn(4, batch, 5), torch.randn(4, batch, 5))

    program = exported(model, args(2, 3), ({0: B, 1: T}, ({1: B}, {1: B})))
    assert operators(program) == {"LSTM": 4, "GRU": 4, "RNN": 4}
    assert_same(model, program, args(2, 3), args(3, 7), args(1, 1))


def test_without_biases() -> None:
    model = Each(layers(bias=False))
    assert_same(model, exported(model, (torch.randn(3, 2, 4),)), (torch.randn(3, 2, 4),))


@pytest.mark.parametrize("name", ["lstm", "gru", "peephole_lstm"])
def test_packed(name: str) -> None:
    """The lengths reach the operator, both directions of it; the rows come back in the order of the input's."""
    model = Packed(layers(bidirectional=True)[name])

    def args(*batch_sizes: int) -> tuple[Tensor, Tensor]:
        return torch.randn(sum(batch_sizes), 4), torch.tensor(batch_sizes)

    program = exported(model, args(3, 2, 1), ({0: N}, {0: T}))
    assert operators(program) == {name.rpartition("_")[2].upper(): 1}
    assert_same(
        model,
        program,
        args(3, 2, 1),
        args(4, 4, 2, 2, 1),
        args(1, 1),
        args(
            3,
        ),
    )


class FromPadded(nn.Module):
    """The rows and the final states of a padded batch with its lengths."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.layer, self.batch_first = fusedrnn.LSTM(4, 5, bidirectional=True), batch_first

    def forward(self, x: Tensor, lengths: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple:
        y, last = self.layer(pack_padded_sequence(x, lengths, self.batch_first, enforce_sorted=False), hx)
        return y.data, last


@pytest.mark.parametrize("batch_first", [False, True])
def test_pack_padded_sequence(batch_first: bool) -> None:
    """Sorted in the model, there and back; without states, and with states (batch_first)."""
    model = FromPadded(batch_first)

    def args(*lengths: int) -> tuple:
        x = torch.randn(len(lengths), max(lengths) + 1, 4)
        hx = (tuple(torch.randn(2, 2, len(lengths), 5)),) if batch_first else ()
        return x if batch_first else x.transpose(0, 1), torch.tensor(lengths), *hx

    states = [({1: B}, {1: B})] * batch_first
    program = exported(model, args(2, 3), ({0: B, 1: T} if batch_first else {0: T, 1: B}, {0: B}, *states))
    assert operators(program) == {"LSTM": 1}
    assert_same(model, program, args(2, 3), args(4, 1, 7, 4), args(1))


def test_every_cell() -> None:
    cells = {"lstm": fusedrnn.LSTMCell(4, 5), "gru": fusedrnn.GRUCell(4, 5), "rnn": fusedrnn.RNNCell(4, 5)}
    cells["gru_reset_before"] = fusedrnn.GRUCell(4, 5, reset_after=False)
    model = Each(nn.ModuleDict(cells))

    def args(batch: int) -> tuple:
        return torch.randn(batch, 4), (torch.randn(batch, 5), torch.randn(batch, 5))

    program = exported(model, args(2), ({0: B}, ({0: B}, {0: B})))
    assert operators(program) == {"LSTM": 1, "GRU": 2, "RNN": 1}
    assert_same(model, program, args(2), args(5))


def test_a_converted_model_with_computed_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 5))
    nn.utils.parametrizations.weight_norm(model[1], "weight_hh_l0")
    fusedrnn.convert(model)
    assert_same(model, exported(model, (torch.randn(3, 2, 4),)), (torch.randn(3, 2, 4),))


@pytest.mark.parametrize(
    "layer, words",
    [
        (fusedrnn.LSTM(4, 5, proj_size=3), "ONNX's LSTM has no projection"),
        (fusedrnn.ResidualRNN(4, 5), "ONNX has no operator for the cell residual_rnn"),
        (fusedrnn.MGU(4, 5), "ONNX has no operator for the cell mgu"),
        (fusedrnn.IndRNN(4, 5), "ONNX has no operator for the cell indrnn_relu"),
        (fusedrnn.GRU(4, 5, dtype=torch.bfloat16), "bfloat16"),
    ],
    ids=["projection", "residual_rnn", "mgu", "indrnn", "bfloat16"],
)
def test_what_onnx_cannot_say(layer: nn.Module, words: str) -> None:
    with pytest.raises(torch.onnx.OnnxExporterError) as raised:
        exported(layer, (torch.randn(3, 2, 4, dtype=layer.weight_ih_l0.dtype),))
    error = raised.value
    while error.__cause__ is not None:
        error = error.__cause__
    assert isinstance(error, NotImplementedError) and words in str(error)


def test_without_onnxscript(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match="pip install onnxscript"):
        fusedrnn.onnx.table()


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_the_older_exporter_names_the_way(name: str, inside: bool, tmp_path: Path) -> None:
    """torch.nn's modules go its way, patched ones too."""
    x = torch.randn(*(() if name.endswith("Cell") else (3,)), 2, 4)

    def export(cls: type[nn.Module]) -> None:
        module = cls(4, 5).eval()
        model = nn.Sequential(nn.Identity(), module) if inside else module
        torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=False)

    with pytest.raises(NotImplementedError, match=r"dynamo=True, custom_translation_table=fusedrnn.onnx.table\(\)"):
        export(getattr(fusedrnn, name))
    with fusedrnn.patch_torch():
        export(getattr(nn, name))


@pytest.mark.parametrize("gradients", [False, True])
def test_the_older_exporter_names_the_way_for_functions_too(gradients: bool, tmp_path: Path) -> None:
    class Function(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w_ih, self.w_hh = nn.Parameter(torch.randn(20, 4)), nn.Parameter(torch.randn(20, 5))

        def forward(self, x: Tensor) -> Tensor:
            return fusedrnn.functional.lstm(x, None, [self.w_ih, self.w_hh])[0]

    class Method(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = fusedrnn.GRU(4, 5, num_layers=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer.forward(x)[0]

    for model in (Function(), Method()):
        with torch.set_grad_enabled(gradients), pytest.raises(NotImplementedError, match="lstm is|gru is") as raised:
            torch.onnx.export(model.eval(), (torch.randn(3, 2, 4),), tmp_path / "model.onnx", dynamo=False)
        assert "dynamo=True, custom_translation_table=fusedrnn.onnx.table()" in str(raised.value)


def graph_of(model: nn.Module, x: Tensor, path: Path, **options) -> onnx.GraphProto:
    torch.onnx.export(model, (x,), path, dynamo=True, custom_translation_table=fusedrnn.onnx.table(), **options)
    return onnx.load(path).graph


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("hidden", [8, 256])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_weights_are_initializers(name: str, hidden: int, options: dict, tmp_path: Path) -> None:
    """Of the operator itself, whatever their size, and nothing else of that size is in the file."""
    model, x = nn.Sequential(getattr(fusedrnn, name)(64, hidden, **options)).eval(), torch.randn(5, 2, 64)
    graph = graph_of(model, x, tmp_path / "model.onnx")
    held = {tensor.name for tensor in graph.initializer}
    layers = [node for node in graph.node if node.op_type == name]
    assert len(layers) == options.get("num_layers", 1)
    for node in layers:
        assert set(node.input[1 : 4 if options.get("bias", True) else 3]) <= held
    stored = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert stored < sum(p.numel() * 4 for p in model.parameters()) + 40000
    found = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found[0]), model(x)[0].detach())


class Often(nn.Module):
    """A stack that is called twice, a cell in a loop, and a layer that shares weights with another."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = fusedrnn.LSTM(64, 64, num_layers=2)
        self.cell = fusedrnn.GRUCell(64, 96)
        self.first, self.second = fusedrnn.RNN(64, 96, bidirectional=True), fusedrnn.RNN(64, 96, bidirectional=True)
        for name, weight in self.first.named_parameters():
            if name.startswith("weight"):
                setattr(self.second, name, weight)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, state = self.stack(x)
        y, _ = self.stack(y, state)
        h = None
        for x_t in x.unbind(0):
            h = self.cell(x_t, h)
        return y, h, self.first(x)[0], self.second(x)[0]


@pytest.mark.parametrize("optimize", [True, False])
def test_weights_that_are_used_often_are_stored_once(optimize: bool, tmp_path: Path) -> None:
    model, x = Often().eval(), torch.randn(7, 2, 64)
    graph = graph_of(model, x, tmp_path / "model.onnx", optimize=optimize)
    held = {tensor.name for tensor in graph.initializer}
    layers = [node for node in graph.node if node.op_type in ("LSTM", "GRU", "RNN")]
    assert len(layers) == 4 + 7 + 2 and all(set(node.input[1:4]) <= held for node in layers)
    stored = sum(math.prod(tensor.dims) for tensor in graph.initializer)
    assert stored < sum(p.numel() for p in model.parameters()) + 100  # axes and shapes
    found = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {graph.input[0].name: x.numpy()})
    for theirs, ours in zip(found, model(x), strict=True):
        torch.testing.assert_close(torch.from_numpy(theirs), ours.detach())


class Branches(nn.Module):
    """The one or the other cell. (torch.cond takes no sequence module, torch.nn's neither.)"""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = fusedrnn.GRUCell(4, 5), fusedrnn.GRUCell(4, 5)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: self.first(x, h), lambda x: self.second(x, h), (x,))


def test_branches() -> None:
    model, x, h = Branches().eval(), torch.rand(2, 4), torch.randn(2, 5)
    assert_same(model, exported(model, (x, h)), (x, h), (-x, h))


def test_weights_that_are_computed(tmp_path: Path) -> None:
    layer, x = fusedrnn.GRU(4, 5), torch.randn(3, 2, 4)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(layer, "weight_hh_l0")).eval()
    graph = graph_of(model, x, tmp_path / "model.onnx")
    found = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {graph.input[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found[0]), model(x)[0].detach())


def test_quantizers_find_the_weights(tmp_path: Path) -> None:
    model, x = nn.Sequential(fusedrnn.LSTM(64, 128, bidirectional=True)).eval(), torch.randn(5, 2, 64)
    graph = graph_of(model, x, tmp_path / "model.onnx")
    # Seven bits of a weight: two products of eight overflow the 16 bits that AVX2 adds them in.
    quantize_dynamic(tmp_path / "model.onnx", tmp_path / "small.onnx", reduce_range=True)
    assert "DynamicQuantizeLSTM" in [node.op_type for node in onnx.load(tmp_path / "small.onnx").graph.node]
    found = onnxruntime.InferenceSession(tmp_path / "small.onnx").run(None, {graph.input[0].name: x.numpy()})
    assert (torch.from_numpy(found[0]) - model(x)[0].detach()).abs().max() < 0.02
