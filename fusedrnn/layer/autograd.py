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

from .. import _C
from ..cells import CELLS
from ..torch_internals import dual_level, exporting, functionalizing, tracked, transformed
from . import differentiable
from .batching import is_batched_by_autograd, map_backward
from .call import Gradients, LayerCall, Leaves, Needs, Options, OutputGradients, Outputs
from .listeners import interested
from .ops import KERNEL_DTYPES, refuse_older_exporter
from .second_order import hessian_vector_product

__all__ = ["RecurrentLayer", "RecurrentLayerBackward", "recurrent_layer"]


def recurrent_layer(call: LayerCall) -> Outputs:
    """One layer: y, the final states and, if the options ask for them, all c_t (T, B, D*H) or (N, D*H).

    What the backward pass needs is saved only if some gradient is wanted. No gradient is that of the noise.
    """
    compiling, mapped = is_compiling(), transformed()
    if call.info.eager:
        if call.x.size(0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        return _by_torch(call, "a module made with eager=True, of which torch computes every gradient,")
    if exporting():  # a program has no backward
        return _forward(call, save=False)[0]
    if call.scales is not None:
        return _without_gradient(call)
    if torch.jit.is_tracing():
        refuse_older_exporter(call.cell)
    if _wants_plain_operations(call):
        return _by_torch(call, "forward-mode AD and torch.func.functionalize")
    if compiling and mapped and torch.is_grad_enabled():
        # Dynamo takes no tensor inside torch.func.grad for one that requires a gradient: it would be lost.
        raise NotImplementedError("fusedrnn: torch.compile cannot trace a layer inside torch.func.grad or vmap")
    wanted = any(t is not None and t.requires_grad for t in (call.x, *call.states, *call.weights))
    if torch.is_grad_enabled() and (wanted or mapped):  # what tensors inside a transform require does not show
        if torch.jit.is_tracing():
            raise NotImplementedError(
                "fusedrnn: TorchScript cannot hold the backward pass of a recurrent layer: use torch.export.export, or,"
                " for inference, torch.jit.trace under torch.no_grad()"
            )
        arguments = (call._replace(owner=None) if compiling else call).flat
        apply = RecurrentLayer.apply if compiling or mapped else partial(_apply, RecurrentLayer)
        y, *finals, c, _ = apply(*arguments)
        return Outputs(y, finals, c)
    return _forward(call, save=False)[0]


def _by_torch(call: LayerCall, why: str) -> Outputs:
    _refuse(call.options, why)
    found = differentiable.layer(call)
    return found._replace(y=found.y.transpose(0, 1)) if call.options.batch_first else found


def wants_gradient(x: Tensor, states: Sequence[Tensor | None]) -> bool:
    """Whether one is wanted of a layer whose weights have none."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *states))


_NO_GRADIENT = (
    "a layer with int8 or bfloat16 weights alone is for inference and has no gradient: train the model that it was made"
    " of, or call it under torch.no_grad()"
)


class _Inference(torch.autograd.Function):
    """A layer with small weights: whoever wants a gradient of its results is told."""

    @staticmethod
    def forward(ctx: Any, call: LayerCall, *_: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: D102
        y, finals, c = _forward(call, save=False)[0]
        return y, *finals, c

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:  # noqa: D102
        raise RuntimeError(_NO_GRADIENT)


def _without_gradient(call: LayerCall) -> Outputs:
    if transformed() and any(t is not None and tracked(t) for t in (call.x, *call.states)):
        raise RuntimeError(_NO_GRADIENT)
    if transformed() or not wants_gradient(call.x, call.states):
        return _forward(call, save=False)[0]
    if is_compiling():
        raise RuntimeError(_NO_GRADIENT)
    y, *finals, c = _Inference.apply(call, call.x, *call.states)
    return Outputs(y, finals, c)


def _forward(call: LayerCall, save: bool) -> tuple[Outputs, Tensor]:
    """The outputs, and what the backward pass wants, if anything."""
    save = save and not _recomputes(call)
    states = call.options.states and call.info.beside > 0
    (y, finals, c), saved = call.forward(save or states)
    y = in_place(Tensor.transpose_, Tensor.transpose, y, 0, 1) if call.options.batch_first else y
    if states:
        hidden = finals[1].size(2)
        begin = call.info.saved * hidden
        end = begin + call.info.beside * hidden
        c = torch.cat([s[:, begin:end] for s in saved], dim=1).to(call.x.dtype)
        c = c.reshape(*call.x.shape[:-1], c.size(1))
        saved = saved if save else saved[:, :0].clone()
    return Outputs(y, finals, c), saved


def in_place(method: Callable[..., Tensor], otherwise: Callable[..., Tensor], t: Tensor, *arguments: int) -> Tensor:
    """Another shape of a tensor that nobody else holds, not as a view; as one where Dynamo or a transform looks on."""
    return (otherwise if is_compiling() or transformed() else method)(t, *arguments)


def _recomputes(call: LayerCall) -> bool:
    """Whether the backward pass makes a second forward pass: there is something that it need not save."""
    return call.options.recompute and (call.info.saved > 0 or len(call.info.states) > 1)


def _refuse(options: Options, what: str) -> None:
    if options.limited:
        raise RuntimeError(f"grad_clip and bptt_steps change the first gradient alone: {what} would not know of them")


def _wants_plain_operations(call: LayerCall, gradients: OutputGradients | None = None) -> bool:
    """Whether only :func:`fusedrnn.layer.differentiable.layer` will do: forward-mode AD, whose levels torch lets no
    Function see but one, and torch.func.functionalize, which takes none.
    """
    if is_compiling():
        return dual_level() >= 0
    if transformed():
        return dual_level() >= 0 or functionalizing()
    return dual_level() >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None
        for group in (call.leaves, gradients) if group is not None for t in group.flat
    )  # fmt: skip


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> tuple[Tensor, ...]:
    """``function.apply`` without its look-up of default values, 80 us: there are none.

    Not a method of the class: after a graph break Dynamo would begin a frame there, and fail.
    """
    return super(torch.autograd.Function, function).apply(*arguments)


class RecurrentLayer(torch.autograd.Function):
    """One layer, all directions: ``apply(*call.flat)`` of a :class:`LayerCall`.

    Returns ``y, *final states, c, saved``. Shapes as in :func:`fusedrnn.functional.recurrent` for a single layer;
    ``c`` is None if the options do not ask for it.

    Saved for the backward pass: the inputs, ``y``, and ``saved`` of the op, or nothing with ``options.recompute``.
    docs/design.md says which values these are and what is computed again.
    """

    generate_vmap_rule = True  # from the ops' rules (batching.py)

    @staticmethod
    def forward(*flat):  # noqa: D102
        (y, finals, c), saved = _forward(LayerCall.of(*flat), save=True)
        return y, *finals, c, saved  # what may be None behind all others: Dynamo moves the gradients of what follows it

    @staticmethod
    def setup_context(ctx, inputs, output):  # noqa: D102
        y, *_, saved = output
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(saved)
        ctx.static = inputs[:4]
        ctx.save_for_backward(y, saved, *inputs[4:])

    @staticmethod
    def backward(ctx, dy, *rest):  # noqa: D102
        *dfinals, dc, _ = rest
        if is_batched_by_autograd(dy, *dfinals, dc):
            return tuple(map_backward(partial(RecurrentLayer.backward, ctx), dy, *dfinals, dc, None))
        y, saved, *tensors = ctx.saved_tensors
        call, gradients = LayerCall.of(*ctx.static, *tensors), OutputGradients(dy, dc, dfinals)
        if dy is dc is None and all(d is None for d in dfinals):
            return (None,) * len(ctx.needs_input_grad)
        wanted = LayerCall.leaves_of(_wanted(ctx, (*ctx.static, *tensors)))
        needs = Needs(wanted[0], any(wanted[1 + len(call.states) :]))
        if call.options.batch_first:
            y, gradients = y.transpose(0, 1), gradients._replace(y=None if dy is None else dy.transpose(0, 1))
        if _recomputes(call):
            with torch.no_grad():
                _, saved = call.forward(save=True)
        if _wants_plain_operations(call, gradients):
            _refuse(call.options, "forward-mode AD and torch.func.functionalize")
            with _without_autocast(call.x):
                cotangents, leaves = map(differentiable.numbered, (gradients.flat, call.leaves.flat))
                found = differentiable.gradients(call, cotangents, leaves)
            result = [found.get(i) for i in range(len(wanted))]
        elif _is_one_step(call):
            by_hand = None if isinstance(ctx, _Context) else _one_step_by_hand(call, gradients, y, saved, wanted)
            result = by_hand or _one_step(call, gradients)
        # Another Function only where its result may be differentiated. Dynamo traces none inside a backward.
        elif is_compiling() or not (torch.is_grad_enabled() or transformed()):
            dx, dstates, dweights, *_ = _backward(call, gradients, y, saved, needs)
            result = [dx, *dstates, *(dweights or [None] * len(call.weights))]
        else:
            _, *result = RecurrentLayerBackward.apply(*needs[:2], y, saved, *call.flat, *gradients.flat)
            result += [None] * (len(wanted) - len(result))
        return LayerCall.with_leaves([d if need else None for d, need in zip(result, wanted, strict=True)])


def _wanted(ctx: Any, arguments: Sequence[Any]) -> Sequence[bool]:
    """Which of a Function's arguments this backward pass asks a gradient of: ``torch.autograd.grad`` need not ask for
    all that have one.
    """
    edges = None if is_compiling() else _C.wanted_edges(ctx)
    if edges is None or len(edges) != sum(isinstance(t, Tensor) for t in arguments):
        return ctx.needs_input_grad
    of_tensors = iter(edges)
    return tuple(isinstance(t, Tensor) and next(of_tensors) for t in arguments)


class _Context(NamedTuple):
    """What ``RecurrentLayer.backward`` reads of a call; of C++, which has asked: what is by hand there is done."""

    static: Sequence[Any]
    saved_tensors: Sequence[Tensor | None]
    needs_input_grad: Sequence[Any]


def backward_of_step(
    cell: str, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor], h: Tensor, saved: Tensor,
    gradients: Sequence[Tensor | None], wanted: Sequence[bool],
) -> Sequence[Tensor | None]:  # fmt: skip
    """``RecurrentLayer.backward`` for a step whose forward pass was made by C++ (``csrc/training.h``): the gradients of
    x (B, I), the states (B, H) that were given and the weights, from those of the next states.
    """
    count = len(CELLS[cell].states)
    given = [*(s.unsqueeze(0) for s in states), *[None] * count][:count]
    call = LayerCall(cell, x.unsqueeze(0), given, weights)
    of_states = [*wanted[1 : 1 + len(states)], *[False] * count][:count]
    needs = LayerCall.with_leaves([wanted[0], *of_states, *wanted[1 + len(states) :]])
    context = _Context(call.flat[:4], (h.unsqueeze(0), saved, *call.flat[4:]), needs)
    finals = [None if d is None else d.unsqueeze(0) for d in gradients]
    found = LayerCall.leaves_of(RecurrentLayer.backward(context, None, *finals, None, None))
    dx, dstates, dweights = found[0], found[1 : 1 + len(states)], found[1 + len(given) :]
    return [None if d is None else d.squeeze(0) for d in (dx, *dstates)] + list(dweights)


_C.set_long_way(backward_of_step)


def _is_one_step(call: LayerCall) -> bool:
    """Whether a graph for further derivatives is wanted of one step: the second backward pass by hand has more to set
    up than to do there, and a cell in a loop has as many graphs as steps.
    """
    return (
        torch.is_grad_enabled()
        and not (is_compiling() or transformed() or call.options.limited)
        and not interested(call.owner)
        and call.batch_sizes is None
        and call.x.size(0) == 1
    )


def _one_step_by_hand(
    call: LayerCall, gradients: OutputGradients, y: Tensor, saved: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None] | None:
    """The gradients of x, the initial states and the weights, with a graph whose own derivative is by hand too; None
    where C++ has none (``csrc/second_order.h``).
    """
    alone = call.bidirectional or call.noise.any or call.info.beside > 1
    if alone or gradients.c is not None or len(call.weights) not in (2, 4):
        return None
    count = len(call.states)
    given = sum(s is not None for s in call.states)
    if 0 < given < count or any(wanted[1 + given : 1 + count]):
        return None
    h = [None if d is None else d[0] for d in (gradients.y, gradients.finals[0])]
    h = h[0] if h[1] is None else h[1] if h[0] is None else h[0] + h[1]
    others = [None if d is None else d[0] for d in gradients.finals[1:]]
    states = [s[0] for s in call.states[:given]]
    asked = [*wanted[: 1 + given], *wanted[1 + count :]]
    found = _C.gradients_of_step(call.cell, call.x[0], states, call.weights, y[0], saved, [h, *others], asked)
    if found is None:
        return None
    found = [None if d is None else d.unsqueeze(0) for d in found[: 1 + given]] + found[1 + given :]
    return [*found[: 1 + given], *([None] * (count - given)), *found[1 + given :]]


def _one_step(call: LayerCall, gradients: OutputGradients) -> list[Tensor | None]:
    """The gradients of x, the initial states and the weights, as torch's operations give them, with their graph."""
    given = call.leaves.flat
    wanted = [i for i, t in enumerate(given) if t is not None and t.requires_grad]
    for i in wanted:
        given[i] = given[i].view_as(given[i])  # one may be computed from another
    with _without_autocast(call.x):
        outputs = differentiable.layer(call._replace(**Leaves.of(call.cell, given)._asdict()))
        flat = OutputGradients(outputs.y, outputs.c, outputs.finals).flat
        paired = [(o, d) for o, d in zip(flat, gradients.flat, strict=True) if d is not None]
        found = torch.autograd.grad(
            [o for o, _ in paired], [given[i] for i in wanted], [d for _, d in paired], create_graph=True,
            allow_unused=True,
        )  # fmt: skip
    result: list[Tensor | None] = [None] * len(given)
    for i, gradient in zip(wanted, found, strict=True):
        result[i] = gradient
    return result


def _backward(call: LayerCall, gradients: OutputGradients, y: Tensor, saved: Tensor, needs: Needs) -> Gradients:
    """The kernel's backward pass, with norms for who records."""
    recorders = interested(call.owner)
    found = call.backward(gradients, y, saved, Needs(needs.x, needs.weights, needs.gates, bool(recorders)))
    for recorder in recorders:
        recorder.add(call, gradients, found.norms)
    return found


class RecurrentLayerBackward(torch.autograd.Function):
    """The hand-derived gradients of :class:`RecurrentLayer`, as a function that may be differentiated again:
    ``apply(need_x, need_weights, y, saved, *call.flat, *gradients.flat)`` -> those of the gates and of the leaves.

    *Its derivative* is :func:`fusedrnn.layer.second_order.hessian_vector_product`, by hand. Where that is to be
    differentiated in its turn, or a transform of torch.func is at work, it is that of
    :func:`fusedrnn.layer.differentiable.layer`, differentiated twice by torch: correct to any order, and slower. ``y``
    and ``saved`` are functions of the other arguments; what goes through them is part of those arguments' gradients.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(need_x, need_weights, y, saved, cell, *rest):  # noqa: D102
        call, gradients = _call_and_gradients(cell, rest)
        found = _backward(call, gradients, y, saved, Needs(need_x, need_weights, gates=True))
        return found.gates, found.x, *found.states, *found.weights

    @staticmethod
    def setup_context(ctx, inputs, output):  # noqa: D102
        *ctx.needs, y, saved = inputs[:4]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[0])
        ctx.static = inputs[4:8]
        ctx.save_for_backward(y, saved, output[0], *inputs[8:])

    @staticmethod
    def backward(ctx, _, ddx, *dd):  # noqa: D102
        if is_batched_by_autograd(ddx, *dd):
            return tuple(map_backward(partial(RecurrentLayerBackward.backward, ctx), None, ddx, *dd))
        y, saved, dgates, *tensors = ctx.saved_tensors
        call, gradients = _call_and_gradients(ctx.static[0], (*ctx.static[1:], *tensors))
        _refuse(call.options, "a second derivative")
        need_x, need_weights = ctx.needs
        v = Leaves.of(call.cell, [ddx if need_x else None, *dd])
        if not v.weights:
            v = v._replace(weights=[None] * len(call.weights))
        if all(d is None for d in v.flat):
            return (None,) * len(ctx.needs_input_grad)
        asked = _wanted(ctx, (None, None, y, saved, *ctx.static, *tensors))
        wanted = Leaves.of(call.cell, LayerCall.leaves_of(asked[4 : -len(gradients.flat)]))
        # In the tensors' own type, whatever autocast is on around backward().
        with _without_autocast(call.x):
            if (
                call.noise.any
                or call.info.parameters
                or call.info.beside > 1
                or torch.is_grad_enabled()
                or transformed()
            ):
                cotangents, leaves = map(differentiable.numbered, (gradients.flat, call.leaves.flat))
                found, pull = torch.func.vjp(partial(differentiable.gradients, call), cotangents, leaves)
                vector = dict(enumerate(v.flat))
                by_output, by_leaf = pull({
                    i: torch.zeros_like(t) if vector[i] is None else vector[i] for i, t in found.items()
                })  # fmt: skip
                by_output = [by_output.get(i) for i in range(len(gradients.flat))]
                second = Leaves.of(call.cell, [by_leaf.get(i) for i in range(len(v.flat))])
            else:
                needs = Needs(wanted.x, any(wanted.weights))
                first, second = hessian_vector_product(call, y, saved, dgates, gradients, v, needs)
                by_output = first.flat
        return None, None, None, None, *LayerCall.with_leaves(second.flat), *by_output


def _call_and_gradients(cell: str, rest: tuple[Any, ...]) -> tuple[LayerCall, OutputGradients]:
    """From ``(*call.flat[1:], *gradients.flat)``."""
    end = len(rest) - 2 - len(CELLS[cell].states)
    return LayerCall.of(cell, *rest[:end]), OutputGradients.of(*rest[end:])


def _without_autocast(x: Tensor) -> AbstractContextManager:
    return torch.autocast(x.device.type, enabled=False) if x.device.type in KERNEL_DTYPES else nullcontext()
