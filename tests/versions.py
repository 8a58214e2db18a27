"""``make test-versions``: the tests under every torch and Python that are supported, each in an environment of its own.

For each pair a copy of the tree in build/versions is set up, built and tested by ``make test``, and deleted afterwards
(5 GB and five minutes each). All tests run for the oldest torch with the oldest Python and for the newest with the
newest, the most telling files (SMOKE) for the others. Interpreters are found on PATH, or below ~/.pyenv. The table goes
to docs/versions.md.
"""

from __future__ import annotations

import argparse
import datetime
import glob
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
WORK = ROOT / "build" / "versions"
READINGS = ROOT / "docs" / "versions.json"
PAGE = ROOT / "docs" / "versions.md"

NEWEST = re.search(r"^torch==(\S+)", (ROOT / "requirements-newest.txt").read_text(), re.MULTILINE)[1]
TORCH = ("2.11.0", "2.12.1", "2.13.0", "2.14.1", NEWEST)
PYTHON = ("3.10", "3.11", "3.12", "3.13")
ENDS = (TORCH[0], TORCH[-1]), (PYTHON[0], PYTHON[-1])

#: What depends on torch and Python more than on our own code.
SMOKE = [
    f"tests/test_{name}.py"
    for name in (
        "autocast", "autograd", "compile", "convert", "errors", "export", "infer", "memory_safety", "meta", "modules",
        "patch", "protocol", "second_order", "step", "torch_internals", "torch_samples", "torch_tools", "transforms",
        "weights_read",
    )
] + ["tests/test_benchmarks.py::test_the_timers_see_every_phase_of_a_layer"]  # fmt: skip
#: How the smoke set's extension is compiled: in half the time, as nothing is timed and the instruction sets hold no
#: torch; and with the timers, for the test that needs them.
SMOKE_FLAGS = "-O1 -DFUSEDRNN_BASE_ONLY -DFUSEDRNN_PHASES"


class Pair(NamedTuple):
    torch: str
    python: str

    @property
    def whole(self) -> bool:
        """Whether all tests are run: the oldest together, and the newest."""
        return self in [Pair(torch, python) for torch, python in zip(*ENDS, strict=True)]

    def __str__(self) -> str:
        return f"torch {self.torch}, Python {self.python}"


#: Pairs that torch has no wheel for.
ABSENT = {Pair("2.15.0", "3.10")}
#: Each torch with the oldest and the newest Python, each Python with the oldest and the newest torch.
PAIRS = [Pair(t, p) for t in TORCH for p in PYTHON if (t in ENDS[0] or p in ENDS[1]) and Pair(t, p) not in ABSENT]


def interpreter(version: str) -> str | None:
    found = shutil.which(f"python{version}")
    if found and subprocess.run([found, "-V"], capture_output=True).returncode == 0:  # a shim may lead nowhere
        return found
    homes = sorted(glob.glob(os.path.expanduser(f"~/.pyenv/versions/{version}.*/bin/python")))
    return homes[-1] if homes else None


def copy_tree(to: Path) -> None:
    """What git would commit."""
    shutil.rmtree(to, ignore_errors=True)
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)


def run(pair: Pair, keep: bool, arguments: list[str]) -> dict[str, str] | None:
    """The reading of a pair: what pytest said in its last line. None: no such interpreter here."""
    python = interpreter(pair.python)
    if python is None:
        print(f"{pair}: no such interpreter here")
        return None
    tree = WORK / f"torch-{pair.torch}-python-{pair.python}"
    copy_tree(tree)
    given = arguments or ([] if pair.whole else SMOKE)
    settings = {"FUSEDRNN_CUDA": "0"} | os.environ
    if given == SMOKE:
        settings["FUSEDRNN_CXX_FLAGS"] = SMOKE_FLAGS
    arguments_of_pytest = f"-q -n auto --dist worksteal {' '.join(given)}"
    command = ["make", "test", f"TORCH={pair.torch}", f"PYTHON={python}", f"ARGS={arguments_of_pytest}"]
    with open(WORK / f"{tree.name}.log", "w+") as log:
        code = subprocess.run(command, cwd=tree, env=settings, stdout=log, stderr=subprocess.STDOUT).returncode
        log.seek(0)
        lines = log.read().splitlines()
    said = next((line.strip("= ") for line in reversed(lines) if re.search(r"\d+ (passed|failed|error)", line)), None)
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    result = said or f"make: exit {code}"
    print(f"{pair}: {result}", *failed, sep="\n  ", flush=True)
    if not keep:
        shutil.rmtree(tree)
    tests = "all" if pair.whole and not arguments else "some"
    return {"tests": tests, "result": result, "date": datetime.date.today().isoformat(), "ok": not code}


def write(readings: dict[str, dict[str, str]]) -> None:
    READINGS.write_text(json.dumps(readings, indent=1) + "\n")
    lines = [
        "# Versions of torch and Python",
        "",
        "What `make test-versions` printed, on Linux x86-64: each pair in an environment of its own, built there.",
        "*all*: every test; *some*: the files that depend on torch and Python more than on the kernels (`SMOKE` of",
        "`tests/versions.py`); the set has grown, so older rows have fewer.",
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
    parser.add_argument("--newest", action="store_true", help="the newest torch, the Python that runs this, SMOKE")
    parser.add_argument("--keep", action="store_true", help="leave the trees in build/versions")
    parser.add_argument("tests", nargs="*", help="files of tests instead; docs/versions.md stays as it is")
    args = parser.parse_args()
    pairs = [pair for pair in PAIRS if re.search(args.only, str(pair))]
    if args.list:
        print(*pairs, sep="\n")
        return
    WORK.mkdir(parents=True, exist_ok=True)
    if args.newest:
        reading = run(Pair(NEWEST, "{}.{}".format(*sys.version_info)), args.keep, args.tests or SMOKE)
        sys.exit(reading is None or not reading["ok"])
    readings = json.loads(READINGS.read_text()) if READINGS.exists() else {}
    found = {str(pair): run(pair, args.keep, args.tests) for pair in pairs}
    if not args.tests:
        write(readings | {name: reading for name, reading in found.items() if reading})
    sys.exit(any(reading is None or not reading["ok"] for reading in found.values()))


if __name__ == "__main__":
    main()
