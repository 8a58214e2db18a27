"""The autograd Functions behind every layer: what is saved for the backward pass and what is computed again.

One call of the fused kernel forward, one backward; :mod:`fusedrnn.functional` stacks them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from . import differentiable, recording
from .batching import is_batched_by_autograd, map_backward
from .cells import CELLS
from .dropout import NOISELESS, Noise
from .ops import KERNEL_DTYPES, layer_backward, layer_forward, refuse_older_exporter
from .second_order import Arguments, hessian_vector_product
from .torch_internals import dual_level, exporting, functionalizing, transformed

__all__ = [
    "PLAIN",
    "PLAIN_BATCH_FIRST",
    "Options",
    "RecurrentLayer",
    "RecurrentLayerBackward",
    "in_place",
    "recurrent_layer",
]


class Options(NamedTuple):
    """What a layer gives and keeps, and how its backward pass departs from the gradient.

    Attributes:
        states: whether c_t of every step is wanted.
        recompute: whether the backward pass computes the gates again instead of keeping them.
        bptt_steps: no gradient passes from a time t that is a multiple of it to t - 1; 0: all pass.
        clip: the limit of what a step sends back to the states before it; 0: none.
        clip_by_norm: whether it is one of each sample's vector, not of each element.
        batch_first: whether y is (B, T, D*R), laid out in memory as (T, B, D*R). Turned here, where it is not saved yet
            for the backward pass: a view would refuse methods in place that torch.nn's output allows.
    """

    states: bool = False
    recompute: bool = False
    bptt_steps: int = 0
    clip: float = 0.0
    clip_by_norm: bool = False
    batch_first: bool = False

    @property
    def limits(self) -> bool:
        """Whether the backward pass gives something else than the gradient."""
        return self.bptt_steps > 0 or self.clip > 0


PLAIN = Options()
PLAIN_BATCH_FIRST = Options(batch_first=True)


def recurrent_layer(
    cell: str,
    bidirectional: bool,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    options: Options = PLAIN,
    owner: recording.Owner | None = None,
    noise: Noise = NOISELESS,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """One layer: y, h_n, c_n and, if ``options`` ask for them, all c_t (T, B, D*H) or (N, D*H).

    What the backward pass needs is kept only if some gradient is wanted. ``owner``: whom a recording knows it by. No
    gradient is that of ``noise``.
    """
    forward = x, batch_sizes, h0, c0, weights, cell, bidirectional, noise
    compiling, mapped = is_compiling(), transformed()
    arguments = cell, bidirectional, options, None if compiling else owner, x, batch_sizes, h0, c0, *noise, *weights
    if exporting():  # a program has no backward
        return _forward(options, *forward, keep=False)[:4]
    if torch.jit.is_tracing():
        refuse_older_exporter(cell)
    if _wants_plain_operations(x, h0, c0, *weights):
        _refuse(options, "forward-mode AD and torch.func.functionalize")
        y, h_n, *cs = differentiable.layer(cell, bidirectional, x, batch_sizes, h0, c0, weights, noise)
        y = y.transpose(0, 1) if options.batch_first else y
        return (y, h_n, *cs) if cs else (y, h_n, h_n[:0], None)
    if compiling and mapped and torch.is_grad_enabled():
        # Dynamo takes no tensor inside torch.func.grad for one that requires a gradient: it would be lost.
        raise NotImplementedError("fusedrnn: torch.compile cannot trace a layer inside torch.func.grad or vmap")
    wanted = any(t is not None and t.requires_grad for t in (x, h0, c0, *weights))
    if torch.is_grad_enabled() and (wanted or mapped):  # what tensors inside a transform require does not show
        if torch.jit.is_tracing():
            raise NotImplementedError(
                "fusedrnn: TorchScript cannot hold the backward pass of a recurrent layer: use torch.export.export, or,"
                " for inference, torch.jit.trace under torch.no_grad()"
            )
        if compiling or mapped:
            return RecurrentLayer.apply(*arguments)[:4]
        return _apply(RecurrentLayer, arguments)[:4]
    return _forward(options, *forward, keep=False)[:4]


def _forward(
    options: Options,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    cell: str,
    bidirectional: bool,
    noise: Noise,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """y, h_n, c_n, all c_t if they are asked for, and what the backward pass wants, if anything."""
    states = options.states and len(CELLS[cell].states) == 2
    keep, masks = keep and not _recomputes(options, cell), noise.to(x.dtype)
    y, h_n, c_n, saved = layer_forward(x, batch_sizes, h0, c0, weights, cell, bidirectional, keep or states, *masks)
    y = in_place(Tensor.transpose_, Tensor.transpose, y, 0, 1) if options.batch_first else y
    if not states:
        return y, h_n, c_n, None, saved
    begin = CELLS[cell].saved * c_n.size(2)
    c = torch.cat([s[:, begin : begin + c_n.size(2)] for s in saved], dim=1).to(x.dtype)
    return y, h_n, c_n, c.reshape(*x.shape[:-1], c.size(1)), saved if keep else saved[:, :0].clone()


def in_place(method: Callable[..., Tensor], otherwise: Callable[..., Tensor], t: Tensor, *arguments: int) -> Tensor:
    """Another shape of a tensor that nobody else holds, not as a view; as one where Dynamo or a transform looks on."""
    return (otherwise if is_compiling() or transformed() else method)(t, *arguments)


def _recomputes(options: Options, cell: str) -> bool:
    """Whether the backward pass makes a second forward pass: there is something that it need not keep."""
    return options.recompute and (CELLS[cell].saved > 0 or len(CELLS[cell].states) > 1)


def _refuse(options: Options, what: str) -> None:
    if options.limits:
        raise RuntimeError(f"grad_clip and bptt_steps change the first gradient alone: {what} would not know of them")


def _wants_plain_operations(*tensors: Tensor | None) -> bool:
    """Whether only :func:`fusedrnn.differentiable.layer` will do: forward-mode AD, whose levels torch lets no Function
    see but one, and torch.func.functionalize, which takes none.
    """
    if is_compiling():
        return dual_level() >= 0
    if transformed():
        return dual_level() >= 0 or functionalizing()
    return dual_level() >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    )


def _apply(function: type[torch.autograd.Function], arguments: tuple) -> tuple[Tensor, ...]:
    """``function.apply`` without its look-up of default values, 80 us: there are none.

    Not a method of the class: after a graph break Dynamo would begin a frame there, and fail.
    """
    return super(torch.autograd.Function, function).apply(*arguments)


class RecurrentLayer(torch.autograd.Function):
    """One layer, all directions:
    ``apply(cell, bidirectional, options, owner, x, batch_sizes, h0, c0, mask_h, keep_h, keep_c, *weights)``.

    Returns ``y, h_n, c_n, c, saved``. Shapes as in :func:`fusedrnn.functional.recurrent` for a single layer; ``c_n`` is
    empty for cells without ``c``, ``c`` None if ``options`` do not ask for it.

    *Saved for backward*: the inputs, ``y`` (which holds every h_t), and one buffer ``saved`` with, for each unit,
    sample and step, the activated gates (LSTM i, f, g, o; GRU r, z, n and, with the reset gate after the product,
    W_hn h + b_hn; residual RNN g; RNN nothing) and c_t: 5 values for the LSTM, 4 for the GRU (3 with
    ``reset_after=False``), 1 for the residual RNN, none for the RNN. Layers of 16-bit types save float32.

    *Recomputed in backward*: tanh(c_t), the operands r * h_{t-1} (GRU with ``reset_after=False``) and
    o * tanh(c_t) (projected LSTM). The gradients of the gates are never stored for all steps, on the CPU; on a GPU they
    are, during the backward pass. With ``options.recompute`` everything that would be in ``saved``, by a second forward
    pass.
    """

    generate_vmap_rule = True  # from the ops' rules (batching.py)

    @staticmethod
    def forward(  # noqa: D102
        cell, bidirectional, options, owner, x, batch_sizes, h0, c0, mask_h, keep_h, keep_c, *weights
    ):
        noise = Noise(mask_h, keep_h, keep_c)
        return _forward(options, x, batch_sizes, h0, c0, weights, cell, bidirectional, noise, keep=True)

    @staticmethod
    def setup_context(ctx, inputs, output):  # noqa: D102
        ctx.cell, ctx.bidirectional, ctx.options, ctx.owner, x, batch_sizes, h0, c0, *noise_and_weights = inputs
        y, _, c_n, _, saved = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*([saved] if len(CELLS[ctx.cell].states) == 2 else [c_n, saved]))
        ctx.save_for_backward(x, batch_sizes, h0, c0, y, saved, *noise_and_weights)

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n, dc, _):  # noqa: D102
        if is_batched_by_autograd(dy, dh_n, dc_n, dc):
            return tuple(map_backward(partial(RecurrentLayer.backward, ctx), dy, dh_n, dc_n, dc, None))
        x, batch_sizes, h0, c0, y, saved, mask_h, keep_h, keep_c, *weights = ctx.saved_tensors
        if ctx.options.batch_first:
            y, dy = y.transpose(0, 1), None if dy is None else dy.transpose(0, 1)
        noise = Noise(mask_h, keep_h, keep_c)
        _, _, _, _, need_x, _, need_h0, need_c0, _, _, _, *need_weights = ctx.needs_input_grad
        if dy is None and dh_n is None and dc_n is None and dc is None:
            return (None,) * len(ctx.needs_input_grad)
        if _recomputes(ctx.options, ctx.cell):
            with torch.no_grad():
                forward = x, batch_sizes, h0, c0, weights, ctx.cell, ctx.bidirectional, True, *noise.to(x.dtype)
                saved = layer_forward(*forward)[3]
        if _wants_plain_operations(x, dy, dh_n, dc_n, dc, h0, c0, *weights):
            _refuse(ctx.options, "forward-mode AD and torch.func.functionalize")
            with _without_autocast(x):
                cotangents, leaves = _cotangents(dy, dh_n, dc_n, dc), _leaves(x, h0, c0, weights)
                found = differentiable.gradients(ctx.cell, ctx.bidirectional, batch_sizes, noise, cotangents, leaves)
            dx, dh0, dc0, dweights = (found.get(name) for name in ("x", "h0", "c0", "weights"))
        elif _is_one_step(ctx, x, batch_sizes):
            dx, dh0, dc0, *dweights = _one_step(ctx, (dy, dh_n, dc_n, dc), x, h0, c0, weights, noise)
        # Another Function only where its result may be differentiated. Dynamo traces none inside a backward.
        elif is_compiling() or not (torch.is_grad_enabled() or transformed()):
            dx, dh0, dc0, dweights, _ = _backward(
                ctx.cell, ctx.bidirectional, ctx.options, ctx.owner, need_x, any(need_weights), dy, dh_n, dc_n, dc, x,
                batch_sizes, h0, c0, y, saved, weights, noise, need_gates=False,
            )  # fmt: skip
        else:
            dx, dh0, dc0, _, *dweights = RecurrentLayerBackward.apply(
                ctx.cell, ctx.bidirectional, ctx.options, ctx.owner, need_x, any(need_weights), dy, dh_n, dc_n, dc, x,
                batch_sizes, h0, c0, y, saved, *noise, *weights,
            )  # fmt: skip
        dweights = dweights or [None] * len(weights)
        return (
            None,
            None,
            None,
            None,
            dx if need_x else None,
            None,
            dh0 if need_h0 else None,
            dc0 if need_c0 else None,
            None,
            None,
            None,
            *(dw if need else None for dw, need in zip(dweights, need_weights, strict=True)),
        )


def _is_one_step(ctx: Any, x: Tensor, batch_sizes: Tensor | None) -> bool:
    """Whether a graph for further derivatives is wanted of one step: the second backward pass by hand has more to set
    up than to do there, and a cell in a loop has as many graphs as steps.
    """
    return (
        torch.is_grad_enabled()
        and not (is_compiling() or transformed() or ctx.options.limits)
        and not recording.interested(ctx.owner)
        and batch_sizes is None
        and x.size(0) == 1
    )


def _one_step(
    ctx: Any,
    cotangents: Sequence[Tensor | None],
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    noise: Noise,
) -> list[Tensor | None]:
    """dx, dh0, dc0 and the weights' gradients, as torch's operations give them, with their graph."""
    given = [x, h0, c0, *weights]
    wanted = [i for i, t in enumerate(given) if t is not None and t.requires_grad]
    for i in wanted:
        given[i] = given[i].view_as(given[i])  # one may be computed from another
    with _without_autocast(x):
        outputs = differentiable.layer(ctx.cell, ctx.bidirectional, given[0], None, *given[1:3], given[3:], noise)
        if len(outputs) == 2:  # y, h_n
            cotangents = cotangents[:2]
        paired = [(o, d) for o, d in zip(outputs, cotangents, strict=True) if d is not None]
        found = torch.autograd.grad(
            [o for o, _ in paired], [given[i] for i in wanted], [d for _, d in paired], create_graph=True,
            allow_unused=True,
        )  # fmt: skip
    gradients: list[Tensor | None] = [None] * len(given)
    for i, gradient in zip(wanted, found, strict=True):
        gradients[i] = gradient
    return gradients


def _backward(
    cell: str,
    bidirectional: bool,
    options: Options,
    owner: recording.Owner | None,
    need_x: bool,
    need_weights: bool,
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dc: Tensor | None,
    x: Tensor,
    batch_sizes: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    y: Tensor,
    saved: Tensor,
    weights: Sequence[Tensor],
    noise: Noise,
    *,
    need_gates: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
    """The kernel's backward pass: dx, dh0, dc0, the weights' gradients, those of the gates; norms for who records."""
    recorders = recording.interested(owner)
    dx, dh0, dc0, dweights, dgates, _, norms = layer_backward(
        dy, dh_n, dc_n, dc, x, batch_sizes, h0, c0, weights, y, saved, cell, bidirectional, need_x, need_weights,
        need_gates, bool(recorders), options.bptt_steps, options.clip, options.clip_by_norm, *noise.to(x.dtype),
    )  # fmt: skip
    for recorder in recorders:
        recorder.add(owner, cell, norms, dy, dc, x, batch_sizes, (options.bptt_steps, options.clip))
    return dx, dh0, dc0, dweights, dgates


class RecurrentLayerBackward(torch.autograd.Function):
    """The hand-derived gradients of :class:`RecurrentLayer`, as a function that may be differentiated again.

    *Its derivative* is :func:`fusedrnn.second_order.hessian_vector_product`, by hand. Where that is to be
    differentiated in its turn, or a transform of torch.func is at work, it is that of
    :func:`fusedrnn.differentiable.layer`, differentiated twice by torch: correct to any order, and slower. ``y`` and
    ``saved`` are functions of the other arguments; what goes through them is part of those arguments' gradients.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(  # noqa: D102
        cell, bidirectional, options, owner, need_x, need_weights, dy, dh_n, dc_n, dc, x, batch_sizes, h0, c0, y,
        saved, mask_h, keep_h, keep_c, *weights,
    ):  # fmt: skip
        dx, dh0, dc0, dweights, dgates = _backward(
            cell, bidirectional, options, owner, need_x, need_weights, dy, dh_n, dc_n, dc, x, batch_sizes, h0, c0, y,
            saved, weights, Noise(mask_h, keep_h, keep_c), need_gates=True,
        )  # fmt: skip
        return dx, dh0, dc0, dgates, *dweights

    @staticmethod
    def setup_context(ctx, inputs, output):  # noqa: D102
        ctx.cell, ctx.bidirectional, ctx.options, _, ctx.need_x, ctx.need_weights, *tensors = inputs
        dy, dh_n, dc_n, dc, x, batch_sizes, h0, c0, y, saved, *noise_and_weights = tensors
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[3])
        ctx.save_for_backward(batch_sizes, dy, dh_n, dc_n, dc, x, h0, c0, y, saved, output[3], *noise_and_weights)

    @staticmethod
    def backward(ctx, ddx, ddh0, ddc0, _, *ddweights):  # noqa: D102
        if is_batched_by_autograd(ddx, ddh0, ddc0, *ddweights):
            return tuple(map_backward(partial(RecurrentLayerBackward.backward, ctx), ddx, ddh0, ddc0, None, *ddweights))
        _refuse(ctx.options, "a second derivative")
        batch_sizes, dy, dh_n, dc_n, dc, x, h0, c0, y, saved, dgates, *weights = ctx.saved_tensors
        noise, weights = Noise(*weights[:3]), weights[3:]
        asked = {"x": ddx if ctx.need_x else None, "h0": ddh0, "c0": ddc0}
        if all(dd is None for dd in (*asked.values(), *ddweights)):
            return (None,) * len(ctx.needs_input_grad)
        asked["weights"] = ddweights or [None] * len(weights)
        # In the tensors' own type, whatever autocast is on around backward().
        with _without_autocast(x):
            if noise.any or torch.is_grad_enabled() or transformed():
                gradients = partial(differentiable.gradients, ctx.cell, ctx.bidirectional, batch_sizes, noise)
                found, pull = torch.func.vjp(gradients, _cotangents(dy, dh_n, dc_n, dc), _leaves(x, h0, c0, weights))
                d_cotangents, d_leaves = pull(_like(found, asked))
                d = [d_cotangents.get(name) for name in ("y", "h_n", "c_n", "c")]
                d += [d_leaves.get(name) for name in ("x", "h0", "c0")]
                dweights = d_leaves["weights"]
            else:
                first, second = hessian_vector_product(
                    ctx.cell, ctx.bidirectional, batch_sizes, Arguments(x, h0, c0, weights), y, saved, dgates,
                    (dy, dh_n, dc_n, dc), Arguments(**asked), ctx.needs_input_grad[10],
                    any(ctx.needs_input_grad[-len(weights) :]),
                )  # fmt: skip
                d, dweights = [*first, second.x, second.h0, second.c0], second.weights
        return (None,) * 6 + (*d[:5], None, *d[5:], *(None,) * 5, *dweights)


def _without_autocast(x: Tensor) -> AbstractContextManager:
    return torch.autocast(x.device.type, enabled=False) if x.device.type in KERNEL_DTYPES else nullcontext()


def _leaves(x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: Sequence[Tensor]) -> dict:
    """A layer's arguments as :mod:`fusedrnn.differentiable` names them."""
    return {name: t for name, t in (("x", x), ("h0", h0), ("c0", c0)) if t is not None} | {"weights": list(weights)}


def _cotangents(
    dy: Tensor | None, dh_n: Tensor | None, dc_n: Tensor | None, dc: Tensor | None
) -> dict[str, Tensor]:
    return {name: d for name, d in (("y", dy), ("h_n", dh_n), ("c_n", dc_n), ("c", dc)) if d is not None}


def _like(tree: dict, given: dict) -> dict:
    """What is given, with the structure of ``tree``; zeros where nothing is."""

    def value(t: Any, d: Any) -> Any:
        if isinstance(t, list):
            return [value(own, other) for own, other in zip(t, d, strict=True)]
        return torch.zeros_like(t) if d is None else d

    return {name: value(t, given[name]) for name, t in tree.items()}
