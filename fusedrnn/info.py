"""``python -m fusedrnn.info``: what is in use on this machine, for a bug report or a look."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from . import _C, __version__, extension


def processor() -> str:
    """The processor's name, as the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """The processor's cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _describe_cuda(built: str | None) -> str:
    if not built:
        return "not in this build"
    gpus = "no GPU here"
    if torch.cuda.is_available():
        gpus = f"{torch.cuda.device_count()} GPU(s), the first {torch.cuda.get_device_name()}"
    return f"built with CUDA {built}, torch for {torch.version.cuda}; {gpus}"


def _describe_plan() -> str:
    plan, file = os.environ.get("FUSEDRNN_CUDA_PLAN") or "stepwise", _C.choices_file()
    text = Path(file).read_text(errors="replace") if file and Path(file).is_file() else ""
    ways = [fields[2] for fields in (line.split("\t") for line in text.splitlines()) if len(fields) == 6]
    found = f"{len(ways)} kind(s) of calls, persistent for {ways.count('persistent')}, in {file}" if ways else "nothing"
    return f"{plan} (FUSEDRNN_CUDA_PLAN: stepwise, persistent or auto); auto has measured {found}"


def _describe_short_calls(fast: str | None) -> str:
    if fast:
        return f"past the dispatcher ({fast})"
    others = extension.built(extension.FOLDER)
    return (
        f"by the ops alone, in more time: not built for {extension.versions()} (but for {others}); a newer fusedrnn may"
        f" be, or in its source tree: {extension.BUILD}"
    )


def describe() -> dict[str, str]:
    """What is in use, a line of text for each subject."""
    forced, build = os.environ.get("FUSEDRNN_CPU_ISA"), _C.build()
    settings = [f"{name}={os.environ[name]}" for name in sorted(os.environ) if name.startswith(("OMP_", "GOMP_"))]
    return {
        "versions": f"fusedrnn {__version__}, torch {torch.__version__},"
        f" Python {platform.python_version()}, {platform.system()} {platform.machine()}",
        "processor": f"{processor()}, {cores()} core(s) for this process",
        "instruction set": f"{_C.isa()}, {_C.vector_bytes()}-byte vectors,"
        f" {'forced by FUSEDRNN_CPU_ISA' if forced else 'the best of the processor'}"
        f" (here: {', '.join(_C.supported_isas())}; in this build: {', '.join(_C.built_isas())})",
        "threads": f"{torch.get_num_threads()} (torch.set_num_threads); {', '.join(settings) or 'no OMP_ variable'}",
        "OpenMP": build["openmp"],
        "CUDA": _describe_cuda(build["cuda"]),
        "CUDA plan": _describe_plan(),
        "cells": ", ".join(cell["name"] for cell in _C.cells()),
        "short calls": _describe_short_calls(build["fast"]),
        "compiler": f"{build['compiler']}, flags {build['flags']}",
        "timers": "none" if _C.phases() is None else "in every phase: slower, for measuring only (make phases)",
    }


def main() -> None:
    """Print :func:`describe`."""
    for subject, text in describe().items():
        print(f"{subject:16} {text}")


if __name__ == "__main__":
    main()
