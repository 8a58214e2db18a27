"""Every private name of torch that the package uses: asked for here and nowhere else.

A torch that lacks one of them costs speed or a convenience, as each function says; no plain call of a layer, forward or
backward, depends on one (a test takes them away one at a time). What a new torch renames is mended in this file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.fx import _symbolic_trace
from torch.nn.modules import module as _module

from ._C import kept_parameters

_functorch = getattr(torch._C, "_functorch", None)
_eval_frame = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)

#: What torch.nn calls by this name. Without it: patched modules cannot be compiled by TorchScript.
VF = getattr(torch, "_VF", None)

#: The op of torch.nn.utils.rnn.pack_padded_sequence. Without the name: none, and packed models do not become ONNX.
PACKING_OPS = [op.default for op in [getattr(torch.ops.aten, "_pack_padded_sequence", None)] if op is not None]

_graph_task = getattr(torch._C, "_current_graph_task_id", None)
_is_fx_symbolic_tracing = getattr(_symbolic_trace, "is_fx_symbolic_tracing", None)
_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", None)
_interpreter_stack = getattr(_functorch, "get_interpreter_stack", None)
_global_hooks = getattr(_module, "_global_forward_hooks", True)
_global_pre_hooks = getattr(_module, "_global_forward_pre_hooks", True)
_functionalize = getattr(getattr(_functorch, "TransformType", None), "Functionalize", None)
_is_legacy_batched = getattr(_functorch, "is_legacy_batchedtensor", None)


def symbolic_tracing() -> bool:
    """Whether torch.fx.symbolic_trace is at work. Without the name: never, and it refuses our modules."""
    return _is_fx_symbolic_tracing is not None and _is_fx_symbolic_tracing()


def transformed() -> bool:
    """Whether a transform of torch.func is at work, vmap or another. Without the name: always outside torch.compile,
    which takes every layer by the longer ways that transforms need.
    """
    return _transforms_active() if _transforms_active is not None else not is_compiling()


def tracked(t: Tensor) -> bool:
    """Whether a transform of torch.func differentiates by this tensor, in either mode."""
    return torch._C._functorch.is_gradtrackingtensor(t)


def functionalizing() -> bool:
    """Whether torch.func.functionalize is among the transforms. Without the names: never, and it refuses layers."""
    if _interpreter_stack is None or _functionalize is None:
        return False
    return any(level.key() == _functionalize for level in _interpreter_stack() or ())


def dual_level() -> int:
    """The nesting of forward-mode AD, below 0: none. Without the name: 0, which has tensors asked for tangents."""
    return getattr(forward_ad, "_current_level", 0)


def exporting() -> bool:
    """Whether torch.export traces. Without the name: what torch.compiler.is_exporting says, which Dynamo of torch 2.11
    takes to be always true.
    """
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag


def whole(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, traced where Dynamo compiles the caller, and left whole to Python where it leaves the caller
    to Python, as it does recurrent modules (torch._dynamo.config.allow_rnn): it would begin anew at each function
    inside, without the gradients of a gradient. Without the names of torch it does.
    """
    if not is_compiling() and _eval_frame_callback():
        return _untraced(function)(*args)
    return function(*args)


_eval_frame_callback = getattr(_eval_frame, "get_eval_frame_callback", bool)  # None or False: Dynamo is not at work
_untraced = functools.cache(torch.compiler.disable)  # not made at import: that loads Dynamo, which takes a second
if hasattr(_eval_frame, "set_code_exec_strategy") and hasattr(_eval_frame, "_FrameExecStrategy"):
    # Dynamo begins no graph at this very function.
    _eval_frame.set_code_exec_strategy(
        whole.__code__, _eval_frame._FrameExecStrategy(_eval_frame._FrameAction.SKIP, _eval_frame._FrameAction.DEFAULT)
    )


def backward_pass() -> int:
    """A number of the backward pass that this thread works for. Without the name: -1, and a second pass counts as
    another call in the first.
    """
    return -1 if _graph_task is None else _graph_task()


def batched_by_autograd(t: Tensor) -> bool:
    """Whether autograd maps over t (``is_grads_batched``). Without the name: never, and such calls raise."""
    return _is_legacy_batched is not None and _is_legacy_batched(t)


def below_autograd() -> Any:
    """A context in which ops are not seen by autograd."""
    return torch._C._AutoDispatchBelowAutograd()


def batching_level() -> int:
    """The level at which autograd's map over gradients works."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    return level


def remove_batch_dim(t: Tensor, level: int) -> Tensor:
    """A tensor that autograd has batched, with the mapped dimension in front."""
    return torch._remove_batch_dim(t, level, 1, 0)


def add_batch_dim(t: Tensor, level: int) -> Tensor:
    """The inverse."""
    return torch._add_batch_dim(t, 0, level)


#: What reading a weight runs in torch.nn, by its name in the module's class. None: the class may have none.
_READS = (("__getattribute__", object.__getattribute__), ("__getattr__", nn.Module.__getattr__), ("_parameters", None))
_READS_LISTED = (
    *_READS,
    ("_update_flat_weights", getattr(nn.RNNBase, "_update_flat_weights", None)),
    ("_weights_have_changed", getattr(nn.RNNBase, "_weights_have_changed", None)),
    ("_flat_weights", None),
    ("_flat_weights_names", None),
)
_call = nn.Module.__call__


#: Methods by which torch.nn's ``forward`` checks what it is given.
_CHECKS = (
    "check_forward_args", "check_hidden_size", "check_input", "get_expected_cell_size", "get_expected_hidden_size",
    "permute_hidden",
)  # fmt: skip


_LSTM = nn.LSTM  # people give the name to our class
_RUNS = {cls: (*_READS_LISTED, *((name, getattr(cls, name, None)) for name in _CHECKS)) for cls in (_LSTM, nn.RNNBase)}
#: What a call of a module runs besides, likewise.
CALLS = (
    ("_call_impl", getattr(nn.Module, "_call_impl", None)),
    ("_wrapped_call_impl", getattr(nn.Module, "_wrapped_call_impl", None)),
)


def own_checks(module: nn.Module, base: type[nn.Module]) -> list[str]:
    """The names of :data:`_CHECKS` by which the module or its class has another method than ``base``, of torch.nn."""
    cls, own = type(module), module.__dict__  # Dynamo of torch 2.15 fails at vars() of what it left to Python
    if cls is base:
        return [name for name in _CHECKS if name in own]
    return [name for name in _CHECKS if name in own or getattr(cls, name, None) is not getattr(base, name, None)]


def runs(module: nn.RNNBase) -> tuple[tuple[str, Any], ...]:
    """What torch.nn's ``forward`` of the module runs besides the computation, by name: what reads weights, what checks.
    None: the class may have nothing of this name.
    """
    return _RUNS[_LSTM if isinstance(module, _LSTM) else nn.RNNBase]


def kept_weights(module: nn.RNNBase, as_torch: tuple[tuple[str, Any], ...]) -> list[Tensor] | None:
    """The weights of a sequence module, in the order in which kernels take them, if :func:`flat_weights` would give the
    parameters themselves: none is computed, replaced in the module or its class, or read in another way than torch.nn's
    (``as_torch``). None: it may not, or torch lacks a name.
    """
    own = vars(module)
    names, listed = own.get("_flat_weights_names"), own.get("_flat_weights")
    return None if listed is None else kept_parameters(module, names, as_torch, listed)


def usual_weights(module: nn.RNNBase) -> list[Tensor] | None:
    """:func:`kept_weights` of a module whose ``forward`` runs what torch.nn's does."""
    return kept_weights(module, runs(module))


def usual_weights_of_cell(module: nn.RNNCellBase, of_units: bool = False) -> list[Tensor] | None:
    """The same of a cell, whose weights torch.nn reads as attributes, whether or not it was made with biases.
    ``of_units``: the last is weight_unit.
    """
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", *(("weight_unit",) if of_units else ()))
    found = kept_parameters(module, names, _READS)
    if found is None or found[0] is None or found[1] is None or (found[2] is None) != (found[3] is None):
        return None
    if of_units and found[4] is None:
        return None
    return [*found[:2], *found[4:]] if found[2] is None else found


def heard(module: nn.Module) -> bool:
    """Whether somebody listens to calls of the module, by hooks of its or everybody's, or has replaced torch.nn's.
    Without one of the names: somebody may.
    """
    own = vars(module)
    return bool(
        own.get("_forward_hooks", True)
        or own.get("_forward_pre_hooks", True)
        or _global_hooks
        or _global_pre_hooks
        or nn.Module.__call__ is not _call
    )


def hooks_before(module: nn.Module) -> list[Any]:
    """What is called before the module's forward. Without the name: nothing, as if no hook computed a weight."""
    return list(getattr(module, "_forward_pre_hooks", {}).values())


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's buffers, not its children's. Without the name: as named_buffers gives them."""
    found = getattr(module, "_buffers", None)
    return dict(module.named_buffers(recurse=False)) if found is None else found


def weight_names(module: nn.RNNBase) -> list[str]:
    """The weights of a sequence module, in the order in which kernels take them. Without the name: as torch.nn names
    them.
    """
    names = getattr(module, "_flat_weights_names", None)
    if names is not None:
        return names
    kinds = ["weight_ih", "weight_hh"] + ["bias_ih", "bias_hh"] * module.bias + ["weight_hr"] * (module.proj_size > 0)
    kinds += ["weight_unit"] * hasattr(module, "weight_unit_l0")
    directions = ("", "_reverse")[: 1 + module.bidirectional]
    return [f"{kind}_l{layer}{end}" for layer in range(module.num_layers) for end in directions for kind in kinds]


def add_weight(module: nn.RNNBase, kind: str, size: int) -> None:
    """A further parameter (size) of each layer and direction, after its others, as torch.nn's constructor adds them.
    Without the names: the parameters alone.
    """
    directions = ("", "_reverse")[: 1 + module.bidirectional]
    ends = [f"_l{layer}{end}" for layer in range(module.num_layers) for end in directions]
    before = weight_names(module)
    each = len(before) // len(ends)
    for i, end in enumerate(ends):
        for name in before[i * each : (i + 1) * each]:  # to the end: parameters() has the order of the weights
            parameter = getattr(module, name)
            delattr(module, name)
            setattr(module, name, parameter)
        setattr(module, kind + end, nn.Parameter(module.weight_ih_l0.new_empty(size)))
    if hasattr(module, "_all_weights"):
        module._all_weights = [[*names, kind + end] for names, end in zip(module._all_weights, ends, strict=True)]
        module._flat_weights_names = [name for names in module._all_weights for name in names]
        module._init_flat_weights()


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The module's parameters, not its children's. Without the name: as named_parameters gives them."""
    found = getattr(module, "_parameters", None)
    return dict(module.named_parameters(recurse=False)) if found is None else found


def listed_weights(module: nn.RNNBase) -> list[Tensor]:
    """The list that torch.nn's ``forward`` reads the weights from, as it is. Without the name: the attributes."""
    found = getattr(module, "_flat_weights", None)
    return [getattr(module, name) for name in weight_names(module)] if found is None else found


def flat_weights(module: nn.RNNBase) -> list[Tensor]:
    """The weights that torch.nn's ``forward`` would read: that list, made anew where an attribute has changed since it
    was made. (Each look-up of a parametrized weight computes it anew.) Without the names: the attributes.
    """
    update = getattr(module, "_update_flat_weights", None)
    if update is None:
        return [getattr(module, name) for name in weight_names(module)]
    update()
    return listed_weights(module)


def refer_strongly(module: nn.RNNBase) -> None:
    """torch.nn asks a weak reference to each weight whether an attribute has changed, and torch.utils.swap_tensors
    refuses a tensor that has one. A function that returns the weight answers as well. Without the names: nothing.
    """
    if hasattr(module, "_flat_weight_refs"):
        module._flat_weight_refs = [None if w is None else functools.partial(_same, w) for w in listed_weights(module)]


def forget_weight(module: nn.RNNBase, name: str) -> None:
    """The attribute ``name`` was set. If it is a weight, the reference to the one before, which now differs from it,
    lets that go.
    """
    references = vars(module).get("_flat_weight_refs")
    if references and name in weight_names(module)[: len(references)]:
        references[weight_names(module).index(name)] = _gone


def _same(weight: Tensor) -> Tensor:
    return weight


def _gone() -> None:
    """What a weak reference answers whose weight is no more."""
