"""torch's own module samples and error cases for the six classes, run on ours with torch.nn's result expected.

They come from torch.testing._internal.common_modules, whose inputs change with torch: what torch tests, we test.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fusedrnn

pytest.importorskip("expecttest")  # torch.testing._internal needs it
from torch.testing._internal.common_modules import ModuleErrorEnum, ModuleInfo, module_db  # noqa: E402

NAMES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
INFOS: dict[str, ModuleInfo] = {
    info.module_cls.__name__: info for info in module_db if info.module_cls in [getattr(nn, name) for name in NAMES]
}
PACKED = {"with_packed_sequence": True}


def samples(name: str, dtype: torch.dtype, *, requires_grad: bool, training: bool, errors: bool = False) -> list[Any]:
    info = INFOS[name]
    make = info.module_error_inputs_func if errors else info.module_inputs_func
    options = PACKED if name in ("RNN", "GRU") and not errors else {}
    return list(make(info, "cpu", dtype, requires_grad, training, **options))


def pairs(name: str, dtype: torch.dtype, *, training: bool) -> Iterator[tuple[nn.Module, nn.Module, Any]]:
    """Ours, torch.nn's with the same values, and the forward input of each sample."""
    for sample in samples(name, dtype, requires_grad=True, training=training):
        arguments = sample.constructor_input
        theirs = getattr(nn, name)(*arguments.args, **arguments.kwargs, dtype=dtype).train(training)
        ours = getattr(fusedrnn, name)(*arguments.args, **arguments.kwargs, dtype=dtype).train(training)
        ours.load_state_dict(theirs.state_dict())
        yield ours, theirs, sample.forward_input


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def outputs_and_gradients(module: nn.Module, forward_input: Any) -> list[Tensor]:
    outputs = tensors_of(module(*forward_input.args, **forward_input.kwargs))
    leaves = [t for t in tensors_of((forward_input.args, forward_input.kwargs)) if t.requires_grad]
    leaves += list(module.parameters())
    weights = [torch.arange(1, t.numel() + 1).to(t).reshape(t.shape) / t.numel() for t in outputs]
    gradients = torch.autograd.grad(outputs, leaves, weights, allow_unused=True, materialize_grads=True)
    return [t.detach() for t in (*outputs, *gradients)]


def test_all_six_classes_are_there() -> None:
    assert sorted(INFOS) == sorted(NAMES)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_samples(name: str, dtype: torch.dtype, training: bool) -> None:
    count = 0
    for ours, theirs, forward_input in pairs(name, dtype, training=training):
        expected = outputs_and_gradients(theirs, forward_input)
        for found, wanted in zip(outputs_and_gradients(ours, forward_input), expected, strict=True):
            assert_close(f"sample {count}", found, wanted)
        count += 1
    assert count >= 2


@pytest.mark.parametrize("name", NAMES)
def test_samples_pickled_copied_and_moved(name: str) -> None:
    for ours, _, forward_input in pairs(name, torch.float32, training=True):
        expected = outputs_and_gradients(ours, forward_input)
        for again in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours), copy.deepcopy(ours).double().float()):
            for found, wanted in zip(outputs_and_gradients(again, forward_input), expected, strict=True):
                assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_samples_gradcheck(name: str) -> None:
    for ours, _, forward_input in pairs(name, torch.float64, training=True):
        flat, spec = pytree.tree_flatten((forward_input.args, forward_input.kwargs))
        where = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor) and leaf.requires_grad]

        def call(*leaves: Tensor, module=ours, flat=flat, spec=spec, where=where) -> tuple[Tensor, ...]:
            given = dict(zip(where, leaves, strict=True))
            args, kwargs = pytree.tree_unflatten([given.get(i, leaf) for i, leaf in enumerate(flat)], spec)
            return tuple(tensors_of(module(*args, **kwargs)))

        assert torch.autograd.gradcheck(call, [flat[i] for i in where], fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_error_cases(name: str, dtype: torch.dtype) -> None:
    cases = samples(name, dtype, requires_grad=False, training=True, errors=True)
    assert len(cases) >= 4
    for case in cases:
        check_error(getattr(fusedrnn, name), case)


def check_error(cls: Callable[..., nn.Module], case: Any) -> None:
    sample = case.module_error_input
    arguments, forward_input = sample.constructor_input, sample.forward_input
    if case.error_on == ModuleErrorEnum.CONSTRUCTION_ERROR:
        with pytest.raises(case.error_type, match=case.error_regex):
            cls(*arguments.args, **arguments.kwargs)
        return
    module = cls(*arguments.args, **arguments.kwargs)
    with pytest.raises(case.error_type, match=case.error_regex):
        module(*forward_input.args, **forward_input.kwargs)
