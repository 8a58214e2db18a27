"""The compiled ops and their shapes: ``torch.ops.fusedrnn.layer_forward`` and ``layer_backward``.

Importing this module loads the extension, which registers the ops and holds every check (``csrc/layer.cpp``). Here are
only the fake kernels, which give torch.compile, torch.export and the meta device the shapes of the results, and what
torch.utils.flop_counter counts.
The ops do not differentiate themselves: :mod:`fusedrnn.functional` does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import _C  # registers the ops; torch must be loaded first
from .cells import CELLS, CellInfo

__all__ = ["KERNEL_DTYPES", "layer_backward", "layer_forward", "refuse_older_exporter"]

#: The devices that this build has kernels for, and the element types they take there.
KERNEL_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}
if _C.build()["cuda"]:
    KERNEL_DTYPES["cuda"] = KERNEL_DTYPES["cpu"]

#: Gates of each cell whose gradients before and behind the reset differ: both are in ``dgates``.
_SPLIT: dict[str, int] = {entry["name"]: entry["split"] for entry in _C.cells()}

layer_forward = torch.ops.fusedrnn.layer_forward.default
layer_backward = torch.ops.fusedrnn.layer_backward.default


def refuse_older_exporter(name: str) -> None:
    """Raise where ``torch.onnx.export(dynamo=False)`` traces a layer: it has no operator for the ops."""
    if torch.onnx.is_in_onnx_export():
        raise NotImplementedError(
            f"fusedrnn: {name} is exported to ONNX by torch.onnx.export(..., dynamo=True,"
            " custom_translation_table=fusedrnn.onnx.table()), not by TorchScript (dynamo=False)"
        )


def _spread_stride(n: int, itemsize: int) -> int:
    """Width of a row of ``saved``: ``spread_stride`` of csrc/problem.h."""
    line = 64 // itemsize
    return n if n < 4 * line else (-(-n // line) | 1) * line


def _info(cell: str) -> CellInfo:
    if cell not in CELLS:
        raise ValueError(f"unknown cell '{cell}'")
    return CELLS[cell]


def _check_devices(x: Tensor, batch_sizes: Tensor | None, **tensors: Tensor | None) -> None:
    """A tensor on the meta device among others leads here, where nothing is computed: an error, not a result."""
    if batch_sizes is not None and batch_sizes.device.type != "cpu":
        raise RuntimeError(f"batch_sizes must be a 1-D int64 tensor on the CPU, got one on {batch_sizes.device}")
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != x.device:
            raise RuntimeError(f"{name} must be on the device of the input, {x.device}, got {tensor.device}")


def _samples(x: Tensor, batch_sizes: Tensor | None, h0: Tensor | None) -> int | torch.SymInt:
    """The number of samples, which a packed batch has as a value."""
    if batch_sizes is None:
        return x.size(1)
    if type(batch_sizes) is Tensor:  # the input is on the meta device
        return int(batch_sizes[0])
    return torch.library.get_ctx().new_dynamic_size() if h0 is None else h0.size(1)


def _check_steps(x: Tensor, batch_sizes: Tensor | None) -> None:
    packed = "" if batch_sizes is None else " with batch_sizes"
    if x.dim() != (dim := 2 if packed else 3):
        raise RuntimeError(f"input{packed} must have {dim} dimensions, got {x.dim()}")
    steps = x.size(0)
    if type(batch_sizes) is Tensor:
        if batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1:
            found = f"{batch_sizes.dim()}-D {batch_sizes.dtype}"
            raise RuntimeError(f"batch_sizes must be a 1-D int64 tensor on the CPU, got {found}")
        sizes = batch_sizes.tolist()
        steps, rows = len(sizes), 0
        for t, n in enumerate(sizes):
            if n <= 0 or n > sizes[max(t - 1, 0)]:
                raise RuntimeError(f"batch_sizes must be positive and not increase, got {n} at step {t}")
            rows += n
            if rows > x.size(0) or (t + 1 == steps and rows < x.size(0)):
                raise RuntimeError(f"batch_sizes must add up to the rows of the input, {x.size(0)}, got {rows}")
    if isinstance(steps, int) and steps == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")


def _check_sizes(
    x: Tensor, batch_sizes: Tensor | None, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor], cell: str,
    directions: int,
) -> None:  # fmt: skip
    """What the kernels check (``csrc/layer.cpp``), in its words, as far as it is known without values. Sizes that a
    compiler has not fixed are the kernel's to check.
    """
    info, each = _info(cell), len(weights) // directions
    if each * directions != len(weights) or not 2 <= each <= 5:
        raise RuntimeError(
            f"weights must hold w_ih, w_hh[, b_ih, b_hh][, w_hr] for each of {directions} direction(s), got"
            f" {len(weights)} tensors"
        )
    _check_steps(x, batch_sizes)
    if each % 2 and not info.projectable:
        raise RuntimeError(f"cell {cell} cannot be projected: w_hr given")
    w_hh = weights[1].shape
    if len(w_hh) != 2 or w_hh[0] % len(info.gates) or w_hh[0] == 0:
        raise RuntimeError(f"w_hh must have shape [{len(info.gates)}*H, H], got {list(w_hh)}")
    all_gates, H = w_hh[0], w_hh[0] // len(info.gates)
    R = w_hh[1] if each % 2 else H
    shapes = {"w_ih": (all_gates, x.size(-1)), "w_hh": (all_gates, R)}
    shapes |= {"b_ih": (all_gates,), "b_hh": (all_gates,)} if each >= 4 else {}
    shapes |= {"w_hr": (R, H)} if each % 2 else {}
    named = [(name, weight, shape) for (name, shape), weight in zip([*shapes.items()] * directions, weights)]
    if batch_sizes is None or type(batch_sizes) is Tensor:
        states, samples = (("h0", h0, R), ("c0", c0, H)), _samples(x, batch_sizes, None)
        named += [(name, state, (directions, samples, n)) for name, state, n in states if state is not None]
    for name, tensor, shape in named:
        if tensor.dtype != x.dtype:
            raise ValueError(f"{name} must have the dtype of the input, {x.dtype}, got {tensor.dtype}")
        if len(tensor.shape) != len(shape) or any(map(_differ, tensor.shape, shape)):
            raise RuntimeError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")


def _differ(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a != b


@torch.library.register_fake("fusedrnn::layer_forward")
def _(
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    cell: str,
    bidirectional: bool,
    save: bool,
    mask_h: Tensor | None = None,
    keep_h: Tensor | None = None,
    keep_c: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    noise = {"mask_h": mask_h, "keep_h": keep_h, "keep_c": keep_c}
    named = {f"weights[{i}]": weight for i, weight in enumerate(weights)}
    info, directions = _info(cell), 2 if bidirectional else 1
    _check_devices(x, batch_sizes, h0=h0, c0=c0, **noise, **named)
    _check_sizes(x, batch_sizes, h0, c0, weights, cell, directions)
    hidden = weights[1].size(0) // len(info.gates)
    out = weights[1].size(1)  # R: H, or P with a projection
    batch = _samples(x, batch_sizes, h0)
    rows = x.size(0) if batch_sizes is not None else x.size(0) * x.size(1)
    two_states = len(info.states) == 2
    y = x.new_empty((*x.shape[:-1], directions * out))
    h_n = x.new_empty((directions, batch, out))
    c_n = x.new_empty((directions if two_states else 0, batch, hidden))
    dtype = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    values = info.saved + len(info.states) - 1 or int(keep_h is not None)
    width = _spread_stride(values * hidden, dtype.itemsize)
    saved = x.new_empty((directions, rows if save else 0, width), dtype=dtype)
    return y, h_n, c_n, saved


@torch.library.register_fake("fusedrnn::layer_backward")
def _(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    y: Tensor,
    saved: Tensor,
    cell: str,
    bidirectional: bool,
    need_x: bool,
    need_weights: bool,
    need_gates: bool = False,
    need_norms: bool = False,
    bptt_steps: int = 0,
    clip: float = 0.0,
    clip_by_norm: bool = False,
    mask_h: Tensor | None = None,
    keep_h: Tensor | None = None,
    keep_c: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    noise = {"mask_h": mask_h, "keep_h": keep_h, "keep_c": keep_c}
    named = {"dy": dy, "dh_n": dh_n, "dc_n": dc_n, "dc": dc, "h0": h0, "c0": c0, "y": y, "saved": saved}
    _check_devices(x, batch_sizes, **named, **noise, **{f"weights[{i}]": weight for i, weight in enumerate(weights)})
    info, directions = _info(cell), 2 if bidirectional else 1
    _check_sizes(x, batch_sizes, h0, c0, weights, cell, directions)
    hidden = weights[1].size(0) // len(info.gates)
    batch = _samples(x, batch_sizes, h0)
    dx = x.new_empty(x.shape if need_x else (0,))
    dh0 = x.new_empty((directions, batch, weights[1].size(1)))
    dc0 = x.new_empty((directions if len(info.states) == 2 else 0, batch, hidden))
    all_rows = x.size(0) if batch_sizes is not None else x.size(0) * x.size(1)
    rows = all_rows if need_gates else 0
    projected = len(weights) // directions % 2
    dgates = saved.new_empty((directions, rows, (len(info.gates) + _SPLIT[cell]) * hidden))
    dh = saved.new_empty((directions, rows if projected else 0, weights[1].size(1)))
    norms = saved.new_empty((directions, all_rows if need_norms else 0, 2 * len(info.states) + len(info.gates)))
    return dx, dh0, dc0, [w.new_empty(w.shape) for w in weights] if need_weights else [], dgates, dh, norms


def _products(x: Sequence[int], weights: Sequence[Sequence[int]]) -> int:
    """Operations of a product of every row with each of these matrices, as torch counts a torch.mm; biases: none."""
    return 2 * math.prod(x[:-1]) * sum(math.prod(w) for w in weights if len(w) == 2)


@register_flop_formula(torch.ops.fusedrnn.layer_forward)
def _(x, batch_sizes, h0, c0, weights, cell, bidirectional, save, *noise, out_shape=None, **more_noise) -> int:
    return _products(x, weights)


@register_flop_formula(torch.ops.fusedrnn.layer_backward)
def _(
    dy, dh_n, dc_n, dc, x, batch_sizes, h0, c0, weights, y, saved, cell, bidirectional, need_x, need_weights, *options,
    out_shape=None, **more_options,
) -> int:  # fmt: skip
    each = len(weights) // (2 if bidirectional else 1)
    through_time = [w for i, w in enumerate(weights) if i % each > 0]  # to the states, those of the start included
    return (
        _products(x, through_time)
        + need_x * _products(x, weights[::each])
        + need_weights * _products(x, weights)
    )


if torch.ops.aten.addmm_ not in flop_registry:  # torch counts addmm alone; second_order.py adds in place

    @register_flop_formula(torch.ops.aten.addmm_)
    def _(to: Sequence[int], a: Sequence[int], b: Sequence[int], *, out_shape=None, **factors) -> int:
        return 2 * math.prod(a) * b[1]
