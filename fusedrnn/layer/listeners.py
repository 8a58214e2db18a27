"""Who listens to backward passes: the recordings under way (:class:`fusedrnn.record_gradients`)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from .call import LayerCall, OutputGradients, Owner


class Listener(Protocol):
    """What a recording does."""

    def wants(self, owner: Owner) -> bool:
        """Whether the call is one of its model's."""

    def add(self, call: LayerCall, gradients: OutputGradients, norms: Tensor) -> None:
        """A layer's norms (D, N, 2 * states + gates), as the kernel gives them, for these gradients of its outputs."""


listening: list[Listener] = []
lock = threading.Lock()  # of the list, and of what its members keep


def interested(owner: Owner | None) -> Sequence[Listener]:
    """Those that the call is for. (A call that Dynamo has compiled has no owner.)"""
    if owner is None or not listening:
        return ()
    return [listener for listener in listening if listener.wants(owner)]
