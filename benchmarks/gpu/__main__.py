"""The command ``python -m benchmarks.gpu [PART ...]`` (``make gpu``): everything there is to run on a GPU machine.

Parts, in this order by default: ``build`` the extension in a folder of its own, ``tests`` on the GPU, the
``sanitizer``'s tools over a few of them, ``timing`` against torch.nn and others. First it looks at what the machine
lacks. It stops after a part that fails, or at a signal, and says how to go on; what was found until then is in the
report, and later runs add to it.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import needs
from .parts import KINDS, ROOT, Part, environment, folder, parts, run, signals, watched
from .report import Unusable, commit, digest, gpu, publish, read, versions, write

KEPT_FOR = ("device", "sources", "python", "quick")


def kind_of(name: str) -> str:
    """Of a part: of ``sanitizer-memcheck`` it is ``sanitizer``."""
    return name.partition("-")[0]


def chosen(names: Sequence[str], asked: Sequence[str], device: str) -> list[str]:
    """The parts that are asked for, by name or kind (none: all). A GPU's come after the build: seconds, if nothing
    has changed. The CPU's go without it.
    """
    found = [name for name in names if not asked or name in asked or kind_of(name) in asked]
    if device == "cuda":
        return ["build", *(name for name in found if name != "build")]
    return [name for name in found if kind_of(name) not in ("build", "sanitizer")]


def shortest(left: Sequence[str], names: Sequence[str]) -> list[str]:
    """Parts as arguments of the command: their kind where all parts of that kind are left."""
    whole = {kind_of(name) for name in left} - {kind_of(name) for name in names if name not in left}
    return list(dict.fromkeys(kind_of(name) if kind_of(name) in whole else name for name in left))


def again(parser: argparse.ArgumentParser, args: argparse.Namespace, left: list[str]) -> str:
    """The command that does these parts, with the options and the Python of this one."""
    words = [*left]
    for name in ("device", "quick", "limit", "out"):
        value = getattr(args, name)
        if value != parser.get_default(name):
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    python = "" if shutil.which("python3") == sys.executable else f"PYTHON={shlex.quote(sys.executable)} "
    return f"make gpu {python}ARGS={shlex.quote(shlex.join(words))}"


def begun(args: argparse.Namespace, out: Path, built: Path | None) -> dict:
    """The report before the first part, with the parts that an earlier run of the same sources has done."""
    report = {"date": time.strftime("%Y-%m-%d"), "device": args.device, "commit": commit(), "sources": digest()}
    report |= {"python": environment(built)["PYTHONPATH"], "quick": args.quick, "gpu": {"before": gpu()}}
    before = read(out) if (out / "report.json").exists() else {}
    report["parts"] = before.get("parts", {}) if all(before.get(key) == report[key] for key in KEPT_FOR) else {}
    return report


def do(name: str, part: Part, out: Path, built: Path | None, report: dict, came: Sequence[int]) -> int | None:
    """Run a part and add it to the report; its exit status, None if it was cut off."""
    print(f"{name}: begun; its output goes to {out / f'{name}.log'}", flush=True)
    if name == "timing":
        (out / "timing.jsonl").unlink(missing_ok=True)
    with watched(out / f"{name}-clocks.csv"):
        # Where a package is built, the checkout's is not in the way.
        found = run(name, part, out, ROOT if name == "build" or not built else built, built, came)
    report["parts"][name] = found
    report["gpu"]["after"], report["versions"] = gpu(), versions(built)
    summary = write(report, out)
    status = "cut off" if found["status"] is None else f"exit status {found['status']}"
    print(f"{name}: {status}, {found['seconds']} s: {found['last']}", flush=True)
    if name == "timing" and not came:
        print(summary, flush=True)
    return found["status"]


def go(parser: argparse.ArgumentParser, args: argparse.Namespace, came: Sequence[int]) -> int:
    """Run the parts, until one fails or a signal to stop ``came``; the exit status."""
    out = args.out.resolve()
    wanted = chosen(list(parts(out, args.device)), args.parts, args.device)
    built = folder() if args.device == "cpu" and (folder() / "lib").exists() else None
    if args.device == "cuda":
        kinds = list(dict.fromkeys(map(kind_of, wanted)))
        if lacks := needs.missing(needs.look(), kinds):
            print(f"make gpu ({', '.join(kinds)}) needs, and does not find:")
            print(*(f"  - {lack}" for lack in lacks), sep="\n")
            return 1
        built = folder()
        built.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(built / "cache", ignore_errors=True)  # what an earlier run has measured
    out.mkdir(parents=True, exist_ok=True)
    report, each = begun(args, out, built), parts(out, args.device, args.quick, args.limit, built)
    for number, name in enumerate(wanted):
        status = None if came else do(name, each[name], out, built, report, came)
        if status != 0:
            command = again(parser, args, shortest(wanted[number:], list(each)))
            if came:
                print(f"stopped by {signal.Signals(came[0]).name}. To go on from there: {command}")
                return 128 + came[0]
            print(f"stopped. The end of {out / f'{name}.log'} says why. To go on from there:\n  {command}")
            return 1
    print(f"wrote report.json, report.md and, with matplotlib, report.png in {out}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 1 if a part failed, was cut off or could not start, 128 and the number of the
    signal that stopped it.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(KINDS)} (default: all)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu: a trial of what is built")
    parser.add_argument("--quick", action="store_true", help="a few tests and two tiny points")
    parser.add_argument(
        "--limit", type=float, metavar="SECONDS", help="cut off each part, but the build, after so long"
    )
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="a folder (default: %(default)s)")
    parser.add_argument("--publish", action="store_true", help="run nothing: take the report of --out into the project")
    args = parser.parse_args(argv)
    names = list(parts(args.out, args.device))
    if unknown := sorted(set(args.parts) - {*KINDS, *names}):
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(dict.fromkeys([*KINDS, *names]))}")
    try:
        if args.publish:
            page = publish(args.out.resolve(), ROOT / "benchmarks" / "results", ROOT / "docs/speed.md")
            print(f"wrote {page} and docs/speed.md")
            return 0
        with signals() as came:
            return go(parser, args, came)
    except Unusable as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
