"""Layers of a user's own cells (fusedrnn.cell): compiled, they equal those of the package, and do what these can."""

from __future__ import annotations

import copy
import inspect
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from drawn_cells import functions, made_of
from hypothesis import HealthCheck, Phase, given, settings
from own_cells import FUNCTIONS, LAYERS, every_function
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pack_sequence
from written_cells import gru, lstm, mgu, peephole_lstm

import fusedrnn
from fusedrnn import _C, CELLS, user_cells
from fusedrnn.functional import recurrent
from fusedrnn.user_cells import UserCell, layers, library

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler")


@pytest.fixture(autouse=True, scope="module")
def _quick_compilation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FUSEDRNN_CXX_FLAGS", "-O0")
        patch.setenv("FUSEDRNN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pair(cell: UserCell, *sizes: int, dtype: torch.dtype = torch.float64, **options) -> tuple[nn.Module, nn.Module]:
    """A layer of a user's cell and the package's own, with the same weights."""
    ours, built_in = (cls(*sizes, dtype=dtype, **options) for cls in (cell.Module, LAYERS[cell]))
    built_in.load_state_dict(ours.state_dict())
    return ours, built_in


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def flat(result: tuple) -> list[Tensor]:
    y, last = result[:2]
    y = y.data if not isinstance(y, Tensor) else y
    return [y, *(last if isinstance(last, tuple) else (last,))]


@pytest.mark.parametrize("cell", LAYERS, ids=lambda cell: cell.name)
def test_it_equals_the_layer_of_the_package(cell: UserCell) -> None:
    """Padded, ragged and with resets, forward, backward, a second derivative, in inference and by steps."""
    options = {"num_layers": 2, "bidirectional": True, "recurrent_dropout": 0.2, "dropout": 0.3}
    for others in ({}, options):
        ours, built_in = pair(cell, 3, 5, **others)
        x = torch.randn(6, 4, 3, dtype=torch.float64, requires_grad=True)
        reset = torch.rand(6, 4) < 0.3
        for call in ({}, {"lengths": [6, 2, 0, 5]}, {"reset": reset}):
            results = []
            for module in (ours, built_in):
                torch.manual_seed(1)
                found = flat(module(x, **call))
                leaves = [x, *module.parameters()]
                first = torch.autograd.grad(sum(t.sin().sum() for t in found), leaves, create_graph=True)
                second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
                results.append([*found, *first, *second])
            close(*results)
        packed = pack_sequence([x[:n, 0] for n in (6, 3, 1)])
        ours.eval(), built_in.eval()
        close(flat(ours(packed)), flat(built_in(packed)))
        with torch.no_grad():
            for _ in range(3):
                close(flat(ours(x)), flat(built_in(x)))
            if not ours.bidirectional:
                close(flat(ours.step(x[0])), flat(built_in.step(x[0])))


@pytest.mark.isa
@pytest.mark.parametrize("cell", [mgu, peephole_lstm], ids=lambda cell: cell.name)
@pytest.mark.parametrize("number", [1, 2])
def test_under_each_instruction_set(cell: UserCell, number: int, threads: Callable) -> None:
    threads(number)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        results = []
        for module in pair(cell, 7, 19, dtype=dtype, bidirectional=True):
            torch.manual_seed(2)
            x = torch.randn(9, 5, 7).to(dtype).requires_grad_()
            found = flat(module(x, lengths=[9, 9, 4, 7, 1]))
            leaves = [x, *module.parameters()]
            results.append([*found, *torch.autograd.grad(sum(t.float().sin().sum() for t in found), leaves)])
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_function_is_torchs(dtype: torch.dtype) -> None:
    """Over all magnitudes, at infinities and NaN, to a few units in the last place; 0 for results below the normal
    numbers.
    """
    info, count = torch.finfo(dtype), len(FUNCTIONS) + 3
    magnitudes = torch.logspace(-44 if dtype == torch.float32 else -300, 37 if dtype == torch.float32 else 300, 400)
    near = torch.linspace(-110, 110, 881)
    if dtype == torch.float64:
        magnitudes, near = magnitudes.double(), 7 * near.double()
        magnitudes = torch.logspace(-300, 300, 400, dtype=dtype)
    odd = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan, 1.0, info.tiny, info.max, -info.max], dtype=dtype)
    one = 1 + torch.linspace(-0.4, 0.6, 201, dtype=dtype) ** 3
    values = torch.cat([magnitudes, -magnitudes, near, odd, one]).to(dtype)
    layer = every_function.Module(1, count, dtype=dtype, bias=False)
    half = 0.5
    with torch.no_grad():
        layer.weight_ih_l0.fill_(1)
        layer.weight_hh_l0.copy_(torch.cat([torch.full((count,), half), torch.arange(count)]))
        y = layer(values.view(-1, 1, 1))[0][:, 0]
    wide = values.double()
    p = torch.tensor(half).double()
    expected = [f(wide) for f in FUNCTIONS.values()] + [wide.maximum(p), wide.minimum(p), p / wide]
    names = [getattr(f, "__name__", "?") for f in FUNCTIONS] + ["maximum", "minimum", "/"]
    for j, (name, right) in enumerate(zip(names, expected, strict=True)):
        found, right = y[:, j], right.to(dtype)
        assert torch.equal(found.isnan(), right.isnan()), (name, values[found.isnan() != right.isnan()])
        infinite = right.isinf()
        assert torch.equal(found[infinite], right[infinite]), name
        ordinary = ~(right.isnan() | infinite)
        error = (found - right)[ordinary].abs() / (right[ordinary].abs() * info.eps).clamp(min=info.tiny)
        small = right[ordinary].abs() < info.tiny  # which may be 0
        worst = error[~small].max().item()
        assert worst < 3 and (found[ordinary][small].abs() <= info.tiny).all(), (name, worst)


@pytest.mark.long
@settings(suppress_health_check=list(HealthCheck), phases=[Phase.generate], max_examples=20)
@given(functions())
def test_drawn_cells_pass_gradcheck(drawn: tuple[str, dict[str, str]]) -> None:
    """Their kernels: the check before the first use is against torch.autograd and finite differences. For the portable
    instruction set alone, which compiles in the least time.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(library.SETS, _C.isa(), library.SETS["base"])
        cell = made_of(*drawn)
        module = cell.Module(3, 5, num_layers=2, bidirectional=True)
        assert (library._added[module._cell][1] / layers._CHECKED).exists()
        assert all(t.isfinite().all() for t in flat(module(torch.randn(3, 2, 3))))


def test_a_layer_of_its_own_class(tmp_path: Path) -> None:
    class Named(fusedrnn.Recurrent, cell=gru):
        """A GRU."""

    with pytest.raises(TypeError, match="cell must be made by fusedrnn.cell, got str"):
        type("Wrong", (fusedrnn.Recurrent,), {}, cell="gru")
    with pytest.raises(TypeError, match="None has no cell: class NAME"):
        type("None", (fusedrnn.Recurrent,), {})(2, 3)
    module = Named(2, 3)
    assert repr(module) == "Named(2, 3)" and isinstance(module, nn.RNNBase) and gru.Module.__doc__ is None
    arguments = list(inspect.signature(Named).parameters)
    assert arguments[:3] == ["input_size", "hidden_size", "num_layers"] and "eager" in arguments
    with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM"):
        lstm.Module(2, 4, proj_size=3)


def test_copies_and_files() -> None:
    module, x = peephole_lstm.Module(2, 3, num_layers=2), torch.randn(4, 2, 2)
    expected = flat(module(x))
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    pickled = [pickle.loads(pickle.dumps(module, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for again in (copy.deepcopy(module), torch.load(buffer, weights_only=False), *pickled):
        assert type(again) is peephole_lstm.Module and all(map(torch.equal, flat(again(x)), expected))
    names = [name for name in module.state_dict() if name.endswith("l0")]
    assert names == ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "weight_unit_l0"]


def test_a_pickle_in_another_process(tmp_path: Path) -> None:
    """Where the cell has not been used yet: it is compiled, or found, there."""
    module, x = mgu.Module(2, 3), torch.ones(4, 2, 2)
    (tmp_path / "module").write_bytes(pickle.dumps(module))
    code = (
        "import sys, pickle, torch; m = pickle.load(open(sys.argv[1], 'rb')); print(m(torch.ones(4, 2, 2))[0].tolist())"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "module")], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )  # fmt: skip
    assert eval(told.stdout) == module(x)[0].tolist()


def test_vmap_recording_and_export() -> None:
    ours, built_in = pair(peephole_lstm, 2, 3)
    xs = torch.randn(4, 5, 1, 2, dtype=torch.float64)
    found = []
    for module in (ours, built_in):
        parameters = {name: p.detach() for name, p in module.named_parameters()}

        def loss(parameters: dict[str, Tensor], x: Tensor, module: nn.Module = module) -> Tensor:
            return functional_call(module, parameters, (x,))[0].sin().sum()

        with fusedrnn.record_gradients(module) as recorded:
            module(xs[0])[0].sum().backward()
        norms = [recorded.layers[0].h, recorded.layers[0].c]
        exported = torch.export.export(module.eval(), (xs[0],)).module()(xs[0])
        found.append([*vmap(grad(loss), (None, 0))(parameters, xs).values(), *norms, *flat(exported)])
    close(*found)


@pytest.mark.parametrize("mode", [nullcontext, FakeTensorMode])
def test_a_cell_that_is_not_there_is_told_with_what_to_do(mode: Callable) -> None:
    """A program of another process runs, or is compiled again."""
    with mode():
        x, weights = torch.randn(2, 1, 3), [torch.randn(8, 3), torch.randn(8, 4)]
        told = "unknown cell 'mgu_0123': .* import the module .* one layer of it"
        with pytest.raises((ValueError, RuntimeError), match=told):
            torch.ops.fusedrnn.layer_forward(x, None, None, None, weights, "mgu_0123", False, False)


def test_compiled_by_torch() -> None:
    module, x = gru.Module(2, 3), torch.randn(4, 2, 2, requires_grad=True)
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        results = [[y, *torch.autograd.grad(y.sin().sum(), [x])] for y in (compiled(x)[0], module(x)[0])]
    assert all(map(torch.equal, *results))


def test_eager() -> None:
    """By torch's operations, nothing is compiled."""
    before = set(library._added)
    eager = mgu.Module(2, 3, num_layers=2, eager=True, dtype=torch.float64)
    assert set(library._added) == before and CELLS[eager._cell].eager
    ours = mgu.Module(2, 3, num_layers=2, dtype=torch.float64)
    ours.load_state_dict(eager.state_dict())
    x = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    results = []
    for module in (eager, pickle.loads(pickle.dumps(eager)), ours):
        found = flat(module(x, lengths=[4, 0, 2]))
        found += torch.autograd.grad(found[0].sin().sum(), [x, *module.parameters()])
        with torch.no_grad():
            found += [*flat(module(x)), *flat(module.step(x[0]))]
        results.append(found)
    close(results[0], results[2])
    close(results[0], results[1])
    with pytest.raises(RuntimeError, match="grad_clip and bptt_steps change the first gradient alone: .* eager=True"):
        mgu.Module(2, 3, eager=True, grad_clip=1.0)(torch.randn(2, 1, 2))


def test_a_gate_of_which_one_part_is_used() -> None:
    """Its other rows have zero gradients."""

    def half(x, rec, h):
        return h + torch.tanh(x.f) * torch.tanh(rec.n)

    module = fusedrnn.cell(gates="f n")(half).Module(2, 3, eager=True)
    module(torch.randn(4, 2, 2))[0].sum().backward()
    of_f, of_n = module.weight_ih_l0.grad.chunk(2)
    assert of_f.all() and not of_n.any()
    of_f, of_n = module.weight_hh_l0.grad.chunk(2)
    assert not of_f.any() and of_n.all()
    with pytest.raises(fusedrnn.CellError, match="the gate k has no effect"):
        fusedrnn.cell(gates="f n k")(half)


def test_the_state_of_a_layer_is_a_tensor() -> None:
    h = torch.zeros(1, 1, 3)
    with pytest.raises(TypeError, match="hx of mgu_.* must be a tensor, got tuple"):
        mgu.Module(2, 3, eager=True)(torch.zeros(4, 1, 2), (h,))


def test_what_an_eager_layer_does_not_do() -> None:
    eager = mgu.Module(2, 3, eager=True, dtype=torch.float16)
    with pytest.raises(ValueError, match="record_gradients: made with eager=True"):
        fusedrnn.record_gradients(eager)
    with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0"):
        eager(torch.zeros(0, 1, 2, dtype=torch.float16))
    limited = of_large_numbers.Module(2, 3, eager=True, dtype=torch.float16)
    assert limited(torch.ones(2, 1, 2, dtype=torch.float16))[0].isfinite().all()


@fusedrnn.cell(gates="f")
def of_large_numbers(x, rec, h):
    return torch.tanh(user_cells.maximum(x.f + rec.f, -1e6)) + h  # beyond float16


def _hidden(x, rec, h):
    """kName = "odd" \N{GREEK SMALL LETTER SIGMA}."""
    return torch.tanh(x.f + rec.f) * h


under_another_name = fusedrnn.cell(gates="f")(_hidden)


@fusedrnn.cell(gates="f")
def not_eager(x, rec, h):
    NAN = torch.tanh(x.f + rec.f)
    errno = NAN * h
    M_PI = errno + h
    return M_PI + errno


@fusedrnn.cell(gates="f")
def values(x, rec, h):
    return torch.tanh(x.f + rec.f)


@fusedrnn.cell(gates="f")
def _2d(x, rec, h):
    return torch.tanh(x.f - rec.f)


def test_names_of_functions_and_values() -> None:
    """Those that C++ has otherwise, and ours; and a function by another name than its cell's."""
    x = torch.randn(3, 1, 2)
    for cell in (not_eager, values, _2d, under_another_name):
        module = cell.Module(2, 3)
        for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert again._cell == module._cell and torch.equal(again(x)[0], module(x)[0])
            assert not CELLS[again._cell].eager
    holder = nn.Linear(1, 1)
    holder.cell = under_another_name
    assert pickle.loads(pickle.dumps(holder)).cell is under_another_name


def test_recurrent_dropout_is_refused_where_it_is_not_defined() -> None:
    """Where h goes into the first stage beside the products: before them it is not masked."""

    def by_parameter(x, rec, h, p):
        f = torch.sigmoid(x.f + rec.f + p * h)
        return (1 - f) * h + f * torch.tanh(x.n + rec.n(f * h))

    def by_operand(x, rec, h):
        f = torch.sigmoid(x.f + rec.f)
        return (1 - f) * h + f * torch.tanh(x.n + rec.n(f * torch.tanh(3 * h)))

    def in_the_second_stage(x, rec, h):
        f = torch.sigmoid(x.f + rec.f)
        return h * (1 - f) + f * torch.tanh(x.n + rec.n(h * f))

    for function, parameters in ((by_parameter, "p"), (by_operand, "")):
        wrong = fusedrnn.cell(gates="f n", parameters=parameters)(function)
        for eager in (False, True):
            with pytest.raises(ValueError, match=f"recurrent_dropout is not defined for the cell {function.__name__}"):
                wrong.Module(2, 3, recurrent_dropout=0.5, eager=eager)
            module, x = wrong.Module(2, 3, eager=eager), torch.randn(3, 2, 2)
            with pytest.raises(ValueError, match="recurrent_dropout is not defined"):
                recurrent(module._cell, x, None, list(module.parameters()), recurrent_dropout=0.5, training=True)
    right = fusedrnn.cell(gates="f n")(in_the_second_stage)
    ours, eager = (right.Module(2, 3, recurrent_dropout=0.5, eager=e, dtype=torch.float64) for e in (False, True))
    eager.load_state_dict(ours.state_dict())
    x, results = torch.randn(5, 2, 2, dtype=torch.float64, requires_grad=True), []
    for module in (ours, eager):
        torch.manual_seed(1)
        y = module(x)[0]
        results.append([y, *torch.autograd.grad(y.sin().sum(), [x, *module.parameters()])])
    close(*results)


def test_a_child_of_a_process_whose_threads_compile() -> None:
    """It has locks of its own."""
    code = (
        "import os, fusedrnn; from fusedrnn.user_cells import compiler, layers, library\n"
        "for lock in (layers._lock, library._adding, compiler._threads): lock.acquire()\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    for lock in (layers._lock, library._adding, compiler._threads):\n"
        "        assert lock.acquire(timeout=5)\n"
        "    os._exit(7)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["7"], told.stderr


def renamed(name: str, source: str) -> UserCell:
    """gru's equations under another name, and with another source of its struct."""
    namespace: dict = {}
    exec(f"def {name}(x, rec, h):\n    return own.function(x, rec, h)\n", {"own": gru}, namespace)
    cell = fusedrnn.cell(gates="r z n")(namespace[name])
    text = cell.source()
    cell.source = lambda: source.format(text) if source != "wrong" else text.replace("V(1) - ", "V(2) - ")
    return cell


def edited(place: Path, body: str, name: str = "edited", gates: str = "f n") -> UserCell:
    """A cell of a file with this function, which is executed; the file is gone where it has no text."""
    code = f"def {name}(x, rec, h):\n{body}"
    place.write_text(code)
    namespace: dict = {"tanh": user_cells.tanh, "sigmoid": user_cells.sigmoid}
    exec(compile(code, str(place), "exec"), namespace)
    return fusedrnn.cell(gates=gates)(namespace[name])


def test_the_registered_name_is_of_the_mathematics_and_names(tmp_path: Path) -> None:
    """A program that was exported finds its cell by it."""
    line, last = "    f = sigmoid(x.f + rec.f)\n", "    return f * h + tanh(x.n + rec.n)\n"
    forms = [line + last, f"    # a comment \\\n\n{line}{last}", f'    """Said."""\n{line}    # // */\n{last}']
    cells = [edited(tmp_path / f"{i}.py", form) for i, form in enumerate(forms)]
    assert "# a comment" in cells[1].source() and cells[0].source() != cells[1].source()
    namespace: dict = {"tanh": user_cells.tanh, "sigmoid": user_cells.sigmoid}
    exec(f"def edited(x, rec, h):\n{forms[0]}", namespace)  # whose source cannot be read
    cells.append(fusedrnn.cell(gates="f n")(namespace["edited"]))
    before = len(library._added)
    names = {cell.registered for cell in cells} | {mine.Module(2, 3)._cell for mine in cells}
    assert len(names) == 1 and len(library._added) == before + 1
    others = [
        edited(tmp_path / "a.py", line + last.replace("f * h", "f * h * 0.5")),
        edited(tmp_path / "b.py", (line + last).replace("x.n", "x.k").replace("rec.n", "rec.k"), gates="f k"),
        edited(tmp_path / "c.py", line + last, name="edited_too"),
    ]
    eager = {layers._registered(cell, eager=True).removesuffix(layers._EAGER) for cell in [*cells, *others]}
    assert names < eager and len(eager) == 4


def test_kernels_that_are_wrong_are_not_used() -> None:
    """The check before the first use: a derivative with another number in it."""
    cell = renamed("wrong_gru", "wrong")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the compiled kernels of cell wrong_gru_.* do not give its equations"):
            cell.Module(2, 3)
    assert not any(name.startswith("wrong_gru") for name in CELLS)
    folder = next(folder for name, (_, folder) in library._added.items() if name.startswith("wrong_gru"))
    assert (folder / "cell.so").exists() and not (folder / layers._CHECKED).exists()


def test_a_struct_that_does_not_compile_is_told() -> None:
    cell = renamed("broken_gru", "{}\nnonsense;")
    with pytest.raises(RuntimeError, match="the compiler failed with status 1(.|\n)*nonsense"):
        cell.Module(2, 3)
    assert not any(name.startswith("broken_gru") for name in CELLS)


def test_threads_that_come_at_once() -> None:
    cell = renamed("thread_gru", "{}")
    with ThreadPoolExecutor(4) as pool:
        names = {module._cell for module in pool.map(lambda _: cell.Module(2, 3), range(4))}
    assert len(names) == 1


def test_made_first_where_nothing_is_computed() -> None:
    """Under modes that would change the check before the first use, or make it impossible."""
    with FakeTensorMode(), torch.device("meta"), torch.autocast("cpu"), torch.inference_mode():
        module = renamed("fake_gru", "{}").Module(2, 3)
    assert module.weight_ih_l0.is_meta
    assert (library._added[module._cell][1] / layers._CHECKED).exists()


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="a C\\+\\+ compiler is needed.*eager=True"):
        renamed("no_gru", "{}").Module(2, 3)


def test_a_kept_cell_needs_no_compiler() -> None:
    """In another process than the one that compiled it."""
    expected = mgu.registered
    code = "from written_cells import mgu; print(mgu.Module(2, 3)._cell)"
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | {"CXX": "nope", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )  # fmt: skip
    assert told.stdout.strip() == expected and told.stderr == ""


def test_what_the_page_says_runs(tmp_path: Path) -> None:
    """The code of docs/own-cells.md as a file, and the example of the same cell."""
    root = Path(__file__).parent.parent
    page = (root / "docs/own-cells.md").read_text(encoding="utf-8")
    code, debugging = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "page.py").write_text(f"{code}\n{debugging}\nassert new.shape == (8, 64)\n")
    run = partial(subprocess.run, cwd=tmp_path, check=True, capture_output=True, text=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    run([sys.executable, "page.py"], env=environment)
    assert (tmp_path / "own-cell.png").stat().st_size > 10_000
    told = run([sys.executable, str(root / "examples/own_cell.py"), "--out", "other.png"], env=environment).stdout
    assert (tmp_path / "other.png").exists() and "struct Mgu {" in told
    lines = [line.partition("#")[0].rstrip() for line in code.splitlines()]
    body = "\n".join(lines[lines.index('@fusedrnn.cell(gates="f n")') :]).partition("\n\n\n")[0]
    assert body in (root / "examples/own_cell.py").read_text(encoding="utf-8")
