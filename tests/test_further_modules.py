"""Layers of cells that torch.nn does not have: what equals torch.nn's in a special case, and parameters of units.

What they compute and its gradients: every test that runs over the registry.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import fusedrnn
from fusedrnn import functional

T, B, I, H = 4, 3, 2, 5
OPTIONS = {"num_layers": 2, "bidirectional": True, "dtype": torch.float64}
MAKERS = {"MGU": fusedrnn.MGU, "PeepholeLSTM": fusedrnn.PeepholeLSTM, "IndRNN": fusedrnn.IndRNN}
ENDS = ("_l0", "_l0_reverse", "_l1", "_l1_reverse")


def x() -> Tensor:
    return torch.randn(T, B, I, dtype=torch.float64)


def gradients(module: nn.Module, given: Tensor) -> list[Tensor]:
    y, _ = module(given)
    return [y, *torch.autograd.grad(y.pow(2).sum(), list(module.parameters()))]


def test_without_peepholes_it_is_the_lstm() -> None:
    ours, theirs, given = fusedrnn.PeepholeLSTM(I, H, **OPTIONS), nn.LSTM(I, H, **OPTIONS), x()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            getattr(ours, name).copy_(p)
        for end in ENDS:
            getattr(ours, "weight_unit" + end).zero_()
    found = dict(zip(["y", *dict(ours.named_parameters())], gradients(ours, given), strict=True))
    for name, expected in zip(["y", *dict(theirs.named_parameters())], gradients(theirs, given), strict=True):
        torch.testing.assert_close(found.pop(name), expected, rtol=0, atol=1e-11)
    assert list(found) == ["weight_unit" + end for end in ENDS] and all(dp.all() for dp in found.values())


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_independent_units_are_an_rnn_with_a_diagonal_matrix(nonlinearity: str) -> None:
    ours = fusedrnn.IndRNN(I, H, nonlinearity=nonlinearity, **OPTIONS)
    theirs, given = nn.RNN(I, H, nonlinearity=nonlinearity, **OPTIONS), x()
    with torch.no_grad():
        for name, p in ours.named_parameters():
            getattr(theirs, name).copy_(p.diag() if name.startswith("weight_hh") else p)
    names = ["y", *dict(ours.named_parameters())]
    for name, found, expected in zip(names, gradients(ours, given), gradients(theirs, given), strict=True):
        expected = expected.diag() if name.startswith("weight_hh") else expected
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_parameters_have_the_order_of_the_weights() -> None:
    module = fusedrnn.PeepholeLSTM(I, H, num_layers=2, bidirectional=True)
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_unit")
    assert [name for name, _ in module.named_parameters()] == [kind + end for end in ENDS for kind in kinds]
    assert list(map(id, module.parameters())) == list(map(id, module._flat_weights))
    assert [list(names) for names in module._all_weights] == [[kind + end for kind in kinds] for end in ENDS]
    assert module.weight_unit_l1_reverse.shape == (3 * H,)
    assert module.weight_unit_l0.abs().max() <= H**-0.5 and module.weight_unit_l0.std() > 0
    assert list(fusedrnn.PeepholeLSTM(I, H, bias=False).state_dict()) == [f"{k}_l0" for k in (*kinds[:2], kinds[4])]


def test_factors_of_independent_units_begin_within_0_and_1() -> None:
    module = fusedrnn.IndRNN(I, 500, num_layers=2)
    for u in (module.weight_hh_l0, module.weight_hh_l1):
        assert u.shape == (500,) and 0 <= u.min() < 0.1 and 0.9 < u.max() <= 1
    assert module.weight_ih_l0.abs().max() <= 500**-0.5
    with pytest.raises(ValueError, match="Unknown nonlinearity 'sine'. Select from 'tanh' or 'relu'."):
        fusedrnn.IndRNN(I, H, nonlinearity="sine")


@pytest.mark.parametrize("name", MAKERS)
def test_copies_and_saved_states_compute_the_same(name: str) -> None:
    module, given = MAKERS[name](I, H, **OPTIONS), x()
    loaded = MAKERS[name](I, H, **OPTIONS)
    loaded.load_state_dict(module.state_dict())
    expected = gradients(module, given)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert all(torch.equal(a, b) for a, b in zip(gradients(other, given), expected, strict=True))
        assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in module.parameters()}
        assert repr(other) == repr(module)
    assert module.float()(given.float())[0].dtype == torch.float32


class Doubled(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return 2 * value


@pytest.mark.parametrize(("name", "weight"), [("PeepholeLSTM", "weight_unit_l1"), ("IndRNN", "weight_hh_l0_reverse")])
def test_parameters_of_units_may_be_computed(name: str, weight: str) -> None:
    module, given = MAKERS[name](I, H, **OPTIONS), x()
    plain = copy.deepcopy(module)
    with torch.no_grad():
        getattr(plain, weight).mul_(2)
    parametrize.register_parametrization(module, weight, Doubled())
    y, _ = module(given)
    assert torch.equal(y, plain(given)[0])
    original = module.parametrizations[weight].original
    torch.testing.assert_close(
        torch.autograd.grad(y.sum(), original)[0],
        2 * torch.autograd.grad(plain(given)[0].sum(), getattr(plain, weight))[0],
    )
    with torch.inference_mode():
        assert torch.equal(module(given)[0], plain(given)[0])


def test_weights_that_are_not_those_of_the_cell_are_named() -> None:
    weights = [w.float() for w in fusedrnn.PeepholeLSTM(I, H)._flat_weights]
    given = torch.zeros(T, B, I)
    with pytest.raises(ValueError, match=r"weights must hold w_ih, w_hh\[, b_ih, b_hh\], w_unit for each of 1 layer"):
        functional.recurrent("peephole_lstm", given, None, weights[:-1])
    with pytest.raises(RuntimeError, match=r"w_unit must have shape \[15\], got \[10\]"):
        functional.recurrent("peephole_lstm", given, None, [*weights[:-1], weights[-1][:10]])
    with pytest.raises(RuntimeError, match="w_hh must have 1 dimension, got 2"):
        functional.recurrent("indrnn_tanh", given, None, [torch.zeros(H, I), torch.zeros(H, H)])
