"""Torch's own recurrent classes on our kernels, for code that was not written for fusedrnn.

What is replaced is the ``forward`` of six classes of torch.nn; no name and no class is. So modules made before, classes
imported by name and subclasses are covered, ``isinstance`` and ``type`` answer as ever, and what leaves the process
(pickles, TorchScript, exported programs) holds torch.nn and nothing of ours.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils.rnn import PackedSequence

from . import modules
from .fused_module import FusedModule
from .inference import cache
from .layer.ops import KERNEL_DTYPES
from .torch_internals import VF as _VF  # noqa: F401  TorchScript looks up names of torch's source, by __wrapped__, here
from .torch_internals import exporting, own_checks, transformed, whole


class patch_torch:
    """From this call on, torch.nn's RNN, LSTM, GRU, RNNCell, LSTMCell and GRUCell compute with fusedrnn's kernels.

    >>> fusedrnn.patch_torch()                # until unpatch_torch()
    >>> with fusedrnn.patch_torch(): ...      # for a block; an exception that leaves it undoes the patch, too

    **Covered**: every module of these classes, made before or after, under whatever name its class was imported;
    subclasses, unless they have a ``forward`` that does not call torch.nn's. Modules stay what they are:
    ``type(m) is torch.nn.LSTM`` holds, so do ``isinstance``, copies, pickles, ``torch.ao.quantization``'s tables, and
    a pickle made meanwhile loads where there is no fusedrnn.

    **Not covered**: a bound ``forward`` that was taken before, code that calls ``torch.lstm`` and the like itself,
    modules that TorchScript has compiled. Two things that torch.nn allows raise: writing into the output of an LSTM in
    place before backward where it is float64, packed or projected (elsewhere torch.nn raises, too), and a sparse input.

    **Left to torch.nn's forward**, so that code which worked goes on working:

    - without a word, all that leaves the process: ``torch.jit.script``, ``torch.jit.trace``, ``torch.export`` and
      with it ``torch.onnx.export``;
    - with a UserWarning, once for each class and reason while patched: a device or dtype without a kernel, a transform
      of torch.func inside torch.compile, a subclass with argument checks of its own. With
      ``warnings.simplefilter("error")`` it raises instead.

    Packed weights, which inference keeps, are kept outside the module, until it trains, goes or is patched no more.

    **Nesting**: each call counts by itself. A block that ends takes back its own call alone, so blocks may be nested
    and may overlap in several threads; the patch ends with the last of them. A second plain call changes nothing.
    :func:`unpatch_torch` takes back all calls at once. An object serves one block at a time.

    **Threads**: the patch is the process's, not a thread's. A call of a module that is under way in another thread
    ends as it began. A forked process inherits the patch, a spawned one does not.
    """

    def __init__(self) -> None:
        self.__enter__()

    def __enter__(self) -> patch_torch:
        with _lock:
            _calls.add(self)
            if not _installed:
                for theirs, compute in _COMPUTE.items():
                    _installed[theirs] = theirs.forward = _forward(theirs, theirs.forward, compute)
        return self

    def __exit__(self, *_: object) -> None:
        _take_back({self})


def unpatch_torch() -> None:
    """Undo every :class:`patch_torch` there is, those of open blocks too; nothing happens where there is none.

    A ``forward`` that somebody replaced meanwhile is left as it is; what it holds of ours calls torch.nn's again.
    """
    _take_back(set(_calls))


_lock = threading.Lock()
_calls: set[patch_torch] = set()  # those not taken back; the classes are patched while there is one
_installed: dict[type[nn.Module], Callable[..., Any]] = {}
_warned: set[tuple[type[nn.Module], str]] = set()


def _take_back(calls: set[patch_torch]) -> None:
    with _lock:
        _calls.difference_update(calls)
        if _calls:
            return
        for theirs, ours in _installed.items():
            if theirs.forward is ours:
                theirs.forward = ours.__wrapped__
        _installed.clear()
        _warned.clear()
        for module in [module for module in cache.cached if not isinstance(module, FusedModule)]:
            cache.forget(module)


def _forward(theirs: type[nn.Module], own: Callable[..., Any], compute: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of the class ``theirs`` while patched: ``compute`` where it can, else ``own``, torch's.

    The questions asked before take 2 us, where one step of nn.GRU(64, 64) takes 25 here and 130 in torch.nn.
    """

    @functools.wraps(own)
    def forward(self: nn.Module, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        if not _calls or torch.jit.is_tracing() or exporting():
            return own(self, input, hx)
        reason = _obstacle(self, theirs, input)
        if reason is None:
            return whole(compute, self, input, hx)
        if (theirs, reason) not in _warned:
            text = f"torch.nn.{theirs.__name__}, patched by fusedrnn, goes to torch.nn's own forward: {reason}"
            warnings.warn(text, stacklevel=4)  # the caller of the module
            _warned.add((theirs, reason))  # not before: a warning that raises is to raise again
        return own(self, input, hx)

    return forward


def _obstacle(module: nn.Module, theirs: type[nn.Module], input: Tensor | PackedSequence) -> str | None:
    """Why torch's forward has to do this call. None: there is no reason."""
    x = input.data if isinstance(input, PackedSequence) else input
    device, dtype = x.device.type, x.dtype
    if device != "meta":
        if device not in KERNEL_DTYPES:
            return f"no kernels for the device {device}"
        if torch.is_autocast_enabled(device) and dtype.is_floating_point and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        if dtype not in KERNEL_DTYPES[device]:
            return f"no kernels for {dtype} on {device}"
    if is_compiling() and transformed():
        return "a transform of torch.func inside torch.compile"
    if own_checks(module, theirs):
        return f"{type(module).__qualname__} has argument checks of its own"
    return None


def _to_write(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward``, ours, with an output that may be written in place."""

    def copying(self: nn.RNNBase, input: Tensor | PackedSequence, hx: Tensor | None) -> tuple[Any, Tensor]:
        output, h_n = forward(self, input, hx)
        return _writable(output), h_n

    return copying


def _writable(output: Tensor | PackedSequence) -> Tensor | PackedSequence:
    """A copy for the caller, where backward needs the output: torch.nn's RNN and GRU let it be written in place, and
    people do (masks, activations with ``inplace=True``). Readings of a training step vary by more than it costs.
    """
    if isinstance(output, PackedSequence):
        return output._replace(data=_writable(output.data))
    return output.clone() if output.requires_grad else output


# torch.nn's classes as they were at import, and our forward for each; torch.nn's GRU has no ``reset_after``.
_COMPUTE: dict[type[nn.Module], Callable[..., Any]] = {
    nn.RNN: _to_write(modules.RNN.forward),
    nn.LSTM: modules.LSTM.forward,
    nn.GRU: _to_write(modules.GRU.forward),
    nn.RNNCell: modules.RNNCell.forward,
    nn.LSTMCell: modules.LSTMCell.forward,
    nn.GRUCell: modules.GRUCell.forward,
}
