"""The equations of docs/derivations.md in NumPy, float64, as plain loops: what the kernels are held against.

It shares nothing with the kernels and does not import torch. ``cells`` is one step, ``layers`` one direction of one
layer through time, ``textbook`` the same in the layout of textbooks with converters to and from torch's.
"""

from . import cells, layers, textbook
from .cells import *  # noqa: F403
from .layers import *  # noqa: F403

__all__ = ["textbook", *cells.__all__, *layers.__all__]
