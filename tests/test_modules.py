"""Every output and every gradient by name, against torch.nn with the same Parameters, or the plain loop.

Fixed configurations that cover each option once, in every floating-point type; the functional entry points; and
what must not depend on the path taken: no_grad, inference mode, stepping through time by hand, strides.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
from loops import FINALS, SINGLES, STATES, TWINS, hx_of, layer_loop, of_units, states_like
from parity import Case, Results, assert_parity, packer, ragged, results, run_ours, run_twin, twin
from tolerances import assert_all_close, assert_close
from torch import Tensor, nn

import fusedrnn
from fusedrnn import functional
from fusedrnn.cells import CELLS
from fusedrnn.modules import FusedRNNBase

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
VARIANTS = {
    "plain": {},
    "no_states": {"h0": False},
    "no_bias": {"bias": False},
    "stacked": {"num_layers": 3},
    "bidirectional": {"bidirectional": True},
    "stacked_bidirectional": {"num_layers": 2, "bidirectional": True, "bias": False},
    "batch_first": {"batch_first": True, "num_layers": 2},
    "one_step": {"T": 1, "num_layers": 2},
    "one_sample": {"B": 1},
    "one_of_all": {"T": 1, "B": 1, "I": 1, "H": 1},
    "wide": {"T": 3, "B": 5, "I": 70, "H": 67},
    "long": {"T": 40, "B": 3, "I": 9, "H": 17},
    "many_rows": {"T": 4, "B": 77, "I": 5, "H": 19},
}
PROJECTED = [name for name, cell in CELLS.items() if cell.projectable]


@pytest.mark.parametrize("cell", [name for name, t in TWINS.items() if t.torch_layer])
def test_the_plain_loop_is_torch_nn(cell: str) -> None:
    """The loop, which judges the cells that torch.nn lacks, is itself judged by torch.nn."""
    for case in (ragged(Case(cell, T=5, B=4, num_layers=2, bidirectional=True)), Case(cell, batch_first=True)):
        module = case.module()

        def loop(x: Tensor, hx: Tensor | tuple[Tensor, ...] | None, module=module):
            return layer_loop(cell, module, x, hx)

        found = results(loop, case.tensors(), dict(module.named_parameters()), pack=packer(case))
        assert_all_close(found, run_twin(case))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cell", CELLS)
def test_outputs_and_gradients(cell: str, variant: str, dtype: torch.dtype) -> None:
    case = Case(cell, dtype=dtype, **{"T": 5, "B": 3, "I": 6, "H": 10} | VARIANTS[variant])
    assert_parity(case)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", PROJECTED)
def test_projection(cell: str, dtype: torch.dtype) -> None:
    for layers, both, bias, P in ((1, False, True, 1), (2, True, True, 7), (2, False, False, 18)):
        case = Case(cell, T=4, B=3, H=19, num_layers=layers, bidirectional=both, bias=bias, proj_size=P, dtype=dtype)
        assert_parity(case)


@pytest.mark.device
@pytest.mark.parametrize("use", [("y",), ("h_n",), ("c_n",), ("h_n", "c_n")], ids="+".join)
@pytest.mark.parametrize("cell", CELLS)
def test_gradient_of_some_outputs(cell: str, use: tuple[str, ...]) -> None:
    if use == ("c_n",) and "c" not in CELLS[cell].states:
        pytest.skip("the cell has no c")
    padded = Case(cell, T=5, B=3, num_layers=2, bidirectional=True)
    for case in (padded, ragged(padded)):
        assert_all_close(run_ours(case, use=use), run_twin(case, use=use))


@pytest.mark.parametrize("cell", CELLS)
def test_gradient_of_some_steps_units_and_layers(cell: str) -> None:
    """Sparse output gradients reach the op as zeros in places, or with strides of a broadcast number."""
    case = Case(cell, T=6, B=3, num_layers=2)
    module, tensors = case.module(), case.tensors()
    hx = hx_of(tensors)
    losses = {
        "one step": lambda y, h: y[3].sum(),
        "the last step of a unit": lambda y, h: y[-1, :, 2].sum(),
        "a mean": lambda y, h: y.mean(),
        "h of the first layer": lambda y, h: h[0].pow(2).sum(),
        "the transpose": lambda y, h: (y.transpose(0, 2) * torch.arange(6.0).double()).sum(),
    }
    for loss in losses.values():
        found = []
        for call in (module, twin(cell, module)):
            y, last = call(tensors["x"], hx)
            leaves = [*tensors.values(), *module.parameters()]
            value = loss(y, last[0] if isinstance(last, tuple) else last)
            found.append(torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True))
        for ours, theirs in zip(*found, strict=True):
            assert_close("gradient", ours, theirs)


@pytest.mark.parametrize("cell", CELLS)
def test_inputs_that_need_no_gradient(cell: str) -> None:
    case = Case(cell, T=4, B=3, num_layers=2, bidirectional=True)
    names = ["x", "h0", *STATES[1 : len(CELLS[cell].states)], "weight_ih_l0", "weight_hh_l1", "bias_hh_l1"]
    for wanted in [(name,) for name in names] + [("x", "weight_hh_l0_reverse")]:
        found = []
        for call_of in (lambda module: module, lambda module: twin(cell, module)):
            module, tensors = case.module(), case.tensors()
            for name, leaf in (tensors | dict(module.named_parameters())).items():
                leaf.requires_grad_(name in wanted)
            found.append(results(call_of(module), tensors, dict(module.named_parameters())))
        assert_all_close(*found)


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_needs_a_gradient(cell: str) -> None:
    module = Case(cell).module().requires_grad_(False)
    y, last = module(Case(cell).tensors()["x"].detach())
    assert not y.requires_grad
    assert not any(state.requires_grad for state in (last if isinstance(last, tuple) else (last,)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_no_grad_and_inference_mode_give_the_same_numbers(cell: str, dtype: torch.dtype) -> None:
    for case in (Case(cell, T=5, B=3, H=19, num_layers=2, dtype=dtype), Case(cell, T=1, B=1, H=19, dtype=dtype)):
        module, x = case.module(), case.tensors()["x"]
        expected = module(x)[0].detach()
        with torch.no_grad():
            y = module(x)[0]
        assert not y.requires_grad and torch.equal(y, expected)
        with torch.inference_mode():
            y = module.eval()(x)[0]
        assert y.is_inference() and torch.equal(y, expected)


@pytest.mark.parametrize("cell", CELLS)
def test_noncontiguous_inputs_states_and_weights(cell: str) -> None:
    case = Case(cell, T=5, B=3, I=6, H=7, num_layers=2)
    module, plain = case.module(), case.tensors()

    def strided(t: Tensor) -> Tensor:
        """The same values, every other element of a larger buffer, the last two dimensions exchanged in memory."""
        buffer = torch.full((*t.shape[:-2], t.shape[-1], 2 * t.shape[-2]), float("nan"), dtype=t.dtype)
        view = buffer[..., ::2].transpose(-1, -2)
        return view.copy_(t.detach()).requires_grad_()

    expected = results(module, plain, dict(module.named_parameters()))
    for name, parameter in list(module.named_parameters()):
        if parameter.dim() == 2:
            setattr(module, name, torch.nn.Parameter(strided(parameter)))
        else:
            setattr(module, name, torch.nn.Parameter(parameter.detach().repeat_interleave(3)[::3]))
    tensors = {name: strided(t) for name, t in plain.items()}
    assert not any(t.is_contiguous() for t in (*tensors.values(), *module.parameters()))
    found = results(module, tensors, dict(module.named_parameters()))
    assert_all_close(found, expected)

    expanded = {name: t[:, :1].detach().expand_as(t).requires_grad_() for name, t in plain.items()}
    copied = {name: t.detach().clone().requires_grad_() for name, t in expanded.items()}
    parameters = dict(module.named_parameters())
    assert_all_close(results(module, expanded, parameters), results(module, copied, parameters))


@pytest.mark.device
@pytest.mark.parametrize("cell", CELLS)
def test_empty_batch(cell: str) -> None:
    for both, first in product((False, True), repeat=2):
        case = Case(cell, T=4, B=0, num_layers=2, bidirectional=both, batch_first=first)
        found = run_ours(case)
        assert found["y"].numel() == 0 and all(not t.any() for t in found.values())
        assert {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in run_twin(case).items()}


@pytest.mark.parametrize("cell", CELLS)
def test_step_by_step_equals_the_whole_sequence(cell: str) -> None:
    """Called with T = 1 and the states handed on, as people do who act, forecast or decode."""
    case = Case(cell, T=6, B=3, num_layers=2)
    module, tensors = case.module(), case.tensors()
    parameters = dict(module.named_parameters())

    def stepwise(x: Tensor, hx):
        outputs = []
        for row in x:
            y, hx = module(row[None], hx)
            outputs.append(y)
        return torch.cat(outputs), hx

    assert_all_close(results(stepwise, tensors, parameters), results(module, tensors, parameters))


@pytest.mark.parametrize("cell", CELLS)
def test_outputs_share_no_memory(cell: str) -> None:
    for case in (Case(cell, T=1), Case(cell, T=3, num_layers=2, bidirectional=True)):
        module, tensors = case.module().requires_grad_(False), case.tensors()
        hx = hx_of(tensors)
        y, last = module(tensors["x"], hx)
        outputs = [y, *(last if isinstance(last, tuple) else (last,))]
        pointers = [t.untyped_storage().data_ptr() for t in (*outputs, *tensors.values())]
        assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("cell", CELLS)
def test_dropout_between_layers(cell: str) -> None:
    case = Case(cell, T=4, B=3, num_layers=2)
    module, x = case.module(), case.tensors()["x"]
    expected = module(x)[0]
    module.dropout = 0.5
    assert torch.equal(module.eval()(x)[0], expected)
    module.train()
    torch.manual_seed(1)
    first, again = module(x)[0], module(x)[0]
    assert not torch.equal(first, again)
    torch.manual_seed(1)
    assert torch.equal(module(x)[0], first)
    module.dropout = 1.0  # the second layer sees zeros and nothing of x
    y = module(x)[0]
    second = TWINS[cell].layer(5, 5, dtype=torch.float64)
    second.load_state_dict({k[:-1] + "0": v for k, v in module.state_dict().items() if k.endswith("_l1")})
    assert_close("y", y, second(x.new_zeros(4, 3, 5))[0])
    (dx,) = torch.autograd.grad(y.sum(), x, allow_unused=True, materialize_grads=True)
    assert not dx.any()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "ragged"])
@pytest.mark.parametrize("cell", [name for name, t in TWINS.items() if t.torch_layer])
def test_dropout_draws_torch_nn_mask(cell: str, packed: bool) -> None:
    """The same seed gives the same masks, so training curves can be laid over one another."""
    case = Case(cell, T=6, B=4, H=8, num_layers=3, bidirectional=True)
    case = ragged(case) if packed else case
    module = case.module()
    module.dropout = 0.4
    found = []
    for call in (module, twin(cell, module)):
        torch.manual_seed(3)
        found.append(results(call, case.tensors(), dict(module.named_parameters()), pack=packer(case)))
    assert_all_close(*found)


# The functions with names of their own, beside recurrent and recurrent_cell which take any cell.
FUNCTIONS: dict[str, tuple[Callable, Callable]] = {
    "rnn_tanh": (functional.rnn, functional.rnn_cell),
    "rnn_relu": (
        partial(functional.rnn, nonlinearity="relu"),
        partial(functional.rnn_cell, nonlinearity="relu"),
    ),
    "lstm": (functional.lstm, functional.lstm_cell),
    "gru": (functional.gru, functional.gru_cell),
    "gru_reset_before": (
        partial(functional.gru, reset_after=False),
        partial(functional.gru_cell, reset_after=False),
    ),
}


@pytest.mark.parametrize("cell", CELLS)
def test_functional_layers(cell: str) -> None:
    cases = (
        Case(cell, T=4, num_layers=2, bidirectional=True, h0=False),
        Case(cell, T=4, num_layers=2, batch_first=True, bias=False),
        ragged(Case(cell, T=4, B=3)),
        Case(cell, proj_size=3 if CELLS[cell].projectable else 0),
    )
    for function, case in product([partial(functional.recurrent, cell), *FUNCTIONS.get(cell, ())[:1]], cases):
        module = case.module()
        shape = {name: getattr(case, name) for name in ("num_layers", "bidirectional", "batch_first")}

        def call(x, hx, function=function, weights=tuple(module._flat_weights), shape=shape):
            return function(x, hx, weights, **shape)

        found = results(call, case.tensors(), dict(module.named_parameters()), pack=packer(case))
        assert_all_close(found, run_ours(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", SINGLES)
def test_single_steps(cell: str, dtype: torch.dtype) -> None:
    """Cell modules against torch.nn's (or the loop), batched and not, and the functional steps against both."""

    def any_cell(x: Tensor, hx: Tensor | tuple[Tensor, ...], *weights: Tensor):
        states = functional.recurrent_cell(cell, x, hx if isinstance(hx, tuple) else (hx,), *weights)
        return states if isinstance(hx, tuple) else states[0]

    for bias, (B, I, H) in product((True, False), ((3, 4, 5), (1, 1, 1), (33, 20, 37))):
        module = TWINS[cell].cell(I, H, bias=bias, dtype=dtype)
        weights = (module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh, *of_units(cell, module))
        names = STATES[: len(CELLS[cell].states)]
        values = {"x": torch.randn(B, I), **{name: torch.randn(B, H) for name in names}}
        if "n0" in values:  # it divides
            values["n0"] = values["n0"].abs() + 0.5
        values = {name: value.to(dtype).requires_grad_() for name, value in values.items()}

        def as_layer(step: Callable) -> Callable:
            """The step with a layer's results: its first state is also the output."""

            def call(x, hx):
                out = step(x, hx)
                return out[0] if isinstance(out, tuple) else out, out

            return call

        def run(step: Callable, dtype=dtype, module=module, values=values) -> Results:
            tensors = {name: value.detach().to(dtype).requires_grad_() for name, value in values.items()}
            return results(as_layer(step), tensors, dict(module.named_parameters()), use=FINALS)

        wide = copy.deepcopy(module).double()
        expected = run(twin(cell, wide), torch.float64, wide)
        found = run(module)
        assert_all_close(found, expected, dtype)
        for function in (*FUNCTIONS.get(cell, ())[1:], any_cell):
            again = run(lambda x, hx, f=function, w=weights: f(x, hx, *w))
            # A module's steps multiply for their weights together, in another order of sums.
            assert all(torch.equal(again[name], found[name]) for name in ("y", "h_n", "dx", "dh0"))
            assert_all_close(again, expected, dtype)
        x, *states = (value.detach()[0] for value in values.values())
        alone = module(x, tuple(states) if len(states) > 1 else states[0])
        assert_close("unbatched", alone[0] if isinstance(alone, tuple) else alone, expected["h_n"][0], dtype)


@pytest.mark.parametrize("cell", SINGLES)
def test_single_step_defaults_to_zero_states(cell: str) -> None:
    module = TWINS[cell].cell(4, 5, dtype=torch.float64)
    x = torch.randn(3, 4, dtype=torch.float64)
    zeros = x.new_zeros(3, 5)
    found, expected = module(x), module(x, states_like(cell, zeros))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("cell", CELLS)
def test_unbatched_input(cell: str) -> None:
    for first in (False, True):
        case = Case(cell, T=4, B=1, num_layers=2, bidirectional=True, batch_first=first)
        module, tensors = case.module(), case.tensors()
        squeezed = {name: t.detach().squeeze(0 if first and name == "x" else 1) for name, t in tensors.items()}
        states = tuple(squeezed[name] for name in squeezed if name != "x")
        y, last = module(squeezed["x"], states if len(states) > 1 else states[0])
        expected = run_ours(case)
        assert_close("y", y, expected["y"].squeeze(0 if first else 1))
        for name, state in zip(("h_n", "c_n"), last if isinstance(last, tuple) else (last,), strict=False):
            assert_close(name, state, expected[name].squeeze(1))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"])
def test_signatures_are_torchs_and_our_options(name: str) -> None:
    """Tools read them: skip_init, configuration parsers. torch.nn's sequence modules show none, RNNBase theirs."""
    theirs = getattr(nn, name) if name.endswith("Cell") else nn.RNNBase
    expected = {n: p.default for n, p in inspect.signature(theirs.__init__).parameters.items()}
    found = inspect.signature(getattr(fusedrnn, name)).parameters
    positional = [n for n, p in found.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    dropped = {"self", "mode"} | ({"proj_size"} if name in ("RNN", "GRU") else set())
    order = [n for n in expected if n not in dropped]
    if name == "RNN":
        order.insert(3, "nonlinearity")
    assert positional == order
    for parameter in positional:
        assert found[parameter].default == expected.get(parameter, "tanh")
    own = {n: p.default for n, p in found.items() if p.kind is p.KEYWORD_ONLY}
    default = fusedrnn.FusedOptions()
    assert own == {n: getattr(default, n) for n in own}
    assert ("reset_after" in own) == name.startswith("GRU") and ("zoneout" in own) == (not name.endswith("Cell"))


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "ResidualRNN", "RNNCell", "LSTMCell", "GRUCell"])
def test_modules_without_initial_values(name: str) -> None:
    module = nn.utils.skip_init(getattr(fusedrnn, name), 4, 5, dtype=torch.float64)
    assert all(p.device.type == "cpu" and p.dtype == torch.float64 for p in module.parameters())


def test_arguments_by_position() -> None:
    for theirs, ours, arguments in (
        (nn.RNN, fusedrnn.RNN, (4, 5, 2, "relu", False, True, 0.1, True)),
        (nn.LSTM, fusedrnn.LSTM, (4, 5, 2, False, True, 0.1, True, 3)),
        (nn.GRU, fusedrnn.GRU, (4, 5, 2, False, True, 0.1, True)),
    ):
        assert repr(ours(*arguments)) == repr(theirs(*arguments))
        assert [p.shape for p in ours(*arguments).parameters()] == [p.shape for p in theirs(*arguments).parameters()]
    with pytest.raises(TypeError, match="unexpected keyword argument 'zone'"):
        fusedrnn.GRU(4, 5, zone=1)


class OurGRU(FusedRNNBase):
    """torch.nn's GRU as a cell that torch.nn would not have."""

    _cell = "gru"


class OurLSTM(FusedRNNBase):
    """Likewise of two states."""

    _cell = "lstm"


@pytest.mark.parametrize(("ours", "theirs"), [(OurGRU, nn.GRU), (OurLSTM, nn.LSTM)], ids=["gru", "lstm"])
def test_a_class_of_our_own_has_the_parameters_of_its_gates(ours: type, theirs: type) -> None:
    """Drawn once, in their shapes: with the same seed the same numbers as torch.nn's, states as torch.nn takes them."""
    options = {"num_layers": 2, "bidirectional": True}
    torch.manual_seed(3)
    module, after = ours(4, 5, **options), torch.rand(1)
    torch.manual_seed(3)
    reference = theirs(4, 5, **options)
    assert torch.equal(after, torch.rand(1))
    for (name, ours_), (_, theirs_) in zip(module.named_parameters(), reference.named_parameters(), strict=True):
        assert_close(name, ours_, theirs_)
    x = torch.randn(3, 2, 4)
    torch.testing.assert_close(module(x), reference(x))
    torch.testing.assert_close(copy.deepcopy(module).double()(x.double())[0].float(), reference(x)[0])
    states = [torch.zeros(4, 2, 5), torch.zeros(4, 2, 6)]
    with pytest.raises(RuntimeError, match=r"Expected hidden(\[1\])? ?(size)?.*\(4, 2, 5\), got \[4, 2, 6\]"):
        module(x, tuple(states) if ours is OurLSTM else states[1])


def test_a_class_of_our_own_initializes_itself_once() -> None:
    class Orthogonal(OurGRU):
        def reset_parameters(self) -> None:
            assert self.weight_hh_l0.shape == (15, 5)
            nn.init.eye_(self.weight_hh_l0)

    assert torch.equal(Orthogonal(4, 5).weight_hh_l0, torch.eye(15, 5))


def test_a_class_says_its_cell_whatever_the_mode() -> None:
    module, x = fusedrnn.ResidualRNN(4, 5), torch.randn(3, 2, 4)
    expected = module(x)[0]
    module.mode = "RNN_RELU"
    assert torch.equal(module(x)[0], expected)
    for cell, error in (("nope", "must be one of"), (None, "must be one of")):
        with pytest.raises(ValueError, match=error):
            type("Wrong", (FusedRNNBase,), {"_cell": cell})
    with pytest.raises(TypeError, match="has no cell"):
        FusedRNNBase(4, 5)
    for mode in ("bogus", 3):
        rnn = fusedrnn.RNN(4, 5)
        rnn.mode = mode
        with pytest.raises(AssertionError, match="mode must be"):
            rnn(x)
