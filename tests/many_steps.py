"""Which cells have kernels for many steps (``is_persistent`` of csrc/persistent/geometry.h)."""

from __future__ import annotations

import fusedrnn

__all__ = ["PERSISTENT", "STEP_BY_STEP"]

PERSISTENT = {
    cell["name"]
    for cell in fusedrnn._C.cells()
    if cell["first"] == cell["gates"] and cell["states"] <= 2 and not cell["row_values"]
}
STEP_BY_STEP = {cell["name"] for cell in fusedrnn._C.cells()} - PERSISTENT
