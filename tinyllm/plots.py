"""Figures: where a step's time goes, and kernels under the machine's roofs. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import ArgumentError

KINDS = (".png", ".svg", ".pdf")
INK, SOFT, PAPER = "#1f4e79", "#a9c4de", "white"
OTHERS = ("#c0504d", "#4f8a4c", "#7f5fa9", "#c98a2b", "#3b8c97")


def check(path: str | Path) -> None:
    """ArgumentError, before anything is measured, if a figure cannot be drawn into such a file."""
    if Path(path).suffix.lower() not in KINDS:
        raise ArgumentError(f"{path}: expected a file that ends in {', '.join(KINDS)}")
    _matplotlib()


def _matplotlib() -> Any:
    """The module, drawing into files only."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ArgumentError(f"a figure needs matplotlib ({e}): pip install matplotlib") from e
    return Figure


def profile(path: str | Path, parts: Mapping[str, Sequence[tuple[str, float, float]]]) -> None:
    """Draw bars of time.

    Parameters
    ----------
    path
        The file; its ending says which kind.
    parts
        By title, rows (kernel, seconds, seconds at the machine's limits), the longest first.
    """
    heights = [len(rows) for rows in parts.values()]
    figure = _matplotlib()(
        figsize=(8, 1.2 * len(parts) + 0.26 * sum(heights)), layout="constrained"
    )
    axes = figure.subplots(len(parts), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for ax, (title, rows) in zip(axes[:, 0], parts.items(), strict=True):
        names = [row[0] for row in rows][::-1]
        ax.barh(names, [1e3 * row[1] for row in rows][::-1], color=SOFT, label="measured")
        least = [1e3 * row[2] for row in rows][::-1]
        ax.barh(names, least, color=INK, height=0.35, label="at the limits")
        ax.set(title=title, xlabel="ms")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(loc="lower right", frameon=False)
    figure.savefig(path)


def roofline(
    path: str | Path,
    title: str,
    limits: Mapping[str, float],
    points: Sequence[tuple[str, str, float, float]],
) -> None:
    """Draw kernels under the machine's roofs.

    Parameters
    ----------
    path, title
        The file, and what stands above.
    limits
        "read GB/s", "dot GMAC/s", "float GMAC/s".
    points
        (label, who made it, multiply-adds per byte, GMAC/s).
    """
    figure = _matplotlib()(figsize=(8, 5), layout="constrained")
    ax = figure.subplots()
    low = min([point[2] for point in points], default=1) / 4
    high = max([point[2] for point in points], default=1) * 16
    for name, style in (("dot", "-"), ("float", "--")):
        top = limits[f"{name} GMAC/s"]
        knee = top / limits["read GB/s"]
        xs = [low, knee, max(high, 4 * knee)]
        ys = [min(top, x * limits["read GB/s"]) for x in xs]
        ax.plot(xs, ys, style, color=INK, label=f"{name} {top:.0f} GMAC/s")
    makers = list(dict.fromkeys(point[1] for point in points))
    for maker, colour in zip(makers, (*OTHERS, *[INK] * len(makers)), strict=False):
        own = [point for point in points if point[1] == maker]
        ax.plot([p[2] for p in own], [p[3] for p in own], "o", color=colour, label=maker)
    for label, _, x, y in points:
        ax.annotate(label, (x, y), xytext=(5, -10), textcoords="offset points", fontsize=8)
    ax.set(
        xscale="log", yscale="log", xlabel="multiply-adds per byte", ylabel="GMAC/s", title=title
    )
    ax.text(low, 1.2 * low * limits["read GB/s"], f"{limits['read GB/s']:.0f} GB/s", color=INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(loc="lower right", frameon=False)
    figure.savefig(path)
