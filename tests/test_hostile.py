"""Calls of the ops and of ``fusedrnn._C`` with arguments that do not fit, thousands of them: each raises or is right.

``hostile.py`` draws the calls from a seed, ``judge.py`` knows what is right. A call that fails is printed as a line of
Python that repeats it. FUSEDRNN_HOSTILE_CALLS is the number of calls of each kind. A call that would end this process:
``python tests/hostile.py`` finds it.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator

import hostile_lines
import pytest
from hostile import KINDS, SANITIZED, hostile_call
from judge import faults

CALLS = int(os.environ.get("FUSEDRNN_HOSTILE_CALLS", "400"))
SHOWN = 10  # faulty calls in the message of a failure


@pytest.fixture
def _little_memory() -> Iterator[None]:
    """What asks for very much gets an error, not the machine's last page."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    if not SANITIZED and os.path.exists("/proc/self/statm"):
        hostile_lines.limit_memory()
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("_little_memory")
@pytest.mark.filterwarnings("ignore")  # of torch: layouts in beta, types that it will remove
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", KINDS)
def test_a_call_raises_or_is_right(kind: str) -> None:
    wrong = {}
    for seed in range(CALLS):
        call = hostile_call(kind, seed)
        if found := faults(call):
            wrong[seed] = f"{'; '.join(found)}\n{call.line}"
    told = "\n\n".join(list(wrong.values())[:SHOWN])
    assert not wrong, f"{len(wrong)} of {CALLS} calls, seeds {list(wrong)}\n\n{told}"


@pytest.fixture(scope="module")
def ends() -> dict[str, str]:
    """How each line of ``hostile_lines.py`` ends in a process of its own."""
    paths = [os.path.dirname(hostile_lines.__file__), os.environ.get("PYTHONPATH", "")]  # PYTHONSAFEPATH may be set
    done = subprocess.run(
        [sys.executable, hostile_lines.__file__], stdout=subprocess.PIPE, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )  # fmt: skip
    return dict(line.split("\t") for line in done.stdout.splitlines())


@pytest.mark.parametrize("what", hostile_lines.LINES)
def test_a_line_raises_or_is_right(what: str, ends: dict[str, str]) -> None:
    if ends[what] == "skipped":
        pytest.skip("an address sanitizer ends a process that asks for memory beyond all there is")
    assert ends[what] == "right", hostile_lines.source(what)
