"""Cells that train in a loop of Python, against torch.nn's: autograd of C++, and one product for the weights of all
steps (``csrc/training.h``). test_gradcheck.py and test_modules.py have their values; this file what may go wrong
between the steps.
"""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from cell_loops import (
    NAMES,
    WEIGHTS,
    B,
    H,
    I,
    T,
    counted_steps,
    detached,
    first,
    gradients,
    inputs,
    loss,
    pair,
    run,
    same,
)
from torch import Tensor, nn

import fusedrnn
from fusedrnn import _C
from fusedrnn.inference import cache, plain_call

pytestmark = pytest.mark.skipif(_C.build()["fast"] is None, reason="no _fast for this torch and Python")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    yield from counted_steps(monkeypatch)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"bias": False}], ids=["bias", "no bias"])
@pytest.mark.parametrize("batch", [0, 1, B])
def test_every_step_takes_the_short_way(name: str, options: dict[str, Any], batch: int, short: dict[str, int]) -> None:
    ours, theirs = pair(name, **options)
    found = []
    for cell in (ours, theirs):
        x = inputs(batch=batch).requires_grad_()
        found.append(torch.autograd.grad(loss(cell, x), [x, *cell.parameters()]))
    same(*found)
    assert short == {"steps": T, "long": 0}
    assert batch == 0 or len({g.data_ptr() for g in found[0]}) == len(found[0]), "gradients share memory"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("wide", [False, True], ids=["few rows", "many rows"])
def test_strides_and_offsets(name: str, wide: bool) -> None:
    """Columns of something larger: states in one tensor, an input by its time, gradients that come as parts."""
    rows = 300 if wide else B
    ours, theirs = pair(name)
    torch.manual_seed(2)
    both, x = torch.randn(rows, 2 * H, dtype=torch.float64), torch.randn(rows, I, 3, dtype=torch.float64)
    at_the_end = torch.zeros(5000, 2 * H, dtype=torch.float64)
    found = []
    for cell in (ours, theirs):
        results = []
        for given in (both, at_the_end[-rows:]):
            leaf, input = given.clone().requires_grad_(), x.clone().requires_grad_()
            source = torch.empty_like(at_the_end).copy_(at_the_end)
            parts = (source[-rows:].copy_(given) + 0 * leaf).chunk(2, 1)
            state = cell(input[..., 2], parts if name == "LSTMCell" else parts[1])
            state = cell(input[..., 1], state)
            outputs = list(state) if name == "LSTMCell" else [state, state * 1]
            gradients = torch.linspace(-1, 1, 2 * rows * H, dtype=torch.float64).view(rows, -1).chunk(2, 1)
            results += [t.detach() for t in outputs]
            results += torch.autograd.grad(outputs, [leaf, input, *cell.parameters()], gradients)
            with torch.no_grad():
                results += [first(cell(input[..., 2], parts if name == "LSTMCell" else parts[1]))]
        found.append(results)
    same(*found)


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_are_computed(name: str) -> None:
    """Into the same tensors in each iteration: gradients come to what they were computed of."""
    found = []
    for cell in pair(name):
        weights, kept, results = {k: p.detach().clone() for k, p in cell.named_parameters()}, [], []
        for i in range(3):
            sources = [w.detach().clone().requires_grad_() for w in weights.values()]
            for w, source in zip(weights.values(), sources, strict=True):
                w.detach_().copy_(source * (1 + 0.1 * i))
            state = None
            for x_t in inputs():
                state = torch.func.functional_call(cell, weights, (x_t, state))
            kept.append(first(state).square().sum())
            kept[-1].backward()
            results += [source.grad for source in sources]
        found.append(results)
    same(*found)


def test_nothing_is_left_of_passes_that_fail() -> None:
    """Rows that waited are let go with their graph."""
    cell, kept = pair("GRUCell")[0], []

    class Stop(Exception):
        pass

    def stop(_: Tensor) -> None:
        raise Stop

    for _ in range(3):
        x = [x_t.clone() for x_t in inputs()]
        outputs = run(cell, x)
        outputs[2].register_hook(stop)
        total = outputs[-1].sum()  # the one before is still there
        with pytest.raises(Stop):
            total.backward()
        kept.append(weakref.ref(x[4]))
    del x, outputs, total
    gc.collect()
    assert [k() is None for k in kept] == [True] * 3


@pytest.mark.parametrize("name", NAMES)
def test_steps_accumulate_in_grad(name: str) -> None:
    """Backward passes one after another, on graphs of their own and again on the same one."""
    ours, theirs = pair(name)
    for cell in (ours, theirs):
        kept = loss(cell, inputs())
        loss(cell, 2 * inputs()).backward()
        kept.backward(retain_graph=True)
        kept.backward()
        with pytest.raises(RuntimeError, match="second time"):
            kept.backward()
    same(gradients(ours), gradients(theirs))


@pytest.mark.parametrize("name", NAMES)
def test_weights_change_between_graphs(name: str) -> None:
    ours, theirs = pair(name)
    for cell in (ours, theirs):
        optimizer = torch.optim.SGD(cell.parameters(), lr=0.1)
        state = None
        for _ in range(3):  # truncated back-propagation: the state goes on
            optimizer.zero_grad()
            outputs, state = [], detached(state) if state is not None else None
            for x_t in inputs():
                state = cell(x_t, state)
                outputs.append(first(state))
            torch.stack(outputs).square().sum().backward()
            optimizer.step()
    same(list(ours.parameters()), list(theirs.parameters()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("frozen", [["weight_ih"], ["weight_hh", "bias_hh"], WEIGHTS], ids="/".join)
def test_frozen_weights(name: str, frozen: Sequence[str], short: dict[str, int]) -> None:
    ours, theirs = pair(name)
    found = []
    for cell in (ours, theirs):
        for weight in frozen:
            getattr(cell, weight).requires_grad_(False)
        x = inputs().requires_grad_()
        loss(cell, x).backward()
        found.append([x.grad, *gradients(cell)])
    same(*found)
    assert all(getattr(ours, weight).grad is None for weight in frozen) and short["steps"] == T


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_frozen_between_steps(name: str) -> None:
    ours, theirs = pair(name)
    for cell in (ours, theirs):
        state = cell(inputs()[0])
        cell.weight_hh.requires_grad_(False)
        state = cell(inputs()[1], state)
        cell.weight_hh.requires_grad_(True)
        first(cell(inputs()[2], state)).square().sum().backward()
    same(gradients(ours), gradients(theirs))


@pytest.mark.parametrize("name", NAMES)
def test_a_part_of_the_graph(name: str) -> None:
    """Gradients of some leaves alone, and then those of all."""
    ours, theirs = pair(name)
    found = []
    for cell in (ours, theirs):
        x, total = inputs().requires_grad_(), None
        outputs = run(cell, x)
        total = torch.stack(outputs).square().sum()
        parts = [torch.autograd.grad(total, wanted, retain_graph=True) for wanted in (
            [x], [cell.weight_hh], [outputs[1]], [outputs[2], cell.bias_ih],
        )]  # fmt: skip
        total.backward(inputs=[cell.weight_ih], retain_graph=True)
        found.append([t for part in parts for t in part] + [cell.weight_ih.grad])
        outputs[0].sum().backward()
        found[-1] += gradients(cell)
    same(*found)


@pytest.mark.parametrize("name", [*NAMES, "GRUCell before"])
def test_what_is_written_before_backward(name: str) -> None:
    """Weights, inputs and states of a graph: an error, as in torch.nn; an output: not."""
    options = {"reset_after": False} if name.endswith("before") else {}
    cell, x = getattr(fusedrnn, name.split()[0])(I, H, dtype=torch.float64, **options), inputs()
    for write in (lambda: cell.weight_hh.mul_(2), lambda: x[1].mul_(2)):
        total = loss(cell, x)
        with torch.no_grad():
            write()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()
    y = run(cell, x)[-1]
    y.mul_(2)
    y.sum().backward()


@pytest.mark.parametrize(
    "write", [lambda t: t.mul_(2), lambda t: t.untyped_storage().resize_(0)], ids=["written", "freed"]
)
def test_an_input_written_during_backward(write: Callable[[Tensor], Any]) -> None:
    """After its step, before the product for the weights."""
    cell, x = pair("LSTMCell")[0], [x_t.clone() for x_t in inputs()]
    outputs = run(cell, x)

    def hook(_: Tensor) -> None:
        write(x[4])

    outputs[3].register_hook(hook)
    with pytest.raises(RuntimeError, match="modified by an inplace operation during backward"):
        outputs[4].sum().backward()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("freed", ["x", *WEIGHTS])
def test_memory_that_is_freed_before_backward(name: str, freed: str) -> None:
    cell, x = pair(name)[0], [x_t.clone() for x_t in inputs()]
    total = loss(cell, x)
    (x[1] if freed == "x" else getattr(cell, freed)).untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="resized or freed"):
        total.backward()


@pytest.mark.parametrize("name", NAMES)
def test_weights_that_are_replaced(name: str) -> None:
    """A new parameter between steps, new data of another type between graphs: the gradients come to the right ones."""
    ours, theirs = pair(name)
    old = []
    for cell in (ours, theirs):
        state = cell(inputs()[0])
        old.append(cell.weight_hh)
        cell.weight_hh = nn.Parameter(cell.weight_hh.detach() * 2)
        first(cell(inputs()[1], state)).square().sum().backward()
    same([old[0].grad, *gradients(ours)], [old[1].grad, *gradients(theirs)])
    kept = loss(ours, inputs())
    for p in ours.parameters():
        p.data = p.data.float()
        p.grad = None
    loss(ours, inputs().float()).backward()
    del kept
    assert all(g.dtype == torch.float32 for g in gradients(ours))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_outlives_its_graph(name: str) -> None:
    ours = pair(name)[0]
    total = loss(ours, inputs())
    total.backward()
    del total
    swap = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        ours.zero_grad()
        ours.float()  # torch refuses if anything holds the weights
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swap)
    total = loss(ours, inputs().float())
    weights = [weakref.ref(p) for p in ours.parameters()]
    module = weakref.ref(ours)
    del ours
    gc.collect()
    assert module() is None and all(w() is not None for w in weights)
    total.backward()
    del total
    gc.collect()
    assert all(w() is None for w in weights) and not any(m is None for m in cache.cached)


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles_in_the_middle(name: str) -> None:
    ours, theirs = pair(name)
    state = ours(inputs()[0])
    before = first(state).square().sum()
    twin = copy.deepcopy(ours)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    (before + loss(ours, inputs()[1:], state)).backward()
    for cell in (twin, again, theirs):
        loss(cell, inputs()).backward()
    for cell in (ours, twin, again):
        same(gradients(cell), gradients(theirs))


@pytest.mark.parametrize("name", NAMES)
def test_a_backward_pass_that_fails(name: str) -> None:
    """In the middle: the next one is not disturbed by its rows."""
    ours, theirs = pair(name)
    outputs = run(ours, inputs())

    def fail(_: Tensor) -> None:
        raise KeyError("in the middle")

    handle = outputs[2].register_hook(fail)
    total = torch.stack(outputs).square().sum()
    with pytest.raises(KeyError, match="in the middle"):
        total.backward(retain_graph=True)
    handle.remove()
    same([g for g in gradients(ours) if g is not None], [])
    loss(ours, inputs()).backward()
    loss(theirs, inputs()).backward()
    same(gradients(ours), gradients(theirs))


@pytest.mark.parametrize("name", NAMES)
def test_threads(name: str) -> None:
    """Graphs of several threads at once, through one module."""
    ours, theirs = pair(name)
    found, x = {}, inputs()

    def work(i: int) -> None:
        for _ in range(30):
            found[i] = torch.autograd.grad(loss(ours, (i + 1) * x), list(ours.parameters()))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i in range(4):
        same(found[i], torch.autograd.grad(loss(theirs, (i + 1) * x), list(theirs.parameters())))


@pytest.mark.parametrize("name", NAMES)
def test_many_rows(name: str) -> None:
    """More than wait for one product (kMostRows), and steps with more than wait at all (kFewRows)."""
    ours, theirs = pair(name)
    rows = [*inputs(5, 300), *(x_t.expand(300, I) for x_t in inputs(70, 1))]
    for cell in (ours, theirs):
        outputs = run(cell, rows[:5])
        outputs += run(cell, [x_t[:256] for x_t in rows[5:]])
        sum(h.square().sum() for h in outputs).backward()
    same(gradients(ours), gradients(theirs))


@pytest.mark.parametrize("name", NAMES)
def test_a_node_called_by_hand(name: str) -> None:
    ours, theirs = pair(name)
    x = inputs().requires_grad_()
    h = first(ours(x[0]))
    dh = torch.ones_like(h)
    arguments = (dh, None) if name == "LSTMCell" else (dh,)
    found = h.grad_fn(*arguments)
    expected = torch.autograd.grad(first(theirs(x[0])), [x, *theirs.parameters()], dh)
    same([found[0], *found[1:]], [expected[0][0], *expected[1:]])


def test_a_shared_weight() -> None:
    """Two cells with one weight."""
    found = []
    for a, b in zip(pair("GRUCell"), pair("GRUCell"), strict=True):
        b.weight_hh = a.weight_hh
        x = inputs()
        h = None
        for x_t in x:
            h = b(a(x_t, h)[:, :I], h)
        h.square().sum().backward()
        found.append([*gradients(a), *gradients(b)])
    same(*found)


def test_without_the_short_way(monkeypatch: pytest.MonkeyPatch, short: dict[str, int]) -> None:
    ours, theirs = pair("GRUCell")
    monkeypatch.setattr(plain_call, "train_cell", lambda *_: None)
    for cell in (ours, theirs):
        loss(cell, inputs()).backward()
    same(gradients(ours), gradients(theirs))
    assert short["steps"] == 0


def test_capsules_are_checked() -> None:
    cell, x = pair("GRUCell")[0], inputs()[0]
    form, weights = (2, 1, 1, I, H, H), list(cell.parameters())
    for wrong in (None, _C.packed_weights()):
        with pytest.raises(TypeError, match="capsule fusedrnn.KeptSums"):
            _C.train_cell(x, None, weights, "gru", form, wrong)
    assert _C.train_cell(x, None, weights, "gru", (3, 1, 1, I, H, H), _C.kept_sums()) is None
    assert _C.train_cell(x, None, [w.detach() for w in weights], "gru", form, _C.kept_sums()) is None
