"""No read beyond a tensor's end: every input ends at a page that must not be touched.

A vector load that runs over the last row reads the neighbour's memory, mostly unseen; here the process dies of it.
Run as a script this file is that process; the test starts it once for each instruction set.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from parity import Case, packer, ragged, results
from torch import Tensor, nn

import fusedrnn
from fusedrnn.cells import CELLS

LIBC = ctypes.CDLL(None, use_errno=True)
HELD = []  # the mappings, which must outlive their tensors


def guarded(t: Tensor) -> Tensor:
    """A contiguous copy of ``t`` whose last byte is the last one before a page without access."""
    size = t.numel() * t.element_size()
    pages = -(-max(size, 1) // mmap.PAGESIZE)
    area = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert LIBC.mprotect(ctypes.c_void_p(start + pages * mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
    HELD.append(area)
    copy = torch.frombuffer(area, dtype=t.dtype, count=t.numel(), offset=pages * mmap.PAGESIZE - size).view(t.shape)
    return copy.copy_(t.detach())


def run_guarded() -> None:
    """Forward and backward of every cell, dtype and a few awkward sizes, steps, small matrices; all inputs guarded."""
    faulthandler.enable()
    torch.set_num_threads(1)
    for cell, info in CELLS.items():
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for T, B, I, H in ((1, 1, 1, 1), (2, 3, 5, 7), (3, 2, 17, 9), (2, 7, 3, 33), (3, 1, 8, 16)):
                case = Case(cell, T=T, B=B, I=I, H=H, bidirectional=H == 7, dtype=dtype, proj_size=0)
                projected = replace(case, proj_size=H - 1) if info.projectable and H > 1 else case
                for each in (case, ragged(case), projected):
                    check(each)
            # Packed weights: panels whose strips are three, two and one vector wide; one row, two rows, a team.
            shapes = (17, 1, 25, 49, 1), (12, 2, 24, 73, 1), (17, 1, 48, 97, 2), (60, 1, 70, 130, 2)
            for T, B, I, H, threads in shapes:
                torch.set_num_threads(threads)
                check(Case(cell, T=T, B=B, I=I, H=H, dtype=dtype))
            torch.set_num_threads(1)
        for kind in (None, "int8", "bfloat16"):
            for B, I, H in ((1, 1, 1), (2, 3, 5), (3, 17, 9), (7, 67, 33), (4, 64, 48)):
                check_inference(Case(cell, T=1, B=B, I=I, H=H), kind)


def check(case: Case) -> None:
    module = case.module()
    for name, parameter in list(module.named_parameters()):
        setattr(module, name, nn.Parameter(guarded(parameter)))
    tensors = {name: guarded(t).requires_grad_() for name, t in case.tensors().items()}
    found = results(module, tensors, dict(module.named_parameters()), pack=packer(case))
    assert all(t.isfinite().all() for t in found.values())
    with torch.no_grad():
        for _ in range(3):  # the weights are packed, kept and used again
            assert module(tensors["x"].detach())[0].isfinite().all()


def check_inference(case: Case, kind: str | None) -> None:
    """A step, and a call of several, of a module with float32 or smaller matrices."""
    module = case.module().eval()
    if kind:
        fusedrnn.quantize(module, dtype=kind)
    for name, t in (*module.named_parameters(), *module.named_buffers()):
        owner = module.get_submodule(name.rpartition(".")[0])
        held = guarded(t)
        setattr(owner, name.rpartition(".")[2], nn.Parameter(held) if isinstance(t, nn.Parameter) else held)
    with torch.no_grad():
        x = guarded(case.tensors()["x"])
        y, state = module.step(x[0])
        guard = (lambda t: tuple(map(guarded, t))) if isinstance(state, tuple) else guarded
        for found in (y, module.step(x[0], guard(state))[0], module(guarded(x.repeat(9, 1, 1)))[0]):
            assert found.isfinite().all()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects pages with mprotect")
@pytest.mark.parametrize("name", fusedrnn._C.supported_isas())
def test_no_read_beyond_the_end(name: str) -> None:
    done = run(name, "all")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects pages with mprotect")
def test_the_guard_works() -> None:
    assert run(fusedrnn._C.isa(), "beyond").returncode == -signal.SIGSEGV


def run(isa: str, what: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"FUSEDRNN_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, what]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    if sys.argv[1] == "beyond":
        ctypes.string_at(guarded(torch.zeros(5)).data_ptr(), 21)
    else:
        run_guarded()
