"""The norms that a backward pass records on its way, against those of a loop that keeps every gradient."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import STATES, several
from parity import DEVICE, Case
from test_through_time import B, T, given, gradients, kinds, loop
from tolerances import assert_close
from torch import Tensor, nn

import fusedrnn
from fusedrnn.cells import CELLS


def recorded(case: Case) -> list[fusedrnn.LayerGradients]:
    module, tensors = given(case, 1.0)
    module = module.to(DEVICE)
    tensors = {name: t.detach().to(DEVICE).requires_grad_() for name, t in tensors.items()}
    states = tuple(tensors[name] for name in STATES if name in tensors)
    y, last = module(tensors["x"], states if len(states) > 1 else states[0], lengths=case.lengths)
    with fusedrnn.record_gradients(module) as rec:
        gradients(case, module, tensors, (y, *(last if isinstance(last, tuple) else (last,))))
    return rec.layers


@pytest.mark.isa
@pytest.mark.float64
@pytest.mark.parametrize("cell", CELLS)
def test_recorded_norms(cell: str) -> None:
    for case in kinds(cell):
        module, tensors = given(case, 1.0)
        states = tuple(tensors[name] for name in STATES if name in tensors)
        lengths = list(case.lengths or [T] * B)
        y, last, seen = loop(cell, module, tensors["x"], states, lengths)
        draw = torch.Generator().manual_seed(7)
        loss = sum((torch.randn(r.shape, generator=draw, dtype=torch.float64) * r).sum() for r in (y, *last))
        loss.backward()
        inside = torch.arange(T).unsqueeze(1) < torch.tensor(lengths)

        def norms(steps: list[Tensor], inside: Tensor = inside) -> Tensor:
            found = torch.stack([(torch.zeros_like(s) if s.grad is None else s.grad).norm(dim=1) for s in steps])
            return found.where(inside, torch.nan)

        found = recorded(case)
        assert [r.direction for r in found] == ["forward", "reverse"][: len(seen["h"])]
        for d, layer in enumerate(found):
            torch.testing.assert_close(layer.h, norms(seen["h"][d]), equal_nan=True, rtol=1e-9, atol=1e-12)
            assert (layer.c is None) == (not several(cell))
            if layer.c is not None:
                torch.testing.assert_close(layer.c, norms(seen["c"][d]), equal_nan=True, rtol=1e-9, atol=1e-12)
            assert list(layer.gates) == list(CELLS[cell].gates)
            for g, name in enumerate(layer.gates):
                own = torch.stack([s.grad.chunk(len(layer.gates), 1)[g].norm(dim=1) for s in seen["inputs"][d]])
                torch.testing.assert_close(
                    layer.gates[name], own.where(inside, torch.nan), equal_nan=True, rtol=1e-9, atol=1e-12
                )


def test_recording_changes_nothing_and_takes_every_layout() -> None:
    module, x = fusedrnn.LSTM(4, 5, num_layers=2, bidirectional=True), torch.randn(T, B, 4)
    lengths = torch.tensor([5, 2, 7, 3])

    def backward(call: Callable[[], Tensor]) -> tuple[list[Tensor], list[fusedrnn.LayerGradients]]:
        module.zero_grad()
        with fusedrnn.record_gradients(nn.ModuleDict({"rnn": module})) as rec:
            call().sum().backward()
        return [p.grad.clone() for p in module.parameters()], rec.layers

    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    first, by_lengths = backward(lambda: module(x, lengths=lengths)[0])
    second, by_packing = backward(lambda: module(packed)[0].data)
    plain = torch.autograd.grad(module(x, lengths=lengths)[0].sum(), list(module.parameters()))
    for a, b, c in zip(first, second, plain, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert [r.label for r in by_lengths] == ["rnn.l1", "rnn.l1 reverse", "rnn.l0", "rnn.l0 reverse"]
    for a, b in zip(by_lengths, by_packing, strict=True):
        torch.testing.assert_close(a.h, b.h, equal_nan=True)
        assert a.h.isnan().sum() == T * B - lengths.sum()
    with torch.autocast("cpu", torch.bfloat16):
        _, cast = backward(lambda: module(x)[0])
    assert len(cast) == 4 and cast[0].h.dtype == torch.float32
    create = fusedrnn.record_gradients(module)
    with create:
        torch.autograd.grad(module(x)[0].sum(), module.weight_hh_l0, create_graph=True)
    assert len(create.layers) == 4


def test_what_is_sent_and_what_comes_from_outside() -> None:
    """Each against a loop of single steps, for two states too."""
    for cls in (fusedrnn.LSTM, fusedrnn.GRU, fusedrnn.RNN, fusedrnn.ResidualRNN):
        module, x, weight = cls(3, 4).double(), torch.randn(6, 2, 3).double(), torch.randn(6, 2, 4).double()
        states = 2 if cls is fusedrnn.LSTM else 1
        carried = [torch.zeros(1, 2, 4).double() for _ in range(states)]
        loss, before = torch.zeros(()).double(), []
        for t in range(6):
            y, last = module(x[t : t + 1], tuple(carried) if states == 2 else carried[0])
            given = list(last) if states == 2 else [last]
            carried = [s.clone() for s in given]  # what later steps read
            before.append(carried)
            loss = loss + (weight[t] * y[0]).sum()
        sent = torch.autograd.grad(loss, [s for step in before for s in step], allow_unused=True, retain_graph=True)
        expected = [torch.zeros(2) if s is None else s[0].norm(dim=1) for s in sent]
        with fusedrnn.record_gradients(module) as rec:
            (weight * module(x)[0]).sum().backward()
        (layer,) = rec.layers
        torch.testing.assert_close(layer.sent_h, torch.stack(expected[::states]).double())
        if states == 2:
            torch.testing.assert_close(layer.sent_c, torch.stack(expected[1::2]).double())
        torch.testing.assert_close(layer.from_y, weight.norm(dim=2))
        assert layer.enters == "at every step"


def layouts(x: Tensor) -> dict[str, tuple[Any, dict[str, Any]]]:
    """What to call a layer of 7 steps and 3 samples with."""
    reset = torch.zeros(7, 3, dtype=torch.bool)
    reset[3, 0] = reset[0, 1] = reset[5, 1] = True
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 7, 5]), enforce_sorted=False)
    lengths = {"lengths": [3, 7, 0]}
    return {"plain": (x, {}), "lengths": (x, lengths), "reset": (x, {"reset": reset}), "packed": (packed, {})}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["plain", "lengths", "reset", "packed"])
def test_what_enters_is_the_gradient_of_the_output(layout: str, dtype: torch.dtype) -> None:
    """Of a layer above too: two modules, so that autograd holds the gradient of what goes from one to the other."""
    for options in ({}, {"bidirectional": True}, {"proj_size": 2, "bidirectional": True}):
        lower = fusedrnn.LSTM(3, 4, dtype=dtype, **options)
        H, D = lower.proj_size or 4, lower.bidirectional + 1
        upper = fusedrnn.LSTM(D * H, 4, dtype=dtype, **options)
        given, arguments = layouts(torch.randn(7, 3, 3, dtype=dtype))[layout]
        y0 = lower(given, **arguments)[0]
        y1 = upper(y0, **arguments)[0]
        ys = [y.data if layout == "packed" else y for y in (y0, y1)]
        for y in ys:
            y.retain_grad()
        with fusedrnn.record_gradients(nn.ModuleList([lower, upper])) as rec:
            (ys[1] * torch.randn_like(ys[1])).sum().backward()
        for d, name, y in [(d, str(n), ys[n]) for n in (1, 0) for d in range(D)]:
            layer = next(r for r in rec.layers if r.name == name and r.direction == ("forward", "reverse")[d])
            grad = y.grad
            if layout == "packed":
                grad, _ = nn.utils.rnn.pad_packed_sequence(y0._replace(data=grad))
            expected = grad.unflatten(2, (D, H))[:, :, d].norm(dim=2).where(~layer.h.isnan(), torch.nan)
            assert layer.h.isnan().sum() == {"plain": 0, "reset": 0, "lengths": 11, "packed": 6}[layout]
            assert_close("from_y", layer.from_y, expected.to(layer.from_y), dtype)


def test_what_enters_by_c() -> None:
    module, x, weight = fusedrnn.LSTM(3, 4, bidirectional=True), torch.randn(6, 2, 3), torch.randn(6, 2, 8)
    for batch_first in (False, True):
        module.batch_first = batch_first
        with fusedrnn.record_gradients(module) as rec:
            _, _, states = module(x.transpose(0, 1) if batch_first else x, return_states=True)
            (states[0][1] * (weight.transpose(0, 1) if batch_first else weight)).sum().backward()
        for d, layer in enumerate(rec.layers):
            assert layer.enters == "at every step" and not layer.from_y.any()
            torch.testing.assert_close(layer.from_c, weight[..., 4 * d : 4 * d + 4].norm(dim=2))
    with fusedrnn.record_gradients(module) as rec:
        module(x.transpose(0, 1))[1][1].sum().backward()
    for layer in rec.layers:
        assert (layer.enters, layer.steps, len(layer.by_lag())) == ("at the last step", 5, 6)
        assert layer.ends[0] == pytest.approx(2) and layer.change == pytest.approx(layer.ends[1] / layer.ends[0])


def test_the_state_of_an_lstm_is_both() -> None:
    """Without weights c alone goes on, by the forget gate."""
    module, f = fusedrnn.LSTM(3, 4).double(), torch.tensor(0.9, dtype=torch.float64)
    for p in module.parameters():
        p.detach().zero_()
    module.bias_ih_l0.detach()[4:8] = f.logit()
    with fusedrnn.record_gradients(module) as rec:
        module(torch.zeros(40, 2, 3).double())[0][-1].sum().backward()
    (layer,) = rec.layers
    dh, dc = 2.0, 1.0  # o (1 - tanh(c)^2) = 1/2
    assert layer.ends == pytest.approx((math.hypot(dh, dc), dc * 0.9**39))
    assert layer.change == pytest.approx(dc * 0.9**39 / math.hypot(dh, dc))


@pytest.mark.parametrize("samples, lengths", [(0, None), (2, [0, 0])])
def test_nothing_to_record(samples: int, lengths: list[int] | None) -> None:
    module = fusedrnn.LSTM(3, 4)
    with fusedrnn.record_gradients(module) as rec:
        module(torch.randn(5, samples, 3), lengths=lengths)[0].sum().backward()
    (layer,) = rec.layers
    assert (layer.enters, layer.steps, layer.verdict) == ("nowhere", 0, "none")
    assert "none" in rec.summary() and "nan" not in rec.summary()


def test_passes_and_calls_are_told_apart() -> None:
    module, x = fusedrnn.GRU(3, 4, num_layers=2), torch.randn(5, 2, 3)
    with fusedrnn.record_gradients(module) as rec:
        module(x)[0].sum().backward()
        assert [layer.label for layer in rec.layers] == ["model.l1", "model.l0"]
        module(x)[0].sum().backward()
    assert [layer.label for layer in rec.layers] == [f"model.l{n} pass {p}" for p in (0, 1) for n in (1, 0)]
    assert len({line.split("  ")[0] for line in rec.summary().splitlines()[1:5]}) == 4
    again = fusedrnn.RNN(4, 4)
    with fusedrnn.record_gradients(again) as rec:
        again(again(torch.randn(5, 2, 4))[0])[0].sum().backward()
    assert [layer.label for layer in rec.layers] == ["model.l0 call 0", "model.l0 call 1"]
    assert rec.layers[0].enters == "at every step"


def test_another_default_device() -> None:
    module, x = fusedrnn.LSTM(3, 4), torch.randn(5, 2, 3)
    with fusedrnn.record_gradients(module) as rec:
        module(x, lengths=[5, 2])[0].sum().backward()
    elsewhere = torch.device("meta")
    with elsewhere:
        with fusedrnn.record_gradients(module) as other:
            module(x, lengths=[5, 2])[0].sum().backward()
        assert other.summary() == rec.summary()
        pytest.importorskip("matplotlib")
        other.plot()


def test_pictures(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    module = fusedrnn.GRU(3, 4, num_layers=2)
    with fusedrnn.record_gradients(module) as rec:
        module(torch.randn(9, 3, 3), lengths=[9, 4, 0])[0].sum().backward()
    figure = rec.plot(tmp_path / "flow.png")
    assert (tmp_path / "flow.png").read_bytes().startswith(b"\x89PNG")
    lines, gates, heat = figure.axes[:3]
    assert [line.get_label().split(":")[0] for line in lines.lines[::3]] == ["model.l1", "model.l0"]
    assert [line.get_label() for line in gates.lines] == ["r", "z", "n"]
    assert heat.get_images()[0].get_array().shape == (3, 9)


def test_what_cannot_be_recorded() -> None:
    with pytest.raises(ValueError, match="the model has no fusedrnn.RNN"):
        fusedrnn.record_gradients(nn.Linear(2, 2))
    module, x = fusedrnn.GRU(3, 4), torch.randn(5, 2, 3)
    other = copy.deepcopy(module)
    with fusedrnn.record_gradients(module) as rec:
        other(x)[0].sum().backward()
    module(x)[0].sum().backward()
    for call in (rec.summary, rec.plot):
        with pytest.raises(RuntimeError, match="no backward pass of the model's recurrent layers ran"):
            call()
    with fusedrnn.record_gradients(module), pytest.raises(RuntimeError, match="cannot look into torch.func"):
        torch.vmap(torch.func.grad(lambda x: module(x)[0].sum()))(x.unsqueeze(0))


def test_the_meta_device_has_no_norms() -> None:
    module = fusedrnn.GRU(3, 4, device="meta")
    y, _ = module(torch.randn(5, 2, 3, device="meta"))
    with fusedrnn.record_gradients(module), pytest.raises(RuntimeError, match="on the meta device have no norms"):
        y.sum().backward()


def test_copies_and_pickles_say_the_same() -> None:
    module = fusedrnn.LSTM(3, 4)
    with fusedrnn.record_gradients(module) as rec:
        module(torch.randn(5, 2, 3), lengths=[5, 2])[0].sum().backward()
    for other in (copy.deepcopy(rec), pickle.loads(pickle.dumps(rec))):
        assert other.summary() == rec.summary()
        torch.testing.assert_close(other.layers[0].h, rec.layers[0].h, rtol=0, atol=0, equal_nan=True)
