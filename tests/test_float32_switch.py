"""float32 on a GPU rounds to TF32 where torch.nn's layers may: the switches of cudnn, at each call, as the emulated GPU
gets them. TF32 keeps 10 bits of a factor: relative errors near 1e-4, and below 1e-6 without it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PROGRAM = """
import ctypes, threading, torch, fusedrnn

assert fusedrnn._C.isa() == "persistent"
cudnn = torch.backends.cudnn
torch.manual_seed(0)
layer = fusedrnn.{cell}(16, 48)
exact = getattr(torch.nn, "{cell}")(16, 48).double()
exact.load_state_dict(layer.state_dict())
x = torch.randn(4, 3, 16, requires_grad=True)
wide = x.detach().double().requires_grad_()
y = exact(wide)[0]
expected = y.detach(), torch.autograd.grad(y.square().sum(), wide)[0]

def rounds(found, expected):
    error = ((found.double() - expected).norm() / expected.norm()).item()
    assert error < 2e-6 or 2e-5 < error < 1e-2, error
    return error > 1e-5

def forward(model=layer):
    return rounds(model(x)[0].detach(), expected[0])

def backward(y):
    return rounds(torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0], expected[1])
"""


# As with a torch that the build has no module for: Python is asked.
WITHOUT_FAST = """
import torch, warnings
version, torch.__version__ = torch.__version__, "2.99.0"
warnings.simplefilter("ignore")
import fusedrnn
torch.__version__ = version
assert fusedrnn._C.build()["fast"] is None
"""


def run(cell: str, code: str, before: str = "") -> None:
    settings = {"FUSEDRNN_CPU_ISA": "persistent", "FUSEDRNN_CUDA_PLAN": "persistent"}
    command = [sys.executable, "-c", before + PROGRAM.replace("{cell}", cell) + code]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("cell", "before"), [("LSTM", ""), ("GRU", ""), ("RNN", ""), ("GRU", WITHOUT_FAST)])
def test_each_switch(cell: str, before: str) -> None:
    run(
        cell,
        """
assert forward()                              # torch's default
cudnn.allow_tf32 = False
assert not forward()
torch.backends.cuda.matmul.allow_tf32 = True  # of other layers
assert not forward()
cudnn.rnn.fp32_precision = "tf32"
assert forward()
cudnn.rnn.fp32_precision = "ieee"
torch.backends.fp32_precision = "tf32"        # of all that have none of their own
assert not forward()
cudnn.rnn.fp32_precision = "none"
assert forward()
torch.backends.fp32_precision = "ieee"
assert not forward()
""",
        before,
    )


@pytest.mark.parametrize("before", ["", WITHOUT_FAST], ids=["torch", "python"])
def test_at_the_time_of_the_call(before: str) -> None:
    run(
        "GRU",
        """
cudnn.allow_tf32 = False
y = layer(x)[0]
assert not backward(y)
cudnn.allow_tf32 = True                       # after the forward pass
assert backward(y)
with cudnn.flags(enabled=True, allow_tf32=False):
    assert not backward(y)
found = []
thread = threading.Thread(target=lambda: found.append(forward()))
thread.start()
thread.join()
assert found == [True]
""",
        before,
    )


def test_in_compiled_and_exported_models() -> None:
    run(
        "LSTM",
        """
torch._dynamo.config.allow_rnn = True
compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
exported = torch.export.export(layer, (x.detach(),)).module()
for on in (True, False, True):
    cudnn.allow_tf32 = on
    assert forward(compiled) == on and backward(compiled(x)[0]) == on
    assert forward(exported) == on
""",
    )


def test_without_python_and_with_a_failure() -> None:
    """As in a program of C++: torch's defaults. Where asking fails: no rounding."""
    run(
        "RNN",
        """
ask = fusedrnn._C._library.fusedrnn_ask_settings
cudnn.allow_tf32 = False
ask(None)
assert forward()

@ctypes.CFUNCTYPE(None, ctypes.POINTER(ctypes.c_int))
def failing(into):
    raise RuntimeError("on purpose")

ask(failing)
cudnn.allow_tf32 = True
assert not forward()
""",
    )


def test_other_types_do_not_ask() -> None:
    """float64 has no kernel for many steps, and bfloat16 no switch."""
    assert torch.backends.cudnn.rnn.fp32_precision != "tf32"  # conftest.py
    run(
        "LSTM",
        """
for dtype in (torch.float64, torch.bfloat16):
    layer.to(dtype)
    found = []
    for on in (True, False):
        cudnn.allow_tf32 = on
        found.append(layer(x.to(dtype))[0])
    assert torch.equal(*found)
""",
    )


def test_an_interrupt_is_not_lost_in_asking() -> None:
    """Ctrl-C, while Python is asked on behalf of a call that cannot raise it."""
    run(
        "RNN",
        """
import time

def interrupted():
    raise KeyboardInterrupt

torch.are_deterministic_algorithms_enabled = interrupted
try:
    layer(x)
    time.sleep(5)
    raise SystemExit("lost")
except KeyboardInterrupt:
    pass
""",
        WITHOUT_FAST,
    )
