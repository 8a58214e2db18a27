"""The command ``python -m benchmarks.gpu [PART ...]`` (``make gpu``): everything there is to run on a GPU machine.

Parts, in this order by default: ``build`` the extension in a folder of its own, ``tests`` on the GPU, the
``sanitizer``'s tools over a few of them, ``timing`` against torch.nn and others. First it looks at what the machine
lacks. It stops after a part that fails; what was found until then is in the report, and later runs add to it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from . import needs
from .parts import KINDS, ROOT, environment, folder, parts, run, watched
from .report import commit, gpu, publish, versions, write

KEPT_FOR = ("device", "commit", "python", "quick")


def earlier(out: Path, report: dict) -> dict:
    """The parts that an earlier run of the same code has done."""
    file = out / "report.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    return before.get("parts", {}) if all(before.get(key) == report[key] for key in KEPT_FOR) else {}


def again(parser: argparse.ArgumentParser, args: argparse.Namespace, wanted: list[str]) -> str:
    """The command that does these parts, with the options and the Python of this one."""
    words = [*wanted]
    for name in ("device", "quick", "limit", "out"):
        value = getattr(args, name)
        if value != parser.get_default(name):
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    usual = shutil.which("python3")
    python = "" if usual and Path(usual).samefile(sys.executable) else f"PYTHON={sys.executable} "
    return f'make gpu {python}ARGS="{" ".join(words)}"'


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status: 1 if a part failed, was cut off or could not start."""
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
    out = args.out.resolve()
    if args.publish:
        print(f"wrote {publish(out, ROOT / 'benchmarks' / 'results', ROOT / 'docs/speed.md')} and docs/speed.md")
        return 0
    if unknown := sorted(set(args.parts) - set(KINDS)):
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(KINDS)}")
    wanted = [kind for kind in KINDS if not args.parts or kind in args.parts]
    built = None
    if args.device == "cuda":
        wanted = ["build", *(kind for kind in wanted if kind != "build")]  # seconds, if nothing has changed
        if lacks := needs.missing(needs.look(), wanted):
            print(f"make gpu ({', '.join(wanted)}) needs, and does not find:")
            print(*(f"  - {lack}" for lack in lacks), sep="\n")
            return 1
        built = folder()
        built.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(built / "cache", ignore_errors=True)  # what an earlier run has measured
    else:
        wanted = [kind for kind in wanted if kind not in ("build", "sanitizer")]
        built = folder() if (folder() / "lib").exists() else None
    out.mkdir(parents=True, exist_ok=True)
    report = {"date": time.strftime("%Y-%m-%d"), "device": args.device, "commit": commit()}
    report |= {"python": environment(built)["PYTHONPATH"], "quick": args.quick, "gpu": {"before": gpu()}}
    report["parts"] = earlier(out, report)
    for name, part in parts(out, args.device, args.quick, args.limit, built).items():
        kind = name.partition("-")[0]
        if kind not in wanted:
            continue
        print(f"{name}: begun; its output goes to {out / f'{name}.log'}", flush=True)
        if name == "timing":
            (out / "timing.jsonl").unlink(missing_ok=True)
        with watched(out / f"{name}-clocks.csv"):
            # Where a package is built, the checkout's is not in the way.
            found = run(name, part, out, ROOT if kind == "build" or not built else built, built)
        report["parts"][name] = found
        status = "cut off" if found["status"] is None else f"exit status {found['status']}"
        print(f"{name}: {status}, {found['seconds']} s: {found['last']}", flush=True)
        report["gpu"]["after"], report["versions"] = gpu(), versions(built)
        print(write(report, out), flush=True) if name == "timing" else write(report, out)
        if found["status"] != 0:
            print(f"stopped. The end of {out / f'{name}.log'} says why. To go on from there:")
            print(f"  {again(parser, args, wanted[wanted.index(kind) :])}")
            return 1
    print(f"wrote report.json, report.md and, with matplotlib, report.png in {out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
