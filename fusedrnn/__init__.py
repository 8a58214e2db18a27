"""fusedrnn: the recurrent layers of PyTorch with hand-derived, fused forward and backward kernels.

>>> import torch, fusedrnn
>>> lstm = fusedrnn.LSTM(10, 20, num_layers=2)      # in the place of torch.nn.LSTM, nothing else changes
>>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))
>>> output.shape
torch.Size([5, 3, 20])
"""

from . import extension  # noqa: F401  # isort: skip  before all that loads the extension
from . import functional, init, onnx, reference
from .cells import CELLS, CellInfo
from .convert import ConversionReport, convert, revert
from .further_modules import (
    MGU,
    SLSTM,
    IndRNN,
    IndRNNCell,
    LayerNormGRU,
    LayerNormGRUCell,
    LayerNormLSTM,
    LayerNormLSTMCell,
    MGUCell,
    PeepholeLSTM,
    PeepholeLSTMCell,
    SLSTMCell,
)
from .insight.recording import LayerGradients, record_gradients
from .layer import autograd, ops
from .modules import GRU, LSTM, RNN, GRUCell, LSTMCell, ResidualRNN, RNNCell
from .options import FusedOptions
from .patch import patch_torch, unpatch_torch
from .quantize import QuantizationReport, quantize
from .quantized import QuantizedCell, QuantizedRecurrent
from .user_cells import CellError, Recurrent, UserCell, cell

__version__ = "0.1.0"

__all__ = [
    "CELLS",
    "CellError",
    "CellInfo",
    "ConversionReport",
    "FusedOptions",
    "GRU",
    "GRUCell",
    "IndRNN",
    "IndRNNCell",
    "LSTM",
    "LSTMCell",
    "LayerGradients",
    "LayerNormGRU",
    "LayerNormGRUCell",
    "LayerNormLSTM",
    "LayerNormLSTMCell",
    "MGU",
    "MGUCell",
    "PeepholeLSTM",
    "PeepholeLSTMCell",
    "QuantizationReport",
    "QuantizedCell",
    "QuantizedRecurrent",
    "RNN",
    "RNNCell",
    "Recurrent",
    "ResidualRNN",
    "SLSTM",
    "SLSTMCell",
    "UserCell",
    "autograd",
    "cell",
    "convert",
    "functional",
    "init",
    "onnx",
    "ops",
    "patch_torch",
    "quantize",
    "record_gradients",
    "reference",
    "revert",
    "unpatch_torch",
]
