"""What a GPU alone can show: graphs, streams, no waiting for the device, cuDNN's limits and errors beside ours.

The numbers of every layer are checked on the GPU by the tests marked ``isa``, under FUSEDRNN_TEST_DEVICE=cuda; this
file is marked ``cuda`` and needs no setting. Tests named ``small`` are what compute-sanitizer runs.
"""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loops import TWINS
from parity import Case, packer
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fusedrnn
from benchmarks.gpu.timing import tf32
from fusedrnn.cells import CELLS
from fusedrnn.layer.ops import KERNEL_DTYPES

AVAILABLE = "cuda" in KERNEL_DTYPES and torch.cuda.is_available()
REASON = "no GPU" if "cuda" in KERNEL_DTYPES else "this build has no CUDA kernels"
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not AVAILABLE, reason=REASON)]
CUDA = torch.device("cuda")
ROOT = Path(__file__).parent.parent
HALF = (torch.float16, torch.bfloat16)


def leaves(case: Case) -> tuple[nn.Module, list[Tensor], tuple[Tensor, ...] | Tensor]:
    """The module of a case on the GPU; its input and parameters; its initial states."""
    module = case.module().to(CUDA)
    x, *states = (t.detach().to(CUDA).requires_grad_() for t in case.tensors().values())
    return module, [x, *states, *module.parameters()], tuple(states) if len(states) > 1 else states[0]


def gradients(
    module: nn.Module,
    wanted: list[Tensor],
    hx: tuple[Tensor, ...] | Tensor | None,
    pack: Callable[[Tensor], PackedSequence] | None = None,
) -> list[Tensor]:
    """The output, and the gradients of half the sum of its squares."""
    y, _ = module(pack(wanted[0]) if pack else wanted[0], hx)
    y = y.data if pack else y
    return [y, *torch.autograd.grad(y.square().sum() / 2, wanted)]


@pytest.mark.parametrize("plan", ["stepwise", "persistent"])
@pytest.mark.parametrize("cell", CELLS)
def test_small_layers(cell: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEDRNN_CUDA_PLAN", plan)
    for dtype in KERNEL_DTYPES["cuda"]:
        found = gradients(*leaves(Case(cell, T=3, B=2, I=5, H=9, bidirectional=True, dtype=dtype)))
        assert all(t.isfinite().all() for t in found)
    if CELLS[cell].projectable:
        assert all(t.isfinite().all() for t in gradients(*leaves(Case(cell, T=3, proj_size=2, bidirectional=True))))


#: By the plan an LSTM in float32 takes two blocks from H = 65 and eight from 129, in bfloat16 four from 129.
CLUSTERS = ("lstm", "gru", "rnn_tanh")


@pytest.mark.parametrize("cell", CLUSTERS)
def test_small_batches_in_clusters(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the sanitizers: few steps, many blocks."""
    monkeypatch.setenv("FUSEDRNN_CUDA_PLAN", "persistent")
    for dtype, H in ((torch.float32, 200), (torch.bfloat16, 500)):
        case = Case(cell, T=2, B=9, I=5, H=H, bidirectional=True, dtype=dtype)
        assert all(t.isfinite().all() for t in gradients(*leaves(case)))


@pytest.mark.parametrize("H", [200, 250, 256, 512, 1000])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32, "tf32"], ids=str)
@pytest.mark.parametrize("cell", CLUSTERS)
def test_clusters_agree_with_float64(cell: str, dtype: torch.dtype | str, H: int) -> None:
    """The kernels for many steps, of up to 8 blocks: no further off than the steps one by one, over twice a rounding.
    Sizes that the plan has no cluster for go step by step, both times.
    """
    kind = torch.float32 if dtype == "tf32" else dtype
    case = Case(cell, T=6, B=19, I=33, H=H, dtype=kind, lengths=(6,) * 9 + (3,) * 10)
    ours, wanted, hx = leaves(case)
    states = 1 + len(CELLS[cell].states)
    exact = copy.deepcopy(ours).double().cpu()
    x, *h = (t.detach().double().cpu().requires_grad_() for t in wanted[:states])
    expected = gradients(exact, [x, *h, *exact.parameters()], tuple(h) if len(h) > 1 else h[0], packer(case))
    errors = {}
    for plan in ("stepwise", "persistent"):
        with pytest.MonkeyPatch.context() as patch, tf32(dtype == "tf32"):
            patch.setenv("FUSEDRNN_CUDA_PLAN", plan)
            found = gradients(ours, [*wanted[:states], *ours.parameters()], hx, packer(case))
        errors[plan] = [(a.double().cpu() - t).norm() / t.norm() for a, t in zip(found, expected, strict=True)]
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, "tf32": 2.0**-11, torch.float32: 2.0**-22}[dtype]
    for stepwise, persistent in zip(errors["stepwise"], errors["persistent"], strict=True):
        assert persistent <= 2 * stepwise + rounding


@pytest.mark.parametrize("cell", CELLS)
def test_the_same_bits_in_a_hundred_runs(cell: str) -> None:
    case = Case(cell, T=20, B=16, I=64, H=128, num_layers=2, bidirectional=True, dtype=torch.float32)
    arguments = leaves(case)
    first = gradients(*arguments)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(*arguments), strict=True))


@pytest.mark.parametrize("kind", ["bidirectional", "stacked", "projected"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_graph_replays_forward_and_backward(cell: str, kind: str) -> None:
    if kind == "projected" and not CELLS[cell].projectable:
        pytest.skip("torch.nn has no such projection")
    options = {"bidirectional": {"bidirectional": True}, "stacked": {"num_layers": 2}, "projected": {"proj_size": 3}}
    arguments = leaves(Case(cell, T=9, B=4, I=8, H=16, dtype=torch.float32, **options[kind]))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradients(*arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(*arguments)
    for seed in range(3):
        with torch.no_grad():
            arguments[1][0].copy_(torch.randn(arguments[1][0].shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        replayed = [t.clone() for t in captured]
        assert all(torch.equal(a, b) for a, b in zip(replayed, gradients(*arguments), strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_nothing_waits_for_the_device(cell: str) -> None:
    arguments = leaves(Case(cell, T=9, B=4, I=8, H=16, num_layers=2, dtype=torch.float32))
    gradients(*arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


MEASURED = """
import torch, fusedrnn
from pathlib import Path

def gradients():
    y = layer(x)[0]
    return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]

layer, x = fusedrnn.GRU(5, 41, device="cuda"), torch.randn(7, 3, 5, device="cuda", requires_grad=True)
file = Path(fusedrnn._C.choices_file())
torch.use_deterministic_algorithms(True)
expected = gradients()
torch.use_deterministic_algorithms(False)
graph = torch.cuda.CUDAGraph()
with torch.no_grad(), torch.cuda.graph(graph):
    layer(x)
assert not file.exists()
for found in (gradients(), gradients()):
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
_, *lines = file.read_text().splitlines()
assert [line.split("\\t")[1].split()[:3] for line in lines] == [["gru", "float32", p] for p in ("forward", "backward")]
assert all(line.endswith("\\t") for line in lines), lines  # nothing failed
"""


def test_a_way_is_measured_at_first_use(tmp_path: Path) -> None:
    """Not while torch is to be deterministic, nor while a graph is captured."""
    settings = {"FUSEDRNN_CUDA_PLAN": "auto", "XDG_CACHE_HOME": str(tmp_path), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED], cwd=ROOT, env=os.environ | settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_two_streams_at_once() -> None:
    arguments = leaves(Case("lstm", T=50, B=16, I=64, H=128, dtype=torch.float32))
    expected = gradients(*arguments)
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in range(2)], []
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(gradients(*arguments))
    torch.cuda.synchronize()
    for again in found:
        assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


def test_more_samples_than_a_grid_has_rows() -> None:
    layer, x = fusedrnn.GRU(1, 2, dtype=torch.float64), torch.randn(2, 70_000, 1, dtype=torch.float64)
    expected = gradients(layer, [x.requires_grad_(), *layer.parameters()], None)
    layer = copy.deepcopy(layer).to(CUDA)
    found = gradients(layer, [x.detach().to(CUDA).requires_grad_(), *layer.parameters()], None)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-9, atol=1e-9)


def test_more_steps_than_cudnn_takes() -> None:
    layer = fusedrnn.LSTM(4, 8, dtype=torch.float64)
    x = torch.randn(70_000, 2, 4, dtype=torch.float64)
    with torch.no_grad():
        expected = layer(x)[0]
        found = layer.to(CUDA)(x.to(CUDA))[0]
    assert (found.cpu() - expected).abs().max() < 1e-9


@pytest.mark.parametrize("cell", CELLS)
def test_backward_in_eval(cell: str) -> None:
    module, wanted, hx = leaves(Case(cell, dtype=torch.float32))
    found = gradients(module.eval(), wanted, hx)
    expected = gradients(module.train(), wanted, hx)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("cell", CELLS)
def test_double_backward(cell: str) -> None:
    """As on the CPU; cuDNN has none."""
    found = []
    for device in (CUDA, torch.device("cpu")):
        module, x = Case(cell).module().to(device), Case(cell).tensors()["x"].detach().to(device).requires_grad_()
        (dx,) = torch.autograd.grad(module(x)[0].pow(2).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.pow(2).sum(), [x, *module.parameters()], allow_unused=True))
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a.cpu(), b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("cell", CELLS)
def test_any_strides(cell: str) -> None:
    """A sliced, a transposed and an expanded input; a sliced and an expanded gradient."""
    module, _, hx = leaves(Case(cell, T=6, B=4, I=8, H=10, dtype=torch.float64))
    options = {"device": CUDA, "dtype": torch.float64}
    inputs = torch.randn(6, 4, 16, **options)[..., ::2], torch.randn(4, 6, 8, **options).transpose(0, 1)
    for view in (*inputs, torch.randn(6, 1, 8, **options).expand(6, 4, 8)):
        strided, whole = view.detach().requires_grad_(), view.detach().contiguous().requires_grad_()
        for dy in (torch.ones(1, 1, 1, **options).expand(6, 4, 10), torch.randn(6, 4, 20, **options)[..., ::2]):
            (found,) = torch.autograd.grad(module(strided, hx)[0], strided, dy)
            (expected,) = torch.autograd.grad(module(whole, hx)[0], whole, dy.contiguous())
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_nan_stays_in_its_sample() -> None:
    module, (x, *_), hx = leaves(Case("lstm", T=5, B=4, I=8, H=16, dtype=torch.float32))
    with torch.no_grad():
        clean = module(x, hx)[0]
        x[2, 1, 3] = math.nan
        dirty = module(x, hx)[0]
    keep = [0, 2, 3]
    assert torch.equal(clean[:, keep], dirty[:, keep])
    assert dirty[2:, 1].isnan().all() and torch.equal(clean[:2, 1], dirty[:2, 1])


def test_no_samples() -> None:
    layer = fusedrnn.GRU(4, 8, device=CUDA)
    y, h = layer(torch.zeros(3, 0, 4, device=CUDA))
    assert y.shape == (3, 0, 8) and h.shape == (1, 0, 8)
    (gradient,) = torch.autograd.grad(y.sum() + h.sum(), [layer.weight_hh_l0])
    assert not gradient.any()


def test_tensors_on_two_devices() -> None:
    layer = fusedrnn.LSTM(4, 8, device=CUDA)
    with pytest.raises(RuntimeError, match="device"):
        layer(torch.zeros(3, 2, 4))
    with pytest.raises(RuntimeError, match="device"):
        fusedrnn.LSTM(4, 8)(torch.zeros(3, 2, 4, device=CUDA))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    layer = fusedrnn.LSTM(4, 8, num_layers=2, device=CUDA)
    with torch.autocast("cuda", dtype=dtype):
        y, _ = layer(torch.randn(5, 3, 4, device=CUDA))
    assert y.dtype == dtype
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


KINDS = {
    "packed": {"lengths": tuple(40 - 2 * b for b in range(16))},
    "bidirectional": {"bidirectional": True},
    "stacked": {"num_layers": 2},
    "projected": {"proj_size": 48},
}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("plain", dtype) for dtype in (*HALF, torch.float32, "tf32")]
    + [(kind, dtype) for kind in KINDS for dtype in (torch.bfloat16, torch.float32)],
    ids=str,
)
@pytest.mark.parametrize("cell", [cell for cell in CELLS if TWINS[cell].torch_layer])
def test_errors_are_no_larger_than_cudnn_s(cell: str, kind: str, dtype: torch.dtype | str) -> None:
    """Against float64 on the CPU: relative errors of the output and of every gradient, geometric means over seeds."""
    if kind == "projected" and not CELLS[cell].projectable:
        pytest.skip("torch.nn has no such projection")
    logs, states = [], 1 + len(CELLS[cell].states)
    base = Case(cell, T=40, B=16, I=64, H=128, dtype=torch.float32 if dtype == "tf32" else dtype)
    for seed in range(8):
        case = replace(base, seed=seed, **KINDS.get(kind, {}))
        ours, wanted, hx = leaves(case)
        theirs = copy.deepcopy(ours)
        fusedrnn.revert(theirs)
        exact = copy.deepcopy(ours).double().cpu()
        x, *h = (t.detach().double().cpu().requires_grad_() for t in wanted[:states])
        leaves_of = [x, *h, *exact.parameters()]
        expected = gradients(exact, leaves_of, tuple(h) if len(h) > 1 else h[0], packer(case))
        with tf32(dtype == "tf32"):
            found = [gradients(m, [*wanted[:states], *m.parameters()], hx, packer(case)) for m in (ours, theirs)]
        if TWINS[cell].kink and case.dtype.itemsize == 2:  # its gradients jump where 16 bits round across 0
            expected, found = expected[:1], [f[:1] for f in found]
        for a, b, t in zip(*found, expected, strict=True):
            logs.append([((v.double().cpu() - t).norm() / t.norm()).log().item() for v in (a, b)])
    mean, theirs_mean = torch.tensor(logs).mean(dim=0).exp().tolist()
    print(f"{cell}, {kind}, {dtype}: relative error {mean:.2e}, cuDNN's {theirs_mean:.2e}")
    assert mean <= 1.1 * theirs_mean  # two means of 8 seeds are good to about 3 in a hundred


@pytest.mark.parametrize("cell", CELLS)
def test_tf32_only_when_cudnn_may(cell: str) -> None:
    """TF32 keeps 10 bits of a factor: an error near 1e-4 with the switch on, near 1e-7 with it off, whatever matmul's
    switch says.
    """
    ours, wanted, hx = leaves(Case(cell, T=10, B=16, I=64, H=128, dtype=torch.float32))
    exact = copy.deepcopy(ours).double()
    h = tuple(t.detach().double() for t in (hx if isinstance(hx, tuple) else (hx,)))
    with torch.no_grad():
        expected = exact(wanted[0].double(), h if len(h) > 1 else h[0])[0]
        errors = []
        for on in (False, True):
            with tf32(not on), torch.backends.cudnn.flags(enabled=True, allow_tf32=on):
                errors.append(((ours(wanted[0], hx)[0].double() - expected).norm() / expected.norm()).item())
    assert errors[0] < 3e-6 < 3e-5 < errors[1] < 1e-2, errors
