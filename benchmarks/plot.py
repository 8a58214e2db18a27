"""Draws the ratios of a run as a PNG: one dot a case with its quartiles, the line 1.0 between wins and losses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from .measure import Result

__all__ = ["plot"]

WIN, LOSS = "#1b3a5c", "#c8442b"


def plot(file: Path, results: Sequence[Result], info: dict) -> None:
    """Write the chart of all results that have a ratio; ValueError if none has."""
    compared = [result for result in results if result.ratio is not None]
    if not compared:
        raise ValueError("nothing to plot: torch.nn has none of these cases")
    figure = Figure(figsize=(9, 1.6 + 0.24 * len(compared)), layout="constrained")
    axes = figure.subplots()
    for row, result in enumerate(compared):
        colour = WIN if result.ratio >= 1 else LOSS
        spread = [[result.ratio - result.ratio_low], [result.ratio_high - result.ratio]]
        axes.errorbar(result.ratio, row, xerr=spread, fmt="o", color=colour, markersize=5, capsize=2)
        axes.annotate(f"{result.ratio:.2f}", (result.ratio_high, row), (6, 0), textcoords="offset points",
                      va="center", color=colour, fontsize=7)  # fmt: skip
    axes.axvline(1.0, color="black", linewidth=1)
    lowest = min(result.ratio_low for result in compared)
    highest = max(result.ratio_high for result in compared)
    axes.set_xscale("log", base=2)
    axes.set_xlim(min(0.7, lowest / 1.2), max(2.2, highest * 1.4))
    axes.axvspan(axes.get_xlim()[0], 1.0, color=LOSS, alpha=0.06)
    axes.set_ylim(len(compared) - 0.4, -0.6)
    axes.set_yticks(range(len(compared)), [result.case.name for result in compared], fontsize=8)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.set_xlabel("time of torch.nn / time of fusedrnn (left of 1: fusedrnn is slower)")
    axes.set_title(
        f"{info['cpu']}, {info['isa']}, {info['threads']} thread(s)\n"
        f"fusedrnn {info['fusedrnn']}, torch {info['torch']}, {info['date']}",
        fontsize=9,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
