"""What our sequence modules and single steps share and torch.nn's do not have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.utils.hooks import RemovableHandle

from .cells import CELLS
from .inference import cache
from .layer.ops import refuse_older_exporter
from .options import HasOptions, text
from .torch_internals import symbolic_tracing


def _node(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Proxy | None:
    """The call as one node of a torch.fx graph, if it is traced: tracers know torch.nn's modules alone as leaves."""
    given = [*args, *kwargs.values()]
    for value in [*given, *(item for value in given if isinstance(value, (tuple, list)) for item in value)]:
        if isinstance(value, Proxy):
            return value.tracer.create_proxy("call_module", value.tracer.path_of_module(module), args, kwargs)
    return None


def as_states(states: Sequence[Tensor] | None, cell: str) -> Sequence[Tensor] | None:
    """The caller's hx, the right number of tensors. The one of a cell with one state comes here in a tuple.

    Raises:
        TypeError: no tensor, or no tuple of tensors. RuntimeError: too few tensors or too many.
    """
    count = len(CELLS[cell].states)
    if states is None:
        return None
    if not isinstance(states, (tuple, list)):
        got = "a tensor" if isinstance(states, Tensor) else type(states).__name__
        raise TypeError(f"hx of {cell} must be a tuple of {count} tensors, got {got}")
    if len(states) != count:
        number = {1: "one hidden state", 2: "two hidden states"}.get(count, f"{count} hidden states")
        raise RuntimeError(f"{cell} expects {number}, got {len(states)}")
    for index, state in enumerate(states):
        if not isinstance(state, Tensor):
            what = f"hx[{index}]" if count > 1 else "hx"
            raise TypeError(f"{what} of {cell} must be a tensor, got {type(state).__name__}")
    return states


def _module_of(function: Callable[..., Any]) -> str:
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__module__", None) or ""


class Called:
    """How our modules are called: one node in a torch.fx graph; an answer to TorchScript and the exporters by it."""

    _or_else = ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if symbolic_tracing() and (node := _node(self, args, kwargs)) is not None:
            return node  # with the hooks
        if torch.jit.is_tracing():  # here too: the arguments that the older exporter hands on do not fit forward's
            refuse_older_exporter(type(self).__name__)
        return torch.nn.Module.__call__(self, *args, **kwargs)

    def __prepare_scriptable__(self) -> torch.nn.Module:  # by torch.jit.script
        raise NotImplementedError(
            f"fusedrnn.{type(self).__name__} cannot be compiled by TorchScript: use torch.export.export{self._or_else}"
        )


class FusedModule(Called, HasOptions):
    """What our modules do not share with torch.nn's: packed weights for inference, and how they are called."""

    _or_else = ", or fusedrnn.revert(model), which makes torch.nn modules of fusedrnn's, before torch.jit.script"

    def register_forward_hook(self, hook: Callable[..., Any], **kwargs: Any) -> RemovableHandle:
        """As in torch.nn, but for the hooks that Opacus puts on modules of classes it does not know: they miss the
        gradients of states and fail in the backward pass. A subclass may have a forward without states; a call of it
        with more than one tensor, or a result that is more, raises.
        """
        if not _module_of(hook).startswith("opacus."):
            return super().register_forward_hook(hook, **kwargs)
        refusal = (
            "Opacus computes the gradients of each sample from the one input and the one output of a module, but"
            f" fusedrnn.{type(self).__name__} takes and returns states too: use a subclass whose forward(x) returns the"
            " output alone, the layers of opacus.layers, or torch.vmap(torch.func.grad(loss))"
        )
        if _module_of(type(self).forward).startswith("fusedrnn."):
            raise NotImplementedError(refusal)
        named_too = kwargs.pop("with_kwargs", False)

        def checked(module: torch.nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
            if len(args) != 1 or named or not isinstance(output, Tensor):
                raise NotImplementedError(refusal)
            return hook(module, args, named, output) if named_too else hook(module, args, output)

        return super().register_forward_hook(checked, **kwargs, with_kwargs=True)

    def _apply(self, *args: Any, **kwargs: Any) -> torch.nn.Module:  # by .to(), .double(), .share_memory() ...
        cache.forget(self)
        return super()._apply(*args, **kwargs)

    def train(self, mode: bool = True) -> torch.nn.Module:
        """As in torch.nn. Training frees what inference has kept."""
        if mode:
            cache.forget(self)
        return super().train(mode)

    def extra_repr(self) -> str:
        """As in torch.nn, and what differs from the defaults."""
        return super().extra_repr() + text(self)
