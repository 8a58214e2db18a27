"""What is kept of modules from call to call: packed weights, the next step of a stream, what a training cell's steps
share.

Not in the modules: using one changes neither its pickle nor its state. What is kept is compared before it is used:
packed weights by a digest of those they were made of (``csrc/inference.h``), a step by ``streaming.py``, what steps
share by the weights (``csrc/training.h``).
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .._C import kept_sums, packed_bytes, packed_weights


class Cached:
    """Of one module. ``packed``, ``sums``: capsules of C++; ``step``: what streaming has prepared, or None."""

    __slots__ = ("packed", "step", "sums")

    def __init__(self) -> None:
        self.packed: Any = packed_weights()
        self.step: Any = None
        self.sums: Any = kept_sums()

    def forget_packed(self) -> None:
        """No packed weights any more."""
        if packed_bytes(self.packed):
            self.packed = packed_weights()


cached: weakref.WeakKeyDictionary[nn.Module, Cached] = weakref.WeakKeyDictionary()


def find(module: nn.Module) -> Cached:
    """What is kept of the module, from now on."""
    return cached.get(module) or cached.setdefault(module, Cached())


_of_weights = WeakTensorKeyDictionary()  # w_hh that is no module's, a leaf -> what the steps with it share


def sums_of(w_hh: Tensor) -> Any:
    """What steps of a cell share when they train, whose weights are no module's."""
    if not w_hh.is_leaf:  # of this step alone, mostly
        return kept_sums()
    found = _of_weights.get(w_hh)
    if found is None:
        found = _of_weights[w_hh] = kept_sums()
    return found


def forget(module: nn.Module) -> None:
    """Nothing is kept of the module any more."""
    cached.pop(module, None)
