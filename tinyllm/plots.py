"""Figures of benchmarks, documents and notebooks, in one look. Needs matplotlib.

Every function returns the figure, which a notebook shows, and writes it to ``path`` where one is given. The
colours are Okabe and Ito's, which colour-blind readers tell apart. For print, lines and bars differ by marker
or hatch, too.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ArgumentError

KINDS = (".png", ".svg", ".pdf")
INK, SOFT, PAPER = "#1f4e79", "#a9c4de", "white"
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++", "oo")
LIGHT = ("#56B4E9", "#F0E442", "#7fcfb8", "#f3c9de", "#f2c14e", "#bcd9ef", "#cccccc")  # under ink


def check(path: str | Path) -> None:
    """ArgumentError, before anything is measured, if a figure cannot be drawn into such a file."""
    if Path(path).suffix.lower() not in KINDS:
        raise ArgumentError(f"{path}: expected a file that ends in {', '.join(KINDS)}")
    if not Path(path).parent.is_dir():
        raise ArgumentError(f"{path}: there is no folder {Path(path).parent}")
    _picture()


def _picture() -> Any:
    """A matplotlib figure that needs no window, and that notebooks show by itself."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ArgumentError(f"a figure needs matplotlib ({e}): pip install matplotlib") from e
    return _shown(Figure)


@cache
def _shown(figure: Any) -> Any:
    class Picture(figure):  # type: ignore[misc]
        def _repr_png_(self) -> bytes:
            out = io.BytesIO()
            self.savefig(out, format="png", dpi=110)
            return out.getvalue()

    return Picture


def _axes(width: float = 8, height: float = 4, **grid: Any) -> tuple[Any, Any]:
    figure = _picture()(figsize=(width, height), layout="constrained", facecolor=PAPER)
    return figure, figure.subplots(**grid)


def _tidy(ax: Any, **labels: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.set(**{name: value for name, value in labels.items() if value is not None})
    for axis in (ax.xaxis, ax.yaxis):
        low, high = sorted(axis.get_view_interval())
        if axis.get_scale() == "log" and high < 200 * low:  # powers of ten alone would be too few
            from matplotlib.ticker import LogLocator, NullFormatter

            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_formatter(NullFormatter())


def _saved(figure: Any, path: str | Path | None) -> Any:
    if path is not None:
        from matplotlib import rc_context

        vector = Path(path).suffix.lower() == ".svg"  # whose dates and names would differ each time
        with rc_context({"svg.hashsalt": "tinyllm"}):
            figure.savefig(path, metadata={"Date": None} if vector else None)
    return figure


def spans(
    rows: Mapping[str, Sequence[tuple[str, float]]],
    unit: str = "bytes",
    title: str = "",
    path: str | Path | None = None,
) -> Any:
    """Draw strips cut into parts, one strip a row: what a file or a block consists of.

    Parameters
    ----------
    rows
        By the strip's name, its parts (label, size) from the left; each strip is drawn as wide as the others.
    unit
        What sizes count; it stands beside each strip's whole.
    title, path
        What stands above; a file to write, too.
    """
    figure, ax = _axes(9, 0.7 + 0.85 * len(rows))
    for y, (name, parts) in enumerate(rows.items()):
        whole, left, free = sum(size for _, size in parts), 0.0, 0.0
        for (label, size), colour in zip(parts, cycle(LIGHT), strict=False):
            width, length = size / whole, 0.0105 * len(label)  # the strip is 1 wide
            ax.barh(y, width, left=left, height=0.55, color=colour, edgecolor=INK, linewidth=0.8)
            middle = left + width / 2
            if width > length:
                ax.text(middle, y, label, ha="center", va="center", fontsize=8)
            elif len(label) <= 6 and width > 0.018:
                ax.text(middle, y, label, ha="center", va="center", fontsize=7, rotation=90)
            elif label:  # below the strip, beside the label before it
                free = max(free, min(middle - length / 2, 1 - length), 0.0)
                ax.plot([middle, middle], [y + 0.2, y + 0.33], color=INK, linewidth=0.8)
                ax.text(free, y + 0.34, label, va="top", fontsize=7)
                free += length + 0.012
            left += width
        ax.text(1.01, y, f"{whole:,.0f} {unit}", va="center", fontsize=8)
        ax.text(-0.01, y, name, va="center", ha="right", fontsize=9)
    ax.set(xlim=(0, 1.002), title=title)
    ax.invert_yaxis()
    ax.axis("off")
    return _saved(figure, path)


def bars(
    names: Sequence[str],
    groups: Mapping[str, Sequence[float]],
    xlabel: str = "",
    title: str = "",
    log: bool = False,
    path: str | Path | None = None,
    ranges: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Any:
    """Draw horizontal bars, the first name on top; the groups of a name stand one below the other.

    Parameters
    ----------
    names
        One for each bar of a group.
    groups
        By the group's name, a value for each of ``names``; NaN where there is none, and then no room for it.
    log
        Whether the axis is logarithmic.
    xlabel, title, path
        What stands below and above; a file to write, too.
    ranges
        By the group's name, the smallest and the largest measured value of each bar: a thin line on it.
    """
    values = np.array(list(groups.values()), dtype=float).reshape(len(groups), len(names))
    at, middles, end = _rows_of_bars(~np.isnan(values))
    figure, ax = _axes(8, 1 + 0.2 * end)
    for i, (group, own, places) in enumerate(zip(groups, values, at, strict=True)):
        look = {"color": LIGHT[i % 7], "hatch": HATCHES[i % 7], "edgecolor": INK}
        known = ~np.isnan(own)
        ax.barh(places[known], own[known], 1.0, label=group, linewidth=0.6, **look)
        spread = np.array((ranges or {}).get(group, [(v, v) for v in own]), dtype=float)
        for y, value, (low, high) in zip(places[known], own[known], spread[known], strict=True):
            if ranges:
                ax.plot([low, high], [y, y], color=INK, linewidth=1)
            right = max(value, high) if value > 0 or log else 0
            ax.annotate(f" {_short(value)}", (right, y), va="center", fontsize=8)
    _tidy(ax, xlabel=xlabel, title=title, xscale="log" if log else "linear")
    ax.set_yticks(middles, names, fontsize=9)
    ax.margins(x=0.12)
    ax.set_ylim(end - 0.2, -0.9)
    if len(groups) > 1:
        figure.legend(frameon=False, loc="outside upper right", ncols=min(4, len(groups)))
    return _saved(figure, path)


def _rows_of_bars(there: Any) -> tuple[Any, list[float], float]:
    """Where bars [groups, names] stand, the middle of each name's, and the end of the last."""
    at, middles, y = np.zeros(there.shape), [], 0.0
    for name in range(there.shape[1]):
        at[:, name] = y + np.cumsum(there[:, name]) - 1
        n = int(there[:, name].sum())
        middles.append(y + (n - 1) / 2)
        y += n + 0.5
    return at, middles, y


def _short(value: float) -> str:
    """Three digits, or all that stand before the point."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    log: str = "",
    path: str | Path | None = None,
) -> Any:
    """Draw lines with markers.

    Parameters
    ----------
    series
        By name, the x and y of its points.
    log
        Which axes are logarithmic: "", "x", "y" or "xy".
    xlabel, ylabel, title, path
        What stands at the axes and above; a file to write, too.
    """
    figure, ax = _axes()
    for i, (name, (xs, ys)) in enumerate(series.items()):
        look = MARKERS[i % 7] if len(xs) <= 40 else ""
        ax.plot(xs, ys, LINES[i % 4] + look, color=COLOURS[i % 7], label=name, markersize=5)
    scales = {f"{axis}scale": "log" for axis in log}
    _tidy(ax, xlabel=xlabel, ylabel=ylabel, title=title, **scales)
    ax.grid(alpha=0.25)
    if len(series) > 1:
        figure.legend(frameon=False, loc="outside right upper")
    return _saved(figure, path)


def points(
    labels: Sequence[str],
    xs: Sequence[float],
    ys: Sequence[float],
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    log: str = "",
    path: str | Path | None = None,
) -> Any:
    """Draw labelled points; ``log`` is "", "x", "y" or "xy"."""
    figure, ax = _axes(8, 4.5)
    ax.plot(xs, ys, "o", color=COLOURS[0], markersize=6)
    _tidy(ax, xlabel=xlabel, ylabel=ylabel, title=title, **{f"{axis}scale": "log" for axis in log})
    ax.grid(alpha=0.25)
    ax.margins(0.08)
    _write_labels(ax, labels, np.stack([xs, ys], -1))
    return _saved(figure, path)


def _write_labels(ax: Any, labels: Sequence[str], at: Any) -> None:
    """Each label beside its point, where it covers no other label and no point, if there is such a place."""
    corners = ax.transData.transform(at) * 72 / ax.figure.dpi  # in points of print, as fonts are
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in corners]
    for label, place, (x, y) in zip(labels, at, corners, strict=True):
        if not label:
            continue
        wide = 5.2 * len(label)
        offsets = [
            (dx, dy)
            for far in (4, 12, 20, 28, 36)
            for dx in (6, -6 - wide)
            for dy in (far, -far - 7, 0 if far == 4 else far)
        ]

        def covers(offset: tuple[float, float], x: float = x, y: float = y, w: float = wide) -> int:
            left, low = x + offset[0], y + offset[1]
            return sum(
                left < x1 and x0 < left + w and low < y1 and y0 < low + 9
                for x0, y0, x1, y1 in taken
            )

        best = min(offsets, key=covers)
        ax.annotate(label, place, xytext=best, textcoords="offset points", fontsize=8)
        taken.append((x + best[0], y + best[1], x + best[0] + wide, y + best[1] + 9))


def heat(
    values: Any,
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    title: str = "",
    signed: bool = False,
    numbers: bool | None = None,
    path: str | Path | None = None,
) -> Any:
    """Draw a matrix as colours, brighter being larger.

    Parameters
    ----------
    values : array [m, n], or a mapping of title to such arrays
        Several are drawn side by side, on one scale.
    rows, columns
        Names at the left and below.
    signed
        Orange below zero and purple above it, white at zero.
    numbers
        Write the values into the cells; by default if there are at most 120 of them.
    title, path
        What stands above; a file to write, too.
    """
    many = {k: np.asarray(v) for k, v in values.items()} if isinstance(values, Mapping) else None
    panels = many or {title: np.asarray(values)}
    shape = next(iter(panels.values())).shape
    numbers = len(panels) == 1 and shape[0] * shape[1] <= 120 if numbers is None else numbers
    width = min(12.0, max(4.5, 0.42 * shape[1] * len(panels) + 1.5))
    height = min(9.0, max(2.2, 0.34 * shape[0] + 1.3))
    figure, axes = _axes(width, height, ncols=len(panels), squeeze=False, sharey=True)
    low = min(float(np.nanmin(v)) for v in panels.values())
    high = max(float(np.nanmax(v)) for v in panels.values())
    if signed:
        high = max(abs(low), abs(high)) or 1.0
        low = -high
    look = {"cmap": "PuOr" if signed else "cividis", "vmin": low, "vmax": high, "aspect": "auto"}
    for ax, (name, panel) in zip(axes[0], panels.items(), strict=True):
        image = ax.imshow(panel, interpolation="nearest", **look)
        ax.set_title(name, fontsize=10)
        if rows is not None:
            ax.set_yticks(range(len(rows)), rows, fontsize=8)
        if columns is not None:
            ax.set_xticks(range(len(columns)), columns, fontsize=8, rotation=60, ha="right")
            for tick in ax.get_xticklabels():
                tick.set_rotation_mode("anchor")
        if numbers:
            _write_numbers(ax, panel, low, high, signed)
    figure.colorbar(image, ax=axes[0].tolist(), shrink=0.8)
    if many and title:
        figure.suptitle(title)
    return _saved(figure, path)


def _write_numbers(ax: Any, panel: Any, low: float, high: float, signed: bool) -> None:
    for (i, j), value in np.ndenumerate(panel):
        if np.isnan(value):
            continue
        share = (value - low) / ((high - low) or 1)
        dark = abs(share - 0.5) > 0.35 if signed else share < 0.5
        text = f"{value:.2g}" if isinstance(value, np.floating | float) else str(value)
        if abs(value) < (high - low) / 1000:
            text = "0"
        ax.text(
            j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else "black"
        )


def histogram(
    series: Mapping[str, Any],
    n_bins: int = 60,
    xlabel: str = "",
    title: str = "",
    log: bool = False,
    path: str | Path | None = None,
) -> Any:
    """Draw how values are spread, as steps: by name, an array; ``log`` counts on a logarithmic axis."""
    figure, ax = _axes()
    both = np.concatenate([np.ravel(v) for v in series.values()])
    edges = np.linspace(both.min(), both.max(), n_bins + 1)
    for i, (name, values) in enumerate(series.items()):
        counts, _ = np.histogram(values, edges)
        ax.stairs(
            counts, edges, color=COLOURS[i % 7], linestyle=LINES[i % 4], label=name, linewidth=1.6
        )
    _tidy(ax, xlabel=xlabel, ylabel="how many", title=title, yscale="log" if log else "linear")
    if len(series) > 1:
        ax.legend(frameon=False)
    return _saved(figure, path)


def tree(
    columns: Sequence[Sequence[tuple[str, float]]],
    chosen: Sequence[str],
    title: str = "",
    path: str | Path | None = None,
) -> Any:
    """Draw the alternatives of each step of a text: a column a step, the chosen ones joined by a line.

    Parameters
    ----------
    columns
        For each step, (text, probability), the likeliest first; a darker box is likelier.
    chosen
        The text that was taken at each step; one that is not in its column stands below it.
    title, path
        What stands above; a file to write, too.
    """
    most = max(map(len, columns))
    figure, ax = _axes(min(14.0, 1.3 * len(columns) + 0.6), 0.42 * (most + 1) + 0.8)
    path_y = []
    for x, (column, taken) in enumerate(zip(columns, chosen, strict=True)):
        listed = [text for text, _ in column]
        shown = list(column) if taken in listed else [*column, (taken, 0.0)]
        for y, (text, p) in enumerate(shown):
            here = text == taken
            box = {
                "boxstyle": "round,pad=0.25",
                "facecolor": _shade(p),
                "edgecolor": COLOURS[1] if here else "#999999",
                "linewidth": 2 if here else 0.8,
            }
            label = f"{text!r}  {p:.0%}" if p else f"{text!r}"
            ink = "white" if p > 0.55 else "black"
            ax.text(x, y, label, ha="center", va="center", fontsize=8, color=ink, bbox=box)
            if here:
                path_y.append(y)
    ax.plot(range(len(path_y)), path_y, color=COLOURS[1], linewidth=1.5, zorder=0)
    ax.set(xlim=(-0.6, len(columns) - 0.4), ylim=(most + 0.6, -0.7), title=title)
    ax.axis("off")
    return _saved(figure, path)


def _shade(p: float) -> tuple[float, float, float]:
    """White for an unlikely token, dark blue for a certain one."""
    dark = (0.12, 0.31, 0.47)
    return (1 - p * (1 - dark[0]), 1 - p * (1 - dark[1]), 1 - p * (1 - dark[2]))


def profile(
    path: str | Path | None, parts: Mapping[str, Sequence[tuple[str, float, float]]]
) -> Any:
    """Draw bars of time.

    Parameters
    ----------
    path
        The file; its ending says which kind.
    parts
        By title, rows (kernel, seconds, seconds at the machine's limits), the longest first.
    """
    heights = [len(rows) for rows in parts.values()]
    figure, axes = _axes(
        8,
        1.2 * len(parts) + 0.26 * sum(heights),
        nrows=len(parts),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )
    for ax, (title, rows) in zip(axes[:, 0], parts.items(), strict=True):
        names = [row[0] for row in rows][::-1]
        ax.barh(names, [1e3 * row[1] for row in rows][::-1], color=SOFT, label="measured")
        least = [1e3 * row[2] for row in rows][::-1]
        ax.barh(names, least, color=INK, height=0.35, label="at the limits")
        _tidy(ax, title=title, xlabel="ms")
    axes[0, 0].legend(loc="lower right", frameon=False)
    return _saved(figure, path)


def comparison(
    path: str | Path | None, title: str, layers: Sequence[float], tensors: Mapping[str, float]
) -> Any:
    """Draw what ``tinyllm.compare`` found.

    Parameters
    ----------
    path, title
        The file, and what stands above.
    layers
        The error after each layer.
    tensors
        By how much the KL falls with a tensor put back, by its name; may be empty. The 20 largest are drawn.
    """
    worst = sorted(tensors.items(), key=lambda pair: -pair[1])[:20]
    figure, axes = _axes(
        10 if worst else 6, max(3.5, 1 + 0.2 * len(worst)), ncols=1 + bool(worst), squeeze=False
    )
    ax = axes[0, 0]
    ax.plot(range(len(layers)), layers, f"-{MARKERS[0]}", color=COLOURS[0], markersize=4)
    _tidy(ax, xlabel="layer", ylabel="relative error of the residual stream")
    ax.grid(alpha=0.25)
    ax.set_ylim(0, 1.08 * max(filter(math.isfinite, layers), default=0) or 1)
    ax.locator_params("x", integer=True)
    if worst:
        names, values = [name for name, _ in worst], [value for _, value in worst]
        axes[0, 1].barh(names[::-1], values[::-1], color=SOFT, edgecolor=INK, linewidth=0.6)
        _tidy(axes[0, 1], xlabel="the KL falls by so much with it put back")
        axes[0, 1].tick_params("y", labelsize=8)
    figure.suptitle(title)
    return _saved(figure, path)


def roofline(
    path: str | Path | None,
    title: str,
    limits: Mapping[str, float],
    points: Sequence[tuple[str, str, float, float]],
) -> Any:
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
    figure, ax = _axes(8, 5)
    low = min([point[2] for point in points], default=1) / 4
    high = max([point[2] for point in points], default=1) * 16
    for name, style in (("dot", "-"), ("float", "--")):
        top = limits[f"{name} GMAC/s"]
        knee = top / limits["read GB/s"]
        xs = [low, knee, max(high, 4 * knee)]
        ys = [min(top, x * limits["read GB/s"]) for x in xs]
        ax.plot(xs, ys, style, color=INK, label=f"{name} {top:.0f} GMAC/s")
    makers = list(dict.fromkeys(point[1] for point in points))
    for i, maker in enumerate(makers):
        own = [point for point in points if point[1] == maker]
        look = {"color": COLOURS[1:][i % 6], "marker": MARKERS[i % 7], "linestyle": ""}
        ax.plot([p[2] for p in own], [p[3] for p in own], label=maker, **look)
    _tidy(
        ax,
        xscale="log",
        yscale="log",
        xlabel="multiply-adds per byte",
        ylabel="GMAC/s",
        title=title,
    )
    slope = limits["read GB/s"]
    x = (low * limits["float GMAC/s"] / slope) ** 0.5  # half way up, left of the line
    beside = {"xytext": (-6, 3), "textcoords": "offset points", "ha": "right"}
    ax.annotate(f"{slope:.0f} GB/s", (x, x * slope), color=INK, **beside)
    ax.legend(loc="lower right", frameon=False)
    _write_labels(ax, [point[0] for point in points], np.array([point[2:] for point in points]))
    return _saved(figure, path)
