"""Recurrent modules of a model in int8 or bfloat16, for inference: :func:`quantize`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import modules, options
from .convert import ConversionEntry, check_model, listed, own_class, title
from .inference import cache
from .quantized import MOST_INT8, QuantizedCell, QuantizedRecurrent, small_dtype
from .torch_internals import flat_weights, weight_names

_CLASSES = {getattr(nn, name) for name in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")}
_CLASSES |= {getattr(modules, name) for name in modules.__all__} - {modules.FusedRNNBase}
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
    calibration. ``"bfloat16"``: half of the memory; the matrices alone, multiplied in float32, which is sooner where a
    batch is so small that reading them is the work.

    >>> print(fusedrnn.quantize(model.eval()))
    1 recurrent module quantized
      lstm: torch.nn.LSTM: now fusedrnn.QuantizedRecurrent, int8, 2.0 MiB -> 0.5 MiB
    0 recurrent modules left alone
    >>> torch.save(model.state_dict(), "small.pt")     # load it into a model that was built and quantized likewise

    A module keeps its identity and its hooks: its class changes, parameters become buffers. ``model`` itself may be
    one. Computed weights (``torch.nn.utils.parametrize``) are taken as they are now. Dropout and options for training
    are left out, zoneout stays. Left alone, with the reason in the report: subclasses with code of their own, modules
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
        if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            continue
        before = own_class(module)
        reason = _obstacle(module, before)
        weights = [] if reason else _weights(module)
        reason = reason or _obstacle_in(module, weights, dtype)
        if reason:
            report.left.append(ConversionEntry(name, title(before), reason))
            continue
        size = sum(w.numel() * w.element_size() for w in weights)
        _become(module, _made_of(module, weights, dtype))
        kind = str(dtype).removeprefix("torch.")
        after = sum(b.numel() * b.element_size() for b in module.buffers())
        report.replaced.append(
            QuantizationEntry(name, title(before), f"now fusedrnn.{type(module).__name__}, {kind}", size, after)
        )
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
    if cls not in _CLASSES:
        return "a subclass with code of its own"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    if any(type(hook).__module__.startswith("torch.nn.utils.") for hook in module._forward_pre_hooks.values()):
        return "its weights are computed by a hook of torch.nn.utils: remove that first"
    return None


def _obstacle_in(module: nn.Module, weights: list[Tensor], dtype: torch.dtype) -> str | None:
    for name, weight in zip(_names(module), weights, strict=True):
        if weight.device.type != "cpu":
            return f"{name} is on device {weight.device}, these kernels are for the CPU"
        if not weight.is_floating_point() or not torch.isfinite(weight).all():
            return f"{name} is not finite"
        if dtype == torch.int8 and weight.dim() == 2 and weight.size(1) > MOST_INT8:
            return f"{name} has rows of {weight.size(1)} elements, int8 takes {MOST_INT8}"
    return None


def _made_of(module: nn.Module, weights: list[Tensor], dtype: torch.dtype) -> QuantizedRecurrent | QuantizedCell:
    cell = options.cell_of(module)
    if isinstance(module, nn.RNNBase):
        found = QuantizedRecurrent(
            cell, module.input_size, module.hidden_size, module.num_layers, module.bias, module.batch_first,
            module.bidirectional, module.proj_size, options.of(module).zoneout, dtype,
        )  # fmt: skip
    else:
        found = QuantizedCell(cell, module.input_size, module.hidden_size, module.bias_ih is not None, dtype)
    found.take(weights)
    return found


def _become(module: nn.Module, made: nn.Module) -> None:
    """The very object, with its hooks and what else the user has put there."""
    cache.forget(module)
    before, weights = vars(module), _names(module)
    kept = {name: value for name, value in before.items() if "hook" in name or name not in _OWN}
    parameters = {name: p for name, p in before["_parameters"].items() if name not in weights and p is not None}
    children = {name: m for name, m in before["_modules"].items() if name != "parametrizations"}
    before.clear()
    before.update(vars(made) | kept)
    module.__class__ = type(made)
    before["_parameters"].update(parameters)
    before["_modules"].update(children)
