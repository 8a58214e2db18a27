"""convert and revert: the same objects before and after, everything attached goes on working, and an honest report."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from loops import TWINS
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

import fusedrnn
from fusedrnn.convert import ConversionReport

NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")


class Model(nn.Module):
    """Every class once, in places of several depths, one module shared by two names, weights tied."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.LSTM(6, 6, num_layers=2, bidirectional=True, dropout=0.1))
        self.layers = nn.ModuleDict({"rnn": nn.RNN(12, 6, nonlinearity="relu"), "gru": nn.GRU(6, 6, batch_first=True)})
        self.cells = nn.ModuleList([nn.RNNCell(6, 6), nn.LSTMCell(6, 6), nn.GRUCell(6, 6, bias=False)])
        self.again = self.layers["gru"]
        self.layers["gru"].weight_hh_l0 = self.cells[2].weight_hh

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)[0]
        x = self.again(self.layers["gru"](self.layers["rnn"](x)[0])[0])[0]
        h = self.cells[0](x[-1])
        h, _ = self.cells[1](h)
        return self.cells[2](h)


RECURRENT = ["encoder.1", "layers.rnn", "layers.gru", "cells.0", "cells.1", "cells.2"]


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(model.get_submodule(name)) for name in RECURRENT}


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> Tensor:
    for step in range(count):
        torch.manual_seed(step)
        loss = model(torch.randn(5, 3, 4, dtype=torch.float64)).pow(2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.detach()


def built() -> Model:
    torch.manual_seed(0)
    return Model().double()


def test_every_class_is_replaced_and_comes_back() -> None:
    model = built()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    before, state = classes(model), {k: v.clone() for k, v in model.state_dict().items()}
    text = repr(model)

    report = fusedrnn.convert(model)
    assert isinstance(report, ConversionReport)
    assert [entry.name for entry in report.replaced] == RECURRENT and report.left == []
    assert classes(model) == {name: getattr(fusedrnn, cls.__name__) for name, cls in before.items()}
    assert all(dict(model.named_modules())[name] is module for name, module in modules.items())
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in parameters.items())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert repr(model) == text and model.again is model.layers["gru"]

    report = fusedrnn.revert(model)
    assert [entry.name for entry in report.replaced] == RECURRENT and report.left == []
    assert classes(model) == before
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in parameters.items())


@pytest.mark.parametrize("name", NAMES)
def test_the_model_itself(name: str) -> None:
    module = getattr(nn, name)(4, 5)
    attributes = set(vars(module))
    x = torch.randn(3, 4)
    expected = module(x)
    report = fusedrnn.convert(module)
    assert type(module) is getattr(fusedrnn, name) and report.replaced[0].name == ""
    torch.testing.assert_close(module(x), expected)
    assert fusedrnn.revert(module).replaced and type(module) is getattr(nn, name)
    assert set(vars(module)) == attributes
    made = getattr(fusedrnn, name)(4, 5)
    assert fusedrnn.revert(made).replaced and set(vars(made)) == attributes


def test_training_goes_on() -> None:
    """The optimizer's state, made by torch.nn's modules, serves ours, and theirs again after revert."""
    curves = []
    for exchange in (False, True):
        model = built()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        losses = [steps(model, optimizer, 3)]
        if exchange:
            fusedrnn.convert(model)
        losses.append(steps(model, optimizer, 3))
        if exchange:
            fusedrnn.revert(model)
        losses.append(steps(model, optimizer, 3))
        curves.append(torch.stack(losses + [p.sum() for p in model.parameters()]).detach())
    assert_close("loss and weights", curves[1], curves[0])


def test_hooks_and_flags_stay() -> None:
    model, calls = built(), []
    lstm = model.encoder[1]
    lstm.register_forward_hook(lambda *_: calls.append("forward"))
    lstm.register_full_backward_hook(lambda *_: calls.append("backward"))
    lstm.weight_hh_l0.register_hook(lambda grad: calls.append("gradient"))
    lstm.weight_ih_l0.requires_grad_(False)
    model.eval()
    fusedrnn.convert(model)
    assert not lstm.training
    model(torch.randn(5, 3, 4, dtype=torch.float64)).sum().backward()
    assert sorted(calls) == ["backward", "forward", "gradient"]
    assert lstm.weight_ih_l0.grad is None


def test_a_second_call_changes_nothing() -> None:
    model = built()
    fusedrnn.convert(model)
    before = classes(model)
    again = fusedrnn.convert(model)
    assert again.replaced == again.left == [] and classes(model) == before
    fusedrnn.revert(model)
    again = fusedrnn.revert(model)
    assert again.replaced == again.left == []


def test_a_converted_model_is_copied_pickled_and_moved() -> None:
    model = built()
    fusedrnn.convert(model)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    expected = model.eval()(x)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert classes(again) == classes(model) and torch.equal(again(x), expected)
    assert model.float()(x.float()).dtype == torch.float32
    fresh = built()
    fresh.load_state_dict(model.double().state_dict())


class Mine(nn.LSTM):
    """Somebody's own."""

    def forward(self, input: Tensor, hx=None):
        return super().forward(2 * input, hx)


class Bare(nn.GRU):
    """A subclass that adds nothing is still somebody's class: isinstance(m, Bare) must stay true."""


def test_subclasses_are_left() -> None:
    model = nn.ModuleDict({"mine": Mine(4, 5), "bare": Bare(4, 5), "plain": nn.GRU(4, 5)})
    report = fusedrnn.convert(model)
    assert [entry.name for entry in report.replaced] == ["plain"]
    assert [entry.name for entry in report.left] == ["mine", "bare"]
    assert all("subclass" in entry.reason for entry in report.left)
    assert type(model["mine"]) is Mine and type(model["bare"]) is Bare


def test_a_forward_replaced_on_the_instance_is_left() -> None:
    """As dispatching and offloading libraries do: a class underneath would never be asked."""
    module = nn.GRU(4, 5)
    module.forward = lambda x, hx=None, old=module.forward: old(x, hx)
    (entry,) = fusedrnn.convert(module).left
    assert "forward" in entry.reason and type(module) is nn.GRU


def test_torchscript_modules_are_left() -> None:
    model = nn.Sequential()
    model.add_module("traced", torch.jit.trace(nn.GRU(4, 5), torch.zeros(3, 2, 4)))
    model.add_module("plain", nn.GRU(4, 5))
    report = fusedrnn.convert(model)
    assert [entry.name for entry in report.replaced] == ["plain"]
    assert [(entry.name, "TorchScript" in entry.reason) for entry in report.left] == [("traced", True)]
    model.traced(torch.zeros(3, 2, 4))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64], ids=str
)
def test_a_dtype_is_left_exactly_if_the_kernels_refuse_it(dtype: torch.dtype) -> None:
    module = nn.GRU(4, 5)
    for name, parameter in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(parameter.detach().to(dtype)))
    ours = fusedrnn.GRU(4, 5)
    for name, parameter in module.named_parameters():
        setattr(ours, name, parameter)
    report = fusedrnn.convert(module)
    if report.replaced:
        assert ours(torch.zeros(3, 2, 4, dtype=dtype))[0].dtype == dtype
    else:
        assert str(dtype) in report.left[0].reason
        with pytest.raises((TypeError, RuntimeError)):
            ours(torch.zeros(3, 2, 4, dtype=dtype))


def test_modules_on_the_meta_device_are_replaced_and_filled_later() -> None:
    model = nn.Sequential(nn.LSTM(4, 5, device="meta"))
    assert fusedrnn.convert(model).replaced
    filled = model.to_empty(device="cpu")
    filled.load_state_dict(nn.Sequential(nn.LSTM(4, 5)).state_dict())
    assert filled[0](torch.zeros(3, 2, 4))[0].isfinite().all()


def test_what_torch_nn_lacks_is_not_reverted() -> None:
    lacking = {name: twin.layer(4, 5) for name, twin in TWINS.items() if twin.torch_layer is None}
    model = nn.ModuleDict(
        {
            "paper": fusedrnn.GRU(4, 5, reset_after=False),
            "cell": fusedrnn.GRUCell(4, 5, reset_after=False),
            "gru": fusedrnn.GRU(4, 5),
            **lacking,
        }
    )
    assert fusedrnn.convert(model) == ConversionReport()
    report = fusedrnn.revert(model)
    assert [entry.name for entry in report.replaced] == ["gru"]
    assert [entry.name for entry in report.left] == ["paper", "cell", *lacking] and len(lacking) >= 2
    assert all(type(model[name]).__module__.startswith("fusedrnn.") for name in lacking)
    assert all("torch.nn has no such cell" in entry.reason for entry in report.left)
    assert type(model["paper"]) is fusedrnn.GRU and not model["paper"].fused_options.reset_after
    subclass = type("Mine", (fusedrnn.LSTM,), {"__doc__": "Somebody's own."})
    (entry,) = fusedrnn.revert(subclass(4, 5)).left
    assert "subclass" in entry.reason
    assert fusedrnn.convert(subclass(4, 5)) == ConversionReport()


@pytest.mark.parametrize(
    "change", [parametrizations.weight_norm, parametrizations.orthogonal], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("name", NAMES)
def test_parametrized_modules(name: str, change: Callable[[nn.Module, str], nn.Module]) -> None:
    """Converted under the parametrization, which can be removed later as if it had been registered on ours."""
    key = "weight_hh" if "Cell" in name else "weight_hh_l0"
    torch.manual_seed(0)
    module = change(getattr(nn, name)(5, 5, dtype=torch.float64), key)
    x = torch.randn(3, 5, dtype=torch.float64)
    parameters, expected = dict(module.named_parameters()), module(x)
    assert len(fusedrnn.convert(module).replaced) == 1
    assert isinstance(module, getattr(fusedrnn, name)) and is_parametrized(module, key)
    assert all(dict(module.named_parameters())[k] is p for k, p in parameters.items())
    torch.testing.assert_close(module(x), expected)
    assert fusedrnn.convert(module) == ConversionReport()
    other = change(getattr(nn, name)(5, 5), key)
    assert not isinstance(other, getattr(fusedrnn, name)), "the class of another module must not change with it"
    assert len(fusedrnn.revert(module).replaced) == 1
    assert not isinstance(module, getattr(fusedrnn, name)) and is_parametrized(module, key)
    fusedrnn.convert(module)
    remove_parametrizations(module, key)
    assert type(module) is getattr(fusedrnn, name)
    torch.testing.assert_close(module(x), expected)


def test_a_parametrized_subclass_is_left() -> None:
    (entry,) = fusedrnn.convert(parametrizations.weight_norm(Mine(4, 5), "weight_hh_l0")).left
    assert "subclass" in entry.reason and "Mine" in entry.class_name


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_weight_norm_by_hooks_and_pruning() -> None:
    model = nn.Sequential(weight_norm(nn.LSTM(4, 5), "weight_hh_l0"))
    prune.random_unstructured(model[0], "weight_ih_l0", amount=0.3)
    x = torch.randn(3, 2, 4)
    expected = model(x)
    assert fusedrnn.convert(model).replaced
    torch.testing.assert_close(model(x), expected)
    prune.remove(model[0], "weight_ih_l0")
    torch.testing.assert_close(model(x), expected)


def test_the_report_reads_well() -> None:
    model = nn.ModuleDict({"mine": Mine(4, 5), "plain": nn.LSTM(4, 5)})
    assert str(fusedrnn.convert(model)) == (
        "1 recurrent module replaced\n"
        "  plain: torch.nn.LSTM: now fusedrnn.LSTM\n"
        "1 recurrent module left alone\n"
        f"  mine: {__name__}.Mine: a subclass, whose code may be its own"
    )
    assert str(fusedrnn.convert(nn.Linear(2, 2))) == "0 recurrent modules replaced\n0 recurrent modules left alone"
    assert str(fusedrnn.convert(nn.GRU(2, 2))).splitlines()[1] == "  (the model itself): torch.nn.GRU: now fusedrnn.GRU"


@pytest.mark.parametrize("exchange", [fusedrnn.convert, fusedrnn.revert], ids=lambda f: f.__name__)
def test_bad_arguments(exchange: Callable) -> None:
    for bad in (None, "model", nn.LSTM, [nn.LSTM(4, 5)], torch.zeros(2)):
        with pytest.raises(TypeError, match=f"model must be a torch.nn.Module, got {type(bad).__name__}"):
            exchange(bad)
