"""What the kernels read and write is there: sizes that do not agree, memory that was freed beneath a tensor, missing
tensors and objects are errors, by every way into the kernels.
"""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import TWINS
from torch import Tensor, nn

import fusedrnn
from fusedrnn import _C
from fusedrnn.cells import CELLS

T, B, I, H = 3, 2, 4, 5
OPS = torch.ops.fusedrnn


def widened(module: nn.Module, layer: int, hidden: int) -> nn.Module:
    """With a layer of another H."""
    gates = module.weight_hh_l0.size(0) // module.hidden_size
    for name, columns in (("weight_ih", H), ("weight_hh", hidden)):
        setattr(module, f"{name}_l{layer}", nn.Parameter(torch.randn(gates * hidden, columns)))
    for name in ("bias_ih", "bias_hh"):
        setattr(module, f"{name}_l{layer}", nn.Parameter(torch.randn(gates * hidden)))
    return module


@pytest.mark.isa
@pytest.mark.parametrize("hidden", [1, 4096])
@pytest.mark.parametrize("cell", CELLS)
def test_layers_of_other_sizes(cell: str, hidden: int) -> None:
    """An upper layer larger or smaller than the first, whose sizes the final states have."""
    module, x = TWINS[cell].layer(I, H, num_layers=2), torch.randn(T, B, I)
    module.step(x[0])
    widened(module, 1, hidden)
    for call in (lambda: module(x), lambda: module.step(x[0]), lambda: module(x, return_states=True)):
        with pytest.raises(RuntimeError, match="w_hh must have one shape in all layers"):
            call()
    with torch.no_grad(), pytest.raises(RuntimeError, match="w_hh must have one shape in all layers"):
        module(x)
    weights = list(module._flat_weights)
    for h in (H, hidden):
        assert not _C.fits(x, None, weights, cell, (3, 2, 1, I, h, h))
        assert _C.infer(x, None, weights, cell, (3, 2, 1, I, h, h), _C.packed_weights()) is None
        assert _C.prepare_step(x[0], weights, cell, (2, 2, 1, I, h, h)) is None


@pytest.mark.parametrize("directions", [1, 2])
def test_states_of_a_single_step_are_those_of_one_layer(directions: int) -> None:
    layers = 2 // directions
    module = TWINS["gru"].layer(I, I, num_layers=layers, bidirectional=directions == 2)
    x, states, form = torch.randn(B, I), (torch.randn(B, I),), (2, layers, directions, I, I, I)
    assert not _C.fits(x, states, list(module._flat_weights), "gru", form)
    assert _C.infer(x, states, list(module._flat_weights), "gru", form, _C.packed_weights()) is None


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_weights_of_another_hidden_size(name: str) -> None:
    """torch.nn's RNN and GRU raise as well: the states that they make do not fit."""
    for cls in [getattr(fusedrnn, name)] + [getattr(nn, name)] * (name != "LSTM"):
        module = widened(cls(H, H), 0, 7)
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises(RuntimeError):
                module(torch.randn(T, B, H))
    for cls in (getattr(nn, f"{name}Cell"), getattr(fusedrnn, f"{name}Cell")):
        module = cls(H, H)
        for each in module._parameters.values():
            shape = [size // H * 7 for size in each.shape]
            each.data = torch.randn(shape if each is module.weight_hh else [shape[0], *each.shape[1:]])
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="inconsistent hidden_size"):
                module(torch.randn(B, H))


def arguments(cell: str = "lstm") -> dict[str, Any]:
    """What layer_backward takes, from a call of layer_forward."""
    module = TWINS[cell].layer(I, H)
    weights, x = [w.detach() for w in module.parameters()], torch.randn(T, B, I)
    states = [torch.randn(1, B, H) for _ in CELLS[cell].states]
    h0, c0 = states[0], torch.cat(states[1:], dim=-1) if states[1:] else None
    y, h_n, c_n, saved = OPS.layer_forward(x, None, h0, c0, weights, cell, False, True)
    dc_n = torch.ones_like(c_n) if len(states) > 1 else None
    return {
        "dy": torch.ones_like(y), "dh_n": torch.ones_like(h_n), "dc_n": dc_n, "dc": None, "x": x, "batch_sizes": None,
        "h0": h0, "c0": c0, "weights": weights, "y": y, "saved": saved, "cell": cell, "bidirectional": False,
        "need_x": True, "need_weights": True,
    }  # fmt: skip


def forward(given: dict[str, Any]) -> Any:
    names = ("x", "batch_sizes", "h0", "c0", "weights", "cell", "bidirectional")
    return OPS.layer_forward(*(given[name] for name in names), True)


def backward(given: dict[str, Any]) -> Any:
    return OPS.layer_backward(**given)


def emptied(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def cut_short(t: Tensor) -> Tensor:
    t = t.clone()
    t.untyped_storage().resize_(t.numel() * t.element_size() - 1)
    return t


@pytest.mark.parametrize("harm", [emptied, cut_short])
@pytest.mark.parametrize("op", [forward, backward])
def test_memory_that_is_not_there(op: Callable[[dict[str, Any]], Any], harm: Callable[[Tensor], Tensor]) -> None:
    for name, value in arguments().items():
        if op is forward and (name.startswith("d") or name in ("y", "saved")):
            continue
        given = arguments()
        if isinstance(value, Tensor):
            with pytest.raises(RuntimeError, match="needs a storage of"):
                op({**given, name: harm(value)})
        for i in range(len(value) if name == "weights" else 0):
            with pytest.raises(RuntimeError, match="needs a storage of"):
                op({**given, name: [harm(w) if i == j else w for j, w in enumerate(value)]})
        op(given)


@pytest.mark.parametrize("harm", [emptied, cut_short])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_weights_that_were_freed(name: str, harm: Callable[[Tensor], Tensor]) -> None:
    module, x = getattr(fusedrnn, name)(I, H), torch.randn(*((B,) if "Cell" in name else (T, B)), I)
    if "Cell" not in name:
        module.step(x[0])
    with torch.no_grad():
        module(x)
    weight = next(w for n, w in module.named_parameters() if n.startswith("weight_hh"))
    weight.data = harm(weight.data)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="needs a storage of"):
            module(x)
    if "Cell" not in name:
        with pytest.raises(RuntimeError, match="needs a storage of"):
            module.step(x[0])


@pytest.mark.parametrize("cell", CELLS)
def test_none_for_a_tensor(cell: str) -> None:
    given = arguments(cell)
    for name in ("x", "y", "saved"):
        with pytest.raises(RuntimeError, match=f"{'input' if name == 'x' else name} must be a tensor, got None"):
            backward({**given, name: None})
    with pytest.raises(RuntimeError, match="input must be a tensor, got None"):
        forward({**given, "x": None})


def test_lengths_on_the_meta_device() -> None:
    """They lead to the op's fake kernel, which computes nothing."""
    given = {**arguments(), "x": torch.randn(T * B, I), "batch_sizes": torch.full((T,), B, device="meta")}
    given |= {name: given[name].flatten(0, 1) for name in ("dy", "y")}
    for op in (forward, backward):
        with pytest.raises(RuntimeError, match="batch_sizes must be a 1-D int64 tensor on the CPU"):
            op(given)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("steps", "batch", "message"), [(2**40, 1, "can't allocate memory"), (2, 2**36, "memory for a tensor of sizes")]
)
def test_more_than_memory(steps: int, batch: int, message: str, grad: bool) -> None:
    """The list of steps, which we make; the results, which torch makes, and refuses by an error code."""
    x = torch.zeros(1, 1, I).expand(steps, batch, I)
    layer = fusedrnn.RNN(I, 512)
    with torch.set_grad_enabled(grad):
        with pytest.raises(RuntimeError, match=message):
            layer(x)
        layer(x[:3, :1])


def test_nothing_of_the_extension_can_be_made_by_hand() -> None:
    """What C++ holds is in capsules: no class, so no object that ``__init__`` has not seen."""
    assert not [name for name, value in vars(_C._fast).items() if inspect.isclass(value)]
    weights = arguments()["weights"]
    prepared, packed = _C.prepare_step(torch.randn(B, I), weights, "lstm", (2, 1, 1, I, H, H)), _C.packed_weights()
    with pytest.raises(TypeError, match="expected a capsule fusedrnn.Stepper"):
        _C.step(packed, torch.randn(B, I), None, weights)
    with pytest.raises(TypeError, match="expected a capsule fusedrnn.PackedWeights"):
        _C.packed_bytes(prepared)
    with pytest.raises(TypeError):
        _C.packed_bytes(object())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_calls_give_back_what_they_take() -> None:
    """Tensors, lists and optional ones go after a call that returned and after one that raised."""
    code = """
import torch, fusedrnn
from fusedrnn.layer.call import layer_backward, layer_forward
def memory():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
def calls(n):
    for _ in range(n):
        x, h0, mask = torch.randn(1, 1, 1 << 20), torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
        given = x, None, h0, None, [torch.randn(1, 1 << 20), torch.zeros(1, 1)]
        y, _, _, saved = layer_forward(*given, "rnn_tanh", False, True, mask)
        layer_backward(y, h0, None, None, *given, y, saved, "rnn_tanh", False, True, True, mask_h=mask)
        for wrong in ("none", "lstm"):
            try:
                layer_forward(*given, wrong, False, True, mask)
            except RuntimeError:
                continue
            raise AssertionError(wrong)
calls(10)
before = memory()
calls(100)
print((memory() - before) >> 20)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0 and int(result.stdout) < 40, result  # MiB; a tensor kept by each call: 400
