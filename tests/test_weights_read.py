"""Weights are read as torch.nn reads them, by the short ways too: what stands in their place in the module, in its
class or in the way in which the class reads attributes counts from the next call on, whatever was called before.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tolerances import assert_all_close
from torch import Tensor, nn

import fusedrnn

I, H = 3, 5
LAYER, CELL = "weight_ih_l0", "weight_ih"


def name(module: nn.Module) -> str:
    return CELL if isinstance(module, nn.RNNCellBase) else LAYER


def doubled(module: nn.Module) -> Tensor:
    return 2 * module._parameters[name(module)].detach()


def of_class(**members: Any) -> Callable[[nn.Module], None]:
    """Gives the module a subclass of its class with these."""

    def change(module: nn.Module) -> None:
        module.__class__ = type("Own", (type(module),), members)

    return change


def a_property(module: nn.Module) -> None:
    of_class(**{name(module): property(doubled)})(module)


def added_to_the_class(module: nn.Module) -> None:
    setattr(type(module), name(module), property(doubled))


def by_getattr(self: nn.Module, attribute: str) -> Any:
    return doubled(self) if attribute == name(self) else nn.Module.__getattr__(self, attribute)


def by_getattribute(self: nn.Module, attribute: str) -> Any:
    return doubled(self) if attribute in (LAYER, CELL) else object.__getattribute__(self, attribute)


class Doubling(dict):
    """Parameters of a class of their own, as of a library that gathers them when they are asked for."""

    def __getitem__(self, key: str) -> Tensor:
        found = super().__getitem__(key)
        return 2 * found.detach() if key in (LAYER, CELL) else found


def another_dictionary(module: nn.Module) -> None:
    vars(module)["_parameters"] = Doubling(module._parameters)


def update(self: nn.RNNBase) -> None:
    nn.RNNBase._update_flat_weights(self)
    vars(self)["_flat_weights"] = [2 * w.detach() if n == LAYER else w for n, w in self.named_parameters()]


def initialize(self: nn.RNNBase) -> None:
    self._flat_weights = [doubled(self) if n == LAYER else getattr(self, n) for n in self._flat_weights_names]
    self._flat_weight_refs = [None] * len(self._flat_weights)


def doubled_list(self: nn.RNNBase) -> list[Tensor]:
    return [2 * w.detach() if n == LAYER else w for n, w in zip(self._flat_weights_names, vars(self)["_flat_weights"])]


BOTH: dict[str, Callable[[nn.Module], object]] = {
    "in the dictionary": lambda m: vars(m).update({name(m): doubled(m)}),
    "by object.__setattr__": lambda m: object.__setattr__(m, name(m), doubled(m)),
    "a property": a_property,
    "a property that the class gets later": added_to_the_class,
    "__getattr__": of_class(__getattr__=by_getattr),
    "__getattribute__": of_class(__getattribute__=by_getattribute),
    "another dictionary of parameters": another_dictionary,
}
LISTED: dict[str, Callable[[nn.Module], object]] = {
    "_update_flat_weights": of_class(_update_flat_weights=update),
    "_update_flat_weights of the module": lambda m: vars(m).update(_update_flat_weights=lambda: update(m)),
    "_weights_have_changed": of_class(_weights_have_changed=lambda self: True, _init_flat_weights=initialize),
    "a property for the list": of_class(
        _flat_weights=property(doubled_list, lambda self, value: vars(self).update(_flat_weights=value))
    ),
}
#: name, options, whether it steps, whether gradients are on.
PATHS = {
    "training": ("LSTM", {}, False, True),
    "inference": ("LSTM", {}, False, False),
    "a stack": ("GRU", {"num_layers": 2}, False, False),
    "step": ("LSTM", {}, True, False),
    "steps of a stack": ("GRU", {"num_layers": 2}, True, False),
    "a cell": ("LSTMCell", {}, False, False),
    "a cell in training": ("GRUCell", {}, False, True),
}


CASES = [
    (path, change, patched)
    for path, (kind, _, stepping, _) in PATHS.items()
    for change in ({} if kind.endswith("Cell") else LISTED) | BOTH
    for patched in ([False] if stepping else [False, True])
]


def flat(result: Any) -> list[Tensor]:
    """All tensors of a module's result."""
    return [result.detach()] if isinstance(result, Tensor) else [tensor for part in result for tensor in flat(part)]


def results(module: nn.Module, x: Tensor, stepping: bool) -> dict[str, Tensor]:
    """Those of a call, a step's output with a dimension of time."""
    tensors = flat(module.step(x[0]) if stepping else module(x))
    if stepping:
        tensors[0] = tensors[0].unsqueeze(0)
    return {str(i): tensor for i, tensor in enumerate(tensors)}


@pytest.mark.parametrize("called", [False, True], ids=["first", "after other calls"])
@pytest.mark.parametrize("path, change, patched", CASES)
def test_what_torch_would_read(path: str, change: str, patched: bool, called: bool) -> None:
    kind, options, stepping, gradients = PATHS[path]
    single, alter = kind.endswith("Cell"), {**BOTH, **LISTED}[change]
    x = torch.randn(2, I) if single else torch.randn(1, 2, I)

    def made(base: type[nn.Module]) -> nn.Module:
        return type("Fresh", (base,), {})(I, H, **options)  # a class of its own: changes of it stay here

    theirs, module = made(getattr(nn, kind)), made(getattr(nn if patched else fusedrnn, kind))
    module.load_state_dict(theirs.state_dict())
    before, after = [results(theirs, x, False)], []
    alter(theirs)
    after.append(results(theirs, x, False))
    assert not torch.allclose(before[0]["0"], after[0]["0"], atol=1e-3)
    with fusedrnn.patch_torch() if patched else nullcontext(), torch.set_grad_enabled(gradients):
        before += [results(module, x, stepping) for _ in range(3 * called)]
        alter(module)
        after += [results(module, x, stepping) for _ in range(3)]
    for found in (before, after):
        for each in found:
            assert_all_close(each, found[0])


LATE: dict[str, Callable[[nn.RNNCellBase], object]] = {
    "both": lambda m: (setattr(m, "bias_ih", given(m)), setattr(m, "bias_hh", given(m))),
    "one": lambda m: setattr(m, "bias_hh", given(m)),
    "no parameters": lambda m: vars(m).update(bias_ih=given(m).detach(), bias_hh=given(m).detach()),
}


def given(module: nn.Module) -> nn.Parameter:
    return nn.Parameter(torch.linspace(-1, 1, len(module.weight_ih)))


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("patched", [False, True], ids=["ours", "patched"])
@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_a_cell_has_the_biases_that_it_has(kind: str, late: str, patched: bool, gradients: bool) -> None:
    """Whatever it was made with: torch.nn's cells do not read their attribute ``bias``."""
    theirs, module = getattr(nn, kind)(I, H, bias=False), getattr(nn if patched else fusedrnn, kind)(I, H, bias=False)
    module.load_state_dict(theirs.state_dict())
    x, expected, found = torch.randn(2, I), [results(theirs, torch.ones(2, I), False)], []
    LATE[late](theirs)
    expected += [results(theirs, x, False)] * 2
    theirs.bias = True
    with fusedrnn.patch_torch() if patched else nullcontext(), torch.set_grad_enabled(gradients):
        found.append(results(module, torch.ones(2, I), False))
        LATE[late](module)
        found.append(results(module, x, False))
        module.bias = True
        found.append(results(module, x, False))
        if gradients and late == "both":
            (module(x)[0] if kind == "LSTMCell" else module(x)).sum().backward()
            assert module.bias_ih.grad is not None
    for a, b in zip(found, expected, strict=True):
        assert_all_close(a, b)


def refuse(*_: Any) -> None:
    raise ValueError("refused by the subclass")


CHECKS = ("check_input", "check_forward_args", "get_expected_hidden_size", "check_hidden_size")


@pytest.mark.parametrize("called", [0, 3])
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("whose", ["class", "module"])
@pytest.mark.parametrize("path", [path for path in PATHS if "cell" not in path])
def test_replaced_checks_are_asked(path: str, whose: str, check: str, called: int) -> None:
    kind, options, stepping, gradients = PATHS[path]
    module, x = getattr(fusedrnn, kind)(I, H, **options), torch.randn(1, 2, I)
    with torch.set_grad_enabled(gradients):
        for _ in range(called):
            results(module, x, stepping)
        if whose == "class":
            of_class(**{check: refuse})(module)
        else:
            setattr(module, check, refuse)
        h = torch.zeros(options.get("num_layers", 1), 2, H)
        for _ in range(2):
            with pytest.raises(ValueError, match="refused by the subclass"):
                hx = (h, h) if kind == "LSTM" else h
                module.step(x[0], hx) if stepping else module(x, hx)
            with pytest.raises(ValueError, match="refused by the subclass"):  # torch.nn checks its zeros, too
                results(module, x, stepping)


@pytest.mark.parametrize("path", [path for path in PATHS if "cell" not in path])
def test_another_permutation_of_states_is_refused(path: str) -> None:
    kind, options, stepping, gradients = PATHS[path]
    module = getattr(fusedrnn, kind)(I, H, **options)
    of_class(permute_hidden=lambda self, hx, permutation: hx)(module)
    with torch.set_grad_enabled(gradients), pytest.raises(NotImplementedError, match="permute_hidden would not"):
        results(module, torch.randn(1, 2, I), stepping)
