"""Padded batches with lengths and with resets inside a sequence: against a plain loop that says what they mean."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from loops import STATES, TWINS, layer_loop
from parity import DEVICE, Case, Results, results
from tolerances import assert_all_close
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fusedrnn
from fusedrnn.cells import CELLS
from fusedrnn.layer.segments import cut

LENGTHS = (3, 6, 0, 6, 1, 4, 2)
T, B = 6, len(LENGTHS)


def marks(share: float = 0.3, seed: int = 3) -> Tensor:
    return torch.rand(T, B, generator=torch.Generator().manual_seed(seed)) < share


OPTIONS: dict[str, dict[str, Any]] = {
    "lengths": {"lengths": torch.tensor(LENGTHS)},
    "reset": {"reset": marks()},
    "both": {"lengths": list(LENGTHS), "reset": marks()},
}


def run(case: Case, options: dict[str, Any], *, reference: bool = False) -> Results:
    """Outputs and gradients of our module, or of the loop in float64."""
    module, tensors, device = case.module(), case.tensors(), "cpu" if reference else DEVICE
    if reference:
        module, tensors = module.double(), {name: t.double() for name, t in tensors.items()}
    module = module.to(device)
    tensors = {name: t.detach().to(device).requires_grad_() for name, t in tensors.items()}
    if "reset" in options and case.batch_first:
        options = options | {"reset": options["reset"].T}
    call = partial(layer_loop, case.cell, module, **options) if reference else partial(module, **options)
    return results(call, tensors, dict(module.named_parameters()))


def kinds(cell: str) -> list[Case]:
    cases = []
    projections = (0, 3) if CELLS[cell].projectable else (0,)
    for layers, bidirectional, proj_size, h0 in product((1, 2), (False, True), projections, (True, False)):
        case = Case(cell, T=T, B=B, num_layers=layers, bidirectional=bidirectional, proj_size=proj_size, h0=h0)
        cases += [case, replace(case, batch_first=True, bias=False)]
    return cases


@pytest.mark.isa
@pytest.mark.float64
@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_every_kind_of_layer(cell: str, kind: str) -> None:
    for case in kinds(cell):
        assert_all_close(run(case, OPTIONS[kind]), run(case, OPTIONS[kind], reference=True), case.dtype)


@pytest.mark.device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_dtypes(cell: str, dtype: torch.dtype) -> None:
    case = Case(cell, T=T, B=B, dtype=dtype, bidirectional=True)
    assert_all_close(run(case, OPTIONS["both"]), run(case, OPTIONS["both"], reference=True), dtype)


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_lengths_are_a_packed_sequence_bit_for_bit(cell: str, enforce_sorted: bool) -> None:
    case = Case(cell, T=T, B=4, num_layers=2, bidirectional=True)
    module, x = case.module(), case.tensors()["x"]
    lengths = torch.tensor([6, 4, 4, 1]) if enforce_sorted else torch.tensor([4, 1, 6, 4])
    y, last = module(x, lengths=lengths)
    packed, expected = module(pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted))
    assert torch.equal(y, pad_packed_sequence(packed, total_length=T)[0])
    for a, b in zip(last, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("cell", TWINS)
def test_a_reset_is_a_new_call(cell: str) -> None:
    """As with calls of one step, whose states the caller sets to zero; no gradient passes a reset."""
    case = Case(cell, T=T, B=B)
    module, tensors, reset = case.module(), case.tensors(), marks()
    states = tuple(tensors[name] for name in STATES if name in tensors)
    y, _ = module(tensors["x"], states if len(states) > 1 else states[0], reset=reset)
    steps = []
    for t in range(T):
        states = tuple(torch.where(reset[t, :, None], 0.0, s) for s in states)
        out, last = module(tensors["x"][t : t + 1], states if len(states) > 1 else states[0])
        states = last if isinstance(last, tuple) else (last,)
        steps.append(out)
    torch.testing.assert_close(y, torch.cat(steps), rtol=0, atol=1e-12)
    b = int(reset.any(0).nonzero()[0])
    t = int(reset[:, b].nonzero()[-1])
    (dx,) = torch.autograd.grad(y[t:, b].sum(), tensors["x"])
    assert not dx[:t, b].any() and dx[t:, b].all()


def test_nothing_beyond_the_end_is_read() -> None:
    """NaN in the padding harms neither outputs nor gradients."""
    module, x = fusedrnn.LSTM(4, 5, bidirectional=True), torch.randn(T, B, 4)
    inside = torch.arange(T)[:, None] < torch.tensor(LENGTHS)
    x[~inside] = torch.nan
    x.requires_grad_()
    y, (h_n, c_n) = module(x, lengths=LENGTHS)
    gradients = torch.autograd.grad(y.sum() + h_n.sum() + c_n.sum(), [x, *module.parameters()])
    for t in (y, h_n, c_n, *gradients):
        assert t.isfinite().all()
    assert not y[~inside].any() and not gradients[0][~inside].any() and gradients[0][inside].all()


def test_nothing_before_a_reset_at_the_start_is_read() -> None:
    module, x, reset = fusedrnn.GRU(4, 5), torch.randn(T, B, 4), torch.zeros(T, B, dtype=torch.bool)
    reset[0, 2] = True
    h0 = torch.randn(1, B, 5)
    h0[:, 2] = torch.nan
    h0.requires_grad_()
    y, h_n = module(x, h0, reset=reset)
    assert y.isfinite().all() and h_n.isfinite().all()
    (dh0,) = torch.autograd.grad(y.sum(), h0)
    assert not dh0[:, 2].any() and dh0[:, 3].all()


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_samples_without_a_step(name: str) -> None:
    """All of them: the outputs are zero, the final states the initial ones, and every parameter has a gradient."""
    module = getattr(fusedrnn, name)(4, 5, num_layers=2)
    x, states = torch.randn(T, 3, 4), torch.randn(2, 2, 3, 5, requires_grad=True).unbind()
    y, last = module(x, states if name == "LSTM" else states[0], lengths=[0, 0, 0])
    last = last if isinstance(last, tuple) else (last,)
    assert y.shape == (T, 3, 5) and not y.any()
    for a, b in zip(last, states, strict=False):
        assert torch.equal(a, b)
    (y.sum() + last[0].sum()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())
    assert not module(x, lengths=[0, 0, 0])[0].any()


@pytest.mark.parametrize("kind", OPTIONS)
def test_what_changes_nothing_is_the_dense_call(kind: str) -> None:
    module, x = fusedrnn.LSTM(4, 5, num_layers=2, bidirectional=True), torch.randn(T, B, 4)
    options = {"lengths": [T] * B, "reset": torch.zeros(T, B, dtype=torch.bool)}
    if kind != "both":
        options = {kind: options[kind]}
    assert torch.equal(module(x, **options)[0], module(x)[0])


def test_lengths_of_every_integer_type_and_on_any_side_of_a_view() -> None:
    module, x, lengths = fusedrnn.GRU(4, 5, batch_first=True), torch.randn(B, 2 * T, 4)[:, ::2], torch.tensor(LENGTHS)
    expected = module(x, lengths=lengths)[0]
    for same in (lengths.int(), lengths.to(torch.uint8), LENGTHS, lengths.repeat_interleave(2)[::2], lengths.numpy()):
        assert torch.equal(module(x, lengths=same)[0], expected)


def test_derivatives_of_higher_order_and_transforms() -> None:
    case = Case("gru", T=4, B=3)
    module, x = case.module(), case.tensors()["x"]
    options = {"lengths": [2, 4, 1], "reset": torch.tensor([[0, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 1]]).bool()}
    assert torch.autograd.gradgradcheck(lambda x: module(x, **options), x)
    assert torch.autograd.gradcheck(lambda x: module(x, **options), x, check_forward_ad=True)
    many = torch.randn(5, *x.shape, dtype=torch.float64)
    found = torch.vmap(lambda x: module(x, **options)[0])(many)
    torch.testing.assert_close(found, torch.stack([module(one, **options)[0] for one in many]))


def test_autocast_dropout_and_inference() -> None:
    module, x = fusedrnn.LSTM(4, 5, num_layers=2, dropout=0.5), torch.randn(T, B, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y, (h_n, c_n) = module(x, **OPTIONS["both"])
    assert {y.dtype, h_n.dtype, c_n.dtype} == {torch.bfloat16}
    module.eval()
    with torch.inference_mode():
        assert torch.equal(module(x, **OPTIONS["both"])[0], copy.deepcopy(module)(x, **OPTIONS["both"])[0])
    expected = module(x, **OPTIONS["both"])[0]
    module.train()
    torch.manual_seed(0)
    first = module(x, **OPTIONS["both"])[0]
    torch.manual_seed(0)
    assert torch.equal(first, module(x, **OPTIONS["both"])[0]) and not torch.equal(first, expected)


@pytest.mark.parametrize("call", [fusedrnn.functional.lstm, fusedrnn.functional.gru, fusedrnn.functional.rnn])
def test_functions(call: Callable) -> None:
    name = call.__name__.upper()
    module, x = getattr(fusedrnn, name)(4, 5), torch.randn(T, B, 4)
    found, expected = call(x, None, module._flat_weights, **OPTIONS["both"]), module(x, **OPTIONS["both"])
    assert torch.equal(found[0], expected[0])


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lengths": torch.ones(B)}, TypeError, r"lengths must be integers, got torch.float32"),
    ({"lengths": [1.5] * B}, TypeError, r"lengths must be integers, got torch.float32"),
    ({"lengths": torch.ones(B, dtype=torch.bool)}, TypeError, r"lengths must be integers, got torch.bool"),
    ({"lengths": [1, 2]}, ValueError, r"lengths must have shape \[7\], a length for each sample, got \[2\]"),
    ({"lengths": torch.ones(B, 1).long()}, ValueError, r"lengths must have shape \[7\].*got \[7, 1\]"),
    ({"lengths": [-1] + [2] * 6}, ValueError, r"lengths must be from 0 to T = 6, got -1 to 2"),
    ({"lengths": [7] + [2] * 6}, ValueError, r"lengths must be from 0 to T = 6, got 2 to 7"),
    ({"reset": torch.zeros(T, B)}, TypeError, r"reset must be a boolean tensor, got torch.float32"),
    ({"reset": [[True] * B] * T}, TypeError, r"reset must be a boolean tensor, got list"),
    ({"reset": torch.zeros(B, T).bool()}, ValueError, r"reset must have shape \[6, 7\], a mark for each.*got \[7, 6\]"),
    ({"reset": torch.zeros(T).bool()}, ValueError, r"reset must have shape \[6, 7\].*got \[6\]"),
]


@pytest.mark.parametrize("options, error, text", WRONG)
def test_wrong_arguments(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        fusedrnn.LSTM(4, 5)(torch.randn(T, B, 4), **options)


def test_where_they_have_no_meaning() -> None:
    module = fusedrnn.GRU(4, 5)
    for options in ({"lengths": [3]}, {"reset": torch.zeros(T, 1).bool()}):
        with pytest.raises(ValueError, match="lengths and reset are for a padded batch.*got unbatched input"):
            module(torch.randn(T, 4), **options)
        with pytest.raises(ValueError, match="lengths and reset are for a padded batch.*got a PackedSequence"):
            module(pack_padded_sequence(torch.randn(T, 1, 4), [3]), **options)
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0 in RNN"):
        module(torch.randn(0, 2, 4), lengths=[0, 0])
    assert module(torch.randn(T, 0, 4), lengths=[])[0].shape == (T, 0, 5)
    with pytest.raises(TypeError):
        module(torch.randn(T, 1, 4), None, [3])  # by name only


@hypothesis.given(st.data())
def test_segments_are_what_the_marks_say(data: st.DataObject) -> None:
    steps, samples = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 5))
    lengths = data.draw(st.lists(st.integers(0, steps), min_size=samples, max_size=samples))
    reset = torch.tensor(data.draw(st.lists(st.booleans(), min_size=steps * samples, max_size=steps * samples)))
    reset = reset.bool().reshape(steps, samples)
    expected = []  # sample, its times, whether it takes the initial state and gives the final one
    for b in range(samples):
        times: list[int] = []
        for t in range(lengths[b]):
            if t and reset[t, b]:
                expected.append((b, tuple(times), times[0] == 0 and not reset[0, b], False))
                times = []
            times.append(t)
        if times:
            expected.append((b, tuple(times), times[0] == 0 and not reset[0, b], True))
    found = cut(lengths, reset, steps, samples, torch.device("cpu"))
    offset = [0, *found.batch_sizes.cumsum(0).tolist()]
    segments = []
    for s in range(len(found.sample)):
        rows = [int(found.rows[offset[k] + s]) for k, n in enumerate(found.batch_sizes.tolist()) if s < n]
        assert {row % samples for row in rows} == {int(found.sample[s])}
        times = tuple(row // samples for row in rows)
        segments.append((int(found.sample[s]), times, bool(found.begins[s]), bool(found.ends[s])))
    assert sorted(segments) == sorted(expected)
    assert all(a >= b for a, b in zip(found.batch_sizes.tolist(), found.batch_sizes.tolist()[1:]))
    for b in range(samples):
        if lengths[b]:
            assert segments[found.first[b]][0] == b and segments[found.first[b]][1][0] == 0
            assert segments[found.last[b]][0] == b and segments[found.last[b]][3]


@torch._dynamo.config.patch(allow_rnn=True)
def test_compiled_in_one_graph() -> None:
    """Whatever the lengths and resets are: how many rows there are is known when the program runs."""
    torch._dynamo.reset()
    for batch_first in (False, True):
        model = Model(batch_first)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for seed, lengths in enumerate((torch.tensor(LENGTHS), torch.tensor(LENGTHS).flip(0), None)):
            x = torch.randn((B, T, 4) if batch_first else (T, B, 4), requires_grad=True)
            reset = marks(seed=seed)
            reset = None if seed == 1 else reset.T if batch_first else reset
            if lengths is None and reset is None:
                continue
            found, expected = compiled(x, lengths, reset), model(x, lengths, reset)
            assert torch.equal(found, expected)
            for a, b in zip(*(torch.autograd.grad(y.sum(), [x, *model.parameters()]) for y in (found, expected))):
                torch.testing.assert_close(a, b)
        with pytest.raises(ValueError, match="all lengths are 0"):
            compiled(x, torch.zeros(B, dtype=torch.long), reset)
        with pytest.raises(ValueError, match="lengths must be from 0 to T"):
            compiled(x, torch.full((B,), T + 1), reset)


def test_exported() -> None:
    """With another T, another B and other lengths than those of the example."""
    model, dynamic = Model().eval(), torch.export.Dim.DYNAMIC
    program = torch.export.export(
        model, (torch.randn(T, B, 4), torch.tensor(LENGTHS), None),
        dynamic_shapes=({0: dynamic, 1: dynamic}, {0: dynamic}, None),
    )  # fmt: skip
    x, lengths = torch.randn(9, 3, 4), torch.tensor([0, 9, 4])
    torch.testing.assert_close(program.module()(x, lengths, None), model(x, lengths, None))


def test_the_cut_is_an_op() -> None:
    for lengths, reset in ((torch.tensor(LENGTHS), marks()), (None, marks()), (torch.tensor(LENGTHS), None)):
        torch.library.opcheck(torch.ops.fusedrnn.cut.default, (lengths, reset, T, B, torch.device("cpu")))


class Model(nn.Module):
    def __init__(self, batch_first: bool = False) -> None:
        super().__init__()
        self.layer = fusedrnn.LSTM(4, 5, num_layers=2, bidirectional=True, batch_first=batch_first)

    def forward(self, x: Tensor, lengths: Tensor | None, reset: Tensor | None) -> Tensor:
        y, (h_n, _) = self.layer(x, lengths=lengths, reset=reset)
        return y.sum(2) + h_n.sum()


@pytest.mark.parametrize("lengths", [3, "abcd", [[1], [2, 3]]])
def test_lengths_that_are_none(lengths: Any) -> None:
    with pytest.raises(TypeError, match="lengths must be integers, one for each sample, got"):
        fusedrnn.GRU(4, 5)(torch.randn(T, B, 4), lengths=lengths)


def test_a_batch_without_a_step_has_gradients() -> None:
    """A rare batch must not stop the training of others: y and h_n lead back to the parameters, with nothing."""
    for cell in ("lstm", "gru"):
        module = Case(cell, T=T, B=B).module()
        y, last = module(torch.randn(T, B, 4, dtype=torch.float64), lengths=[0] * B)
        for result in (y, *(last if isinstance(last, tuple) else (last,))):
            module.zero_grad()
            result.sum().backward(retain_graph=True)
            assert all(p.grad.count_nonzero() == 0 for p in module.parameters())


def test_symbolic_traces_keep_the_lengths() -> None:
    model = Model()
    x, lengths, reset = torch.randn(T, B, 4), torch.tensor(LENGTHS), marks()
    assert torch.equal(torch.fx.symbolic_trace(model)(x, lengths, reset), model(x, lengths, reset))
