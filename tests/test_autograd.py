"""The autograd protocol around a layer: hooks, anomaly mode, checkpointing, in-place changes, saved tensors, fakes.

Whatever torch.nn's module allows or refuses between forward and backward, ours allows or refuses; where torch.nn has
the cell, it stands beside ours as the expectation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from loops import SINGLES, TWINS, hx_of
from parity import Case, results, run_ours, twin
from tolerances import assert_all_close, assert_close
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fusedrnn.cells import CELLS


def first_state(last: Tensor | tuple[Tensor, ...]) -> Tensor:
    return last[0] if isinstance(last, tuple) else last


@pytest.mark.parametrize("cell", CELLS)
def test_weight_changed_in_place_between_forward_and_backward_raises(cell: str) -> None:
    for name in ("weight_ih_l0", "weight_hh_l0"):
        module, x = Case(cell).module(), Case(cell).tensors()["x"]
        y, _ = module(x)
        with torch.no_grad():
            getattr(module, name).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("cell", CELLS)
def test_input_or_state_changed_in_place_raises(cell: str) -> None:
    for name in ("x", "h0"):
        tensors = {key: t.detach() for key, t in Case(cell).tensors().items()}
        module = Case(cell).module()
        hx = hx_of(tensors)
        y, _ = module(tensors["x"], hx)
        tensors[name].mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("change", ["relu", "add", "one step", "dropout"])
@pytest.mark.parametrize("cell", CELLS)
def test_output_changed_in_place_raises(cell: str, change: str) -> None:
    """The output holds every h_t that backward needs, so writing into it raises; a wrong gradient must never come.

    torch.nn's fused layers (float32 LSTM on the CPU, all on CUDA) raise too; those it runs op by op do not.
    """
    changes = {
        "relu": torch.relu_,
        "add": lambda y: y.add_(1.0),
        "one step": lambda y: y[1].zero_(),
        "dropout": lambda y: nn.functional.dropout(y, 0.5, training=True, inplace=True),
    }
    for first in (False, True):
        case = Case(cell, T=4, B=3, batch_first=first)
        y, _ = case.module()(case.tensors()["x"])
        changes[change](y)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("cell", CELLS)
def test_final_states_changed_in_place(cell: str) -> None:
    """h_n and c_n are copies: resetting some rows of a carried state, in place, is harmless."""
    case = Case(cell, T=4, B=3, num_layers=2)
    module = case.module()

    def reset(call: Callable) -> Callable:
        def run(x, hx):
            y, last = call(x, hx)
            for state in last if isinstance(last, tuple) else (last,):
                state[:, 1] *= 0.0
            return y, last

        return run

    parameters = dict(module.named_parameters())
    expected = results(reset(twin(cell, module)), case.tensors(), parameters)
    assert_all_close(results(reset(module), case.tensors(), parameters), expected)


@pytest.mark.parametrize("cell", CELLS)
def test_backward_twice(cell: str) -> None:
    module, x = Case(cell).module(), Case(cell).tensors()["x"]
    y, _ = module(x)
    leaves = [x, *module.parameters()]
    once = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    again = torch.autograd.grad(y.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y.sum(), leaves)


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_accumulate(cell: str) -> None:
    module, x = Case(cell).module(), Case(cell).tensors()["x"].detach()
    module(x)[0].sum().backward()
    once = [p.grad.clone() for p in module.parameters()]
    module(x)[0].sum().backward()
    for parameter, gradient in zip(module.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)
    pointers = {p.grad.untyped_storage().data_ptr() for p in module.parameters()}
    assert len(pointers) == len(once), "gradients must not share memory: clipping scales each in place"


@pytest.mark.parametrize("cell", CELLS)
def test_hooks(cell: str) -> None:
    """Parameter hooks and module hooks are called, once, with what torch.nn hands them."""
    module, x = Case(cell).module(), Case(cell).tensors()["x"]
    calls = []
    module.register_forward_pre_hook(lambda m, args: calls.append("pre"))
    module.register_forward_hook(lambda m, args, out: calls.append("forward"))
    module.register_full_backward_pre_hook(lambda m, grads: calls.append("backward pre"))
    module.register_full_backward_hook(lambda m, gi, go: calls.append(("backward", gi[0].shape, go[0].shape)))
    module.weight_hh_l0.register_hook(lambda grad: calls.append("tensor") or grad * 2)
    module.weight_hh_l0.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    y, _ = module(x)
    y.sum().backward()
    assert sorted(map(str, calls)) == sorted(
        map(str, ["pre", "forward", "backward pre", ("backward", x.shape, y.shape), "tensor", "accumulated"])
    )
    plain = Case(cell).module()
    plain(x.detach())[0].sum().backward()
    torch.testing.assert_close(module.weight_hh_l0.grad, 2 * plain.weight_hh_l0.grad)


@pytest.mark.parametrize("cell", CELLS)
def test_anomaly_mode_names_the_nan(cell: str) -> None:
    module, x = Case(cell).module(), Case(cell).tensors()["x"]
    with torch.autograd.detect_anomaly(check_nan=True):
        y, _ = module(x)
        y.sum().backward()
        assert x.grad.isfinite().all()
        y, _ = module(x.detach())
        with pytest.raises(RuntimeError, match="returned nan values"):
            (y * float("nan")).sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_activation_checkpointing(cell: str, reentrant: bool) -> None:
    case = Case(cell, T=4, num_layers=2)
    module = case.module()
    module.dropout = 0.5
    found = []

    def run(x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        y, last = module(x, states if len(states) > 1 else states[0])
        return y, first_state(last)  # flat: reentrant checkpointing does not look into tuples

    for call in (run, partial(checkpoint, run, use_reentrant=reentrant)):
        torch.manual_seed(4)
        tensors, parameters = case.tensors(), dict(module.named_parameters())
        y, last = call(*tensors.values())
        module.zero_grad()
        (y.pow(2).sum() + last.sum()).backward()
        found.append({"y": y.detach(), "dx": tensors["x"].grad, **{k: p.grad.clone() for k, p in parameters.items()}})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("cell", CELLS)
def test_saved_tensors_go_through_hooks(cell: str) -> None:
    """Offloading of activations sees everything that is kept, and gives the same gradients."""
    case = Case(cell, T=4, num_layers=2)
    expected = run_ours(case)
    module, packed = case.module(), []

    def pack(t: Tensor) -> Tensor:
        packed.append(t.shape)
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        found = results(module, case.tensors(), dict(module.named_parameters()))
    assert packed and all(torch.equal(found[name], expected[name]) for name in expected)
    with torch.autograd.graph.save_on_cpu():
        found = results(module, case.tensors(), dict(module.named_parameters()))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_is_kept_without_a_graph(cell: str) -> None:
    module, x = Case(cell).module(), Case(cell).tensors()["x"]
    with torch.no_grad():
        assert module(x)[0].grad_fn is None
    y, last = module.requires_grad_(False)(x.detach())
    assert y.grad_fn is None and first_state(last).grad_fn is None


@pytest.mark.parametrize("cell", CELLS)
def test_strides_of_the_results(cell: str) -> None:
    """A batch_first output is the transposed view torch.nn returns; the rest is contiguous."""
    for first in (False, True):
        for options in ({}, {"num_layers": 2, "bidirectional": True}):
            case = Case(cell, T=4, B=3, batch_first=first, **options)
            module, x = case.module(), case.tensors()["x"]
            y, last = module(x)
            if TWINS[cell].torch_layer:
                expected, expected_last = twin(cell, module)(x)
                assert y.stride() == expected.stride()
                assert first_state(last).stride() == first_state(expected_last).stride()
            assert y.is_contiguous() != first and y.transpose(0, 1).is_contiguous() == first
            assert first_state(last).is_contiguous()


@pytest.mark.parametrize("cell", CELLS)
def test_meta_device(cell: str) -> None:
    for options in ({"num_layers": 2, "bidirectional": True}, {"batch_first": True}):
        case = Case(cell, T=4, B=3, dtype=torch.float32, **options)
        real, meta = case.module(), TWINS[cell].layer(4, 5, device="meta", **case.options())
        x = case.tensors()["x"].detach()
        y, last = real(x)
        found, found_last = meta(x.to("meta"))
        assert found.is_meta and found.shape == y.shape and found.stride() == y.stride() and found.dtype == y.dtype
        assert first_state(found_last).shape == first_state(last).shape
        found.sum().backward()
        assert all(p.grad.is_meta and p.grad.shape == p.shape for p in meta.parameters())


@pytest.mark.parametrize("cell", CELLS)
def test_fake_tensors(cell: str) -> None:
    """Shapes, strides and dtypes of fakes are those of the real run, forward and backward, also under no_grad."""
    for first, dtype in ((False, torch.bfloat16), (True, torch.float64)):
        case = Case(cell, T=4, B=3, num_layers=2, bidirectional=True, batch_first=first, dtype=dtype)
        module, tensors = case.module(), case.tensors()
        hx = hx_of(tensors)
        expected, expected_last = module(tensors["x"], hx)
        with FakeTensorMode() as mode:
            fake = {name: mode.from_tensor(t) for name, t in tensors.items()}
            copied = TWINS[cell].layer(4, 5, **case.options())
            hx = hx_of(fake)
            y, last = copied(fake["x"], hx)
            with torch.no_grad():
                again, _ = copied(fake["x"], hx)
            gradients = torch.autograd.grad(y.sum(), [*fake.values(), *copied.parameters()])
        for found in (y, again):
            assert (found.shape, found.stride(), found.dtype) == (expected.shape, expected.stride(), dtype)
        assert first_state(last).shape == first_state(expected_last).shape
        assert [g.shape for g in gradients] == [t.shape for t in (*tensors.values(), *module.parameters())]


@pytest.mark.parametrize("cell", CELLS)
def test_deterministic_mode(cell: str) -> None:
    case = Case(cell, T=4, B=3, num_layers=2)
    expected = run_ours(case)
    torch.use_deterministic_algorithms(True)
    found = run_ours(case)
    torch.use_deterministic_algorithms(False)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("cell", SINGLES)
def test_single_steps_in_a_long_loop(cell: str) -> None:
    """A cell called a thousand times over, its graph a thousand nodes deep, against the layer on the same weights."""
    single = TWINS[cell].cell(3, 4, dtype=torch.float64)
    layer = TWINS[cell].layer(3, 4, dtype=torch.float64)
    layer.load_state_dict({f"{name}_l0": t for name, t in single.state_dict().items()})
    x = torch.randn(1000, 2, 3, dtype=torch.float64)
    state, outputs = None, []
    for row in x:
        state = single(row, state)
        outputs.append(first_state(state))
    y = torch.stack(outputs)
    expected, _ = layer(x)
    assert_close("y", y, expected)
    y.pow(2).sum().backward()
    expected.pow(2).sum().backward()
    for name, parameter in single.named_parameters():
        assert_close(name, parameter.grad, getattr(layer, f"{name}_l0").grad)
