"""Dropout, zoneout and weight drop as options of modules: which masks are drawn, in every layout and use."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from loops import TWINS, states_like, with_noise
from parity import DEVICE
from test_dropout import EVERYTHING, B, H, I, T, one_layer
from tolerances import assert_all_close
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from fusedrnn.cells import CELLS
from fusedrnn.layer import dropout
from fusedrnn.layer.call import Noise


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
    options = with_noise(cell, EVERYTHING)
    module = TWINS[cell].layer(I, H, num_layers=2, bidirectional=True, **options).double().train(training)
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


@pytest.mark.parametrize("cell", CELLS)
def test_one_step_twice_differentiable(cell: str) -> None:
    """T = 1 has a path of its own there."""
    module, x = (
        TWINS[cell].layer(2, 3, **with_noise(cell, EVERYTHING)).double(),
        torch.randn(1, 2, 2).double().requires_grad_(),
    )
    h0 = torch.randn(1, 2, 3).double().requires_grad_()

    def call(x: Tensor, h0: Tensor) -> Tensor:
        torch.manual_seed(3)
        return module(x, states_like(cell, h0))[0]

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
@pytest.mark.float64
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
        given = states_like(cell, h0, torch.zeros_like(h0))
        module(x, given)[0][1:].sum().backward()
        assert h0.grad.count_nonzero() == 0


@pytest.mark.isa
@pytest.mark.float64
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
    """Zoneout's mean by the short path, of one call and another: layers, directions, projections."""
    x, h = torch.randn(T, B, I), len(CELLS[cell].states)
    for bidirectional, proj in product((False, True), (0, 3) if CELLS[cell].projectable else (0,)):
        options = {"proj_size": proj} if proj else {}
        rates = 0.3 if h == 1 else (0.3, 0.6) if h == 2 else (0.3, 0.0)
        module = TWINS[cell].layer(I, H, num_layers=3, bidirectional=bidirectional, zoneout=rates, **options).eval()
        expected = module(x)
        with torch.no_grad():
            for _ in range(3):
                torch.testing.assert_close(module(x), expected)
