"""Ragged batches: a PackedSequence gives what each sequence gives alone, sorted or not, and costs no op a step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from parity import Case, assert_parity, packer, ragged, results, run_ours, run_twin, twin
from tolerances import assert_all_close, assert_close
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from fusedrnn.cells import CELLS

LENGTHS = {
    "sorted": ((5, 4, 4, 2, 1), True),
    "unsorted": ((2, 5, 1, 4, 4), False),
    "equal": ((5, 5, 5, 5, 5), True),
    "steep": ((5, 1, 1, 1, 1), True),
    "longest_last": ((1, 1, 2, 2, 5), False),
}


def packed_case(cell: str, lengths: str, **options) -> Case:
    return Case(cell, T=5, B=5, lengths=LENGTHS[lengths][0], enforce_sorted=LENGTHS[lengths][1], **options)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("cell", CELLS)
def test_outputs_and_gradients(cell: str, lengths: str, dtype: torch.dtype) -> None:
    case = packed_case(cell, lengths, H=19, num_layers=2, bidirectional=True, dtype=dtype)
    assert_parity(case)


@pytest.mark.parametrize("options", [{"h0": False}, {"bias": False}, {"batch_first": True}, {"B": 1}], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_options(cell: str, options: dict) -> None:
    case = ragged(replace(Case(cell, T=4, B=3, num_layers=2, bidirectional=True), **options))
    assert_all_close(run_ours(case), run_twin(case))


@pytest.mark.parametrize("cell", [name for name, cell in CELLS.items() if cell.projectable])
def test_projection(cell: str) -> None:
    for lengths in LENGTHS:
        case = packed_case(cell, lengths, num_layers=2, bidirectional=True, proj_size=3)
        assert_all_close(run_ours(case), run_twin(case))


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("cell", CELLS)
def test_equals_each_sequence_alone(cell: str, lengths: str) -> None:
    """Our kernel against itself: outputs, final states, dx and dh0 of each row; parameter gradients summed."""
    case = packed_case(cell, lengths, num_layers=2, bidirectional=True)
    module, tensors = case.module(), case.tensors()
    parameters = dict(module.named_parameters())

    def together(x: Tensor, hx):
        y, last = module(packer(case)(x), hx)
        return pad_packed_sequence(y)[0], last

    def alone(x: Tensor, hx):
        rows, lasts = [], []
        for b, length in enumerate(case.lengths):
            state = tuple(s[:, b : b + 1] for s in hx) if isinstance(hx, tuple) else hx[:, b : b + 1]
            y, last = module(x[:length, b : b + 1], state)
            rows.append(torch.cat([y, y.new_zeros(case.T - length, *y.shape[1:])]))
            lasts.append(last if isinstance(last, tuple) else (last,))
        last = tuple(torch.cat(states, dim=1) for states in zip(*lasts, strict=True))
        return torch.cat(rows, dim=1), last if len(last) > 1 else last[0]

    assert_all_close(results(together, tensors, parameters), results(alone, tensors, parameters))


@pytest.mark.parametrize("cell", CELLS)
def test_padding_is_never_read(cell: str) -> None:
    """NaN in the padding of x changes nothing: it is not packed, and nothing is padded again behind the scenes."""
    case = packed_case(cell, "unsorted", num_layers=2, bidirectional=True)
    module, tensors = case.module(), case.tensors()
    expected = module(packer(case)(tensors["x"]))
    dirty = tensors["x"].detach().clone()
    for b, length in enumerate(case.lengths):
        dirty[length:, b] = float("nan")
    assert torch.equal(module(packer(case)(dirty))[0].data, expected[0].data)


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_the_sequence_returned(cell: str, enforce_sorted: bool) -> None:
    module = Case(cell).module()
    x = torch.randn(4, 3, 4, dtype=torch.float64)
    packed = pack_padded_sequence(x, torch.tensor([4, 2, 1]), enforce_sorted=enforce_sorted)
    y, _ = module(packed)
    assert type(y) is PackedSequence
    assert torch.equal(y.batch_sizes, packed.batch_sizes) and y.batch_sizes.device.type == "cpu"
    for name in ("sorted_indices", "unsorted_indices"):
        ours, given = getattr(y, name), getattr(packed, name)
        assert (ours is None) == (given is None) and (given is None or torch.equal(ours, given))


@pytest.mark.parametrize("cell", CELLS)
def test_pack_sequence_and_a_padded_batch_of_equal_lengths(cell: str) -> None:
    module, x = Case(cell, B=3).module(), Case(cell, B=3).tensors()["x"].detach()
    y, last = module(pack_sequence(list(x.unbind(1))))
    padded, last_padded = module(x)
    assert_close("y", pad_packed_sequence(y)[0], padded)
    torch.testing.assert_close(last, last_padded)


@pytest.mark.parametrize("cell", CELLS)
def test_output_of_one_layer_as_input_of_the_next(cell: str) -> None:
    case = packed_case(cell, "unsorted", bidirectional=True)
    first = case.module()
    second = Case(cell, I=2 * case.H, seed=1).module()
    found = []
    for a, b in ((first, second), (twin(cell, first), twin(cell, second))):
        y, last = b(a(packer(case)(case.tensors()["x"]))[0])
        last = last[0] if isinstance(last, tuple) else last
        gradients = torch.autograd.grad(y.data.pow(2).sum() + last.sum(), [*first.parameters(), *second.parameters()])
        found.append([y.data, last, *gradients])
    for ours, theirs in zip(*found, strict=True):
        assert_close("chained", ours, theirs)


class CountOps(TorchDispatchMode):
    """Counts the ops that reach the dispatcher while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cell", CELLS)
def test_no_op_a_step(cell: str) -> None:
    """The number of dispatched ops, forward and backward, does not grow with T, padded or ragged."""
    counts = {}
    for T in (4, 40):
        for name, case in (("padded", Case(cell, T=T)), ("ragged", ragged(Case(cell, T=T, B=3)))):
            module, tensors = case.module(), case.tensors()
            x = packer(case)(tensors["x"].detach()) if case.lengths else tensors["x"]
            x.data.requires_grad_()
            with CountOps() as ops:
                y, _ = module(x)
                (y.data if case.lengths else y).sum().backward()
            counts[name, T] = ops.count
    assert counts["padded", 4] == counts["padded", 40]
    assert counts["ragged", 4] == counts["ragged", 40]
