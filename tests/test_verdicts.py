"""What is said of recorded norms: stretches, factors a step, verdicts, on layers whose gradients are known."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import fusedrnn


def multiple_of_identity(factor: float, cls: type = fusedrnn.RNN, **options: Any) -> nn.Module:
    """A linear layer of float64 whose every step back is this factor, and nothing else."""
    module = cls(3, 3, bias=False, **options).double()
    with torch.no_grad():
        module.weight_hh_l0.copy_(factor * torch.eye(3, dtype=torch.float64))
        module.weight_ih_l0.copy_(torch.eye(3))
    return module


WORDS = ((0.5, "vanishing"), (0.9, "falling"), (0.999, "steady"), (1.1, "growing"), (1.5, "exploding"))


@pytest.mark.parametrize("enters", ["at the last step", "at 20 of 78 steps"])
@pytest.mark.parametrize("factor, verdict", WORDS)
def test_factor_memory_and_verdict(factor: float, verdict: str, enters: str) -> None:
    """Over the steps back from the earliest one that the loss reads."""
    module, T = multiple_of_identity(factor, nonlinearity="relu"), 39
    y, _ = module(torch.rand(T, 2, 3).double() + 0.1)
    last = {"at the last step": 1, "at 20 of 78 steps": 10}[enters]
    with fusedrnn.record_gradients(module) as rec:
        y[-last:].sum().backward()
    (layer,) = rec.layers
    assert layer.enters == enters and layer.steps == T - last
    assert layer.decay == pytest.approx(factor) and layer.verdict == verdict
    assert layer.change == pytest.approx(factor**layer.steps)
    assert layer.memory == pytest.approx(-1 / math.log(factor) if factor < 1 else math.nan, nan_ok=True)
    at_last, farthest = layer.ends
    assert at_last == pytest.approx(math.sqrt(3))
    assert farthest == pytest.approx(at_last * sum(factor**k for k in range(T - last, T)))
    text = rec.summary()
    assert "inf" not in text and all(
        word in text for word in (verdict, f"{factor:.4f}", enters, f"{layer.change:.3g}", f"{farthest:.3g}")
    )
    assert "beyond it exploding" in text  # how the verdict is made
    assert ("grad_clip=, bptt_steps=" in text) == (verdict in ("growing", "exploding"))


def layer_with_a_slow_direction() -> nn.Module:
    """99 units that keep a tenth a step and one that keeps all: of a step's gradient a tenth is left for ever."""
    module = fusedrnn.RNN(100, 100, bias=False, nonlinearity="relu").double()
    with torch.no_grad():
        module.weight_hh_l0.copy_(torch.diag(torch.tensor([1.0] + [0.1] * 99)))
        module.weight_ih_l0.copy_(torch.eye(100))
    return module


@pytest.mark.parametrize("cell", ["slow direction", "vanishing", "lstm"])
def test_no_verdict_where_the_loss_enters_at_every_step(cell: str) -> None:
    """What has just entered falls, or does not, otherwise than what comes from far: their sum does not tell."""
    torch.manual_seed(3)
    expected = {"slow direction": "falling", "vanishing": "vanishing", "lstm": "steady"}[cell]
    made = {"slow direction": layer_with_a_slow_direction, "lstm": lambda: fusedrnn.LSTM(3, 16)}
    module = made.get(cell, lambda: fusedrnn.RNN(3, 8).double())()
    if cell == "vanishing":
        module.weight_hh_l0.detach().mul_(0.7)
    if cell == "lstm":
        fusedrnn.init.forget_bias_(module, 5.0)
    x = torch.rand(100, 4, module.input_size).to(module.weight_hh_l0)
    losses = {
        "at the last step": lambda y: y[-1].sum(),
        "at every step": lambda y: (y * torch.randn_like(y)).sum(),
        "at 40 of 400 steps": lambda y: y[9::10].sum(),
    }
    for enters, loss in losses.items():
        with fusedrnn.record_gradients(module) as rec:
            loss(module(x)[0]).backward()
        (layer,) = rec.layers
        assert layer.enters == enters
        if enters == "at the last step":
            assert layer.verdict == expected and layer.steps == 99
            assert layer.change == pytest.approx(layer.ends[1] / layer.ends[0])
        else:
            assert layer.verdict == "unknown" and "it cannot be told" in rec.summary()
            assert layer.steps == {"at every step": 0}.get(enters, 9)


def test_a_layer_of_a_stack_alone() -> None:
    """As the summary advises where a verdict is withheld: the final state of one layer and direction."""
    module, x = fusedrnn.GRU(3, 4, num_layers=2, bidirectional=True), torch.randn(60, 2, 3)
    with fusedrnn.record_gradients(module) as rec:
        module(x)[0].sum().backward()
    assert {layer.verdict for layer in rec.layers} == {"unknown"}
    assert "h_n[k].sum().backward()" in rec.summary()
    for k in range(4):
        with fusedrnn.record_gradients(module) as rec:
            module(x)[1][k].sum().backward()
        wanted = k // 2, ("forward", "reverse")[k % 2]
        (layer,) = [r for r in rec.layers if (r.layer, r.direction) == wanted]
        assert (layer.enters, layer.steps, layer.verdict) == ("at the last step", 59, "vanishing")


def test_growth_is_named() -> None:
    """A residual RNN, whose gradient grows without a factor above the limit of exploding."""
    module = multiple_of_identity(0.0, fusedrnn.ResidualRNN)
    with torch.no_grad():
        module.weight_hh_l0.copy_(0.1 * torch.eye(3))
    with fusedrnn.record_gradients(module) as rec:
        module(torch.zeros(60, 2, 3).double())[0][-1].sum().backward()
    (layer,) = rec.layers
    assert layer.change == pytest.approx(1.1**59) and layer.verdict == "growing"
    assert layer.ends == pytest.approx((math.sqrt(3), math.sqrt(3) * 1.1**59))
    assert layer.steps == 59 and f"{layer.change:.3g}" in rec.summary() and f"{layer.ends[1]:.3g}" in rec.summary()
    assert math.isnan(layer.memory) and "grad_clip=, bptt_steps=" in rec.summary()


def test_verdicts_at_the_edge() -> None:
    module = fusedrnn.LSTM(3, 4, bidirectional=True)
    with fusedrnn.record_gradients(module) as rec:
        module(torch.randn(5, 2, 3))[0][-1].sum().backward()
    forward, reverse = rec.layers
    assert forward.verdict in ("vanishing", "falling") and forward.enters == "at the last step"
    # The reverse direction's last output is its first step: nothing goes further back.
    assert (reverse.verdict, reverse.enters) == ("unknown", "at 2 of 10 steps")
    assert "it cannot be told" in rec.summary()
    with torch.no_grad():
        module.weight_hh_l0.fill_(math.nan)
    with fusedrnn.record_gradients(module) as rec:
        module(torch.randn(5, 2, 3))[0].sum().backward()
    assert rec.layers[0].verdict == "not finite"
    one = fusedrnn.GRU(3, 4)
    with fusedrnn.record_gradients(one) as rec:
        one(torch.randn(1, 2, 3))[0].sum().backward()
        one(torch.randn(3, 2, 3))[0].mul(0).sum().backward()
    assert [(r.verdict, r.enters) for r in rec.layers] == [("unknown", "at the last step"), ("none", "nowhere")]
    assert "is it a part of the loss" in rec.summary() and "nan" not in rec.summary()


def test_cuts_are_no_decay() -> None:
    """Steps that send nothing by design, before a reset or where back-propagation is truncated, do not count."""
    reset = torch.zeros(39, 2, dtype=torch.bool)
    reset[[5, 20], 0] = reset[30, 1] = True
    for options, arguments, steps in (
        ({"bptt_steps": 7}, {}, 3),
        ({}, {"reset": reset}, 18),
        ({}, {"lengths": [39, 11]}, 38),
    ):
        module = multiple_of_identity(0.9, nonlinearity="relu", **options)
        with fusedrnn.record_gradients(module) as rec:
            module(torch.rand(39, 2, 3).double() + 0.1, **arguments)[1].sum().backward()
        (layer,) = rec.layers
        assert layer.decay == pytest.approx(0.9) and layer.steps == steps
        assert layer.verdict == ("unknown" if steps < 10 else "falling" if steps > 30 else "steady")
    alone = multiple_of_identity(0.9, nonlinearity="relu", bptt_steps=1)
    with fusedrnn.record_gradients(alone) as rec:
        alone(torch.rand(39, 2, 3).double() + 0.1)[0][-1].sum().backward()
    assert rec.layers[0].verdict == "unknown"


@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_zero_without_a_cut_has_vanished(factor: float) -> None:
    """Far beyond the least float32, where the norms are zero."""
    module = multiple_of_identity(factor, nonlinearity="relu").float()
    with fusedrnn.record_gradients(module) as rec:
        module(torch.rand(1000, 2, 3) + 0.1)[0][-1].sum().backward()
    (layer,) = rec.layers
    assert layer.verdict == "vanishing" and layer.decay == pytest.approx(factor, abs=0.02)
    assert layer.ends == pytest.approx((math.sqrt(3), 0.0)) and "e-38" not in rec.summary()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["norm", "value"])
def test_what_grad_clip_cuts_is_no_decay(mode: str, dtype: torch.dtype) -> None:
    """Where the limit holds what steps send, nothing is said of how far a gradient reaches; elsewhere all is."""

    def read(factor: float, clip: float) -> tuple[fusedrnn.LayerGradients, str]:
        module = multiple_of_identity(factor, nonlinearity="relu", grad_clip=clip, grad_clip_mode=mode).to(dtype)
        with fusedrnn.record_gradients(module) as rec:
            module(torch.rand(39, 2, 3).to(dtype) + 0.1)[1].sum().backward()
        return rec.layers[0], rec.summary()

    for factor in (1.5, 1.0):
        layer, text = read(factor, 0.3)
        assert (layer.verdict, layer.steps) == ("clipped", 0) and "a larger limit, or none, shows" in text
    layer, text = read(0.5, 0.3)  # only the first steps are cut
    assert layer.verdict == "vanishing" and layer.steps >= 36
    assert layer.decay == pytest.approx(0.5, rel=1e-2) and "clipped:" not in text
    for factor, verdict in ((0.5, "vanishing"), (1.0, "steady"), (1.125, "growing")):
        layer, _ = read(factor, 1e6)  # nothing is
        assert (layer.verdict, layer.steps) == (verdict, 38)


def test_grad_clip_of_an_lstm_is_of_both_states() -> None:
    """c's alone is cut: h has no part in it."""
    module = fusedrnn.LSTM(2, 3, grad_clip=0.1, grad_clip_mode="norm").double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.bias_hh_l0[3:6] = 30.0  # the forget gate
    _, (_, c) = module(torch.rand(39, 2, 2).double())
    with fusedrnn.record_gradients(module) as rec:
        c.sum().backward()
    assert rec.layers[0].verdict == "clipped" and float(rec.layers[0].sent_h[:-1].max()) == 0


def falls(factor: float, steps: int) -> str:
    change = factor**steps
    return "vanishing" if change <= 1e-3 else "falling" if change <= 0.1 else "unknown"


@pytest.mark.parametrize("factor", [0.01, 0.296, 0.99, 3.0])
def test_few_steps_say_what_they_measured(factor: float) -> None:
    """And what has changed little over few steps may change much over more."""
    for steps in (2, 3, 4):
        module = multiple_of_identity(factor, nonlinearity="relu")
        with fusedrnn.record_gradients(module) as rec:
            module(torch.rand(steps, 2, 3).double() + 0.1)[1].sum().backward()
        (layer,) = rec.layers
        assert layer.change == pytest.approx(factor ** (steps - 1))
        assert layer.verdict == ("growing" if factor ** (steps - 1) > 10 else falls(factor, steps - 1))
    module = fusedrnn.LSTM(8, 32)
    fusedrnn.init.chrono_(module, 1000)
    for steps, verdict in ((2, "unknown"), (3, "unknown"), (100, "steady")):
        with fusedrnn.record_gradients(module) as rec:
            module(torch.randn(steps, 4, 8))[0][-1].sum().backward()
        assert rec.layers[0].verdict == verdict


def test_a_step_that_grows_between_two_that_enter_explodes_nothing() -> None:
    """W_hh has the square 0."""
    module = fusedrnn.RNN(2, 2, bias=False, nonlinearity="relu")
    with torch.no_grad():
        module.weight_hh_l0.copy_(torch.tensor([[0.0, 3.0], [0.0, 0.0]]))
        module.weight_ih_l0.copy_(torch.eye(2))
    with fusedrnn.record_gradients(module) as rec:
        module(torch.ones(100, 2, 2))[0][1::2].sum().backward()
    assert (rec.layers[0].verdict, rec.layers[0].steps) == ("unknown", 1)


@pytest.mark.parametrize("short", [63, 1])
def test_short_sequences_say_nothing_of_a_long_one(short: int) -> None:
    """Everything in a row is of one sample, and measured."""
    module = fusedrnn.LSTM(8, 32)
    fusedrnn.init.chrono_(module, 1000)
    lengths, x = torch.tensor([100] + [2] * short), torch.randn(100, 1 + short, 8)
    with fusedrnn.record_gradients(module) as rec:
        module(x, lengths=lengths)[0][lengths - 1, torch.arange(1 + short)].sum().backward()
        module(x[:, :1])[0][-1].sum().backward()
    ragged, alone = rec.layers
    assert ragged.verdict == alone.verdict == "steady" and ragged.steps == alone.steps == 99
    assert ragged.change == pytest.approx(alone.change, rel=1e-4) and ragged.ends == pytest.approx(alone.ends, rel=1e-4)
    assert ragged.change == pytest.approx(ragged.ends[1] / ragged.ends[0], rel=1e-4)


@pytest.mark.parametrize("vanishing", [1, 7])
def test_a_sample_that_explodes_is_not_averaged_away(vanishing: int) -> None:
    module = fusedrnn.RNN(2, 2, bias=False, nonlinearity="relu").double()
    with torch.no_grad():
        module.weight_hh_l0.copy_(torch.diag(torch.tensor([0.5, 2.0])))
        module.weight_ih_l0.copy_(torch.eye(2))
    with fusedrnn.record_gradients(module) as rec:
        y, _ = module(torch.ones(40, vanishing + 1, 2).double())
        (y[-1, :-1, 0].sum() + y[-1, -1, 1]).backward()
    (layer,) = rec.layers
    assert layer.verdict == "exploding" and layer.change == pytest.approx(2.0**39)
    assert layer.ends == pytest.approx((1.0, 2.0**39))


@pytest.mark.parametrize("factors, median", [((0.5, 0.9, 1.0), 0.9), ((1.0, 0.9, 0.5, 0.4), 0.5)])
def test_without_growth_a_row_is_of_the_median_sample(factors: tuple[float, ...], median: float) -> None:
    n = len(factors)
    module = fusedrnn.RNN(n, n, bias=False, nonlinearity="relu").double()
    with torch.no_grad():
        module.weight_hh_l0.copy_(torch.diag(torch.tensor(factors, dtype=torch.float64)))
        module.weight_ih_l0.copy_(torch.eye(n))
    with fusedrnn.record_gradients(module) as rec:
        module(torch.ones(40, n, n).double())[0][-1].diagonal().sum().backward()  # of sample i, unit i
    (layer,) = rec.layers
    assert layer.decay == pytest.approx(median, rel=1e-6) and layer.ends == pytest.approx((1.0, median**39), rel=1e-6)


def test_a_loss_at_every_step_of_very_many() -> None:
    """In the balance of what enters and what is lost, no step seems to change anything."""
    module = fusedrnn.RNN(1, 1, bias=False, nonlinearity="relu").double()
    with torch.no_grad():
        module.weight_hh_l0.fill_(0.9992)
        module.weight_ih_l0.fill_(1.0)
    x = torch.rand(12000, 1, 1).double()
    with fusedrnn.record_gradients(module) as rec:
        module(x)[0].sum().backward()
        module(x)[0][-1].sum().backward()
    every, last = rec.layers
    assert (every.verdict, every.steps, every.enters) == ("unknown", 0, "at every step")
    assert last.verdict == "vanishing" and last.change == pytest.approx(0.9992**11999)


def test_one_step_of_many_is_named() -> None:
    module = multiple_of_identity(0.9, nonlinearity="relu")
    with fusedrnn.record_gradients(module) as rec:
        module(torch.rand(1000, 1, 3).double())[0][500].sum().backward()
    assert rec.layers[0].enters == "at 1 of 1000 steps"


def test_what_is_not_finite_is_told_from_what_explodes() -> None:
    module, x = multiple_of_identity(0.9, nonlinearity="relu").float(), torch.rand(39, 2, 3) + 0.1
    everywhere, at_last = (slice(None), math.nan, "at every step"), (slice(-1, None), math.inf, "at the last step")
    for part, bad, enters in (everywhere, at_last):
        with fusedrnn.record_gradients(module) as rec:
            (module(x)[0][part] * bad).sum().backward()
        (layer,) = rec.layers
        assert (layer.verdict, layer.enters) == ("not finite", enters)
        assert "set_detect_anomaly" in rec.summary() and "grad_clip=" not in rec.summary()
        assert layer.h.isinf().any() and not layer.h.isnan().any()
    wild = multiple_of_identity(1e5, nonlinearity="relu").float()
    with fusedrnn.record_gradients(wild) as rec:
        wild(x)[0][-1].sum().backward()
    assert rec.layers[0].verdict == "exploding" and rec.layers[0].h.isinf().any() and "grad_clip=" in rec.summary()
