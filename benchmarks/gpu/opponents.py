"""Other people's kernels for recurrent layers on a GPU, where their packages are installed: FlashRNN and TorchRL.

Each computes torch.nn's layer from its weights, one layer of one direction on a dense batch, with the product of the
input that torch.nn's time holds too. Both want x as (B, T, I): they get it so, and their time holds no copy.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["OPPONENTS", "available"]

#: From torch.nn's layer, what maps x (B, T, I) to y (B, T, H); the leaves of its gradients. None: it has no such layer.
Opponent = Callable[[nn.RNNBase, str], tuple[Callable[[Tensor], Tensor], list[Tensor]] | None]


def leaves_of(layer: nn.RNNBase, dtype: torch.dtype) -> list[Tensor]:
    """w_ih, w_hh, b_ih and b_hh of a single layer, apart from the layer's own."""
    return [weight.detach().to(dtype).clone().requires_grad_() for weight in layer.parameters()]


def flashrnn(layer: nn.RNNBase, dtype: str, backend: str | None = None):
    """FlashRNN (arXiv 2412.07752): LSTM by its fused kernel, GRU, for which it has none, by the other.

    Wx is (B, T, G, heads, H), R (G, heads, H, H), b (G, heads, H); the LSTM's gates i, f, g, o are torch.nn's. The
    GRU's R has n, r, z and its Wx r, z, n; its b has those of R, then of W for n.
    """
    if layer.mode not in ("LSTM", "GRU") or dtype == "tf32":
        return None
    run = importlib.import_module("flashrnn").flashrnn
    leaves, H = leaves_of(layer, layer.weight_ih_l0.dtype), layer.hidden_size
    w_ih, w_hh, b_ih, b_hh = leaves
    gates = w_ih.size(0) // H
    function, options = layer.mode.lower(), {"dtype": str(w_ih.dtype).removeprefix("torch.")}
    options["backend"] = backend or ("cuda_fused" if function == "lstm" else "cuda")

    def forward(x: Tensor) -> Tensor:
        projected = F.linear(x, w_ih).unflatten(-1, (gates, 1, H))
        recurrent, b_w, b_r = (t.unflatten(0, (gates, H)) for t in (w_hh, b_ih, b_hh))
        if function == "lstm":
            bias = b_w + b_r
        else:
            recurrent, bias = recurrent.roll(1, 0), torch.stack([b_r[2], b_r[0] + b_w[0], b_r[1] + b_w[1], b_w[2]])
        states, _ = run(projected, recurrent.unsqueeze(1), bias.unsqueeze(1), function=function, **options)
        return states[0].flatten(-2)

    return forward, leaves


def torchrl(layer: nn.RNNBase, dtype: str):
    """TorchRL's Triton kernels, without resets. Tensors are float32; bfloat16 is that of its products."""
    if layer.mode not in ("LSTM", "GRU") or dtype == "float16":
        return None
    kernels = importlib.import_module("torchrl.modules.tensordict_module._rnn_triton")
    leaves = leaves_of(layer, torch.float32)
    run = kernels.lstm_triton if layer.mode == "LSTM" else kernels.gru_triton
    options = {"compute_dtype": torch.bfloat16 if dtype == "bfloat16" else torch.float32}
    options["input_precision"] = "ieee" if dtype == "float32" else "tf32"

    def forward(x: Tensor) -> Tensor:
        zeros = x.new_zeros(*x.shape[:2], layer.hidden_size, dtype=torch.float32)
        states = (zeros, zeros) if layer.mode == "LSTM" else (zeros,)
        never = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        return run(x.float(), *states, *leaves, never, **options)[0]

    return forward, leaves


OPPONENTS: dict[str, Opponent] = {"flashrnn": flashrnn, "torchrl": torchrl}


def available() -> dict[str, Opponent]:
    """Those whose package is installed."""
    return {name: opponent for name, opponent in OPPONENTS.items() if importlib.util.find_spec(name)}
