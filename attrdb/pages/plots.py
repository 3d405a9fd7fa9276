"""The plots of pages and of the benchmark's results, each as the text of an SVG."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from attrdb.store.schema import Row

LEGEND_WIDTH = 2.6  # inches per column
SOFT, FAINT, LINE = "#667085", "#b9c6d8", "#e4e7ec"
COLOURS = ("#1f5fa8", "#c2410c", "#15803d", "#7c3aed", "#b45309", "#0e7490", "#be185d", "#4d7c0f")
DASHES, MARKERS = ("-", "--", "-."), ("o", "s", "^")


def losses(values: Sequence[float], means: Sequence[float]) -> str:
    """Loss against step, with its running mean as a bold line.

    values, means: one per step
    """
    figure, [axis] = _panels(1, width=7.2, height=2.4)
    steps = range(1, len(values) + 1)
    axis.plot(steps, values, color=FAINT, linewidth=0.8, gid="losses")
    axis.plot(steps, means, color=COLOURS[0], linewidth=1.6, gid="means")
    axis.set(xlim=(1, len(values)), xlabel="step", ylabel="loss")
    axis.set_ylim(bottom=min(0, *values))
    axis.locator_params(axis="x", integer=True)
    return _svg(figure)


def attention(steps: Sequence[int], values: Sequence[float]) -> str:
    """Attention to a token against the steps done.

    steps, values: one per probe
    """
    figure, [axis] = _panels(1, width=4.8, height=1.9)
    axis.plot(steps, values, color=COLOURS[0], linewidth=1.6, marker="o", markersize=3, gid="attention")
    axis.set(xlabel="steps done", ylabel="attention")
    axis.set_ylim(bottom=0)
    axis.locator_params(axis="x", integer=True)
    return _svg(figure)


def recall_curves(rows: Sequence[Row]) -> str:
    """Recall@K against K, a panel per test case, a line per method; chance is dotted.

    rows: case, method, k, recall, chance
    """
    panels = _by(rows, "case")
    names = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = _panels(len(panels))
    for axis, (case, of_case) in zip(axes, panels.items(), strict=True):
        for name, points in _by(of_case, "method").items():
            points = sorted(points, key=lambda row: row["k"])
            axis.plot(
                [row["k"] for row in points], [row["recall"] for row in points], label=name, **_line(names.index(name))
            )
        axis.plot([row["k"] for row in points], [row["chance"] for row in points], ":", color=SOFT, label="chance")
        axis.set(title=case, xscale="log", ylim=(0, 1), xlabel="K", ylabel="Recall@K")
    _legend(figure)
    return _svg(figure)


def gains(rows: Sequence[Row]) -> str:
    """Gains in recall with their intervals, a panel per test case, a line per method.

    rows: case, method, value, low, high
    """
    panels = _by(rows, "case")
    most = max(map(len, panels.values()))
    figure, axes = _panels(len(panels), height=0.9 + 0.22 * most, columns=2)
    for axis, (case, lines) in zip(axes, panels.items(), strict=True):
        for place, row in enumerate(reversed(lines)):
            axis.plot([row["low"], row["high"]], [place, place], color=COLOURS[0], linewidth=1.5)
            axis.plot(row["value"], place, "o", color=COLOURS[0], markersize=4)
        axis.set_yticks(range(len(lines)), [row["method"] for row in reversed(lines)])
        axis.set_title(case, loc="right")  # names of methods leave it little room
        axis.set(xlabel="gain in Recall@10", ylim=(-0.6, len(lines) - 0.4))
        axis.locator_params(axis="x", nbins=3)
        axis.axvline(0, color=SOFT, linewidth=0.8)
    return _svg(figure)


def reliability(rows: Sequence[Row]) -> str:
    """The known share of candidates against their influence, a panel per case, a line per calibration.

    rows: case, method, influence, share
    """
    panels = _by(rows, "case")
    figure, axes = _panels(len(panels), width=5.4, height=5, columns=2)
    names = list(dict.fromkeys(row["method"] for row in rows))
    for axis, (case, of_case) in zip(axes, panels.items(), strict=True):
        for name, points in _by(of_case, "method").items():
            points = [row for row in points if row["influence"] > 0 and row["share"] > 0]  # the axes are logarithmic
            x, y = [row["influence"] for row in points], [row["share"] for row in points]
            axis.plot(x, y, label=name, **_line(names.index(name)), marker="o", markersize=3)
        axis.plot([1e-4, 1], [1e-4, 1], ":", color=SOFT, label="equal")
        axis.set(title=case, xscale="log", yscale="log", xlim=(1e-4, 1), ylim=(1e-4, 1))
        axis.set(xlabel="influence", ylabel="known share")
    _legend(figure)
    return _svg(figure)


def general(rows: Sequence[Row]) -> str:
    """General attribution against recall on exemplars, a panel per case, a point per method.

    rows: case, method, x, y
    """
    panels = _by(rows, "case")
    figure, axes = _panels(len(panels), columns=3, height=2.6)
    names = list(dict.fromkeys(row["method"] for row in rows))
    for axis, (case, points) in zip(axes, panels.items(), strict=True):
        for row in points:
            number = names.index(row["method"])
            marker = MARKERS[number // len(COLOURS) % len(MARKERS)]
            axis.plot(row["x"], row["y"], marker, color=COLOURS[number % len(COLOURS)], label=row["method"])
        axis.set(title=case, xlabel="Recall@10 on exemplars", ylabel="Recall@size on sets")
    _legend(figure)
    return _svg(figure)


def _by(rows: Sequence[Row], column: str) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row[column]].append(row)
    return groups


def _panels(n: int, width: float = 3.6, height: float = 2.9, columns: int = 3) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    columns = min(columns, n)
    lines = -(-n // columns)
    figure = Figure(figsize=(width * columns, height * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes[n:]:
        axis.remove()
    for axis in axes[:n]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color=LINE, linewidth=0.6)
        axis.tick_params(labelsize=8)
    return figure, list(axes[:n])


def _line(number: int) -> dict[str, Any]:
    """Colour and dashes of the n-th line; they repeat after 24 lines."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": DASHES[number // len(COLOURS) % len(DASHES)]}


def _legend(figure: Figure) -> None:
    """One legend for all panels, below them."""
    handles: dict[str, Artist] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    columns = max(1, min(4, len(handles), int(figure.get_figwidth() // LEGEND_WIDTH)))
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=columns, fontsize=8, frameon=False
    )


def _svg(figure: Figure) -> str:
    """The <svg> element; equal figures have equal texts."""
    import matplotlib

    for axis in figure.axes:
        axis.title.set_fontsize(9)
        axis.xaxis.label.set_fontsize(8)
        axis.yaxis.label.set_fontsize(8)

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "attrdb", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
