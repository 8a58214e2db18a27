"""The equations of docs/derivations.md in NumPy, float64, as plain loops: what the kernels are held against.

It shares nothing with the kernels and does not import torch. ``cells`` is one step, ``layers`` one direction of one
layer through time, ``textbook`` the same in the layout of textbooks with converters to and from torch's.
"""

from . import textbook
from .cells import (
    gru_cell_backward,
    gru_cell_forward,
    lstm_cell_backward,
    lstm_cell_forward,
    residual_rnn_cell_backward,
    residual_rnn_cell_forward,
    rnn_cell_backward,
    rnn_cell_forward,
)
from .layers import (
    gru_backward,
    gru_forward,
    lstm_backward,
    lstm_forward,
    residual_rnn_backward,
    residual_rnn_forward,
    rnn_backward,
    rnn_forward,
)

__all__ = [
    "gru_backward",
    "gru_cell_backward",
    "gru_cell_forward",
    "gru_forward",
    "lstm_backward",
    "lstm_cell_backward",
    "lstm_cell_forward",
    "lstm_forward",
    "residual_rnn_backward",
    "residual_rnn_cell_backward",
    "residual_rnn_cell_forward",
    "residual_rnn_forward",
    "rnn_backward",
    "rnn_cell_backward",
    "rnn_cell_forward",
    "rnn_forward",
    "textbook",
]
