"""Training through torch.compile: the layers are traced, with the gradients of the eager call; torch's own op checks.

Dynamo leaves torch.nn's recurrent classes, and so ours, to Python unless ``torch._dynamo.config.allow_rnn`` is set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import pytest
import torch
from loops import SINGLES, TWINS, of_op
from parity import Case
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils._pytree import tree_leaves, tree_map_only

import fusedrnn
from fusedrnn.cells import CELLS

NEWER = pytest.mark.skipif(torch.__version__ < "2.13", reason="an older Dynamo refuses it in words of its own")


class Tagger(nn.Module):
    """A recurrent layer and a head, as models have them."""

    def __init__(self, layer: nn.Module, out: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(out, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.layer(x)
        while not isinstance(result, torch.Tensor):
            result = result[0]
        return self.head(result)


LAYERS = {
    "lstm": lambda: (fusedrnn.LSTM(4, 5, num_layers=2, bidirectional=True), (3, 2, 4), 10),
    "gru": lambda: (fusedrnn.GRU(4, 5), (3, 2, 4), 5),
    "rnn": lambda: (fusedrnn.RNN(4, 5, batch_first=True), (3, 2, 4), 5),
    "lstm cell": lambda: (fusedrnn.LSTMCell(4, 5), (3, 4), 5),
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compare(model: nn.Module, compiled, x: torch.Tensor) -> None:
    """Values and gradients of the compiled model are the eager ones."""
    results = []
    for call in (model, compiled):
        model.zero_grad()
        leaf = x.clone().requires_grad_()
        call(leaf).square().sum().backward()
        results.append([leaf.grad, *(parameter.grad.clone() for parameter in model.parameters())])
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(ours, eager)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_compiled_model_trains(name: str, backend: str) -> None:
    torch.manual_seed(0)
    layer, shape, out = LAYERS[name]()
    model = Tagger(layer, out)
    compare(model, torch.compile(model, backend=backend), torch.randn(shape))


@pytest.fixture
def allow_rnn():
    """What a user sets to have the layers traced."""
    with torch._dynamo.config.patch(allow_rnn=True):
        yield


def test_refused_unless_allowed() -> None:
    model = torch.compile(nn.Sequential(fusedrnn.LSTM(4, 5)), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="allow_rnn=True"):
        model(torch.randn(3, 2, 4))


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_refused_layer_is_left_to_python(backend: str, patched: bool) -> None:
    """Whole: Dynamo compiles nothing inside it, and a gradient penalty through it is right."""
    counter = CompileCounterWithBackend(backend)
    with fusedrnn.patch_torch() if patched else nullcontext():
        layers = [(nn if patched else fusedrnn).GRU(4, 4 + i) for i in range(4)]
        model = nn.ModuleList([nn.Sequential(layer, First(), nn.Linear(4 + i, 4)) for i, layer in enumerate(layers)])
        chain = nn.Sequential(*model)
        x, found = torch.randn(5, 2, 4), []
        for call in (chain, torch.compile(chain, backend=counter)):
            leaf = x.clone().requires_grad_()
            y = call(leaf)
            (dx,) = torch.autograd.grad(y.sum(), leaf, create_graph=True)
            found.append(torch.autograd.grad(dx.square().sum() + y.square().sum(), [leaf, *chain.parameters()]))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert counter.frame_count <= 5  # what is between the layers


@pytest.mark.parametrize("cell", CELLS)
def test_a_weight_that_was_replaced(cell: str, allow_rnn: None) -> None:
    """Set as an attribute, before anything was computed: Dynamo follows the look-up of the weights."""
    module = TWINS[cell].layer(4, 5)
    module.weight_hh_l0 = nn.Parameter(module.weight_hh_l0.detach() * 2)
    assert_same(module, torch.compile(module, backend="aot_eager", fullgraph=True), torch.randn(3, 2, 4))


class First(nn.Module):
    def forward(self, results: tuple[Tensor, ...]) -> Tensor:
        return results[0]


def assert_same(module: nn.Module, compiled: Callable, *args, dynamic: Sequence[Sequence[int]] = ()) -> None:
    """Every output and every gradient of the compiled module is the eager one's.

    ``dynamic``: for each tensor of the arguments the dimensions marked dynamic.
    """
    found = []
    for call in (module, compiled):
        given = tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.is_floating_point()), args)
        for tensor, dims in zip(tree_leaves(given), dynamic):
            torch._dynamo.mark_dynamic(tensor, tuple(dims))
        outputs = [t for t in tree_leaves(call(*given)) if isinstance(t, Tensor) and t.is_floating_point()]
        draw = torch.Generator().manual_seed(1)
        cotangents = [torch.randn(t.shape, generator=draw) for t in outputs]
        wanted = [t for t in tree_leaves(given) if t is not None and t.requires_grad] + list(module.parameters())
        found.append([*outputs, *torch.autograd.grad(outputs, wanted, cotangents)])
    for ours, eager in zip(*found, strict=True):
        torch.testing.assert_close(ours, eager)


def states(cell: str, *shape: int) -> Tensor | tuple[Tensor, ...]:
    """hx of the given shape."""
    hx = tuple(torch.randn(shape) for _ in CELLS[cell].states)
    return hx if len(hx) > 1 else hx[0]


@pytest.mark.parametrize("cell", CELLS)
def test_dynamic_sizes(cell: str, allow_rnn: None) -> None:
    """One graph for all T and B, without a break."""
    module = TWINS[cell].layer(4, 5, **({"num_layers": 2, "bidirectional": True} if cell == "lstm" else {}))
    rows = module.num_layers * (2 if module.bidirectional else 1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for T, B in ((3, 2), (7, 4), (2, 9)):
        assert_same(module, compiled, torch.randn(T, B, 4), states(cell, rows, B, 5), dynamic=[(0, 1), *[(1,)] * 4])
    assert counter.frame_count == 1


@pytest.mark.parametrize("cell", SINGLES)
def test_dynamic_batch_of_a_cell(cell: str) -> None:
    """A single step needs no opt-in."""
    module = TWINS[cell].cell(4, 5)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for B in (3, 7, 2):
        assert_same(module, compiled, torch.randn(B, 4), states(cell, B, 5), dynamic=[(0,)] * 5)
    assert counter.frame_count == 1


def test_sizes_become_dynamic(allow_rnn: None) -> None:
    """The first other T compiles once more, and so does the first other B; no size above 1 does after that."""
    module = fusedrnn.LSTM(4, 5, batch_first=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    counts = []
    for T, B in ((3, 2), (5, 2), (5, 4), (7, 3), (2, 9)):
        assert_same(module, compiled, torch.randn(B, T, 4))
        counts.append(counter.frame_count)
    assert counts == [1, 2, 3, 3, 3]


def test_sizes_of_which_nothing_is_known(allow_rnn: None) -> None:
    """Sizes of 1, for which Dynamo makes a graph of their own otherwise, share the one graph."""
    module = fusedrnn.GRU(4, 5)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for T, B in ((2, 3), (1, 5), (3, 1), (1, 1)):
        x = torch.randn(T, B, 4)
        torch._dynamo.decorators.mark_unbacked(x, 0)
        torch._dynamo.decorators.mark_unbacked(x, 1)
        for found, expected in zip(compiled(x), module(x), strict=True):
            torch.testing.assert_close(found, expected)
    assert counter.frame_count == 1


LENGTHS = ([11, 7, 3], [5, 4], [7, 3, 2, 1])


def pack(lengths: list[int], enforce_sorted: bool) -> PackedSequence:
    lengths = lengths if enforce_sorted else lengths[::-1]
    return pack_padded_sequence(
        torch.randn(max(lengths), len(lengths), 4), torch.tensor(lengths), enforce_sorted=enforce_sorted
    )


def test_packed_input_with_states(allow_rnn: None) -> None:
    module = fusedrnn.GRU(4, 5)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True, dynamic=True)
    for lengths in LENGTHS:
        assert_same(module, compiled, pack(lengths, True), torch.randn(1, len(lengths), 5))


@NEWER
@pytest.mark.parametrize("allow", [False, True])
def test_forward_mode(allow: bool) -> None:
    module, x = fusedrnn.GRU(4, 5), torch.randn(3, 2, 4)
    with torch._dynamo.config.patch(allow_rnn=allow), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        found, expected = (
            forward_ad.unpack_dual(call(dual)[0]).tangent for call in (torch.compile(module, backend="eager"), module)
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_input(enforce_sorted: bool, allow_rnn: None) -> None:
    module = fusedrnn.LSTM(4, 5, bidirectional=True)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for lengths in LENGTHS:
        assert_same(module, compiled, pack(lengths, enforce_sorted), dynamic=[(0,)] * (2 if enforce_sorted else 4))
    assert counter.frame_count == 1


def test_packed_input_between_graph_breaks() -> None:
    """Dynamo begins anew in the middle of our code where the frame above is left to Python."""
    module = fusedrnn.LSTM(4, 5)
    compiled = torch.compile(module, backend="aot_eager")
    for lengths in LENGTHS[:2]:
        assert_same(module, compiled, pack(lengths, True))


def test_a_converted_model(allow_rnn: None) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 5, 2))
    fusedrnn.convert(model)
    assert_same(model, torch.compile(model, backend="aot_eager", fullgraph=True), torch.randn(3, 2, 4))


def test_inductor(allow_rnn: None) -> None:
    module = fusedrnn.LSTM(4, 5, bidirectional=True)
    assert_same(module, torch.compile(module, fullgraph=True), torch.randn(3, 2, 4))


@NEWER
def test_under_func_grad(allow_rnn: None) -> None:
    """Dynamo drops the backward of an autograd.Function inside torch.func.grad: refused, or left to Python."""
    module = fusedrnn.GRU(4, 5)
    weights, x = {name: p.detach() for name, p in module.named_parameters()}, torch.randn(3, 2, 4)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(module, weights, (x,))[0].square().sum()

    gradient = torch.func.grad(loss)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="fusedrnn: torch.compile cannot trace"):
        torch.compile(gradient, backend="aot_eager", fullgraph=True)(weights)
    torch._dynamo.reset()
    found, expected = torch.compile(gradient, backend="aot_eager")(weights), gradient(weights)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


# A case, what `save` is, and whether the gradients of x and of the weights are asked for.
OPCHECKED = [
    *((Case(cell), True, True, True) for cell in CELLS),
    (Case("lstm", proj_size=3, bidirectional=True, bias=False, dtype=torch.bfloat16), False, True, False),
    (Case("gru", bidirectional=True, h0=False, dtype=torch.float32), False, False, True),
    (Case("lstm", proj_size=3, bidirectional=True, lengths=(3, 2), dtype=torch.float32), False, False, False),
    (Case("gru_reset_before", h0=False, lengths=(3, 2), dtype=torch.bfloat16), True, True, True),
]


@pytest.mark.parametrize("case, save, need_x, need_weights", OPCHECKED, ids=str)
def test_opcheck(case: Case, save: bool, need_x: bool, need_weights: bool) -> None:
    """Schema, fake kernels and dispatch, as torch checks them: nothing mutated or aliased, shapes as promised."""
    tensors = {name: t.detach() for name, t in case.tensors().items()}
    x, batch_sizes = tensors["x"], None
    if case.lengths is not None:
        x, batch_sizes, *_ = pack_padded_sequence(x, torch.tensor(case.lengths))
    weights = [p.detach() for p in case.module()._flat_weights]
    given = (x, batch_sizes, *of_op(tensors), weights)
    torch.library.opcheck(fusedrnn.ops.layer_forward, (*given, case.cell, case.bidirectional, save))
    y, h_n, c_n, saved = fusedrnn.ops.layer_forward(*given, case.cell, case.bidirectional, True)
    dh_n = torch.ones_like(h_n) if need_x else None
    dc_n = torch.ones_like(c_n) if need_weights and c_n.size(0) else None
    dc = x.new_ones(*x.shape[:-1], c_n.size(0) * c_n.size(2)) if need_x and c_n.size(0) else None
    torch.library.opcheck(
        fusedrnn.ops.layer_backward,
        (torch.ones_like(y), dh_n, dc_n, dc, *given, y, saved, case.cell, case.bidirectional, need_x, need_weights,
         need_x, need_weights, int(need_x), float(need_x), need_weights),
    )  # fmt: skip
