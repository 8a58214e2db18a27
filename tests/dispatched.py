"""Which libraries' ops a call runs: what tells our kernels from torch.nn's."""

from __future__ import annotations

from collections.abc import Callable

from torch.utils._python_dispatch import TorchDispatchMode


class _Namespaces(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.namespace)
        return func(*args, **(kwargs or {}))


def ours(call: Callable, *args) -> bool:
    """Whether a kernel of fusedrnn runs in ``call(*args)``."""
    with _Namespaces() as namespaces:
        call(*args)
    return "fusedrnn" in namespaces.seen
