"""A property test: on any configuration, our layer and the reference agree on every output and every gradient.

The configurations are drawn by hypothesis: shapes from 1 to 130, layers, directions, projection, packing, strides of
the input, the states and the weights, frozen parameters, inputs that need no gradient, gradients of some outputs only,
1 and 2 threads. HYPOTHESIS_PROFILE=explore draws thousands at random.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from loops import FINALS, STATES, TWINS
from parity import DEVICE, Case, Results, packer, results, twin
from tolerances import assert_all_close
from torch import Tensor, nn

from fusedrnn.cells import CELLS

SIZE = st.one_of(st.integers(1, 9), st.sampled_from((15, 16, 17, 31, 33, 63, 65)), st.integers(1, 130))
# In float32 these differ from float64 without any error of ours: an argument of the ReLU rounds to the other side of
# zero; a residual state has no bound, and every step blows a rounding up (so its T is kept short in float64 too).
ROUGH = ("residual_rnn", *(cell for cell, twin in TWINS.items() if twin.kink))
WORK = 2_000_000  # multiply-adds of one product of the loop, W_hh h summed over T: keeps an example under a second


@dataclass(frozen=True)
class Draw:
    """One configuration. ``strides``, ``frozen`` and ``use`` name leaves and outputs."""

    case: Case
    strided: frozenset[str]
    frozen: frozenset[str]
    use: tuple[str, ...]
    steps: int | None
    threads: int


@st.composite
def draws(draw: st.DrawFn) -> Draw:
    """A configuration whose work is bounded by shortening T and B."""
    cell = draw(st.sampled_from(sorted(CELLS)))
    I, H = draw(SIZE), draw(SIZE)
    num_layers, bidirectional = draw(st.integers(1, 3)), draw(st.booleans())
    room = max(1, WORK // (H * (I + H) * num_layers))
    T = min(draw(SIZE), room, 30 if cell == "residual_rnn" else room)
    B = min(draw(SIZE), max(1, room // T))
    projectable = CELLS[cell].projectable and H > 1
    lengths = draw(st.none() | st.lists(st.integers(1, T), min_size=B, max_size=B))
    enforce_sorted = lengths is not None and draw(st.booleans())
    if lengths is not None:
        lengths[draw(st.integers(0, B - 1))] = T
        lengths = tuple(sorted(lengths, reverse=True) if enforce_sorted else lengths)
    case = Case(
        cell,
        T=T,
        B=B,
        I=I,
        H=H,
        num_layers=num_layers,
        bidirectional=bidirectional,
        bias=draw(st.booleans()),
        proj_size=draw(st.integers(0, H - 1)) if projectable else 0,
        batch_first=draw(st.booleans()),
        lengths=lengths,
        enforce_sorted=enforce_sorted,
        h0=draw(st.booleans()),
        dtype=torch.float64 if cell in ROUGH else draw(st.sampled_from((torch.float64, torch.float32))),
        seed=draw(st.integers(0, 1000)),
    )
    leaves = ["x", *(STATES if case.h0 else []), *(name for name, _ in case.module().named_parameters())]
    some = st.frozensets(st.sampled_from(leaves))
    frozen = draw(some)
    outputs = ["y", "h_n", *FINALS[1 : len(CELLS[cell].states)]]
    return Draw(
        case=case,
        strided=draw(some),
        frozen=frozen if len(frozen) < len(leaves) else frozenset(),
        use=tuple(draw(st.lists(st.sampled_from(outputs), min_size=1, unique=True))),
        steps=draw(st.none() | st.integers(1, T)),
        threads=draw(st.sampled_from((1, 2))),
    )


def strided(t: Tensor) -> Tensor:
    """The same values in every third element of a buffer of NaN, the first two dimensions exchanged in memory."""
    shape = (t.shape[1], t.shape[0], *t.shape[2:]) if t.dim() > 1 else t.shape
    buffer = t.new_full((*shape, 3), float("nan"))[..., 1]
    return (buffer.transpose(0, 1) if t.dim() > 1 else buffer).copy_(t.detach())


def leaves_of(drawn: Draw, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Results]:
    module = drawn.case.module().to(device)
    tensors = {name: t.detach().to(device) for name, t in drawn.case.tensors().items()}
    for name, parameter in list(module.named_parameters()):
        value = (strided(parameter) if name in drawn.strided else parameter.detach()).to(dtype)
        setattr(module, name, nn.Parameter(value, requires_grad=name not in drawn.frozen))
    for name, t in tensors.items():
        value = (strided(t) if name in drawn.strided else t.detach()).to(dtype)
        tensors[name] = value.requires_grad_(name not in drawn.frozen)
    return module, tensors


def run(
    drawn: Draw, call_of: Callable[[nn.Module], Callable], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Results:
    module, tensors = leaves_of(drawn, dtype, torch.device(device))
    call = call_of(module)

    def partial_output(x, hx):
        """Only the first steps of y take part in the loss."""
        y, last = call(x, hx)
        if drawn.steps is None or drawn.case.lengths is not None:
            return y, last
        return y[:, : drawn.steps] if drawn.case.batch_first else y[: drawn.steps], last

    return results(partial_output, tensors, dict(module.named_parameters()), pack=packer(drawn.case), use=drawn.use)


@pytest.mark.device
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture])
@given(drawn=draws())
def test_any_configuration(threads: Callable[[int], None], drawn: Draw) -> None:
    threads(1)
    expected = run(drawn, lambda module: twin(drawn.case.cell, module), torch.float64)
    threads(drawn.threads)
    found = run(drawn, lambda module: module, drawn.case.dtype, DEVICE)
    assert_all_close(found, expected, drawn.case.dtype)
