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
NAMES = ("MGU", "PeepholeLSTM", "IndRNN", "LayerNormLSTM", "LayerNormGRU", "SLSTM")
MAKERS = {name: getattr(fusedrnn, name) for name in NAMES}
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


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_independent_units_say_their_nonlinearity(nonlinearity: str) -> None:
    layer = fusedrnn.IndRNN(I, H, 2, nonlinearity)
    cell = fusedrnn.IndRNNCell(I, H, nonlinearity=nonlinearity)
    shown = ", nonlinearity=tanh" if nonlinearity == "tanh" else ""
    assert repr(layer) == f"IndRNN({I}, {H}, num_layers=2{shown})"
    assert repr(cell) == f"IndRNNCell({I}, {H}{shown})"
    for module in (layer, cell):
        for other in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert other.nonlinearity == nonlinearity
        with pytest.raises(AttributeError):
            module.nonlinearity = "tanh"


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


def test_layer_normalisation_of_one_unit() -> None:
    """By hand: W_ih x = (1, 2, 3, 4) has mean 5/2 and variance 5/4, that of h and c are 0, whose norm is 0."""
    module = fusedrnn.LayerNormLSTM(1, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        module.weight_ih_l0.copy_(torch.tensor([[1.0], [2], [3], [4]]))
        module.weight_unit_l0.copy_(torch.tensor([1.0] * 4 + [9] * 4 + [7, 0.5]))
    y, (h, c) = module(torch.ones(1, 1, 1, dtype=torch.float64))
    i, f, g, o = (torch.tensor(k, dtype=torch.float64) / (1.25 + 1e-5) ** 0.5 for k in (-1.5, -0.5, 0.5, 1.5))
    torch.testing.assert_close(c.squeeze(), i.sigmoid() * g.tanh(), rtol=0, atol=1e-15)
    torch.testing.assert_close(y.squeeze(), o.sigmoid() * torch.tensor(0.5).double().tanh(), rtol=0, atol=1e-15)
    assert torch.equal(y[-1], h[-1])


@pytest.mark.parametrize("name", ["LayerNormLSTM", "LayerNormGRU"])
def test_layer_normalisation_does_not_see_the_size_of_weights(name: str) -> None:
    """But for epsilon. The gradient of a matrix is then at right angles to it."""
    module, given = MAKERS[name](I, 64, num_layers=2, dtype=torch.float64), 100 * x()
    with torch.no_grad():
        for k in range(2):
            getattr(module, f"weight_hh_l{k}").mul_(1e3)
            getattr(module, f"weight_ih_l{k}").mul_(1e3)
    larger = copy.deepcopy(module)
    with torch.no_grad():
        for k in range(2):
            getattr(larger, f"weight_hh_l{k}").mul_(2)
            getattr(larger, f"weight_ih_l{k}").mul_(3)
    y, _ = module(given)
    torch.testing.assert_close(larger(given)[0], y, rtol=0, atol=1e-7)
    for weight in (module.weight_hh_l0, module.weight_ih_l1):
        (dw,) = torch.autograd.grad(y.square().sum(), weight, retain_graph=True)
        assert (dw * weight).sum().abs() < 1e-6 * dw.norm() * weight.norm()


@pytest.mark.parametrize(("name", "parameters"), [("LayerNormLSTM", 10), ("LayerNormGRU", 6)])
def test_gains_begin_as_ones(name: str, parameters: int) -> None:
    for module in (MAKERS[name](I, H, num_layers=2), getattr(fusedrnn, name + "Cell")(I, H)):
        for parameter in (p for n, p in module.named_parameters() if n.startswith("weight_unit")):
            assert parameter.shape == (parameters * H,)
            assert (parameter[: 6 * H] == 1).all() and (parameter[9 * H :] == 0).all()
        bias = getattr(module, "bias_ih", None) if hasattr(module, "bias_ih") else module.bias_ih_l0
        assert 0 < bias.abs().max() <= H**-0.5


@pytest.mark.parametrize("name", NAMES)
def test_single_steps_are_steps_of_the_layer(name: str) -> None:
    layer, cell = MAKERS[name](I, H, dtype=torch.float64), getattr(fusedrnn, name + "Cell")(I, H, dtype=torch.float64)
    cell.load_state_dict({key.removesuffix("_l0"): value for key, value in layer.state_dict().items()})
    given, hx = x().requires_grad_(), None
    outputs = []
    for x_t in given:
        hx = cell(x_t, hx)
        outputs.append(hx[0] if isinstance(hx, tuple) else hx)
    found, expected = torch.stack(outputs), layer(given)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    ours = torch.autograd.grad(found.square().sum(), [given, *cell.parameters()])
    theirs = torch.autograd.grad(expected.square().sum(), [given, *layer.parameters()])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert repr(cell) == f"{name}Cell({I}, {H})"
    assert torch.equal(cell(given[0, 0])[0] if isinstance(hx, tuple) else cell(given[0, 0]), found[0, 0])


def test_products_of_a_layer_with_norms_have_no_small_weights() -> None:
    with pytest.raises(RuntimeError, match="cell layer_norm_gru has no kernels for matrices in int8 or bfloat16"):
        weights = [w.bfloat16() if w.dim() == 2 else w for w in fusedrnn.LayerNormGRU(I, H)._flat_weights]
        functional.recurrent("layer_norm_gru", torch.zeros(T, B, I), None, weights, scales=[])


def gates(module: fusedrnn.SLSTM, given: Tensor) -> list[Tensor]:
    """The arguments of i, f, z, o where no weight reads h."""
    return (given @ module.weight_ih_l0.T + module.bias_ih_l0 + module.bias_hh_l0).chunk(4, dim=-1)


def test_slstm_is_a_weighted_mean_of_what_it_stored() -> None:
    """Without W_hh: h_t = o_t sum_s w_s z_s / sum_s w_s, log w_s = a_i[s] + the log sigmoid(a_f) from s + 1 on."""
    module, given = fusedrnn.SLSTM(I, H).double(), 3 * x()
    with torch.no_grad():
        module.weight_hh_l0.zero_()
    i, f, z, o = gates(module, given)
    y, (h, c, n, m) = module(given)
    for t in range(T):
        log_w = torch.stack([i[s] + nn.functional.logsigmoid(f[s + 1 : t + 1]).sum(0) for s in range(t + 1)])
        expected = o[t].sigmoid() * (log_w.softmax(0) * z[: t + 1].tanh()).sum(0)
        torch.testing.assert_close(y[t], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close((n.log() + m)[0], log_w.logsumexp(0), rtol=0, atol=1e-11)
    torch.testing.assert_close(h[0], y[-1], rtol=0, atol=0)


def test_slstm_does_not_depend_on_its_scale() -> None:
    module, given, s = fusedrnn.SLSTM(I, H).double(), x(), torch.randn(1, B, H, dtype=torch.float64)
    h, c, n, m = (torch.randn(1, B, H, dtype=torch.float64) for _ in range(4))
    n = n.abs() + 0.5
    states = [t.requires_grad_() for t in (h, c, n, m)]
    y, _ = module(given, tuple(states))
    other, _ = module(given, (h, c * s.exp(), n * s.exp(), m - s))
    torch.testing.assert_close(y, other, rtol=0, atol=1e-12)
    _, dc, dn, dm = torch.autograd.grad(y.pow(2).sum(), states)
    torch.testing.assert_close(dm, dc * c + dn * n, rtol=0, atol=1e-12)
    assert dm.abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_slstm_with_gates_of_a_thousand(dtype: torch.dtype) -> None:
    """Nothing overflows, forward or backward, and h is what the largest weights say."""
    module = fusedrnn.SLSTM(4, 1, dtype=dtype)
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
        module.weight_ih_l0.copy_(torch.eye(4))
    for i, f in ((1000, 1000), (1000, -1000), (-1000, 1000), (-1000, -1000)):
        given = torch.tensor([[[i, f, 1.0, 2.0]], [[0.0, f, -1.0, 2.0]], [[i, f, 0.5, 2.0]]], dtype=dtype)
        given.requires_grad_()
        y, states = module(given)
        o = torch.tensor(2.0).sigmoid()
        stored = {  # z of the steps that count, each as much as the others
            (1000, 1000): ([1.0], [1.0], [1.0, 0.5]),
            (1000, -1000): ([1.0], [1.0, -1.0], [0.5]),
            (-1000, 1000): ([1.0], [-1.0], [-1.0]),
            (-1000, -1000): ([1.0], [-1.0], [-1.0, 0.5]),
        }[i, f]
        expected = torch.stack([o * torch.tensor(z).tanh().mean() for z in stored])
        torch.testing.assert_close(y.flatten().float(), expected, rtol=0, atol=1e-2 if dtype.itemsize == 2 else 1e-6)
        (dx,) = torch.autograd.grad(y.sum() + sum(s.sum() for s in states), given)
        assert dx.isfinite().all() and all(s.isfinite().all() for s in states)


def test_heads_are_a_block_diagonal_matrix() -> None:
    heads, whole, given = fusedrnn.SLSTM(I, 6, num_heads=3, **OPTIONS), fusedrnn.SLSTM(I, 6, **OPTIONS), x()
    assert heads.weight_hh_l1_reverse.shape == (3, 8, 2) and "num_heads=3" in repr(heads)
    with torch.no_grad():
        for name, p in heads.named_parameters():
            target = getattr(whole, name)
            if not name.startswith("weight_hh"):
                target.copy_(p)
                continue
            target.zero_()
            for k, gate, unit, other in torch.cartesian_prod(*map(torch.arange, (3, 4, 2, 2))).tolist():
                target[gate * 6 + k * 2 + unit, k * 2 + other] = p[k, gate * 2 + unit, other]
    found = dict(zip(["y", *dict(heads.named_parameters())], gradients(heads, given), strict=True))
    for name, expected in zip(["y", *dict(whole.named_parameters())], gradients(whole, given), strict=True):
        if name.startswith("weight_hh"):
            blocks = expected.view(4, 3, 2, 3, 2)
            expected = torch.stack([blocks[:, k, :, k].reshape(8, 2) for k in range(3)])
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-12)
    cell = fusedrnn.SLSTMCell(I, 6, num_heads=3, dtype=torch.float64)
    one = fusedrnn.SLSTM(I, 6, num_heads=3, dtype=torch.float64)
    one.load_state_dict({f"{name}_l0": p for name, p in cell.state_dict().items()})
    states = None
    for given_t, y_t in zip(given, one(given)[0], strict=True):
        states = cell(given_t, states)
        torch.testing.assert_close(states[0], y_t, rtol=0, atol=1e-12)
    assert torch.equal(one.step(given[0])[0], one(given[:1])[0][0])


def test_what_slstm_refuses() -> None:
    with pytest.raises(ValueError, match="num_heads must divide hidden_size, got 2 and 5"):
        fusedrnn.SLSTM(I, H, num_heads=2)
    with pytest.raises(TypeError, match="num_heads must be an int"):
        fusedrnn.SLSTMCell(I, H, num_heads=1.0)
    for zoneout in (0.1, (0.1, 0.1)):
        with pytest.raises(ValueError, match=r"zoneout must be \(p, 0.0\) for a cell of 4 states"):
            fusedrnn.SLSTM(I, H, zoneout=zoneout)
        later = fusedrnn.SLSTM(I, H)
        later.fused_options = fusedrnn.FusedOptions(zoneout=zoneout)
        with pytest.raises(ValueError, match=r"zoneout must be \(p, 0.0\) for a cell of 4 states"):
            later(torch.randn(T, B, I))
    module = fusedrnn.SLSTM(I, 6, num_heads=2)
    with pytest.raises(RuntimeError, match="slstm expects 4 hidden states"):
        module(torch.randn(T, B, I), (torch.zeros(1, B, 6),) * 2)
    module.weight_hh_l0 = nn.Parameter(torch.zeros(24, 6))
    with pytest.raises(RuntimeError, match=r"weight_hh_l0 must have shape \[2, 12, 3\], got \[24, 6\]"):
        module(torch.randn(T, B, I))
