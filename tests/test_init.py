"""Initialisers: the right rows of the right parameters, the gates they promise, and errors that change nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from loops import TWINS, beside, several
from tolerances import assert_close
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import weight_norm

import fusedrnn
from fusedrnn import init
from fusedrnn.cells import CELLS

H = 10
MAKERS: dict[str, tuple[str, Callable[..., nn.Module]]] = {}  # name -> cell of the registry, maker
for _cell, _twin in TWINS.items():
    for _kind in ("layer", "cell", "torch_layer", "torch_cell"):
        _maker = getattr(_twin, _kind)
        if _maker is not None:
            MAKERS[f"{_cell}-{_kind}"] = (_cell, _maker)
            if "layer" in _kind:
                MAKERS[f"{_cell}-{_kind}-stacked"] = (_cell, partial(_maker, num_layers=3, bidirectional=True))
            if "layer" in _kind and CELLS[_cell].projectable:
                MAKERS[f"{_cell}-{_kind}-projected"] = (_cell, partial(_maker, num_layers=2, proj_size=4))
#: The gate, and whether its bias keeps the state (1) or lets it go (-1).
KEEPS = {
    name: (info.keeps, 1) if info.keeps else (info.takes, -1)
    for name, info in CELLS.items()
    if info.keeps or info.takes
}
GATED = [name for name, (cell, _) in MAKERS.items() if cell in KEEPS]
INITIALISERS = {
    "orthogonal_": init.orthogonal_,
    "forget_bias_": init.forget_bias_,
    "chrono_": partial(init.chrono_, T_max=50),
}


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def named(values: dict[str, Tensor], kind: str) -> list[Tensor]:
    found = [values[name] for name in values if name.startswith(kind)]
    assert found
    return found


def gate_rows(cell: str, gate: str) -> slice:
    index = CELLS[cell].gates.index(gate)
    return slice(index * H, (index + 1) * H)


def bias_of(cell: str, module: nn.Module, gate: str) -> list[Tensor]:
    values, rows = snapshot(module), gate_rows(cell, gate)
    pairs = zip(named(values, "bias_ih"), named(values, "bias_hh"), strict=True)
    return [ih[rows] + hh[rows] for ih, hh in pairs]


def kept_gate(cell: str, module: nn.Module) -> Tensor:
    """The gate that keeps the state, (L*D, H) or (1, H): d state_1 / d state_0 where no weight acts, by the kernels."""
    single = isinstance(module, nn.RNNCellBase)
    rows = 1 if single else module.num_layers * (1 + module.bidirectional)
    shape = (rows, H) if single else (rows, 1, H)
    options = {"dtype": torch.float64}
    state = torch.randn(shape, **options).requires_grad_()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("weight"):
                parameter.zero_()
    hx = state
    if several(cell):
        hx = (torch.zeros(*shape[:-1], getattr(module, "proj_size", 0) or H, **options), state)
        hx += (torch.ones_like(state), torch.zeros_like(state))[: beside(cell) - 1]  # of the sLSTM: n and m
    last = module(torch.zeros(*shape[:-1], 6, **options)[:1], hx)
    last = last if single else last[1]
    last = last if not several(cell) else last[1] * last[3].exp() if beside(cell) > 1 else last[1]
    return torch.autograd.grad(last.sum(), state)[0].reshape(rows, H)


@pytest.mark.parametrize("gain", [1.0, 0.7])
@pytest.mark.parametrize("name", [name for name, (cell, _) in MAKERS.items() if CELLS[cell].product])
def test_every_block_is_orthogonal_and_nothing_else_changes(name: str, gain: float) -> None:
    cell, maker = MAKERS[name]
    module = maker(6, H, dtype=torch.float64)
    before = snapshot(module)
    assert init.orthogonal_(module, gain) is module
    after = snapshot(module)
    for weight in named(after, "weight_hh"):
        blocks = [weight[gate_rows(cell, gate)] for gate in CELLS[cell].gates]
        for block in blocks:
            assert_close("W^T W", block.T @ block, gain**2 * torch.eye(weight.shape[1], dtype=torch.float64))
        assert all(not torch.allclose(block, other) for block in blocks for other in blocks if block is not other)
    assert {key for key in before if not torch.equal(before[key], after[key])} == {
        key for key in before if key.startswith("weight_hh")
    }


@pytest.mark.parametrize("maker", [fusedrnn.SLSTM, fusedrnn.SLSTMCell])
def test_every_block_of_a_head_is_orthogonal(maker: type[nn.Module]) -> None:
    module = init.orthogonal_(maker(3, 12, num_heads=3, dtype=torch.float64), 2.0)
    weight = dict(module.named_parameters())["weight_hh" if maker is fusedrnn.SLSTMCell else "weight_hh_l0"]
    blocks = weight.detach().view(3 * 4, 4, 4)  # of heads, then of gates
    assert_close("W^T W", blocks.mT @ blocks, (4 * torch.eye(4, dtype=torch.float64)).expand(12, 4, 4))


def test_an_orthogonal_rnn_neither_shrinks_nor_stretches_a_gradient() -> None:
    """At h = 0 the slope of tanh is 1, and the Jacobian over 50 steps is W^50: (R14)."""
    module = init.orthogonal_(fusedrnn.RNN(1, H, bias=False, dtype=torch.float64))
    x = torch.zeros(50, 1, 1, dtype=torch.float64)
    h0 = torch.zeros(1, 1, H, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda h: module(x, h)[1], h0).reshape(H, H)
    assert_close("singular values", torch.linalg.svdvals(jacobian), torch.ones(H, dtype=torch.float64))


def test_the_blocks_are_those_of_torch() -> None:
    module = fusedrnn.GRU(6, H)
    torch.manual_seed(3)
    init.orthogonal_(module, 1.5)
    torch.manual_seed(3)
    assert torch.equal(module.weight_hh_l0, torch.cat([nn.init.orthogonal_(torch.empty(H, H), 1.5) for _ in range(3)]))


def test_the_gates_that_keep_and_take() -> None:
    """As the papers have them: what ``kept_gate`` does not see of a gate that takes."""
    expected = {"lstm": ("f", "i"), "gru": ("z", None), "gru_reset_before": ("z", None), "mgu": (None, "f")}
    expected |= dict.fromkeys(("peephole_lstm", "layer_norm_lstm", "slstm"), ("f", "i"))
    expected["layer_norm_gru"] = ("z", None)
    for cell in ("rnn_tanh", "rnn_relu", "residual_rnn", "indrnn_tanh", "indrnn_relu", *expected):
        assert (CELLS[cell].keeps, CELLS[cell].takes) == expected.get(cell, (None, None))


@pytest.mark.parametrize("value", [1.0, -2])
@pytest.mark.parametrize("name", GATED)
def test_the_forget_bias_is_the_sum_and_the_gate_its_sigmoid(name: str, value: float) -> None:
    cell, maker = MAKERS[name]
    module = maker(6, H, dtype=torch.float64)
    expected, (gate, sign) = snapshot(module), KEEPS[cell]
    for ih, hh in zip(named(expected, "bias_ih"), named(expected, "bias_hh"), strict=True):
        ih[gate_rows(cell, gate)] = sign * value
        hh[gate_rows(cell, gate)] = 0
    assert init.forget_bias_(module, value) is module
    assert same(snapshot(module), expected)
    gate = kept_gate(cell, module)
    assert_close("gate", gate, torch.full_like(gate, 1 / (1 + math.exp(-value))))


@pytest.mark.parametrize("name", GATED)
def test_chrono_draws_time_scales_within_its_bounds(name: str) -> None:
    cell, maker = MAKERS[name]
    module = maker(6, H, dtype=torch.float64)
    expected, (keeps, sign) = snapshot(module), KEEPS[cell]
    assert init.chrono_(module, T_max=200, T_min=100) is module
    drawn = [sign * bias for bias in bias_of(cell, module, keeps)]
    for ih, hh, b in zip(named(expected, "bias_ih"), named(expected, "bias_hh"), drawn, strict=True):
        for gate, value in {CELLS[cell].keeps: b, CELLS[cell].takes: -b}.items():
            if gate is not None:
                ih[gate_rows(cell, gate)] = value
                hh[gate_rows(cell, gate)] = 0
    assert same(snapshot(module), expected)
    assert torch.stack(drawn).unique().numel() == H * len(drawn)  # a draw for each unit, layer and direction
    steps = 1 / (1 - kept_gate(cell, module))
    assert 100 - 1e-9 < steps.min() < steps.max() < 200 + 1e-9
    assert_close("time scale", steps, 1 + torch.stack(drawn).exp())


def test_chrono_is_uniform_in_the_time_scale_and_starts_at_two_steps() -> None:
    """1 + exp(b) of 20000 units: the extremes lie at the bounds, and no quantile is off by five standard errors."""
    N, T_max = 20000, 50
    module = init.chrono_(fusedrnn.LSTM(1, N, proj_size=1), T_max)
    steps = 1 + module.bias_ih_l0.detach()[N : 2 * N].double().exp()
    assert 2 - 1e-6 <= steps.min() < 2.1 and 49.9 < steps.max() <= T_max + 1e-4
    for q in (0.1, 0.25, 0.5, 0.75, 0.9):
        error = 5 * (T_max - 2) * math.sqrt(q * (1 - q) / N)
        assert abs(steps.quantile(q) - (2 + q * (T_max - 2))) < error


@pytest.mark.parametrize("initialiser", ["orthogonal_", "chrono_"])
def test_the_same_seed_or_generator_gives_the_same_module(initialiser: str) -> None:
    call = INITIALISERS[initialiser]
    module = fusedrnn.LSTM(6, H, num_layers=2)
    found = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        found.append(snapshot(call(module)))
    assert same(found[0], found[1]) and not same(found[0], found[2])
    state = torch.get_rng_state()
    assert same(snapshot(call(module, generator=torch.Generator().manual_seed(5))), found[0])
    assert torch.equal(torch.get_rng_state(), state)  # the global one was not asked


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_float32_rounded(dtype: torch.dtype) -> None:
    for call in INITIALISERS.values():
        wide = fusedrnn.LSTM(6, H, num_layers=2, bidirectional=True, proj_size=4)
        narrow = copy.deepcopy(wide).to(dtype)
        for module in (wide, narrow):
            torch.manual_seed(1)
            call(module)
        assert same(snapshot(narrow), snapshot(wide.to(dtype)))
    assert all(torch.equal(i, -f) for i, f in zip(bias_of("lstm", narrow, "i"), bias_of("lstm", narrow, "f")))


def test_on_the_meta_device_nothing_is_drawn() -> None:
    module = fusedrnn.LSTM(6, H, device="meta")
    state = torch.get_rng_state()
    for call in INITIALISERS.values():
        assert call(module) is module and all(parameter.is_meta for parameter in module.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="T_max"):
        init.chrono_(module, T_max=1)


@pytest.mark.parametrize("initialiser", INITIALISERS)
def test_parameters_stay_themselves_and_inference_sees_the_change(initialiser: str) -> None:
    module = fusedrnn.LSTM(6, H)
    parameters = list(module.parameters())
    x = torch.randn(20, 2, 6)
    with torch.no_grad():
        before = [module(x)[0] for _ in range(3)][-1]  # by now the packed weights are kept
        after = INITIALISERS[initialiser](module)(x)[0]
        expected = copy.deepcopy(module)(x)[0]
    assert torch.equal(after, expected) and not torch.equal(before, after)
    assert all(a is b and a.is_leaf and a.requires_grad for a, b in zip(parameters, module.parameters(), strict=True))


class Half(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value / 2


COMPUTED = {
    "parametrized": lambda module, name: parametrize.register_parametrization(module, name, Half()),
    "pruned": lambda module, name: prune.random_unstructured(module, name, amount=0.5),
    "weight_norm": weight_norm,
    "weight_norm of old": nn.utils.weight_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("how", COMPUTED)
@pytest.mark.parametrize("initialiser", INITIALISERS)
def test_a_computed_parameter_is_refused_before_any_is_written(initialiser: str, how: str) -> None:
    module = fusedrnn.LSTM(6, H, num_layers=2)
    name, other = ("weight_hh_l1", "bias_hh_l1")[:: 1 if initialiser == "orthogonal_" else -1]
    COMPUTED[how](module, other)  # none of its business
    INITIALISERS[initialiser](module)
    COMPUTED[how](module, name)
    before = snapshot(module)
    with pytest.raises(ValueError, match=f"^{name} must be a Parameter"):
        INITIALISERS[initialiser](module)
    assert same(snapshot(module), before)


def test_parameters_shared_by_layers_are_initialised_and_two_biases_in_one_are_refused() -> None:
    module = fusedrnn.LSTM(H, H, num_layers=2)
    module.weight_hh_l1, module.bias_ih_l1 = module.weight_hh_l0, module.bias_ih_l0
    for call in INITIALISERS.values():
        call(module)
    init.forget_bias_(module)
    assert all(torch.equal(f, torch.ones(H)) for f in bias_of("lstm", module, "f"))
    module.bias_hh_l1 = module.bias_ih_l1
    before = snapshot(module)
    for call in (init.forget_bias_, INITIALISERS["chrono_"]):
        with pytest.raises(ValueError, match="bias_ih and bias_hh must be two Parameters"):
            call(module)
    assert same(snapshot(module), before)


@pytest.mark.parametrize("initialiser", INITIALISERS)
def test_what_is_no_recurrent_module_is_refused(initialiser: str) -> None:
    for module in (nn.Linear(3, 3), nn.Sequential(nn.LSTM(3, 3)), nn.LSTM, None, torch.zeros(4, 4)):
        with pytest.raises(TypeError, match=f"module must be an RNN, LSTM, GRU .*, got {type(module).__name__}"):
            INITIALISERS[initialiser](module)


@pytest.mark.parametrize("initialiser", ["forget_bias_", "chrono_"])
def test_gates_and_biases_that_are_not_there_are_refused(initialiser: str) -> None:
    call = INITIALISERS[initialiser]
    for module in (nn.RNN(3, 4), nn.RNNCell(3, 4), fusedrnn.RNN(3, 4), fusedrnn.IndRNN(3, 4)):
        before = snapshot(module)
        with pytest.raises(ValueError, match=f"{type(module).__name__} has no gate that keeps the state"):
            call(module)
        assert same(snapshot(module), before)
    for cls in (nn.LSTM, nn.GRUCell, fusedrnn.GRU, fusedrnn.LSTMCell):
        with pytest.raises(ValueError, match=f"{cls.__name__} must have biases, got bias=False"):
            call(cls(3, 4, bias=False))


@fusedrnn.cell(gates="i f g o", states="h c")
def written(x, rec, h, c):
    i, f, o = torch.sigmoid(x.i + rec.i), torch.sigmoid(x.f + rec.f), torch.sigmoid(x.o + rec.o)
    c = f * c + i * torch.tanh(x.g + rec.g)
    return o * torch.tanh(c), c


@pytest.mark.parametrize("initialiser", ["forget_bias_", "chrono_"])
def test_gates_of_a_users_cell_are_not_known(initialiser: str) -> None:
    module = written.Module(3, 4, eager=True)
    before = snapshot(module)
    with pytest.raises(ValueError, match="made by fusedrnn.cell does not say which of its gates keeps the state"):
        INITIALISERS[initialiser](module)
    assert same(snapshot(module), before)


def test_a_vector_has_no_orthogonal_block() -> None:
    module = fusedrnn.IndRNN(3, 4)
    before = snapshot(module)
    with pytest.raises(ValueError, match="IndRNN has no matrix to make orthogonal: its weight_hh is a vector"):
        init.orthogonal_(module)
    assert same(snapshot(module), before)


BAD_NUMBERS = [
    (init.orthogonal_, {"gain": "1"}, TypeError, "gain must be a number, got str"),
    (init.orthogonal_, {"gain": math.nan}, ValueError, "gain must be finite, got nan"),
    (init.orthogonal_, {"generator": 3}, TypeError, "generator"),
    (init.forget_bias_, {"value": None}, TypeError, "value must be a number, got NoneType"),
    (init.forget_bias_, {"value": math.inf}, ValueError, "value must be finite, got inf"),
    (init.forget_bias_, {"value": 1e39}, RuntimeError, "overflow"),
    (init.chrono_, {"T_max": 2}, ValueError, "2 <= T_min < T_max, got T_min 2.0, T_max 2.0"),
    (init.chrono_, {"T_max": -3}, ValueError, "2 <= T_min < T_max"),
    (init.chrono_, {"T_max": 9, "T_min": 9}, ValueError, "2 <= T_min < T_max"),
    (init.chrono_, {"T_max": 9, "T_min": 1}, ValueError, "2 <= T_min < T_max, got T_min 1.0"),
    (init.chrono_, {"T_max": math.inf}, ValueError, "T_max must be finite, got inf"),
    (init.chrono_, {"T_max": 9, "T_min": math.nan}, ValueError, "T_min must be finite, got nan"),
    (init.chrono_, {"T_max": torch.tensor(9)}, TypeError, "T_max must be a number, got Tensor"),
    (init.chrono_, {"T_max": 1e300}, RuntimeError, "out of bounds"),
    (init.chrono_, {"T_max": 9, "generator": 3}, TypeError, "generator"),
]


@pytest.mark.parametrize("call, arguments, error, text", BAD_NUMBERS)
def test_bad_arguments_change_nothing(call: Callable, arguments: dict, error: type[Exception], text: str) -> None:
    module = fusedrnn.LSTM(6, H, num_layers=2)
    before = snapshot(module)
    with pytest.raises(error, match=text):
        call(module, **arguments)
    assert same(snapshot(module), before)
