"""What our sequence modules are told beyond torch.nn's: what is dropped, and how the backward pass is done."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch

from .autograd import Options
from .dropout import rates

__all__ = ["NAMES", "SequenceOptions", "active", "changed", "check", "check_policy", "text"]


class SequenceOptions:
    """By name to the constructor, or attributes of a module or its class; :func:`fusedrnn.functional.recurrent` says
    what they mean.
    """

    input_dropout: float = 0.0
    recurrent_dropout: float = 0.0
    zoneout: float | tuple[float, float] = 0.0
    weight_dropout: float = 0.0
    grad_clip: float | None = None
    grad_clip_mode: str = "value"
    bptt_steps: int | None = None
    recompute: str = "none"


_DEFAULTS = {name: getattr(SequenceOptions, name) for name in SequenceOptions.__annotations__}
NAMES = tuple(_DEFAULTS)
_DROPOUT = NAMES[:4]


def changed(module: SequenceOptions) -> dict[str, Any]:
    """Its options that make it another layer than torch.nn's, in training at least."""
    found = {name: value for name in NAMES if (value := getattr(module, name)) != _DEFAULTS[name]}
    zoneout = found.get("zoneout")
    if isinstance(zoneout, (tuple, list)) and all(rate == 0 for rate in zoneout):
        del found["zoneout"]
    if "grad_clip" not in found:
        found.pop("grad_clip_mode", None)
    return found


def text(module: torch.nn.Module) -> str:
    """Its options for ``extra_repr``."""
    own = changed(module) if isinstance(module, SequenceOptions) else {}
    return "".join(f", {name}={value!r}" for name, value in own.items())


def active(module: SequenceOptions) -> dict[str, Any]:
    """Those that make a difference to the call that is made now."""
    if (
        module.input_dropout == module.recurrent_dropout == module.zoneout == module.weight_dropout == 0
        and module.grad_clip is None
        and module.bptt_steps is None
        and module.recompute == "none"
    ):
        return {}
    names = (*(_DROPOUT if module.training else ("zoneout",)), *(NAMES[4:] if torch.is_grad_enabled() else ()))
    return {name: value for name, value in changed(module).items() if name in names}


def check(module: SequenceOptions, states: int) -> None:
    """Of a cell with so many states.

    Raises:
        ValueError: one that has no meaning.
    """
    check_policy(*(getattr(module, name) for name in NAMES[4:]))
    rates(*(getattr(module, name) for name in _DROPOUT), states)


def check_policy(
    grad_clip: float | None, grad_clip_mode: str, bptt_steps: int | None, recompute: str
) -> Options:
    """These arguments of :func:`fusedrnn.functional.recurrent` as a layer takes them.

    Raises:
        ValueError: one that has no meaning.
    """
    if grad_clip_mode not in ("value", "norm"):
        raise ValueError(f"grad_clip_mode must be 'value' or 'norm', got {grad_clip_mode!r}")
    if recompute not in ("none", "gates"):
        raise ValueError(f"recompute must be 'none' or 'gates', got {recompute!r}")
    if grad_clip is not None and not (_is(Real, grad_clip) and 0 < grad_clip < math.inf):
        raise ValueError(f"grad_clip must be positive and finite, or None, got {grad_clip!r}")
    if bptt_steps is not None and not (_is(Integral, bptt_steps) and bptt_steps > 0):
        raise ValueError(f"bptt_steps must be a positive integer, or None, got {bptt_steps!r}")
    return Options(False, recompute == "gates", int(bptt_steps or 0), float(grad_clip or 0), grad_clip_mode == "norm")


def _is(kind: type, value: object) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)
