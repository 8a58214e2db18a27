"""The compiled part: what it is, and inference past the dispatcher where it is there (:mod:`fusedrnn.extension`)."""

from __future__ import annotations

import _thread
import atexit
import ctypes
import json
import threading
from typing import Any

import torch

from .extension import load, versions

_library, _fast = load()
_description: dict[str, Any] = json.loads(_library.fusedrnn_description())
if _description["error"]:
    raise ImportError(_description["error"])


def isa() -> str:
    """The instruction set in use."""
    return _description["isa"]


def vector_bytes() -> int:
    """The width of its vectors."""
    return _description["vector_bytes"]


def built_isas() -> list[str]:
    """The instruction sets in this build."""
    return _description["built_isas"]


def supported_isas() -> list[str]:
    """Those of them that this processor has."""
    return _description["supported_isas"]


def build() -> dict[str, Any]:
    """Compiler and flags of the library; ``fast``: those that ``_fast`` is of, None if none fits."""
    return _description["build"] | {"fast": None if _fast is None else versions()}


def cells() -> list[dict[str, Any]]:
    """Constants of the compiled cells, in registry order."""
    return _description["cells"]


def phases() -> dict[str, float] | None:
    """Seconds of all threads in each phase since the last call; None if the build has no timers."""
    names = _description["phases"]
    nanoseconds = (ctypes.c_int64 * len(names))()
    timed = _library.fusedrnn_phases(nanoseconds)
    return {name: 1e-9 * n for name, n in zip(names, nanoseconds)} if timed else None


def services() -> int:
    """The address of what a cell compiled later is given (csrc/cpu/added.h)."""
    return _library.fusedrnn_services()


def add_cell(cell: int | None) -> str | None:
    """Add such a cell, by the address that its library gives. None, or why not."""
    fault = _library.fusedrnn_add_cell(cell)
    return fault and fault.decode()


@ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_int))
def _settings(into: Any) -> None:
    """What a GPU's kernels follow, a bit each (csrc/stepwise/settings.h); called by the library in each of its calls.

    Whether float32 products may round to TF32 (torch.backends.cudnn.allow_tf32 and cudnn.rnn.fp32_precision, as for
    torch.nn's recurrent layers); whether the sooner way may be measured (not in deterministic mode). Written, not
    returned: of a function that raises, ctypes returns anything.
    """
    try:
        tf32 = torch.backends.cudnn.rnn.fp32_precision == "tf32"
        into[0] = tf32 | (not torch.are_deterministic_algorithms_enabled()) << 1
    except KeyboardInterrupt:  # nobody above can take it: again, when Python goes on
        threading.Timer(0.01, _thread.interrupt_main).start()


if _fast is None:  # which tells without Python
    _library.fusedrnn_ask_settings(_settings)
    atexit.register(_library.fusedrnn_ask_settings, None)  # a thread of C++ may outlive Python


def choices_file() -> str:
    """Where what was measured is kept; empty: nowhere."""
    return _description["choices"]


if _fast is not None:
    fits, infer, prepare_step, step = _fast.fits, _fast.infer, _fast.prepare_step, _fast.step
    kept_parameters, packed_weights = _fast.kept_parameters, _fast.packed_weights
    packed_bytes, packed_uses = _fast.packed_bytes, _fast.packed_uses
    train_cell, kept_sums, set_long_way = _fast.train_cell, _fast.kept_sums, _fast.set_long_way
    gradients_of_step, wanted_edges = _fast.gradients_of_step, _fast.wanted_edges
else:

    def _nothing(*args: Any, **kwargs: Any) -> None:
        """What ``_fast`` gives where only the ops will do."""

    fits = infer = prepare_step = step = kept_parameters = packed_weights = _nothing
    train_cell = kept_sums = set_long_way = gradients_of_step = wanted_edges = _nothing
    packed_bytes = packed_uses = lambda kept: 0
