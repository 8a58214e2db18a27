"""What sequence modules and functions are told beyond torch.nn's: who hears it, where it changes nothing, what has no
meaning.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fusedrnn
from fusedrnn.functional import recurrent

T, B, I, H = 6, 4, 3, 5


def test_what_is_not_asked_for_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside training only zoneout is left: the short road of a plain module; limits of the backward pass are nothing
    to inference.
    """

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the long road")

    options = {"input_dropout": 0.1, "recurrent_dropout": 0.1, "weight_dropout": 0.1, "grad_clip": 1.0}
    module, x = fusedrnn.GRU(I, H, **options).eval(), torch.randn(T, B, I)
    expected = module(x)[0].detach()
    monkeypatch.setattr(fusedrnn.modules, "recurrent", refuse)
    with torch.no_grad():
        assert torch.equal(module(x)[0], expected)
        module.train()
        with pytest.raises(AssertionError, match="the long road"):
            module(x)


def test_attributes_of_a_class_count() -> None:
    class Frozen(fusedrnn.LSTM):
        zoneout = 1.0
        bptt_steps = 1

    module, h0 = Frozen(I, H), torch.randn(1, B, H, requires_grad=True)
    assert repr(module) == "Frozen(3, 5, zoneout=1.0, bptt_steps=1)"
    y, _ = module(torch.randn(T, B, I), (h0, torch.zeros(1, B, H)))
    assert torch.equal(y, h0.expand(T, B, H))
    y[1:].sum().backward()
    assert h0.grad.count_nonzero() == 0


def test_options_without_effect() -> None:
    for options in ({"zoneout": (0.0, 0.0)}, {"zoneout": 0}, {"grad_clip_mode": "norm"}):
        module = fusedrnn.LSTM(I, H, **options)
        assert repr(module) == "LSTM(3, 5)" and str(fusedrnn.revert(nn.Sequential(module))).startswith("1 recurrent")


def test_functions_take_the_options() -> None:
    x = torch.randn(T, B, I)
    for name, module in (("lstm", fusedrnn.LSTM(I, H)), ("gru", fusedrnn.GRU(I, H)), ("rnn", fusedrnn.RNN(I, H))):
        function, weights = getattr(fusedrnn.functional, name), list(module.parameters())
        y, last, states = function(x, None, weights, zoneout=1.0, return_states=True, grad_clip=1.0, recompute="gates")
        assert y.count_nonzero() == 0 and torch.equal(states[0][0], y)
        with pytest.raises(TypeError, match="unexpected keyword argument 'zone'"):
            function(x, None, weights, zone=1.0)


def test_modules_carry_their_rates() -> None:
    module = fusedrnn.LSTM(
        I, H, input_dropout=0.2, recurrent_dropout=0.3, zoneout=(0.1, 0.2), weight_dropout=0.25
    )
    text = "input_dropout=0.2, recurrent_dropout=0.3, zoneout=(0.1, 0.2), weight_dropout=0.25"
    assert repr(module) == f"LSTM(3, 5, {text})"
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(other) == repr(module)
    assert "dropout" not in repr(fusedrnn.GRU(I, H))
    assert list(module.state_dict()) == list(nn.LSTM(I, H).state_dict())


@pytest.mark.parametrize("option", [{"zoneout": 0.1}, {"weight_dropout": 0.1}, {"grad_clip": 1.0}, {"bptt_steps": 3}])
def test_torch_has_no_such_layer(option: dict[str, Any]) -> None:
    """revert() says so; recompute changes no number."""
    model = nn.Sequential(fusedrnn.LSTM(I, H, **option), fusedrnn.LSTM(I, H, recompute="gates"))
    report = fusedrnn.revert(model)
    assert type(model[0]) is fusedrnn.LSTM and type(model[1]) is nn.LSTM
    assert next(iter(option)) in report.left[0].reason


@pytest.mark.parametrize("name", ["input_dropout", "recurrent_dropout", "zoneout", "weight_dropout"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), True, "much", None])
def test_rates_are_probabilities(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a probability"):
        fusedrnn.LSTM(I, H, **{name: value})
    module = fusedrnn.LSTM(I, H)
    setattr(module, name, value)
    with pytest.raises(ValueError, match=f"{name} must be a probability"):
        module(torch.randn(T, B, I))


def test_zoneout_of_one_state_or_two() -> None:
    assert torch.is_tensor(fusedrnn.GRU(I, H, zoneout=(0.1,))(torch.randn(T, B, I))[0])
    with pytest.raises(ValueError, match="zoneout must be a probability: the cell has one state"):
        fusedrnn.GRU(I, H, zoneout=(0.1, 0.2))
    with pytest.raises(ValueError, match="zoneout must be a probability, or a pair of them"):
        fusedrnn.LSTM(I, H, zoneout=(0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match="input_dropout must be a probability"):
        recurrent("gru", torch.randn(T, B, I), None, list(fusedrnn.GRU(I, H).parameters()), input_dropout=2)
