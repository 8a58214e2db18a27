"""Training in two processes (gloo): DistributedDataParallel and FSDP give what one process gives on the whole batch.

The processes start once; each test runs one function in both and compares what they return.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tolerances import assert_all_close, assert_close
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn

RANKS = 2
LENGTHS = (6, 5, 3, 1)  # of the whole batch
Steps = tuple[tuple[str, str], ...]
Both = Callable[..., list[Any]]


def join(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{file}", timedelta(minutes=4), RANKS, rank)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    """A function that calls another in both processes, with the rank, and returns the two results."""
    file, context = tmp_path_factory.mktemp("distributed") / "store", multiprocessing.get_context("spawn")
    pools = [ProcessPoolExecutor(1, context, join, (rank, str(file))) for rank in range(RANKS)]

    def call(function: Callable[..., Any], *args: Any) -> list[Any]:
        futures = [pool.submit(function, *args, rank) for rank, pool in enumerate(pools)]
        return [future.result(240) for future in futures]

    yield call
    for pool in pools:
        pool.shutdown()


class Model(nn.Module):
    """A stack and a layer after it, which may be left out; the loss may come from some of the results alone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        options = {"dtype": torch.float64}
        self.lstm = fusedrnn.LSTM(4, 5, num_layers=2, bidirectional=True, **options)
        self.gru, self.head = fusedrnn.GRU(10, 3, **options), nn.Linear(3, 2, **options)
        self.direct = fusedrnn.RNN(10, 3, **options)

    def forward(self, x: Tensor, lengths: Tensor | None, part: str, layer: str) -> Tensor:
        """The loss of each sample, [B]."""
        if lengths is not None:
            x = pack_padded_sequence(x, lengths)
        y, (h_n, c_n) = self.lstm(x)
        z, last = getattr(self, layer)(y)
        if part == "y":
            z = z if isinstance(z, Tensor) else nn.utils.rnn.pad_packed_sequence(z, total_length=6)[0]
            return self.head(z).square().sum((0, 2))
        states = {"last": last, "h_n": h_n, "c_n": c_n}[part]
        return states.square().sum((0, 2)) + 0.0 * self.head(last).sum()


def gradients(model: nn.Module, rank: int | None, steps: Steps, packed: bool) -> dict[str, Tensor]:
    """Of SGD steps on a half of the batch, or on all of it: each step's gradients by name, and the last weights."""
    torch.manual_seed(2)
    x, lengths = torch.randn(6, 4, 4, dtype=torch.float64), torch.tensor(LENGTHS)
    if rank is not None:
        x, lengths = x[:, rank::RANKS], lengths[rank::RANKS]
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), {}
    named = [(name.removeprefix("module."), p) for name, p in model.named_parameters()]
    for i, (part, layer) in enumerate(steps):
        model(x, lengths if packed else None, part, layer).mean().backward()
        found |= {f"{i} {name}": p.grad.clone() for name, p in named if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    return found | {name: p.detach().clone() for name, p in named}


def ddp_gradients(options: dict[str, Any], steps: Steps, packed: bool, rank: int) -> dict[str, Tensor]:
    model = Model()
    model.direct.requires_grad_(any(layer == "direct" for _, layer in steps))
    return gradients(DistributedDataParallel(model, **options), rank, steps, packed)


def fsdp_losses(groups: bool, packed: bool, rank: int) -> Tensor:
    """The mean losses of four steps and one more in inference."""
    model = Model()
    if groups:  # each layer gathers its weights by itself
        for layer in (model.lstm, model.gru, model.direct):
            fully_shard(layer)
    fully_shard(model)
    weight = model.lstm.weight_ih_l0.to_local()
    assert weight.shape == (10, 4) and isinstance(model.lstm, fusedrnn.LSTM)
    found = losses(model, rank, packed)
    assert not torch.equal(weight, Model().lstm.weight_ih_l0[10 * rank : 10 * rank + 10])
    dist.all_reduce(found)
    return found / RANKS


def losses(model: Model, rank: int | None, packed: bool) -> Tensor:
    torch.manual_seed(2)
    x, lengths = torch.randn(6, 4, 4, dtype=torch.float64), torch.tensor(LENGTHS)
    if rank is not None:
        x, lengths = x[:, rank::RANKS], lengths[rank::RANKS]
    optimizer, found = torch.optim.Adam(model.parameters(), lr=0.1), []
    for i in range(5):
        with torch.set_grad_enabled(i < 4):
            loss = model(x, lengths if packed else None, "y", "gru").mean()
        found.append(loss.detach().clone())
        if i < 4:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return torch.stack(found)


EVERYTHING = (("y", "gru"), ("y", "gru"), ("y", "gru"))
PARTS = tuple((part, "gru") for part in ("y", "last", "h_n", "c_n"))
UNUSED = (("y", "gru"), ("y", "direct"), ("last", "gru"))


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(
    "options, steps",
    [
        ({}, EVERYTHING),
        ({}, PARTS),  # each result alone reaches every parameter of its layer
        ({"static_graph": True}, EVERYTHING),
        ({"gradient_as_bucket_view": True, "bucket_cap_mb": 0.001}, EVERYTHING),
        ({"find_unused_parameters": True}, UNUSED),
    ],
    ids=["plain", "parts", "static_graph", "bucket_view", "unused"],
)
def test_ddp(both: Both, options: dict[str, Any], steps: Steps, packed: bool) -> None:
    found = both(ddp_gradients, options, steps, packed)
    model = Model()
    model.direct.requires_grad_(any(layer == "direct" for _, layer in steps))
    expected = gradients(model, None, steps, packed)
    for each in found:
        assert_all_close({name: each[name] for name in expected}, expected)
        unused = set(each) - set(expected)
        assert all(each[name].count_nonzero() == 0 for name in unused)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize("groups", [False, True], ids=["one group", "a group each"])
def test_fully_sharded(both: Both, groups: bool, packed: bool) -> None:
    expected = losses(Model(), None, packed)
    assert expected[4] < expected[0] / 2
    for found in both(fsdp_losses, groups, packed):
        assert_close("losses", found, expected)


def mixed_losses(rank: int) -> tuple[Tensor, torch.dtype]:
    """As :func:`fsdp_losses`, and the type that the LSTM computed in."""
    model = fully_shard(Model().float(), mp_policy=MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32))
    types = []
    model.lstm.register_forward_hook(lambda module, args, outputs: types.append(outputs[0].dtype))
    found = losses(model, rank, packed=False).float()
    dist.all_reduce(found)
    return found / RANKS, types[0]


def test_sharded_with_mixed_precision(both: Both) -> None:
    expected = losses(Model(), None, packed=False).float()
    for found, dtype in both(mixed_losses):
        assert dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)


class Loop(nn.Module):
    """A cell in a loop of Python, after a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner, self.cell = nn.Linear(4, 4, dtype=torch.float64), fusedrnn.GRUCell(4, 6, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.size(1), 6, dtype=x.dtype)
        for x_t in self.inner(x):
            h = self.cell(x_t, h)
        return h.square().sum(1)


def loop_gradients(sharded: bool, rank: int | None) -> list[Tensor]:
    """Of three steps; each loss is still there in the next one."""
    model = Loop()
    if sharded:
        fully_shard(model.cell)
        fully_shard(model)
    elif rank is not None:
        model = DistributedDataParallel(model)
    torch.manual_seed(2)
    x, found = torch.randn(5, 4, 4, dtype=torch.float64), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        loss = model(x if rank is None else x[:, rank::RANKS]).mean()
        loss.backward()
        found += [(p.grad.full_tensor() if sharded else p.grad).clone() for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fully sharded"])
def test_a_cell_in_a_loop(both: Both, sharded: bool) -> None:
    expected = loop_gradients(False, None)
    for found in both(loop_gradients, sharded):
        assert len(found) == len(expected) == 18
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
