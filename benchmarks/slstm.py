"""The command ``python -m benchmarks.slstm``: SLSTM beside a loop of torch operations, and with ``--peers`` beside the
step of its authors' package (xlstm of requirements-peers.txt), in the same loop.

All with the same weights. Both loops multiply the input of all steps at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid

import fusedrnn

from . import beside_loops
from .beside_loops import SHAPES, Beside, Data, title_of

__all__ = ["CELLS", "contenders"]

Step = Callable[[Tensor, Tensor], Tensor]  # (arguments of the gates, states (4, B, H)) -> states


def step(a: Tensor, states: Tensor) -> Tensor:
    """By the paper, with the beginning of the authors' package."""
    _, c, n, m = states
    a_i, a_f, a_z, a_o = a.chunk(4, 1)
    carried = logsigmoid(a_f) + m
    m = torch.where(n == 0, a_i, torch.maximum(carried, a_i))
    i, f = torch.exp(a_i - m), torch.exp(torch.minimum(carried - m, torch.zeros_like(m)))
    c, n = f * c + i * torch.tanh(a_z), f * n + i
    return torch.stack([torch.sigmoid(a_o) * c / n, c, n, m])


def step_of_xlstm() -> Step:
    """The authors' own, without their products."""
    from xlstm.blocks.slstm.src.vanilla.slstm import slstm_forward_pointwise

    def of_xlstm(a: Tensor, states: Tensor) -> Tensor:
        return slstm_forward_pointwise(a, torch.zeros_like(a), a.new_zeros(1, a.size(1)), states, {})[0]

    return of_xlstm


def loop_of(step: Step) -> Callable[[Tensor, list[Tensor]], Tensor]:
    def loop(x: Tensor, weights: list[Tensor]) -> Tensor:
        w_ih, w_hh, b_ih, b_hh = weights
        B, H = x.size(1), w_ih.size(0) // 4
        states, outputs = x.new_zeros(4, B, H), []
        for a in linear(x, w_ih, b_ih + b_hh).unbind(0):
            states = step(a + recurrent(states[0], w_hh), states)
            outputs.append(states[0])
        return torch.stack(outputs)

    return loop


def recurrent(h: Tensor, w_hh: Tensor) -> Tensor:
    """W_hh h, by heads where W_hh is: (N, 4*H/N, H/N)."""
    if w_hh.dim() == 2:
        return linear(h, w_hh)
    (B, H), heads = h.shape, w_hh.size(0)
    of_heads = torch.bmm(h.view(B, heads, -1).transpose(0, 1), w_hh.mT)  # (N, B, 4*H/N)
    return of_heads.view(heads, B, 4, -1).permute(1, 2, 0, 3).reshape(B, 4 * H)


#: For each how many heads.
CELLS = {"slstm": 1, "slstm_4_heads": 4}


def contenders(name: str, shape: Sequence[int], mode: str, args: argparse.Namespace) -> Beside:
    """What there is to time; args.peers: the step of xlstm too."""
    data = Data.drawn(shape, mode)
    sizes = shape[2:]
    module = fusedrnn.SLSTM(*sizes, num_heads=CELLS[name])
    weights = list(module.parameters())
    calls = {
        "layer": data.of_layer(module),
        "LSTM": data.of_layer(fusedrnn.LSTM(*sizes)),
        "loop": data.of_loop(loop_of(step), weights),
    }
    if args.peers:
        calls["xlstm"] = data.of_loop(loop_of(step_of_xlstm()), weights)
    return Beside(title_of(name, shape, mode), calls, others=frozenset({"LSTM"}))


def main(argv: Sequence[str] | None = None) -> None:
    command = beside_loops.parser("slstm", __doc__, CELLS)
    command.add_argument("--peers", action="store_true", help="the step of xlstm too (requirements-peers.txt)")
    beside_loops.print_rows(command, argv, CELLS, SHAPES, contenders)


if __name__ == "__main__":
    main()
