"""``module.step``: a stream one step at a time gives what ``forward`` gives of the whole, whatever changes."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from loops import TWINS
from parity import DEVICE
from tolerances import assert_all_close
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.utils import parametrizations

import fusedrnn
from fusedrnn import FusedOptions
from fusedrnn.cells import CELLS
from fusedrnn.inference.cache import cached

T = 5


def prepared(module: nn.Module) -> bool:
    return module in cached and cached[module].step is not None


def stream(module: nn.Module, x: Tensor, state: Any = None) -> dict[str, Tensor]:
    """The outputs and last states of steps over x (T, B, I)."""
    outputs = []
    for x_t in x:
        y, state = module.step(x_t, state)
        outputs.append(y)
    states = state if isinstance(state, tuple) else (state,)
    return {"y": torch.stack(outputs), **{f"s{i}": s for i, s in enumerate(states)}}


def whole(module: nn.Module, x: Tensor, state: Any = None) -> dict[str, Tensor]:
    with torch.no_grad():
        y, last = module(x.transpose(0, 1) if module.batch_first else x, state)
    states = last if isinstance(last, tuple) else (last,)
    return {"y": y.transpose(0, 1) if module.batch_first else y, **{f"s{i}": s for i, s in enumerate(states)}}


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_steps_are_the_sequence(cell: str, dtype: torch.dtype) -> None:
    projections = (0, 3) if CELLS[cell].projectable else (0,)
    for layers, B, bias, proj in product((1, 3), (1, 4), (True, False), projections):
        options = {"proj_size": proj} if proj else {}
        module = TWINS[cell].layer(6, 9, num_layers=layers, bias=bias, dtype=dtype, **options).to(DEVICE)
        x = torch.randn(T, B, 6).to(DEVICE, dtype)
        shapes = [(layers, B, proj or 9), *[(layers, B, 9)] * CELLS[cell].beside]
        given = tuple(torch.randn(shape).to(DEVICE, dtype) for shape in shapes)
        for state in (None, given if len(given) > 1 else given[0]):
            assert_all_close(stream(module, x, state), whole(module, x, state), dtype)
        assert prepared(module) == (DEVICE.type == "cpu" and dtype != torch.float16 and CELLS[cell].beside < 2)


def test_large_layers_on_two_threads(threads: Callable[[int], None]) -> None:
    threads(2)
    module, x = fusedrnn.LSTM(300, 700), torch.randn(T, 2, 300)
    assert_all_close(stream(module, x), whole(module, x))


def freed_and_filled(module: nn.Module) -> None:
    """As sharded data parallelism does between two uses."""
    storage, values = module.weight_hh_l0.untyped_storage(), module.weight_hh_l0.detach().clone()
    size = storage.size()
    storage.resize_(0)
    others = [torch.full((20, 5), torch.nan) for _ in range(20)]  # what lies in the old memory now
    storage.resize_(size)
    with torch.no_grad():
        module.weight_hh_l0.copy_(-values)
    del others


def set_(module: nn.Module) -> None:
    with torch.no_grad():
        module.weight_hh_l0.set_(torch.randn(20, 5))


def listed(module: nn.Module, i: int, weight: Tensor) -> None:
    module._flat_weights[i] = weight


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda m: m.weight_hh_l0.data.mul_(-1),
    "data": lambda m: setattr(m.weight_hh_l0, "data", torch.randn(20, 5)),
    "another parameter": lambda m: setattr(m, "weight_ih_l1", nn.Parameter(torch.randn(20, 5))),
    "load_state_dict": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
    "assigned": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}, assign=True),
    "parametrized": lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
    "swapped": lambda m: torch.utils.swap_tensors(m.bias_hh_l0, nn.Parameter(torch.ones(20))),
    "trained": lambda m: m.train(),
    "moved": lambda m: m.double().float(),
    "shared": lambda m: m.weight_hh_l0.share_memory_(),
    "model shared": lambda m: m.share_memory(),
    "freed and filled": freed_and_filled,
    "set_": set_,
    "larger, then as before": lambda m: m.weight_hh_l0.data.resize_(200, 5).resize_(20, 5).normal_(),
    "by the dictionary": lambda m: m._parameters.update(weight_hh_l0=nn.Parameter(torch.randn(20, 5))),
    "in the list": lambda m: listed(m, 1, torch.randn(20, 5)),
    "another list": lambda m: setattr(m, "_flat_weights", [w.detach() * 2 for w in m._flat_weights]),
    "no parameter": lambda m: (delattr(m, "weight_hh_l0"), setattr(m, "weight_hh_l0", torch.randn(20, 5))),
}
SAME = ("parametrized", "trained", "moved", "shared", "model shared")


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_weights_are_seen(change: str) -> None:
    module, x = fusedrnn.LSTM(4, 5, num_layers=2), torch.randn(T, 3, 4)
    assert_all_close(stream(module, x), whole(module, x))
    before = stream(module, x)["y"]
    CHANGES[change](module)
    assert_all_close(stream(module, x), whole(module, x))
    assert torch.allclose(before, stream(module, x)["y"]) == (change in SAME)
    twin = nn.LSTM(4, 5, num_layers=2)
    for i, weight in enumerate(module._flat_weights):  # by torch.nn's own way of reading them
        listed(twin, i, weight.detach())
    with torch.no_grad():
        assert_all_close(stream(module, x), {"y": twin(x)[0], **dict(zip(("s0", "s1"), twin(x)[1], strict=True))})


def test_changes_of_the_stream() -> None:
    """Another batch size, dtype or layout, each without a word."""
    module = fusedrnn.GRU(4, 5, num_layers=2)
    views = torch.randn(T, 4, 3).transpose(1, 2), torch.randn(T, 3, 8)[..., ::2]
    for x in (torch.randn(T, 3, 4), torch.randn(T, 1, 4), *views):
        state = torch.randn(x.size(1), 2, 5).transpose(0, 1)
        assert_all_close(stream(module, x, state), whole(module, x, state))
    module.double()
    x = torch.randn(T, 3, 4, dtype=torch.float64)
    assert_all_close(stream(module, x), whole(module, x))
    assert prepared(module) and not prepared(module.float())  # nothing of the old weights is held
    batch_first = fusedrnn.GRU(4, 5, batch_first=True).double()
    assert_all_close(stream(batch_first, x), whole(batch_first, x))


def test_results_share_no_memory_and_have_no_gradient() -> None:
    module, x = fusedrnn.LSTM(4, 5), torch.randn(T, 3, 4, requires_grad=True)
    for x_t in x:
        y, (h, c) = module.step(x_t)
        assert not (y.requires_grad or h.requires_grad or c.requires_grad)
        assert torch.equal(y, h[0]) and y.data_ptr() != h.data_ptr()
    state = torch.zeros(1, 3, 5), torch.zeros(1, 3, 5)
    module.step(x[0], state)
    assert not (state[0].any() or state[1].any())


def test_copies_and_pickles_hold_nothing() -> None:
    module, x = fusedrnn.LSTM(4, 5), torch.randn(T, 3, 4)
    stream(module, x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert not prepared(other)
        with torch.no_grad():
            other.weight_hh_l0.mul_(2)
        assert_all_close(stream(other, x), whole(other, x))
        assert not torch.equal(stream(other, x)["y"], stream(module, x)["y"])
    count = len(cached)
    del module
    assert len(cached) < count


def test_where_it_is_forward() -> None:
    module, x = fusedrnn.LSTM(4, 5, num_layers=2, dropout=0.5), torch.randn(T, 3, 4)
    torch.manual_seed(0)
    first, second = stream(module, x)["y"], stream(module, x)["y"]
    assert not torch.equal(first, second) and not prepared(module)
    module.eval()
    assert torch.equal(stream(module, x)["y"], stream(module, x)["y"]) and prepared(module)
    with torch.autocast("cpu", torch.bfloat16):
        assert module.step(x[0])[0].dtype == torch.bfloat16
    assert module.step(x[0])[0].dtype == torch.float32
    many = torch.randn(2, 3, 4)
    torch.testing.assert_close(
        torch.vmap(lambda x: module.step(x)[0])(many), torch.stack([module.step(one)[0] for one in many])
    )
    assert module.to("meta").step(x[0].to("meta"))[0].shape == (3, 5)


def test_errors() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="a bidirectional module needs the whole sequence"):
        fusedrnn.GRU(4, 5, bidirectional=True).step(x)
    module = fusedrnn.LSTM(4, 5)
    for _ in range(2):  # before and after the first step
        with pytest.raises(ValueError, match=r"step: Expected input to be 2D, \(B, I\), got 3D instead"):
            module.step(x.unsqueeze(0))
        with pytest.raises(RuntimeError, match="Expected 4, got 3|must be equal to input_size"):
            module.step(torch.randn(3, 3))
        with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(1, 3, 5\), got \[1, 2, 5\]"):
            module.step(x, (torch.zeros(1, 2, 5), torch.zeros(1, 3, 5)))
        with pytest.raises((RuntimeError, ValueError), match="dtype"):
            module.step(x.double())
        module.step(x)
    assert module.step(torch.randn(0, 4))[0].shape == (0, 5)


def test_what_a_step_was_prepared_for() -> None:
    """Another cell, by an attribute, or a hook: forward's numbers at once."""
    x, h = torch.randn(2, 3), torch.randn(1, 2, 5)
    for module, name, value in (
        (fusedrnn.GRU(3, 5), "fused_options", FusedOptions(reset_after=False)),
        (fusedrnn.RNN(3, 5), "mode", "RNN_RELU"),
        (fusedrnn.GRU(3, 5), "fused_options", FusedOptions(zoneout=0.5)),
    ):  # fmt: skip
        module.eval().step(x, h)
        setattr(module, name, value)
        for _ in range(2):
            torch.testing.assert_close(module.step(x, h)[0], module(x[None], h)[0][0])


class Doubled(fusedrnn.GRU):
    """A user's class, with a ``forward`` of its own."""

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        y, h_n = super().forward(input, hx)
        return 2 * y, h_n


def test_whoever_listens_to_forward_hears_a_step() -> None:
    """Hooks, the module's and everybody's, a subclass's ``forward``, and one that was replaced on the instance."""
    x, h, calls = torch.randn(2, 3), torch.randn(1, 2, 5), []
    hear = lambda *_: calls.append(1)  # noqa: E731
    for register in (
        lambda m: m.register_forward_hook(hear), lambda m: m.register_forward_pre_hook(hear),
        lambda m: nn.modules.module.register_module_forward_hook(hear),
        lambda m: nn.modules.module.register_module_forward_pre_hook(hear),
    ):  # fmt: skip
        module = fusedrnn.GRU(3, 5)
        module.step(x, h), module.step(x, h)
        assert prepared(module) and not calls
        handle = register(module)
        module.step(x, h), module.step(x, h)
        handle.remove()
        assert len(calls) == 2
        calls.clear()
    doubled, plain = Doubled(3, 5), fusedrnn.GRU(3, 5)
    plain.load_state_dict(doubled.state_dict())
    expected = 2 * plain.step(x, h)[0]
    for _ in range(3):
        torch.testing.assert_close(doubled.step(x, h)[0], expected)
    plain.forward = lambda input, hx=None: Doubled.forward(doubled, input, hx)
    for _ in range(2):
        torch.testing.assert_close(plain.step(x, h)[0], expected)


class Called(fusedrnn.GRU):
    """A user's class, with a ``__call__`` of its own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        y, h_n = fusedrnn.GRU.__call__(self, *args, **kwargs)
        return 2 * y, h_n


@pytest.mark.parametrize("stepped", [0, 3])
@pytest.mark.parametrize("what", ["a subclass", "of the class later", "_call_impl", "of torch.nn.Module"])
def test_a_call_that_was_replaced_is_a_steps_too(what: str, stepped: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, h = type("Own", (fusedrnn.GRU,), {})(3, 5), torch.randn(2, 3), torch.randn(1, 2, 5)
    expected = 2 * module(x[None], h)[0][0]
    for _ in range(stepped):
        torch.testing.assert_close(2 * module.step(x, h)[0], expected)
    if what == "a subclass":
        module.__class__ = Called
    elif what == "of the class later":
        type(module).__call__ = Called.__call__
    elif what == "_call_impl":
        module._call_impl = lambda *args: (2 * fusedrnn.GRU.forward(module, *args)[0], h)
    else:
        call = nn.Module.__call__
        monkeypatch.setattr(nn.Module, "__call__", lambda *args: (2 * call(*args)[0], h))
    for _ in range(2):
        torch.testing.assert_close(module.step(x, h)[0], expected)


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_half_a_state_is_forwards_to_refuse(kind: str) -> None:
    module, x, h = getattr(fusedrnn, kind)(3, 5), torch.randn(2, 3), torch.randn(1, 2, 5)
    for hx in [(h, None), (None, h), (None, None), (h,), ()]:
        with pytest.raises((TypeError, RuntimeError, AttributeError)) as error:
            module(x[None], hx)
        for _ in range(2):
            with pytest.raises(error.type) as found:
                module.step(x, hx)
            assert str(found.value) == str(error.value)
            module.step(x)


SIZES = ({"num_layers": 1}, {"hidden_size": 6}, {"input_size": 4}, {"proj_size": 2})


@pytest.mark.parametrize("change", SIZES, ids=str)
def test_sizes_that_were_changed_are_forwards_to_refuse(change: dict[str, int]) -> None:
    module, x, h = fusedrnn.LSTM(3, 5, num_layers=2), torch.randn(2, 3), torch.randn(2, 2, 5)
    module.step(x, (h, h)), module.step(x, (h, h))
    vars(module).update(change)
    with pytest.raises((RuntimeError, ValueError)) as error:
        module(x[None], (h, h))
    for _ in range(2):
        with pytest.raises(error.type) as found:
            module.step(x, (h, h))
        assert str(found.value) == str(error.value)


@pytest.mark.parametrize("layers", [1, 2])
def test_states_that_do_not_fit_are_forwards_to_word(layers: int) -> None:
    module, x = fusedrnn.LSTM(3, 5, num_layers=layers), torch.randn(2, 3)
    h = torch.zeros(layers, 2, 5)
    for _ in range(2):
        with pytest.raises(TypeError, match="hx of lstm must be a tuple"):
            module.step(x, torch.zeros(2, layers, 2, 5))
        with pytest.raises(RuntimeError, match="lstm expects two hidden states"):
            module.step(x, (h, h, h))
        with pytest.raises(TypeError, match="step: Expected input to be a tensor, got list"):
            module.step([1.0], (h, h))
        module.step(x, (h, h))
        assert torch.equal(module.step(x, [h, h])[0], module.step(x, (h, h))[0])


class Scaled(Tensor):
    """Counts double in the functions of a layer."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def plain(value: Any) -> Any:
            if isinstance(value, Scaled):
                with torch._C.DisableTorchFunctionSubclass():
                    return value.as_subclass(Tensor) * 2
            return type(value)(map(plain, value)) if isinstance(value, (list, tuple)) else value

        if "layer_forward" in getattr(function, "__name__", ""):
            return function(*plain(args))
        return super().__torch_function__(function, types, args, kwargs or {})


def test_torch_function_of_weights_and_inputs_is_asked() -> None:
    """As by forward: of a weight of a user's class, of the input, of a mode."""
    module, x = fusedrnn.GRU(3, 5), torch.randn(2, 3)
    module.step(x), module.step(x)
    module.weight_ih_l0 = nn.Parameter(module.weight_ih_l0.detach().as_subclass(Scaled))
    expected = module(x[None])[0][0]
    for _ in range(3):
        torch.testing.assert_close(module.step(x)[0].as_subclass(Tensor), expected.as_subclass(Tensor))
    module = fusedrnn.GRU(3, 5)
    for _ in range(3):
        assert type(module.step(x.as_subclass(type("Named", (Tensor,), {})))[0]).__name__ == "Named"

    class Heard(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            heard.append(getattr(function, "__name__", ""))
            return function(*args, **(kwargs or {}))

    module.step(x), module.step(x)
    for _ in range(2):
        heard: list[str] = []
        with Heard():
            module.step(x)
        assert any("layer_forward" in name for name in heard)


def test_a_compiled_step() -> None:
    module, x, h = fusedrnn.GRU(3, 5), torch.randn(2, 3), torch.randn(1, 2, 5)
    expected = module.step(x, h)
    compiled = torch.compile(lambda x, h: module.step(x, h), fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(allow_rnn=True):
        for _ in range(2):
            torch.testing.assert_close(compiled(x, h), expected)


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"dtype": torch.float16}, {"num_layers": 2}], ids=str)
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_results_are_no_views(name: str, options: dict[str, Any]) -> None:
    """Of the first step, which goes by forward, as of the next: what torch.nn's cells give can be detached in place."""
    x = torch.randn(2, 3, dtype=options.get("dtype"))
    for grad in (True, False):
        module = getattr(fusedrnn, name)(3, 5, **options)
        with torch.set_grad_enabled(grad):
            for _ in range(3):
                y, last = module.step(x)
                for t in (y, *(last if name == "LSTM" else (last,))):
                    t.detach_()
                    assert not t._is_view()
                assert y.shape == (2, 5)


def test_under_a_mode_that_changes_tensors() -> None:
    """Nothing is prepared there, and nothing refused."""
    module, x = fusedrnn.LSTM(3, 5), torch.randn(2, 3)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for _ in range(3):
            y, _ = module.step(x)
            assert isinstance(y, FakeTensor) and y.shape == (2, 5)
    assert not prepared(module)
