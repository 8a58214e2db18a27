"""What goes beyond the plain backward pass: limits on what a step sends back, gates computed again, states of every
step; each against a loop that does it in the open.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from loops import STATES, TWINS, of_units
from parity import DEVICE, Case, packer, ragged
from tolerances import assert_all_close
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

import fusedrnn
from fusedrnn import FusedOptions
from fusedrnn.cells import CELLS

T, B = 7, 4
Gates = dict[str, Tensor]


class Limited(torch.autograd.Function):
    """The identity, whose gradient is limited as a step's message is."""

    @staticmethod
    def forward(ctx, state: Tensor, clip: float, mode: str) -> Tensor:
        ctx.clip, ctx.mode = clip, mode
        return state.view_as(state)

    @staticmethod
    def backward(ctx, d: Tensor):
        if ctx.mode == "value":
            return d.clamp(-ctx.clip, ctx.clip), None, None
        norm = d.norm(dim=1, keepdim=True)
        return torch.where(norm > ctx.clip, d * ctx.clip / norm, d), None, None


def loop(
    cell: str, module: nn.Module, x: Tensor, states: tuple[Tensor, ...], lengths: list[int], clip: float | None = None,
    mode: str = "value", bptt: int | None = None,
) -> tuple[Tensor, tuple[Tensor, ...], dict[str, Any]]:  # fmt: skip
    """One layer, step by step: output, final states, and of each direction the states and gate inputs by time."""
    names = CELLS[cell].states
    seen: dict[str, Any] = {name: [] for name in (*names, "inputs")}
    outputs, finals = [], []
    ends = torch.tensor(lengths)
    for d in range(2 if module.bidirectional else 1):
        suffix = "_l0" + ("_reverse" if d else "")
        w_ih, w_hh, b_ih, b_hh = (
            getattr(module, n + suffix, None) for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        w_hr = getattr(module, "weight_hr" + suffix, None)
        now = tuple(s[d] for s in states)
        state_steps, input_steps = [[None] * T for _ in names], [None] * T
        for t in reversed(range(T)) if d else range(T):
            active = (t < ends).unsqueeze(1)
            boundary = t + 1 if d else t
            inside = (t + 1 < ends) if d else (torch.full_like(ends, t) > 0)  # a step was before this one
            before = now
            if clip is not None:
                before = tuple(Limited.apply(s, clip, mode) for s in before)
            if bptt and boundary % bptt == 0 and 0 < boundary < T:
                before = tuple(torch.where(inside.unsqueeze(1), s.detach(), s) for s in before)
            more = of_units(cell, module, suffix)
            if CELLS[cell].norms:  # a gate's input is the normalised product and its bias
                own = x.new_zeros(x.size(1), len(w_ih)).requires_grad_() + (0.0 if b_ih is None else b_ih)
                new = TWINS[cell].step(x[t], before, w_ih, w_hh, own, b_hh, *more)
            else:
                own = linear(x[t], w_ih, b_ih)
                new = TWINS[cell].step(own, before, torch.eye(own.size(1), dtype=own.dtype), w_hh, None, b_hh, *more)
            own.retain_grad() if own.requires_grad else None
            if w_hr is not None:
                new = (linear(new[0], w_hr), *new[1:])
            now = tuple(torch.where(active, a, b) for a, b in zip(new, now, strict=True))
            for state, steps in zip(new, state_steps, strict=True):
                state.retain_grad() if state.requires_grad else None
                steps[t] = state
            input_steps[t] = own
        outputs.append(torch.stack([torch.where((t < ends).unsqueeze(1), state_steps[0][t], 0.0) for t in range(T)]))
        finals.append(now)
        for name, steps in zip(seen, (*state_steps, input_steps), strict=True):
            seen[name].append(steps)
    last = tuple(torch.stack(state) for state in zip(*finals, strict=True))
    return torch.cat(outputs, dim=2), last, seen


def kinds(cell: str) -> list[Case]:
    cases = []
    projections = (0, 3) if CELLS[cell].projectable else (0,)
    for bidirectional, proj_size in product((False, True), projections):
        case = Case(cell, T=T, B=B, bidirectional=bidirectional, proj_size=proj_size)
        cases += [case, ragged(case)]
    return cases


def given(case: Case, scale: float = 3.0) -> tuple[nn.Module, dict[str, Tensor]]:
    """A module with large weights, so that limits bind, and its leaves."""
    module = case.module()
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(scale)
    return module, case.tensors()


def gradients(
    case: Case, module: nn.Module, tensors: dict[str, Tensor], results: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(7)
    loss = sum((torch.randn(r.shape, generator=draw, dtype=torch.float64).to(r) * r).sum() for r in results)
    leaves = tensors | dict(module.named_parameters())
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {name: g.cpu() for name, g in zip(leaves, found, strict=True)}


def run(case: Case, **options: Any) -> dict[str, Tensor]:
    module, tensors = given(case)
    module = module.to(DEVICE)
    module.fused_options = replace(module.fused_options, **options)
    tensors = {name: t.detach().to(DEVICE).requires_grad_() for name, t in tensors.items()}
    states = tuple(tensors[name] for name in STATES if name in tensors)
    y, last = module(tensors["x"], states if len(states) > 1 else states[0], lengths=case.lengths)
    return gradients(case, module, tensors, (y, *(last if isinstance(last, tuple) else (last,))))


def expected(case: Case, **options: Any) -> dict[str, Tensor]:
    module, tensors = given(case)
    states = tuple(tensors[name] for name in STATES if name in tensors)
    lengths = list(case.lengths or [T] * B)
    y, last, _ = loop(case.cell, module, tensors["x"], states, lengths, **options)
    return gradients(case, module, tensors, (y, *last))


@pytest.mark.isa
@pytest.mark.float64
@pytest.mark.parametrize("cell", CELLS)
def test_truncation(cell: str) -> None:
    for case, steps in product(kinds(cell), (1, 3, 6, 7, 100)):
        assert_all_close(run(case, bptt_steps=steps), expected(case, bptt=steps))


@pytest.mark.isa
@pytest.mark.float64
@pytest.mark.parametrize("mode", ["value", "norm"])
@pytest.mark.parametrize("cell", CELLS)
def test_clipping(cell: str, mode: str) -> None:
    for case, clip in product(kinds(cell), (0.05, 0.5, 1e6)):
        found, wanted = run(case, grad_clip=clip, grad_clip_mode=mode), expected(case, clip=clip, mode=mode)
        assert_all_close(found, wanted)
        plain = run(case)
        assert torch.equal(found["x"], plain["x"]) == (clip > 1) or mode == "norm" or cell == "residual_rnn"
    assert_all_close(
        run(case, grad_clip=0.3, grad_clip_mode=mode, bptt_steps=2), expected(case, clip=0.3, mode=mode, bptt=2)
    )


@pytest.mark.parametrize("count", [1, 2])
def test_limits_on_several_threads(count: int, threads: Callable[[int], None]) -> None:
    """Large enough that two threads share each step's units."""
    threads(count)
    for cell, mode in product(("lstm", "gru"), ("value", "norm")):
        case = Case(cell, T=T, B=3, H=160, I=8)
        options = {"grad_clip": 0.01, "grad_clip_mode": mode, "bptt_steps": 4}
        module, tensors = given(case, 1.0)
        states = tuple(tensors[name] for name in STATES if name in tensors)
        module.fused_options = replace(module.fused_options, **options)
        y, last = module(tensors["x"], states if len(states) > 1 else states[0])
        last = last if isinstance(last, tuple) else (last,)
        wanted = loop(cell, module, tensors["x"], states, [T] * 3, 0.01, mode, 4)
        assert_all_close(
            gradients(case, module, tensors, (y, *last)), gradients(case, module, tensors, (wanted[0], *wanted[1]))
        )


def test_limits_are_for_the_first_gradient_alone() -> None:
    x = torch.randn(5, 2, 3, requires_grad=True)
    for options in ({"grad_clip": 1.0}, {"bptt_steps": 2}):
        module = fusedrnn.LSTM(3, 4, **options)
        (dx,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="grad_clip and bptt_steps change the first gradient alone"):
            dx.sum().backward()
        with pytest.raises(RuntimeError, match="grad_clip and bptt_steps change the first gradient alone"):
            torch.func.jvp(lambda x: module(x)[0], (x,), (x,))
        torch.func.grad(lambda x: module(x)[0].sum())(x)


@pytest.mark.isa
@pytest.mark.float64
@pytest.mark.parametrize("cell", CELLS)
def test_gates_computed_again(cell: str) -> None:
    """The same bits, and nothing kept but input and output; higher derivatives and maps as ever."""
    for case in kinds(cell):
        for name, t in run(case, recompute="gates").items():
            assert torch.equal(t, run(case)[name]), name
    module, x = fusedrnn.LSTM(3, 4, num_layers=2, recompute="gates").double(), torch.randn(5, 2, 3, dtype=torch.float64)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x.requires_grad_())
    weights = {p.data_ptr() for p in module.parameters()}
    own = {t.data_ptr(): t.numel() for t in kept if t.numel() and t.data_ptr() not in weights}
    assert sum(own.values()) == 5 * 2 * (3 + 4 + 4)  # the input, and each layer's output
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], x, fast_mode=True)
    plain = copy.deepcopy(module)
    plain.fused_options = FusedOptions(recompute="none")
    many = torch.randn(3, 5, 2, 3, dtype=torch.float64)
    for a, b in zip(*(torch.vmap(torch.func.grad(lambda x, m=m: m(x)[0].sum()))(many) for m in (module, plain))):
        torch.testing.assert_close(a, b)


@pytest.mark.isa
@pytest.mark.float64
@pytest.mark.parametrize("cell", CELLS)
def test_states_of_every_step(cell: str) -> None:
    for case in kinds(cell):
        module, tensors = given(case, 1.0)
        module = module.to(DEVICE)
        tensors = {name: t.detach().to(DEVICE).requires_grad_() for name, t in tensors.items()}
        states = tuple(tensors[name] for name in STATES if name in tensors)
        hx = states if len(states) > 1 else states[0]
        y, _, (found,) = module(tensors["x"], hx, lengths=case.lengths, return_states=True)
        assert torch.equal(found[0], y) and len(found) == len(CELLS[cell].states)
        module_, tensors_ = given(case, 1.0)
        states_ = tuple(tensors_[name] for name in STATES if name in tensors_)
        lengths = list(case.lengths or [T] * B)
        _, _, seen = loop(cell, module_, tensors_["x"], states_, lengths)
        inside = (torch.arange(T).unsqueeze(1) < torch.tensor(lengths)).unsqueeze(2)
        names = CELLS[cell].states
        wanted = [torch.cat([torch.stack(d) for d in seen[name]], dim=2).where(inside, 0.0) for name in names]
        assert_all_close(
            {name: t.detach().cpu() for name, t in zip(names, found)},
            {name: t.detach() for name, t in zip(names, wanted)},
        )
        assert_all_close(
            gradients(case, module, tensors, tuple(found)), gradients(case, module_, tensors_, tuple(wanted))
        )


@pytest.mark.parametrize("recompute", ["none", "gates"])
def test_derivatives_of_every_state(recompute: str) -> None:
    case = Case("lstm", T=3, B=2, I=2, H=3, num_layers=2, bidirectional=True, proj_size=2)
    module, x = case.module(), case.tensors()["x"]
    module.fused_options = FusedOptions(recompute=recompute)
    weight = module.weight_hh_l0_reverse.detach().requires_grad_()

    def states(x: Tensor, weight: Tensor) -> list[Tensor]:
        found = torch.func.functional_call(module, {"weight_hh_l0_reverse": weight}, (x,), {"return_states": True})
        return [state for layer in found[2] for state in layer]

    assert [tuple(t.shape) for t in states(x, weight)] == [(3, 2, 4), (3, 2, 6)] * 2
    assert torch.autograd.gradcheck(states, (x, weight), fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(states, (x, weight), fast_mode=True)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_states_laid_out_as_the_output(packed: bool) -> None:
    case = Case("lstm", T=T, B=3, num_layers=2, batch_first=True)
    case = ragged(case) if packed else case
    module, x, pack = case.module(), case.tensors()["x"], packer(case)
    y, _, states = module(pack(x) if pack else x, return_states=True)
    with torch.no_grad():
        again = module(pack(x) if pack else x, return_states=True)[2]
    if packed:
        assert all(isinstance(t, PackedSequence) for layer in states for t in layer)
        y, states, again = (
            pad_packed_sequence(y, batch_first=True)[0],
            *([[pad_packed_sequence(t, batch_first=True)[0] for t in layer] for layer in s] for s in (states, again)),
        )
    assert torch.equal(states[1][0], y) and all(t.shape == (3, T, 5) for layer in states for t in layer)
    for first, second in zip(states, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    one = module(x[0], return_states=True) if not packed else None
    assert one is None or torch.allclose(one[2][0][1], states[0][1][0])


def test_wrong_options() -> None:
    for options, text in (
        ({"grad_clip": 0.0}, "grad_clip must be positive and finite, or None, got 0.0"),
        ({"grad_clip": math.nan}, "grad_clip must be positive and finite, or None, got nan"),
        ({"grad_clip_mode": "both"}, "grad_clip_mode must be 'value' or 'norm', got 'both'"),
        ({"bptt_steps": 0}, "bptt_steps must be a positive integer, or None, got 0"),
        ({"bptt_steps": 2.0}, "bptt_steps must be a positive integer, or None, got 2.0"),
        ({"recompute": "states"}, "recompute must be 'none' or 'gates', got 'states'"),
    ):
        for name in ("RNN", "LSTM", "GRU", "ResidualRNN"):
            with pytest.raises(ValueError, match=text):
                getattr(fusedrnn, name)(3, 4, **options)
        with pytest.raises(ValueError, match=text):
            FusedOptions(**options)
    assert repr(fusedrnn.GRU(3, 4, bptt_steps=5)) == "GRU(3, 4, bptt_steps=5)"


def test_the_limit_under_a_grad_scaler() -> None:
    """It is one of the scaled gradient: times the scale it is the limit without a scaler."""
    module, x, c = fusedrnn.LSTM(3, 4).double(), torch.randn(9, 2, 3).double(), 1e-2

    def gradients(limit: float | None, scaler: torch.amp.GradScaler) -> list[Tensor]:
        module.zero_grad()
        optimizer = torch.optim.SGD(module.parameters())
        module.fused_options = fusedrnn.FusedOptions(grad_clip=limit)
        scaler.scale(module(x)[0].square().sum()).backward()
        scaler.unscale_(optimizer)
        return [p.grad.clone() for p in module.parameters()]

    off, on = (torch.amp.GradScaler("cpu", enabled=enabled) for enabled in (False, True))
    expected = gradients(c, off)
    assert on.get_scale() > 1
    for a, b in zip(gradients(c * on.get_scale(), on), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.allclose(gradients(c, torch.amp.GradScaler("cpu"))[1], expected[1])
    # Or of the whole gradient, when the scale is out of it.
    bound = 0.1 * torch.cat([g.flatten() for g in gradients(None, off)]).norm()
    for enabled in (False, True):
        gradients(None, torch.amp.GradScaler("cpu", enabled=enabled))
        torch.nn.utils.clip_grad_norm_(module.parameters(), bound.item())
        norm = torch.cat([p.grad.flatten() for p in module.parameters()]).norm()
        torch.testing.assert_close(norm, bound, rtol=1e-4, atol=0)
