"""Single steps in the place of torch.nn's cells: same constructors, parameters, state_dict and errors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_compiling

from . import options
from .cells import CELLS
from .functional import recurrent_cell
from .fused_module import FusedModule, as_states
from .inference.plain_call import plain_call
from .layer.heads import block_diagonal
from .torch_internals import usual_weights_of_cell


def forward_cell(
    module: torch.nn.RNNCellBase, name: str, input: Tensor, states: Sequence[Tensor] | None
) -> tuple[Tensor, ...]:
    """What the single-step modules share."""
    options.of(module)  # raises
    cell = options.cell_of(module)
    found = _plain(module, cell, input, states)
    if found is not None:
        return found[1:]
    if input.dim() not in (1, 2):
        raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    count, states = len(CELLS[cell].states), as_states(states, cell)
    for index, state in enumerate(states or ()):
        if state.dim() not in (1, 2):
            what = f"hx[{index}]" if count > 1 else "hidden"
            raise ValueError(f"{name}: Expected {what} to be 1D or 2D, got {state.dim()}D instead")
    batched = input.dim() == 2
    w_ih, w_hh = module.weight_ih, module.weight_hh  # once: a parametrized weight is computed at each look-up
    for weight_name, weight in (("weight_ih", w_ih), ("weight_hh", w_hh)):
        if not isinstance(weight, Tensor):
            raise TypeError(f"{weight_name} must be a tensor, got {type(weight).__name__}")
    if getattr(module, "num_heads", 1) > 1:
        w_hh = block_diagonal(w_hh)
    if states is None and w_hh.size(-1) != module.hidden_size:
        got, expected = module.hidden_size, w_hh.size(-1)
        raise RuntimeError(f"hidden0 has inconsistent hidden_size: got {got}, expected {expected}")
    if states is not None:
        states = [state if batched else state.unsqueeze(0) for state in states]
    result = recurrent_cell(
        cell,
        input if batched else input.unsqueeze(0),
        states or (None,) * count,
        w_ih,
        w_hh,
        module.bias_ih,
        module.bias_hh,
        module.weight_unit if CELLS[cell].has_unit_weight else None,
    )
    return result if batched else tuple(state.squeeze(0) for state in result)


def _plain(
    module: torch.nn.RNNCellBase, cell: str, input: Tensor, states: Sequence[Tensor] | None
) -> tuple[Tensor, ...] | None:
    """A batch through a cell, checked by the kernels alone; None where anything is different."""
    weights = None if is_compiling() else usual_weights_of_cell(module, CELLS[cell].has_unit_weight)
    if weights is None:
        return None  # computed or replaced
    form = 2, 1, 1, module.input_size, module.hidden_size, module.hidden_size
    return plain_call(module, cell, form, input, states, weights)


class RNNCell(FusedModule, torch.nn.RNNCell):
    """One step of :class:`RNN`, in the place of :class:`torch.nn.RNNCell`: input (B, I), h (B, H) -> h (B, H)."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return forward_cell(self, "RNNCell", input, None if hx is None else (hx,))[0]


class LSTMCell(FusedModule, torch.nn.LSTMCell):
    """One step of :class:`LSTM`, in the place of :class:`torch.nn.LSTMCell`: input (B, I), (h, c) -> (h, c)."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        return forward_cell(self, "LSTMCell", input, hx)


_TorchGRUCell = torch.nn.GRUCell  # people give this name of torch.nn to our class


class GRUCell(FusedModule, _TorchGRUCell):
    """One step of :class:`GRU`, in the place of :class:`torch.nn.GRUCell`: input (B, I), h (B, H) -> h (B, H).

    ``reset_after``: True; the reset gate after the product, as in torch.nn. False: before it, as first published.
    """

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None, *, reset_after: bool = True,
    ) -> None:  # fmt: skip
        _TorchGRUCell.__init__(self, input_size, hidden_size, bias, device, dtype)
        options.tell(self, {"reset_after": reset_after})

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        return forward_cell(self, "GRUCell", input, None if hx is None else (hx,))[0]


class FusedCellBase(FusedModule, torch.nn.RNNCellBase):
    """One step of a cell that torch.nn does not have: a subclass says which, ``_cell``, its name in the registry.

    Arguments, parameters and shapes as :class:`torch.nn.GRUCell`'s, with the cell's G gates: weight_ih (G*H, I),
    weight_hh (G*H, H). Parameters of the units are weight_unit (U*H), or weight_hh (U*H) where gates multiply no h.
    """

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        info = CELLS[self._cell]
        vars(self)["reset_parameters"] = lambda: None  # not before they are there
        super().__init__(input_size, hidden_size, bias, len(info.gates), device, dtype)
        del vars(self)["reset_parameters"]
        units = torch.nn.Parameter(self.weight_hh.new_empty(len(info.parameters) * hidden_size))
        if info.has_unit_weight:
            self.weight_unit = units
        elif not info.product:
            self.weight_hh = units
        self.reset_parameters()
        options.of(self)

    def forward(
        self, input: Tensor, hx: Tensor | tuple[Tensor, Tensor] | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        two = len(CELLS[options.cell_of(self)].states) == 2
        found = forward_cell(self, type(self).__name__, input, hx if two or hx is None else (hx,))
        return found if two else found[0]
