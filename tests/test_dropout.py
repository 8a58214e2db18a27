"""Variational dropout, zoneout and weight drop: against a loop that does in the open what the masks say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from loops import STATES, TWINS, weight_shapes, with_noise
from parity import DEVICE
from test_through_time import Limited
from tolerances import assert_all_close
from torch import Tensor
from torch.nn.functional import linear

import fusedrnn
from fusedrnn.cells import CELLS
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
        of_units = rest[-1:] if CELLS[cell].has_unit_weight else []
        w_hh = w_hh if noise.mask_h is None else w_hh * noise.mask_h[d, b]
        now = tuple(s[d, b : b + 1] for s in states)
        for t in reversed(range(length)) if d else range(length):
            row, before = starts[t] + b, t + 1 if d else t  # the boundary that the state comes over
            if clip:
                now = tuple(Limited.apply(s, clip, mode) for s in now)
            if bptt and before % bptt == 0 and 0 < before < length:
                now = tuple(s.detach() for s in now)
            new = TWINS[cell].step(x[row : row + 1], now, w_ih, w_hh, *biases, *of_units)
            new = (linear(new[0], rest[-1]), *new[1:]) if each % 2 and not of_units else new
            keeps = [None if k is None else k[row].chunk(directions)[d] for k in noise[1:]] + [None] * len(new[2:])
            now = tuple(n if k is None else k * s + (1 - k) * n for n, s, k in zip(new, now, keeps))
            for state, steps in zip(now, rows):
                steps[row, d] = state
        for state, last in zip(now, finals):
            last[d, b] = state
    parts = [rows[:1], rows[1:]]  # each direction's further states side by side
    joined = [
        torch.cat([torch.cat([s[r, d] for d in range(directions) for s in own], 1) for r in range(x.size(0))])
        for own in parts
        if own
    ]
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
    names, out, n = CELLS[cell].states, proj or H, sum(sizes)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).mul(0.7).to(dtype).requires_grad_()

    def mask(kind: str, *shape: int) -> Tensor | None:
        values = torch.rand(shape, generator=g, dtype=torch.float64)
        if kind not in kinds or (kind == "c" and len(names) != 2):
            return None
        return (values if means else (values < 0.4).double() * (1.6 if kind == "m" else 1)).to(dtype)

    masks = (("m", directions, sizes[0], out), ("h", n, directions * out), ("c", n, directions * H))
    weights = [normal(*shape) for shape in weight_shapes(cell, I, H, proj) * directions]
    return {
        "x": normal(n, I),
        "h0": normal(directions, sizes[0], out),
        **{f"{name}0": normal(directions, sizes[0], H) for name in names[1:]},
        "weights": weights,
        "noise": Noise(*(mask(*each) for each in masks)),
    }


def states_of(layer: Layer) -> list[Tensor]:
    return [layer[name] for name in STATES if name in layer]


def outcome(results: Sequence[Tensor], layer: Layer) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(5)
    factors = [torch.randn(r.shape, generator=g, dtype=torch.float64).to(r) for r in results]
    leaves = [t for t in (layer["x"], *states_of(layer), *layer["weights"])]
    found = torch.autograd.grad(results, leaves, factors)
    return {str(i): t.detach().cpu() for i, t in enumerate((*results, *found))}


def ours(
    cell: str, layer: Layer, sizes: Sequence[int], directions: int, clip: float = 0.0, mode: str = "value",
    bptt: int = 0,
) -> dict[str, Tensor]:  # fmt: skip
    def there(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().to(DEVICE).requires_grad_(t.requires_grad)

    layer = {n: there(v) if n in ("x", *STATES) else list(map(there, v)) for n, v in layer.items()}
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

    layer = {n: wide(v) if n in ("x", *STATES) else list(map(wide, v)) for n, v in layer.items()}
    states = states_of(layer)
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


@pytest.mark.isa
@pytest.mark.float64
@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(cell: str) -> None:
    """First and second derivatives, of masks that the seed repeats."""
    module = (
        TWINS[cell].layer(2, 3, num_layers=2, bidirectional=True, **with_noise(cell, EVERYTHING)).double().to(DEVICE)
    )
    names = [name for name, _ in module.named_parameters()]

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        torch.manual_seed(3)
        return torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))[0]

    leaves = (torch.randn(4, 2, 2, dtype=torch.float64, device=DEVICE, requires_grad=True), *module.parameters())
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)
    module.eval()
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_maps(cell: str) -> None:
    """torch.vmap over inputs, with the mean and, as torch's own dropout, by its argument ``randomness``; gradients of
    each sample.
    """
    module = TWINS[cell].layer(I, H, num_layers=2, **with_noise(cell, EVERYTHING)).double()
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


def test_opcheck() -> None:
    for cell, directions in (("lstm", 2), ("rnn_tanh", 1)):
        layer = draw(cell, directions, 0, (B,) * T, "mhc")
        mask, *keeps = layer["noise"]
        noise = Noise(mask, *(None if k is None else k.unflatten(0, (T, B)) for k in keeps))
        x, weights = layer["x"].detach().unflatten(0, (T, B)), [w.detach() for w in layer["weights"]]
        states = [*(s.detach() for s in states_of(layer)), None][:2]
        given = x, None, *states, weights
        torch.library.opcheck(fusedrnn.ops.layer_forward, (*given, cell, directions == 2, True, *noise))
        y, _, _, saved = fusedrnn.ops.layer_forward(*given, cell, directions == 2, True, *noise)
        options = cell, directions == 2, True, True, True, True, 2, 0.5, False
        torch.library.opcheck(fusedrnn.ops.layer_backward, (y, None, None, None, *given, y, saved, *options, *noise))


def test_masks_that_do_not_fit() -> None:
    x, weights = torch.randn(T, B, I), list(fusedrnn.GRU(I, H).parameters())
    good = {"mask_h": (1, B, H), "keep_h": (T, B, H)}
    for name, shape in good.items():
        for wrong in (shape[:-1] + (H + 1,), (shape[0] + 1, B, H), (B, H)):
            with pytest.raises(RuntimeError, match=f"{name} must have shape"):
                mask = {name: torch.ones(wrong)}
                fusedrnn.ops.layer_forward(x, None, None, None, weights, "gru", False, True, **mask)
        with pytest.raises(RuntimeError, match=f"{name} must have the dtype"):
            mask = {name: torch.ones(shape, dtype=torch.float64)}
            fusedrnn.ops.layer_forward(x, None, None, None, weights, "gru", False, True, **mask)
    with pytest.raises(RuntimeError, match="cell gru has no c"):
        fusedrnn.ops.layer_forward(x, None, None, None, weights, "gru", False, True, keep_c=torch.ones(T, B, H))
