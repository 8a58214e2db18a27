"""What code in the wild does with these classes, each pattern seen in somebody's library."""

from __future__ import annotations

import copy

import pytest
import torch
from loops import TWINS, states_like
from parity import Case, results, twin
from tolerances import assert_all_close, assert_close
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn
from fusedrnn.cells import CELLS

LAYERS, SINGLES = ("RNN", "LSTM", "GRU"), ("RNNCell", "LSTMCell", "GRUCell")


@pytest.mark.parametrize("name", LAYERS)
def test_class_attributes_copied_onto_another_class(name: str) -> None:
    """A library copies all of ``LSTM.__dict__`` onto its own class: no method of the body may use bare super()."""
    ours = getattr(fusedrnn, name)
    left_out = ("__init__", "__dict__", "__weakref__", "__doc__", "__module__")
    body = {key: value for key, value in vars(ours).items() if key not in left_out}
    mode = {"LSTM": "LSTM", "GRU": "GRU", "RNN": "RNN_TANH"}[name]

    def construct(self, *args, **kwargs) -> None:
        nn.RNNBase.__init__(self, mode, *args, **kwargs)

    theirs = {key: value for key, value in vars(getattr(nn, name)).items() if key not in left_out}
    cls = type("Copied", (nn.RNNBase,), {**theirs, **body, "__init__": construct})
    module, x = cls(4, 5, num_layers=2), torch.randn(3, 2, 4)
    reference = ours(4, 5, num_layers=2)
    reference.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x), reference(x))
    assert repr(module).startswith("Copied(4, 5, num_layers=2")


@pytest.mark.parametrize("name", [*LAYERS, *SINGLES, "ResidualRNN"])
def test_every_class_has_a_docstring(name: str) -> None:
    """Libraries write ``__doc__ += nn.LSTM.__doc__`` at import."""
    assert len(vars(getattr(fusedrnn, name))["__doc__"]) > 40


@pytest.mark.parametrize("name", LAYERS)
def test_names_and_shapes_that_readers_ask_for(name: str) -> None:
    module = getattr(fusedrnn, name)(4, 5, 2, batch_first=True, bidirectional=True)
    reference = getattr(nn, name)(4, 5, 2, batch_first=True, bidirectional=True)
    assert module._all_weights == reference._all_weights
    keys = ("mode", "num_layers", "bias", "batch_first", "bidirectional", "proj_size", "dropout", "hidden_size")
    assert [getattr(module, key) for key in keys] == [getattr(reference, key) for key in keys]
    assert [w.shape for w in module._flat_weights] == [w.shape for w in reference._flat_weights]
    for _ in range(2):
        module.flatten_parameters()
        module(torch.zeros(2, 3, 4))


def test_initialisers_that_ask_for_the_class() -> None:
    """By isinstance, by name of the parameter, by slices of a gate."""
    model = nn.Sequential(fusedrnn.LSTM(4, 5), nn.Linear(5, 2))
    for module in model.modules():
        if isinstance(module, nn.LSTM):
            for name, parameter in module.named_parameters():
                if "weight_hh" in name:
                    nn.init.orthogonal_(parameter)
                elif "weight_ih" in name:
                    nn.init.xavier_uniform_(parameter)
                else:
                    nn.init.zeros_(parameter)
                    parameter.data[5:10] = 1.0
    reference = nn.LSTM(4, 5)
    reference.load_state_dict(model[0].state_dict())
    assert (reference.bias_ih_l0 == torch.tensor([0.0, 1.0, 0.0, 0.0]).repeat_interleave(5)).all()
    x = torch.randn(3, 2, 4)
    torch.testing.assert_close(model[0](x), reference(x))


@pytest.mark.parametrize("cell", CELLS)
def test_one_zero_tensor_as_every_state(cell: str) -> None:
    """The same tensor as h and c, with a gradient that is the sum of both."""
    case = Case(cell, T=4, B=3)
    module, x = case.module(), case.tensors()["x"]
    found = []
    for call in (module, twin(cell, module)):
        zero = torch.zeros(1, 3, 5, dtype=torch.float64, requires_grad=True)
        y, _ = call(x, states_like(cell, zero))
        found.append([y, *torch.autograd.grad(y.pow(2).sum(), [x, zero, *module.parameters()])])
    for ours, theirs in zip(*found, strict=True):
        assert_close("zero", ours, theirs)
    assert torch.equal(module(x, None)[0], found[0][0]) and torch.equal(module(x, hx=None)[0], found[0][0])


@pytest.mark.parametrize("cell", CELLS)
def test_states_of_one_layer_start_another(cell: str) -> None:
    """An encoder and a decoder, and the states carried over a cut of the sequence, with and without detach."""
    encoder, decoder = Case(cell).module(), Case(cell, seed=1).module()
    parameters = {f"{n}{k}": p for k, m in enumerate((encoder, decoder)) for n, p in m.named_parameters()}

    def chained(first, second):
        def run(x: Tensor, hx):
            _, state = first(x, hx)
            y, state = second(x, state)
            return second(y[..., :4].contiguous(), state)

        return run

    found = results(chained(encoder, decoder), Case(cell).tensors(), parameters)
    assert_all_close(
        found, results(chained(twin(cell, encoder), twin(cell, decoder)), Case(cell).tensors(), parameters)
    )


@pytest.mark.parametrize("cell", CELLS)
def test_target_network_by_functional_call(cell: str) -> None:
    """A slow copy of the weights, moved towards the fast ones in place, run through the same module."""
    module = Case(cell).module()
    target = {name: p.detach().clone() for name, p in module.named_parameters()}
    x = Case(cell).tensors()["x"].detach()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1)
        torch._foreach_lerp_(list(target.values()), list(module.parameters()), 0.5)
    reference = Case(cell).module()
    reference.load_state_dict(target)
    with torch.no_grad():
        assert torch.equal(functional_call(module, target, (x,))[0], reference(x)[0])


@pytest.mark.parametrize("name", LAYERS)
def test_data_parallel_replicas(name: str) -> None:
    """What replicate() does to each module: a replica without Parameters, its weights set as plain tensors."""
    module = getattr(fusedrnn, name)(4, 5, num_layers=2, dtype=torch.float64)
    replica = module._replicate_for_data_parallel()
    weights = {key: p.clone() for key, p in module.named_parameters()}
    for key, weight in weights.items():
        setattr(replica, key, weight)
    x = torch.randn(3, 2, 4, dtype=torch.float64)
    expected = module(x)[0]
    y = replica(x)[0]
    assert torch.equal(y, expected)
    y.sum().backward()
    other = copy.deepcopy(module)
    other.zero_grad()
    other(x)[0].sum().backward()
    for key, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, other.get_parameter(key).grad)


def test_projection_to_one_unit() -> None:
    case = Case("lstm", T=5, B=3, H=9, proj_size=1, bidirectional=True, num_layers=2)
    module = case.module()
    parameters = dict(module.named_parameters())
    assert_all_close(
        results(module, case.tensors(), parameters), results(twin("lstm", module), case.tensors(), parameters)
    )


@pytest.mark.parametrize("cell", CELLS)
def test_acting_in_inference_mode_then_learning(cell: str) -> None:
    """T = 1, states handed on, in inference mode; afterwards the same module trains on what was seen."""
    case = Case(cell, T=6, B=2)
    module, x, state, seen = case.module(), case.tensors()["x"].detach(), None, []
    with torch.inference_mode():
        for row in x:
            y, state = module(row[None], state)
            seen.append(y)
    y, _ = module(x)
    assert_close("y", torch.cat(seen).clone(), y.detach())
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("cell", CELLS)
def test_packed_in_a_model_with_sorting_by_hand(cell: str) -> None:
    """Sort by length, pack, run, unpack, unsort: the old way, and enforce_sorted=False, agree."""
    case = Case(cell, T=5, B=4)
    module, x = case.module(), case.tensors()["x"].detach()
    lengths = torch.tensor([2, 5, 1, 4])
    order = lengths.argsort(descending=True)
    y, by_hand = module(pack_padded_sequence(x[:, order], lengths[order]))
    _, automatic = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
    by_hand, automatic = ((s,) if isinstance(s, Tensor) else s for s in (by_hand, automatic))
    for a, b in zip(by_hand, automatic, strict=True):
        assert torch.equal(a[:, order.argsort()], b)
    assert y.data.shape == (12, 5)


@pytest.mark.parametrize("name", LAYERS)
def test_built_by_name(name: str) -> None:
    """``getattr(torch.nn, name)`` with fusedrnn in the place of torch.nn."""
    module = getattr(fusedrnn, name)(4, 5, 2, batch_first=True)
    assert module(torch.zeros(2, 3, 4))[0].shape == (2, 3, 5)
    assert {name for name in (*LAYERS, *SINGLES)} <= set(fusedrnn.__all__)


@pytest.mark.parametrize("name", [*LAYERS, *SINGLES])
def test_names_of_torch_given_to_our_classes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.nn.GRU = fusedrnn.GRU``, and a library that makes, prints and derives from it."""
    monkeypatch.setattr(nn, name, getattr(fusedrnn, name))
    module = getattr(nn, name)(4, 5)
    derived = type("Derived", (getattr(nn, name),), {})(4, 5)
    derived.load_state_dict(module.state_dict())
    assert repr(module) == f"{name}(4, 5)" and repr(derived) == "Derived(4, 5)"
    x = torch.randn(3, 4)
    with fusedrnn.patch_torch():
        torch.testing.assert_close(derived(x), module(x))


@pytest.mark.parametrize("cell", CELLS)
def test_gradient_clipping_and_foreach_optimizers(cell: str) -> None:
    torch.manual_seed(0)
    module = TWINS[cell].layer(4, 5, num_layers=2)
    before = [p.detach().clone() for p in module.parameters()]
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, foreach=True)
    (module(torch.randn(3, 2, 4))[0] * 100).pow(2).sum().backward()
    norm = nn.utils.clip_grad_norm_(module.parameters(), 1.0, foreach=True)
    assert norm > 1.0
    clipped = nn.utils.get_total_norm([p.grad for p in module.parameters()])
    torch.testing.assert_close(clipped, torch.tensor(1.0), rtol=1e-4, atol=0)
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(module.parameters(), before, strict=True))
