"""Variational dropout, zoneout and weight drop: against a loop that does in the open what the masks say."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from loops import TWINS, two_states
from parity import DEVICE
from test_through_time import Limited
from tolerances import assert_all_close
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from fusedrnn.cells import CELLS
from fusedrnn.layer import dropout
from fusedrnn.layer.autograd import recurrent_layer
from fusedrnn.layer.call import LayerCall, Noise, Options

T, B, I, H = 6, 4, 3, 5
SIZES = (4, 4, 3, 1, 1, 1)  # samples of each step, of a ragged batch
EVERYTHING = {"input_dropout": 0.2, "recurrent_dropout": 0.3, "zoneout": 0.4, "weight_dropout": 0.25}
Layer = dict[str, Any]


def one_layer(
    cell: str, x: Tensor, sizes: Sequence[int], states: Sequence[Tensor], weights: Sequence[Tensor], noise: Noise,
    directions: int, clip: float = 0.0, mode: str = "value", bptt: int = 0,
) -> list[Tensor]:  # fmt: skip
    """y, final states and, of the LSTM, all c_t, rows as in a PackedSequence: a sample and a step at a time.

    A mask on h is one on the columns of W_hh, another one for each sample.
    """
    each, starts = len(weights) // directions, torch.tensor([0, *sizes]).cumsum(0).tolist()
    lengths = [sum(b < n for n in sizes) for b in range(sizes[0])]
    rows = [{} for _ in states]
    finals = [{} for _ in states]
    for d, (b, length) in product(range(directions), enumerate(lengths)):
        w_ih, w_hh, *rest = weights[d * each : (d + 1) * each]
        biases = tuple(rest[:2]) if each >= 4 else (None, None)
        w_hh = w_hh if noise.mask_h is None else w_hh * noise.mask_h[d, b]
        now = tuple(s[d, b : b + 1] for s in states)
        for t in reversed(range(length)) if d else range(length):
            row, before = starts[t] + b, t + 1 if d else t  # the boundary that the state comes over
            if clip:
                now = tuple(Limited.apply(s, clip, mode) for s in now)
            if bptt and before % bptt == 0 and 0 < before < length:
                now = tuple(s.detach() for s in now)
            new = TWINS[cell].step(x[row : row + 1], now, w_ih, w_hh, *biases)
            new = (linear(new[0], rest[-1]), *new[1:]) if each % 2 else new
            keeps = [None if k is None else k[row].chunk(directions)[d] for k in noise[1:]]
            now = tuple(n if k is None else k * s + (1 - k) * n for n, s, k in zip(new, now, keeps))
            for state, steps in zip(now, rows):
                steps[row, d] = state
        for state, last in zip(now, finals):
            last[d, b] = state
    joined = [torch.cat([torch.cat([s[r, d] for d in range(directions)], 1) for r in range(x.size(0))]) for s in rows]
    last = [torch.stack([torch.cat([f[d, b] for b in range(sizes[0])]) for d in range(directions)]) for f in finals]
    return [joined[0], *last, *joined[1:]]


def draw(
    cell: str, directions: int, proj: int, sizes: Sequence[int], kinds: str, *, means: bool = False,
    dtype: torch.dtype = torch.float64, seed: int = 0,
) -> Layer:  # fmt: skip
    """Random arguments of a layer. ``kinds``: which of mask_h (m), keep_h (h), keep_c (c); ``means``: any number in
    the place of zeros and ones.
    """
    g = torch.Generator().manual_seed(seed)
    gates, two, out, n = len(CELLS[cell].gates), len(CELLS[cell].states) == 2, proj or H, sum(sizes)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).mul(0.7).to(dtype).requires_grad_()

    def mask(kind: str, *shape: int) -> Tensor | None:
        values = torch.rand(shape, generator=g, dtype=torch.float64)
        if kind not in kinds or (kind == "c" and not two):
            return None
        return (values if means else (values < 0.4).double() * (1.6 if kind == "m" else 1)).to(dtype)

    masks = (("m", directions, sizes[0], out), ("h", n, directions * out), ("c", n, directions * H))
    weights = []
    for _ in range(directions):
        weights += [normal(gates * H, I), normal(gates * H, out), normal(gates * H), normal(gates * H)]
        weights += [normal(proj, H)] if proj else []
    return {
        "x": normal(n, I),
        "h0": normal(directions, sizes[0], out),
        "c0": normal(directions, sizes[0], H) if two else None,
        "weights": weights,
        "noise": Noise(*(mask(*each) for each in masks)),
    }


def outcome(results: Sequence[Tensor], layer: Layer) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    factors = [torch.randn(r.shape, generator=g, dtype=torch.float64).to(r) for r in results]
    leaves = [t for t in (layer["x"], layer["h0"], layer["c0"], *layer["weights"]) if t is not None]
    found = torch.autograd.grad(results, leaves, factors)
    return {str(i): t.detach().cpu() for i, t in enumerate((*results, *found))}


def ours(
    cell: str, layer: Layer, sizes: Sequence[int], directions: int, clip: float = 0.0, mode: str = "value",
    bptt: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    def there(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().to(DEVICE).requires_grad_(t.requires_grad)

    layer = {n: there(v) if n in ("x", "h0", "c0") else list(map(there, v)) for n, v in layer.items()}
    x, noise = layer["x"], Noise(*layer["noise"])
    ragged = len(set(sizes)) > 1
    if not ragged:  # [T, B, *]
        x = x.unflatten(0, (len(sizes), -1))
        noise = Noise(noise.mask_h, *(None if k is None else k.unflatten(0, (len(sizes), -1)) for k in noise[1:]))
    states = [layer[f"{name}0"] for name in CELLS[cell].states]
    y, finals, c = recurrent_layer(LayerCall(
        cell, x, states, layer["weights"], directions == 2, torch.tensor(sizes) if ragged else None, noise,
        Options(True, False, bptt, clip, mode == "norm"),
    ))  # fmt: skip
    rows = [y.reshape(-1, y.size(-1)), *finals]
    return outcome(rows + ([c.reshape(-1, c.size(-1))] if c is not None else []), layer)


def expected(cell: str, layer: Layer, sizes: Sequence[int], directions: int, **limits: Any) -> dict[str, Tensor]:
    def wide(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().double().requires_grad_(t.requires_grad)

    layer = {n: wide(v) if n in ("x", "h0", "c0") else list(map(wide, v)) for n, v in layer.items()}
    states = [s for s in (layer["h0"], layer["c0"]) if s is not None]
    noise = Noise(*layer["noise"])
    return outcome(one_layer(cell, layer["x"], sizes, states, layer["weights"], noise, directions, **limits), layer)


@pytest.mark.isa
@pytest.mark.parametrize("kinds", ["m", "h", "c", "mhc"])
@pytest.mark.parametrize("cell", CELLS)
def test_the_kernels(cell: str, kinds: str) -> None:
    """Every output and every gradient, of zeros and ones and of anything between."""
    if kinds == "c" and len(CELLS[cell].states) == 1:
        kinds = "mh"
    projections = (0, 3) if CELLS[cell].projectable else (0,)
    for directions, proj, sizes, means in product((1, 2), projections, ((B,) * 3, SIZES), (False, True)):
        layer = draw(cell, directions, proj, sizes, kinds, means=means)
        assert_all_close(ours(cell, layer, sizes, directions), expected(cell, layer, sizes, directions))


@pytest.mark.isa
@pytest.mark.parametrize("cell", CELLS)
def test_with_a_limited_backward_pass(cell: str) -> None:
    """What is clipped and cut is all that a step sends back, past the cell and through it."""
    projections = (0, 3) if CELLS[cell].projectable else (0,)
    limits = ({"clip": 0.3}, {"clip": 0.3, "mode": "norm"}, {"bptt": 2}, {"clip": 0.2, "mode": "norm", "bptt": 3})
    for directions, proj, sizes, own in product((1, 2), projections, ((B,) * 5, SIZES), limits):
        layer = draw(cell, directions, proj, sizes, "mhc", means=True)
        found, wanted = ours(cell, layer, sizes, directions, **own), expected(cell, layer, sizes, directions, **own)
        assert_all_close(found, wanted)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before", "rnn_tanh"])
def test_dtypes(cell: str, dtype: torch.dtype) -> None:
    proj = 3 if CELLS[cell].projectable else 0
    for directions, sizes in ((2, (B,) * 3), (1, SIZES)):
        layer = draw(cell, directions, proj, sizes, "mhc", dtype=dtype)
        assert_all_close(ours(cell, layer, sizes, directions), expected(cell, layer, sizes, directions), dtype)


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before"])
def test_two_threads_share_a_step(cell: str, threads: Callable[[int], None]) -> None:
    module, x = TWINS[cell].layer(8, 160, zoneout=0.2, recurrent_dropout=0.2).double(), torch.randn(6, 3, 8).double()
    found = {}
    for count in (1, 2):
        threads(count)
        torch.manual_seed(1)
        module.zero_grad()
        y, _ = module(x)
        (y * torch.arange(160)).sum().backward()
        found[count] = {"y": y.detach()} | {name: p.grad.clone() for name, p in module.named_parameters()}
    assert_all_close(found[2], found[1])


def watch(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], list[Noise], list[list[Tensor]]]:
    """What is drawn from now on: masks of variational dropout, the noise of each layer, and its weights."""
    masks: list[Tensor] = []
    noises: list[Noise] = []
    weights: list[list[Tensor]] = []

    def kept(into: list, function: Callable) -> Callable:
        def wrapper(*args: Any) -> Any:
            into.append(function(*args))
            return into[-1]

        return wrapper

    monkeypatch.setattr(dropout, "_mask", kept(masks, dropout._mask))
    monkeypatch.setattr(fusedrnn.functional, "draw", kept(noises, fusedrnn.functional.draw))
    monkeypatch.setattr(fusedrnn.functional, "drop_weights", kept(weights, fusedrnn.functional.drop_weights))
    return masks, noises, weights


@pytest.mark.isa
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("cell", CELLS)
def test_the_modules(cell: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers, two directions, all at once: each layer by its own masks. Outside training no mask but the means."""
    module = TWINS[cell].layer(I, H, num_layers=2, bidirectional=True, **EVERYTHING).double().train(training)
    module.dropout = 0.0 if training else 0.5
    masks, noises, weights = watch(monkeypatch)
    x = torch.randn(T, B, I, dtype=torch.float64)
    y, last = copy.deepcopy(module).to(DEVICE)(x.to(DEVICE))
    inputs = masks[::4] if training else [torch.ones(1, dtype=torch.float64)] * 2
    assert len(masks) == (8 if training else 0)  # a layer: x, W_hh of both directions, h
    out, finals = x, []
    for mask, noise, own in zip(inputs, noises, weights, strict=True):
        flat = Noise(*(None if k is None else k.cpu().flatten(0, -2) if i else k.cpu() for i, k in enumerate(noise)))
        flat = flat.for_op(x)
        rows = (out * mask.cpu()).flatten(0, 1)
        zeros = [torch.zeros(2, B, H, dtype=torch.float64)] * len(CELLS[cell].states)
        found = one_layer(cell, rows, [B] * T, zeros, [w.cpu() for w in own], flat, 2)
        out = found[0].unflatten(0, (T, B))
        finals.append(found[1 : 1 + len(zeros)])
    last = last if isinstance(last, tuple) else (last,)
    wanted = {"y": out} | {str(i): torch.cat(states) for i, states in enumerate(zip(*finals, strict=True))}
    assert_all_close({"y": y.cpu()} | {str(i): s.cpu() for i, s in enumerate(last)}, wanted)
    for noise, own, layer in zip(noises, weights, (0, 1)):
        if training:
            assert set(noise.mask_h.unique().tolist()) <= {0.0, 1 / 0.7} and noise.mask_h.shape == (2, B, H)
            assert set(noise.keep_h.unique().tolist()) == {0.0, 1.0}
            w, dropped = getattr(module, f"weight_hh_l{layer}"), own[1].cpu()
            torch.testing.assert_close(dropped, torch.where(dropped == 0, 0.0, w / 0.75), rtol=1e-12, atol=0)
            assert 0 < dropped.count_nonzero() < w.numel()
            assert own[0].cpu().equal(getattr(module, f"weight_ih_l{layer}"))
        else:
            assert noise.mask_h is None and set(noise.keep_h.unique().tolist()) == {0.4}


@pytest.mark.isa
@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(cell: str) -> None:
    """First and second derivatives, of masks that the seed repeats."""
    module = TWINS[cell].layer(2, 3, num_layers=2, bidirectional=True, **EVERYTHING).double().to(DEVICE)
    names = [name for name, _ in module.named_parameters()]

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        torch.manual_seed(3)
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))[0]

    leaves = (torch.randn(4, 2, 2, dtype=torch.float64, device=DEVICE, requires_grad=True), *module.parameters())
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
    module.eval()
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("cell", CELLS)
def test_one_step_twice_differentiable(cell: str) -> None:
    """T = 1 has a road of its own there."""
    module, x = TWINS[cell].layer(2, 3, **EVERYTHING).double(), torch.randn(1, 2, 2).double().requires_grad_()
    h0 = torch.randn(1, 2, 3).double().requires_grad_()

    def call(x: Tensor, h0: Tensor) -> Tensor:
        torch.manual_seed(3)
        return module(x, (h0, h0) if two_states(cell) else h0)[0]

    assert torch.autograd.gradgradcheck(call, (x, h0))


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_seeds_repeat_masks(cell: str) -> None:
    module, x = TWINS[cell].layer(I, 20, **EVERYTHING), torch.randn(T, B, I)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        module.zero_grad()
        y, _ = module(x)
        y.sum().backward()
        found.append((y, module.weight_hh_l0.grad.clone()))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], found[2][0])
    assert not torch.equal(module(x)[0], module(x)[0])


def test_zoneout_of_one_keeps_a_state_to_the_bit() -> None:
    h0, c0, x = torch.randn(1, B, H), torch.randn(1, B, H), torch.randn(T, B, I)
    for training in (True, False):
        y, (h_n, c_n) = fusedrnn.LSTM(I, H, zoneout=1).train(training)(x, (h0, c0))
        assert torch.equal(y, h0.expand(T, B, H)) and torch.equal(h_n, h0) and torch.equal(c_n, c0)
    y, (h_n, c_n) = fusedrnn.LSTM(I, H, zoneout=(0.0, 1.0))(x, (h0, c0))
    assert torch.equal(c_n, c0) and not torch.equal(h_n, h0)


def test_means_are_those_of_the_masks() -> None:
    """Over many samples each mask's mean is what is computed outside training: of x, of W_hh and of a kept state."""
    torch.manual_seed(0)
    x = torch.ones(1, 20000, 1)
    module = fusedrnn.RNN(1, 1, nonlinearity="relu", bias=False, input_dropout=0.3)
    nn.init.ones_(module.weight_ih_l0)
    assert abs(module(x)[0].mean().item() - 1) < 0.02
    module = fusedrnn.RNN(1, 1, nonlinearity="relu", bias=False, recurrent_dropout=0.3)
    nn.init.zeros_(module.weight_ih_l0), nn.init.ones_(module.weight_hh_l0)
    assert abs(module(x, torch.ones(1, 20000, 1))[0].mean().item() - 1) < 0.02
    module = fusedrnn.RNN(1, 1, zoneout=0.3)
    found = module(x, torch.ones(1, 20000, 1))[0].mean()
    assert abs(found - module.eval()(x, torch.ones(1, 20000, 1))[0].mean()) < 0.02
    module = fusedrnn.RNN(1, 200, nonlinearity="relu", bias=False, weight_dropout=0.3)
    nn.init.zeros_(module.weight_ih_l0), nn.init.ones_(module.weight_hh_l0)
    assert abs(module(x[:, :1], torch.ones(1, 1, 200))[0].mean().item() / 200 - 1) < 0.02


@pytest.mark.device
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_of_a_sample_one_mask(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed, padded with lengths or cut by resets: sample b has its mask at every step, in every piece."""
    module = TWINS[cell].layer(I, H, bidirectional=True, recurrent_dropout=0.4, input_dropout=0.4).double().to(DEVICE)
    x, lengths = torch.randn(T, B, I, dtype=torch.float64, device=DEVICE), torch.tensor([T, 5, 2, 1])

    def seeded(*args: Any, **kwargs: Any) -> Tensor:
        torch.manual_seed(1)
        y = module(*args, **kwargs)[0]
        return y if isinstance(y, Tensor) else nn.utils.rnn.pad_packed_sequence(y)[0]

    padded = seeded(x, lengths=lengths)
    torch.testing.assert_close(seeded(pack_padded_sequence(x, lengths)), padded, rtol=0, atol=1e-12)
    for b, length in enumerate(lengths):
        alone = seeded(x[:length], lengths=None)
        torch.testing.assert_close(padded[:length, b], alone[:, b], rtol=0, atol=1e-12)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[2, 0] = reset[3, 0] = reset[4, 1] = True
    cut = seeded(x, reset=reset)
    for b, (begin, end) in ((0, (0, 2)), (0, (2, 3)), (0, (3, T)), (1, (0, 4)), (1, (4, T)), (2, (0, T))):
        alone = seeded(x[begin:end])
        torch.testing.assert_close(cut[begin:end, b], alone[:, b], rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["lengths", "reset", "packed", "batch_first", "unbatched"])
def test_zoneout_in_every_layout(kind: str) -> None:
    """With a rate of one at which nothing moves, and with its mean, equal to a loop of calls."""
    module = fusedrnn.LSTM(I, H, zoneout=(0.3, 0.6)).double().eval()
    x, lengths = torch.randn(T, B, I, dtype=torch.float64), [T, 5, 2, 1]

    def loop(x: Tensor) -> Tensor:
        """(T, I) -> (T, H)."""
        state, ys = [torch.zeros(1, 1, H, dtype=torch.float64)] * 2, []
        for x_t in x:
            _, state = module(x_t.view(1, 1, I), tuple(state))
            ys.append(state[0].flatten())
        return torch.stack(ys)

    if kind == "lengths":
        y = module(x, lengths=lengths)[0]
    elif kind == "packed":
        y = nn.utils.rnn.pad_packed_sequence(module(pack_padded_sequence(x, lengths))[0])[0]
    elif kind == "reset":
        lengths = [T, 3, 3, 3]
        y = module(x, reset=(torch.arange(T) == 3).unsqueeze(1) & (torch.arange(B) > 0))[0]
    elif kind == "batch_first":
        lengths, module.batch_first = [T] * B, True
        y, module.batch_first = module(x.transpose(0, 1))[0].transpose(0, 1), False
    else:
        lengths = [T]
        y = module(x[:, 0])[0].unsqueeze(1)
    for b, length in enumerate(lengths):
        torch.testing.assert_close(y[:length, b], loop(x[:length, b]), rtol=0, atol=1e-12)


@pytest.mark.isa
def test_with_the_other_options() -> None:
    """Gates computed again give the same bits; truncation at every step cuts the path of kept states too."""
    x = torch.randn(T, B, I, dtype=torch.float64, device=DEVICE)
    for cell in ("lstm", "gru", "gru_reset_before", "rnn_relu", "residual_rnn"):
        found = {}
        for recompute in ("none", "gates"):
            torch.manual_seed(0)
            module = TWINS[cell].layer(I, H, recompute=recompute, **EVERYTHING).double().to(DEVICE)
            module(x)[0].square().sum().backward()
            found[recompute] = module.weight_hh_l0.grad
        assert torch.equal(found["none"], found["gates"])

        module.fused_options = replace(module.fused_options, bptt_steps=1)
        h0 = torch.randn(1, B, H, dtype=torch.float64, device=DEVICE, requires_grad=True)
        given = (h0, torch.zeros_like(h0)) if two_states(cell) else h0
        module(x, given)[0][1:].sum().backward()
        assert h0.grad.count_nonzero() == 0


@pytest.mark.isa
def test_recorded_norms_are_those_of_the_states() -> None:
    """dL/dh_t and dL/dc_t by every way, kept states among them: from single steps, whose states autograd sees."""
    for zoneout, proj in product((0.3, (0.3, 0.0), (0.0, 0.4)), (0, 3)):
        torch.manual_seed(0)
        module = fusedrnn.LSTM(I, H, proj_size=proj, zoneout=zoneout).double().eval().to(DEVICE)
        x = torch.randn(T, B, I, dtype=torch.float64, device=DEVICE)
        with fusedrnn.record_gradients(module) as rec:
            module(x)[0].square().sum().backward()
        state, seen = None, []
        for x_t in x:
            _, state = module(x_t.unsqueeze(0), state)
            state[0].retain_grad(), state[1].retain_grad()
            seen.append(state)
        sum(h.square().sum() for h, _ in seen).backward()
        for t, (h, c) in enumerate(seen):
            torch.testing.assert_close(rec.layers[0].h[t].to(DEVICE), h.grad[0].norm(dim=1))
            if zoneout == (0.3, 0.0):  # h_t is of c_t then, inside the step
                continue
            wanted = torch.zeros(B).to(h) if c.grad is None else c.grad[0].norm(dim=1)
            torch.testing.assert_close(rec.layers[0].c[t].to(DEVICE), wanted)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_maps(cell: str) -> None:
    """torch.vmap over inputs, with the mean and, as torch's own dropout, by its argument ``randomness``; gradients of
    each sample.
    """
    module = TWINS[cell].layer(I, H, num_layers=2, **EVERYTHING).double()
    xs = torch.randn(3, T, B, I, dtype=torch.float64)

    def call(x: Tensor) -> Tensor:
        return module(x)[0]

    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(call)(xs)
    same = torch.vmap(call, randomness="same")(xs[:1].expand(3, -1, -1, -1))
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    different = torch.vmap(call, randomness="different")(xs[:1].expand(3, -1, -1, -1))
    assert not torch.equal(different[0], different[1])

    module.eval()
    torch.testing.assert_close(torch.vmap(call)(xs), torch.stack(list(map(call, xs))), rtol=0, atol=1e-12)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(own: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, own, (x.unsqueeze(1),))[0].square().sum()

    mapped = torch.vmap(torch.func.grad(loss), in_dims=(None, 1))(parameters, xs[0])
    for b in range(B):
        alone = torch.func.grad(loss)(parameters, xs[0, :, b])
        assert_all_close({n: g[b] for n, g in mapped.items()}, alone)


def test_tangents() -> None:
    module, x = fusedrnn.GRU(I, H, zoneout=0.3).double().eval(), torch.randn(T, B, I, dtype=torch.float64)
    v = torch.randn_like(x)
    y, tangent = torch.func.jvp(lambda x: module(x)[0], (x,), (v,))
    step = 1e-6
    wanted = (module(x + step * v)[0] - module(x - step * v)[0]) / (2 * step)
    torch.testing.assert_close(tangent, wanted, rtol=0, atol=1e-8)
    torch.testing.assert_close(y, module(x)[0], rtol=0, atol=1e-12)


@torch._dynamo.config.patch(allow_rnn=True)
def test_compile_and_export() -> None:
    torch._dynamo.reset()
    module, x = fusedrnn.LSTM(I, H, num_layers=2, dropout=0.1, **EVERYTHING), torch.randn(T, B, I)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    y, _ = compiled(x)
    y.sum().backward()
    assert module.weight_hh_l0.grad.count_nonzero() > 0
    assert not torch.equal(compiled(x)[0], compiled(x)[0])
    module.eval()
    torch.testing.assert_close(compiled(x)[0], module(x)[0])
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x)[0], module(x)[0])
    pytest.importorskip("onnxscript")
    with pytest.raises(Exception, match="neither zoneout nor a mask on h"):
        torch.onnx.export(program, (x,), dynamo=True, custom_translation_table=fusedrnn.onnx.table(), verbose=False)


def test_opcheck() -> None:
    for cell, directions in (("lstm", 2), ("rnn_tanh", 1)):
        layer = draw(cell, directions, 0, (B,) * T, "mhc")
        mask, *keeps = layer["noise"]
        noise = Noise(mask, *(None if k is None else k.unflatten(0, (T, B)) for k in keeps))
        x, weights = layer["x"].detach().unflatten(0, (T, B)), [w.detach() for w in layer["weights"]]
        states = [None if s is None else s.detach() for s in (layer["h0"], layer["c0"])]
        given = x, None, *states, weights
        torch.library.opcheck(fusedrnn.ops.layer_forward, (*given, cell, directions == 2, True, *noise))
        y, _, _, saved = fusedrnn.ops.layer_forward(*given, cell, directions == 2, True, *noise)
        options = cell, directions == 2, True, True, True, True, 2, 0.5, False
        torch.library.opcheck(fusedrnn.ops.layer_backward, (y, None, None, None, *given, y, saved, *options, *noise))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    module, x = fusedrnn.GRU(I, H, **EVERYTHING), torch.randn(T, B, I)
    with torch.autocast("cpu", dtype):
        torch.manual_seed(1)
        y, _ = module(x)
        torch.manual_seed(1)
        assert y.dtype == dtype and torch.equal(module(x)[0], y)
    y.float().sum().backward()
    assert module.weight_hh_l0.grad.dtype == torch.float32


def test_streams() -> None:
    """step() as forward: prepared only where nothing is random or mixed, and never after that has changed."""
    x = torch.randn(T, B, I)
    module = fusedrnn.LSTM(I, H, num_layers=2, zoneout=(0.1, 0.3)).eval()

    def stream() -> Tensor:
        state, ys = None, []
        for x_t in x:
            y, state = module.step(x_t, state)
            ys.append(y)
        return torch.stack(ys)

    torch.testing.assert_close(stream(), module(x)[0])
    module.fused_options = fusedrnn.FusedOptions()
    torch.testing.assert_close(stream(), module(x)[0])
    module.fused_options = fusedrnn.FusedOptions(zoneout=0.5)
    torch.testing.assert_close(stream(), module(x)[0])
    module.fused_options, module.dropout = fusedrnn.FusedOptions(), 0.5
    torch.testing.assert_close(stream(), module(x)[0])
    module.train()
    assert not torch.equal(stream(), stream())


def test_streams_with_zoneout_are_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = fusedrnn.GRU(I, H, num_layers=2, zoneout=0.3).eval(), torch.randn(T, B, I)
    expected = module(x)[0].detach()
    _, state = module.step(x[0])
    monkeypatch.setattr(fusedrnn.modules, "_forward", None)
    for t in range(1, T):
        y, state = module.step(x[t], state)
        torch.testing.assert_close(y, expected[t])


@pytest.mark.isa
@pytest.mark.parametrize("cell", CELLS)
def test_inference(cell: str) -> None:
    """Zoneout's mean by the short road, of one call and another: layers, directions, projections."""
    x, h = torch.randn(T, B, I), len(CELLS[cell].states)
    for bidirectional, proj in product((False, True), (0, 3) if CELLS[cell].projectable else (0,)):
        options = {"proj_size": proj} if proj else {}
        rates = (0.3, 0.6) if h == 2 else 0.3
        module = TWINS[cell].layer(I, H, num_layers=3, bidirectional=bidirectional, zoneout=rates, **options).eval()
        expected = module(x)
        with torch.no_grad():
            for _ in range(3):
                torch.testing.assert_close(module(x), expected)


def test_masks_that_do_not_fit() -> None:
    x, weights = torch.randn(T, B, I), list(fusedrnn.GRU(I, H).parameters())
    good = {"mask_h": (1, B, H), "keep_h": (T, B, H)}
    for name, shape in good.items():
        for wrong in (shape[:-1] + (H + 1,), (shape[0] + 1, B, H), (B, H)):
            with pytest.raises(RuntimeError, match=f"{name} must have shape"):
                mask = {name: torch.ones(wrong)}
                fusedrnn.ops.layer_forward(x, None, None, None, weights, "gru", False, True, **mask)
        with pytest.raises(ValueError, match=f"{name} must have the dtype"):
            mask = {name: torch.ones(shape, dtype=torch.float64)}
            fusedrnn.ops.layer_forward(x, None, None, None, weights, "gru", False, True, **mask)
    with pytest.raises(RuntimeError, match="cell gru has no c"):
        fusedrnn.ops.layer_forward(x, None, None, None, weights, "gru", False, True, keep_c=torch.ones(T, B, H))
