"""The command ``python -m benchmarks.works_with``: parts of PyTorch, each tried on torch.nn's layers and on ours.

A row is a small program that raises where something does not work or gives a wrong number. The command prints what
came; ``--readme`` puts it into a page. CPU only.
"""

from __future__ import annotations

import argparse
import atexit
import copy
import io
import logging
import multiprocessing
import pickle
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
import torch.nn.utils.prune
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.utils import checkpoint
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import fusedrnn

from . import report

T, B, I, H = 5, 3, 4, 6
MODULES = {library.__name__: library for library in (nn, fusedrnn)}
Row = Callable[[ModuleType], None]
ROWS: dict[str, Row] = {}


def row(name: str) -> Callable[[Row], Row]:
    """Adds a program to ROWS."""

    def add(program: Row) -> Row:
        ROWS[name] = program
        return program

    return add


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (T, B)), I)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters()}


def loss(module: nn.Module, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(module, weights, (x,))[0].square().sum()


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def exact(module: nn.Module) -> nn.Module:
    """torch.nn's module of the name in float64, with the same weights: what numbers are compared with."""
    twin = getattr(nn, type(module).__name__)(I, H, num_layers=getattr(module, "num_layers", 1)).double()
    twin.load_state_dict(module.state_dict())
    return twin


def same_gradients(module: nn.Module, own: Tensor, gradients: Callable[..., Sequence[Tensor]]) -> None:
    """``gradients(module, x)`` against those of the exact module."""
    for found, expected in zip(gradients(module, own), gradients(exact(module), own.double()), strict=True):
        same(found.double(), expected)


def penalty(module: nn.Module, own: Tensor) -> tuple[Tensor, ...]:
    leaf = own.clone().requires_grad_()
    (dx,) = torch.autograd.grad(module(leaf)[0].square().sum(), leaf, create_graph=True)
    return torch.autograd.grad(dx.square().sum(), [leaf, *module.parameters()])


def gradients(module: nn.Module, own: Tensor) -> tuple[Tensor, ...]:
    leaf = own.clone().requires_grad_()
    return torch.autograd.grad(module(leaf)[0].square().sum(), [leaf, *module.parameters()])


@row("double backward")
def _(library: ModuleType) -> None:
    for name in ("LSTM", "GRU", "RNN"):
        same_gradients(getattr(library, name)(I, H), x(), penalty)


@row("backward in eval()")
def _(library: ModuleType) -> None:
    for name in ("LSTM", "GRU", "RNN"):
        same_gradients(getattr(library, name)(I, H).eval(), x(), gradients)


@row("vmap over inputs")
def _(library: ModuleType) -> None:
    for name in ("LSTM", "GRU", "RNN"):
        module, many = getattr(library, name)(I, H), x(7, T, B)
        same(vmap(module)(many)[0], torch.stack([module(one)[0] for one in many]))


@row("vmap over an ensemble of weights")
def _(library: ModuleType) -> None:
    for name in ("LSTM", "GRU", "RNN"):
        modules = [getattr(library, name)(I, H) for _ in range(4)]
        parameters, _ = stack_module_state(modules)
        own, base = x(), modules[0]
        found = vmap(lambda p, own=own, base=base: functional_call(base, p, (own,))[0])(parameters)
        same(found, torch.stack([module(own)[0] for module in modules]))


def per_sample(library: ModuleType, name: str) -> None:
    module, many = getattr(library, name)(I, H), x(7, T, 1)
    found = vmap(grad(loss, 1), (None, None, 0))(module, weights(module), many)
    expected = grad(loss, 1)(module, weights(module), many[2])
    for key, gradient in expected.items():
        same(found[key][2], gradient)


@row("per-sample gradients, `vmap(grad(...))`, LSTM")
def _(library: ModuleType) -> None:
    per_sample(library, "LSTM")


@row("the same, GRU and RNN")
def _(library: ModuleType) -> None:
    per_sample(library, "GRU")
    per_sample(library, "RNN")


def forward_mode(module: nn.Module) -> None:
    here, way = x(), x()
    _, found = jvp(lambda x: module(x)[0], (here,), (way,))
    same(found, (module(here + 0.01 * way)[0] - module(here - 0.01 * way)[0]) / 0.02)
    with torch.no_grad(), forward_ad.dual_level():
        same(forward_ad.unpack_dual(module(forward_ad.make_dual(here, way))[0]).tangent, found)


def second_derivatives(module: nn.Module) -> None:
    here = x(2, 1).double()

    def loss(x: Tensor) -> Tensor:
        return module(x)[0].square().sum()

    module = module.double()
    same(hessian(loss)(here), torch.func.jacfwd(torch.func.jacfwd(loss))(here))


@row("forward-mode AD, float32 LSTM")
def _(library: ModuleType) -> None:
    forward_mode(library.LSTM(I, H))


@row("forward-mode AD, GRU and RNN")
def _(library: ModuleType) -> None:
    forward_mode(library.GRU(I, H))
    forward_mode(library.RNN(I, H))


@row("`torch.func.hessian` in float64")
def _(library: ModuleType) -> None:
    for name in ("GRU", "RNN", "LSTM"):
        second_derivatives(getattr(library, name)(I, H))


def compiled(library: ModuleType, name: str, steps: Sequence[int]) -> int:
    """Trains compiled, with several T; how often Dynamo compiled."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    module = getattr(library, name)(I, H)
    with torch._dynamo.config.patch(allow_rnn=True):
        call = torch.compile(module, backend=counter, fullgraph=True)
        for T in steps:
            argument = x(T, B)
            found, expected = call(argument)[0], module(argument)[0]
            same(found, expected)
            first, second = (torch.autograd.grad(y.sum(), list(module.parameters())) for y in (found, expected))
            for a, b in zip(first, second, strict=True):
                same(a, b)
    return counter.frame_count


@row("`torch.compile(fullgraph=True)`, training (`torch._dynamo.config.allow_rnn = True`)")
def _(library: ModuleType) -> None:
    for name in ("GRU", "RNN", "LSTM"):
        compiled(library, name, (T,))


@row("the same, with another T each time and no more than two graphs")
def _(library: ModuleType) -> None:
    for name in ("GRU", "RNN", "LSTM"):
        count = compiled(library, name, (5, 8, 11, 6))
        assert count <= 2, f"{count} graphs for 4 lengths"


@row("`torch.export` with dynamic T and B")
def _(library: ModuleType) -> None:
    sizes = {0: torch.export.Dim("T"), 1: torch.export.Dim("B")}
    for name in ("GRU", "RNN", "LSTM"):
        module = getattr(library, name)(I, H)
        program = torch.export.export(module, (x(),), dynamic_shapes=(sizes,)).module()
        other = x(T + 2, B + 2)
        same(program(other)[0], module(other)[0])


@row("the same, with `pack_padded_sequence` and initial states")
def _(library: ModuleType) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = library.LSTM(I, H)

        def forward(self, x: Tensor, lengths: Tensor, h: Tensor, c: Tensor) -> Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
            return self.layer(packed, (h, c))[1][0]

    steps, batch = torch.export.Dim("T"), torch.export.Dim("B")
    sizes, model = ({0: steps, 1: batch}, {0: batch}, {1: batch}, {1: batch}), Model()
    states = torch.randn(2, 1, B, H).unbind()
    program = torch.export.export(model, (x(), torch.tensor([2, T, 1]), *states), dynamic_shapes=sizes).module()
    other = x(7, 2), torch.tensor([7, 4]), *torch.randn(2, 1, 2, H).unbind()
    same(program(*other), model(*other))


@row("ONNX with dynamic T and B (`torch.onnx.export(dynamo=True)`)")
def _(library: ModuleType) -> None:
    import onnxruntime

    sizes = {0: torch.export.Dim("T"), 1: torch.export.Dim("B")}
    table = fusedrnn.onnx.table() if library is fusedrnn else None
    for name in ("LSTM", "GRU", "RNN"):
        module, other = getattr(library, name)(I, H).eval(), x(T + 2, B + 2)
        program = torch.onnx.export(
            module, (x(),), dynamo=True, dynamic_shapes=(sizes,), custom_translation_table=table, verbose=False
        )
        model = program.model_proto.SerializeToString()
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        found = session.run(None, {session.get_inputs()[0].name: other.numpy()})
        same(torch.from_numpy(found[0]), module(other)[0].detach())


@row("autocast to bfloat16: every output in bfloat16")
def _(library: ModuleType) -> None:
    for module in (library.GRU(I, H), library.LSTM(I, H, proj_size=2), library.RNN(I, H), library.LSTM(I, H)):
        with torch.autocast("cpu", torch.bfloat16):
            y, last = module(x())
        types = {str(t.dtype) for t in (y, *(last if isinstance(last, tuple) else (last,)))}
        assert types == {"torch.bfloat16"}, f"{type(module).__name__}: {', '.join(sorted(types))}"
    module, own = library.GRU(I, H), x()
    with torch.autocast("cpu", torch.bfloat16):
        near(module(own)[0].detach(), exact(module)(own.double())[0].detach(), 5e-2)


@row("autocast to float16, on the CPU")
def _(library: ModuleType) -> None:
    for name in ("GRU", "RNN", "LSTM"):
        module, own = getattr(library, name)(I, H), x()
        with torch.autocast("cpu", torch.float16):
            y = module(own)[0]
        assert y.dtype == torch.float16, f"{name}: {y.dtype}"
        near(y.detach(), exact(module)(own.double())[0].detach(), 1e-2)
        y.float().sum().backward()
        assert all(p.grad.isfinite().all() for p in module.parameters())


@row("`swap_tensors` of a weight")
def _(library: ModuleType) -> None:
    module = library.LSTM(I, H)
    torch.utils.swap_tensors(module.weight_ih_l0, nn.Parameter(torch.ones(4 * H, I)))
    own = x()
    same(module(own)[0].detach(), exact(module)(own.double())[0].detach().float())


@row("`FlopCounterMode` counts the products")
def _(library: ModuleType) -> None:
    for name in ("GRU", "RNN", "LSTM"):
        module = getattr(library, name)(I, H)
        with FlopCounterMode(display=False) as counter:
            module(x())
        expected = 2 * T * B * (module.weight_ih_l0.numel() + module.weight_hh_l0.numel())
        assert counter.get_total_flops() == expected, f"{name}: {counter.get_total_flops()} of {expected}"


@row("deepcopy, pickle, `torch.save`")
def _(library: ModuleType) -> None:
    module, file, own = library.LSTM(I, H), io.BytesIO(), x()
    torch.save(module, file)
    file.seek(0)
    copies = copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)
    for other in copies:
        same(other(own)[0], module(own)[0])


@row("parametrizations (`weight_norm`, `spectral_norm`, `orthogonal`) and pruning")
def _(library: ModuleType) -> None:
    for change in (parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal):
        module, own = change(library.GRU(I, H), "weight_hh_l0").eval(), x()
        y = module(own)[0]
        y.sum().backward()
        assert all(p.grad is not None for p in module.parameters())
        plain = nn.GRU(I, H).double()
        with torch.no_grad():
            for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
                getattr(plain, name).copy_(getattr(module, name))
        same(y.detach(), plain(own.double())[0].detach().float())
    module = nn.utils.prune.random_unstructured(library.GRU(I, H), "weight_hh_l0", 0.5)
    module(x())[0].sum().backward()
    assert not module.weight_hh_l0_orig.grad[module.weight_hh_l0_mask == 0].any()


@row("the meta device, then `load_state_dict(assign=True)`")
def _(library: ModuleType) -> None:
    module, own = library.LSTM(I, H), x()
    with torch.device("meta"):
        other = library.LSTM(I, H)
        assert other(x())[0].shape == (T, B, H)
    other.load_state_dict(module.state_dict(), assign=True)
    same(other(own)[0], module(own)[0])


@row("activation checkpointing, both kinds")
def _(library: ModuleType) -> None:
    module = library.LSTM(I, H, num_layers=2, dropout=0.5)
    for reentrant in (False, True):
        found = []
        for call in (module, lambda x, r=reentrant: checkpoint.checkpoint(module, x, use_reentrant=r)):
            torch.manual_seed(0)
            leaf = x().requires_grad_()
            call(leaf)[0].square().sum().backward()
            found.append(leaf.grad)
        same(*found)


@row("anomaly and deterministic mode")
def _(library: ModuleType) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.detect_anomaly():
            same_gradients(library.LSTM(I, H), x(), gradients)
    finally:
        torch.use_deterministic_algorithms(before)


@row("a `GradScaler` loop in float16, on the CPU")
def _(library: ModuleType) -> None:
    module, own, scaler = library.GRU(I, H), x(), torch.amp.GradScaler("cpu", init_scale=2.0**24)
    optimizer, losses = torch.optim.Adam(module.parameters(), lr=0.02), []
    for _ in range(30):
        with torch.autocast("cpu", torch.float16):
            error = (module(own)[0] - 0.5).square().mean()
        scaler.scale(error).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(error.item())
    assert losses[-1] < losses[0] / 4, f"from {losses[0]} to {losses[-1]}"


@row("one module in four Python threads")
def _(library: ModuleType) -> None:
    module, inputs = library.GRU(I, H), [x() for _ in range(4)]

    def gradients(x: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(module(x)[0].square().sum(), list(module.parameters())))

    with ThreadPoolExecutor(4) as pool:
        for found, one in zip(pool.map(gradients, inputs * 8), inputs * 8, strict=True):
            for a, b in zip(found, gradients(one), strict=True):
                same(a, b)


def collate(library: str, samples: list[Tensor]) -> Tensor:
    return MODULES[library].LSTM(I, H)(torch.stack(samples, 1))[0].detach()


@row("DataLoader workers that are forked and use the layer")
def _(library: ModuleType) -> None:
    library.LSTM(I, H)(torch.randn(50, 64, I))[0].sum().backward()  # the parent's threads exist
    samples, use = [x(T) for _ in range(8)], partial(collate, library.__name__)
    loader = DataLoader(
        samples, B, num_workers=2, collate_fn=use, multiprocessing_context="fork", timeout=60, drop_last=True
    )
    assert [y.shape for y in loader] == [(T, B, H)] * 2


def join(rank: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{file}", timedelta(minutes=1), 2, rank)


@cache
def two_processes() -> Callable[..., list[Tensor]]:
    """A function that calls another in two processes of one gloo group, with the rank last."""
    folder, context = tempfile.mkdtemp(), multiprocessing.get_context("spawn")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    pools = [ProcessPoolExecutor(1, context, join, (rank, f"{folder}/store")) for rank in range(2)]
    return lambda function, *args: [
        future.result(60) for future in [pool.submit(function, *args, rank) for rank, pool in enumerate(pools)]
    ]


def train(model: nn.Module, rank: int | None) -> Tensor:
    """The loss after each of some steps, on every second sample or on all."""
    torch.manual_seed(1)
    batch = x(T, 4)
    batch = batch if rank is None else batch[:, rank::2]
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.05), []
    for _ in range(4):
        error = model(batch)[0].square().mean()
        losses.append(error.detach())
        error.backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses)


def seeded(library: str) -> nn.Module:
    torch.manual_seed(0)
    return MODULES[library].LSTM(I, H, num_layers=2, bidirectional=True)


def train_ddp(library: str, rank: int) -> Tensor:
    return train(DistributedDataParallel(seeded(library)), rank)


def train_fsdp(library: str, rank: int) -> Tensor:
    return train(fully_shard(seeded(library)), rank)


@row("DistributedDataParallel in two processes (gloo)")
def _(library: ModuleType) -> None:
    same(sum(two_processes()(train_ddp, library.__name__)) / 2, train(seeded(library.__name__), None))


@row("FSDP2 (`fully_shard`) in two processes (gloo)")
def _(library: ModuleType) -> None:
    same(sum(two_processes()(train_fsdp, library.__name__)) / 2, train(seeded(library.__name__), None))


@row("`torch.fx.symbolic_trace` of a model with a layer")
def _(library: ModuleType) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = library.LSTM(I, H), nn.Linear(H, 2)

        def forward(self, x: Tensor, hx: tuple[Tensor, Tensor]) -> Tensor:
            y, (h_n, _) = self.layer(x, hx)
            return self.head(y) + h_n.sum()

    model, given = Model(), (x(), torch.randn(2, 1, B, H).unbind())
    model.layer.register_forward_hook(lambda module, args, outputs: (outputs[0] * 2, outputs[1]))
    same(torch.fx.symbolic_trace(model)(*given), model(*given))


@row("`torch.jit.trace` in inference")
def _(library: ModuleType) -> None:
    with torch.no_grad():
        module, other = library.GRU(I, H), x(T + 2, B)
        same(torch.jit.trace(module, (x(),))(other)[0], module(other)[0])


@row("`torch.jit.script`; `torch.jit.trace` with gradients")
def _(library: ModuleType) -> None:
    torch.jit.trace(library.GRU(I, H), (x(),))
    torch.jit.script(library.GRU(I, H))


def outcome(program: Row, library: ModuleType) -> str:
    """``yes``, or why not in a line."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program(library)
        except Exception as error:  # whatever torch raises is the reading
            first = next((line for line in str(error).splitlines() if line.strip()), "")
            return f"{type(error).__name__}: {first.strip()}"
    return "yes"


def readings() -> dict[str, tuple[str, str]]:
    """Of torch.nn and of fusedrnn, by row."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # the exporter tells what packages it misses
    return {name: (outcome(program, nn), outcome(program, fusedrnn)) for name, program in ROWS.items()}


def markdown(found: dict[str, tuple[str, str]]) -> str:
    """The table for docs/works-with.md."""

    def cell(text: str) -> str:
        text = re.sub(r"\s+", " ", text).replace("|", "/")
        short = text if len(text) <= 90 else text[:87] + "..."
        return short if short == "yes" else f"no: `{short}`"

    lines = [f"| with torch {torch.__version__.partition('+')[0]} | torch.nn | fusedrnn |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {cell(a)} | {cell(b)} |" for name, (a, b) in found.items())]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.works_with", description=__doc__.splitlines()[0])
    parser.add_argument("--readme", type=Path, metavar="FILE", help="put the table between the markers of this file")
    args = parser.parse_args(argv)
    text = markdown(readings())
    sys.stdout.write(text)
    if args.readme:
        report.update_readme(args.readme, text, "works with")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
