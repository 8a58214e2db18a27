"""Layers with int8 weights: exact sums on every instruction set, the arithmetic as written out, nothing lost. And those
whose weights alone are bfloat16: as in float32 with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from inference import same, tensors
from int8_reference import layer, matrix
from loops import weight_shapes
from torch import Tensor, nn

import fusedrnn
from fusedrnn.cells import CELLS
from fusedrnn.quantized import QuantizedRecurrent

pytestmark = [pytest.mark.usefixtures("no_gradients"), pytest.mark.isa, pytest.mark.int8]
op = torch.ops.fusedrnn.layer_forward.default
SMALL = [name for name, info in CELLS.items() if info.has_small_weights]  # those whose matrices may be small


def draw_module(cell: str, I: int, H: int, **options) -> QuantizedRecurrent:
    """With weights as large as torch.nn's first ones."""
    module = QuantizedRecurrent(cell, I, H, **options)
    module.take([torch.empty(s).uniform_(-1, 1) / H**0.5 for s in sizes(module)])
    return module


def sizes(module: QuantizedRecurrent) -> list[torch.Size]:
    return [getattr(module, name).shape for name in module._weight_names]


def draw_states(module: QuantizedRecurrent, B: int, size: float = 1.0) -> tuple[Tensor, ...]:
    parts = module.num_layers * (2 if module.bidirectional else 1)
    widths = (module.proj_size or module.hidden_size, module.hidden_size)[: len(CELLS[module.cell].states)]
    return tuple(size * (2 * torch.rand(parts, B, width) - 1) for width in widths)


def given(states: tuple[Tensor, ...]):
    return states if len(states) > 1 else states[0]


def integers(*shape: int) -> Tensor:
    """Rows whose scale is 1."""
    found = torch.randint(-127, 128, shape).float()
    found[..., 0] = 127
    return found


@pytest.mark.parametrize("T, B", [(1, 1), (1, 2), (1, 3), (1, 7), (1, 10), (1, 11), (1, 40), (3, 2), (3, 9), (2, 13)])
@pytest.mark.parametrize("I, H", [(1, 1), (3, 5), (4, 16), (7, 17), (63, 33), (64, 48), (65, 67), (300, 130)])
def test_sums_are_exact(T: int, B: int, I: int, H: int, threads: Callable) -> None:
    """relu of integers: the sums themselves, of x alone, and of h too where T is 1 and it is given."""
    threads(2)
    w_ih, w_hh = (torch.randint(-127, 128, (H, n), dtype=torch.int8) for n in (I, H))
    one = torch.ones(H)
    for sign in (1, -1):  # relu hides one of the two
        x, h0 = integers(T, B, I), integers(1, B, H) if T == 1 else None
        weights = [sign * w_ih, sign * w_hh if T == 1 else torch.zeros_like(w_hh)]
        expected = sign * x.double() @ w_ih.double().T
        expected = expected + (sign * h0.double() @ w_hh.double().T if T == 1 else 0)
        y, h_n, *_ = op(x, None, h0, None, weights, "rnn_relu", False, False, None, None, None, [one, one])
        assert torch.equal(y.double(), expected.relu())
        assert torch.equal(h_n[0], y[-1])


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("h0", [None, 0.3, 4.0])
@pytest.mark.parametrize("cell", SMALL)
def test_arithmetic(cell: str, h0: float | None, projected: bool, threads: Callable) -> None:
    """A rounding of h may go the other way where it lies between: a rare difference, of one 127th in one factor."""
    if projected and not CELLS[cell].projectable:
        return
    threads(2)
    T, B, I, H = 4, 5, 11, 37
    for zoneout in (0.0, 0.25):
        module = draw_module(cell, I, H, proj_size=9 if projected else 0, zoneout=zoneout)
        states = draw_states(module, B, h0 or 0.0)
        x = torch.randn(T, B, I)
        found = tensors(module(x, None if h0 is None else given(states)))
        weights = {n: getattr(module, n + "_l0") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        if projected:
            weights["weight_hr"] = module.weight_hr_l0
        scaled = [matrix(w, getattr(module, f"{n}_l0_scale")) if w.dim() == 2 else w for n, w in weights.items()]
        y, finals = layer(cell, x, [s[0] for s in states], *scaled, keep=(zoneout, zoneout))
        for a, b in zip(found, [y, *(s.unsqueeze(0) for s in finals)], strict=True):
            error = (a.double() - b).abs() / max(1.0, b.abs().max().item())
            assert error.quantile(0.9) < 2e-6, (zoneout, error.quantile(0.9))
            assert error.max() < 2e-3, (zoneout, error.max())


@pytest.mark.parametrize("cell", SMALL)
def test_pieces_give_the_same_bits(cell: str, threads: Callable) -> None:
    """One call or several, one thread or two, steps, packed or with lengths, one sample or all."""
    for options in ({}, {"num_layers": 2}, {"batch_first": True}, {"zoneout": 0.2}, {"proj_size": 7}):
        if "proj_size" in options and not CELLS[cell].projectable:
            continue
        module = draw_module(cell, 9, 20, **options)
        for size in (0.5, 3.0):
            x, states = torch.randn(31, 3, 9), draw_states(module, 3, size)
            turned = (lambda t: t.transpose(0, 1)) if module.batch_first else (lambda t: t)
            whole = tensors(module(turned(x), given(states)))
            threads(2)
            assert same(tensors(module(turned(x), given(states))), whole)
            threads(1)
            state, ys = given(states), []
            for piece in (x[:12], x[12:13], x[13:]):
                y, state = module(turned(piece), state)
                ys.append(turned(y))
            assert torch.equal(turned(torch.cat(ys)), whole[0])
            state, ys = given(states), []
            for x_t in x:
                y, state = module.step(x_t, state)
                ys.append(y)
            assert torch.equal(turned(torch.stack(ys)), whole[0])
            assert same(tensors((whole[0], state)), whole)
            one = tensors(module(turned(x[:, 1:2]), given(tuple(s[:, 1:2].contiguous() for s in states))))
            assert torch.equal(turned(one[0]), turned(whole[0])[:, 1:2])


def near_ties(count: int) -> Tensor:
    """A row that is 1 first; 127 times each other element lies within a few units of the last place of a tie."""
    ties = (torch.randint(-127, 127, (count,)) + 0.5) / 127
    return torch.cat([torch.ones(1), ties * (1 + torch.randint(-4, 5, (count,)) * 2.0**-24)])


def test_numbers_near_ties_go_one_way() -> None:
    """x and h0 times 1 / scale, rounded to float32, and then to an integer: on every instruction set."""
    row = near_ties(4000)
    expected = (row * (1 / (row.abs().max() / 127))).round()
    one, w = torch.ones(len(row)), torch.eye(len(row), dtype=torch.int8)
    zero = torch.zeros_like(w)
    scale = (row.abs().max() / 127).item()
    for sign in (1, -1):
        for weights, x, h0 in (([w, zero], row, torch.zeros_like(row)), ([zero, w], torch.zeros_like(row), row)):
            given = sign * x.view(1, 1, -1), sign * h0.view(1, 1, -1)
            y = op(given[0], None, given[1], None, weights, "rnn_relu", False, False, None, None, None, [one, one])[0]
            assert torch.equal((y.flatten() / scale).round(), (sign * expected).relu())


@pytest.mark.parametrize("H", [64, 129])
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru", "gru_reset_before"])
def test_h_is_rounded_one_way(cell: str, H: int) -> None:
    """By the thread that makes it or by row, after a step or before one: so many that some lie near a tie."""
    for seed in range(3):
        torch.manual_seed(seed)
        module = draw_module(cell, 4, H)
        module.weight_ih_l0_scale.mul_(8)
        x = torch.randn(3, 2000, 4)
        y = module(x)[0]
        first, state = module(x[:1])
        assert torch.equal(torch.cat([first, module(x[1:], state)[0]]), y)
        states = draw_states(module, 2000, 0.0)
        states[0][0, 0, 0] = 5  # of one sample
        assert torch.equal(module(x, given(states))[0][:, 1:], y[:, 1:])


@pytest.mark.parametrize("cell", SMALL)
def test_ragged_batches(cell: str, threads: Callable) -> None:
    threads(2)
    module = draw_module(cell, 6, 33, bidirectional=True, num_layers=2)
    lengths, x = [9, 7, 7, 2, 1], torch.randn(9, 5, 6)
    states = draw_states(module, 5, 2.0)
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths)
    y, last = module(packed, given(states))
    y, _ = nn.utils.rnn.pad_packed_sequence(y)
    assert same(tensors(module(x, given(states), lengths=lengths)), tensors((y, last)))
    for b, n in enumerate(lengths):
        own = tensors(module(x[:n, b : b + 1], given(tuple(s[:, b : b + 1].contiguous() for s in states))))
        assert torch.equal(own[0], y[:n, b : b + 1])
        assert all(torch.equal(a, s[:, b : b + 1]) for a, s in zip(own[1:], tensors((y, last))[1:], strict=True))


@pytest.mark.parametrize("strange", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("cell", SMALL)
def test_what_is_not_finite_is_not_lost(cell: str, strange: float, threads: Callable) -> None:
    """A NaN or an infinity of x makes NaN of its sample from then on, and of no other."""
    threads(2)
    for projection in (0, 5) if CELLS[cell].projectable else (0,):
        module = draw_module(cell, 8, 40, proj_size=projection)
        x = torch.randn(12, 4, 8)
        clean = module(x)[0]
        x[5, 2, 3] = strange
        y, last = module(x)
        others = [0, 1, 3]
        assert torch.equal(y[:, others], clean[:, others]) and torch.equal(y[:5], clean[:5])
        assert y[5:, 2].isnan().all()
        assert all(s[:, 2].isnan().all() and not s[:, others].isnan().any() for s in tensors((y, last))[1:])
        for which in range(len(CELLS[cell].states)):  # one element of an initial state
            states = draw_states(module, 4)
            states[which][0, 2, 3] = float("nan")
            y = module(torch.randn(12, 4, 8), given(states))[0]
            assert y[1:, 2].isnan().all() and not y[:, others].isnan().any()


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-30, 1e30, 3e38])
def test_rows_of_any_size(size: float) -> None:
    """What counts is the size of a row beside its other elements; below normal numbers it is zero."""
    module = draw_module("rnn_relu", 5, 6)
    x = torch.rand(1, 3, 5)
    x[0, 1] = x[0, 1] / x[0, 1].max() * size
    y = module(x)[0]
    w = matrix(module.weight_ih_l0, module.weight_ih_l0_scale)
    expected = (x.double() @ w.T + (module.bias_ih_l0 + module.bias_hh_l0).double()).relu()
    assert not y.isnan().any()
    error = (y.double() - expected).abs()[0]
    assert (error.amax(1) <= 0.02 * x.double().amax(2)[0] + 1e-6).all()


def test_states_of_every_step() -> None:
    module = draw_module("lstm", 4, 10, num_layers=2)
    x = torch.randn(6, 3, 4)
    y, (h_n, c_n), steps = module(x, return_states=True)
    assert same([y, h_n, c_n], tensors(module(x)))
    assert torch.equal(steps[1][0], y)
    assert all(torch.equal(s[1][-1], c) for s, c in zip(steps, c_n, strict=True))
    reset = torch.zeros(6, 3, dtype=torch.bool)
    reset[3] = True
    y = module(x, reset=reset)[0]
    assert torch.equal(y[3:], module(x[3:])[0]) and torch.equal(y[:3], module(x[:3])[0])


def test_kept_panels_follow_the_weights() -> None:
    """Weights that are written in place, by whatever way, are the ones of the next call."""
    module = draw_module("gru", 40, 60)
    x = torch.randn(30, 2, 40)
    for _ in range(4):
        before = module(x)[0]
    assert fusedrnn._C.packed_uses(fusedrnn.inference.cache.find(module).packed) > 0
    module.weight_hh_l0.data.numpy()[:] = -module.weight_hh_l0.numpy()
    other = QuantizedRecurrent("gru", 40, 60)
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(x)[0], other(x)[0]) and not torch.equal(module(x)[0], before)
    module.weight_ih_l0_scale.mul_(2)  # which is not packed
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(x)[0], other(x)[0])


def test_the_op_says_what_does_not_fit() -> None:
    H, I = 4, 3
    x, w = torch.randn(2, 1, I), [torch.zeros(H, I, dtype=torch.int8), torch.zeros(H, H, dtype=torch.int8)]
    s = [torch.ones(H), torch.ones(H)]

    def call(x: Tensor = x, w: list[Tensor] = w, s: list[Tensor] = s, mask: Tensor | None = None) -> None:
        for device in ("cpu", "meta") if mask is None else ("cpu",):
            moved = [t.to(device) for t in w], [t.to(device) for t in s]
            op(x.to(device), None, None, None, moved[0], "rnn_tanh", False, False, mask, None, None, moved[1])

    call()
    for match, arguments in {
        "w_ih must have the dtype torch.int8, got torch.float32": {"w": [w[0].float(), w[1]]},
        "w_hh must have the dtype torch.int8, got torch.float32": {"w": [w[0], w[1].float()]},
        "weights alone takes an input of torch.float32, got torch.float64": {"x": x.double()},
        "scales must hold s_ih, s_hh.* got 1 tensors": {"s": s[:1]},
        r"s_hh must have shape \[4\], got \[3\]": {"s": [s[0], s[1][:3]]},
        "s_ih must have the dtype of the input, torch.float32, got torch.float64": {"s": [s[0].double(), s[1]]},
        "no mask_h": {"mask": torch.ones(1, 1, H)},
    }.items():
        with pytest.raises(RuntimeError, match=match):
            call(**arguments)
    wide = torch.full((1, 1, 1 << 16), -127.0)
    w, one = [torch.full((1, 1 << 16), 127, dtype=torch.int8), torch.zeros(1, 1, dtype=torch.int8)], [torch.ones(1)] * 2
    y = op(wide, None, None, None, [-w[0], w[1]], "rnn_relu", False, False, None, None, None, one)[0]
    assert y.item() == 127 * 127 * (1 << 16)
    with pytest.raises(RuntimeError, match="rows of int8 weights must have at most 65536 elements, got I = 65537"):
        wider = torch.ones(1, 1, (1 << 16) + 1)
        op(wider, None, None, None, [torch.zeros(1, (1 << 16) + 1, dtype=torch.int8), w[1]], "rnn_relu", False, False,
           None, None, None, one)  # fmt: skip
    w = [torch.zeros(H, I, dtype=torch.int8), torch.zeros(H, H, dtype=torch.int8)]
    freed = torch.ones(H)
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="s_hh, of shape .* it was resized or freed"):
        op(x, None, None, None, w, "rnn_tanh", False, False, None, None, None, [s[0], freed])
    with pytest.raises(RuntimeError, match="w_ih must have the dtype of the input"):
        op(x, None, None, None, w, "rnn_tanh", False, False)


@pytest.mark.parametrize("cell", SMALL)
def test_weights_of_bfloat16(cell: str, threads: Callable) -> None:
    threads(2)
    tolerance = 1e-3 if cell == "residual_rnn" else 1e-5  # which magnifies what it was rounded by
    for T, B, I, H, options in (
        (1, 1, 5, 7, {}), (9, 1, 20, 33, {}), (13, 2, 6, 48, {"num_layers": 2}), (60, 9, 4, 20, {"zoneout": 0.1}),
        (7, 3, 9, 20, {"proj_size": 7}), (5, 30, 17, 65, {"bidirectional": True}),
    ):  # fmt: skip
        if "proj_size" in options and not CELLS[cell].projectable:
            continue
        module = draw_module(cell, I, H, dtype="bfloat16", **options)
        x, states = torch.randn(T, B, I), draw_states(module, B)
        weights = [getattr(module, name).float() for name in module._weight_names]
        expected, finals = fusedrnn.functional.recurrent(
            cell, x, states, weights, num_layers=module.num_layers, bidirectional=module.bidirectional,
            zoneout=module.zoneout,
        )  # fmt: skip
        for _ in range(3):  # packed at the second call, kept at the third
            found = tensors(module(x, given(states)))
            for a, b in zip(found, [expected, *finals], strict=True):
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        if T == 1:
            y, last = module.step(x[0], given(states))
            torch.testing.assert_close(y, expected[0], rtol=1e-5, atol=1e-5)
    clean = module(x)[0]
    x[3, 1, 2] = float("nan")
    y = module(x)[0]
    others = [b for b in range(30) if b != 1]
    assert y[3, 1].isnan().all() and torch.equal(y[:, others], clean[:, others])


def test_bfloat16_weights_that_do_not_fit() -> None:
    w = [torch.zeros(4, n, dtype=torch.bfloat16) for n in (3, 4)]
    for x, scales, match in (
        (torch.ones(2, 1, 3), None, "w_ih must have the dtype of the input, torch.float32, got torch.bfloat16"),
        (torch.ones(2, 1, 3, dtype=torch.bfloat16), [], "weights alone takes an input of torch.float32"),
        (torch.ones(2, 1, 3), [torch.ones(4)] * 2, "w_ih must have the dtype torch.int8, got torch.bfloat16"),
    ):
        for device in ("cpu", "meta"):
            own = None if scales is None else [s.to(device) for s in scales]
            with pytest.raises(RuntimeError, match=match):
                weights = [t.to(device) for t in w]
                op(x.to(device), None, None, None, weights, "rnn_tanh", False, False, None, None, None, own)
    op(torch.ones(2, 1, 3), None, None, None, w, "rnn_tanh", False, False, None, None, None, [])
    with pytest.raises((RuntimeError, ValueError), match="dtype|type"):  # as in torch.nn
        fusedrnn.LSTM(3, 4, bias=False).bfloat16()(torch.ones(2, 1, 3))
    with pytest.raises(RuntimeError, match="dtype"):
        fusedrnn.functional.rnn(torch.ones(2, 1, 3), None, w)


@pytest.mark.parametrize("cell", [name for name in CELLS if name not in SMALL])
def test_parameters_of_units_are_refused(cell: str) -> None:
    with pytest.raises(ValueError, match=f"{cell} has no kernels for matrices in int8"):
        QuantizedRecurrent(cell, 4, 5)
    weights = [torch.zeros(shape) for shape in weight_shapes(cell, 4, 5)]
    for device in ("cpu", "meta"):
        on_device = [w.to(device) for w in weights]
        with pytest.raises(RuntimeError, match=f"cell {cell} has no kernels for matrices in int8"):
            op(
                torch.zeros(3, 2, 4, device=device),
                None,
                None,
                None,
                on_device,
                cell,
                False,
                False,
                None,
                None,
                None,
                [],
            )
