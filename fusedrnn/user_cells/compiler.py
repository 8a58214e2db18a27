"""Shared libraries that are compiled where they are used, and kept: each once, whoever asks for it meanwhile.

They lie in ``$FUSEDRNN_CACHE``, else in ``fusedrnn`` below ``$XDG_CACHE_HOME`` or ``~/.cache``, a folder for each
digest of sources, compiler and flags. A library is loaded from folders alone that nobody else can write; where they are
not such, it is compiled into a folder of this process. It comes into its place complete, by a rename: a crash before
that leaves nothing that would be loaded.
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
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

__all__ = ["Unit", "compiler", "library"]

_LIBRARY, _LOCK = "cell.so", "lock"
_threads = threading.Lock()


@dataclass(frozen=True)
class Unit:
    """One source file, and the compiler's command for it: what is read and written is added."""

    source: Path
    command: tuple[str, ...]


def compiler() -> list[str]:
    """The C++ compiler's command: ``$CXX``, else c++, g++ or clang++.

    Raises:
        RuntimeError: there is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if found := shutil.which(command[0]):
            return [found, *command[1:]]
    wanted = f"CXX is {named[0]!r}, which is not found" if named else "none of c++, g++ and clang++ is found"
    raise RuntimeError(f"a C++ compiler is needed: {wanted}. Install g++ >= 10, or name one in CXX; or eager=True")


@functools.cache
def _version(command: tuple[str, ...]) -> str:
    """What a compiler says of itself; it is told from another of the same path by this."""
    return subprocess.run([*command, "--version"], capture_output=True, text=True, check=False).stdout


def _fault(folder: Path) -> str | None:
    """Why others could put files into a folder; None if they cannot. It need not exist yet."""
    for path in (folder, *folder.parents):
        try:
            status = path.lstat()
        except FileNotFoundError:
            continue
        except OSError as error:
            return str(error)
        if stat.S_ISLNK(status.st_mode):
            fault = _fault(path.resolve().parent) if status.st_uid in (0, os.getuid()) else f"{path} is another user's"
            if fault:
                return fault
            status = path.stat()
        if status.st_uid not in (0, os.getuid()):
            return f"{path} belongs to another user"
        others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if others and not (status.st_mode & stat.S_ISVTX and path != folder):
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


def _folder() -> Path:
    """Where libraries are kept."""
    named = os.environ.get("FUSEDRNN_CACHE")
    try:
        above = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home
        above = None
    folder = Path(named) if named else above and above / "fusedrnn"
    fault = "there is no home folder" if folder is None else _fault(folder.absolute())
    if not fault:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            fault = None if os.access(folder, os.W_OK | os.X_OK) else f"{folder} cannot be written"
        except OSError as error:
            fault = str(error)
    if not fault:
        return folder.absolute()
    warnings.warn(
        f"fusedrnn: compiled cells are not kept: {fault}. FUSEDRNN_CACHE names another folder",
        RuntimeWarning,
        stacklevel=2,
    )
    return _own_folder()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While no other thread or process is in here for this folder. Whoever dies in here lets go."""
    with _threads, open(folder / _LOCK, "w") as lock:
        with suppress(OSError):  # a file system without locks: the library comes into its place whole, all the same
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _digest(units: Sequence[Unit], texts: dict[str, str], headers: Path, link: Sequence[str]) -> str:
    read = sorted(path for path in headers.rglob("*") if path.suffix in (".h", ".inl", ".cpp", ".cu", ".cuh"))
    parts = [path.read_bytes() for path in read]
    parts += [_version(command).encode() for command in sorted({unit.command[:1] for unit in units})]
    parts += [repr((sorted(texts.items()), [(u.source.name, u.command) for u in units], link)).encode()]
    return hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def library(title: str, units: Sequence[Unit], texts: dict[str, str], headers: Path, link: Sequence[str]) -> Path:
    """A library of these units, compiled now if it is not there yet.

    Args:
        title: what is compiled, for the line that says so.
        units: what is compiled, from ``headers``, a folder all of whose sources count for what it is kept under.
        texts: files beside, name and contents, in a folder where the units' includes look.
        link: the linker's command.

    Raises:
        RuntimeError: a compiler fails: with what it said.
    """
    folder = _folder() / _digest(units, texts, headers, link)[:32]
    made = folder / _LIBRARY
    folder.mkdir(mode=0o700, exist_ok=True)
    if not made.exists():
        with _alone(folder):
            if not made.exists():
                print(f"fusedrnn: compiling {title}, once: it is kept in {folder}", file=sys.stderr, flush=True)
                _compile(folder, made, [replace(u, command=(*u.command, f"-I{headers}")) for u in units], texts, link)
    if fault := _fault(made):
        raise RuntimeError(f"{made} is not loaded: {fault}")
    return made


def _compile(folder: Path, made: Path, units: Sequence[Unit], texts: dict[str, str], link: Sequence[str]) -> None:
    for rest in folder.glob("making-*"):  # of a process that died here: we are alone
        shutil.rmtree(rest, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="making-", dir=folder) as name:
        making = Path(name)
        for file, text in texts.items():
            (making / file).write_text(text)
        objects = [making / f"{i}.o" for i in range(len(units))]
        pairs = zip(units, objects, strict=True)
        _run([[*u.command, f"-I{making}", "-c", str(u.source), "-o", str(made_of)] for u, made_of in pairs])
        whole = making / _LIBRARY
        _run([[link[0], *map(str, objects), "-o", str(whole), *link[1:]]])
        for file, text in texts.items():  # for whoever wants to read them
            (folder / file).write_text(text)
        whole.chmod(0o700)  # whatever the user's mask: one that others can write is not loaded
        os.replace(whole, made)


def _run(commands: Sequence[list[str]]) -> None:
    """All at once."""
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for command in commands
    ]
    said = [process.communicate()[0] for process in running]
    for process, command, text in zip(running, commands, said, strict=True):
        if process.returncode:
            told = f"{shlex.join(command)}\n{text[:8000]}"
            raise RuntimeError(f"the compiler failed with status {process.returncode}: {told}")
