"""The ops' shapes: ``torch.ops.fusedrnn.layer_forward`` and ``layer_backward`` (:mod:`fusedrnn.layer.call`).

The compiled part holds every check (``csrc/layer.cpp``). Here are only the fake kernels, which give torch.compile,
torch.export and the meta device the shapes of the results, and what torch.utils.flop_counter counts.
The ops do not differentiate themselves: :mod:`fusedrnn.functional` does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from .. import _C
from ..torch_internals import below_autograd
from .call import BackwardArguments, ForwardArguments, LayerCall, Weights, layer_backward, layer_forward

__all__ = ["KERNEL_DTYPES", "layer_backward", "layer_forward", "refuse_older_exporter"]

#: The devices that this build has kernels for, and the element types they take there.
KERNEL_DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cpu": (torch.float32, torch.float64, torch.bfloat16, torch.float16)
}
if _C.build()["cuda"]:
    KERNEL_DTYPES["cuda"] = KERNEL_DTYPES["cpu"]


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


def _differ(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a != b


def _check(call: LayerCall, **more: Tensor | None) -> None:
    """As far as it can be done without values, in the words of ``csrc/layer.cpp``. ``more``: tensors that must be on
    the input's device, too. A tensor on the meta device among others leads here, where nothing is computed: an error,
    not a result. Sizes that a compiler has not fixed are the kernel's to check.
    """
    cell, x, batch_sizes, weights, info = call.cell, call.x, call.batch_sizes, call.weights, call.info
    states = {f"{name}0": state for name, state in zip(info.states, call.states, strict=True)}
    named = states | call.noise._asdict() | {f"weights[{i}]": weight for i, weight in enumerate(weights)} | more
    named |= {f"scales[{i}]": scale for i, scale in enumerate(call.scales or ())}
    if batch_sizes is not None and batch_sizes.device.type != "cpu":
        raise RuntimeError(f"batch_sizes must be a 1-D int64 tensor on the CPU, got one on {batch_sizes.device}")
    for name, tensor in named.items():
        if tensor is not None and tensor.device != x.device:
            raise RuntimeError(f"{name} must be on the device of the input, {x.device}, got {tensor.device}")
    _check_steps(x, batch_sizes)
    each, rest = divmod(len(weights), call.directions)
    if not rest and each in (3, 5) and not info.projectable and not info.has_unit_weight:
        raise RuntimeError(f"cell {cell} cannot be projected: w_hr given")
    if rest or each not in Weights.counts(info):
        raise RuntimeError(
            f"weights must hold {Weights.named(info)} for each of {call.directions} direction(s), got"
            f" {len(weights)} tensors"
        )
    projected = call.by_direction[0].w_hr is not None
    w_hh, shape = weights[1].shape, f"[{info.blocks}*H, H]" if info.product else f"[{info.blocks}*H]"
    if len(w_hh) != 1 + info.product or w_hh[0] % info.blocks or w_hh[0] == 0:
        raise RuntimeError(f"w_hh must have shape {shape}, got {list(w_hh)}")
    H = w_hh[0] // info.blocks
    R, all_gates, units = w_hh[1] if projected else H, len(info.gates) * H, (len(info.parameters) * H,)
    by_h = (all_gates, R) if info.product else units
    shapes = Weights((all_gates, x.size(-1)), by_h, (all_gates,), (all_gates,), (R, H), units)
    sized = [each for own in call.by_direction for each in zip(Weights._fields, own, shapes) if each[1] is not None]
    if call.scales is not None and not info.has_small_weights:
        raise RuntimeError(f"cell {cell} has no kernels for matrices in int8 or bfloat16")
    matrix = x.dtype if call.scales is None else torch.int8 if call.scales else torch.bfloat16
    if call.scales is not None and x.dtype != torch.float32:
        kinds = "int8 or bfloat16 weights alone"
        raise RuntimeError(f"a layer with {kinds} takes an input of torch.float32, got {x.dtype}")
    if call.scales:
        scales = (("s_ih", (all_gates,)), ("s_hh", (all_gates,)), ("s_hr", (R,)))[: 3 if projected else 2]
        if len(call.scales) != len(scales) * call.directions:
            raise RuntimeError(
                f"scales must hold s_ih, s_hh[, s_hr] for each of {call.directions} direction(s), got"
                f" {len(call.scales)} tensors"
            )
        sized += [(name, scale, shape) for (name, shape), scale in zip(scales * call.directions, call.scales)]
    if batch_sizes is None or type(batch_sizes) is Tensor:
        given = [
            (name, state, size)
            for (name, state), size in zip(states.items(), (R, *[H] * info.beside))
            if state is not None
        ]
        samples = _samples(call._replace(states=()))
        sized += [(name, state, (call.directions, samples, size)) for name, state, size in given]
    for name, tensor, shape in sized:
        dtype = matrix if name in ("w_ih", "w_hh", "w_hr") and len(shape) == 2 else x.dtype
        if tensor.dtype != dtype:
            which = "of the input, " if dtype == x.dtype else ""
            raise RuntimeError(f"{name} must have the dtype {which}{dtype}, got {tensor.dtype}")
        if len(tensor.shape) != len(shape) or any(map(_differ, tensor.shape, shape)):
            raise RuntimeError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")


def _samples(call: LayerCall) -> int | torch.SymInt:
    """Their number, which a packed batch has as a value."""
    if call.batch_sizes is None:
        return call.x.size(1)
    if type(call.batch_sizes) is Tensor:  # the input is on the meta device
        return int(call.batch_sizes[0])
    given = [state.size(1) for state in call.states if state is not None]
    return given[0] if given else torch.library.get_ctx().new_dynamic_size()


def _finals(call: LayerCall) -> list[Tensor]:
    """Tensors of the shapes of h_n (D, B, R) and c_n (D, B, H), which is empty for a cell without c."""
    samples, directions = _samples(call), call.directions
    beside = call.info.beside
    shapes = (directions, call.width), (directions if beside else 0, max(beside, 1) * call.hidden)
    return [call.x.new_empty((n, samples, width)) for n, width in shapes]


@torch.library.register_fake("fusedrnn::layer_forward")
def _(*args: Any) -> tuple[Tensor, ...]:
    call, save = ForwardArguments.of(*args)
    _check(call)
    x, info = call.x, call.info
    y = x.new_empty((*x.shape[:-1], call.directions * call.width))
    dtype = torch.float32 if x.dtype in (torch.bfloat16, torch.float16) else x.dtype
    values = info.saved + len(info.states) - 1 or int(call.noise.keep_h is not None)
    width = _spread_stride(values * call.hidden + info.row_values, dtype.itemsize)
    saved = x.new_empty((call.directions, math.prod(x.shape[:-1]) if save else 0, width), dtype=dtype)
    return y, *_finals(call), saved


@torch.library.register_fake("fusedrnn::layer_backward")
def _(*args: Any) -> tuple[Any, ...]:
    call, gradients, y, saved, needs = BackwardArguments.of(*args)
    _check(call, dy=gradients.y, dc=gradients.c, y=y, saved=saved, **dict(zip(("dh_n", "dc_n"), gradients.finals)))
    x, info, weights, D, rows = call.x, call.info, call.weights, call.directions, math.prod(call.x.shape[:-1])
    projected = call.by_direction[0].w_hr is not None
    dx = x.new_empty(x.shape if needs.x else (0,))
    dgates = saved.new_empty((D, rows if needs.gates else 0, call.info.gradient_blocks * call.hidden))
    dh = saved.new_empty((D, rows if needs.gates and projected else 0, call.width))
    norms = saved.new_empty((D, rows if needs.norms else 0, 2 * len(info.states) + len(info.gates)))
    return dx, *_finals(call), [w.new_empty(w.shape) for w in weights] if needs.weights else [], dgates, dh, norms


class _NotDifferentiable(torch.autograd.Function):
    """The results of an op that was called by itself."""

    @staticmethod
    def forward(ctx: Any, name: str, _: Tensor, *results: Tensor) -> tuple[Tensor, ...]:  # noqa: D102
        ctx.name = name
        return tuple(t.view_as(t) for t in results)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:  # noqa: D102
        raise RuntimeError(f"derivative for {ctx.name} is not implemented")


def _by_itself(op: Any, *args: Any) -> Any:
    """An op under autograd. Layers are differentiated elsewhere; a trace, say, must not lose a gradient in silence."""
    flat = [t for arg in args for t in (arg if isinstance(arg, (list, tuple)) else [arg]) if isinstance(t, Tensor)]
    with below_autograd():
        results = op(*args)
    cause = next((t for t in flat if t.requires_grad), None)
    if cause is None or not torch.is_grad_enabled():
        return results
    tensors = [t for r in results for t in (r if isinstance(r, (list, tuple)) else [r])]
    found = iter(_NotDifferentiable.apply(op.name(), cause, *tensors))
    return tuple([next(found) for _ in r] if isinstance(r, (list, tuple)) else next(found) for r in results)


if _C.build()["fast"] is None:  # csrc/autograd.cpp does so, at less cost
    _autograd = torch.library.Library("fusedrnn", "IMPL")
    for _op in (layer_forward, layer_backward):
        _autograd.impl(_op, partial(_by_itself, _op), "Autograd")


def _products(x: Sequence[int], weights: Sequence[Sequence[int]]) -> int:
    """Operations of a product of every row with each of these matrices, as torch counts a torch.mm; biases: none."""
    return 2 * math.prod(x[:-1]) * sum(math.prod(w) for w in weights if len(w) == 2)


@register_flop_formula(torch.ops.fusedrnn.layer_forward)
def _(*args: Any, out_shape: Any = None) -> int:
    call, _ = ForwardArguments.of(*args)
    return _products(call.x, call.weights)


@register_flop_formula(torch.ops.fusedrnn.layer_backward)
def _(*args: Any, out_shape: Any = None) -> int:
    call, _, _, _, needs = BackwardArguments.of(*args)
    x, by_input = call.x, [own.w_ih for own in call.by_direction]
    through_time = [w for own in call.by_direction for w in own.flat[1:]]  # to the states, those of the start included
    return (
        _products(x, through_time)
        + (_products(x, by_input) if needs.x else 0)
        + (_products(x, call.weights) if needs.weights else 0)
    )


if torch.ops.aten.addmm_ not in flop_registry:  # torch counts addmm alone; second_order.py adds in place

    @register_flop_formula(torch.ops.aten.addmm_)
    def _(to: Sequence[int], a: Sequence[int], b: Sequence[int], *, out_shape=None, **factors) -> int:
        return 2 * math.prod(a) * b[1]
