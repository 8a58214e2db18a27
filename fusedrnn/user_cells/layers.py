"""Layers of a user's cell: its struct compiled, held against the equations, and registered, all at first use."""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from ..cells import CELLS, CellInfo
from ..functional import recurrent
from ..layer.call import LayerCall
from ..layer.differentiable import STEPS, Step
from ..layer.differentiable import layer as by_torch
from ..modules import FusedRNNBase
from .cell import Names, TracedCell
from .compiler import without_comments
from .library import add
from .printer import struct_name
from .stages import is_maskable

__all__ = ["Recurrent", "UserCell", "cell"]

_CHECKED = "checked"  # a file beside a library
_EAGER = "_eager"  # the end of the names of such cells
_lock = threading.RLock()


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # a thread that is not in this process may have held it


os.register_at_fork(after_in_child=_after_fork)


def _registered(cell: TracedCell, eager: bool = False) -> str:
    """The registry's name of a cell, for :func:`fusedrnn.functional.recurrent`: compiled at the first call.

    Args:
        eager: torch's operations compute it, nothing is compiled.

    Raises:
        RuntimeError: no compiler, or it fails, or its kernels do not give what the equations say.
    """
    said = without_comments(cell.source()), cell.gates, cell.states, cell.parameters
    digest = hashlib.sha256(repr(said).encode()).hexdigest()[:12]
    name = f"{cell.name.lower()}_{digest}{_EAGER if eager else ''}"
    with _lock:
        if eager:
            CELLS[name] = replace(_info(cell, name), eager=True)
            STEPS[name] = _step(cell)
        elif name not in CELLS:
            info = _info(cell, name)
            source = cell.source().replace('#include "cell.h"', '#include "cells/cell.h"')  # beside it in csrc/cells
            source = re.sub(r'(?m)^(  static constexpr const char\* kName = )"\w+"', rf'\1"{name}"', source)
            folder = add(info, f"user::{cell.struct}", source)
            STEPS[name] = _step(cell)
            if not (folder / _CHECKED).exists():
                try:
                    with ThreadPoolExecutor(1) as aside:  # where no mode or setting of the caller's thread is
                        aside.submit(check, name).result()
                except BaseException:
                    del CELLS[name], STEPS[name]  # a next use checks again
                    raise
                with suppress(OSError):  # a folder that is read alone: checked again by the next process
                    (folder / _CHECKED).touch()
    return name


def _info(cell: TracedCell, name: str) -> CellInfo:
    constants = cell.constants
    return CellInfo(
        name,
        gates=cell.gates,
        states=cell.states,
        saved=constants.kSaved,
        parameters=cell.parameters,
        first=None if constants.kFirst == constants.kGates else constants.kFirst,
        split=constants.kSplit,
        maskable=is_maskable(cell.trace, cell.stages),
        added=True,
    )


def _step(cell: TracedCell) -> Step:
    """The cell in torch operations, for derivatives beyond the first."""
    gates, first, states = len(cell.gates), cell.constants.kFirst, len(cell.states)

    def of(act: Any, x: Tensor, rec: Callable[[Tensor, int, int], Tensor], *given: Any) -> tuple[Tensor, ...]:
        before, units = given[:states], given[states] if cell.parameters else ()
        first_gates = rec(before[0], 0, first or gates)
        parts: list[Any] = list(first_gates.chunk(first or gates, -1)) if first_gates.dim() else [first_gates] * gates
        rest: list[Tensor] = []

        def called(gate: int) -> Callable[[Tensor], Tensor]:
            def product(q: Tensor) -> Tensor:
                rest[:] = rest or rec(q, first, gates).chunk(gates - first, -1)
                return rest[gate - first]

            return product

        parts += [called(gate) for gate in range(len(parts), gates)]
        return cell.eager(x.chunk(gates, -1), parts, before, units)

    operand = next((stage for stage in cell.stages if stage.name == "recurrent_operand"), None)
    if operand is None:
        return Step(of)

    def q(saved: tuple[Tensor, ...], h: Tensor) -> Tensor:
        known = {f"saved[{k}]": value for k, value in enumerate(saved)}
        return operand.run(known | {"prev[0]": h})["return"]

    return Step(of, operand=q)


def check(name: str, sizes: tuple[int, int, int, int] = (4, 3, 2, 5)) -> None:
    """Hold a cell's kernels against its equations in float64: values and gradients against torch.autograd's of the same
    step in torch operations, and the gradients against finite differences.

    Raises:
        RuntimeError: they differ.
    """
    info, (T, B, I, H) = CELLS[name], sizes
    gates, generator = len(info.gates), torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5).requires_grad_()

    w_hh = draw(gates * H, H) if info.product else draw(info.blocks * H)
    weights = [draw(gates * H, I), w_hh, draw(gates * H), draw(gates * H)]
    weights += [draw(len(info.parameters) * H)] if info.has_unit_weight else []
    leaves = [draw(T, B, I), *(draw(1, B, H) for _ in info.states), *weights]
    count = 1 + len(info.states)

    def kernels(*leaves: Tensor) -> tuple[Tensor, ...]:
        y, finals = recurrent(name, leaves[0], leaves[1:count], leaves[count:])
        return y, *finals

    def equations(*leaves: Tensor) -> tuple[Tensor, ...]:
        found = by_torch(LayerCall(name, leaves[0], list(leaves[1:count]), list(leaves[count:])))
        return found.y, *found.finals

    def gradients(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        cotangents = [torch.sin(torch.arange(o.numel(), dtype=o.dtype)).view_as(o) for o in outputs]
        return torch.autograd.grad(outputs, leaves, cotangents, materialize_grads=True)

    ours, right = kernels(*leaves), equations(*leaves)
    ours, right = (*ours, *gradients(ours)), (*right, *gradients(right))
    for found, expected in zip(ours, right, strict=True):
        if not torch.allclose(found, expected, rtol=1e-9, atol=1e-11, equal_nan=True):
            worst = (found - expected).abs().max().item()
            raise RuntimeError(f"the compiled kernels of cell {name} do not give its equations: off by {worst}")
    if all(found.isfinite().all() for found in ours):  # a function may be undefined beside where it is used
        try:
            torch.autograd.gradcheck(kernels, leaves, fast_mode=True, rtol=1e-3, atol=1e-5)
        except GradcheckError as error:
            raise RuntimeError(f"the gradients of cell {name} are not those of finite differences: {error}") from error


class UserCell(TracedCell):
    """A cell made by :func:`fusedrnn.cell`, and the class of its layers. It is pickled by its name in its module."""

    def __reduce__(self) -> str:
        self.__module__ = self.function.__module__  # where pickle looks
        there = vars(sys.modules[self.__module__])
        name = self.function.__qualname__
        return name if "." in name else next((n for n, v in there.items() if v is self), name)

    def __call__(self, *arguments: Any, **options: Any) -> NoReturn:
        """A cell is not called."""
        given = ", ".join([*map(repr, arguments), *(f"{name}={value!r}" for name, value in options.items())])
        plain = all(isinstance(v, (int, float, str)) for v in (*arguments, *options.values()))
        layer = f"{self.name}.Module({given if given and plain else 'input_size, hidden_size'})"
        raise TypeError(f"{self.name} is a cell, and is not called: its layers are made by {layer}")

    @property
    def registered(self) -> str:
        """The registry's name, for :func:`fusedrnn.functional.recurrent`: compiled and checked at the first use."""
        return _registered(self)

    @cached_property
    def Module(self) -> type[Recurrent]:
        """The class of its layers: ``class Module(fusedrnn.Recurrent, cell=self)``."""
        names = {"__module__": self.function.__module__, "__qualname__": f"{self.function.__qualname__}.Module"}
        return type(struct_name(self.name), (Recurrent,), names | {"__doc__": self.__doc__}, cell=self)


def cell(
    *misplaced: Any, gates: Names | None = None, states: Names = "h", parameters: Names = ""
) -> Callable[[Callable], UserCell]:
    """A recurrent cell from a function that computes one step, element by element.

    >>> @fusedrnn.cell(gates="f n", states="h")
    ... def mgu(x, rec, h):
    ...     f = torch.sigmoid(x.f + rec.f)
    ...     n = torch.tanh(x.n + rec.n(f * h))
    ...     return (1 - f) * h + f * n

    For each gate g, ``x.g`` is W_ih x_t + b_ih and ``rec.g`` is W_hh h_{t-1} + b_hh, of one unit and one sample; they
    are in the order of the row blocks of the weights. A gate that is called, ``rec.g(q)``, multiplies q instead of
    h_{t-1}: W_hh q + b_hh; such gates are listed last. A cell that uses no ``rec`` has no W_hh, and ``x.g`` is
    W_ih x_t + b_ih + b_hh. Parameters are vectors of H beside the weights. The function returns the new states.

    The function runs once, with symbols; it may use + - * / and powers with whole exponents, sigmoid, tanh, relu, exp,
    log, softplus, sqrt, square, abs, maximum, minimum, and where with a comparison, of torch or of
    ``fusedrnn.user_cells``. The gradient is derived from the equations.

    Of two states the first, h, goes into the products alone; h and c are what the layer carries. Such a cell has no
    gate that is called.

    Args:
        gates: names, with spaces between, 1 to 4.
        states: names, h first, 1 or 2.
        parameters: names of vectors of H, at most 8.

    Raises:
        CellError: with the line of the function and what to write instead, if the function is no such cell.
        TypeError: the decorator stands without its gates, or names are no strings.
    """
    if misplaced or gates is None:
        raise TypeError('fusedrnn.cell is told the gates: write @fusedrnn.cell(gates="f n") above the function')
    for kind, names in (("gates", gates), ("states", states), ("parameters", parameters)):
        if not isinstance(names, str) and not (
            isinstance(names, Sequence) and all(isinstance(name, str) for name in names)
        ):
            raise TypeError(f'{kind} must be names, such as {kind}="f n" or {kind}=["f", "n"], got {names!r}')

    def of(function: Callable) -> UserCell:
        return UserCell(function, gates, states, parameters)

    return of


def _with_eager(signature: inspect.Signature) -> inspect.Signature:
    """Of a layer, with the argument that only a user's cell has."""
    *arguments, others = signature.parameters.values()
    eager = inspect.Parameter("eager", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool)
    return signature.replace(parameters=[*arguments, eager, others])


class Recurrent(FusedRNNBase):
    """A layer of a user's cell: ``class MGU(fusedrnn.Recurrent, cell=mgu): ...``.

    Arguments, parameters, shapes and options as :class:`fusedrnn.modules.FusedRNNBase`'s. The cell is compiled when the
    first module is made, which takes some seconds, once for each machine and user. With ``eager=True`` nothing is, and
    no compiler is needed: torch's operations compute the equations, one after the other. Such a layer does not train
    with ``grad_clip`` or ``bptt_steps``, and :func:`fusedrnn.record_gradients` refuses it.

    Raises:
        RuntimeError: no compiler, or it fails, or its kernels do not give what the equations say.
    """

    __signature__ = _with_eager(inspect.signature(FusedRNNBase))
    _cell = FusedRNNBase.NAMED_LATER
    cell: UserCell

    def __init_subclass__(cls, *, cell: UserCell | None = None, **others: Any) -> None:
        super().__init_subclass__(**others)
        if cell is not None:
            if not isinstance(cell, UserCell):
                raise TypeError(f"cell must be made by fusedrnn.cell, got {type(cell).__name__}")
            cls.cell = cell

    def __init__(self, *arguments: Any, eager: bool = False, **options: Any) -> None:
        if not hasattr(type(self), "cell"):
            raise TypeError(f"{type(self).__name__} has no cell: class NAME(fusedrnn.Recurrent, cell=...)")
        self._cell = _registered(self.cell, eager)
        super().__init__(*arguments, **options)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        found = super().__reduce_ex__(max(protocol, 2))
        own = vars(self.cell).get("Module")  # it has no name of its own where pickle looks
        return (_new, (self.cell,), *found[2:]) if type(self) is own else found

    def __setstate__(self, state: dict[str, Any]) -> None:
        state["_cell"] = _registered(self.cell, state["_cell"].endswith(_EAGER))  # a process may not have used it yet
        state["mode"] = state["_cell"].upper()
        super().__setstate__(state)


def _new(cell: UserCell) -> Recurrent:
    """A layer of the cell's own class, before its state comes from a pickle."""
    return cell.Module.__new__(cell.Module)
