"""Shared libraries that are compiled where they are used, and kept: each once, whoever asks for it meanwhile.

They lie in ``$FUSEDRNN_CACHE``, else in ``fusedrnn`` below ``$XDG_CACHE_HOME`` or ``~/.cache``, a folder for each
digest of sources and flags and for each compiler; where no compiler is, a library that any has made is taken. It is
loaded from folders alone that nobody else can write; where they are not such, it is compiled into a folder of this
process. It comes into its place complete, by a rename: a crash before that leaves nothing that would be loaded.
"""

from __future__ import annotations

import atexit
import fcntl
import functools
import hashlib
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

__all__ = ["NoCompilerError", "Unit", "compiler", "compiler_if_any", "library", "without_comments", "words"]

_LIBRARY, _SUM, _LOCK = "cell.so", "cell.sha256", "lock"
_threads = threading.Lock()


def _after_fork() -> None:
    global _threads
    _threads = threading.Lock()  # a thread that is not in this process may have held it


os.register_at_fork(after_in_child=_after_fork)


@dataclass(frozen=True)
class Unit:
    """One source file, its compiler (empty: none is there), and what that is told: paths and the output are added."""

    source: Path
    compiler: tuple[str, ...]
    flags: tuple[str, ...]


class NoCompilerError(RuntimeError):
    """There is no C++ compiler."""


def words(variable: str) -> list[str]:
    """Of an environment variable, as a shell would read it.

    Raises:
        RuntimeError: its quotes do not match.
    """
    text = os.environ.get(variable, "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise RuntimeError(f"{variable} is {text!r}: {error}") from error


def without_comments(text: str) -> str:
    """C++ without the lines that are comments as a whole, and without empty ones: what an edit may change."""
    return "\n".join(line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("//"))


def compiler() -> list[str]:
    """The C++ compiler's command: ``$CXX``, else c++, g++ or clang++.

    Raises:
        NoCompilerError: there is none.
        RuntimeError: the quotes in ``$CXX`` do not match.
    """
    named = words("CXX")
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    wanted = f"CXX is {named[0]!r}, which is not found" if named else "none of c++, g++ and clang++ is found"
    advice = "Install g++ >= 10, or name one in CXX; or eager=True"
    raise NoCompilerError(f"a C++ compiler is needed: {wanted}. {advice}")


def compiler_if_any() -> tuple[str, ...]:
    """The C++ compiler's command; empty where there is none."""
    try:
        return tuple(compiler())
    except NoCompilerError:
        return ()


@functools.cache
def _version(command: tuple[str, ...]) -> str:
    """What a compiler says of itself; it is told from another of the same path by this."""
    return _output([*command, "--version"])[1]


def _fault(folder: Path, last: bool = True) -> str | None:
    """Why others could put files into a folder; None if they cannot. It need not exist yet. ``last``: nothing of ours
    is between it and the files.
    """
    for path in (folder, *folder.parents):
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue
        except OSError as error:
            return str(error)
        if stat.S_ISLNK(status.st_mode):
            if status.st_uid not in (0, os.getuid()):
                return f"{path} is another user's"
            if not path.exists():
                return f"{path} leads nowhere"
            if fault := _fault(path.parent / os.readlink(path), last and path == folder):
                return fault
            continue
        if status.st_uid not in (0, os.getuid()):
            return f"{path} belongs to another user"
        others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if others and not (status.st_mode & stat.S_ISVTX and not (last and path == folder)):
            return f"others can write {path}"
    return None


@functools.cache
def _own_folder() -> Path:
    """A folder of this process, which goes with it."""
    folder = Path(tempfile.mkdtemp(prefix="fusedrnn-"))
    atexit.register(_remove, folder, os.getpid())
    return folder


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:  # not a fork of it
        shutil.rmtree(folder, ignore_errors=True)


def _make(folder: Path) -> None:
    """And what is above it; others can write none of that, whatever the user's mask."""
    for path in (*reversed(folder.parents), folder):
        path.mkdir(mode=0o700, exist_ok=True)


def _folder(name: str, by: str) -> Path | None:
    """Where a library is kept that is made by this compiler, as ``_digests`` has it. The folder is there; it can be
    written, or holds the library already. Without a compiler: one that holds it, or None.
    """
    named = os.environ.get("FUSEDRNN_CACHE")
    try:
        above = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home
        above = None
    try:
        folder = Path(named).expanduser() if named else above and above / "fusedrnn"
    except RuntimeError:  # of a user who is not known, or has no home
        folder = None
    fault = "there is no home folder" if folder is None else _fault(folder.absolute())
    if not fault:
        try:
            kept = sorted(folder.absolute().glob(f"{name}-{by or '*'}"))
            if whole := next(filter(_is_whole, kept), None):
                return whole
            if not by:
                return None
            own = folder.absolute() / f"{name}-{by}"
            _make(own)
            if os.access(own, os.W_OK | os.X_OK):
                return own
            fault = f"{own} cannot be written"
        except OSError as error:
            fault = str(error)
    warnings.warn(
        f"fusedrnn: compiled cells are not kept: {fault}. FUSEDRNN_CACHE names another folder",
        RuntimeWarning,
        stacklevel=2,
    )
    if not by:
        return None
    own = _own_folder() / f"{name}-{by}"
    own.mkdir(exist_ok=True)
    return own


def _is_whole(folder: Path) -> bool:
    """Whether the library is there as it was made: one that was cut short would end the process."""
    made, digest = folder / _LIBRARY, folder / _SUM
    if not (made.is_file() and digest.is_file()):
        return False
    return digest.read_text(encoding="utf-8") == hashlib.sha256(made.read_bytes()).hexdigest()


@contextmanager
def _alone(folder: Path, title: str) -> Iterator[None]:
    """While no other thread or process is in here for this folder. Whoever dies in here lets go."""
    with _threads, open(folder / _LOCK, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"fusedrnn: waiting for a process that compiles {title}", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks: the library comes into its place whole, all the same
        yield


def _digests(
    units: Sequence[Unit], texts: dict[str, str], headers: Path, link: Sequence[str], places: dict[str, str]
) -> tuple[str, str]:
    """Of what is compiled, and of the compilers: their commands and versions. That is empty where one is not there."""
    read = sorted(path for path in headers.rglob("*") if path.suffix in (".h", ".inl", ".cpp", ".cu", ".cuh"))
    parts = [path.read_bytes() for path in read]

    def named(words: Sequence[str]) -> list[str]:
        found = list(words)
        for path, name in places.items():
            found = [word.replace(path, name) for word in found]
        return found

    told = [(unit.source.name, named(unit.flags)) for unit in units]
    code = [(file, without_comments(text)) for file, text in sorted(texts.items())]
    parts += [repr((code, told, named(link))).encode()]
    commands = [unit.compiler for unit in units]
    versions = [_version(command) for command in sorted(set(commands))] if all(commands) else []
    by = [repr((commands, versions)).encode()] if versions else []
    what, who = (b"\0".join(hashlib.sha256(part).digest() for part in given) for given in (parts, by))
    return hashlib.sha256(what).hexdigest()[:32], hashlib.sha256(who).hexdigest()[:12] if by else ""


def library(
    title: str,
    units: Sequence[Unit],
    texts: dict[str, str],
    headers: Path,
    link: Sequence[str],
    places: dict[str, str] | None = None,
) -> Path:
    """A library of these units, compiled now if it is not there yet. Without a compiler: one that another has made.

    Args:
        title: what is compiled, for the line that says so.
        units: what is compiled, from ``headers``, a folder all of whose sources count for what it is kept under.
        texts: files beside, name and contents, in a folder where the units' includes look. Comments do not count.
        link: what the first unit's compiler is told to link; the objects are added.
        places: paths in flags and ``link``, and what counts in their stead: they may be others elsewhere.

    Raises:
        NoCompilerError: there is none, and no such library.
        RuntimeError: a compiler fails: with what it said.
    """
    name, by = _digests(units, texts, headers, link, places or {})
    folder = _folder(name, by)
    if folder is None:
        compiler()  # raises
        raise NoCompilerError("a C++ compiler is needed")  # one has come this moment
    made = folder / _LIBRARY
    if not _is_whole(folder):
        with _alone(folder, title):
            if not _is_whole(folder):
                print(f"fusedrnn: compiling {title}, once, in {folder}", file=sys.stderr, flush=True)
                told = [replace(unit, flags=(*unit.flags, f"-I{headers}")) for unit in units]
                _compile(folder, told, texts, [*units[0].compiler, *link])
    if fault := _fault(made):
        raise RuntimeError(f"{made} is not loaded: {fault}")
    return made


def _compile(folder: Path, units: Sequence[Unit], texts: dict[str, str], link: Sequence[str]) -> None:
    for rest in folder.glob("making-*"):  # of a process that died here: we are alone
        shutil.rmtree(rest, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="making-", dir=folder) as name:
        making = Path(name)
        for file, text in texts.items():
            (making / file).write_text(text, encoding="utf-8")
        objects = [making / f"{i}.o" for i in range(len(units))]
        pairs = zip(units, objects, strict=True)
        _run([[*u.compiler, *u.flags, f"-I{making}", "-c", str(u.source), "-o", str(to)] for u, to in pairs])
        whole, digest = making / _LIBRARY, making / _SUM
        _run([[*link, "-o", str(whole), *map(str, objects)]])
        if not whole.exists():
            raise RuntimeError(f"{shlex.join(link)} made no library")
        for file, text in texts.items():  # for whoever wants to read them
            (folder / file).write_text(text, encoding="utf-8")
        digest.write_text(hashlib.sha256(whole.read_bytes()).hexdigest(), encoding="utf-8")
        whole.chmod(0o700)  # whatever the user's mask: one that others can write is not loaded
        os.replace(digest, folder / _SUM)
        os.replace(whole, folder / _LIBRARY)


def _run(commands: Sequence[list[str]]) -> None:
    """All at once."""
    with ThreadPoolExecutor(len(commands)) as pool:
        for command, (status, text) in zip(commands, pool.map(_output, commands), strict=True):
            if status:
                raise RuntimeError(f"the compiler failed with status {status}: {shlex.join(command)}\n{text[:8000]}")


def _output(command: Sequence[str]) -> tuple[int, str]:
    """A command's status and what it prints, in whatever encoding."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    except OSError as error:
        raise RuntimeError(f"the compiler does not run: {error}: {shlex.join(command)}") from error
    return done.returncode, done.stdout.decode("utf-8", "replace")
