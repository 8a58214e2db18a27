"""What is known of a user's function while it runs with symbols, and after."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .errors import CellError, Place, current_place
from .graph import Graph, Node


@dataclass
class Trace:
    """What a function did: its gates, states and parameters by name, its graph, its results.

    Attributes:
        operands: of the gates that were called, what their rows of W_hh multiply, and where they were called.
        plain: gates whose rec was used as it is, and where.
        with_gradients: whether torch computes gradients where the function is traced.
        product: whether any gate multiplies h, or an operand.
        results: the new states, in the order of ``states``.
        names: the user's names of values: the function's local variables when it returned.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    parameters: tuple[str, ...]
    place: Place
    graph: Graph = field(default_factory=lambda: Graph(current_place))
    operands: dict[int, tuple[Node, Place | None]] = field(default_factory=dict)
    plain: dict[int, Place | None] = field(default_factory=dict)
    product: bool = True
    with_gradients: bool = field(default_factory=torch.is_grad_enabled)
    results: tuple[Node, ...] = ()
    names: dict[Node, str] = field(default_factory=dict)

    def fail(self, what: str, instead: str, place: Place | None = None) -> CellError:
        """To be raised: of the whole function, or of a line of it."""
        return CellError(f"{self.name}: {what}", instead, place or self.place)
