"""What sequence modules and single steps share: the call of the kernels for a plain batch, the packed weights that
inference keeps, and what our classes are beside torch.nn's.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import has_torch_function
from torch.utils.hooks import RemovableHandle

from ._C import infer, packed_weights
from .autograd import in_place, recurrent_layer
from .cells import CELLS
from .dropout import kept_parts
from .layer_call import PLAIN, LayerCall, Options, Owner
from .ops import refuse_older_exporter
from .options import HasOptions, text
from .torch_internals import dual_level, symbolic_tracing

__all__ = ["FusedModule", "as_states", "dense", "infers", "is_plain", "kept_aside", "steppers"]

#: The packed weights of modules that have been used for inference, until they train. Not in the modules: using one
#: changes neither its pickle nor its state.
kept_aside: weakref.WeakKeyDictionary[torch.nn.Module, Any] = weakref.WeakKeyDictionary()
#: What :mod:`fusedrnn.streaming` has prepared for the next step of modules; likewise.
steppers: weakref.WeakKeyDictionary[torch.nn.Module, Any] = weakref.WeakKeyDictionary()


_BATCH_FIRST = Options(batch_first=True)


def infers() -> bool:
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling())


def dense(
    module: torch.nn.Module,
    cell: str,
    bidirectional: bool,
    num_layers: int,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    zoneout: float | Sequence[float] = 0.0,
) -> tuple[Tensor, ...] | None:
    """A dense batch through one layer or, in inference, through several: y and the final states. None: by the long
    road.

    x is (T, B, I), y as the module has it, batch_first or not. Of a cell, x is (B, I), without the time, and so are the
    states and results. ``zoneout``: in inference alone. What the kernel refuses goes by the long road too, which words
    the error.
    """
    try:
        return _dense(module, cell, bidirectional, num_layers, x, h0, c0, weights, zoneout)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError):
        return None


def _dense(
    module: torch.nn.Module,
    cell: str,
    bidirectional: bool,
    num_layers: int,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    zoneout: float | Sequence[float],
) -> tuple[Tensor, ...] | None:
    if infers():
        parts = kept_parts(zoneout, len(CELLS[cell].states))
        result = infer(x, h0, c0, weights, cell, bidirectional, num_layers, _kept(module), parts)
        if result is not None and x.dim() == 3 and module.batch_first:
            result[0].transpose_(0, 1)
        if result is not None:
            return result[: 1 + len(CELLS[cell].states)]
        if any(parts):
            return None
    elif kept_aside and not isinstance(module, FusedModule):
        kept_aside.pop(module, None)
    if num_layers > 1:
        return None
    states = (h0, c0)[: len(CELLS[cell].states)]
    if x.dim() == 3:
        options, owner = _BATCH_FIRST if module.batch_first else PLAIN, Owner(weakref.ref(module))
        found = recurrent_layer(LayerCall(cell, x, states, weights, bidirectional, options=options, owner=owner))
        return found.y, *found.finals
    states = [None if s is None else s.unsqueeze(0) for s in states]
    finals = recurrent_layer(LayerCall(cell, x.unsqueeze(0), states, weights, bidirectional)).finals
    finals = [in_place(Tensor.squeeze_, Tensor.squeeze, s, 0) for s in finals]
    return finals[0], *finals


def is_plain(
    input: Tensor | PackedSequence, dim: int, states: Sequence[Tensor] | None, weights: Sequence[Tensor], cell: str
) -> bool:
    """Whether input is a tensor of this rank, and hx, if given, a tuple of as many tensors as the cell has states;
    whether no cast and no forward-mode derivative is wanted, and no one overrides what torch's functions do.
    """
    return (
        type(input) is Tensor
        and input.dim() == dim
        and not torch.is_autocast_enabled("cuda" if input.is_cuda else "cpu")
        and (
            states is None
            or (type(states) is tuple and [type(state) for state in states] == [Tensor] * len(CELLS[cell].states))
        )
        and dual_level() < 0
        and not has_torch_function(weights)
    )


def _node(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Proxy | None:
    """The call as one node of a torch.fx graph, if it is traced: tracers know torch.nn's modules alone as leaves."""
    given = [*args, *kwargs.values()]
    for value in [*given, *(item for value in given if isinstance(value, (tuple, list)) for item in value)]:
        if isinstance(value, Proxy):
            return value.tracer.create_proxy("call_module", value.tracer.path_of_module(module), args, kwargs)
    return None


def as_states(states: Sequence[Tensor] | None, cell: str) -> Sequence[Tensor] | None:
    """The caller's hx, the right number of tensors."""
    count = len(CELLS[cell].states)
    if states is None:
        return None
    if isinstance(states, Tensor):
        raise TypeError(f"hx of {cell} must be a tuple of {count} tensors, got a tensor")
    if len(states) != count:
        raise RuntimeError(f"{cell} expects {'two hidden states' if count == 2 else 'one hidden state'}")
    return states


def _kept(module: torch.nn.Module) -> Any:
    """The packed weights of a module, from call to call: a capsule of C++."""
    return kept_aside.get(module) or kept_aside.setdefault(module, packed_weights())


def _module_of(function: Callable[..., Any]) -> str:
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "__module__", None) or ""


class FusedModule(HasOptions):
    """What our modules do not share with torch.nn's: packed weights for inference, and an answer to TorchScript."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if symbolic_tracing() and (node := _node(self, args, kwargs)) is not None:
            return node  # with the hooks
        if torch.jit.is_tracing():  # here too: the arguments that the older exporter hands on do not fit forward's
            refuse_older_exporter(type(self).__name__)
        return torch.nn.Module.__call__(self, *args, **kwargs)

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
        kept_aside.pop(self, None)
        steppers.pop(self, None)
        return super()._apply(*args, **kwargs)

    def train(self, mode: bool = True) -> torch.nn.Module:
        """As in torch.nn. Training frees what inference has kept."""
        if mode:
            kept_aside.pop(self, None)
        return super().train(mode)

    def extra_repr(self) -> str:
        """As in torch.nn, and what differs from the defaults."""
        return super().extra_repr() + text(self)

    def __prepare_scriptable__(self) -> torch.nn.Module:  # by torch.jit.script
        raise NotImplementedError(
            f"fusedrnn.{type(self).__name__} cannot be compiled by TorchScript: use torch.export.export, or"
            " fusedrnn.revert(model), which makes torch.nn modules of fusedrnn's, before torch.jit.script"
        )
