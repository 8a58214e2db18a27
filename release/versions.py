"""``make test-versions``: the wheel's tests under every torch and Python that are supported.

The wheel of ``make wheel`` is built once. For each pair its files are laid into a copy of the tree in build/versions,
the tests are run there in an environment of the pair's own, and both are deleted afterwards (5 GB and five minutes or
more each). Each torch runs all tests with one Python, the most telling files (SMOKE) with others. The table goes to
docs/versions.md.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from .supported import ABSENT, NEWEST, PYTHON, ROOT, TORCH, Pair, interpreter, sources

WORK = ROOT / "build" / "versions"
READINGS = ROOT / "docs" / "versions.json"
PAGE = ROOT / "docs" / "versions.md"

#: What depends on torch and Python more than on our own code.
SMOKE = [
    f"tests/test_{name}.py"
    for name in (
        "autocast", "autograd", "build", "compile", "convert", "errors", "export", "infer", "memory_safety", "meta",
        "modules", "patch", "protocol", "second_order", "step", "torch_internals", "torch_samples", "torch_tools",
        "transforms", "weights_read",
    )
] + ["tests/test_benchmarks.py::test_the_timers_see_every_phase_of_a_layer"]  # fmt: skip
#: But for the tests of these cells, by words in their names: all cells go the same ways through torch.
OTHER_CELLS = ("relu", "residual", "reset_before", "mgu", "peephole", "indrnn", "layernorm", "layer_norm", "slstm")
SMOKE += ["-k", f"not ({' or '.join(OTHER_CELLS)})"]
#: How ``--newest`` compiles: in half the time, as nothing is timed and the instruction sets hold no torch; and with the
#: timers, for the test that needs them.
SMOKE_FLAGS = "-O1 -DFUSEDRNN_BASE_ONLY -DFUSEDRNN_PHASES"

#: One Python for each torch.
WHOLE = [Pair(torch, python) for torch, python in zip(TORCH, ("3.10", "3.12", "3.11", "3.11", "3.13"), strict=True)]
#: And the oldest and the newest torch with every Python, every torch with the newest.
PAIRS = [
    Pair(torch, python)
    for torch in TORCH
    for python in PYTHON
    if torch in (TORCH[0], TORCH[-1]) or python == PYTHON[-1] or Pair(torch, python) in WHOLE
]
PAIRS = [pair for pair in PAIRS if pair not in ABSENT]


def copy_tree(to: Path) -> None:
    """What git would commit."""
    shutil.rmtree(to, ignore_errors=True)
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def lay_in(wheel: Path, tree: Path) -> None:
    """The package, as the wheel has it."""
    shutil.rmtree(tree / "fusedrnn")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tree, [name for name in files.namelist() if name.startswith("fusedrnn/")])


def commands(pair: Pair, python: str, wheel: Path | None, tests: list[str]) -> list[list[str]]:
    """What sets up the environment and runs the tests; without a wheel, ``make test`` builds from the sources."""
    if wheel is None:
        arguments = f"ARGS=-q -n auto --dist worksteal {shlex.join(tests)}"
        return [["make", "test", f"TORCH={pair.torch}", f"PYTHON={python}", arguments]]
    install = [".venv/bin/python", "-m", "pip", "-q", "install", f"torch=={pair.torch}", "-r", "requirements-dev.txt"]
    pytest = [".venv/bin/python", "-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal", *tests]
    return [[python, "-m", "venv", ".venv"], install, pytest]


def run(pair: Pair, wheel: Path | None, keep: bool, tests: list[str]) -> dict[str, str] | None:
    """The reading of a pair: what pytest said in its last line. None: no such interpreter here."""
    python = interpreter(pair.python)
    if python is None:
        print(f"{pair}: no such interpreter here")
        return None
    tree = WORK / f"torch-{pair.torch}-python-{pair.python}"
    copy_tree(tree)
    settings = {"FUSEDRNN_CUDA": "0", **os.environ, "PYTHONPATH": str(tree)}
    if wheel is None:
        settings["FUSEDRNN_CXX_FLAGS"] = SMOKE_FLAGS
    else:
        lay_in(wheel, tree)
    code = 0
    with open(WORK / f"{tree.name}.log", "w+") as log:
        for command in commands(pair, python, wheel, tests):
            code = code or subprocess.run(command, cwd=tree, env=settings, stdout=log, stderr=log).returncode
        log.seek(0)
        lines = log.read().splitlines()
    said = next((line.strip("= ") for line in reversed(lines) if re.search(r"\d+ (passed|failed|error)", line)), None)
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    result = said or f"exit {code}: {WORK / tree.name}.log"
    print(f"{pair}: {result}", *failed, sep="\n  ", flush=True)
    if not keep:
        shutil.rmtree(tree)
    reading = {"tests": "some" if tests else "all", "result": result, "date": datetime.date.today().isoformat()}
    return reading | {"wheel": digest(wheel) if wheel else "", "ok": not code}


def digest(wheel: Path) -> str:
    return hashlib.sha256(wheel.read_bytes()).hexdigest()[:12]


def write(wheel: Path, readings: dict[str, dict[str, str]]) -> None:
    """The page and its data: what was read of this wheel."""
    readings = {pair: reading for pair, reading in readings.items() if reading["wheel"] == digest(wheel)}
    READINGS.write_text(json.dumps(readings, indent=1) + "\n")
    lines = [
        "# Versions of torch and Python",
        "",
        "What `make test-versions` printed, on Linux x86-64: one wheel, built once, each pair in an environment of",
        f"its own. (The SHA-256 of the wheel begins with {digest(wheel)}.) *all*: every test; *some*: the files that",
        "depend on torch and Python more than on the kernels",
        "(`SMOKE` of `release/versions.py`). Of macOS there is no reading; of arm64 see CONTRIBUTING.",
        "",
        "| torch | Python | tests | result | date |",
        "|---|---|---|---|---|",
    ]
    for pair in PAIRS:
        if found := readings.get(str(pair)):
            result = re.sub(r" in .*", "", found["result"])
            lines.append(f"| {pair.torch} | {pair.python} | {found['tests']} | {result} | {found['date']} |")
    PAGE.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Run the pairs that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print the pairs and stop")
    parser.add_argument("--only", default="", metavar="REGEX", help="pairs such as 'torch 2.15.0, Python 3.13'")
    parser.add_argument(
        "--newest", action="store_true", help="built from the sources: the newest torch, this Python, SMOKE"
    )
    parser.add_argument("--wheel", type=Path, help="default: that in dist/")
    parser.add_argument("--keep", action="store_true", help="leave the trees in build/versions")
    parser.add_argument("tests", nargs="*", help="files of tests instead; docs/versions.md stays as it is")
    args = parser.parse_args()
    pairs = [pair for pair in PAIRS if re.search(args.only, str(pair))]
    if args.list:
        print(*(f"{pair}: {'all' if pair in WHOLE else 'some'}" for pair in pairs), sep="\n")
        return
    WORK.mkdir(parents=True, exist_ok=True)
    if args.newest:
        reading = run(Pair(NEWEST, "{}.{}".format(*sys.version_info)), None, args.keep, args.tests or SMOKE)
        sys.exit(reading is None or not reading["ok"])
    wheels = [args.wheel] if args.wheel else list((ROOT / "dist").glob("fusedrnn-*.whl"))
    if len(wheels) != 1:
        sys.exit(f"error: {len(wheels)} wheels in dist/, one is needed: make wheel")
    (wheel,) = wheels
    if wheel.with_suffix(".sources").read_text() != sources():
        sys.exit(f"error: {wheel.name} was built from other sources: make wheel")
    ok = True
    for pair in pairs:
        reading = run(pair, wheel, args.keep, args.tests or ([] if pair in WHOLE else SMOKE))
        ok = ok and reading is not None and reading["ok"]
        if reading and not args.tests:  # a run may be cut short
            write(wheel, (json.loads(READINGS.read_text()) if READINGS.exists() else {}) | {str(pair): reading})
    sys.exit(not ok)


if __name__ == "__main__":
    main()
