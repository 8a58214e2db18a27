"""Initialisers of recurrent layers, gate by gate, in the style of torch.nn.init: in place, no gradient recorded.

Each takes an RNN, LSTM, GRU or a cell of one, torch.nn's or fusedrnn's, subclasses too, and returns it. What cannot be
done raises before any parameter changes. On the meta device nothing is drawn. In a finished model:

>>> for module in model.modules():
...     if isinstance(module, torch.nn.LSTM):
...         fusedrnn.init.chrono_(module, T_max=500)
"""

from __future__ import annotations

import math
from numbers import Real
from typing import TypeVar

import torch
from torch import Generator, Tensor, nn

from .cells import CELLS, CellInfo
from .options import cell_of, of
from .torch_internals import own_parameters

__all__ = ["chrono_", "forget_bias_", "orthogonal_"]

_Module = TypeVar("_Module", bound=nn.Module)


@torch.no_grad()
def orthogonal_(module: _Module, gain: float = 1.0, generator: Generator | None = None) -> _Module:
    """Make every gate's block W_k of every recurrent weight orthogonal: W_k^T W_k = gain^2 (Saxe et al. 2014).

    weight_hh of each layer and direction is (G*H, R), of G blocks (H, R); R is proj_size, or H without, and a block
    with R < H has orthonormal columns times ``gain``. So W_k changes no norm but by ``gain``. Of the whole matrix,
    torch.nn.init.orthogonal_ would make a block that shrinks by sqrt(G) in the mean. Where weight_hh is by heads
    (SLSTM), so is each head's block of a gate. Nothing else is changed, weight_hr neither. The draws are those of
    torch.nn.init.orthogonal_, block by block; float16 and bfloat16 draw in float32.

    Raises:
        TypeError: ``module`` is not a recurrent layer or cell, ``gain`` not a number.
        ValueError: a recurrent weight is parametrized or pruned, or a vector (IndRNN), ``gain`` is not finite.
    """
    info = _info(module)
    if not info.product:
        raise ValueError(f"{type(module).__name__} has no matrix to make orthogonal: its weight_hh is a vector")
    gain = _number("gain", gain)
    weights = _parameters(module, "weight_hh")
    heads = [head for weight in weights for head in (weight if weight.dim() == 3 else [weight])]  # (SLSTM), or one
    for weight in heads:
        for block in weight.chunk(len(info.gates)):
            drawn = torch.empty_like(block, dtype=torch.promote_types(block.dtype, torch.float32))
            block.copy_(nn.init.orthogonal_(drawn, gain, generator))
    return module


@torch.no_grad()
def forget_bias_(module: _Module, value: float = 1.0) -> _Module:
    """Set the bias of the gate that keeps the state (:class:`CellInfo`; LSTM: f, GRU: z): b_ih + b_hh = value. Of a
    cell with a gate that takes alone (MGU: f), b_ih + b_hh = -value: what it does not take is kept.

    torch.nn adds two biases of (G*H). Here the gate's H rows of bias_ih get ``value`` and those of bias_hh zero: with
    ``value`` in both the sum is twice that, and with it in one the noise of the other stays. Without input and state
    the gate is then sigmoid(value), 0.73 for 1, and what a unit holds lasts 1 / (1 - 0.73) = 3.7 steps, not 2. LSTM:
    Gers et al. 2000, Jozefowicz et al. 2015 (value 1). The GRU's z does what f does: h_t = (1 - z) * n + z * h_{t-1};
    papers that exchange z and 1 - z want the negative bias.

    Raises:
        TypeError: ``module`` is not a recurrent layer or cell, ``value`` not a number.
        ValueError: no gate keeps the state (RNN, ResidualRNN) or is known to (cells by fusedrnn.cell), no bias or a
            parametrized one, ``value`` is not finite.
    """
    info, layers = _biases(module)
    value = _number("value", value)
    gate, sign = (info.takes, -1) if info.keeps is None else (info.keeps, 1)
    for gates in layers:
        _set(gates[gate], torch.full_like(gates[gate][0], sign * value))
    return module


@torch.no_grad()
def chrono_(module: _Module, T_max: float, T_min: float = 2.0, generator: Generator | None = None) -> _Module:
    """Draw time scales of T_min to T_max steps, one for each unit: chrono initialisation (Tallec and Ollivier 2018).

    LSTM: b_f = log(u), b_i = -b_f; GRU: b_z = log(u), z as in h_t = (1 - z) * n + z * h_{t-1}; MGU: b_f = -log(u);
    other cells by ``keeps`` and ``takes`` of their :class:`CellInfo`. u of (H), each layer's and direction's own, is
    uniform on [T_min - 1, T_max - 1], by default the paper's [1, T_max - 1]. Without input and state the gate is
    u / (1 + u), so that a unit forgets in 1 / (1 - f) = 1 + u steps. b is bias_ih + bias_hh: bias_ih gets it all, those
    rows of bias_hh zero; the other gates stay. float16 and bfloat16 draw in float32.

    Raises:
        TypeError: ``module`` is not a recurrent layer or cell, ``T_max`` or ``T_min`` not a number.
        ValueError: no gate keeps the state (RNN, ResidualRNN) or is known to (cells by fusedrnn.cell), no bias or a
            parametrized one; not 2 <= T_min < T_max.
    """
    info, layers = _biases(module)
    T_max, T_min = _number("T_max", T_max), _number("T_min", T_min)
    if not 2 <= T_min < T_max:
        raise ValueError(f"T_min and T_max must be 2 <= T_min < T_max, got T_min {T_min}, T_max {T_max}")
    for gates in layers:
        rows = gates[info.keeps or info.takes][0]
        u = torch.empty_like(rows, dtype=torch.promote_types(rows.dtype, torch.float32))
        bias = u.uniform_(T_min - 1, T_max - 1, generator=generator).log_()
        if info.keeps is not None:
            _set(gates[info.keeps], bias)
        if info.takes is not None:
            _set(gates[info.takes], -bias)
    return module


def _info(module: nn.Module) -> CellInfo:
    if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        raise TypeError(f"module must be an RNN, LSTM, GRU or a cell of one, got {type(module).__name__}")
    of(module)  # raises
    return CELLS[cell_of(module)]


def _parameters(module: nn.Module, kind: str) -> list[Tensor]:
    """The parameters weight_hh, bias_ih or bias_hh of every layer and direction; of a cell the one."""
    names = [kind]
    if isinstance(module, nn.RNNBase):
        directions = ("", "_reverse")[: 1 + module.bidirectional]
        names = [f"{kind}_l{layer}{direction}" for layer in range(module.num_layers) for direction in directions]
    parameters = own_parameters(module)
    for name in names:
        if parameters.get(name) is None:
            raise ValueError(f"{name} must be a Parameter: initialise before it is parametrized or pruned")
    return [parameters[name] for name in names]


def _biases(module: nn.Module) -> tuple[CellInfo, list[dict[str, tuple[Tensor, Tensor]]]]:
    """The cell; for each layer and direction, by gate, the rows (H) of bias_ih and of bias_hh."""
    info = _info(module)
    gates = info.gates
    if info.added:
        raise ValueError(
            f"{type(module).__name__}: a cell made by fusedrnn.cell does not say which of its gates keeps the state:"
            " set the rows of its biases yourself, one block of H for each gate, in the order of gates"
        )
    if info.keeps is None and info.takes is None:
        raise ValueError(f"{type(module).__name__} has no gate that keeps the state: expected an LSTM, GRU or cell")
    if not module.bias:
        raise ValueError(f"{type(module).__name__} must have biases, got bias=False")
    pairs = list(zip(_parameters(module, "bias_ih"), _parameters(module, "bias_hh")))
    if any(ih is hh for ih, hh in pairs):
        raise ValueError("bias_ih and bias_hh must be two Parameters, got the same one twice")
    return info, [dict(zip(gates, zip(*(bias.chunk(len(gates)) for bias in pair)))) for pair in pairs]


def _set(rows: tuple[Tensor, Tensor], value: Tensor) -> None:
    rows[0].copy_(value)
    rows[1].zero_()


def _number(name: str, value: float) -> float:
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)
