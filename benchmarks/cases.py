"""The registry: every case that is timed, and the number of operations it needs.

A case says what a layer is and what is done with it; measure.py does it. CASES holds all, by name. T time,
B batch, I input, H hidden, G gates, L layers, D directions, P size of a projection (0: none).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fusedrnn.cells import CELLS

__all__ = ["CASES", "CELL_NAMES", "CHOICES", "DTYPES", "REGIMES", "Case", "cell_names"]

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
CHOICES: dict[str, tuple[str, str, dict[str, Any]]] = {
    # as the command line and the tables name a cell -> as fusedrnn.cells does, the class of its layers, and options
    "lstm": ("lstm", "LSTM", {}),
    "gru": ("gru", "GRU", {}),
    "rnn": ("rnn_tanh", "RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("rnn_relu", "RNN", {"nonlinearity": "relu"}),
    "gru_before": ("gru_reset_before", "GRU", {"reset_after": False}),
    "residual": ("residual_rnn", "ResidualRNN", {}),
    "mgu": ("mgu", "MGU", {}),
    "peephole": ("peephole_lstm", "PeepholeLSTM", {}),
    "slstm": ("slstm", "SLSTM", {}),
    "indrnn": ("indrnn_tanh", "IndRNN", {"nonlinearity": "tanh"}),
    "indrnn_relu": ("indrnn_relu", "IndRNN", {"nonlinearity": "relu"}),
    "layer_norm_lstm": ("layer_norm_lstm", "LayerNormLSTM", {}),
    "layer_norm_gru": ("layer_norm_gru", "LayerNormGRU", {}),
}
CELL_NAMES = {name: cell for name, (cell, _, _) in CHOICES.items()}
MODES = ("infer", "train")
# Cases alike, whose speed much the same limits: (fewest B, most B, fewest H, most H) of one padded float32 layer with
# many steps. What fits none is "other".
_SIZES = {
    "B = 1, H <= 64": (1, 1, 1, 64),
    "B = 1, H 128 to 256": (1, 1, 128, 256),
    "B = 1, H >= 768": (1, 1, 768, 2**20),
    "B 4 to 16, H <= 96": (4, 16, 1, 96),
    "B >= 32, H 128 to 192": (32, 2**20, 128, 192),
    "B >= 32, H >= 256": (32, 2**20, 256, 2**20),
}
_MANY_STEPS = 20
REGIMES = (
    *_SIZES, "T = 1, B = 1, H = 128", "ragged, B = 32", "bfloat16, B >= 32, H >= 256", "two directions", "other"
)  # fmt: skip


def cell_names(text: str) -> list[str]:
    """The type of a ``--cells`` argument: names of CELL_NAMES, separated by commas."""
    cells = text.split(",")
    if unknown := sorted(set(cells) - set(CELL_NAMES)):
        raise argparse.ArgumentTypeError(f"unknown {', '.join(unknown)}; known are {', '.join(CELL_NAMES)}")
    return cells


@dataclass(frozen=True)
class Case:
    """One measurement: a cell, a shape and a mode.

    Attributes:
        cell: a key of CELL_NAMES.
        mode: ``infer`` (forward in inference mode) or ``train`` (forward and backward, gradients of the input
            and of every parameter).
        shape: (T, B, I, H).
        layers, directions, projection, dtype: as in torch.nn; ``projection`` is ``proj_size``.
        ragged: lengths fall evenly from T to T / B, in a PackedSequence.
        main: one of the default set.
    """

    cell: str
    mode: str
    shape: tuple[int, int, int, int]
    layers: int = 1
    directions: int = 1
    projection: int = 0
    dtype: str = "float32"
    ragged: bool = False
    main: bool = False

    @property
    def name(self) -> str:
        """Unique, and what ``--only`` looks in: ``lstm-train-T100-B32-I128-H128-P64-bfloat16``."""
        parts = [self.cell, self.mode, *(f"{letter}{size}" for letter, size in zip("TBIH", self.shape))]
        parts += [f"L{self.layers}"] * (self.layers > 1) + [f"P{self.projection}"] * (self.projection > 0)
        parts += ["bidirectional"] * (self.directions > 1) + ["ragged"] * self.ragged
        return "-".join(parts + [self.dtype] * (self.dtype != "float32"))

    @property
    def has_torch(self) -> bool:
        """Whether torch.nn has the cell."""
        _, layer, options = CHOICES[self.cell]
        return hasattr(torch.nn, layer) and "reset_after" not in options

    @property
    def regime(self) -> str:
        """What the case is an example of, one of REGIMES."""
        T, B, _, H = self.shape
        if self.layers > 1 or self.projection or self.cell not in ("lstm", "gru", "rnn"):
            return "other"
        if self.directions > 1:
            return "two directions"
        if self.ragged:
            return "ragged, B = 32" if B == 32 else "other"
        if self.dtype != "float32":
            alike = self.dtype == "bfloat16" and B >= 32 and H >= 256
            return "bfloat16, B >= 32, H >= 256" if alike else "other"
        if self.shape == (1, 1, 128, 128):
            return "T = 1, B = 1, H = 128"
        for name, (least, most, low, high) in _SIZES.items():
            if T >= _MANY_STEPS and least <= B <= most and low <= H <= high:
                return name
        return "other"

    def lengths(self) -> list[int]:
        """The length of each sequence of the batch, longest first."""
        T, B = self.shape[:2]
        return [max(1, round(T * (B - b) / B)) if self.ragged else T for b in range(B)]

    def flops(self) -> int:
        """Floating point operations of the matrix products alone; those of a training step count three times.

        One step of one sample takes 2 G H (I + R) in W_ih x and W_hh h, R = P or H being the size of h, and
        2 H P more in a projection; without a product with h it is 2 G H I. The backward pass computes the gradient of
        both operands of each product.
        """
        _, _, I, H = self.shape
        info, R = CELLS[CELL_NAMES[self.cell]], self.projection or H
        G, of_h = len(info.gates), R if info.product else 0
        step = 0
        for layer in range(self.layers):
            inputs = I if layer == 0 else self.directions * R
            step += self.directions * (2 * G * H * (inputs + of_h) + 2 * H * self.projection)
        return sum(self.lengths()) * step * (3 if self.mode == "train" else 1)


def _registry() -> Iterator[Case]:
    three = ("lstm", "gru", "rnn")
    middle = (100, 32, 128, 128)

    def each(
        cells: tuple[str, ...], shape: tuple[int, int, int, int], modes: tuple[str, ...] = MODES, **options
    ) -> Iterator[Case]:
        return (Case(cell, mode, shape, **options) for cell in cells for mode in modes)

    yield from each(three, middle, main=True)
    yield from each(three, (50, 64, 256, 256), main=True)
    yield from each(three, (1000, 8, 64, 64), main=True)
    for shape in (
        (100, 1, 64, 64),  # one sequence
        (100, 1, 256, 256),
        (1000, 1, 128, 128),
        (50, 1, 768, 768),  # weights that leave the second-level cache
        (100, 1, 1024, 1024),
        (200, 4, 32, 32),  # small cells
        (100, 7, 80, 100),
        (200, 16, 96, 96),
        (61, 17, 37, 83),  # nothing a multiple of a vector
        (100, 32, 192, 192),  # large products
        (100, 32, 512, 512),
        (20, 128, 512, 512),
        (20, 64, 1024, 1024),
        (28, 128, 28, 128),  # as people have them: rows of a picture
        (35, 20, 650, 650),  # a language model
        (200, 32, 40, 256),  # speech
        (128, 16, 256, 256),  # reinforcement learning
        (30, 64, 300, 300),  # sentences
        (100, 64, 64, 64),
        (500, 2, 48, 48),
        (1000, 1, 32, 32),
        (10, 1, 512, 512),  # a short piece of a stream
        (100, 3, 17, 29),
        (101, 33, 31, 129),
    ):
        yield from each(three, shape)
    yield from each(three, (1, 1, 128, 128), modes=("infer",))  # one step, states handed on by the caller
    yield from each(three, (1, 1, 8, 8), modes=("infer",))  # hardly any arithmetic: what a call costs
    yield from each(three, (1, 256, 128, 128), modes=("infer",))
    yield from each(three, (1, 32, 256, 256), modes=("infer",))
    yield from each(three, (2, 1, 64, 64))
    yield from each(three, middle, layers=2)
    yield from each(three, (100, 1, 128, 128), layers=4)
    yield from each(three, (100, 1, 64, 64), layers=2)  # side by side in inference
    yield from each(three, middle, directions=2)
    yield from each(three, (100, 1, 256, 256), directions=2)
    yield from each(three, middle, ragged=True)
    yield from each(three, (200, 32, 128, 128), ragged=True)
    yield from each(three, middle, dtype="bfloat16")
    yield from each(("lstm", "gru"), (50, 64, 256, 256), dtype="bfloat16")
    yield from each(("lstm", "gru"), (30, 96, 768, 768), dtype="bfloat16")
    yield from each(three, middle, dtype="float64")
    yield from each(("lstm",), middle, projection=64)
    yield from each(("lstm",), middle, layers=2, directions=2, ragged=True)
    yield from each(tuple(name for name in CHOICES if name not in three), middle)


CASES: dict[str, Case] = {case.name: case for case in _registry()}
