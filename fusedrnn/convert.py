"""Exchange torch.nn's recurrent modules for fusedrnn's inside a model, in place, and back again.

A module keeps its identity: only its class changes. So its Parameters are the very same objects, and optimizers, tied
weights, hooks, parametrizations and references held elsewhere go on working. Nothing is copied and no module is
called. Modules that cannot be exchanged stay as they are, and the report says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.utils import parametrize

from . import modules
from .fused_module import FusedModule
from .inference import cache
from .layer.ops import KERNEL_DTYPES
from .options import changed, of
from .torch_internals import refer_strongly

_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    getattr(nn, name): getattr(modules, name) for name in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
}
_TORCH = {ours: theirs for theirs, ours in _FUSED.items()}


@dataclass(frozen=True)
class ConversionEntry:
    """One recurrent module: its dotted name in the model ("" is the model itself), its class before, and why."""

    name: str
    class_name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name or '(the model itself)'}: {self.class_name}: {self.reason}"


@dataclass
class ConversionReport:
    """What :func:`convert` or :func:`revert` replaced and what it left, one entry a module; ``str()`` reads well."""

    replaced: list[ConversionEntry] = field(default_factory=list)
    left: list[ConversionEntry] = field(default_factory=list)

    def __str__(self) -> str:
        return listed(("replaced", self.replaced), ("left alone", self.left))


def listed(*parts: tuple[str, Sequence[ConversionEntry]]) -> str:
    """A report's text, of what was done and to which modules."""
    return "\n".join(
        f"{len(entries)} recurrent module{'' if len(entries) == 1 else 's'} {what}"
        + "".join(f"\n  {entry}" for entry in entries)
        for what, entries in parts
    )


def convert(model: nn.Module) -> ConversionReport:
    """Make fusedrnn modules of all torch.nn RNN, LSTM, GRU, RNNCell, LSTMCell and GRUCell in ``model``, in place.

    ``model`` itself may be one. Left alone, with the reason in the report: subclasses with code of their own, modules
    whose ``forward`` was replaced on the instance, TorchScript modules, dtypes or devices without a kernel. A module
    under ``torch.nn.utils.parametrize`` is converted with its parametrizations. A second call changes nothing.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.
    """
    check_model(model)
    report = ConversionReport()
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            if module.original_name in {cls.__name__ for cls in _FUSED}:
                reason = "compiled by TorchScript: convert the model before scripting or tracing it"
                report.left.append(ConversionEntry(name, f"TorchScript {module.original_name}", reason))
        elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and not isinstance(module, FusedModule):
            _exchange(name, module, _FUSED, _obstacle_to_convert(module), report)
    return report


def revert(model: nn.Module) -> ConversionReport:
    """Undo :func:`convert`: make torch.nn modules of fusedrnn's in ``model``, in place, same Parameter objects.

    Left alone, with the reason in the report: what torch.nn lacks (GRU and GRUCell with ``reset_after=False``,
    ResidualRNN, zoneout and the other options that change numbers), and subclasses with code of their own.

    Raises:
        TypeError: ``model`` is not a torch.nn.Module.
    """
    check_model(model)
    report = ConversionReport()
    for name, module in model.named_modules():
        if isinstance(module, FusedModule):
            _exchange(name, module, _TORCH, _obstacle_to_revert(module), report)
    return report


def check_model(model: nn.Module) -> None:
    """Raise TypeError for what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _exchange(
    name: str,
    module: nn.Module,
    table: dict[type[nn.Module], type[nn.Module]],
    obstacle: str | None,
    report: ConversionReport,
) -> None:
    before = own_class(module)
    if obstacle is not None:
        report.left.append(ConversionEntry(name, title(before), obstacle))
        return
    after = table[before]
    report.replaced.append(ConversionEntry(name, title(before), f"now {title(after)}"))
    if type(module) is not before:  # the class in front holds the properties that compute the parametrized weights
        after = type(f"Parametrized{after.__name__}", (after,), dict(vars(type(module))))
    cache.forget(module)
    module.__class__ = after
    if table is _TORCH:
        vars(module).pop("fused_options", None)
    if isinstance(module, modules._SequenceModule):
        refer_strongly(module)


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of ``module``, behind the one that ``torch.nn.utils.parametrize`` puts in front of it."""
    cls = type(module)
    in_front = parametrize.is_parametrized(module) and cls.__name__ == f"Parametrized{cls.__base__.__name__}"
    return cls.__base__ if in_front and len(cls.__bases__) == 1 else cls


def _obstacle_to_convert(module: nn.Module) -> str | None:
    if own_class(module) not in _FUSED:
        return "a subclass, whose code may be its own"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    for name, parameter in module.named_parameters():
        device, dtype = parameter.device.type, parameter.dtype
        if device not in ("meta", *KERNEL_DTYPES):
            return f"{name} is on device {parameter.device}, fusedrnn runs on {', '.join(KERNEL_DTYPES)}"
        dtypes = KERNEL_DTYPES.get(device, KERNEL_DTYPES["cpu"])
        if dtype not in dtypes:
            return f"{name} has dtype {dtype}, fusedrnn computes in {', '.join(map(str, dtypes))}"
    return None


def _obstacle_to_revert(module: nn.Module) -> str | None:
    cls = own_class(module)
    if isinstance(module, modules.FusedRNNBase) or not of(module).reset_after:
        return "torch.nn has no such cell"
    if cls not in _TORCH:
        return "a subclass, whose code may be its own"
    missing = [name for name in changed(of(module)) if name != "recompute"]  # which changes no number
    return f"torch.nn has no {', '.join(missing)}" if missing else None


def title(cls: type[nn.Module]) -> str:
    """The name by which people know a class."""
    if cls in _FUSED:
        return f"torch.nn.{cls.__name__}"
    ours = cls.__module__ in (modules.__name__, modules.GRUCell.__module__)
    return f"{__package__}.{cls.__name__}" if ours else f"{cls.__module__}.{cls.__qualname__}"
