"""The stepwise driver of the GPU: what only it does. ``pytest -m isa`` checks the rest of it, on the CPU under
``FUSEDRNN_CPU_ISA=stepwise`` (test_isa.py does so) and on a GPU under ``FUSEDRNN_TEST_DEVICE=cuda``.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parity import DEVICE, STEPWISE, Case, assert_parity, ragged

from benchmarks import probes
from fusedrnn.cells import CELLS

stepwise = pytest.mark.skipif(not STEPWISE, reason="the CPU's own kernels are in use here: test_isa.py runs this")
SHAPES = {
    "odd": {"T": 7, "B": 3, "I": 5, "H": 9},
    "one step": {"T": 1, "B": 2},
    "one sample": {"T": 5, "B": 1, "bidirectional": True},
    "many steps, few a chunk": {"T": 31, "B": 4, "I": 3, "H": 20, "bidirectional": True},
    "batch first": {"T": 6, "B": 4, "batch_first": True, "bidirectional": True, "num_layers": 2},
    "no bias, no states": {"bias": False, "h0": False, "T": 9, "B": 4},
}


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=9).map(lambda n: sorted(n, reverse=True)),
    limit=st.integers(1, 60),
)
def test_spans_of_steps_cover_every_row_once(lengths: list[int], limit: int) -> None:
    """In both directions; no longer than the limit, or one step; and no shorter than it allows."""
    sizes = [sum(length > t for length in lengths) for t in range(lengths[0])]
    rows = {0: sizes, 1: sizes[::-1]}  # of each step in a direction's own order
    spans = probes.projection_spans(sizes, limit)
    assert [begin for begin, *_ in spans] == [0, *(end for _, end, *_ in spans[:-1])] and spans[-1][1] == len(sizes)
    for begin, end, *places in spans:
        counts = [sum(rows[d][begin:end]) for d in rows]
        assert counts == places[1::2]
        assert max(counts) <= limit or end == begin + 1
        if end < len(sizes):
            assert max(sum(rows[d][begin : end + 1]) for d in rows) > limit
    for d in rows:
        covered = [range(span[2 + 2 * d], span[2 + 2 * d] + span[3 + 2 * d]) for span in spans]
        assert sorted(row for part in covered for row in part) == list(range(sum(sizes)))
        starts = [part.start for part in covered]
        assert starts == sorted(starts, reverse=bool(d))


@stepwise
@pytest.mark.isa
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cell", CELLS)
def test_float16(cell: str, shape: str) -> None:
    case = Case(cell, dtype=torch.float16, **SHAPES[shape])
    assert_parity(case)
    assert_parity(ragged(case))


@stepwise
@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_projected_lstm(dtype: torch.dtype) -> None:
    for shape in SHAPES.values():
        case = Case("lstm", dtype=dtype, proj_size=3, **shape)
        assert_parity(case)
        assert_parity(ragged(case))


@stepwise
@pytest.mark.isa
@pytest.mark.parametrize("cell", CELLS)
def test_weights_in_any_order_in_memory(cell: str) -> None:
    """Two directions are one product where the addresses of their weights allow it: the numbers are the same."""
    case = Case(cell, T=6, B=4, I=5, H=7, bidirectional=True, dtype=torch.float32)
    x, h0, *c0 = (t.detach().to(DEVICE) for t in case.tensors().values())
    names = [name for name, _ in case.module().named_parameters()]
    found = []
    for order in (names, names[::-1], names[1::2] + names[::2]):
        module = case.module().to(DEVICE)
        memory = torch.empty(sum(parameter.numel() for parameter in module.parameters()), device=DEVICE)
        start = 0
        for name in order:  # all weights in one block
            value = getattr(module, name).detach()
            place = memory[start : start + value.numel()].view_as(value).copy_(value)
            setattr(module, name, torch.nn.Parameter(place))
            start += value.numel()
        y, _ = module(x, (h0, *c0) if c0 else h0)
        found.append((y, *torch.autograd.grad(y.square().sum(), [getattr(module, name) for name in names])))
    for again in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], again, strict=True))
