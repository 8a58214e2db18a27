"""Single calls that once ended their process or gave a wrong number and that a seed of ``hostile.py`` may not draw.

Each line must raise, or ``right`` be true at its end. ``python tests/hostile_lines.py`` runs each in a child that may
die, forked before any thread is there, and prints how it ends: right, wrong, or the signal.
"""

from __future__ import annotations

import os
import resource
import signal
import sys

from hostile import PRELUDE, SANITIZED
from judge import raised

LIMIT = 4 << 30  # bytes for a child: what asks for more gets an error, not the machine's last page
SHORT = (
    PRELUDE + "; torch.manual_seed(0); "
    "F = lambda x, w, cell='rnn_tanh', bs=None: ops.layer_forward(x, bs, None, None, w, cell, False, True)[0]"
    "; two = [0.4 * r(5, 3), 0.4 * r(5, 5)]; one = [r(1, 1), r(1, 1)]; kept = _C.packed_weights(); right = False"
)
BACKWARD = (
    "x = r(3, 2, 3).to(two[0].dtype); f = ops.layer_forward(x, None, None, None, two, 'rnn_tanh', False, True); "
    "B = lambda dy, clip=0.0: ops.layer_backward(dy, None, None, None, x, None, None, None, two, f[0], f[3], "
    "'rnn_tanh', False, True, True, False, False, 0, clip)[0]; "
)
# A key of the module's own dictionary that is found equal to a weight's name runs code, which may change all lists.
COMPARED = (
    "listed = [r(1, 1) for _ in range(99)]; names = [f'w{{i}}' for i in range(99)]; late = []; "
    "equal = lambda s, o: ([l.clear() for l in late], False)[1]; "
    "E = type('E', (str,), {{'__hash__': str.__hash__, '__eq__': equal}}); "
    "m = type('M', (), {{}})(); p = m._parameters = {{}}; {place}[E('w7')] = 1; p.update(zip(names, listed)); "
    "late.append({what}); "
    "right = _C.kept_parameters(m, names, (), listed) is None"
)
# Each ended its process or gave a wrong number when it was found. It must raise, or ``right`` be true at its end.
LINES = {
    "steps of 2**62: the bytes of two lists of them overflow": "F(r(1, 1, 1).expand(2**62, 1, 1), one)",
    "steps of 2**60, infer": "x = r(1, 1, 1).expand(2**60, 1, 1); "
    "right = _C.infer(x, None, one, 'rnn_tanh', (3, *[1] * 5), kept) is None",
    "steps of 2**62 without samples": "F(r(1, 0, 1).expand(2**62, 0, 1), one)",
    "steps of 2**33": "F(r(1, 1, 1).expand(2**33, 1, 1), one)",
    "samples whose rows overflow": "F(r(1, 1, 0).expand(4, 2**62, 0), [r(1, 0), r(1, 1)])",
    **{
        f"a key in {place} that empties {what}": COMPARED.format(place=place, what=what)
        for place in ("m.__dict__", "p") for what in ("names", "listed", "p")
    },
    "a freed tensor in the message of a TypeError": "x = r(2); x.untyped_storage().resize_(0); "
    "_C.infer(x, None, [], 'gru', (3, None, 1, 1, 1, 1), None)",
    "a limit below the least float32": BACKWARD + "right = torch.equal(B(f[0], 1e-46), B(f[0], 1e-45))",
    "float16 rows that overlap": "two = [w.half() for w in two]; " + BACKWARD
    + "dy = r(30).half().as_strided((3, 2, 5), (1, 1, 1)); right = torch.equal(B(dy), B(dy.contiguous()))",
    "float16 windows of a series": "two = [w.half() for w in two]; x = r(9).half().unfold(0, 3, 1)[:2]; "
    "bs = torch.tensor([2]); right = torch.equal(F(x, two, bs=bs), F(x.contiguous(), two, bs=bs))",
    "a cell's name that ends early": "F(r(2, 2, 3), two, 'rnn_tanh\\0')",
    "strides of 2**62 where there is one row": "x = r(1, 1, 3); "
    "right = torch.equal(F(x.as_strided((1, 1, 3), (2**62, 2**62, 1)), two), F(x, two))",
    "no states: a projection to nothing":
    "w = [r(8, 3), r(8, 0), r(0, 2)]; right = F(r(3, 2, 3), w, 'lstm').shape[2] == 0",
    "no weights for very many layers":
    "right = _C.infer(r(2, 2, 1), None, [], 'gru', (3, 2**62, 1, 1, 1, 1), kept) is None",
}  # fmt: skip

HUGE = ("steps", "samples", "memory", "no weights")  # what an address sanitizer ends the process for
SECONDS = 60


def source(what: str) -> str:
    return f"{SHORT}; {LINES[what]}"


def limit_memory() -> None:
    """To LIMIT more than this process has. (An address sanitizer reserves more than there is.)"""
    with open("/proc/self/statm") as pages:
        used = int(pages.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT, resource.getrlimit(resource.RLIMIT_AS)[1]))


def run(what: str) -> str:
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        if not SANITIZED:
            limit_memory()
        names: dict = {}
        error = raised(source(what), names)
        print(f"{what}: {error or names['right']}", file=sys.stderr, flush=True)
        os._exit(0 if names.get("right") or ("right" in names and error is not None) else 1)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return "wrong" if status else "right"


if __name__ == "__main__":
    for name in LINES:
        print(name, "skipped" if SANITIZED and name.startswith(HUGE) else run(name), sep="\t", flush=True)
