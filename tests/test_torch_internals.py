"""Private names of torch: all in one file, and each may be missing without a plain call failing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

import fusedrnn

PACKAGE = Path(fusedrnn.__file__).parent
FILE = PACKAGE / "torch_internals.py"

#: Attributes of torch.nn's modules that are none of their public ones.
PRIVATE = {name for name in dir(nn.LSTM(1, 1)) if name.startswith("_") and not name.startswith("__")}


def private_names(source: str) -> list[str]:
    """Names of torch and of its modules that begin with an underscore, as a file uses them."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            found += [name for name in [*node.module.split("."), *(a.name for a in node.names)] if name[:1] == "_"]
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.startswith("torch._")]
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            root = ast.unparse(node.value)
            if root.split(".")[0] in ("torch", "nn", "forward_ad") or (node.attr in PRIVATE and root != "super()"):
                found.append(ast.unparse(node))
    return found


def asked_for() -> list[str]:
    """The names that the file asks for by ``getattr``, ``hasattr`` or in an object's dictionary."""
    calls = [node for node in ast.walk(ast.parse(FILE.read_text())) if isinstance(node, ast.Call)]
    asked = [call.args[1] for call in calls if getattr(call.func, "id", "") in ("getattr", "hasattr")]
    asked += [call.args[0] for call in calls if getattr(call.func, "attr", "") == "get"]
    return sorted({name.value for name in asked if isinstance(name, ast.Constant)})


def test_private_names_stand_in_one_file() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path != FILE:
            assert not private_names(path.read_text()), path.name
    found = private_names("from torch._C import x; torch._C.y; module._parameters; super()._apply(f); self.step")
    assert sorted(found) == ["_C", "module._parameters", "torch._C"]


PROGRAM = """
import builtins, os, sys, types
from pathlib import Path
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

MISSING = set(sys.argv[2:])

def values(module, x, call=lambda module, x: module(x)):
    x = x.clone().requires_grad_()
    for parameter in module.parameters():
        parameter.grad = None
    out = call(module, x)
    y = out[0] if isinstance(out, tuple) and not isinstance(out, nn.utils.rnn.PackedSequence) else out
    y = y.data if isinstance(y, nn.utils.rnn.PackedSequence) else y
    y.square().sum().backward()
    with torch.no_grad():
        again = call(module, x)
        again = again[0] if isinstance(again, tuple) and type(again) is tuple else again
    return [y, getattr(again, "data", again), x.grad, *(p.grad for p in module.parameters())]

def packed(module, x):
    return module(pack_padded_sequence(x, [4, 2]))[0]

def check():
    import fusedrnn
    for name in ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell"):
        options = {} if name.endswith("Cell") else {"num_layers": 2, "bidirectional": True}
        theirs, ours = getattr(nn, name)(3, 5, **options), getattr(fusedrnn, name)(3, 5, **options)
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(*((2,) if name.endswith("Cell") else (4, 2)), 3)
        for call in (lambda m, x: m(x),) if name.endswith("Cell") else (lambda m, x: m(x), packed):
            for a, b in zip(values(ours, x, call), values(theirs, x, call), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        if not name.endswith("Cell"):
            one = getattr(fusedrnn, name)(3, 5)
            for _ in range(2):
                torch.testing.assert_close(one.step(x[0])[0], one(x[:1])[0][0])
            assert one(x, lengths=[4, 1])[0].shape == (4, 2, 5)
            fusedrnn.convert(theirs)
            theirs(x)
            with fusedrnn.patch_torch():
                getattr(nn, name)(3, 5)(x)

source = Path(sys.argv[1]).read_text()
for missing in sorted(MISSING):
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        if status:
            sys.exit(f"without {missing}: {status}")
        continue
    package = types.ModuleType("fusedrnn")
    internals = types.ModuleType("fusedrnn.torch_internals")
    internals.getattr = lambda o, n, *d: d[0] if n == missing and d else builtins.getattr(o, n, *d)
    internals.vars = lambda o: {n: v for n, v in builtins.vars(o).items() if n != missing}
    internals.hasattr = lambda o, n: n != missing and builtins.hasattr(o, n)
    exec(compile(source, sys.argv[1], "exec"), vars(internals))
    sys.modules["fusedrnn.torch_internals"] = internals
    check()
    sys.stdout.flush()
    os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process for each name")
def test_no_plain_call_depends_on_a_private_name() -> None:
    names = asked_for()
    assert {"_current_level", "_flat_weights", "_are_functorch_transforms_active"} <= set(names)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(FILE), *names], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_import_is_short() -> None:
    """Nothing of Dynamo until it is used, and no other large part of torch."""
    program = "import sys, torch; before = set(sys.modules); import fusedrnn; print(*(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    new = set(done.stdout.split())
    assert "fusedrnn" in new and not new & {"torch._dynamo", "torch.onnx", "sympy", "onnx", "onnxscript", "matplotlib"}
