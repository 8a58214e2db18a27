"""Recurrent modules of a model in int8 or bfloat16, for inference: :func:`quantize`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import further_modules, modules, options
from .cells import CELLS
from .convert import ConversionEntry, check_model, listed, own_class, title
from .inference import cache
from .quantized import MOST_INT8, QuantizedCell, QuantizedRecurrent, short, small_dtype
from .torch_internals import flat_weights, hooks_before, weight_names
from .user_cells import Recurrent

_CLASSES = {getattr(nn, name) for name in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")}
_CLASSES |= {getattr(modules, name) for name in modules.__all__} - {modules.FusedRNNBase}
_CLASSES |= {getattr(further_modules, name) for name in further_modules.__all__}
#: What torch.nn's constructors and ours leave in a module.
_OWN = {*vars(nn.LSTM(1, 1)), *vars(nn.RNN(1, 1)), *vars(nn.RNNCell(1, 1)), "fused_options"}


@dataclass(frozen=True)
class QuantizationEntry(ConversionEntry):
    """One module that was replaced, and the bytes of its weights before and after."""

    before: int
    after: int

    def __str__(self) -> str:
        return f"{super().__str__()}, {_size(self.before)} -> {_size(self.after)}"


@dataclass
class QuantizationReport:
    """What :func:`quantize` replaced and what it left, one entry a module; ``str()`` reads well."""

    replaced: list[QuantizationEntry] = field(default_factory=list)
    left: list[ConversionEntry] = field(default_factory=list)

    def __str__(self) -> str:
        return listed(("quantized", self.replaced), ("left alone", self.left))


def quantize(model: nn.Module, dtype: str | torch.dtype = "int8") -> QuantizationReport:
    """Replace the recurrent modules of ``model``, of torch.nn and of fusedrnn, by ones with small matrices, in place.

    They are for inference on the CPU (:mod:`fusedrnn.quantized`). ``"int8"``: a quarter of the memory, and the more
    speed the larger the matrices; a scale for each row of a matrix, and for each row of x and h as they come, without
    calibration. ``"bfloat16"``: half of the memory; the matrices alone, multiplied in float32, which is sooner where
    reading them is the work: steps of few samples through large layers.

    >>> print(fusedrnn.quantize(model.eval()))
    1 recurrent module quantized
      lstm: torch.nn.LSTM: now fusedrnn.QuantizedRecurrent, int8, 2.0 MiB -> 0.5 MiB
    0 recurrent modules left alone
    >>> torch.save(model.state_dict(), "small.pt")     # load it into a model that was built and quantized likewise

    A module keeps its identity and its hooks: its class changes, parameters become buffers. ``model`` itself may be
    one. Computed weights (``torch.nn.utils.parametrize``) are taken as they are now. Dropout and options for training
    are left out, zoneout stays. Left alone, with the reason in the report: subclasses with code of their own, cells
    of the user's own, cells whose units have parameters (PeepholeLSTM, IndRNN, LayerNormLSTM, LayerNormGRU), modules
    whose ``forward`` was replaced on the instance or whose weights a hook computes, weights that are on another device
    than the CPU or not finite. A second call changes nothing.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.
        ValueError: ``dtype`` is neither "int8" nor "bfloat16", nor torch's.
    """
    check_model(model)
    dtype = small_dtype(dtype)
    report = QuantizationReport()
    for name, module in list(model.named_modules()):
        if isinstance(module, (QuantizedRecurrent, QuantizedCell)) and module.dtype != dtype:
            reason = f"quantized before, to {short(module.dtype)}"
            report.left.append(ConversionEntry(name, title(type(module)), reason))
        if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            continue
        before = own_class(module)
        reason = _obstacle(module, before)
        if reason is None:
            with torch.inference_mode(False):  # buffers that can be written later
                made = _empty_like(module, dtype)
            weights = _weights(module)
            reason = _obstacle_in(module, weights, made)
        if reason is not None:
            report.left.append(ConversionEntry(name, title(before), reason))
            continue
        made.take(weights)
        size, after = (sum(t.numel() * t.element_size() for t in of) for of in (weights, made.buffers()))
        _become(module, made)
        now = f"now fusedrnn.{type(module).__name__}, {short(dtype)}"
        report.replaced.append(QuantizationEntry(name, title(before), now, size, after))
    return report


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def _names(module: nn.Module) -> list[str]:
    """Of the weights, in the order in which kernels take them."""
    if isinstance(module, nn.RNNBase):
        return weight_names(module)
    return ["weight_ih", "weight_hh"] + ["bias_ih", "bias_hh"] * (module.bias_ih is not None)


def _weights(module: nn.Module) -> list[Tensor]:
    found = flat_weights(module) if isinstance(module, nn.RNNBase) else [getattr(module, n) for n in _names(module)]
    return [w.detach() for w in found]


def _obstacle(module: nn.Module, cls: type[nn.Module]) -> str | None:
    if issubclass(cls, Recurrent):
        return "its cell is the user's own (fusedrnn.cell), without kernels with small matrices"
    if cls not in _CLASSES:
        return "a subclass, whose code may be its own"
    if not CELLS[options.cell_of(module)].has_small_weights:
        return "its cell has no kernels with small matrices"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if any(type(hook).__module__.startswith("torch.nn.utils.") for hook in hooks_before(module)):
        return "its weights are computed by a hook of torch.nn.utils: remove that first"
    return None


def _obstacle_in(module: nn.Module, weights: list[Tensor], made: QuantizedRecurrent | QuantizedCell) -> str | None:
    own = {name for name in (*_kept(module), *_members(module)) if "hook" not in name}
    for name in sorted(own & {*vars(made), *dict(made.named_buffers())}):
        return f"its attribute {name} would meet that of a quantized module"
    if len(weights) != len(made._weight_names):
        return f"it has {len(weights)} weights, its sizes say {len(made._weight_names)}"
    for name, weight in zip(made._weight_names, weights, strict=True):
        own = getattr(made, name)
        if weight.shape != own.shape:
            return f"{name} has shape {list(weight.shape)}, its sizes say {list(own.shape)}"
        if weight.device.type != "cpu":
            return f"{name} is on device {weight.device}, these kernels are for the CPU"
        inside = torch.float32 if own.dtype == torch.int8 else own.dtype
        if not weight.is_floating_point() or not torch.isfinite(weight.to(inside)).all():
            return f"{name} is not finite in {short(inside)}"
        if own.dtype == torch.int8 and weight.size(1) > MOST_INT8:
            return f"{name} has rows of {weight.size(1)} elements, int8 takes {MOST_INT8}"
    return None


def _empty_like(module: nn.Module, dtype: torch.dtype) -> QuantizedRecurrent | QuantizedCell:
    cell = options.cell_of(module)
    if isinstance(module, nn.RNNBase):
        return QuantizedRecurrent(
            cell, module.input_size, module.hidden_size, module.num_layers, module.bias, module.batch_first,
            module.bidirectional, module.proj_size, options.of(module).zoneout, dtype,
        )  # fmt: skip
    return QuantizedCell(cell, module.input_size, module.hidden_size, module.bias_ih is not None, dtype)


def _kept(module: nn.Module) -> dict[str, Any]:
    """Hooks, and attributes that the user has put there."""
    return {name: value for name, value in vars(module).items() if "hook" in name or name not in _OWN}


def _members(module: nn.Module) -> dict[str, tuple[str, Any]]:
    """Buffers, children and parameters that the user has put there, each with the name of the list it is in."""
    weights = {*_names(module), "parametrizations", "bias_ih", "bias_hh"}
    lists = ("_parameters", "_buffers", "_modules")
    return {n: (of, value) for of in lists for n, value in vars(module)[of].items() if n not in weights}


def _become(module: nn.Module, made: nn.Module) -> None:
    """The very object, with its hooks and what else the user has put there."""
    cache.forget(module)
    own, kept, members = vars(module), _kept(module), _members(module)
    transient = own["_non_persistent_buffers_set"] & {*members}
    own.clear()
    own.update(vars(made))
    own.update((name, value) for name, value in kept.items() if "hook" in name or name not in vars(made))
    for name, (of, value) in members.items():
        own[of][name] = value
    own["_non_persistent_buffers_set"] |= transient
    module.__class__ = type(made)
