"""What sequence modules and functions are told beyond torch.nn's: who hears it, where it changes nothing, what has no
meaning.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import pydoc
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedrnn
from fusedrnn import FusedOptions
from fusedrnn.functional import recurrent

ROOT = Path(__file__).parent.parent
T, B, I, H = 6, 4, 3, 5


def test_what_is_not_asked_for_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside training only zoneout is left: the short path of a plain module; limits of the backward pass are nothing
    to inference.
    """

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the long path")

    options = {"input_dropout": 0.1, "recurrent_dropout": 0.1, "weight_dropout": 0.1, "grad_clip": 1.0}
    module, x = fusedrnn.GRU(I, H, **options).eval(), torch.randn(T, B, I)
    expected = module(x)[0].detach()
    monkeypatch.setattr(fusedrnn.modules, "recurrent", refuse)
    with torch.no_grad():
        assert torch.equal(module(x)[0], expected)
        module.train()
        with pytest.raises(AssertionError, match="the long path"):
            module(x)


LAYERS, SINGLES = ("RNN", "LSTM", "GRU", "ResidualRNN"), ("RNNCell", "LSTMCell", "GRUCell")
# What ours might be called, and names that our code has used.
NAMES = [field.name for field in fields(FusedOptions)]
NAMES += ["step", "owner", "options", "cell", "lengths", "reset", "return_states", "kept", "noise"]
VALUES = {"number": lambda: 0.5, "nothing": lambda: None, "flag": lambda: True, "module": lambda: nn.Dropout(0.1)}


def computed(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Results in training, with gradients, in inference and, where there is a step, of a step."""
    found: list[Tensor] = []
    for grad, training in product((True, False), (True, False)):
        with torch.set_grad_enabled(grad):
            result = module.train(training)(x)
        parts = [result] if isinstance(result, Tensor) else [part for part in result if isinstance(part, Tensor)]
        found += parts
        if grad:
            found += torch.autograd.grad(parts[0].sum(), list(module.parameters()))
    if isinstance(module, tuple(getattr(fusedrnn, name) for name in LAYERS)):
        found += [fusedrnn.LSTM.step(module, x[0])[0] for _ in range(2)]
    return found


@pytest.mark.parametrize("patched", [False, True], ids=["ours", "patched"])
@pytest.mark.parametrize("name", [*LAYERS, *SINGLES])
def test_the_names_of_options_are_free(name: str, patched: bool) -> None:
    """In a subclass, for whatever it likes: the layer is the plain one."""
    if patched and name == "ResidualRNN":
        pytest.skip("torch.nn has none")
    base, x = getattr(nn if patched else fusedrnn, name), torch.randn(*((T, B) if name in LAYERS else (B,)), I)
    with fusedrnn.patch_torch() if patched else nullcontext():
        plain = base(I, H)
        expected = computed(plain, x)
        for own, (kind, value) in product(NAMES, VALUES.items()):

            def construct(self, own: str = own, value: Any = value) -> None:
                base.__init__(self, I, H)
                setattr(self, own, value())

            bodies = {
                "set": {"__init__": construct},
                "of the class": {own: value()},
                "a property": {own: property(lambda self, value=value: value())},
            }
            for where, body in bodies.items():
                module = type("Theirs", (base,), body)(*(() if where == "set" else (I, H)))
                module.load_state_dict(plain.state_dict())
                found = computed(module, x)
                assert len(found) == len(expected) and all(map(torch.equal, found, expected)), (own, kind, where)
                assert repr(module).startswith("Theirs(")
                # A method hides a submodule of its name, here as everywhere in torch.nn.
                assert type(getattr(module, own)) is type(value()) or (own, kind, where) == ("step", "module", "set")


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_torch_reads_no_mode_of_these(name: str) -> None:
    module, x = getattr(fusedrnn, name)(I, H), torch.randn(T, B, I)
    expected = computed(module, x)
    module.mode = nn.Identity()
    assert all(map(torch.equal, computed(module, x), expected))
    fusedrnn.init.forget_bias_(module)


def test_the_one_attribute() -> None:
    x = torch.randn(T, B, I)
    module = nn.LSTM(I, H)
    fusedrnn.convert(module)
    made = fusedrnn.LSTM.__new__(fusedrnn.LSTM)
    nn.LSTM.__init__(made, I, H)
    for each in (module, made, fusedrnn.LSTM(I, H)):
        assert each.fused_options == FusedOptions() and "fused_options" not in vars(each)
    module.fused_options = replace(module.fused_options, zoneout=[1.0, 1.0])
    assert not module(x)[0].any() and module.fused_options == FusedOptions(zoneout=(1.0, 1.0))
    assert list(module.state_dict()) == list(made.state_dict())
    module.fused_options = FusedOptions(recompute="gates")
    fusedrnn.revert(module)
    assert type(module) is nn.LSTM and "fused_options" not in vars(module)
    module.fused_options = "their own"  # of torch.nn's module, patched or not
    with fusedrnn.patch_torch():
        assert module(x)[0].any()


@pytest.mark.parametrize("name", [*LAYERS, *SINGLES])
def test_options_that_do_not_fit(name: str) -> None:
    """Told to the constructor, set, or of the class."""
    cls, x = getattr(fusedrnn, name), torch.randn(*((T, B) if name in LAYERS else (B,)), I)
    wrong: list[tuple[Any, type[Exception], str]] = [
        (value, TypeError, f"fused_options of Other must be a fusedrnn.FusedOptions, got {type(value).__name__}")
        for value in (None, 0.5, {"zoneout": 0.5})
    ]
    if not name.startswith("GRU"):
        text = "reset_after=False is for GRU and GRUCell, got it in the fused_options of Other"
        wrong.append((FusedOptions(reset_after=False), ValueError, text))
        with pytest.raises(TypeError, match="unexpected keyword argument 'reset_after'"):
            cls(I, H, reset_after=False)
    if name in SINGLES:
        wrong.append((FusedOptions(zoneout=0.5), ValueError, "Other makes single steps, without zoneout"))
        with pytest.raises(TypeError, match="unexpected keyword argument 'zoneout'"):
            cls(I, H, zoneout=0.5)
    elif name != "LSTM":
        text = "zoneout must be a probability: the cell has one state"
        wrong.append((FusedOptions(zoneout=(0.1, 0.2)), ValueError, text))
        with pytest.raises(ValueError, match=text):
            cls(I, H, zoneout=(0.1, 0.2))
    for value, error, text in wrong:
        module = type("Other", (cls,), {})(I, H)
        module.fused_options = value
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises(error, match=text):
                module(x)
        assert repr(module).startswith("Other(3, 5, ")
        with pytest.raises(error, match=text):
            type("Other", (cls,), {"fused_options": value})(I, H)(x)
    with pytest.raises(TypeError, match="reset_after should be of type bool, got: int"):
        FusedOptions(reset_after=0)


def test_a_compiled_module_sees_other_options() -> None:
    module, x = fusedrnn.LSTM(I, H), torch.randn(T, B, I)
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        assert compiled(x)[0].any()
        module.fused_options = FusedOptions(zoneout=1.0)
        assert not compiled(x)[0].any()
        module.fused_options = FusedOptions()
        torch.testing.assert_close(compiled(x)[0], module(x)[0])


def test_options_of_a_class() -> None:
    class Frozen(fusedrnn.LSTM):
        fused_options = FusedOptions(zoneout=1.0, bptt_steps=1)

    module, h0 = Frozen(I, H), torch.randn(1, B, H, requires_grad=True)
    assert repr(module) == "Frozen(3, 5, zoneout=1.0, bptt_steps=1)"
    y, _ = module(torch.randn(T, B, I), (h0, torch.zeros(1, B, H)))
    assert torch.equal(y, h0.expand(T, B, H))
    y[1:].sum().backward()
    assert h0.grad.count_nonzero() == 0
    assert Frozen(I, H, bptt_steps=2, recompute="gates").fused_options == FusedOptions(
        zoneout=1.0, bptt_steps=2, recompute="gates"
    )


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
    module = fusedrnn.LSTM(I, H, input_dropout=0.2, recurrent_dropout=0.3, zoneout=(0.1, 0.2), weight_dropout=0.25)
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
    with pytest.raises(ValueError, match=f"{name} must be a probability"):
        FusedOptions(**{name: value})


def test_zoneout_of_one_state_or_two() -> None:
    assert torch.is_tensor(fusedrnn.GRU(I, H, zoneout=(0.1,))(torch.randn(T, B, I))[0])
    with pytest.raises(ValueError, match="zoneout must be a probability: the cell has one state"):
        fusedrnn.GRU(I, H, zoneout=(0.1, 0.2))
    with pytest.raises(ValueError, match="zoneout must be a probability, or a pair of them"):
        fusedrnn.LSTM(I, H, zoneout=(0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match="input_dropout must be a probability"):
        recurrent("gru", torch.randn(T, B, I), None, list(fusedrnn.GRU(I, H).parameters()), input_dropout=2)


@pytest.mark.parametrize("name", LAYERS)
def test_help_names_every_option_and_argument(name: str) -> None:
    """With its default and what it means."""
    cls = getattr(fusedrnn, name)
    text = pydoc.plain(pydoc.render_doc(cls))
    for field in fields(FusedOptions):
        default = f'"{field.default}"' if isinstance(field.default, str) else field.default
        assert (f" {field.name}: {default}; " in text) == (name == "GRU" or field.name != "reset_after"), field.name
    forward = inspect.getdoc(cls.forward)
    for argument in list(inspect.signature(cls.forward).parameters)[1:]:
        assert f"\n    {argument}: " in forward, argument


def test_without_docstrings() -> None:
    code = (
        "import fusedrnn, torch; fusedrnn.LSTM(3, 4, zoneout=0.1)(torch.randn(2, 1, 3)); print(fusedrnn.LSTM.__doc__)"
    )
    run = subprocess.run([sys.executable, "-OO", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout == "None\n"
