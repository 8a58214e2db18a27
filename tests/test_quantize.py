"""quantize: what becomes of a model, what its modules can do, and what they refuse."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from inference import same, tensors
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from written_cells import mgu

import fusedrnn
from fusedrnn import QuantizationReport, QuantizedCell, QuantizedRecurrent

MODULES = {  # of every class: name, module, states
    "rnn": lambda: nn.RNN(12, 24, nonlinearity="relu"),
    "lstm": lambda: nn.LSTM(12, 24, num_layers=2, bidirectional=True, dropout=0.3),
    "lstm projected": lambda: nn.LSTM(12, 24, proj_size=10),
    "gru": lambda: nn.GRU(12, 24, batch_first=True, bias=False),
    "our rnn": lambda: fusedrnn.RNN(12, 24),
    "our lstm": lambda: fusedrnn.LSTM(12, 24, zoneout=(0.1, 0.05), recurrent_dropout=0.2),
    "our gru": lambda: fusedrnn.GRU(12, 24, reset_after=False, bidirectional=True),
    "residual": lambda: fusedrnn.ResidualRNN(12, 24, num_layers=2),
    "mgu": lambda: fusedrnn.MGU(12, 24, bidirectional=True),
    "rnn cell": lambda: nn.RNNCell(12, 24, nonlinearity="relu"),
    "lstm cell": lambda: nn.LSTMCell(12, 24, bias=False),
    "gru cell": lambda: fusedrnn.GRUCell(12, 24, reset_after=False),
}


class Model(nn.Module):
    """Of torch.nn's and ours, one shared by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 12), nn.ReLU())
        self.lstm = nn.LSTM(12, 24, batch_first=True, bidirectional=True)
        self.gru = fusedrnn.GRU(48, 24, batch_first=True)
        self.same = self.gru
        self.cell = nn.LSTMCell(24, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.cell(self.gru(self.lstm(self.encoder(x))[0])[0][:, -1])
        return self.head(h)


def flat(result) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result for t in flat(part)]


def inputs(name: str, *, seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(3, 12) if "cell" in name else torch.randn(7, 3, 12)


def quantized(name: str, dtype: str = "int8") -> tuple[nn.Module, nn.Module]:
    """A module, and another with its weights quantized."""
    module = MODULES[name]().eval()
    small = copy.deepcopy(module)
    assert len(fusedrnn.quantize(small, dtype).replaced) == 1
    return module, small


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
@pytest.mark.parametrize("name", MODULES)
def test_every_class(name: str, dtype: str) -> None:
    module, small = quantized(name, dtype)
    assert isinstance(small, QuantizedCell if "cell" in name else QuantizedRecurrent)
    x = inputs(name)
    with torch.no_grad():
        expected, found = flat(module(x)), flat(small(x))
        states = [0.5 * torch.randn_like(s) for s in (expected if "cell" in name else expected[1:])]
        hx = states[0] if len(states) == 1 else tuple(states)
        expected += flat(module(x, hx))
        found += flat(small(x, hx))
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        size = max(1, b.abs().max())
        assert (a - b).abs().max() < (0.06 if dtype == "int8" else 0.02) * size
        assert (a - b).abs().mean() < (0.012 if dtype == "int8" else 0.003) * size
    before = sum(p.numel() * p.element_size() for p in module.parameters())
    assert sum(b.numel() * b.element_size() for b in small.buffers()) < (0.45 if dtype == "int8" else 0.6) * before
    assert not list(small.parameters())
    for attribute in ("mode", "nonlinearity"):  # which code around a module asks for
        assert getattr(small, attribute, None) == getattr(module, attribute, None)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
@pytest.mark.parametrize("name", MODULES)
def test_copies_and_files(name: str, dtype: str) -> None:
    _, small = quantized(name, dtype)
    x = inputs(name)
    expected = flat(small(x))
    file = io.BytesIO()
    torch.save(small.state_dict(), file)
    file.seek(0)
    torch.manual_seed(7)
    other = MODULES[name]()
    fusedrnn.quantize(other, dtype)
    assert not same(flat(other(x)), expected)
    other.load_state_dict(torch.load(file, weights_only=True))
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    copies = [other, copy.deepcopy(small), pickle.loads(pickle.dumps(small)), torch.load(file, weights_only=False)]
    for one in copies:
        assert same(flat(one(x)), expected) and repr(one) == repr(small)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
@pytest.mark.parametrize("name", MODULES)
def test_exported_and_compiled(name: str, dtype: str) -> None:
    torch._dynamo.reset()
    _, small = quantized(name, dtype)
    x = inputs(name)
    expected = flat(small(x))
    program = torch.export.export(small, (x,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert same(flat(torch.export.load(file).module()(x)), expected)
    compiled = torch.compile(small, backend="aot_eager", fullgraph=True)
    assert same(flat(compiled(x)), expected)


def test_a_dynamic_batch_and_length_are_exported() -> None:
    _, small = quantized("lstm")
    T, B = torch.export.Dim("T", min=2), torch.export.Dim("B", min=2)
    program = torch.export.export(small, (inputs("lstm"),), dynamic_shapes=({0: T, 1: B},))
    x = torch.randn(11, 5, 12)
    assert same(flat(program.module()(x)), flat(small(x)))


def test_a_whole_model() -> None:
    model = Model().eval()
    x = torch.randn(4, 9, 5)
    with torch.no_grad():
        expected = model(x)
        small = copy.deepcopy(model)
        gru, seen = small.gru, []
        gru.register_forward_hook(lambda *_: seen.append(1))
        gru.tag = "mine"
        report = fusedrnn.quantize(small)
        assert small.gru is gru is small.same and gru.tag == "mine"
        assert (small(x) - expected).abs().max() < 0.05 and seen == [1]
    assert [entry.name for entry in report.replaced] == ["lstm", "gru", "cell"] and not report.left
    entry = report.replaced[0]
    assert entry.class_name == "torch.nn.LSTM" and entry.before == 4 * sum(p.numel() for p in model.lstm.parameters())
    assert entry.after == sum(b.numel() * b.element_size() for b in small.lstm.buffers())
    assert "lstm: torch.nn.LSTM: now fusedrnn.QuantizedRecurrent, int8, " in str(report) and "KiB" in str(report)
    again = fusedrnn.quantize(small)
    assert isinstance(again, QuantizationReport) and not again.replaced and not again.left
    other = fusedrnn.quantize(small, "bfloat16")
    assert not other.replaced and {entry.reason for entry in other.left} == {"quantized before, to int8"}
    converted = copy.deepcopy(model)
    fusedrnn.convert(converted)
    fusedrnn.quantize(converted)
    assert torch.equal(converted(x), small(x)) and converted(x).requires_grad


class Own(nn.GRU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


def test_what_is_left_alone() -> None:
    model = nn.ModuleDict({name: nn.GRU(4, 5) for name in ("replaced", "hook", "infinite", "fine")})
    model["own"], model["elsewhere"] = Own(4, 5), nn.LSTM(4, 5, device="meta")
    model["shape"], model["zoneout"] = nn.GRU(4, 5), nn.LSTM(4, 5)
    model["shape"].weight_hh_l0 = nn.Parameter(torch.ones(15, 1))
    model["zoneout"].zoneout = 0.7
    model["peepholes"], model["vector"] = fusedrnn.PeepholeLSTM(4, 5), fusedrnn.IndRNN(4, 5)
    model["replaced"].forward = lambda x: x
    weight_norm(model["hook"], "weight_hh_l0")
    with torch.no_grad():
        model["infinite"].weight_ih_l0[2, 1] = float("inf")
    before = {name: type(module) for name, module in model.items()}
    report = fusedrnn.quantize(model)
    assert [entry.name for entry in report.replaced] == ["fine"]
    reasons = {entry.name: entry.reason for entry in report.left}
    assert reasons == {
        "replaced": "its forward was replaced on the instance",
        "hook": "its weights are computed by a hook of torch.nn.utils: remove that first",
        "infinite": "weight_ih_l0 is not finite in float32",
        "shape": "weight_hh_l0 has shape [15, 1], its sizes say [15, 5]",
        "zoneout": "its attribute zoneout would meet that of a quantized module",
        "peepholes": "its cell has no kernels with small matrices",
        "vector": "its cell has no kernels with small matrices",
        "own": "a subclass, whose code may be its own",
        "elsewhere": "weight_ih_l0 is on device meta, these kernels are for the CPU",
    }
    assert all(type(model[name]) is before[name] for name in reasons)


def test_a_cell_of_the_users_own_is_left_alone() -> None:
    model = nn.ModuleDict({"own": mgu.Module(4, 5, eager=True)})
    (left,) = fusedrnn.quantize(model).left
    assert left.reason == "its cell is the user's own (fusedrnn.cell), without kernels with small matrices"
    assert type(model["own"]) is mgu.Module


def test_computed_weights_are_taken_as_they_are() -> None:
    module = parametrizations.weight_norm(nn.LSTM(6, 8), "weight_hh_l0")
    with torch.no_grad():
        module.parametrizations.weight_hh_l0.original0.mul_(2)
    plain = nn.LSTM(6, 8)
    plain.load_state_dict({name: getattr(module, name) for name in plain.state_dict()})
    fusedrnn.quantize(module)
    fusedrnn.quantize(plain)
    x = torch.randn(5, 2, 6)
    assert same(tensors(module(x)), tensors(plain(x))) and list(module.state_dict()) == list(plain.state_dict())


def test_what_the_user_has_put_there_stays() -> None:
    module, child = nn.LSTM(4, 5), nn.Linear(2, 2)
    module.register_buffer("mean", torch.ones(4))
    module.register_buffer("passing", torch.ones(2), persistent=False)
    module.gain, module.child, module.note = nn.Parameter(torch.ones(3)), child, "mine"
    fusedrnn.quantize(module)
    assert module.mean.sum() == 4 and module.child is child and module.note == "mine"
    assert {"mean", "gain", "child.weight"} <= set(module.state_dict()) and "passing" not in module.state_dict()
    assert len(list(module.parameters())) == 3


def test_other_defaults_make_the_same_modules() -> None:
    x = torch.randn(3, 2, 4)
    module = nn.GRU(4, 5)
    expected = copy.deepcopy(module)
    fusedrnn.quantize(expected)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"), torch.inference_mode():
            fusedrnn.quantize(module)
    finally:
        torch.set_default_dtype(before)
    assert same(tensors(module(x)), tensors(expected(x)))
    module.load_state_dict(expected.state_dict())


@pytest.mark.parametrize("to", ["int8", "bfloat16"])
@pytest.mark.parametrize("of", ["float32", "int8", "bfloat16"])
def test_checkpoints_of_another_kind(of: str, to: str) -> None:
    """What is not these weights is refused before anything is written; float32 is rounded to bfloat16."""
    source, module = nn.LSTM(4, 5), nn.LSTM(4, 5)
    if of != "float32":
        fusedrnn.quantize(source, of)
    fusedrnn.quantize(module, to)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    if of == to or (of, to) == ("float32", "bfloat16"):
        module.load_state_dict(source.state_dict())
        assert not torch.equal(module.weight_ih_l0, before["weight_ih_l0"])
        return
    for strict in (True, False):
        with pytest.raises(
            RuntimeError, match=f"weight_ih_l0 must be {to}, got torch.{of}: load into the model before"
        ):
            module.load_state_dict(source.state_dict(), strict=strict)
        assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


def test_transforms_are_told_that_there_is_no_gradient() -> None:
    module, x = nn.LSTM(4, 5), torch.randn(3, 2, 4)
    fusedrnn.quantize(module)
    for differentiate in (torch.func.grad(lambda x: module(x)[0].sum()), lambda x: torch.func.jvp(module, (x,), (x,))):
        with pytest.raises(RuntimeError, match="weights alone is for inference and has no gradient"):
            differentiate(x)
    y = torch.func.vmap(lambda x: module(x)[0], in_dims=1, out_dims=1)(x[:, :, None])
    assert_close("mapped", y.squeeze(2), module(x)[0])


def test_training_frees_what_inference_has_kept() -> None:
    module, x = nn.LSTM(4, 5), torch.randn(30, 2, 4)
    fusedrnn.quantize(module)
    for _ in range(3):
        module(x)
    kept = fusedrnn.inference.cache.cached
    assert module in kept
    module.train()
    assert module not in kept and not module.training


def test_a_step_is_what_forward_is() -> None:
    x = torch.randn(2, 4)
    module = nn.RNN(4, 5)
    fusedrnn.quantize(module)
    for _ in range(2):
        module.step(x)
    module.cell = "rnn_relu"
    assert torch.equal(module.step(x)[0], module(x[None])[0][0])
    forward = module.forward
    module.forward = lambda *args: (forward(*args)[0] * 0 + 7, None)
    for _ in range(2):
        assert (module.step(x)[0] == 7).all()
    del module.forward
    module.register_forward_hook(lambda module, args, result: (result[0] * 0 + 3, result[1]))
    assert (module.step(x)[0] == 3).all()


def test_tools_that_take_our_modules() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.GRU(4, 5)).eval()
    fusedrnn.quantize(model)
    x = torch.randn(3, 2, 3)
    assert torch.equal(torch.fx.symbolic_trace(model)(x)[0], model(x)[0])
    model(x)[0].relu_()  # as torch.nn's allows
    cell = nn.LSTMCell(3, 4)
    fusedrnn.quantize(cell)
    cell(torch.randn(2, 3, requires_grad=True))[0].relu_()
    cell(torch.randn(3, requires_grad=True))[0].relu_()
    with pytest.raises(NotImplementedError, match="QuantizedRecurrent cannot be compiled by TorchScript"):
        torch.jit.script(model)
    with pytest.raises(NotImplementedError, match="not by TorchScript"):
        torch.onnx.export(model, (x,), io.BytesIO(), dynamo=False)
    nn.utils.parametrize.register_parametrization(model[1], "bias_ih_l0", nn.Identity())
    assert torch.isfinite(model(x)[0]).all()


def test_no_training() -> None:
    torch._dynamo.reset()
    model = Model()
    fusedrnn.quantize(model)
    model.train()
    assert model.training and model.head.training and not model.lstm.training and not model.cell.training
    model.eval()
    x = torch.randn(2, 3, 5)
    y = model(x)  # after a layer that trains
    with pytest.raises(RuntimeError, match="alone is for inference and has no gradient"):
        y.sum().backward()
    with torch.no_grad():
        assert torch.equal(model(x), y)
    _, small = quantized("lstm")
    x = inputs("lstm")
    assert not flat(small(x))[0].requires_grad
    leaf = x.clone().requires_grad_()
    states = tuple(torch.zeros(4, 3, 24, requires_grad=True) for _ in range(2))
    for call in (
        lambda: small(leaf)[0],
        lambda: small(leaf)[1][1],
        lambda: small(leaf, return_states=True)[2][1][1],
        lambda: small(x, lengths=[7, 3, 2], hx=states)[0],
        lambda: quantized("gru cell")[1](leaf[0]),
    ):
        with pytest.raises(RuntimeError, match="alone is for inference and has no gradient"):
            call().sum().backward()
    for call in (
        lambda: torch.func.jvp(lambda t: small(t)[0], (x,), (x,)),
        lambda: torch.func.grad(lambda t: small(t)[0].sum())(x),
        lambda: torch.compile(small, backend="aot_eager", fullgraph=True)(leaf),
    ):
        with pytest.raises(Exception, match="no gradient|not implemented|forward AD"):
            call()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_come_and_go(dtype: torch.dtype) -> None:
    """A model of another type has float32 inside, and gives what it takes."""
    for name in ("lstm", "gru cell"):
        module = MODULES[name]().to(dtype)
        fusedrnn.quantize(module)
        x = inputs(name).to(dtype)
        found = flat(module(x))
        assert all(t.dtype == dtype for t in found)
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(found, flat(module(x.float())), strict=True))
        assert all(b.dtype in (torch.int8, torch.float32) for b in module.to(dtype).buffers())
        small = MODULES[name]()
        fusedrnn.quantize(small, torch.bfloat16)
        assert all(b.dtype in (torch.bfloat16, torch.float32) for b in small.to(dtype).buffers())
        with torch.autocast("cpu", torch.bfloat16):
            assert same(flat(module(x)), found)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda q: q(torch.ones(3, 2, 12, dtype=torch.int64)), TypeError, "floating dtype, got torch.int64"),
        (lambda q: q([1.0]), TypeError, "must be a tensor or a PackedSequence, got list"),
        (lambda q: q(torch.ones(3, 2, 11)), RuntimeError, "equal to input_size. Expected 12, got"),
        (lambda q: q(torch.ones(12)), ValueError, "2 .unbatched. or 3 dimensions, got 1"),
        (lambda q: q(torch.ones(0, 2, 12)), RuntimeError, "sequence length to be larger than 0"),
        (lambda q: q(torch.ones(3, 2, 12), torch.ones(4, 2, 24)), TypeError, "tuple of 2 tensors, got a tensor"),
        (lambda q: q(torch.ones(3, 2, 12), (torch.ones(4, 2, 24),)), RuntimeError, "two hidden states"),
        (lambda q: q(torch.ones(3, 2, 12), (torch.ones(4, 1, 24),) * 2), RuntimeError, r"h0 must have shape \[4, 2"),
        (lambda q: q.step(torch.ones(2, 12)), ValueError, "bidirectional module needs the whole sequence"),
        (lambda q: q(torch.ones(3, 2, 12), (torch.ones(4, 2, 24), 3)), TypeError, "lstm must be a tensor, got int"),
        (lambda q: q(torch.ones(3, 2, 12), (torch.ones(4, 2, 24), None)), TypeError, "must be a tensor, got NoneType"),
        (lambda q: QuantizedCell("gru", 3, 4)(torch.ones(2, 3), [torch.ones(2, 4)]), TypeError, "a tensor, got list"),
        (lambda q: QuantizedCell("gru", 3, 4)(torch.ones(2, 3), torch.ones(2, 5)), RuntimeError, "got 5, expected 4"),
        (lambda q: QuantizedCell("gru", 3, 4)(torch.ones(2, 3), torch.ones(3, 4)), RuntimeError, "2 doesn't match"),
        (lambda q: QuantizedRecurrent("lsmt", 3, 4), ValueError, "cell must be one of"),
        (lambda q: QuantizedRecurrent("gru", 3, 4, proj_size=2), ValueError, "proj_size must be below hidden_size"),
        (lambda q: QuantizedRecurrent("lstm", 3, 4, proj_size=4), ValueError, "proj_size must be below hidden_size"),
        (lambda q: QuantizedRecurrent("gru", 3, 0), ValueError, "hidden_size must be an integer from 1 on, got 0"),
        (lambda q: QuantizedRecurrent("gru", 3, 4, num_layers=0), ValueError, "num_layers must be greater than zero"),
        (lambda q: QuantizedRecurrent("gru", 3, 4, zoneout=2.0), ValueError, "zoneout"),
        (lambda q: fusedrnn.quantize(3), TypeError, "must be a torch.nn.Module, got int"),
        (lambda q: fusedrnn.quantize(q, "int4"), ValueError, "dtype must be 'int8' or 'bfloat16', got 'int4'"),
    ],
)
def test_errors(call: Callable, error: type[Exception], match: str) -> None:
    _, small = quantized("lstm")
    with pytest.raises(error, match=match):
        call(small)


def test_unbatched_and_empty_batches() -> None:
    _, small = quantized("lstm")
    x = inputs("lstm")
    y, (h_n, c_n) = small(x[:, 0])
    expected = tensors(small(x[:, :1]))
    assert same([y.unsqueeze(1), h_n.unsqueeze(1), c_n.unsqueeze(1)], expected)
    assert small(x[:, :0])[0].shape == (7, 0, 48)
    _, cell = quantized("gru cell")
    assert torch.equal(cell(x[0])[1], cell(x[0, 1]))


def test_vmap_maps_over_the_batch() -> None:
    _, small = quantized("gru")
    x = torch.randn(4, 2, 7, 12)
    with torch.no_grad():
        mapped = torch.vmap(lambda t: small(t)[0])(x)
    assert torch.equal(mapped, torch.stack([small(t)[0] for t in x]))


def test_onnx_says_that_it_has_none() -> None:
    pytest.importorskip("onnxscript")
    _, small = quantized("our rnn")
    with pytest.raises(Exception, match="quantized layers are not exported to ONNX"):
        torch.onnx.export(
            small, (inputs("our rnn"),), io.BytesIO(), dynamo=True, custom_translation_table=fusedrnn.onnx.table()
        )
