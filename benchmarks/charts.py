"""Plots of IconAbC's figures that only this benchmark has, as SVG texts; those of any database are in attrdb.pages.plots."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from attrdb.pages import plots


def scatter(points: Sequence[dict[str, Any]]) -> str:
    """Styles against objects: a colour per encoder, an open mark for its features, a filled one for the tuned ones.

    points: encoder, variant (plain or both), object, style
    source: Wang et al. 2023, Fig. 5
    """
    figure, [axis] = plots._panels(1, width=5.6, height=4.4)
    encoders = list(dict.fromkeys(point["encoder"] for point in points))
    for number, encoder in enumerate(encoders):
        of = {point["variant"]: point for point in points if point["encoder"] == encoder}
        colour = plots.COLOURS[number % len(plots.COLOURS)]
        marker = plots.MARKERS[number // len(plots.COLOURS) % len(plots.MARKERS)]
        ordered = [of[variant] for variant in ("plain", "both") if variant in of]
        axis.plot([p["object"] for p in ordered], [p["style"] for p in ordered], color=colour, linewidth=0.8)
        for point in ordered:
            fill = colour if point["variant"] == "both" else "white"
            label = encoder if point is ordered[-1] else None
            axis.plot(
                point["object"], point["style"], marker, color=colour, markerfacecolor=fill, label=label, linestyle=""
            )
    axis.set(xlabel="objects, mAP", ylabel="styles, mAP", xscale="log", yscale="log")
    plots._legend(figure)
    return plots._svg(figure)


def sorted_influence(rows: Sequence[dict[str, Any]]) -> str:
    """Influence of the candidates in their order, before calibration (dotted) and after; a panel per case.

    rows:   case, encoder, calibrated, place, influence
    source: Wang et al. 2023, Fig. 4
    """
    by_case = defaultdict(list)
    for row in rows:
        by_case[row["case"]].append(row)
    encoders = list(dict.fromkeys(row["encoder"] for row in rows))
    figure, axes = plots._panels(len(by_case), columns=2, width=4.2)
    for axis, (case, of_case) in zip(axes, by_case.items(), strict=True):
        for number, encoder in enumerate(encoders):
            colour = plots.COLOURS[number % len(plots.COLOURS)]
            for calibrated, line in ((False, ":"), (True, "-")):
                points = [
                    row
                    for row in of_case
                    if (row["encoder"], row["calibrated"]) == (encoder, calibrated) and row["influence"] > 0
                ]
                label = encoder if calibrated else None
                x, y = [row["place"] for row in points], [row["influence"] for row in points]
                axis.plot(x, y, line, color=colour, label=label)
        axis.set(title=case, xscale="log", yscale="log", xlabel="candidate, by influence", ylabel="influence")
    plots._legend(figure)
    return plots._svg(figure)
