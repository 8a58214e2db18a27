"""Bad input of every kind: where torch.nn has an error, ours has its type and text; elsewhere a clear one of our own.

``assert_same_error`` runs torch.nn first and takes what it raises as the expectation. All of it runs in this process,
which has to stay alive.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import TWINS
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn
from fusedrnn import functional
from fusedrnn.cells import CELLS

LAYERS, SINGLES = ("RNN", "LSTM", "GRU"), ("RNNCell", "LSTMCell", "GRUCell")


def assert_same_error(ours: Callable[[], Any], theirs: Callable[[], Any]) -> None:
    with pytest.raises(Exception) as expected:  # whatever torch.nn raises
        theirs()
    with pytest.raises(expected.type) as found:
        ours()
    assert type(found.value) is expected.type
    assert str(found.value) == str(expected.value)


def assert_same_error_of(name: str, *arguments: Any, options: dict[str, Any], call: Callable | None = None) -> None:
    """The constructor's error, or that of ``call(module)``."""

    def run(namespace):
        module = getattr(namespace, name)(*arguments, **options)
        if call is not None:
            call(module)

    assert_same_error(lambda: run(fusedrnn), lambda: run(nn))


BAD_OPTIONS = [
    {"input_size": 0},
    {"input_size": -1},
    {"input_size": 4.0},
    {"hidden_size": 0},
    {"hidden_size": "5"},
    {"num_layers": 0},
    {"num_layers": -2},
    {"bias": 1},
    {"batch_first": "yes"},
    {"dropout": 1.5},
    {"dropout": -0.1},
    {"dropout": True},
    {"proj_size": 2},
    {"proj_size": -1},
    {"proj_size": 5},
    {"proj_size": 9},
    {"nonlinearity": "sigmoid"},
    {"hidden": 3},
    {"mode": "LSTM"},
]


@pytest.mark.parametrize("bad", BAD_OPTIONS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_constructor(name: str, bad: dict[str, Any]) -> None:
    if name == "LSTM" and bad == {"proj_size": 2}:
        pytest.skip("an LSTM may be projected")
    assert_same_error_of(name, options={"input_size": 4, "hidden_size": 5} | bad)


@pytest.mark.parametrize("arguments", [(), (4,), (4, 5, 1, "tanh", True, False, 0.0, False, None, None, 1)], ids=len)
@pytest.mark.parametrize("name", LAYERS)
def test_constructor_with_too_few_or_too_many_arguments(name: str, arguments: tuple) -> None:
    with pytest.raises((TypeError, ValueError)):
        getattr(nn, name)(*arguments)
    with pytest.raises((TypeError, ValueError)):
        getattr(fusedrnn, name)(*arguments)


def test_residual_rnn_constructor() -> None:
    for bad in ({"hidden_size": 0}, {"num_layers": 0}, {"dropout": 2.0}, {"bias": 1}, {"input_size": 1.5}):
        arguments = {"input_size": 4, "hidden_size": 5} | bad
        assert_same_error(lambda a=arguments: fusedrnn.ResidualRNN(**a), lambda a=arguments: nn.GRU(**a))
    with pytest.raises((TypeError, ValueError), match="proj_size"):
        fusedrnn.ResidualRNN(4, 5, proj_size=2)


@pytest.mark.parametrize("name", LAYERS)
def test_dropout_with_one_layer_warns(name: str) -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last") as theirs:
        getattr(nn, name)(4, 5, dropout=0.5)
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last") as ours:
        getattr(fusedrnn, name)(4, 5, dropout=0.5)
    assert str(ours[0].message) == str(theirs[0].message)


def states(name: str | int, *shape: int, c: tuple[int, ...] | None = None, dtype: torch.dtype | None = None):
    """Of torch.nn's class of this name, or so many."""
    count = name if isinstance(name, int) else 1 + name.startswith("LSTM")
    found = torch.zeros(shape, dtype=dtype), *(torch.zeros(c or shape, dtype=dtype) for _ in range(count - 1))
    return found if count > 1 else found[0]


BAD_FORWARD: dict[str, Callable[[str], Callable[[nn.Module], Any]]] = {
    "1-D input": lambda name: lambda m: m(torch.zeros(4)),
    "4-D input": lambda name: lambda m: m(torch.zeros(3, 2, 4, 1)),
    "float64 input": lambda name: lambda m: m(torch.zeros(3, 2, 4, dtype=torch.float64)),
    "float16 input": lambda name: lambda m: m(torch.zeros(3, 2, 4, dtype=torch.float16)),
    "integer input": lambda name: lambda m: m(torch.zeros(3, 2, 4, dtype=torch.int64)),
    "boolean input": lambda name: lambda m: m(torch.zeros(3, 2, 4, dtype=torch.bool)),
    "complex input": lambda name: lambda m: m(torch.zeros(3, 2, 4, dtype=torch.complex64)),
    "features": lambda name: lambda m: m(torch.zeros(3, 2, 7)),
    "features, unbatched": lambda name: lambda m: m(torch.zeros(3, 7)),
    "no features": lambda name: lambda m: m(torch.zeros(3, 2, 0)),
    "2-D state for a batch": lambda name: lambda m: m(torch.zeros(3, 2, 4), states(name, 2, 5)),
    "3-D state for no batch": lambda name: lambda m: m(torch.zeros(3, 4), states(name, 1, 2, 5)),
    "state's batch": lambda name: lambda m: m(torch.zeros(3, 2, 4), states(name, 1, 3, 5)),
    "state's features": lambda name: lambda m: m(torch.zeros(3, 2, 4), states(name, 1, 2, 6)),
    "state's layers": lambda name: lambda m: m(torch.zeros(3, 2, 4), states(name, 2, 2, 5)),
    "T = 0": lambda name: lambda m: m(torch.zeros(0, 2, 4)),
    "T = 0, unbatched": lambda name: lambda m: m(torch.zeros(0, 4)),
    "packed features": lambda name: lambda m: m(pack_padded_sequence(torch.zeros(3, 2, 7), [3, 1])),
    "packed float64": lambda name: lambda m: m(pack_padded_sequence(torch.zeros(3, 2, 4).double(), [3, 1])),
    "packed, state's layers": lambda name: (
        lambda m: m(pack_padded_sequence(torch.zeros(3, 2, 4), [3, 1], enforce_sorted=False), states(name, 2, 2, 5))
    ),
}


@pytest.mark.parametrize("case", BAD_FORWARD)
@pytest.mark.parametrize("name", LAYERS)
def test_forward(name: str, case: str) -> None:
    if name == "LSTM" and case.startswith("packed"):
        pytest.skip("torch.nn.LSTM does not check packed input: see test_packed_lstm_is_checked")
    assert_same_error_of(name, 4, 5, options={}, call=BAD_FORWARD[case](name))


@pytest.mark.parametrize("name", LAYERS)
def test_forward_batch_first_and_bidirectional(name: str) -> None:
    for options, x, h in (
        ({"batch_first": True}, (2, 3, 4), (1, 3, 5)),
        ({"bidirectional": True, "num_layers": 2}, (3, 2, 4), (2, 2, 5)),
        ({"batch_first": True}, (2, 0, 4), (1, 2, 5)),
    ):
        hx = states(name, *h)
        assert_same_error_of(name, 4, 5, options=options, call=lambda m, x=x, hx=hx: m(torch.zeros(x), hx))


def test_lstm_states() -> None:
    """The c of an LSTM, alone wrong; a projected h; a state that is no pair."""
    x = torch.zeros(3, 2, 4)
    for options, h, c in (
        ({}, (1, 2, 5), (1, 2, 6)),
        ({}, (1, 2, 5), (2, 5)),
        ({"proj_size": 3}, (1, 2, 5), (1, 2, 5)),
        ({"proj_size": 3}, (1, 2, 3), (1, 2, 3)),
    ):
        hx = (torch.zeros(h), torch.zeros(c))
        assert_same_error_of("LSTM", 4, 5, options=options, call=lambda m, hx=hx: m(x, hx))
    for hx in (torch.zeros(1, 2, 5), (torch.zeros(1, 2, 5),), (None, None), 3):
        with pytest.raises((RuntimeError, TypeError, IndexError, AttributeError, ValueError)):
            fusedrnn.LSTM(4, 5)(x, hx)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("name", ["GRU", "RNN", "MGU", "IndRNN", "LayerNormGRU"])
def test_one_state_is_a_tensor(name: str, single: bool) -> None:
    module = getattr(fusedrnn, name + "Cell" * single)(4, 5)
    shape = (2,) if single else (3, 2)
    h = torch.zeros((2, 5) if single else (1, 2, 5))
    for hx, got in (((h,), "tuple"), ([h], "list"), ((h, None), "tuple"), (3, "int")):
        for recorded in (True, False):
            with (
                torch.set_grad_enabled(recorded),
                pytest.raises(TypeError, match=f"hx of .* must be a tensor, got {got}"),
            ):
                module(torch.zeros(*shape, 4), hx)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "PeepholeLSTM", "LayerNormLSTM", "SLSTM"])
def test_several_states_are_a_tuple_of_tensors(name: str, single: bool) -> None:
    module, count = getattr(fusedrnn, name + "Cell" * single)(4, 5), 4 if name == "SLSTM" else 2
    x = torch.zeros(2, 4) if single else torch.zeros(3, 2, 4)
    h = torch.zeros((2, 5) if single else (1, 2, 5))
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            with pytest.raises(TypeError, match=r"hx\[1\] of .* must be a tensor, got NoneType"):
                module(x, (h, None, h, h)[:count])
            with pytest.raises(TypeError, match=rf"hx\[{count - 1}\] of .* must be a tensor, got tuple"):
                module(x, [h, h, h, h][: count - 1] + [(h,)])
            with pytest.raises(TypeError, match=f"must be a tuple of {count} tensors, got int"):
                module(x, 3)
            for given in (1, 3, 5):
                with pytest.raises(RuntimeError, match=f"expects .* hidden states, got {given}"):
                    module(x, (h,) * given)


@pytest.mark.parametrize("name", LAYERS)
def test_a_list_of_states_is_accepted(name: str) -> None:
    ours = getattr(fusedrnn, name)(4, 5)
    x, hx = torch.randn(3, 2, 4), states(name, 1, 2, 5)
    given = list(hx) if isinstance(hx, tuple) else hx
    assert torch.equal(ours(x, given)[0], ours(x)[0])


BAD_STEP: dict[str, Callable[[str], Callable[[nn.Module], Any]]] = {
    "3-D input": lambda name: lambda m: m(torch.zeros(3, 2, 4)),
    "0-D input": lambda name: lambda m: m(torch.zeros(())),
    "features": lambda name: lambda m: m(torch.zeros(2, 5)),
    "3-D state": lambda name: lambda m: m(torch.zeros(2, 4), states(name, 1, 2, 5)),
    "state's features": lambda name: lambda m: m(torch.zeros(2, 4), states(name, 2, 7)),
    "state's batch": lambda name: lambda m: m(torch.zeros(3, 4), states(name, 2, 5)),
}


@pytest.mark.parametrize("case", BAD_STEP)
@pytest.mark.parametrize("name", SINGLES)
def test_single_step(name: str, case: str) -> None:
    assert_same_error_of(name, 4, 5, options={}, call=BAD_STEP[case](name))


def test_single_step_states_of_an_lstm() -> None:
    for h, c in (((3, 5), (3, 6)), ((3, 5), (2, 5)), ((3, 5), (1, 3, 5))):
        hx = (torch.zeros(h), torch.zeros(c))
        assert_same_error_of("LSTMCell", 4, 5, options={}, call=lambda m, hx=hx: m(torch.zeros(3, 4), hx))


def test_single_step_constructor() -> None:
    for name in SINGLES:
        with pytest.raises(TypeError):
            getattr(fusedrnn, name)(4)
        with pytest.raises(TypeError):
            getattr(fusedrnn, name)(4, 5, hidden=3)
    module = fusedrnn.RNNCell(4, 5, nonlinearity="sigmoid")
    reference = nn.RNNCell(4, 5, nonlinearity="sigmoid")
    assert_same_error(lambda: module(torch.zeros(2, 4)), lambda: reference(torch.zeros(2, 4)))


WRONG = (RuntimeError, TypeError, ValueError, NotImplementedError)


@pytest.mark.parametrize("name", SINGLES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.float16, torch.complex64], ids=str)
def test_single_step_dtypes(name: str, dtype: torch.dtype) -> None:
    """torch.nn's text here is that of a matrix product; ours names the dtypes."""
    module = getattr(fusedrnn, name)(4, 5)
    with pytest.raises(WRONG, match=f"(?i){str(dtype).split('.')[1]}|double|long|half|dtype"):
        module(torch.zeros(2, 4, dtype=dtype))


@pytest.mark.parametrize("cell", CELLS)
def test_packed_states_are_checked(cell: str) -> None:
    """Two places where torch.nn is silent or obscure, and ours is not.

    A state with too many rows for an unsorted batch is truncated by torch.nn; a wrong state for a sorted batch reaches
    the matrix product of torch.nn.LSTM.
    """
    module, x = TWINS[cell].layer(4, 5), torch.zeros(3, 2, 4)
    for enforce_sorted in (False, True):
        packed = pack_padded_sequence(x, torch.tensor([3, 1]), enforce_sorted=enforce_sorted)
        for shape in ((1, 3, 5), (1, 1, 5), (1, 2, 6), (2, 2, 5)):
            name = len(CELLS[cell].states)
            which = r"hidden\[0\]" if name > 1 else "hidden"
            expected = rf"Expected {which} size \(1, 2, 5\), got \[{', '.join(map(str, shape))}\]"
            with pytest.raises(RuntimeError, match=expected):
                module(packed, states(name, *shape))


@pytest.mark.parametrize("case", ["packed features", "packed float64"])
def test_packed_lstm_is_checked(case: str) -> None:
    """torch.nn.LSTM shows the error of a matrix product here; ours says what torch.nn.GRU says."""
    call = BAD_FORWARD[case]("LSTM")
    assert_same_error(lambda: call(fusedrnn.LSTM(4, 5)), lambda: call(nn.GRU(4, 5)))


@pytest.mark.parametrize("cell", CELLS)
def test_malformed_packed_sequences(cell: str) -> None:
    module = TWINS[cell].layer(4, 5)
    data = torch.zeros(5, 4)
    for sizes in ([1, 2, 2], [3, 3], [2, 2], [5, 0], [6, -1], [0], []):
        with pytest.raises((RuntimeError, ValueError), match="batch_sizes|sequence length|Expected"):
            module(PackedSequence(data, torch.tensor(sizes, dtype=torch.int64)))
    for indices in (torch.tensor([0, 7]), torch.tensor([0, -9])):
        packed = PackedSequence(data, torch.tensor([2, 2, 1]), indices, indices)
        with pytest.raises((RuntimeError, IndexError)):
            module(packed, states(len(CELLS[cell].states), 1, 2, 5))


@pytest.mark.parametrize("cell", CELLS)
def test_dtypes_without_a_kernel(cell: str) -> None:
    module = TWINS[cell].layer(4, 5)
    for key, parameter in list(module.named_parameters()):
        setattr(module, key, nn.Parameter(parameter.detach().to(torch.complex64)))
    with pytest.raises(WRONG, match="complex64|ComplexFloat"):
        module(torch.zeros(3, 2, 4, dtype=torch.complex64))


@pytest.mark.parametrize("cell", CELLS)
def test_mixed_dtypes(cell: str) -> None:
    """One weight or one state in another dtype than the rest."""
    for key in ("weight_hh_l0", "bias_ih_l0"):
        module = TWINS[cell].layer(4, 5)
        setattr(module, key, nn.Parameter(getattr(module, key).detach().double()))
        with pytest.raises(WRONG, match="(?i)dtype|float64|double"):
            module(torch.zeros(3, 2, 4))
    two = "c" in CELLS[cell].states
    module, h = TWINS[cell].layer(4, 5), states(len(CELLS[cell].states), 1, 2, 5, dtype=torch.float64)
    with pytest.raises(WRONG, match="(?i)dtype|float64|double"):
        module(torch.zeros(3, 2, 4), h)
    if two:
        with pytest.raises(WRONG, match="(?i)dtype|float64|double"):
            module(torch.zeros(3, 2, 4), (h[0].float(), *h[1:]))


@pytest.mark.parametrize("cell", CELLS)
def test_mixed_devices(cell: str) -> None:
    """The meta device stands for another one: a CPU kernel must never follow its pointers."""
    two = "c" in CELLS[cell].states
    name = len(CELLS[cell].states)
    x = torch.zeros(3, 2, 4)
    with pytest.raises(WRONG, match="(?i)device|meta"):
        TWINS[cell].layer(4, 5)(x.to("meta"))
    with pytest.raises(WRONG, match="(?i)device|meta"):
        TWINS[cell].layer(4, 5, device="meta")(x)
    state = states(name, 1, 2, 5)
    meta = tuple(s.to("meta") for s in state) if two else state.to("meta")
    with pytest.raises(WRONG, match="(?i)device|meta"):
        TWINS[cell].layer(4, 5)(x, meta)
    if two:
        with pytest.raises(WRONG, match="(?i)device|meta"):
            TWINS[cell].layer(4, 5)(x, (state[0], *meta[1:]))
    for key in ("weight_ih_l0", "weight_hh_l0", "bias_hh_l0"):
        module = TWINS[cell].layer(4, 5)
        setattr(module, key, nn.Parameter(getattr(module, key).detach().to("meta")))
        with pytest.raises(WRONG, match="(?i)device|meta"):
            module(x)
    for single in [TWINS[cell].cell(4, 5)] if TWINS[cell].cell else []:
        with pytest.raises(WRONG, match="(?i)device|meta"):
            single(x[0].to("meta"))


@pytest.mark.parametrize("cell", CELLS)
def test_weights_of_a_wrong_shape(cell: str) -> None:
    """Set behind the constructor's back: the op checks them, whatever reaches it."""
    for key, shape in (
        ("weight_ih_l0", (3, 4)),
        ("weight_hh_l0", (len(CELLS[cell].gates) * 5, 6)),
        ("weight_hh_l1", (len(CELLS[cell].gates) * 5, *[1] * (not CELLS[cell].product))),
        *[("weight_unit_l1", (5, 1))] * CELLS[cell].has_unit_weight,
        ("bias_ih_l0", (2,)),
        ("bias_hh_l1", (0,)),
    ):
        module = TWINS[cell].layer(4, 5, num_layers=2)
        setattr(module, key, nn.Parameter(torch.zeros(shape)))
        with pytest.raises((RuntimeError, ValueError), match="shape|size"):
            module(torch.zeros(3, 2, 4))


def layer_weights(*, bias: bool = True) -> list[Tensor]:
    return list(fusedrnn.LSTM(4, 5, num_layers=2, bias=bias)._flat_weights)


def test_functional_arguments() -> None:
    """Each wrong argument raises and is named."""
    x, weights = torch.zeros(3, 2, 4), layer_weights()
    ok = functional.lstm(x, None, weights, num_layers=2)
    assert ok[0].shape == (3, 2, 5)
    wrong = (RuntimeError, ValueError, TypeError)
    for bad in (weights[:-1], weights[:4], [], [*weights, weights[0]]):
        with pytest.raises(wrong, match="weight|w_hh|w_ih"):
            functional.lstm(x, None, bad, num_layers=2)
    for number in (0, -1, 3):
        with pytest.raises(wrong):
            functional.lstm(x, None, weights, num_layers=number)
    with pytest.raises(wrong):
        functional.lstm(x, None, weights, num_layers=2, bidirectional=True)
    with pytest.raises(wrong):
        functional.lstm(x[0, 0], None, weights, num_layers=2)
    with pytest.raises(wrong):
        functional.gru(x, None, weights, num_layers=2)
    with pytest.raises(ValueError, match=r"w_ih, w_hh\[, b_ih, b_hh\] for each of 1 layer"):  # a GRU has no w_hr
        functional.gru(x, None, list(fusedrnn.GRU(4, 5)._flat_weights)[:3])
    w_ih, w_hh = weights[0], weights[1]
    with pytest.raises(RuntimeError, match="w_hh must have 2 dimensions, got 1"):
        functional.lstm(x, (torch.zeros(1, 2, 5),) * 2, [w_ih, w_hh[0]])
    with pytest.raises(TypeError, match=r"weights\[2\] must be a tensor, got NoneType"):
        functional.lstm(x, None, [w_ih, w_hh, None, None])
    with pytest.raises(ValueError, match="cell must be one of"):
        functional.recurrent_cell("peephole", x[0], (None,), w_ih, w_hh)
    with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM, not ResidualRNN"):
        fusedrnn.ResidualRNN(3, 4, proj_size=2)
    with pytest.raises(RuntimeError, match="device"):  # a single meta tensor would lead to the fake kernel
        fusedrnn.ops.layer_forward(x, None, None, None, [w.to("meta") for w in weights[:4]], "lstm", False, True)
    for dropout in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="dropout must be a probability"):
            functional.lstm(x, None, weights, num_layers=2, dropout=dropout)
    with pytest.raises(wrong, match="nonlinearity|sigmoid"):
        functional.rnn(x, None, list(fusedrnn.RNN(4, 5)._flat_weights), nonlinearity="sigmoid")
    with pytest.raises(wrong):
        functional.lstm_cell(x, (x[0], x[0]), *weights[:4])
    with pytest.raises(wrong):
        functional.gru_cell(x[0], torch.zeros(2, 5), *weights[:4])


def test_functional_checks_initial_states_before_cutting_them() -> None:
    """Slices by layer and a packed batch's permutation would hide a wrong size."""
    layer = fusedrnn.GRU(4, 3, num_layers=2)
    weights, x = layer._flat_weights, torch.randn(5, 2, 4)
    for shape in ((5, 2, 3), (1, 2, 3), (2, 7, 3), (2, 2, 4)):
        with pytest.raises(RuntimeError, match=r"h0 must have shape \[2, 2, 3\], got"):
            fusedrnn.functional.gru(x, torch.randn(shape), weights, num_layers=2)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 5]), enforce_sorted=False)
    with pytest.raises(RuntimeError, match=r"h0 must have shape \[2, 2, 3\], got \[2, 7, 3\]"):
        fusedrnn.functional.gru(packed, torch.randn(2, 7, 3), weights, num_layers=2)
    with pytest.raises(RuntimeError, match=r"h0 must have shape \[2, 3\], got \[2, 1, 3\]"):
        fusedrnn.functional.gru(x[:, 0], torch.randn(2, 1, 3), weights, num_layers=2)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_wrong_number_of_states(count: int) -> None:
    states = [torch.zeros(2, 3)] * count
    with pytest.raises(RuntimeError, match="lstm expects two hidden states"):
        fusedrnn.LSTMCell(4, 3)(torch.randn(2, 4), states)
    with pytest.raises(RuntimeError, match="lstm expects two hidden states"):
        fusedrnn.LSTM(4, 3)(torch.randn(5, 2, 4), [s[None] for s in states])
    with pytest.raises(TypeError, match="must be a tuple"):
        fusedrnn.LSTM(4, 3)(torch.randn(5, 2, 4), torch.zeros(2, 1, 2, 3))
    layer = fusedrnn.LSTMCell(4, 3)
    with pytest.raises(RuntimeError, match="expects 2 hidden state"):
        fusedrnn.functional.lstm_cell(torch.randn(2, 4), states, layer.weight_ih, layer.weight_hh)


def test_batch_sizes_that_overflow() -> None:
    weights = [torch.zeros(3, 4), torch.zeros(3, 3)]
    with pytest.raises(RuntimeError, match="batch_sizes must add up"):
        sizes = torch.full((4,), 2**62)
        fusedrnn.ops.layer_forward(torch.zeros(0, 4), sizes, None, None, weights, "rnn_tanh", False, False)


@pytest.mark.parametrize("x, h", [((3,), (1, 4)), ((2, 3), (4,)), ((2, 3), (3, 4)), ((2, 3), (2, 5))])
def test_cell_states_of_another_rank_or_size(x: tuple[int, ...], h: tuple[int, ...]) -> None:
    """The words of torch.nn, which speak of what the caller gave; of another rank since torch 2.15."""
    with pytest.raises(RuntimeError) as theirs:
        nn.GRUCell(3, 4)(torch.zeros(x), torch.zeros(h))
    with pytest.raises(RuntimeError) as ours:
        fusedrnn.GRUCell(3, 4)(torch.zeros(x), torch.zeros(h))
    if len(x) == len(h) or torch.__version__ >= "2.15":
        assert str(ours.value) == str(theirs.value)
    else:
        assert str(ours.value).startswith("Expected 2D hidden0 (batch x hidden_size), but got")


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("kind", LAYERS + SINGLES)
def test_a_weight_that_is_none_is_named(kind: str, gradients: bool) -> None:
    single = kind in SINGLES
    for name in ("weight_ih", "weight_hh") if single else ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        module, x = getattr(fusedrnn, kind)(3, 5), torch.randn(*(() if single else (4,)), 2, 3)
        for called in (False, True):
            if called:
                setattr(module, name, getattr(fusedrnn, kind)(3, 5).get_parameter(name))
                module(x)
            setattr(module, name, None)
            with torch.set_grad_enabled(gradients), pytest.raises(TypeError, match=f"{name} must be a tensor, got N"):
                module(x)
    if not single:
        module._flat_weights = module._flat_weights[:1]
        with pytest.raises(RuntimeError, match="must have 4 weights, weight_ih_l0, weight_hh_l0, bias.*, got 1"):
            module(x)


@pytest.mark.parametrize("gone", ["bias_ih", "bias_hh"])
@pytest.mark.parametrize("kind", SINGLES)
def test_a_cell_with_one_bias_alone(kind: str, gone: str) -> None:
    """As torch.nn's: the other is zero."""
    theirs, ours = getattr(nn, kind)(3, 5).double(), getattr(fusedrnn, kind)(3, 5).double()
    ours.load_state_dict(theirs.state_dict())
    found = []
    for module in (theirs, ours):
        setattr(module, gone, None)
        x = torch.linspace(-1, 1, 6).double().view(2, 3).requires_grad_()
        h = torch.linspace(1, -1, 10).double().view(2, 5)
        result = module(x, (h, h) if kind == "LSTMCell" else h)
        total = sum(r.square().sum() for r in (result if isinstance(result, tuple) else (result,)))
        found.append([total, *torch.autograd.grad(total, [x, *module.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_inputs_that_are_not_dense() -> None:
    x = torch.randn(4, 2, 3)
    sparse, nested = x.to_sparse(), torch.nested.nested_tensor([x[0], x[1]])
    for call in (
        lambda: fusedrnn.GRU(3, 5)(sparse), lambda: fusedrnn.LSTM(3, 5)(nested),
        lambda: fusedrnn.GRUCell(3, 5)(x[0].to_sparse()),
        lambda: fusedrnn.GRU(3, 5)(x, torch.zeros(1, 2, 5).to_sparse()),
    ):  # fmt: skip
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients), pytest.raises(NotImplementedError, match="must be dense tensors"):
                call()


def test_a_mode_that_is_none() -> None:
    def run(namespace: Any) -> None:
        module = namespace.RNN(3, 5)
        module.mode = "FOO"
        module(torch.randn(4, 2, 3))

    assert_same_error(lambda: run(fusedrnn), lambda: run(nn))


@pytest.mark.parametrize("lengths", [{1, 2}, [None, 1], "ab", [1.5, 2.0]], ids=repr)
def test_lengths_that_are_none(lengths: Any) -> None:
    with pytest.raises(TypeError, match="lengths must be integers"):
        fusedrnn.GRU(3, 5)(torch.randn(4, 2, 3), lengths=lengths)
