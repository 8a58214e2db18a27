"""Mixed precision: outputs in autocast's type, gradients in the parameters', numbers as good as the type allows."""

from __future__ import annotations

import pytest
import torch
from loops import SINGLES, TWINS
from parity import DEVICE, Case, run_ours, run_twin
from tolerances import assert_all_close
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn
from fusedrnn.cells import CELLS

pytestmark = pytest.mark.device
LOW = (torch.bfloat16, torch.float16)


def tensors(result: object) -> list[Tensor]:
    """All tensors of a nested result."""
    if isinstance(result, PackedSequence):
        return [result.data]
    return [result] if isinstance(result, Tensor) else [t for part in result for t in tensors(part)]


def kinds(cell: str) -> list[dict]:
    options = [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "batch_first": True}]
    return options + ([{"proj_size": 3}] if CELLS[cell].projectable else [])


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_layers(cell: str, dtype: torch.dtype) -> None:
    """Also where torch.nn has another type (GRU, projected LSTM) or raises (LSTM in float16)."""
    for options in kinds(cell):
        layer = TWINS[cell].layer(4, 5, **options).to(DEVICE)
        x = torch.randn(3, 2, 4, device=DEVICE, requires_grad=True)
        first = options.get("batch_first", False)
        packed = pack_padded_sequence(x, torch.tensor([2, 2, 1] if first else [3, 2]), batch_first=first)
        for argument in (x, packed):
            with torch.autocast(DEVICE.type, dtype=dtype):
                result = tensors(layer(argument))
                with torch.no_grad():
                    assert all(torch.equal(a, b) for a, b in zip(tensors(layer(argument)), result, strict=True))
            assert {t.dtype for t in result} == {dtype}
            leaves = [x, *layer.parameters()]
            found = torch.autograd.grad(sum(t.float().sum() for t in result), leaves)
            assert all(g.dtype == torch.float32 and g.isfinite().all() for g in found)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("cell", SINGLES)
def test_single_steps(cell: str, dtype: torch.dtype) -> None:
    module, x = TWINS[cell].cell(4, 5).to(DEVICE), torch.randn(2, 4, device=DEVICE)
    with torch.autocast(DEVICE.type, dtype=dtype):
        result = module(x)
        result = module(x, result)  # a state of the low type beside an input of float32
    assert {t.dtype for t in tensors(result)} == {dtype}


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_numbers(cell: str, dtype: torch.dtype) -> None:
    case = Case(cell, T=5, B=3, H=9, num_layers=2, dtype=torch.float32)
    with torch.autocast(DEVICE.type, dtype=dtype):
        found = run_ours(case)
    assert found["y"].dtype == dtype and found["dx"].dtype == torch.float32
    assert_all_close({name: t.float() for name, t in found.items()}, run_twin(case), dtype)


def test_where_nothing_is_cast() -> None:
    """float64 stays, and so does everything in a region where autocast is off."""
    layer, x = fusedrnn.LSTM(4, 5, device=DEVICE), torch.randn(3, 2, 4, device=DEVICE)
    double = fusedrnn.LSTM(4, 5, device=DEVICE).double()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert double(x.double())[0].dtype == torch.float64
        with torch.autocast(DEVICE.type, enabled=False):
            assert torch.equal(layer(x)[0], fusedrnn.functional.lstm(x, None, list(layer.parameters()))[0])
            assert layer(x)[0].dtype == torch.float32


@pytest.mark.parametrize("cell", CELLS)
def test_training_with_a_gradient_scaler(cell: str) -> None:
    """float16, a loss scaled so far that the first steps overflow and are skipped; then it learns."""
    torch.manual_seed(0)
    layer, head = TWINS[cell].layer(3, 16).to(DEVICE), nn.Linear(16, 1, device=DEVICE)
    parameters = [*layer.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**24, growth_interval=1000)
    x = torch.randn(8, 32, 3).to(DEVICE)
    target, losses = x[..., :1].cumsum(0).tanh(), []
    before = [p.detach().clone() for p in parameters]
    for step in range(60):
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, dtype=torch.float16):
            y = head(layer(x)[0])
        loss = (y.float() - target).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        if step == 0:
            assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True)), "an overflow, not skipped"
    assert scaler.get_scale() < 2.0**24
    assert losses[-1] < losses[0] / 2
    assert all(p.isfinite().all() for p in parameters)
