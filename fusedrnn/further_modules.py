"""Layers of cells that torch.nn does not have, by :class:`fusedrnn.modules.FusedRNNBase`: everything that fusedrnn's
other layers can do, with other equations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import options
from .cells import CELLS
from .fused_module import FusedModule
from .modules import FusedRNNBase, document
from .single_step import FusedCellBase, forward_cell
from .torch_internals import own_parameters

__all__ = [
    "IndRNN", "IndRNNCell", "LayerNormGRU", "LayerNormGRUCell", "LayerNormLSTM", "LayerNormLSTMCell", "MGU", "MGUCell",
    "PeepholeLSTM", "PeepholeLSTMCell", "SLSTM", "SLSTMCell",
]  # fmt: skip


@document
class MGU(FusedRNNBase):
    """Minimal gated unit: f = sigmoid(W_if x_t + b_if + W_hf h_{t-1} + b_hf), h_t = (1 - f) * h_{t-1} + f * n with
    n = tanh(W_in x_t + b_in + W_hn (f * h_{t-1}) + b_hn) (Zhou et al. 2016).

    Arguments and shapes as :class:`torch.nn.GRU`'s, with two gates: W_ih (2*H, I), W_hh (2*H, H).
    Derivation: docs/derivations.md, section U.
    """

    _cell = "mgu"


@document
class PeepholeLSTM(FusedRNNBase):
    """LSTM whose gates see the cell through peepholes p (Gers and Schmidhuber 2000):

    i = sigmoid(a_i + p_i * c_{t-1}), f = sigmoid(a_f + p_f * c_{t-1}), g = tanh(a_g), c_t = f * c_{t-1} + i * g,
    o = sigmoid(a_o + p_o * c_t), h_t = o * tanh(c_t), where a = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh by gate.

    Arguments, states and shapes as :class:`torch.nn.LSTM`'s, without ``proj_size``. For each layer and direction one
    parameter more, weight_unit_l{k} (3*H): p_i, p_f, p_o. All begin as torch.nn's do, uniform within 1 / sqrt(H).
    Derivation: docs/derivations.md, section Q.
    """

    _cell = "peephole_lstm"


@document
class IndRNN(FusedRNNBase):
    """Independently recurrent units: h_t = g(W_ih x_t + b_ih + u * h_{t-1} + b_hh), g relu or tanh (Li et al. 2018).

    A unit hears of itself alone, through its own factor u. Arguments and shapes as :class:`torch.nn.RNN`'s, but
    weight_hh_l{k} (H) is u, which begins uniform in [0, 1], the rest as torch.nn's.
    Derivation, and how |u| bounds the gradient over time: docs/derivations.md, section I.
    """

    _cell = "indrnn_relu"

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, nonlinearity: str = "relu",
        bias: bool = True, batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False,
        device: torch.device | str | int | None = None, dtype: torch.dtype | None = None, **options: Any,
    ) -> None:  # fmt: skip
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self._cell = f"indrnn_{nonlinearity}"
        sizes = (input_size, hidden_size, num_layers)
        super().__init__(*sizes, bias, batch_first, dropout, bidirectional, device, dtype, **options)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As torch.nn's, and u uniform in [0, 1]."""
        super().reset_parameters()
        for name, parameter in own_parameters(self).items():
            if name.startswith("weight_hh"):
                parameter.uniform_(0, 1)

    @property
    def nonlinearity(self) -> str:
        """ "tanh" or "relu", as the constructor was told."""
        return self._cell.removeprefix("indrnn_")

    def extra_repr(self) -> str:
        """As the others', and the nonlinearity."""
        return super().extra_repr() + (", nonlinearity=tanh" if self.nonlinearity == "tanh" else "")


class MGUCell(FusedCellBase):
    """One step of :class:`MGU`: input (B, I), h (B, H) -> h (B, H)."""

    _cell = "mgu"


class PeepholeLSTMCell(FusedCellBase):
    """One step of :class:`PeepholeLSTM`: input (B, I), (h, c) of (B, H) each -> (h, c). Its parameters, without the
    layer's number: weight_unit (3*H).
    """

    _cell = "peephole_lstm"


class IndRNNCell(FusedCellBase):
    """One step of :class:`IndRNN`: input (B, I), h (B, H) -> h (B, H). weight_hh (H) is u."""

    _cell = "indrnn_relu"

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, nonlinearity: str = "relu",
        device: torch.device | str | int | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self._cell = f"indrnn_{nonlinearity}"
        super().__init__(input_size, hidden_size, bias, device, dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As torch.nn's, and u uniform in [0, 1]."""
        super().reset_parameters()
        self.weight_hh.uniform_(0, 1)

    @property
    def nonlinearity(self) -> str:
        """ "tanh" or "relu", as the constructor was told."""
        return self._cell.removeprefix("indrnn_")

    def extra_repr(self) -> str:
        """As torch.nn's, and the nonlinearity."""
        return super().extra_repr() + (", nonlinearity=tanh" if self.nonlinearity == "tanh" else "")


@torch.no_grad()
def reset_gains(module: torch.nn.Module) -> None:
    """The gains of a layer or cell with layer normalisation: ones, and c's bias: zeros."""
    for name, parameter in own_parameters(module).items():
        if name.startswith("weight_unit"):
            parameter.fill_(1)
            if CELLS[options.cell_of(module)].norms == 2:
                parameter[-module.hidden_size :] = 0


@document
class LayerNormLSTM(FusedRNNBase):
    """LSTM with layer normalisation (Ba, Kiros and Hinton 2016, equations 20 to 22 of the supplement):

    a = LN(W_ih x_t; g_x) + b_ih + LN(W_hh h_{t-1}; g_h) + b_hh, i = sigmoid(a_i), f = sigmoid(a_f), g = tanh(a_g),
    o = sigmoid(a_o), c_t = f * c_{t-1} + i * g, h_t = o * tanh(LN(c_t; g_c) + b_c). LN(v; g) = g * (v - mean(v)) /
    sqrt(var(v) + 1e-5), over the 4*H values of a row of W_ih x_t, those of W_hh h_{t-1}, and the H values of c_t.

    Arguments, states and shapes as :class:`torch.nn.LSTM`'s, without ``proj_size``. For each layer and direction one
    parameter more, weight_unit_l{k} (10*H): g_x and g_h by gate, g_c, b_c. Gains begin as ones, b_c as zeros, the rest
    as torch.nn's, uniform within 1 / sqrt(H). Derivation: docs/derivations.md, section N.
    """

    _cell = "layer_norm_lstm"

    def reset_parameters(self) -> None:
        """As torch.nn's; gains are ones, c's bias zeros."""
        super().reset_parameters()
        reset_gains(self)


@document
class LayerNormGRU(FusedRNNBase):
    """GRU with layer normalisation, the reset gate after the product:

    x = LN(W_ih x_t; g_x) + b_ih, v = LN(W_hh h_{t-1}; g_h) + b_hh by gate, r = sigmoid(x_r + v_r),
    z = sigmoid(x_z + v_z), n = tanh(x_n + r * v_n), h_t = (1 - z) * n + z * h_{t-1}. LN(v; g) = g * (v - mean(v)) /
    sqrt(var(v) + 1e-5), over the 3*H values of a row of W_ih x_t, and those of W_hh h_{t-1}, as Haste has it. (Ba,
    Kiros and Hinton 2016 take statistics over r and z and over n apart, and exchange z and 1 - z.)

    Arguments, states and shapes as :class:`torch.nn.GRU`'s. For each layer and direction one parameter more,
    weight_unit_l{k} (6*H): g_x and g_h by gate. Gains begin as ones, the rest as torch.nn's. Derivation:
    docs/derivations.md, section N.
    """

    _cell = "layer_norm_gru"

    def reset_parameters(self) -> None:
        """As torch.nn's; gains are ones."""
        super().reset_parameters()
        reset_gains(self)


class LayerNormLSTMCell(FusedCellBase):
    """One step of :class:`LayerNormLSTM`: input (B, I), (h, c) of (B, H) each -> (h, c). weight_unit (10*H)."""

    _cell = "layer_norm_lstm"

    def reset_parameters(self) -> None:
        """As torch.nn's; gains are ones, c's bias zeros."""
        super().reset_parameters()
        reset_gains(self)


class LayerNormGRUCell(FusedCellBase):
    """One step of :class:`LayerNormGRU`: input (B, I), h (B, H) -> h (B, H). weight_unit (6*H)."""

    _cell = "layer_norm_gru"

    def reset_parameters(self) -> None:
        """As torch.nn's; gains are ones."""
        super().reset_parameters()
        reset_gains(self)


@document
class SLSTM(FusedRNNBase):
    """LSTM with exponential input gates and a normaliser, sLSTM (Beck et al. 2024, xLSTM):

    a = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh by gate i, f, z, o; z = tanh(a_z), o = sigmoid(a_o),
    m_t = max(log sigmoid(a_f) + m_{t-1}, a_i), i = exp(a_i - m_t), f = exp(log sigmoid(a_f) + m_{t-1} - m_t),
    c_t = f * c_{t-1} + i * z, n_t = f * n_{t-1} + i, h_t = o * c_t / n_t.

    m_t is a scale that no h depends on: c_t and n_t stand for c_t e^m_t and n_t e^m_t, which might overflow. Where
    n_{t-1} is not positive there is no state before: m_t = a_i and f = 0, so that c_0 and m_0 count only with n_0 > 0.
    States all zero, the default, are such a beginning, as in the authors' package.

    Arguments and shapes as :class:`torch.nn.LSTM`'s, without ``proj_size``; W_ih (4*H, I), W_hh (4*H, H). The states,
    hx and the final ones, are (h, c, n, m), (L*D, B, H) each. zoneout is (p, 0.0), of h alone.
    num_heads: 1; N > 1, which divides H: units multiply the h of their own head alone, and weight_hh_l{k} is
    (N, 4*H/N, H/N), the diagonal blocks of W_hh. The parameters begin as torch.nn's do, uniform within 1 / sqrt(H), but
    the forget gate's biases: unit k of the d = H/N of a head 5 - 12 (k / (d - 1))^0.3, as in the authors' package.
    Errors: ValueError where num_heads does not divide H. Derivation: docs/derivations.md, section X.
    """

    _cell = "slstm"

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
        batch_first: bool = False, dropout: float = 0.0, bidirectional: bool = False,
        device: torch.device | str | int | None = None, dtype: torch.dtype | None = None, *,
        num_heads: int = 1, **options: Any,
    ) -> None:  # fmt: skip
        _check_heads(num_heads, hidden_size)
        vars(self)["num_heads"] = num_heads
        sizes = (input_size, hidden_size, num_layers)
        super().__init__(*sizes, bias, batch_first, dropout, bidirectional, device, dtype, **options)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As torch.nn's, and the forget gate's biases by a power law."""
        super().reset_parameters()
        _forget_by_power_law(self)

    def extra_repr(self) -> str:
        """As the others', and the heads."""
        return super().extra_repr() + (f", num_heads={self.num_heads}" if self.num_heads > 1 else "")


class SLSTMCell(FusedModule, torch.nn.RNNCellBase):
    """One step of :class:`SLSTM`: input (B, I), (h, c, n, m) of (B, H) each or None for zeros -> (h, c, n, m).

    Parameters weight_ih (4*H, I), weight_hh (4*H, H) or, with N heads, (N, 4*H/N, H/N), bias_ih and bias_hh (4*H),
    gates i, f, z, o; they begin as the layer's. Also without the batch: (I) and (H).
    """

    _cell = "slstm"

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None, *, num_heads: int = 1,
    ) -> None:  # fmt: skip
        _check_heads(num_heads, hidden_size)
        vars(self)["num_heads"] = num_heads
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)
        if num_heads > 1:
            shape = num_heads, 4 * hidden_size // num_heads, hidden_size // num_heads
            self.weight_hh = torch.nn.Parameter(self.weight_hh.detach().view(-1)[: shape[1] * hidden_size].view(shape))
        options.tell(self, {})

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As the layer's."""
        super().reset_parameters()
        _forget_by_power_law(self)

    def forward(self, input: Tensor, hx: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
        return forward_cell(self, "SLSTMCell", input, hx)

    def extra_repr(self) -> str:
        """As torch.nn's, and the heads."""
        return super().extra_repr() + (f", num_heads={self.num_heads}" if self.num_heads > 1 else "")


def _check_heads(num_heads: int, hidden_size: int) -> None:
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"num_heads must be an int, got {type(num_heads).__name__}")
    if num_heads < 1 or (isinstance(hidden_size, int) and hidden_size % num_heads):
        raise ValueError(f"num_heads must divide hidden_size, got {num_heads} and {hidden_size}")


def _forget_by_power_law(module: SLSTM | SLSTMCell) -> None:
    """The biases of the forget gate: 5 - 12 (k / (d - 1))^0.3 for unit k of the d of a head."""
    of_head = module.hidden_size // module.num_heads
    place = torch.arange(of_head, dtype=torch.float64, device="cpu") / max(of_head - 1, 1)
    value = (5 - 12 * place**0.3).repeat(module.num_heads)
    for name, parameter in own_parameters(module).items():
        if name.startswith("bias") and parameter is not None:
            parameter.chunk(4)[1].copy_(value if name.startswith("bias_ih") else torch.zeros_like(value))
