"""A recurrent cell from a Python function of one unit and one sample: traced, differentiated, printed."""

from __future__ import annotations

import inspect
import textwrap
import tokenize
from collections.abc import Callable, Sequence
from functools import cached_property

from torch import Tensor, zeros_like
from torch.nn.functional import linear

from .contract import Constants, Stage
from .errors import CellError, place_of
from .graph import evaluate
from .printer import Printed, print_struct, struct_name
from .record import Trace
from .stages import plan
from .trace import trace

Names = str | Sequence[str]


def _text_of(function: Callable) -> str:
    """Its source, as it is now; its signature if it was typed into an interpreter, or its file has changed since."""
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, SyntaxError, tokenize.TokenError):
        return f"def {function.__name__}{inspect.signature(function)}: ..."


class TracedCell:
    """A cell made by :func:`fusedrnn.cell`. Equations: those of the function; its derivative: :attr:`equations`.

    Attributes:
        name: the function's.
        function: as it was given. With tensors as the gates of x and rec it computes a step, line by line.
        gates, states, parameters: their names; G, Z and U of them.
        constants: those of the struct (``csrc/cells/cell.h``).
        stages: the struct's functions, as graphs.
        trace: what the function computes, as a graph.
    """

    def __init__(self, function: Callable, gates: Names, states: Names, parameters: Names) -> None:
        if not inspect.isfunction(function) or function.__name__ == "<lambda>":
            raise CellError(f"{function!r} is no function with a name", "Write def NAME(x, rec, h): ...")
        self.function = function
        self.__doc__ = function.__doc__
        named = (names.split() if isinstance(names, str) else names for names in (gates, states, parameters))
        self.trace: Trace = trace(function, *named, place_of(function))
        self.name, self.gates = self.trace.name, self.trace.gates
        self.states, self.parameters = self.trace.states, self.trace.parameters
        self._draft, constants, stages = plan(self.trace)
        self.constants: Constants = constants
        self.stages: tuple[Stage, ...] = stages
        self._text = _text_of(function)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}: gates {' '.join(self.gates)}, states {' '.join(self.states)})"

    @cached_property
    def _printed(self) -> Printed:
        return print_struct(self._draft, self.constants, self.stages, self._text)

    @property
    def struct(self) -> str:
        """The name of the struct in the namespace ``fusedrnn::user``."""
        return struct_name(self.name)

    @property
    def equations(self) -> list[str]:
        """Forward, then backward, as text: ``(1) f = sigmoid(x_f + rec_f)``."""
        return [f"({number}) {text}" for number, text in self._printed.equations.values()]

    def source(self) -> str:
        """The struct as C++, to be read, compiled, or copied into ``csrc/cells``. Same function, same text."""
        return self._printed.text

    def eager(
        self,
        x: Sequence[Tensor],
        rec: Sequence[Tensor | Callable[[Tensor], Tensor]],
        states: Sequence[Tensor],
        parameters: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:
        """One step as torch operations, differentiable by autograd: the reference of the kernels.

        Args:
            x: of each gate, W_ih x_t + b_ih [B, H].
            rec: of each gate, W_hh h_{t-1} + b_hh [B, H]; of a gate that is called, that or a function of its operand.
            states: of step t-1 [B, H].
            parameters: [H] or [B, H].

        Returns:
            The states of step t [B, H].

        Raises:
            ValueError: too few values or too many. TypeError: a value is no tensor, nor a function for a called gate.
        """
        graph, known = self.trace.graph, {}
        wanted = (("x", x, self.gates), ("rec", rec, self.gates), ("states", states, self.states),
                  ("parameters", parameters, self.parameters))  # fmt: skip
        for what, values, names in wanted:
            if len(values) != len(names):
                listed = f" ({', '.join(names)})" if names else ""
                raise ValueError(f"{what} of {self.name} must be {len(names)} values{listed}, got {len(values)}")
        for kind, values in (("x", x), ("state", states), ("unit", parameters)):
            known |= {graph.leaf(kind, i): value for i, value in enumerate(values)}
        known |= {graph.leaf("rec", g): value for g, value in enumerate(rec) if isinstance(value, Tensor)}
        for gate, value in enumerate(rec):
            if not isinstance(value, Tensor):
                if gate not in self.trace.operands or not callable(value):
                    kind, given = "a tensor", type(value).__name__
                    kind += ", or a function of its operand" if gate in self.trace.operands else ""
                    raise TypeError(f"rec.{self.gates[gate]} of {self.name} must be {kind}, got {given}")
                known[graph.leaf("rec", gate)] = value(evaluate([self.trace.operands[gate][0]], known)[0])
        return tuple(evaluate(self.trace.results, known))

    def step(
        self, x: Tensor, states: Sequence[Tensor], w_hh: Tensor | None, b_hh: Tensor | None = None,
        parameters: Sequence[Tensor] = (),
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """One step as torch operations, with its products.

        Args:
            x: W_ih x_t + b_ih [B, G*H], gates in the cell's order.
            states: of step t-1 [B, H].
            w_hh: [G*H, H], or None of a cell without a product.
            b_hh: [G*H] or None.
            parameters: [H] each.

        Returns:
            The states of step t [B, H].
        """
        count = len(self.gates)
        blocks = w_hh.chunk(count) if w_hh is not None else [None] * count
        biases = b_hh.chunk(count) if b_hh is not None else [None] * count

        def product(gate: int) -> Callable[[Tensor], Tensor]:
            if not self.trace.product:  # rec is b_hh alone
                return lambda h: zeros_like(h) if biases[gate] is None else biases[gate].expand_as(h)
            return lambda operand: linear(operand, blocks[gate], biases[gate])

        rec = [product(g) if g in self.trace.operands else product(g)(states[0]) for g in range(count)]
        return self.eager(x.chunk(count, -1), rec, states, parameters)
