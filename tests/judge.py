"""What is wrong with a call of ``hostile.py``: its results beside those of ``loops.py``, in float64.

:func:`faults` runs the line. Right is: an exception that a caller can name; None where the function offers it; or every
result equal to the loop's, shapes and types included, with the arguments as they were and no memory in common. While
it runs torch fills new memory with NaN, so that what nobody wrote is seen.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from hostile import Call
from loops import Steps, beside, op_loop, several, weight_shapes
from tolerances import TOLERANCE
from torch import Tensor

from fusedrnn.cells import CELLS

ERRORS = (RuntimeError, ValueError, TypeError, IndexError, MemoryError, OverflowError)
MANY = 10**6  # more elements than any argument has that can be right
Names = dict[str, Any]


class Misfit(Exception):
    """The arguments have no meaning: the call must not give a result."""


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise Misfit(what)


def values(t: Any, name: str, shape: Sequence[int] | None, like: Tensor | None) -> Tensor:
    """The tensor in float64; :class:`Misfit` if it is none, unlike another, or its memory ends before it does."""
    expect(isinstance(t, Tensor), f"{name} is no tensor")
    expect(t.layout == torch.strided and not t.is_nested and not t.is_quantized, f"{name} is not dense")
    expect(shape is None or tuple(t.shape) == tuple(shape), f"{name} has shape {tuple(t.shape)}, not {shape}")
    expect(like is None or (t.dtype, t.device) == (like.dtype, like.device), f"{name}: {t.dtype} on {t.device}")
    expect(math.prod(t.shape) <= MANY, f"{name} is larger than memory")
    if t.is_meta:
        return torch.zeros(t.shape, dtype=torch.float64)
    if t.numel() and not t._is_zerotensor():
        last = t.storage_offset() + sum((n - 1) * s for n, s in zip(t.shape, t.stride()))
        expect(t.untyped_storage().nbytes() >= (last + 1) * t.itemsize, f"{name} lacks memory")
    return t.detach().as_subclass(Tensor).to(torch.float64, copy=True).contiguous()


def optional(t: Any, *others: Any) -> Tensor | None:
    return None if t is None else values(t, *others)


def steps_of(batch_sizes: Any, x: Tensor) -> tuple[list[int] | None, int, int]:
    """Samples of each step if the batch is ragged; T; B."""
    expect(x.dim() == (3 if batch_sizes is None else 2), f"x has {x.dim()} dimensions")
    if batch_sizes is None:
        expect(len(x) > 0, "no steps")
        expect(x.shape[0] * x.shape[1] <= MANY, "more rows than memory")
        return None, x.shape[0], x.shape[1]
    expect(isinstance(batch_sizes, Tensor) and not batch_sizes.is_meta, "batch_sizes cannot be read")
    expect(batch_sizes.dtype == torch.int64 and batch_sizes.dim() == 1, "batch_sizes is no list of integers")
    sizes = values(batch_sizes, "batch_sizes", None, None).long().tolist()
    expect(bool(sizes) and min(sizes) > 0 and sizes == sorted(sizes, reverse=True), "batch_sizes")
    expect(batch_sizes.sum().item() == len(x), "batch_sizes do not add up")
    return sizes, len(sizes), sizes[0]


def name_of(cell: Any) -> str:
    cell = cell.decode() if isinstance(cell, bytes) else cell
    expect(isinstance(cell, str) and cell in CELLS, "unknown cell")
    return cell


def weights_of(weights: Any, cell: str, D: int, x: Tensor, like: Tensor) -> tuple[list[Tensor], int, int]:
    """Of one layer: the weights, H, R."""
    expect(isinstance(weights, (list, tuple)), "weights is no list")
    each, info = len(weights) // D, CELLS[cell]
    expect(each * D == len(weights) and each in (2, 3, 4, 5), "number of weights")
    expect(each % 2 == 0 or info.projectable or info.has_unit_weight, "projected")
    expect(each % 2 == 1 or not info.has_unit_weight, "no parameters of the units")
    w_hh, blocks = values(weights[1], "w_hh", None, like), len(info.gates if info.product else info.parameters)
    expect(w_hh.dim() == 1 + info.product and len(w_hh) > 0 and len(w_hh) % blocks == 0, "w_hh")
    H, projected = len(w_hh) // blocks, info.projectable and each % 2 == 1
    R = w_hh.shape[1] if projected else H
    shapes = weight_shapes(cell, x.shape[-1], H, R if projected else 0, each > 3)
    return [values(w, f"weights[{i}]", shapes[i % each], like) for i, w in enumerate(weights)], H, R


def kernel_type(x: Any) -> None:
    expect(isinstance(x, Tensor) and x.dtype in TOLERANCE, "x has no type of a kernel")


def nothing(D: int, x: Tensor, H: int, R: int, cell: str) -> Steps:
    """The results of no samples."""
    C = max(beside(cell), 1) * H
    y, c = x.new_zeros(*x.shape[:-1], D * R), x.new_zeros(0, D * C)
    return Steps(y.flatten(0, -2), x.new_zeros(D, 0, R), x.new_zeros(D, 0, C) if several(cell) else None, c, {})


def forward(a: Names) -> dict[str, Any]:
    """What layer_forward must give; of ``saved`` the last columns alone."""
    x, cell, D, steps, H, R = layer(a, None)
    two = several(cell)
    N = len(steps.y)
    K, dtype = CELLS[cell].saved, torch.float32 if a["x"].itemsize == 2 else a["x"].dtype
    values_saved = (K + beside(cell) or int(a["keep_h"] is not None)) * H
    saved = (D, N if a["save"] else 0, values_saved, dtype, steps.c if a["save"] and two and len(x) else None)
    return {
        "y": steps.y.reshape(*a["x"].shape[:-1], D * R),
        "h_n": steps.h_n,
        "c_n": x.new_zeros(0, steps.h_n.shape[1], H) if steps.c_n is None else steps.c_n,
        "saved": saved,
    }


def layer(a: Names, leaves: list[Tensor] | None, **limits: Any) -> tuple[Tensor, str, int, Steps, int, int]:
    """The loop on a call's arguments, which are appended to ``leaves``: x, h0, c0, weights."""
    kernel_type(a["x"])
    x, cell, D = values(a["x"], "x", None, None), name_of(a["cell"]), 2 if a["bidirectional"] else 1
    sizes, T, B = steps_of(a["batch_sizes"], x)
    weights, H, R = weights_of(a["weights"], cell, D, x, a["x"])
    h0 = optional(a["h0"], "h0", (D, B, R), a["x"])
    C = max(beside(cell), 1) * H
    c0 = optional(a["c0"], "c0", (D, B, C), a["x"])
    rows = x.shape[:-1]
    noise = (
        optional(a["mask_h"], "mask_h", (D, B, R), a["x"]),
        optional(a["keep_h"], "keep_h", (*rows, D * R), a["x"]),
        optional(a["keep_c"], "keep_c", (*rows, D * H), a["x"]),
    )
    expect(several(cell) or (c0 is None and noise[2] is None), "no c")
    expect(beside(cell) < 2 or noise[2] is None, "no zoneout of further states")
    if leaves is not None:
        h0 = x.new_zeros(D, B, R) if h0 is None else h0
        c0 = x.new_zeros(D, B, C) if c0 is None and several(cell) else c0
        leaves += [t.requires_grad_() for t in (x, h0, c0, *weights) if t is not None]
    steps = op_loop(cell, x, sizes, h0, c0, weights, D, noise, **limits) if B else nothing(D, x, H, R, cell)
    return x, cell, D, steps, H, R


def backward(a: Names) -> dict[str, Any]:
    """What layer_backward must give."""
    leaves: list[Tensor] = []
    expect(a["bptt_steps"] >= 0 and 0 <= a["clip"] < math.inf, "limits")
    limits = {"bptt": a["bptt_steps"], "clip": a["clip"], "by_norm": a["clip_by_norm"]}
    x, cell, D, steps, H, R = layer(a, leaves, **limits)
    like, two, G, N, B = a["x"], several(cell), len(CELLS[cell].gates), len(steps.y), steps.h_n.shape[1]
    rows, loss, C = x.shape[:-1], x.new_zeros(()), max(beside(cell), 1) * H
    shapes = {"dy": (*rows, D * R), "dh_n": (D, B, R), "dc_n": (D if two else 0, B, C), "dc": (*rows, D * C)}
    for name, result in (("dy", steps.y), ("dh_n", steps.h_n), ("dc_n", steps.c_n), ("dc", steps.c)):
        d = optional(a[name], name, shapes[name], like)
        expect(d is None or two or name != "dc", "no c")
        if d is not None and result is not None:
            loss = loss + (d.reshape(result.shape) * result).sum()
    values(a["y"], "y", (*rows, D * R), like)
    compute = torch.float32 if like.itemsize == 2 else like.dtype
    expect(isinstance(a["saved"], Tensor), "saved")
    values(a["saved"], "saved", None, torch.empty(0, dtype=compute, device=like.device))
    expect(a["saved"].shape[:-1] == (D, N) if a["saved"].dim() == 3 else False, "saved")
    names = [name for name in steps.rows if steps.rows[name] and steps.rows[name][0] is not None]
    inner = [t for name in names for t in steps.rows[name]]
    loss = loss + sum(leaf.sum() for leaf in leaves) * 0
    found = torch.autograd.grad(loss, leaves + inner, allow_unused=True, materialize_grads=True)
    dx, dh0, *others = found[: len(leaves)]
    dc0 = others.pop(0) if two else x.new_zeros(0, B, C)
    of = {name: found[len(leaves) + i * D * N :][: D * N] for i, name in enumerate(names)}
    split, gates, each = CELLS[cell].split, bool(a["need_gates"]), len(a["weights"]) // D
    projected, units = CELLS[cell].projectable and each % 2, len(CELLS[cell].parameters)
    dgates = x.new_zeros(D, N if gates else 0, CELLS[cell].gradient_blocks * H)
    argument_split = CELLS[cell].argument_split
    dh = x.new_zeros(D, N if gates and projected else 0, R)
    norms = x.new_zeros(D, N if a["need_norms"] else 0, 2 * (1 + beside(cell)) + G)
    for i, (d, n) in enumerate(itertools.product(range(D), range(N))):
        ih, hh = of["ih"][i], of["hh"][i]
        if gates and CELLS[cell].norms:
            arguments = hh, ih[(G - argument_split) * H :]
            dgates[d, n] = torch.cat([of["ph"][i], of["px"][i], of["units"][i], *arguments])
        elif gates:
            dgates[d, n] = torch.cat([hh, ih[(G - split) * H :], *([of["units"][i]] if units else [])])
        if gates and projected:
            dh[d, n] = of["cell_h"][i][0]
        if a["need_norms"]:
            names_of = ("h", *(f"c{k}" for k in range(beside(cell))))
            states = [of[kind + name][i] for kind in ("sent_", "") for name in names_of]
            norms[d, n] = torch.stack([t.norm() for t in (*states, *ih.chunk(G))])
    return {
        "dx": dx if a["need_x"] else x.new_zeros(0),
        "dh0": dh0,
        "dc0": dc0,
        "dweights": others if a["need_weights"] else [],
        "dgates": dgates,
        "dh": dh,
        "norms": norms,
    }


def stack(a: Names, weights: Any, stepper: bool) -> dict[str, Any]:
    """What infer and Stepper.step must give."""
    kernel_type(a["x"])
    like, cell, layers, D = a["x"], name_of(a["cell"]), a["layers"], 2 if a["bidirectional"] else 1
    x, one_step = values(like, "x", None, None), like.dim() == 2
    expect(isinstance(weights, (list, tuple)), "weights")
    expect(0 < layers <= len(weights) and len(weights) % layers == 0, "layers")
    expect(isinstance(a["zoneout"], tuple) and len(a["zoneout"]) == 2, "zoneout")
    given = {name: None if a[name] is None else values(a[name], name, None, like) for name in ("h0", "c0")}
    if one_step:
        x = x[None]
        given = {n: t if t is None or stepper else t[None] for n, t in given.items()}
    _, T, B = steps_of(None, x)
    each, finals = len(weights) // layers, []
    sizes: set[tuple[int, int]] = set()
    for k in range(layers):
        own, H, R = weights_of(weights[k * each : (k + 1) * each], cell, D, x, like)
        sizes.add((H, R))
        for name, width in (("h0", R), ("c0", max(beside(cell), 1) * H)):
            shape = (layers * D, B, width)
            expect(given[name] is None or tuple(given[name].shape) == shape, f"{name} is not {shape}")
        expect(several(cell) or given["c0"] is None, "no c")
        h0, c0 = (None if t is None else t[k * D : (k + 1) * D] for t in given.values())
        parts = zip(a["zoneout"], (R, H if several(cell) else 0))
        keeps = [x.new_full((T, B, D * n), p).to(like.dtype).double() if p != 0 and n else None for p, n in parts]
        done = op_loop(cell, x, None, h0, c0, own, D, (None, *keeps)) if B else nothing(D, x, H, R, cell)
        x = done.y.reshape(T, B, D * R)
        finals.append((done.h_n, x.new_zeros(0, B, H) if done.c_n is None else done.c_n))
    expect(len(sizes) == 1, "layers of several sizes")
    h_n, c_n = (torch.cat(parts) for parts in zip(*finals))
    if one_step:
        x = x[0]
        h_n, c_n = (h_n, c_n) if stepper else (h_n.squeeze(0), c_n.squeeze(0) if len(c_n) else c_n)
    return {"y": x, "h_n": h_n} | ({"c_n": c_n} if several(cell) else {})


def right(kind: str, a: Names) -> dict[str, Any]:
    if kind == "forward":
        return forward(a)
    if kind == "backward":
        return backward(a)
    if kind == "infer":
        return stack(a, a["weights"], stepper=False)
    two = several(a["cell"])
    expect(isinstance(a["hx"], tuple) == (two and a["hx"] is not None), "hx")
    expect(not two or (a["h0"] is None) == (a["c0"] is None), "half a state")
    return stack(a, a["weights"], stepper=True)


@contextmanager
def filled_memory() -> Iterator[None]:
    """New memory is NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def raised(code: Any, names: Names) -> BaseException | None:
    """The exception of a statement: here it is a result like any other."""
    try:
        exec(code, names)
    except Exception as error:  # noqa: BLE001
        return error
    return None


def tensors_of(names: Names) -> list[Tensor]:
    flat = [t for v in names.values() for t in (v if isinstance(v, (list, tuple)) else [v])]
    flat += list(names["p"].values()) if isinstance(names.get("p"), dict) else []
    return [t for t in flat if isinstance(t, Tensor) and t.layout == torch.strided and t.device.type == "cpu"]


def memory_of(tensors: list[Tensor]) -> list[Tensor]:
    """A copy of the bytes that they lie in."""
    return [torch.tensor([], dtype=torch.uint8).set_(t.untyped_storage()).clone() for t in tensors
            if not t._is_zerotensor() and not t.is_nested]  # fmt: skip


def ordinary(tensors: list[Tensor]) -> bool:
    """Whether float32 holds everything that a cell makes of the numbers."""
    floats = [t.detach() for t in tensors if t.dtype in TOLERANCE and t.numel() and t.numel() <= MANY]
    return all(bool(t.double().isfinite().all()) and t.double().abs().max() < 100 for t in floats)


def same_arguments(a: Names, b: Names, names: Sequence[str]) -> bool:
    """Whether y and saved are those of the arguments: the call was changed in other ways alone."""

    def equal(v: Any, w: Any) -> bool:
        if isinstance(v, Tensor) and isinstance(w, Tensor):
            return v.shape == w.shape and torch.equal(v.detach().double(), w.detach().double())
        if isinstance(v, (list, tuple)) and isinstance(w, (list, tuple)):
            return len(v) == len(w) and all(map(equal, v, w))
        return type(v) is type(w) and v == w

    return all(equal(a[name], b[name]) for name in names)


def difference(name: str, got: Any, expected: Any, x: Tensor, numbers: bool) -> list[str]:
    """What is wrong with one result."""
    if isinstance(expected, list):
        if not isinstance(got, (list, tuple)) or len(got) != len(expected):
            return [f"{name}: not {len(expected)} tensors"]
        pairs = enumerate(zip(got, expected, strict=True))
        return [text for i, (g, e) in pairs for text in difference(f"{name}[{i}]", g, e, x, numbers)]
    compute = torch.float32 if x.itemsize == 2 else x.dtype
    if name == "saved":
        D, rows, columns, dtype, c = expected
        if got.shape[:-1] != (D, rows) or got.shape[-1] < columns or got.dtype != dtype:
            return [f"saved: {got.dtype} {tuple(got.shape)}, expected {dtype} {(D, rows, columns)} or wider"]
        if got.is_meta or not numbers:
            return []
        if c is not None:
            H = c.shape[-1] // D
            own = torch.cat(list(got[..., columns - H : columns]), dim=-1)
            return difference("c", own, c, x.new_empty(0, dtype=got.dtype) if x.itemsize > 2 else x, numbers)
        return ["saved: numbers that nobody wrote"] if got[..., :columns].isnan().any() else []
    dtype = compute if name in ("dgates", "dh", "norms", "c") else x.dtype
    if got.shape != expected.shape or got.dtype != dtype or got.device != x.device:
        return [f"{name}: {got.dtype} {tuple(got.shape)} on {got.device}, expected {dtype} {tuple(expected.shape)}"]
    if got.is_meta or not numbers or not got.numel():
        return []
    off = (got.detach().double() - expected.detach()).abs().max().item()
    bound = 4 * TOLERANCE[x.dtype] * max(1.0, expected.abs().max().item())
    return [] if off <= bound else [f"{name}: off by {off:.3g}, no more than {bound:.3g} allowed"]


def overlapping(results: list[Tensor], arguments: list[Tensor]) -> bool:
    places = [t.untyped_storage().data_ptr() for t in results if t.device.type == "cpu" and t.numel()]
    taken = {t.untyped_storage().data_ptr() for t in arguments if t.numel() <= MANY and not t._is_zerotensor()}
    return len(set(places)) < len(places) or not taken.isdisjoint(places)


def faults(call: Call) -> list[str]:
    """What is wrong with the call; nothing, if all is well."""
    if call.kind == "tools":
        return tool_faults(call)
    names: Names = {}
    with torch.random.fork_rng(), filled_memory():
        if raised(call.setup, names) is not None:
            return []  # torch refused the change, or the stepper what it was prepared for
        expected, why = None, ""
        try:
            expected = right(call.kind, names)
        except Misfit as misfit:
            why = str(misfit)
        except (TypeError, KeyError) as error:  # a number that is none, a name that is none
            why = repr(error)
        arguments = tensors_of(names)
        before = memory_of(arguments)
        numbers = expected is not None and ordinary(arguments) and all(map(math.isfinite, names.get("zoneout", ())))
        error = raised(f"out = {call.call}", names)
        after = memory_of(arguments)
    if error is not None:
        if call.changed:
            odd = not isinstance(error, ERRORS) or "INTERNAL ASSERT" in str(error)
            return [f"{type(error).__name__}: {str(error)[:150]}"] if odd else []
        return [f"a call that fits raises {error!r}"[:300]]
    if any(not torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        return ["an argument has changed"]
    out = names["out"]
    if out is None and call.kind in ("infer", "step"):
        return []
    if call.kind == "step":
        out = (out[0], *(out[1] if isinstance(out[1], tuple) else out[1:]))
    results = list(out) if isinstance(out, (list, tuple)) else []
    if expected is None:
        on_meta = all(t.is_meta for t in results if isinstance(t, Tensor))  # shapes alone: fusedrnn/layer/ops.py
        on_meta = on_meta or ("lacks memory" in why and 0 in names["x"].shape[:-1])  # nothing is read
        return [] if results and on_meta else [f"a result, though: {why}"]
    if len(results) != len(expected):
        return [f"{len(results)} results, not {len(expected)}"]
    if call.kind == "backward" and numbers and not names["x"].is_meta:
        original: Names = {}
        raised("; ".join([call.prelude, *call.begin]), original)
        numbers = same_arguments(names, original, [
            "x", "batch_sizes", "h0", "c0", "weights", "y", "saved", "cell", "bidirectional", "mask_h", "keep_h",
            "keep_c",
        ])  # fmt: skip
    x = names["x"]
    found = [text for (name, e), got in zip(expected.items(), results) for text in difference(name, got, e, x, numbers)]
    flat = tensors_of({"out": [t for r in results for t in (r if isinstance(r, list) else [r])]})
    return found + (["results lie in the memory of others"] if overlapping(flat, arguments) else [])


# Functions without tensors.


def tool_faults(call: Call) -> list[str]:
    names: Names = {}
    error = raised(call.line, names)
    if error is not None:
        odd = not isinstance(error, (*ERRORS, AttributeError))
        return [f"{type(error).__name__}: {str(error)[:150]}"] if odd else []
    out, function = names["out"], call.call[3:].partition("(")[0]
    if function in ("packed_bytes", "packed_uses"):
        return [] if out == 0 and call.call.count("packed_weights()") == 1 and "type" not in call.call else [f"{out}"]
    if function == "kept_parameters":
        fit = out is None or [id(getattr(names["m"], name)) for name in names["names"]] == list(map(id, out))
        return [] if fit else [f"others than torch.nn reads: {str(out)[:200]}"]
    return []
