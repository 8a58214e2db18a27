"""Layers of cells that torch.nn does not have, by :class:`fusedrnn.modules.FusedRNNBase`: everything that fusedrnn's
other layers can do, with other equations.
"""

from __future__ import annotations

from typing import Any

import torch

from .modules import FusedRNNBase, document
from .torch_internals import own_parameters

__all__ = ["IndRNN", "MGU", "PeepholeLSTM"]


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
