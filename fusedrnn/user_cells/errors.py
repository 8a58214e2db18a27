"""What a user is told whose function is no cell: what, at which line, and what to write instead."""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch

#: Folders whose functions are not the user's.
_BETWEEN = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, torch.__file__))


class Place(NamedTuple):
    """A line of the user's."""

    file: str
    line: int
    function: str


class CellError(ValueError):
    """A function that is no cell. ``place`` is the line; the message ends with what to write instead."""

    def __init__(self, what: str, instead: str, place: Place | None = None) -> None:
        self.place = place
        lines = [what]
        if place is not None:
            lines.append(f'  File "{place.file}", line {place.line}, in {place.function}')
            text = linecache.getline(place.file, place.line).strip()
            lines += [f"    {text}"] if text else []
        super().__init__("\n".join([*lines, instead]))


def current_place() -> Place | None:
    """The line that is being executed, of the innermost function that is neither ours nor torch's."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_BETWEEN):
        frame = frame.f_back
    return frame and Place(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)


def place_of(function: Callable) -> Place:
    """The line of its ``def``, after its decorators."""
    code = function.__code__
    line = code.co_firstlineno
    while (text := linecache.getline(code.co_filename, line)) and not text.lstrip().startswith(("def ", "async def ")):
        line += 1
    return Place(code.co_filename, line if text else code.co_firstlineno, code.co_name)


def refuse(what: str, instead: str) -> NoReturn:
    """CellError at the line that is being executed."""
    raise CellError(what, instead, current_place())
