"""What modules are told: their cell, and beyond torch.nn what is dropped, and how the backward pass is done.

A module has one attribute for all of it, ``fused_options``, so that a user's attributes may have any other name.
"""

from __future__ import annotations

import inspect
import itertools
import math
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn

from .cells import CELLS
from .layer.call import Options
from .layer.dropout import Rates, check_mask, rates


def check_policy(grad_clip: float | None, grad_clip_mode: str, bptt_steps: int | None, recompute: str) -> Options:
    """These options as a layer takes them.

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


@dataclass(frozen=True)
class FusedOptions:
    """What a module of ours is told beyond torch.nn's, its attribute ``fused_options``.

    >>> lstm = fusedrnn.LSTM(64, 128, zoneout=0.1)     # an option, by its name, to the constructor
    >>> lstm.fused_options = dataclasses.replace(lstm.fused_options, zoneout=0.2, grad_clip=1.0)     # or later
    >>> class Clipped(fusedrnn.LSTM):
    ...     fused_options = fusedrnn.FusedOptions(grad_clip=1.0)     # or for all of a class

    What the constructor is not given, or is given as the default, is what the class says. No other attribute of a
    module is read. Equations of the first four: :mod:`fusedrnn.layer.dropout`.

    Attributes:
        input_dropout: 0.0; probability that an element of every layer's input is dropped in training, one mask a
            sequence, whatever resets there are in it.
        recurrent_dropout: 0.0; the same of h_{t-1} in the products.
        zoneout: 0.0; probability that a unit keeps its state at a step, in training; outside it the share of
            the old state in the new one. With two states also a pair, of h and of c; with more (p, 0.0), of h alone.
        weight_dropout: 0.0; probability that an element of W_hh is dropped in training, one mask a call.
        grad_clip: None; the limit c of what a step of the backward pass sends back to the states before it, m =
            dL/dh_{t-1} and, with two states, dL/dc_{t-1}, before the earlier step adds its own dL/dy_{t-1}. Under a
            GradScaler m is scaled, and so must the limit be: ``c * scaler.get_scale()``, before each forward pass. Or
            clip the whole gradient, after ``scaler.unscale_(optimizer)``; or train in bfloat16, without a scaler.
        grad_clip_mode: "value"; each element of m is limited to [-c, c]. "norm": each sample's m is multiplied by
            min(1, c / ||m||).
        bptt_steps: None; truncated back-propagation through time: from a step t > 0 that is a multiple of it no
            gradient passes to step t - 1 (in a reverse direction from t - 1 to t). The gradients are those of calls
            with so many steps each, the states handed on detached. With ``reset``, t counts from the last reset.
        recompute: "none"; the forward pass saves gates and c_t for the backward pass. "gates": the backward pass
            computes them again, which takes about a third more time.
        reset_after: True; of GRU and GRUCell alone: the reset gate after the product, as in torch.nn. False: before it,
            as first published.

    Raises:
        ValueError, TypeError: a value without meaning. One that its cell does not have raises where the module is made,
            or called.
    """

    input_dropout: float = 0.0
    recurrent_dropout: float = 0.0
    zoneout: float | tuple[float, float] = 0.0
    weight_dropout: float = 0.0
    grad_clip: float | None = None
    grad_clip_mode: str = "value"
    bptt_steps: int | None = None
    recompute: str = "none"
    reset_after: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.zoneout, list):
            object.__setattr__(self, "zoneout", tuple(self.zoneout))
        self.check_rates(1 if isinstance(self.zoneout, tuple) and len(self.zoneout) == 1 else 2)
        check_policy(self.grad_clip, self.grad_clip_mode, self.bptt_steps, self.recompute)
        if not isinstance(self.reset_after, bool):
            raise TypeError(f"reset_after should be of type bool, got: {type(self.reset_after).__name__}")

    def check_rates(self, states: int) -> None:
        """For a cell with so many states. Raises ValueError."""
        rates(self.input_dropout, self.recurrent_dropout, self.zoneout, self.weight_dropout, states)


DEFAULT = FusedOptions()
_FIELDS = {field.name: field.default for field in fields(FusedOptions)}
FIELDS = tuple(_FIELDS)
_DROPOUT, _BACKWARD = FIELDS[:4], FIELDS[4:8]

# torch.nn's classes as they were at import: people give their names to ours.
_LSTMS, _GRUS, _SINGLE = (nn.LSTM, nn.LSTMCell), (nn.GRU, nn.GRUCell), nn.RNNCellBase
_RNN, _RNN_CELL = nn.RNN, nn.RNNCell


def of_layer(given: dict[str, Any], states: int) -> tuple[Options, Rates]:
    """What options, by name, say of a layer whose cell has so many states; of :data:`FIELDS` all but the last.

    Raises:
        TypeError: there is no such option. ValueError: a value without meaning.
    """
    for name in given:
        if name not in FIELDS[:-1]:
            raise TypeError(f"recurrent() got an unexpected keyword argument {name!r}")
    values = _FIELDS | given
    return check_policy(*(values[name] for name in _BACKWARD)), rates(*(values[name] for name in _DROPOUT), states)


class HasOptions:
    """A module of ours. One that torch.nn's constructor has made, or a pickle of it, has the class's options."""

    fused_options: FusedOptions = DEFAULT
    _cell: str | None = None  # of a class, or module, that torch.nn does not have: its cell's name in the registry


def of(module: nn.Module) -> FusedOptions:
    """The options of a module. A module of torch.nn has the default ones.

    Raises:
        TypeError, ValueError: they are no options, or not for this cell.
    """
    own = module.fused_options if isinstance(module, HasOptions) else DEFAULT
    if own is not DEFAULT:
        _check(module, own)
    return own


def _check(module: nn.Module, own: FusedOptions) -> None:
    name = type(module).__name__
    if not isinstance(own, FusedOptions):
        raise TypeError(f"fused_options of {name} must be a fusedrnn.FusedOptions, got {type(own).__name__}")
    if not (own.reset_after or isinstance(module, _GRUS)):
        raise ValueError(f"reset_after=False is for GRU and GRUCell, got it in the fused_options of {name}")
    if isinstance(module, _SINGLE):
        others = [other for other in changed(own) if other != "reset_after"]
        if others:
            raise ValueError(f"{name} makes single steps, without {', '.join(others)}, got {own}")
    else:
        cell = CELLS[cell_of(module)]
        own.check_rates(len(cell.states))
        check_mask(cell, own.recurrent_dropout)


def tell(module: nn.Module, given: dict[str, Any]) -> None:
    """Options of a new module: what is not the default is the constructor's, the rest the class's."""
    given = {name: v for name, v in given.items() if type(v) is not type(_FIELDS[name]) or v != _FIELDS[name]}
    if given:
        module.fused_options = replace(of(module), **given)
    of(module)


def cell_of(module: nn.RNNBase | nn.RNNCellBase) -> str:
    """The registry's name of the cell of a module, ours or torch.nn's. Call :func:`of` first: options are not checked.

    Raises:
        AssertionError, RuntimeError: there is no such mode, or no such nonlinearity, as in torch.nn.
    """
    if isinstance(module, _LSTMS):
        return "lstm"
    if isinstance(module, _GRUS):  # of neither torch.nn reads the mode
        own = module.fused_options if isinstance(module, HasOptions) else DEFAULT
        return "gru" if own.reset_after else "gru_reset_before"
    if isinstance(module, _RNN_CELL):
        if module.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {module.nonlinearity}")
        return f"rnn_{module.nonlinearity}"
    if isinstance(module, _RNN) and module.mode not in ("RNN_TANH", "RNN_RELU"):
        raise AssertionError(f"mode must be RNN_TANH or RNN_RELU, got {module.mode}")
    if isinstance(module, HasOptions) and module._cell is not None:
        return module._cell
    cell = str(module.mode).lower()  # of a class that copies the methods of torch.nn's or ours
    if cell not in CELLS:
        raise AssertionError(f"mode must be the name of a cell, got {module.mode}")
    return cell


def changed(own: FusedOptions) -> dict[str, Any]:
    """The options that make another layer than torch.nn's, in training at least."""
    found = {name: value for name, default in _FIELDS.items() if (value := getattr(own, name)) != default}
    if isinstance(own.zoneout, tuple) and not any(own.zoneout):
        del found["zoneout"]
    if "grad_clip" not in found:
        found.pop("grad_clip_mode", None)
    return found


def text(module: HasOptions) -> str:
    """Its options for ``extra_repr``, right ones or wrong."""
    own = module.fused_options
    values = changed(own) if isinstance(own, FusedOptions) else {"fused_options": own}
    return "".join(f", {name}={value!r}" for name, value in values.items())


def documentation(*left_out: str) -> str:
    """What :class:`FusedOptions` says of each option, for the docstring of a class that takes them by name."""
    lines, found, name = inspect.getdoc(FusedOptions).partition("Attributes:\n")[2].splitlines(), [], ""
    for line in itertools.takewhile(str.strip, lines):
        name = line.split(":")[0].strip() if not line.startswith(" " * 8) else name
        found += [line] if name not in left_out else []
    return "\n".join(["", "", "Options, by name, with their defaults (of a module its ``fused_options``):", *found, ""])


def active(module: nn.Module) -> dict[str, Any]:
    """The arguments of :func:`fusedrnn.functional.recurrent` that make a difference to the call made now."""
    own = of(module)
    if own is DEFAULT:
        return {}
    names = (*(_DROPOUT if module.training else ("zoneout",)), *(_BACKWARD if torch.is_grad_enabled() else ()))
    return {name: value for name, value in changed(own).items() if name in names}
