"""patch_torch: torch.nn's classes compute with our kernels, stay what they are, and come back."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch
from dispatched import ours
from tolerances import assert_close
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev
from torch.nn import LSTM as EARLY
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn
from fusedrnn.fused_module import FusedModule
from fusedrnn.inference.cache import cached

LAYERS, SINGLES = ("RNN", "LSTM", "GRU"), ("RNNCell", "LSTMCell", "GRUCell")
NAMES = LAYERS + SINGLES
X = torch.randn(3, 4, dtype=torch.float64)  # a batch for a cell, a sequence for a layer


class Plain(nn.GRU):
    """A subclass without a forward."""


class Flexible(nn.RNNBase):
    """As in a forecasting library: a mixin beside the class, whose super().forward is torch.nn's."""

    def forward(self, x: Tensor, hx: Tensor | None = None, lengths: Tensor | None = None):
        return super().forward(x, hx=hx)


class FlexibleLSTM(Flexible, nn.LSTM):
    pass


class Own(nn.GRUCell):
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return input.sum() * self.weight_hh[0]


class Checked(nn.LSTM):
    def check_forward_args(self, input, hidden, batch_sizes):
        pass


class Scripted(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.rnn = getattr(nn, name)(4, 5, num_layers=2, bidirectional=True).double()

    def forward(self, x):
        return self.rnn(x)[0]


class ScriptedPacked(Scripted):
    def forward(self, x: PackedSequence):
        return self.rnn(x)[0].data


def made(name: str, **kwargs) -> nn.Module:
    return getattr(nn, name)(4, 5, **kwargs).double()


def first(result) -> Tensor:
    """The tensor of the output."""
    output = result if isinstance(result, Tensor) else result[0]
    return output.data if isinstance(output, PackedSequence) else output


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    before = [getattr(nn, name).forward for name in NAMES]
    yield
    fusedrnn.unpatch_torch()
    assert [getattr(nn, name).forward for name in NAMES] == before


@pytest.mark.parametrize("name", NAMES)
def test_computed_by_the_kernels(name: str) -> None:
    """A module made before, with the same results and gradients, and torch's own again afterwards."""
    module = made(name)
    assert not ours(module, X)
    found = []
    for patched in (False, True):
        if patched:
            fusedrnn.patch_torch()
        x = X.clone().requires_grad_()
        y = first(module(x))
        found.append([y, *torch.autograd.grad(y.pow(2).sum(), [x, *module.parameters()])])
    for theirs, fused in zip(*found, strict=True):
        assert_close("patched", fused, theirs)
    assert ours(module, X) and ours(made(name), X)
    fusedrnn.unpatch_torch()
    assert not ours(module, X)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("packed", [False, True])
def test_stacks_states_and_packed_input(name: str, packed: bool) -> None:
    kwargs = {"proj_size": 2} if name == "LSTM" else {}
    module = made(name, num_layers=2, bidirectional=True, batch_first=True, **kwargs)
    x = torch.randn(3, 4, 4, dtype=torch.float64)
    x = pack_padded_sequence(x, torch.tensor([2, 4, 1]), batch_first=True, enforce_sorted=False) if packed else x
    _, hx = module(x)
    expected = module(x, hx)
    with fusedrnn.patch_torch():
        found = module(x, hx=hx)
        assert ours(module, x, hx)
    torch.testing.assert_close(found, expected)


def test_names_and_subclasses_from_before() -> None:
    early = EARLY(4, 5).double()
    weighted = parametrizations.weight_norm(nn.GRU(4, 5).double(), "weight_hh_l0")
    with fusedrnn.patch_torch():
        assert EARLY is nn.LSTM is torch.nn.modules.rnn.LSTM
        assert ours(early, X) and ours(EARLY(4, 5).double(), X)
        assert ours(Plain(4, 5).double(), X) and ours(FlexibleLSTM(4, 5).double(), X) and ours(weighted, X)
        own = Own(4, 5).double()
        assert not ours(own, X) and torch.equal(own(X), X.sum() * own.weight_hh[0])


@pytest.mark.parametrize("name", NAMES)
def test_modules_stay_what_they_are(name: str) -> None:
    """Types, copies and pickles, also of a module whose weights the kernels have packed."""
    cls, x = getattr(nn, name), torch.randn(24, 4) if name in SINGLES else torch.randn(6, 4, 4)
    attributes = set(vars(cls(4, 5)))
    with fusedrnn.patch_torch(), torch.no_grad():
        module = cls(4, 5)
        for _ in range(3):
            expected = first(module(x))
        assert type(module) is cls and isinstance(module, cls) and not isinstance(module, FusedModule)
        assert isinstance(getattr(fusedrnn, name)(4, 5), cls)
        assert set(vars(module)) == attributes and module in cached
        file = io.BytesIO()
        torch.save(module, file)
        assert b"fusedrnn" not in pickle.dumps(module) and b"fusedrnn" not in file.getvalue()
        file.seek(0)
        for other in (
            copy.deepcopy(module),
            pickle.loads(pickle.dumps(module)),
            torch.load(file, weights_only=False),
        ):
            assert type(other) is cls and torch.equal(first(other(x)), expected)
    pickled = pickle.dumps(module)
    with fusedrnn.patch_torch():
        assert ours(pickle.loads(pickled), x)


def test_packed_weights_are_let_go() -> None:
    """By a training step, by the module's end, by unpatch_torch."""
    module, x = nn.LSTM(4, 5), torch.randn(6, 4, 4)
    fusedrnn.patch_torch()
    for _ in range(2):
        with torch.no_grad():
            module(x)
        assert module in cached
        module(x)
        assert module not in cached
    with torch.no_grad():
        count = len(cached)
        nn.GRU(4, 5)(x)
        assert len(cached) == count
        module(x)
    fusedrnn.unpatch_torch()
    assert module not in cached


def test_own_modules_and_convert_while_patched() -> None:
    """fusedrnn's classes are subclasses of those patched."""
    with fusedrnn.patch_torch():
        for name in NAMES:
            module = made(name)
            expected = module(X)
            assert fusedrnn.convert(module).replaced and type(module) is getattr(fusedrnn, name)
            assert ours(module, X) and ours(getattr(fusedrnn, name)(4, 5).double(), X)
            torch.testing.assert_close(module(X), expected)
            assert fusedrnn.revert(module).replaced and ours(module, X)
        assert ours(fusedrnn.GRU(4, 5, reset_after=False).double(), X)


def test_blocks_and_calls() -> None:
    module = made("GRU")
    with fusedrnn.patch_torch():
        with fusedrnn.patch_torch():
            pass
        assert ours(module, X)
    assert not ours(module, X)
    with suppress(KeyError), fusedrnn.patch_torch():
        raise KeyError
    assert not ours(module, X)
    fusedrnn.patch_torch()
    fusedrnn.patch_torch()
    with fusedrnn.patch_torch():
        pass
    assert ours(module, X)
    fusedrnn.unpatch_torch()
    fusedrnn.unpatch_torch()
    assert not ours(module, X)
    with fusedrnn.patch_torch():
        fusedrnn.unpatch_torch()
        assert not ours(module, X)
    with fusedrnn.patch_torch():
        fusedrnn.patch_torch()
    assert ours(module, X)
    fusedrnn.unpatch_torch()
    block = fusedrnn.patch_torch()
    for _ in range(2):
        with block:
            assert ours(module, X)
        assert not ours(module, X)


def test_blocks_that_overlap_in_threads() -> None:
    """The first to begin ends first; the other's block goes on."""
    module, entered, left, found = made("GRU"), threading.Event(), threading.Event(), []

    def other() -> None:
        with fusedrnn.patch_torch():
            entered.set()
            left.wait(60)
            found.append(ours(module, X))

    thread = threading.Thread(target=other)
    with fusedrnn.patch_torch():
        thread.start()
        assert entered.wait(60)
    left.set()
    thread.join(60)
    assert found == [True] and not ours(module, X)


def test_a_forward_replaced_meanwhile() -> None:
    """By code that wraps what it finds: its wrapper stays, and works after the patch as before it."""
    calls, own = [], nn.GRU.forward
    fusedrnn.patch_torch()
    patched = nn.GRU.forward

    def forward(self, *args, **kwargs):
        calls.append(self)
        return patched(self, *args, **kwargs)

    nn.GRU.forward = forward
    module = made("GRU")
    assert ours(module, X)
    fusedrnn.unpatch_torch()
    assert nn.GRU.forward is forward and nn.LSTM.forward is not patched
    assert not ours(module, X) and calls == [module, module]
    nn.GRU.forward = own


COMPLEX = X.to(torch.complex64)


@pytest.mark.parametrize("name", ["RNN", "GRU", "RNNCell", "GRUCell"])
def test_a_dtype_without_kernels_goes_to_torch(name: str) -> None:
    """With one warning each time that torch.nn is patched; the results are torch.nn's."""
    module = made(name).to(torch.complex64)
    expected = first(module(COMPLEX))
    for _ in range(2):
        with fusedrnn.patch_torch():
            with pytest.warns(UserWarning, match=f"torch.nn.{name}, .*: no kernels for torch.complex64 on") as caught:
                assert torch.equal(first(module(COMPLEX)), expected)
            assert caught[0].filename == __file__
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                module(COMPLEX)
                made(name)(X)


def test_a_warning_may_raise() -> None:
    module = made("GRU").to(torch.complex64)
    with fusedrnn.patch_torch(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(UserWarning, match="no kernels for torch.complex64"):
                module(COMPLEX)


@pytest.mark.filterwarnings("error")
def test_autocast() -> None:
    """The dtype asked of the kernels is autocast's; float64 is not cast."""
    module = nn.LSTM(4, 5)
    with fusedrnn.patch_torch():
        for dtype in (torch.bfloat16, torch.float16):  # float16: torch.nn.LSTM raises
            with torch.autocast("cpu", dtype):
                assert module(X.float())[0].dtype == dtype
                assert ours(made("GRU"), X)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_transforms(name: str) -> None:
    """By our kernels, and what torch.nn's gives where it can."""
    module = made(name)
    weights = {key: p.detach() for key, p in module.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return first(functional_call(module, weights, (X,))).sum()

    def output(x: Tensor) -> Tensor:
        return first(functional_call(module, weights, (x,)))

    expected = grad(loss)(weights), jacrev(output)(X)
    with fusedrnn.patch_torch():
        torch.testing.assert_close((grad(loss)(weights), jacrev(output)(X)), expected)
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(output(forward_ad.make_dual(X, torch.ones_like(X)))).tangent
        torch.testing.assert_close(tangent, expected[1].sum((-2, -1)))


def test_a_subclass_with_checks_of_its_own() -> None:
    with fusedrnn.patch_torch(), pytest.warns(UserWarning, match="Checked has argument checks of its own"):
        assert not ours(Checked(4, 5).double(), X)


@pytest.mark.parametrize("name", LAYERS)
def test_errors_are_torchs(name: str) -> None:
    module = made(name)
    with fusedrnn.patch_torch():
        with pytest.raises(ValueError, match=f"{name}: Expected input to be 2D or 3D, got 1D"):
            module(X[0])
        with pytest.raises(RuntimeError, match="input.size\\(-1\\) must be equal to input_size. Expected 4, got 3"):
            module(X[:, :3])
        with pytest.raises(AttributeError, match="list"):
            module([1.0])


@pytest.mark.parametrize("name, packed", [(n, p) for n in ("RNN", "GRU") for p in (False, True)] + [("GRUCell", False)])
def test_output_written_in_place(name: str, packed: bool) -> None:
    """Before backward, where torch.nn lets it be."""
    module, found = made(name), []
    x = X
    if packed:
        x = pack_padded_sequence(X.expand(3, 3, 4), torch.tensor([3, 2, 1]))
    for patched in (False, True):
        if patched:
            fusedrnn.patch_torch()
        y = first(module(x))
        y.mul_(X.sum())
        found.append(torch.autograd.grad(y.pow(2).sum(), list(module.parameters())))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LAYERS)
def test_what_leaves_the_process_is_torchs(name: str) -> None:
    """TorchScript by script and trace, and exported programs."""
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    packed = pack_padded_sequence(x, torch.tensor([3, 1]))
    for cls, args in ((Scripted, x), (ScriptedPacked, packed)):
        model = cls(name)
        with fusedrnn.patch_torch():
            scripted = torch.jit.script(model)
            torch.testing.assert_close(scripted(args), model(args))
    model = Scripted(name)
    with fusedrnn.patch_torch():
        traced = torch.jit.trace(model, (x,))
        exported = torch.export.export(model, (x,))
        assert ours(model, x)
    for program in (scripted.inlined_graph, traced.inlined_graph, exported.graph):
        assert "fusedrnn::" not in str(program) and "fusedrnn." not in str(program)
    torch.testing.assert_close(traced(x), model(x))
    torch.testing.assert_close(exported.module()(x), model(x))


@pytest.mark.filterwarnings("ignore")
def test_quantization_knows_the_classes() -> None:
    model = nn.Sequential(nn.LSTM(8, 8))
    with fusedrnn.patch_torch():
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM}, dtype=torch.qint8)
        assert type(quantized[0]) is torch.ao.nn.quantized.dynamic.LSTM
        quantized(torch.randn(3, 2, 8))


@pytest.mark.parametrize("allow", [False, True])
def test_compiled(allow: bool) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 5)).double()
    expected = model(X)
    with fusedrnn.patch_torch(), torch._dynamo.config.patch(allow_rnn=allow):
        with torch.no_grad():
            model(torch.randn(6, 4, 4, dtype=torch.float64))
        assert len(cached) > 0
        torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=allow)(X), expected)
    torch._dynamo.reset()
