"""One case of a recurrent layer, and everything it computes by name: outputs, final states and every gradient.

A Case is a configuration with a seed. ``run_ours`` and ``run_twin`` return the same dictionary of names: y, h_n, c_n,
dx, dh0, dc0 and d<parameter>. The twin is torch.nn's module with the same Parameter objects, or the plain loop of
loops.py for a cell that torch.nn lacks. Ours runs on DEVICE, the twin on the CPU; the environment variable
FUSEDRNN_TEST_DEVICE names the device.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from loops import FINALS, STATES, TWINS, cell_loop, hx_of, layer_loop
from tolerances import assert_all_close
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn
from fusedrnn.cells import CELLS

Results = dict[str, Tensor]
DEVICE = torch.device(os.environ.get("FUSEDRNN_TEST_DEVICE", "cpu"))
EMULATED = fusedrnn._C.isa() in ("stepwise", "persistent")  # the GPU's time loop on the CPU, ten times slower
STEPWISE = DEVICE.type == "cuda" or EMULATED


@dataclass(frozen=True)
class Case:
    """A layer, its input and its initial states. ``lengths``: None for a padded tensor, else one length a sequence."""

    cell: str
    T: int = 3
    B: int = 2
    I: int = 4
    H: int = 5
    num_layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    proj_size: int = 0
    batch_first: bool = False
    lengths: tuple[int, ...] | None = None
    enforce_sorted: bool = False
    h0: bool = True
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def __str__(self) -> str:
        changed = [f"{k}={v}" for k, v in vars(self).items() if k != "cell" and v != getattr(Case, k)]
        return "-".join([self.cell, *changed]).replace("torch.", "").replace(" ", "")

    def options(self) -> dict[str, Any]:
        """The constructor arguments after input_size and hidden_size."""
        names = ("num_layers", "bidirectional", "bias", "batch_first", "dtype")
        return {name: getattr(self, name) for name in names} | ({"proj_size": self.proj_size} if self.proj_size else {})

    def module(self) -> nn.Module:
        """Our module, with the initial values of the seed."""
        torch.manual_seed(self.seed)
        return TWINS[self.cell].layer(self.I, self.H, **self.options())

    def tensors(self) -> Results:
        """Leaves x, h0 and c0, the same for the same seed in every dtype but for the rounding."""
        draw = torch.Generator().manual_seed(self.seed + 1)
        rows = self.num_layers * (2 if self.bidirectional else 1)
        shapes = {"x": (self.B, self.T, self.I) if self.batch_first else (self.T, self.B, self.I)}
        if self.h0:
            shapes["h0"] = (rows, self.B, self.proj_size or self.H)
            shapes |= dict.fromkeys(STATES[1 : len(CELLS[self.cell].states)], (rows, self.B, self.H))
        values = {name: torch.randn(shape, generator=draw, dtype=torch.float64) for name, shape in shapes.items()}
        if "n0" in values:  # it divides; where it is negative there is no state
            values["n0"] += values["n0"].sign() / 2
        return {name: value.to(self.dtype).requires_grad_() for name, value in values.items()}


def twin(cell: str, module: nn.Module) -> Callable[..., Any]:
    """The reference for ``module``: torch.nn's, holding the same Parameters, or the plain loop."""
    make = TWINS[cell].torch_layer if isinstance(module, nn.RNNBase) else TWINS[cell].torch_cell
    if make is None:
        return partial(layer_loop if isinstance(module, nn.RNNBase) else cell_loop, cell, module)
    names = ("num_layers", "bidirectional", "bias", "batch_first", "proj_size", "dropout")
    options = {name: value for name in names if (value := getattr(module, name, None))}
    reference = make(module.input_size, module.hidden_size, bias=options.pop("bias", False), **options)
    for name, parameter in module.named_parameters():
        setattr(reference, name, parameter)
    return reference.train(module.training)


def results(
    call: Callable[..., Any],
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    *,
    pack: Callable[[Tensor], PackedSequence] | None = None,
    use: Sequence[str] = ("y", *FINALS),
) -> Results:
    """Outputs of ``call(x, hx)`` and the gradient of every leaf that wants one.

    The loss is the sum over the outputs named in ``use`` of their product with fixed random numbers.
    """
    y, last = call(pack(tensors["x"]) if pack else tensors["x"], hx_of(tensors))
    last = last if isinstance(last, tuple) else (last,)
    found = dict(zip(("y", *FINALS), (y.data if isinstance(y, PackedSequence) else y, *last), strict=False))
    leaves = {name: leaf for name, leaf in {**tensors, **parameters}.items() if leaf.requires_grad}
    draw = torch.Generator().manual_seed(2)
    weights = {name: torch.randn(t.shape, generator=draw, dtype=torch.float64) for name, t in found.items()}
    used = [name for name in use if name in found and found[name].requires_grad]
    gradients = [torch.zeros_like(leaf) for leaf in leaves.values()]
    if used:
        outputs = [found[name] for name in used]
        cotangents = [weights[name].to(found[name]) for name in used]
        gradients = torch.autograd.grad(
            outputs, list(leaves.values()), cotangents, allow_unused=True, materialize_grads=True
        )
    named = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {name: t.detach().cpu() for name, t in (found | named).items()}


def packer(case: Case) -> Callable[[Tensor], PackedSequence] | None:
    """How the case packs its padded x; None if it does not."""
    if case.lengths is None:
        return None
    lengths = torch.tensor(case.lengths)
    return partial(
        pack_padded_sequence, lengths=lengths, batch_first=case.batch_first, enforce_sorted=case.enforce_sorted
    )


def run_ours(case: Case, **options) -> Results:
    """Everything our layer computes on the case."""
    return module_results(case.module(), case.tensors(), pack=packer(case), **options)


def module_results(module: nn.Module, tensors: Mapping[str, Tensor], **options) -> Results:
    """Everything our module computes from given inputs, on DEVICE."""
    module = copy.deepcopy(module).to(DEVICE)
    tensors = {name: t.detach().to(DEVICE).requires_grad_() for name, t in tensors.items()}
    return results(module, tensors, dict(module.named_parameters()), **options)


def run_twin(case: Case, dtype: torch.dtype | None = None, **options) -> Results:
    """Everything the reference computes on the case, in ``dtype`` from the values rounded to the case's own dtype."""
    return reference_results(
        case.cell, case.module(), case.tensors(), dtype or case.dtype, pack=packer(case), **options
    )


def reference_results(
    cell: str, module: nn.Module, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float64, **options
) -> Results:
    """What the reference computes in ``dtype`` from a module's weights as they are and from given inputs."""
    module = copy.deepcopy(module).to(dtype)
    tensors = {name: t.detach().to(dtype).requires_grad_() for name, t in tensors.items()}
    return results(twin(cell, module), tensors, dict(module.named_parameters()), **options)


def assert_parity(case: Case) -> None:
    """Ours in the case's dtype against the reference in float64, every output and every gradient.

    The derivative of ReLU jumps at 0: where 16 bits round an argument across it the gradient is another one, for
    torch.nn as for us. There only the outputs are compared; test_numerics.py compares the errors of the gradients.
    """
    found, expected = run_ours(case), run_twin(case, torch.float64)
    assert all(t.dtype == case.dtype for t in found.values())
    # So it is where a norm of few c that differ little magnifies what is rounded.
    if (TWINS[case.cell].kink or TWINS[case.cell].rounding > 1) and case.dtype.itemsize == 2:
        found, expected = ({name: r[name] for name in ("y", "h_n")} for r in (found, expected))
    # The state of the residual RNN grows with the steps, and so does what a product loses that takes it in 16 bits.
    margin = 4.0 if case.cell == "residual_rnn" else TWINS[case.cell].rounding
    assert_all_close(found, expected, case.dtype, margin if case.dtype.itemsize == 2 else 1.0)


def ragged(case: Case, *, sorted_lengths: bool = False) -> Case:
    """The case on a batch of unequal lengths, the longest of them T."""
    lengths = [case.T - b * max(1, case.T // 2) % case.T for b in range(case.B)]
    lengths = sorted(lengths, reverse=True) if sorted_lengths else lengths[::-1]
    return replace(case, lengths=tuple(lengths), enforce_sorted=sorted_lengths)
