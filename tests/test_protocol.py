"""The module protocol of torch.nn.RNNBase: construction, saving, copying, moving, weights set by other paths.

Where torch.nn has the class, it does the same thing beside ours and the two must not differ; a helper trains both for
some steps, so that a weight that was changed by any path has to be seen by the next forward.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from loops import STATES, TWINS
from parity import Case, run_ours
from tolerances import assert_close
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.nn.utils.parametrize import remove_parametrizations

import fusedrnn
from fusedrnn.cells import CELLS

LAYERS, SINGLES = ("RNN", "LSTM", "GRU"), ("RNNCell", "LSTMCell", "GRUCell")
BOTH = (*LAYERS, *SINGLES)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 3, "bidirectional": True},
    {"bias": False, "batch_first": True},
    {"num_layers": 2, "dropout": 0.25},
]


def pair(name: str, **options: Any) -> tuple[nn.Module, nn.Module]:
    """Ours and torch.nn's, in float64, with the same initial values."""
    found = []
    for namespace in (fusedrnn, nn):
        torch.manual_seed(7)
        found.append(getattr(namespace, name)(5, 5, dtype=torch.float64, **options))
    return found[0], found[1]


def input_of(module: nn.Module) -> Tensor:
    draw = torch.Generator().manual_seed(8)
    shape = (4, 3, module.input_size) if isinstance(module, nn.RNNBase) else (3, module.input_size)
    return torch.randn(shape, generator=draw, dtype=torch.float64)


def first(outputs: Any) -> Tensor:
    return outputs[0] if isinstance(outputs, tuple) else outputs


def trained(module: nn.Module, x: Tensor | None = None) -> dict[str, Tensor]:
    """Three SGD steps; the last output and all values of the module by name."""
    torch.manual_seed(9)
    x = input_of(module) if x is None else x
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    for _ in range(3):
        y = first(module(x))
        optimizer.zero_grad()
        y.pow(2).sum().backward()
        optimizer.step()
    return {"y": y.detach(), **{k: v.detach().clone() for k, v in module.state_dict().items()}}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name in expected:
        assert_close(name, found[name], expected[name])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", BOTH)
def test_construction(name: str, options: dict[str, Any]) -> None:
    """A subclass, the same initial values from the same seed, names, order, attributes, and the same words."""
    if name in SINGLES:
        options = {key: value for key, value in options.items() if key == "bias"}
    ours, theirs = pair(name, **options)
    assert isinstance(ours, getattr(nn, name))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    assert repr(ours) == repr(theirs)
    for key in set(vars(theirs)) - {"_parameters", "_flat_weights", "_flat_weight_refs"}:
        assert getattr(ours, key) == getattr(theirs, key), key
    assert set(type(theirs).__constants__) <= set(type(ours).__constants__)
    storages = {p.untyped_storage().data_ptr() for p in ours.parameters()}
    assert len(storages) == len(list(ours.parameters())), "each parameter needs a storage of its own"
    if name in LAYERS:
        for mine, torchs in zip(ours.all_weights, theirs.all_weights, strict=True):
            assert [w.shape for w in mine] == [w.shape for w in torchs]
        assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))
        ours.flatten_parameters()


def test_positional_arguments() -> None:
    for name, arguments in {
        "RNN": (4, 5, 2, "relu", False, True, 0.1, True),
        "LSTM": (4, 5, 2, False, True, 0.1, True, 3, "meta", torch.float64),
        "GRU": (4, 5, 2, False, True, 0.1, True),
        "RNNCell": (4, 5, False, "relu", "meta", torch.float64),
        "LSTMCell": (4, 5, False, "meta", torch.float64),
        "GRUCell": (4, 5, False, "meta", torch.float64),
    }.items():
        ours, theirs = getattr(fusedrnn, name)(*arguments), getattr(nn, name)(*arguments)
        assert repr(ours) == repr(theirs)
        described = [[(k, v.shape, v.dtype, v.device) for k, v in m.state_dict().items()] for m in (ours, theirs)]
        assert described[0] == described[1]


def test_new_classes_say_what_they_are() -> None:
    assert "reset_after=False" in repr(fusedrnn.GRU(4, 5, reset_after=False))
    assert "reset_after=False" in repr(fusedrnn.GRUCell(4, 5, reset_after=False))
    assert repr(fusedrnn.GRU(4, 5, reset_after=True)) == "GRU(4, 5)"
    layer = fusedrnn.ResidualRNN(4, 5, num_layers=2, bidirectional=True)
    assert repr(layer) == "ResidualRNN(4, 5, num_layers=2, bidirectional=True)"
    assert isinstance(layer, nn.RNNBase) and layer.mode == "RESIDUAL_RNN"
    torch.manual_seed(1)
    expected = nn.RNN(4, 5, num_layers=2, bidirectional=True).state_dict()
    torch.manual_seed(1)
    found = fusedrnn.ResidualRNN(4, 5, num_layers=2, bidirectional=True).state_dict()
    assert list(found) == list(expected) and all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_state_dict_both_ways(name: str, options: dict[str, Any]) -> None:
    ours, theirs = pair(name, **options)
    for module in (ours, theirs):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
    expected = first(ours(input_of(ours)))
    other = pair(name, **options)[1]
    other.load_state_dict(ours.state_dict())
    assert_close("y", first(other(input_of(ours))), expected)
    ours.load_state_dict(theirs.state_dict())
    assert_close("y", first(ours(input_of(ours))), first(theirs(input_of(ours))))


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def saved(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved], ids=lambda f: f.__name__)
@pytest.mark.parametrize("cell", CELLS)
def test_copies(cell: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    single = [TWINS[cell].cell(5, 5).double()] if TWINS[cell].cell else []
    for module in (TWINS[cell].layer(5, 5, num_layers=2, dtype=torch.float64), *single):
        expected = first(module(input_of(module)))
        again = copied(module)
        assert type(again) is type(module) and repr(again) == repr(module)
        assert not {id(p) for p in again.parameters()} & {id(p) for p in module.parameters()}
        assert torch.equal(first(again(input_of(module))), expected)
        trained(again)
        assert torch.equal(first(module(input_of(module))), expected), "the copy shares a weight"


@pytest.mark.parametrize("name", LAYERS)
def test_old_pickles(name: str) -> None:
    """States as torch wrote them before proj_size and before names were kept, and those of torch.nn's own class."""
    ours, theirs = pair(name, num_layers=2)
    expected = first(theirs(input_of(theirs)))
    old = theirs.__getstate__()
    older = {
        key: value for key, value in old.items() if key not in ("proj_size", "_flat_weights", "_flat_weights_names")
    }
    older["_all_weights"] = [[getattr(theirs, key) for key in names] for names in theirs._all_weights]
    for state in (old, older):
        again = type(ours).__new__(type(ours))
        again.__setstate__(dict(state))
        assert again.proj_size == 0 and again._all_weights == theirs._all_weights
        assert_close("y", first(again(input_of(theirs))), expected)
        trained(pickled(again))


@pytest.mark.parametrize(
    "change", ["weight_norm", "weight_norm_old", "spectral_norm", "spectral_norm_old", "orthogonal"]
)
@pytest.mark.parametrize("name", BOTH)
def test_parametrized_weights(name: str, change: str) -> None:
    functions = {
        "weight_norm": parametrizations.weight_norm,
        "weight_norm_old": weight_norm,
        "spectral_norm": parametrizations.spectral_norm,
        "spectral_norm_old": spectral_norm,
        "orthogonal": parametrizations.orthogonal,
    }
    found = []
    for module in pair(name):
        torch.manual_seed(1)
        key = "weight_hh_l0" if name in LAYERS else "weight_hh"
        functions[change](module, key)
        values = trained(module)
        if "old" not in change:
            remove_parametrizations(module, key)
            values["removed"] = first(module(input_of(module))).detach()
        found.append(values)
    assert_same(*found)


@pytest.mark.parametrize("name", BOTH)
def test_pruned_weights(name: str) -> None:
    found = []
    for module in pair(name):
        key = "weight_ih_l0" if name in LAYERS else "weight_ih"
        prune.l1_unstructured(module, key, amount=0.5)
        values = trained(module)
        assert (getattr(module, key) == 0).sum() >= getattr(module, key).numel() // 2
        prune.remove(module, key)
        found.append(values | {"removed": first(module(input_of(module))).detach()})
    assert_same(*found)


@pytest.mark.parametrize("name", BOTH)
def test_weights_set_as_attributes(name: str) -> None:
    """As AWD-LSTM does: the Parameter moves aside and each forward sets a plain tensor computed from it."""
    key = "weight_hh_l0" if name in LAYERS else "weight_hh"

    class WeightDrop(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.input_size = inner, inner.input_size
            raw = getattr(inner, key)
            del inner._parameters[key]
            inner.register_parameter(key + "_raw", nn.Parameter(raw.detach()))

        def forward(self, x: Tensor) -> Any:
            setattr(self.inner, key, nn.functional.dropout(getattr(self.inner, key + "_raw"), 0.5, self.training))
            return self.inner(x)

    ours, theirs = pair(name)
    x = input_of(ours)
    assert_same(trained(WeightDrop(ours), x), trained(WeightDrop(theirs), x))


@pytest.mark.parametrize("cell", CELLS)
def test_weights_changed_by_other_paths(cell: str) -> None:
    """Each path ends in a forward that sees the new values: nothing about a weight may be cached."""
    module = TWINS[cell].layer(5, 5, dtype=torch.float64)
    x, seen = input_of(module), [first(module(input_of(module))).detach()]
    new = torch.randn_like(module.weight_hh_l0)

    def expect_change() -> None:
        seen.append(first(module(x)).detach())
        assert not torch.allclose(seen[-1], seen[-2])
        fresh = TWINS[cell].layer(5, 5, dtype=torch.float64)
        fresh.load_state_dict(module.state_dict())
        assert torch.equal(first(fresh(x)), seen[-1])

    with torch.no_grad():
        module.weight_hh_l0.copy_(new)
    expect_change()
    module.weight_hh_l0.data.mul_(0.5)  # no version counter moves
    expect_change()
    module.weight_hh_l0.data = new * 2
    expect_change()
    module.weight_hh_l0 = nn.Parameter(new * 3)
    expect_change()
    module._parameters["weight_hh_l0"] = nn.Parameter(new * 4)  # past __setattr__
    expect_change()
    module.load_state_dict({k: v * 0.5 for k, v in module.state_dict().items()}, assign=True)
    expect_change()
    torch.nn.utils.vector_to_parameters(
        torch.randn(sum(p.numel() for p in module.parameters())).double(), module.parameters()
    )
    expect_change()


@pytest.mark.parametrize("cell", CELLS)
def test_functional_call(cell: str) -> None:
    module = TWINS[cell].layer(5, 5, dtype=torch.float64)
    x, before = input_of(module), first(module(input_of(module)))
    target = {k: torch.randn_like(p).requires_grad_() for k, p in module.named_parameters()}
    y = first(functional_call(module, target, (x,)))
    fresh = TWINS[cell].layer(5, 5, dtype=torch.float64)
    fresh.load_state_dict({k: v.detach() for k, v in target.items()})
    assert torch.equal(y, first(fresh(x)))
    y.sum().backward()
    assert all(t.grad is not None for t in target.values()) and all(p.grad is None for p in module.parameters())
    assert torch.equal(first(module(x)), before)


@pytest.mark.parametrize("name", LAYERS)
def test_tied_weights(name: str) -> None:
    found = []
    for module in pair(name, num_layers=2):
        module.weight_hh_l1 = module.weight_hh_l0
        module.weight_ih_l1 = module.weight_ih_l0
        assert len(list(module.parameters())) == 6
        found.append(trained(module))
    assert_same(*found)


@pytest.mark.parametrize("cell", CELLS)
def test_frozen_parameters(cell: str) -> None:
    module = TWINS[cell].layer(5, 5, num_layers=2, dtype=torch.float64)
    module.weight_ih_l0.requires_grad_(False)
    module.bias_hh_l1.requires_grad_(False)
    first(module(input_of(module))).sum().backward()
    frozen = {name for name, p in module.named_parameters() if p.grad is None}
    assert frozen == {"weight_ih_l0", "bias_hh_l1"}
    free = TWINS[cell].layer(5, 5, num_layers=2, dtype=torch.float64)
    free.load_state_dict(module.state_dict())
    first(free(input_of(module))).sum().backward()
    for name, parameter in module.named_parameters():
        assert name in frozen or torch.equal(parameter.grad, free.get_parameter(name).grad)


@pytest.mark.parametrize("cell", CELLS)
def test_moving(cell: str) -> None:
    """.to() by assignment and by swap_tensors, to_empty, and modules born on the meta device."""
    case = Case(cell, num_layers=2, dtype=torch.float32)
    for swap in (False, True):
        torch.__future__.set_swap_module_params_on_conversion(swap)
        module = case.module()
        module.double()
        torch.__future__.set_swap_module_params_on_conversion(False)
        assert module(case.tensors()["x"].double())[0].dtype == torch.float64
        module.to(torch.bfloat16)
        assert module(case.tensors()["x"].bfloat16())[0].dtype == torch.bfloat16
    module = TWINS[cell].layer(4, 5, num_layers=2, device="meta")
    for assign in (False, True):
        filled = copy.deepcopy(module)
        filled = filled if assign else filled.to_empty(device="cpu")
        filled.load_state_dict(case.module().state_dict(), assign=assign)
        expected = run_ours(case)["y"]
        hx = tuple(case.tensors()[n] for n in STATES if n in case.tensors())
        assert torch.equal(filled(case.tensors()["x"], hx if len(hx) > 1 else hx[0])[0], expected)
    with torch.device("meta"):
        assert TWINS[cell].layer(4, 5).weight_hh_l0.is_meta
    default = TWINS[cell].layer(4, 5)
    assert default.weight_hh_l0.dtype == torch.get_default_dtype()
    default.share_memory()
    assert default.weight_hh_l0.is_shared() and default(case.tensors()["x"])[0].isfinite().all()


@pytest.fixture
def swapping() -> Iterator[None]:
    """Modules exchange what their Parameters hold, not the Parameters."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("swapping")
@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_swapped_tensors(name: str, converted: bool) -> None:
    """Of a module that has been used, by hand, by load_state_dict and by .to(). torch.nn's layers refuse the first two:
    they hold weak references to their weights.
    """
    module, theirs = pair(name, num_layers=2)
    if converted:
        module = theirs
        fusedrnn.convert(module)
    x, other, parameters = input_of(module), pair(name, num_layers=2)[0], list(module.parameters())
    for _ in range(2):  # the second time with kept weights
        with torch.no_grad():
            module(x)
    trained(module)
    torch.utils.swap_tensors(module.weight_hh_l0, nn.Parameter(other.weight_hh_l0 * 2))
    other.load_state_dict(module.state_dict())
    torch.nn.init.normal_(other.weight_ih_l1)
    module.load_state_dict(other.state_dict())
    assert_same(trained(module), trained(other))
    module.float()
    assert_same(trained(module, x.float()), trained(other.float(), x.float()))
    assert all(a is b is c for a, b, c in zip(module.parameters(), parameters, module._flat_weights, strict=True))
    if converted:
        fusedrnn.revert(module)
        assert_close("y", first(module(x.float())), first(other(x.float())))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell", "ResidualRNN"])
def test_pickles_find_their_classes(name: str) -> None:
    """Under the name of the module that older pickles hold, and under today's."""
    cls = getattr(fusedrnn, name)
    assert getattr(fusedrnn.modules, name) is cls
    assert pickle.loads(pickle.dumps(cls)) is cls
