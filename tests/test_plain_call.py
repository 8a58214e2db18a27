"""A plain batch leaves out the checks that odd input needs (``fusedrnn.inference.plain_call``): the same results and
gradients as with them, and the checks, with their errors, for everything that is not plain.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fusedrnn
from fusedrnn import modules, single_step

SEQUENCE = {
    "RNN": fusedrnn.RNN,
    "RNN relu": lambda *a, **k: fusedrnn.RNN(*a, nonlinearity="relu", **k),
    "LSTM": fusedrnn.LSTM,
    "LSTM projected": lambda *a, **k: fusedrnn.LSTM(*a, proj_size=3, **k),
    "GRU": fusedrnn.GRU,
    "GRU before": lambda *a, **k: fusedrnn.GRU(*a, reset_after=False, **k),
    "ResidualRNN": fusedrnn.ResidualRNN,
}
CELLS = {
    "RNNCell": fusedrnn.RNNCell,
    "LSTMCell": fusedrnn.LSTMCell,
    "GRUCell": fusedrnn.GRUCell,
    "GRUCell before": lambda *a, **k: fusedrnn.GRUCell(*a, reset_after=False, **k),
}


def flat(result) -> list[Tensor]:
    """All tensors of a module's result."""
    return [result] if isinstance(result, Tensor) else [tensor for part in result for tensor in flat(part)]


def states(name: str, *shape: int, hidden: int = 5, out: int | None = None):
    """An initial state as the module wants it."""
    h = torch.randn(*shape, out or hidden)
    return (h, torch.randn(*shape, hidden)) if name.startswith("LSTM") else h


@pytest.fixture
def taken(monkeypatch):
    """How often the short path was taken to its end."""
    count = {"times": 0}

    def counted(*args):
        found = plain(*args)
        count["times"] += found is not None
        return found

    plain = modules.plain_call
    for own in (modules, single_step):
        monkeypatch.setattr(own, "plain_call", counted)
    return count


@pytest.fixture
def by_the_long_path(monkeypatch):
    """A function that calls another with the short path closed."""

    def call(function, *args):
        with monkeypatch.context() as patch:
            for own in (modules, single_step):
                patch.setattr(own, "plain_call", lambda *_: None)
            return function(*args)

    return call


def gradients(module: nn.Module, x: Tensor, hx) -> dict[str, Tensor]:
    """Of a sum over all results, with respect to the input, the states and the parameters."""
    leaves = [tensor.detach().requires_grad_() for tensor in (x, *(() if hx is None else flat((hx,))))]
    states = None if hx is None else leaves[1] if isinstance(hx, Tensor) else tuple(leaves[1:])
    results = flat(module(leaves[0], states))
    total = sum((result * torch.linspace(-1, 2, result.numel()).view(result.shape)).sum() for result in results)
    names = [f"leaf {i}" for i in range(len(leaves))] + [name for name, _ in module.named_parameters()]
    return dict(zip(names, torch.autograd.grad(total, [*leaves, *module.parameters()]), strict=True))


@pytest.fixture
def assert_both_paths_agree(taken, by_the_long_path):
    """A function that compares results and gradients of both paths, bit for bit but where it says why not, and sees
    that each was taken.
    """

    def compare(module: nn.Module, x: Tensor, hx) -> None:
        expected, derived = by_the_long_path(module, x, hx), by_the_long_path(gradients, module, x, hx)
        assert taken["times"] == 0
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                found = module(x, hx)
            for a, b in zip(flat(found), flat(expected), strict=True):
                assert torch.equal(a, b) and a.shape == b.shape and not a.requires_grad
        for (name, a), b in zip(gradients(module, x, hx).items(), derived.values(), strict=True):
            if isinstance(module, nn.RNNCellBase) and name.startswith(("weight", "bias")):
                torch.testing.assert_close(a, b)  # another order of sums (csrc/training.h)
            else:
                assert torch.equal(a, b), name
        assert taken["times"] == 3

    return compare


@pytest.mark.parametrize("T, B", [(1, 1), (2, 3), (7, 9)])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize("name", SEQUENCE)
def test_sequences(name: str, options: dict, given: bool, T: int, B: int, assert_both_paths_agree) -> None:
    torch.manual_seed(0)
    module = SEQUENCE[name](4, 5, **options)
    x = torch.randn(B, T, 4) if module.batch_first else torch.randn(T, B, 4)
    hx = states(name, 1 + module.bidirectional, B, out=module.proj_size) if given else None
    assert_both_paths_agree(module, x, hx)


@pytest.mark.parametrize("B", [0, 1, 3, 20])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", CELLS)
def test_cells(name: str, bias: bool, given: bool, B: int, assert_both_paths_agree) -> None:
    torch.manual_seed(0)
    module, x = CELLS[name](4, 5, bias=bias), torch.randn(B, 4)
    hx = states(name, B) if given else None
    assert_both_paths_agree(module, x, hx)


def test_the_weights_are_those_of_the_moment() -> None:
    """Updates in place, also of .data, a new Parameter, load_state_dict and another dtype: the next call sees them."""
    x, module = torch.randn(1, 1, 4), fusedrnn.GRU(4, 5)
    twin = nn.GRU(4, 5)

    def same() -> bool:
        twin.to(module.weight_hh_l0.dtype).load_state_dict(module.state_dict())
        with torch.no_grad():
            return torch.allclose(module(x)[0], twin(x)[0], atol=1e-6)

    assert same()
    with torch.no_grad():
        module.weight_hh_l0.mul_(3)
    assert same()
    module.weight_ih_l0.data.add_(1)
    assert same()
    module.weight_ih_l0 = nn.Parameter(torch.randn(15, 4))
    assert same()
    module.load_state_dict(fusedrnn.GRU(4, 5).state_dict())
    assert same()
    x, module = x.double(), module.double()
    assert same()


def test_what_is_not_plain_takes_the_long_path(taken) -> None:
    module, cell = fusedrnn.LSTM(4, 5), fusedrnn.LSTMCell(4, 5)
    h, x = torch.zeros(1, 2, 5), torch.randn(3, 2, 4)
    deep, dropping = fusedrnn.LSTM(4, 5, num_layers=2), fusedrnn.LSTM(4, 5, num_layers=2, dropout=0.5)
    weighted = torch.nn.utils.parametrizations.weight_norm(fusedrnn.LSTM(4, 5), "weight_hh_l0")
    with torch.no_grad():
        module(x[:, 0])  # unbatched
        module(nn.utils.rnn.pack_sequence([x[:, 0], x[:2, 1]]))
        module(x, [h, h])
        cell(x[0, 0])
        parametrized = weighted(x)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert module(x)[0].dtype == cell(x[0])[0].dtype == torch.bfloat16
    deep(x)  # stacked, with gradients
    with torch.no_grad():
        dropping(x)
    assert taken["times"] == 0
    torch.nn.utils.parametrize.remove_parametrizations(weighted, "weight_hh_l0")
    assert torch.allclose(weighted(x)[0], parametrized)


@pytest.mark.parametrize("hx, x", [
    (None, (3, 2, 6)),
    (None, (2, 3, 4, 1)),
    (None, (0, 2, 4)),
    ((1, 3, 5), (3, 2, 4)),
    ((2, 2, 5), (3, 2, 4)),
    ((1, 2, 4), (3, 2, 4)),
    ((2, 5), (3, 2, 4)),
])  # fmt: skip
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM"])
def test_errors_are_torchs(name: str, hx: tuple[int, ...] | None, x: tuple[int, ...]) -> None:
    ours, theirs = getattr(fusedrnn, name)(4, 5), getattr(nn, name)(4, 5)
    h = None if hx is None else torch.zeros(hx)
    h = (h, h) if h is not None and name == "LSTM" else h
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            with pytest.raises((RuntimeError, ValueError)) as expected:
                theirs(torch.zeros(x), h)
            with pytest.raises(expected.type) as found:
                ours(torch.zeros(x), h)
            assert str(found.value) == str(expected.value)
            with pytest.raises(ValueError, match="dtype"):
                ours(torch.zeros(3, 2, 4, dtype=torch.float64))
