"""What inference keeps of modules from call to call: packed weights, and the next step of a stream.

Not in the modules: using one changes neither its pickle nor its state. What is kept is compared before it is used:
packed weights by a digest of those they were made of (``csrc/inference.h``), a step by ``streaming.py``.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn

from .._C import packed_weights


class Cached:
    """Of one module. ``packed``: a capsule of C++; ``step``: a step that streaming has prepared, None without."""

    __slots__ = ("packed", "step")

    def __init__(self) -> None:
        self.packed: Any = packed_weights()
        self.step: Any = None


cached: weakref.WeakKeyDictionary[nn.Module, Cached] = weakref.WeakKeyDictionary()


def find(module: nn.Module) -> Cached:
    """What is kept of the module, from now on."""
    return cached.get(module) or cached.setdefault(module, Cached())


def forget(module: nn.Module) -> None:
    """Nothing is kept of the module any more."""
    cached.pop(module, None)
