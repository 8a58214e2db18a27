"""Cells of the user's own: from a Python function to equations, their derivative, and the struct of csrc/cells.

``trace`` runs the function with symbols (``values``) and gives a graph (``graph``); ``derive`` differentiates it;
``contract`` and ``stages`` give it the form of ``csrc/cells/cell.h``, saving what a minimum cut (``cut``) says;
``printer`` writes that as C++. ``library`` has it compiled (``compiler``) and adds it to the kernels of the process;
``layers`` are the modules.
"""

from .errors import CellError
from .functions import exp, log, maximum, minimum, relu, sigmoid, softplus, sqrt, square, tanh, where
from .layers import Recurrent, UserCell, cell

__all__ = [
    "CellError",
    "Recurrent",
    "UserCell",
    "cell",
    "exp",
    "log",
    "maximum",
    "minimum",
    "relu",
    "sigmoid",
    "softplus",
    "sqrt",
    "square",
    "tanh",
    "where",
]
