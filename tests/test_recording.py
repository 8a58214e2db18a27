"""The norms that a backward pass records on its way, against those of a loop that keeps every gradient."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fusedrnn
from fusedrnn.cells import CELLS
from parity import DEVICE, Case
from test_through_time import B, T, given, gradients, kinds, loop


def recorded(case: Case) -> list[fusedrnn.LayerGradients]:
    module, tensors = given(case, 1.0)
    module = module.to(DEVICE)
    tensors = {name: t.detach().to(DEVICE).requires_grad_() for name, t in tensors.items()}
    states = tuple(tensors[name] for name in ("h0", "c0") if name in tensors)
    y, last = module(tensors["x"], states if len(states) > 1 else states[0], lengths=case.lengths)
    with fusedrnn.record_gradients(module) as rec:
        gradients(case, module, tensors, (y, *(last if isinstance(last, tuple) else (last,))))
    return rec.layers


@pytest.mark.isa
@pytest.mark.parametrize("cell", CELLS)
def test_recorded_norms(cell: str) -> None:
    for case in kinds(cell):
        module, tensors = given(case, 1.0)
        states = tuple(tensors[name] for name in ("h0", "c0") if name in tensors)
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
            assert (layer.c is None) == (cell != "lstm")
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


def test_decay_memory_and_verdict() -> None:
    """Of an RNN that is a multiple of the identity: each step back is a factor, and nothing else."""
    for factor, verdict in ((0.5, "vanishing"), (0.999, "healthy"), (1.5, "exploding")):
        module = fusedrnn.RNN(3, 3, nonlinearity="relu", bias=False).double()
        with torch.no_grad():
            module.weight_hh_l0.copy_(factor * torch.eye(3, dtype=torch.float64))
            module.weight_ih_l0.copy_(torch.eye(3))
        y, _ = module(torch.rand(40, 2, 3).double() + 0.1)
        with fusedrnn.record_gradients(module) as rec:
            y[30].sum().backward()  # the last steps get nothing
        (layer,) = rec.layers
        assert layer.decay == pytest.approx(factor) and layer.verdict == verdict and len(layer.by_lag()) == 31
        assert layer.memory == (pytest.approx(-1 / math.log(factor)) if factor < 1 else math.inf)
        assert verdict in rec.summary() and f"{factor:.4f}" in rec.summary()


def test_verdicts_at_the_edge() -> None:
    module = fusedrnn.LSTM(3, 4, bidirectional=True)
    with fusedrnn.record_gradients(module) as rec:
        module(torch.randn(5, 2, 3))[0][-1].sum().backward()
    assert [layer.verdict for layer in rec.layers] == ["healthy", "too short"]
    with torch.no_grad():
        module.weight_hh_l0.fill_(math.nan)
    with fusedrnn.record_gradients(module) as rec:
        module(torch.randn(5, 2, 3))[0].sum().backward()
    assert rec.layers[0].verdict == "exploding"


def test_pictures(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    module = fusedrnn.GRU(3, 4, num_layers=2)
    with fusedrnn.record_gradients(module) as rec:
        module(torch.randn(9, 3, 3), lengths=[9, 4, 0])[0].sum().backward()
    figure = rec.plot(tmp_path / "flow.png")
    assert (tmp_path / "flow.png").read_bytes().startswith(b"\x89PNG")
    lines, heat = figure.axes[:2]
    assert [line.get_label().split(":")[0] for line in lines.lines] == ["model.l1", "model.l0"]
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
