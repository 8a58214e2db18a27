"""Tensors without values, on the meta device or while a compiler traces: what does not fit raises as the kernel does.

``csrc/layer.cpp`` has the checks, ``fusedrnn/layer/ops.py`` those of them that need no values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import TWINS, beside, several
from torch import Tensor

import fusedrnn
from fusedrnn.cells import CELLS

T, B, I, H = 4, 2, 3, 5
Arguments = dict[str, Any]


def arguments(cell: str, *, bidirectional: bool = False, projected: bool = False, packed: bool = False) -> Arguments:
    """Of layer_forward, all right."""
    options = {"proj_size": 2} if projected else {}
    module = TWINS[cell].layer(I, H, bidirectional=bidirectional, **options)
    D, R = 1 + bidirectional, 2 if projected else H
    return {
        "x": torch.randn(T * B, I) if packed else torch.randn(T, B, I),
        "batch_sizes": torch.full((T,), B) if packed else None,
        "h0": torch.randn(D, B, R),
        "c0": torch.randn(D, B, beside(cell) * H) if several(cell) else None,
        "weights": [w.detach() for w in module._flat_weights],
        "cell": cell,
        "bidirectional": bidirectional,
    }


def on_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    return [on_meta(item) for item in value] if isinstance(value, list) else value


def called(a: Arguments, meta: bool) -> tuple[str, str] | list[torch.Size]:
    """What the forward op gives: an error's type and text, or the shapes."""
    if meta:
        a = {name: value if name == "batch_sizes" else on_meta(value) for name, value in a.items()}
    try:
        results = torch.ops.fusedrnn.layer_forward(*a.values(), True)
    except Exception as error:  # whatever it is
        return type(error).__name__, str(error)
    return [t.shape for t in results]


def weight(i: int, change: Callable[[Tensor], Tensor]) -> Callable[[Arguments], None]:
    def apply(a: Arguments) -> None:
        a["weights"][i] = change(a["weights"][i])

    return apply


def tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Arguments], None]:
    return lambda a: a.update({name: change(a[name])})


CHANGES: dict[str, Callable[[Arguments], None]] = {
    "none": lambda a: None,
    "a wider w_ih": weight(0, lambda w: torch.randn(len(w), I + 1)),
    "a longer w_ih": weight(0, lambda w: torch.randn(len(w) + 1, I)),
    "a narrower w_hh": weight(1, lambda w: w[..., :-1]),
    "a longer w_hh": weight(1, lambda w: torch.cat([w, w])),
    "a w_hh of one row too many": weight(1, lambda w: torch.cat([w, w[:1]])),
    "a w_hh of one dimension": weight(1, lambda w: w[0]),
    "no w_hh": weight(1, lambda w: w[:0]),
    "a short bias": weight(2, lambda w: w[:-1]),
    "a square bias": weight(3, lambda w: w[None]),
    "the last weight of another width": weight(-1, lambda w: torch.cat([w, w], -1)),
    "another dtype": weight(0, Tensor.double),
    "weights missing": lambda a: a["weights"].pop(),
    "one weight": lambda a: a.update(weights=a["weights"][:1]),
    "more weights": lambda a: a.update(weights=a["weights"] * 2),
    "h0 of other samples": tensor("h0", lambda h: torch.cat([h, h], 1)),
    "h0 of other layers": tensor("h0", lambda h: torch.cat([h, h])),
    "h0 of one dimension less": tensor("h0", lambda h: h[0]),
    "h0 of another dtype": tensor("h0", Tensor.double),
    "x without a dimension": tensor("x", lambda x: x[0]),
    "x with one more": tensor("x", lambda x: x[None]),
    "a wider x": tensor("x", lambda x: torch.cat([x, x], -1)),
    "no steps": lambda a: a.update({n: a[n] if a[n] is None else a[n][:0] for n in ("x", "batch_sizes")}),
}
SIZES = {
    "too few": [2, 2, 2], "too many": [2, 2, 2, 2, 2], "rising": [1, 2, 2, 3], "zero": [4, 4, 0], "negative": [9, -1],
    "none": [],
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"projected": True}, {"packed": True}], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_what_does_not_fit_raises_as_the_kernel(cell: str, options: dict[str, bool], change: str) -> None:
    if options.get("projected") and not CELLS[cell].projectable:
        options = {}
    a = arguments(cell, **options)
    CHANGES[change](a)
    expected, found = called(a, meta=False), called(a, meta=True)
    assert isinstance(found, list) == (change == "none")
    if "dtype" in change:  # C++ names it without torch's prefix
        expected, found = ((kind, text.partition(" of the input, ")[0]) for kind, text in (expected, found))
    assert found == expected


@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU", "ResidualRNN"])
def test_modules_on_the_meta_device(name: str) -> None:
    module = getattr(fusedrnn, name)(I, H, device="meta")
    x = torch.empty(T, B, I, device="meta")
    assert module(x)[0].shape == module(x, lengths=[4, 1])[0].shape == (T, B, H)
    packed = torch.nn.utils.rnn.PackedSequence(torch.empty(3, I, device="meta"), torch.tensor([2, 1]))
    y, last = module(packed)
    assert y.data.shape == (3, H) and (last[0] if name == "LSTM" else last).shape == (1, 2, H)
    module.weight_ih_l0 = torch.nn.Parameter(torch.empty(len(module.weight_ih_l0), I + 1, device="meta"))
    with pytest.raises(RuntimeError, match=rf"w_ih must have shape \[\d+, {I}\], got \[\d+, {I + 1}\]"):
        module(x)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_lengths_and_resets_need_values(device: str) -> None:
    module, x = fusedrnn.GRU(I, H, device=device), torch.empty(T, B, I, device=device)
    for given in ({"lengths": torch.tensor([4, 2])}, {"reset": torch.zeros(T, B, dtype=torch.bool)}):
        assert module(x, **given)[0].shape == (T, B, H)
        ((name, value),) = given.items()
        with pytest.raises(ValueError, match=f"{name} must have values.*: got a tensor on the meta device"):
            module(x, **{name: value.to("meta")})


@pytest.mark.parametrize("sizes", SIZES)
def test_packed_batches_on_the_meta_device(sizes: str) -> None:
    a = arguments("gru", packed=True)
    a["batch_sizes"] = torch.tensor(SIZES[sizes], dtype=torch.int64)
    (kind, expected), (found_kind, found) = called(a, meta=False), called(a, meta=True)
    assert found_kind == kind and found.partition(",")[0] == expected.partition(",")[0]
    for other in (torch.full((T,), B, dtype=torch.int32), torch.full((1, T), B)):
        a["batch_sizes"] = other
        for meta in (False, True):
            assert "batch_sizes must be a 1-D int64 tensor on the CPU" in called(a, meta)[1]


@torch._dynamo.config.patch(allow_rnn=True, capture_scalar_outputs=True)
def test_sizes_that_a_compiler_does_not_know() -> None:
    """Equal when it runs, though they come from data: the kernel's to check."""
    module, cell, x, h = fusedrnn.GRU(I, H), fusedrnn.GRUCell(I, H), torch.randn(7, 4, I), torch.randn(1, 4, H)

    def some_samples(x: Tensor, n: Tensor) -> Any:
        x = x[:, : int(n)]
        return module(x, x.new_zeros(1, x.size(1), H))

    def some_rows(x: Tensor, n: Tensor) -> Any:
        x = x[0, : int(n)]
        return cell(x, x.new_zeros(x.size(0), H))

    for function in (some_samples, some_rows):
        for n in (3, 2):
            torch._dynamo.reset()
            compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(compiled(x, torch.tensor(n)), function(x, torch.tensor(n)))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, h: module(x, h), backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x, h), module(x, h))
    torch.testing.assert_close(compiled(x[:, :3], h[:, :3]), module(x[:, :3], h[:, :3]))
    with pytest.raises(Exception, match="h0 must have shape|Expected hidden size"):
        compiled(x, h[:, :3])


def test_arguments_by_name_reach_the_fake_kernels() -> None:
    """torch puts them in their places."""
    a = {name: value if name == "batch_sizes" else on_meta(value) for name, value in arguments("lstm").items()}
    op, back = torch.ops.fusedrnn.layer_forward.default, torch.ops.fusedrnn.layer_backward.default
    keep = torch.empty(T, B, H, device="meta")
    y, _, _, saved = op(**a, save=True, keep_h=keep)
    given = {"dy": y, "dh_n": None, "dc_n": None, "dc": None, **a, "y": y, "saved": saved}
    *_, dgates, _, norms = back(**given, need_x=False, need_weights=False, need_norms=True, keep_h=keep)
    assert (dgates.shape[1], norms.shape) == (0, (1, T * B, 8))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert op(**a, save=True, keep_c=keep)[0].shape == (T, B, H)
