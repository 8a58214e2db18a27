"""Calls of the compiled part with arguments that do not fit, drawn from a seed: each a line of Python that repeats it.

A call begins valid: a random cell, layout, sizes, dtype and options. One to three statements then change its arguments:
shapes, strides, types, devices, memory, numbers, names. :func:`faults` runs the line and says what is wrong: a call
must raise, or give None where that is offered, or equal the loop of ``loops.py`` (``judge.py``).

    python tests/hostile.py 5000 [--first SEED] [--kind KIND]

runs many in a process of its own, which may die, and prints each faulty line.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from loops import TWINS, beside, several, weight_shapes

from fusedrnn.cells import CELLS

PRELUDE = (
    "import collections, copy, datetime, math, pickle, numpy, torch; from fusedrnn import _C; "
    "ops = torch.ops.fusedrnn; r = torch.randn"
)
DTYPES = ("float32", "float64", "bfloat16", "float16")
HUGE = ("2**33", "2**40", "2**62")

MEMORY = "storage().resize_"

# Statements that change a tensor p. Those of SAME leave its values.
SAME = (
    "{p} = {p}.mT.contiguous().mT",
    "{p} = {p}.transpose(0, -1).contiguous().transpose(0, -1)",
    "{p} = torch.stack([{p}] * 3, -1)[..., 1]",
    "{p} = torch.cat([{p}, {p}], -1)[..., :{p}.size(-1)]",
    "{p} = torch.cat([{p}.flatten()[:1], {p}.flatten()])[1:].view({p}.shape)",
    "{p} = torch.frombuffer(bytearray(1) + bytearray({p}.contiguous().view(torch.uint8).numpy().tobytes()), "
    "dtype={p}.dtype, offset=1).view({p}.shape)",
    "{p} = {p}.as_strided({p}.shape, [2**62 if n < 2 else s for n, s in zip({p}.shape, {p}.stride())])",
    "{p} = torch._neg_view(-{p})",
    "{p} = torch.complex({p} * 0, -{p}).conj().imag",
    "{p}.requires_grad_()",
    "{p} = torch.nn.Parameter({p})",
    '{p} = {p}.as_subclass(type("Sub", (torch.Tensor,), {{}}))',
    "{p} = torch.inference_mode()(lambda: {p}.clone())()",
    "{p}.share_memory_()",
    "{p}.untyped_storage().resize_({p}.untyped_storage().nbytes() + 64)",
)
OTHER = (
    "{p} = {p}[:0]", "{p} = {p}[:1]", "{p} = {p}[:-1]", "{p} = {p}[..., :0]", "{p} = {p}[..., :1]",
    "{p} = {p}[..., :-1]", "{p} = {p}[:, :0]", "{p} = {p}[:, :1]", "{p} = {p}[:, :-1]",
    "{p} = torch.cat([{p}, {p}[:1]])", "{p} = torch.cat([{p}, {p}[..., :1]], -1)", "{p} = torch.cat([{p}, {p}])",
    "{p} = torch.cat([{p}, {p}[:, :1]], 1)",
    "{p} = {p}[None]", "{p} = {p}[0]", "{p} = {p}.flatten()", "{p} = {p}.sum()", "{p} = {p}[..., None]",
    "{p} = {p}.mT", "{p} = torch.empty(0)", "{p} = torch.zeros(())",
    *(f"{{p}} = {{p}}.to(torch.{name})" for name in (*DTYPES, "int64", "uint8", "bool", "complex64", "float8_e4m3fn")),
    '{p} = {p}.to("meta")',
    "{p} = {p}.to_sparse()", "{p} = {p}.to_mkldnn()", "{p} = {p}.to_sparse_csr()",
    "{p} = torch.quantize_per_tensor({p}.float(), 0.1, 0, torch.qint8)",
    "{p} = torch.nested.nested_tensor([{p}[0], {p}[0]])",
    "{p} = torch._efficientzerotensor({p}.shape, dtype={p}.dtype)",
    "{p} = None", "{p} = 1.5", "{p} = {p}.tolist()",
    "{p}.untyped_storage().resize_(0)", "{p}.untyped_storage().resize_(4)",
    "{p}.untyped_storage().resize_({p}.untyped_storage().nbytes() // 2)",
    "{p}.resize_(0)", "{p}.set_()", "{p} = torch.Tensor()",
    "{p} = {p}[:1].expand({p}.shape)", "{p} = {p}.flatten().as_strided({p}.shape, [1] * {p}.dim())",
    "{p} = {p} * float('nan')", "{p} = {p} * 1e30", "{p} = {p} * float('inf')",
)  # fmt: skip
LARGE = (
    "{p} = {p}[:1].expand({n}, *{p}.shape[1:])",
    "{p} = {p}[..., :1].expand(*{p}.shape[:-1], {n})",
    "{p} = {p}[:, :1].expand({p}.shape[0], {n}, *{p}.shape[2:])",
    "{p} = {p}[:1, :1].expand({n}, {n}, *{p}.shape[2:])",
)
SIZES_CHANGED = (
    "batch_sizes = batch_sizes.flip(0)", "batch_sizes = batch_sizes - 1", "batch_sizes = batch_sizes + 1",
    "batch_sizes = batch_sizes * 0", "batch_sizes = -batch_sizes", "batch_sizes = batch_sizes[:0]",
    "batch_sizes = batch_sizes[:-1]", "batch_sizes = torch.cat([batch_sizes, batch_sizes])",
    "batch_sizes = torch.cat([batch_sizes, batch_sizes[:1] * 0])", "batch_sizes = batch_sizes.int()",
    "batch_sizes = batch_sizes.double()", 'batch_sizes = batch_sizes.to("meta")', "batch_sizes = batch_sizes[None]",
    "batch_sizes = torch.stack([batch_sizes, -batch_sizes], 1)[:, 0]", "batch_sizes = batch_sizes[0]",
    "batch_sizes = torch.cat([batch_sizes[:1] + 2**62, batch_sizes])", "batch_sizes = batch_sizes.tolist()",
    "batch_sizes = torch.cat([batch_sizes[:1] * 0 + 2**63 - 1, batch_sizes])", "batch_sizes = batch_sizes.to_sparse()",
    "batch_sizes = batch_sizes[-1:].expand(2**33)", "batch_sizes = batch_sizes[-1:].expand(2**62)",
    "batch_sizes.untyped_storage().resize_(0)", "batch_sizes.untyped_storage().resize_(8)",
    "batch_sizes = torch.ones(len(x), dtype=torch.int64)", "batch_sizes = torch.tensor([len(x)])",
    "batch_sizes = None", "batch_sizes = batch_sizes.sort()[0]",
    "batch_sizes = torch.frombuffer(bytearray(1) + bytearray(batch_sizes.numpy().tobytes()), dtype=torch.int64, "
    "offset=1)",
)  # fmt: skip
LIST_CHANGED = (
    "weights = []", "weights = weights[:-1]", "weights = weights[1:]", "weights = weights * 2",
    "weights = weights[::-1]", "weights = weights + weights[:1]", "del weights[2]", "weights = tuple(weights)",
    "weights = None", "weights[0], weights[1] = weights[1], weights[0]", "weights = weights[:2]",
    "weights = weights[:len(weights) // 2]", "weights = [w for w in weights if w.dim() == 2]",
    "weights = [weights[0]] * len(weights)", "weights = [w for w in weights if w.dim() == 2] * 2",
    "weights.insert(4, r(weights[1].size(-1), weights[1].size(-1)).to(weights[1].dtype))",
    "weights = [w.to('meta') for w in weights]", "weights = [w.double() for w in weights]",
    "weights = [w[:0] for w in weights]", "weights = [w[:1] for w in weights]",
)  # fmt: skip


@dataclass
class Call:
    """A call to be: the statements before it and itself, the tensors and scalars that may be changed."""

    kind: str
    begin: list[str]
    call: str
    tensors: list[str]
    scalars: dict[str, tuple[str, ...]]
    packed: bool = False
    late: list[str] = field(default_factory=list)  # statements after the changes
    changed: list[str] = field(default_factory=list)
    prelude = PRELUDE

    @property
    def setup(self) -> str:
        return "; ".join([PRELUDE, *self.begin, *self.changed, *self.late])

    @property
    def line(self) -> str:
        return f"{self.setup}; out = {self.call}"


@dataclass
class Layers:
    """Source of the tensors of stacked layers: names and expressions."""

    cell: str
    T: int
    B: int
    I: int
    H: int
    R: int
    D: int
    layers: int
    dtype: str
    bias: bool
    projected: bool

    def random(self, *shape: int, scale: float = 1.0) -> str:
        factor = "" if scale == 1.0 else f"{scale} * "
        return f"{factor}r{shape if len(shape) != 1 else f'({shape[0]})'}.to(torch.{self.dtype})"

    def weights(self) -> list[str]:
        found = []
        for layer in range(self.layers):
            width = self.D * self.R if layer else self.I
            shapes = weight_shapes(self.cell, width, self.H, self.R if self.projected else 0, self.bias)
            found += [self.random(*s, scale=0.4) for s in shapes * self.D]
        return found


def layers(draw: random.Random, *, stacked: bool, directions: bool = True) -> Layers:
    cell, H = draw.choice(sorted(CELLS)), draw.choice((1, 2, 3, 5, 8, 9, 17))
    projected = CELLS[cell].projectable and H > 1 and draw.random() < 0.4
    long = stacked and draw.random() < 0.15
    return Layers(
        cell,
        T=draw.choice((16, 20)) if long else draw.choice((1, 1, 2, 3, 4)),
        B=draw.choice((1, 2)) if long else draw.choice((0, 1, 1, 2, 3, 5, 13)),
        I=draw.choice((0, 1, 3, 4, 9)),
        H=H,
        R=draw.randrange(1, H) if projected else H,
        D=draw.choice((1, 2)) if directions else 1,
        layers=draw.choice((1, 2, 3)) if stacked else 1,
        dtype=draw.choice(DTYPES),
        bias=draw.random() < 0.7,
        projected=projected,
    )


def beginning(draw: random.Random, z: Layers, names: dict[str, str | None]) -> list[str]:
    begin = [f"torch.manual_seed({draw.randrange(10**6)})", f"torch.set_num_threads({draw.choice((1, 2))})"]
    begin += [f"{name} = {value}" for name, value in names.items()]
    return [*begin, f"weights = [{', '.join(z.weights())}]", f"cell = {z.cell!r}", f"bidirectional = {z.D == 2}"]


CELL_NAMES = ("'LSTM'", "''", "'lstm\\0'", "'lst'", "'lstm' * 10**5", "None", "'gru'", "'lstm'", "'rnn_tanh'", "b'gru'")
FLAGS = ("True", "False", "None", "2")
# Of another kind, of another module, none at all.
CAPSULES = (
    "None", "datetime.datetime_CAPI", "_C.packed_weights()", "copy.copy(_C.packed_weights())",
    "type(_C.packed_weights())()",
    "_C.prepare_step(torch.ones(1, 1), [torch.ones(1, 1)] * 2, 'rnn_tanh', (2, 1, 1, 1, 1, 1))",
    "torch.utils.dlpack.to_dlpack(torch.ones(1))",
    "object.__new__(type(_C.packed_weights()))",
)  # fmt: skip
ZONEOUTS = (
    "(0.0, 0.0)", "(0.5, 0.25)", "(1.0, 0.0)", "(0.0, 1.0)", "(-1.0, 0.0)", "(2.0, 0.5)", "(math.nan, 0.0)",
    "(0.0, math.nan)", "(math.inf, 0.0)", "(0.5,)", "None", "(0.5, 0.5, 0.5)", "0.5",
)  # fmt: skip


def op(draw: random.Random, *, backward: bool) -> Call:
    z = layers(draw, stacked=False)
    if backward and (TWINS[z.cell].kink or z.cell == "residual_rnn"):  # a kink, a state without bounds: not in 16 bits
        z.dtype = draw.choice(DTYPES[:2])
    some = lambda value: value if draw.random() < 0.5 else None  # noqa: E731
    sizes = None
    if draw.random() < 0.5 and z.B:
        sizes = sorted((draw.randint(1, z.B) for _ in range(z.T)), reverse=True)
        z.B = sizes[0]
    two, leading = several(z.cell), (sum(sizes),) if sizes else (z.T, z.B)
    states, rows, keeps_c = (z.D, z.B, z.R), (*leading, z.D * z.R), beside(z.cell) == 1
    names = {
        "x": z.random(*leading, z.I),
        "batch_sizes": f"torch.tensor({sizes})" if sizes else None,
        "h0": some(z.random(*states)),
        "c0": some(z.random(z.D, z.B, beside(z.cell) * z.H)) if two else None,
        "mask_h": some(z.random(*states)) if draw.random() < 0.5 else None,
        "keep_h": some(z.random(*rows) + ".sigmoid()") if draw.random() < 0.5 else None,
        "keep_c": some(z.random(*leading, z.D * z.H) + ".sigmoid()") if keeps_c and draw.random() < 0.5 else None,
    }
    begin = beginning(draw, z, names)
    tensors = [name for name, value in names.items() if value and name != "batch_sizes"]
    tensors += [f"weights[{i}]" for i in range(len(z.weights()))]
    forward = "ops.layer_forward(x, batch_sizes, h0, c0, weights, cell, bidirectional, {}, mask_h, keep_h, keep_c)"
    scalars = {"cell": CELL_NAMES, "bidirectional": FLAGS}
    if not backward:
        begin.append(f"save = {draw.random() < 0.5}")
        return Call("forward", begin, forward.format("save"), tensors, scalars | {"save": FLAGS}, bool(sizes))
    begin.append(f"f = {forward.format(True)}; y = f[0]; saved = f[3].clone()")
    cotangents = {
        "dy": some(z.random(*rows)),
        "dh_n": some(z.random(*states)),
        "dc_n": some(z.random(z.D, z.B, beside(z.cell) * z.H)) if two else None,
        "dc": some(z.random(*leading, z.D * beside(z.cell) * z.H)) if two else None,
    }
    options = {
        "need_x": str(draw.random() < 0.7),
        "need_weights": str(draw.random() < 0.7),
        "need_gates": str(draw.random() < 0.4),
        "need_norms": str(draw.random() < 0.4),
        "bptt_steps": draw.choice(("0", "0", "0", "1", "2", "3", "100")),
        "clip": draw.choice(("0.0", "0.0", "0.0", "0.05", "1.0")),
        "clip_by_norm": str(draw.random() < 0.5),
    }
    begin += [f"{name} = {value}" for name, value in (cotangents | options).items()]
    tensors += ["y", "saved", *(name for name, value in cotangents.items() if value)]
    scalars |= {name: FLAGS for name in options if name.startswith("need") or name == "clip_by_norm"}
    scalars["bptt_steps"] = ("-1", "2**62", "-2**63", "2**63", "2**31", "1.5", "None")
    scalars["clip"] = ("-1.0", "math.nan", "math.inf", "1e308", "5e-324", "1e-310", "0.5", "None", "-0.0")
    call = (
        "ops.layer_backward(dy, dh_n, dc_n, dc, x, batch_sizes, h0, c0, weights, y, saved, cell, bidirectional, "
        "need_x, need_weights, need_gates, need_norms, bptt_steps, clip, clip_by_norm, mask_h, keep_h, keep_c)"
    )
    return Call("backward", begin, call, tensors, scalars, bool(sizes))


def infer(draw: random.Random) -> Call:
    z = layers(draw, stacked=True)
    step = z.layers * z.D == 1 and draw.random() < 0.2
    two, rows = several(z.cell), z.layers * z.D
    shape = (z.B,) if step else (z.T, z.B)
    given = draw.random() < 0.5
    some = lambda *sizes: z.random(*(sizes[1:] if step else sizes)) if given else None  # noqa: E731
    names = {"x": z.random(*shape, z.I), "h0": some(rows, z.B, z.R), "c0": some(rows, z.B, z.H) if two else None}
    begin = beginning(draw, z, names)
    begin += [f"layers = {z.layers}", f"zoneout = {draw.choice(ZONEOUTS[:2])}", "kept = _C.packed_weights()"]
    tensors = [name for name, value in names.items() if value] + [f"weights[{i}]" for i in range(len(z.weights()))]
    begin += [f"I, H, R = {z.I}, {z.H}, {z.R}"]
    states = "states = None if h0 is None and c0 is None else (h0, c0) if 'lstm' in cell else (h0,)"
    form = f"form = {2 if step else 3}, layers, 2 if bidirectional else 1, I, H, R"
    call = "_C.infer(x, states, weights, cell, form, kept, zoneout)"
    if draw.random() < 0.4:
        begin.append(f"{states}; {form}; _ = [{call} for _ in range({draw.choice((1, 2, 3))})]")
        begin += [f"weights[{draw.randrange(len(z.weights()))}].mul_(-1)"] if draw.random() < 0.4 else []
    kept = CAPSULES
    counts = ("0", "-1", "1", "2", "7", "2**62", "-2**63", "2**63", "None")
    scalars = {"cell": CELL_NAMES, "bidirectional": FLAGS, "zoneout": ZONEOUTS, "kept": kept}
    scalars |= dict.fromkeys(("layers", "I", "H", "R"), counts)
    return Call("infer", begin, call, tensors, scalars, late=[states, form])


def step(draw: random.Random) -> Call:
    z = layers(draw, stacked=True, directions=False)
    z.B, two = max(z.B, 1), several(z.cell)
    some = lambda *sizes: z.random(*sizes) if draw.random() < 0.5 else None  # noqa: E731
    states = {"h0": some(z.layers, z.B, z.R), "c0": some(z.layers, z.B, z.H) if two else None}
    begin = beginning(draw, z, {"x": z.random(z.B, z.I), **states})
    begin += [f"layers = {z.layers}", f"zoneout = {draw.choice(ZONEOUTS[:2])}"]
    begin += [f"I, H, R = {z.I}, {z.H}, {z.R}"]
    prepare = "prepared = _C.prepare_step(x, weights, cell, (2, layers, 1, I, H, R), zoneout)"
    call = "prepared and _C.step(prepared, x, hx, weights)"
    usual = "hx = (h0, c0) if 'lstm' in cell and not h0 is c0 is None else h0"
    hx = draw.choice((usual,) * 9 + ("hx = (h0, c0)", "hx = [h0, c0]", "hx = (h0,)", "hx = (h0, c0, x)"))
    tensors = ["x", *(name for name, value in states.items() if value)]
    tensors += [f"weights[{i}]" for i in range(len(z.weights()))]
    if draw.random() < 0.5:  # changed when it is prepared, or before
        return Call("step", [*begin, prepare], call, tensors, {"prepared": CAPSULES}, late=[hx])
    counts = ("0", "-1", "1", "2", "7", "2**62", "-2**63", "None")
    scalars = {"cell": CELL_NAMES, "zoneout": ZONEOUTS} | dict.fromkeys(("layers", "I", "H", "R"), counts)
    return Call("step", begin, call, tensors, scalars, late=[prepare, hx])


# What is given to kept_parameters: the name of an argument or of what lies in it, and values.
KEPT = {
    "m": ("None", "1", "object()", "torch.nn.Linear", "type('N', (dict,), {})()", "torch.nn.RNN(2, 3)", "m.weight"),
    "m.__dict__": ("{}", "{'_parameters': 1}", "{**m.__dict__, 'weight': 1}", "{**m.__dict__, 'read': 1}"),
    "m.__class__": ("type('N', (torch.nn.Linear,), {'bias': 1})", "torch.nn.Linear", "torch.nn.RNN"),
    "m._parameters": (
        "{}", "None", "[]", "collections.OrderedDict(m._parameters)", "{'weight': 1, 'bias': 2}",
        "m._parameters | {1: 2}",
        "type('P', (dict,), {'__getitem__': lambda *_: r(2)})(m._parameters)", "dict.fromkeys(['weight', 'bias'])",
    ),
    "names": (
        "[]", "()", "None", "['weight']", "['bias', 'weight']", "['other']", "[1, []]", "['weight', 'bias', 'weight']",
        "'weight'", "{'weight': 1}", "[type('S', (str,), {})('weight'), 'bias']", "('weight', 'bias')",
    ),
    "as_torch": (
        "()", "None", "[]", "(1, 2)", "(('read', None, 1),)", "((1, None),)", "(('read', 1),)", "((None, None),)",
        "(('weight', None), ('bias', None))", "(('forward', torch.nn.Linear.forward),)", "(('forward', None),)",
    ),
    "listed": ("None", "[]", "[m.weight]", "[m.bias, m.weight]", "[m.weight, m.bias, 1]", "(m.weight, m.bias)", "1",
               "[None, None]"),
}  # fmt: skip


def kept_parameters(draw: random.Random) -> Call:
    begin = [
        "m = torch.nn.Linear(2, 2)", "names = ['weight', 'bias']", "listed = [m.weight, m.bias]",
        "as_torch = (('forward', torch.nn.Linear.forward), ('read', None))",
    ]  # fmt: skip
    chosen = [draw.choice(sorted(KEPT)) for _ in range(draw.choice((0, 1, 1, 2, 3)))]
    begin += [f"{name} = {draw.choice(KEPT[name])}" for name in sorted(chosen, reverse=True)]  # the module at the end
    return Call("tools", begin, "_C.kept_parameters(m, names, as_torch, listed)", [], {})


def tools(draw: random.Random) -> Call:
    """The functions of the module that compute with no tensors."""
    if draw.random() < 0.5:
        return kept_parameters(draw)
    calls = (
        "_C.phases()", "_C.isa()", "_C.build()", "_C.cells()", "_C.supported_isas()", "_C.built_isas()",
        "_C.vector_bytes()", "_C.isa(1)", "_C.packed_weights(1)", "_C.packed_bytes(_C.packed_weights())",
        "_C.packed_uses(_C.packed_weights())", f"_C.packed_bytes({draw.choice(CAPSULES)})",
        f"_C.packed_uses({draw.choice(CAPSULES)})", "copy.deepcopy(_C.packed_weights())",
        "pickle.dumps(_C.packed_weights())", "_C.packed_bytes()",
    )  # fmt: skip
    return Call("tools", [], draw.choice(calls), [], {})


KINDS: dict[str, Callable[[random.Random], Call]] = {
    "forward": lambda draw: op(draw, backward=False),
    "backward": lambda draw: op(draw, backward=True),
    "infer": infer,
    "step": step,
    "tools": tools,
}


def change(draw: random.Random, call: Call, large: bool) -> str:
    """A statement that changes one argument."""
    where = draw.random()
    if call.packed and where < 0.2:
        return draw.choice([s for s in SIZES_CHANGED if large or "expand" not in s])
    if call.scalars and where < 0.35:
        name = draw.choice(sorted(call.scalars))
        return f"{name} = {draw.choice(call.scalars[name])}"
    if where < 0.42 and "weights[0]" in call.tensors:
        return draw.choice(LIST_CHANGED)
    if where < 0.46:
        return "; ".join(f'{p} = {p}.to("meta")' for p in call.tensors)
    p = draw.choice(call.tensors) if draw.random() < 0.6 else draw.choice([t for t in call.tensors if "[" not in t])
    if large and where > 0.95:
        return draw.choice(LARGE).format(p=p, n=draw.choice(HUGE))
    return draw.choice(SAME if where > 0.75 else OTHER).format(p=p)


SANITIZED = "LD_PRELOAD" in os.environ  # an address sanitizer ends a process that asks for memory beyond all there is


def hostile_call(kind: str, seed: int, large: bool = not SANITIZED) -> Call:
    """``large``: also with sizes beyond all memory."""
    draw = random.Random(f"{kind} {seed}")
    call = KINDS[kind](draw)
    if call.tensors:
        changes = [change(draw, call, large) for _ in range(draw.choice((0, 1, 1, 1, 1, 1, 2, 2, 3)))]
        freed = [statement for statement in changes if MEMORY in statement]
        # Memory that is taken away is the only change: torch reads it in any other, and to print it in a TypeError.
        # What is expanded beyond memory goes last, for the same reason.
        call.changed = freed[:1] or sorted(changes, key=lambda statement: "expand(" in statement and "2**" in statement)
    return call


def worker(kind: str, first: int, end: int) -> None:
    """Prints each seed before its call, and what is wrong with it."""
    from judge import faults

    for seed in range(first, end):
        print("seed", seed, flush=True)
        call = hostile_call(kind, seed)
        for text in faults(call):
            print("fault", text.replace("\n", " | "), flush=True)
    print("end", flush=True)


TOLD = ("runtime error:", "ERROR: Addr", " of size ", "/csrc/")  # of what a sanitizer writes


def explore(kind: str, first: int, count: int) -> int:
    """The calls in processes of their own, one after another: a call that ends its process is a fault too."""
    seed, end, found = first, first + count, 0
    while seed < end:
        command = [sys.executable, __file__, "--worker", kind, str(seed), str(end)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            reader = threading.Thread(target=lambda p=process: errors.append(p.stderr.read()))
            errors: list[str] = []
            reader.start()
            timer = threading.Timer(60, process.kill)
            ended = False
            for text in process.stdout:
                word, _, rest = text.strip().partition(" ")
                timer.cancel()
                timer = threading.Timer(60, process.kill)
                timer.start()
                if word == "seed":
                    seed = int(rest)
                elif word == "fault":
                    found += 1
                    print(f"{kind} {seed}: {rest}\n    {hostile_call(kind, seed).line}", flush=True)
                ended = word == "end"
            timer.cancel()
            reader.join()
        if ended:
            return found
        found += 1
        print(f"{kind} {seed}: process ended with {process.wait()}\n    {hostile_call(kind, seed).line}", flush=True)
        last = errors[0].splitlines()
        told = [text for text in last if any(word in text for word in TOLD)][:16] or last[-12:]
        print("   ", "\n    ".join(told), flush=True)
        seed += 1
    return found


if __name__ == "__main__":
    if sys.argv[1] == "--worker":
        worker(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
        parser.add_argument("count", type=int)
        parser.add_argument("--first", type=int, default=0)
        parser.add_argument("--kind", choices=KINDS)
        options = parser.parse_args()
        for kind in [options.kind] if options.kind else KINDS:
            start = time.perf_counter()
            found = explore(kind, options.first, options.count)
            print(f"# {kind}: {found} faults in {options.count} calls, {time.perf_counter() - start:.0f} s", flush=True)
