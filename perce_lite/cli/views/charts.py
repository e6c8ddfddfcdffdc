"""Charts of figures with intervals, as SVG that takes the page's own colours, light or dark."""

import io
import re
from collections.abc import Sequence

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from perce_lite.cli.views.sections import Line, Point, Section

_SENTINELS = {"#010203": "var(--ink)", "#040506": "var(--line)", "#070809": "var(--soft)"}
"""Colours that matplotlib writes, and what the page puts in their place."""

_SERIES = ("#b35806", "#2f6fb5", "#1b8a5a", "#8a4fa3", "#a3822a", "#5d6670", "#c2478a", "#3a9bab")
_FONT = 11
"""Points. The chart's 5 inches fill a phone's width, where a point is a pixel, and 1.3 times as much on a desk."""

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def drawn(section: Section) -> str:
    """The chart of a section as an `<svg>` element: lines over steps, or marks with their intervals."""
    return curves(section.lines, section.unit) if section.lines else forest(section.points, section.unit)


def curves(lines: Sequence[Line], unit: str) -> str:
    """A line for each of `lines` over optimizer steps; an `<svg>` element as `forest` gives it."""
    ink, line, soft = _SENTINELS
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "perce-lite", "font.size": _FONT}):
        figure = Figure(figsize=(5.0, 2.6))
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for number, curve in enumerate(lines):
            marker = "o" if len(curve.steps) == 1 else None
            axes.plot(curve.steps, curve.values, color=_SERIES[number], linewidth=1.4, marker=marker, label=curve.name)
        axes.set_xlabel("optimizer step", color=soft)
        axes.set_ylabel(unit, color=soft)
        axes.tick_params(colors=ink, length=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(color=line, linewidth=0.5)
        for side in axes.spines.values():
            side.set_visible(False)
        figure.legend(loc="outside upper left", frameon=False, labelcolor=ink, fontsize=_FONT, ncols=2)
        return _svg_of(figure)


def forest(points: Sequence[Point], unit: str) -> str:
    """A row for each `row` of `points`, a mark and a line for each of its series, zero drawn where it is in reach.

    Gives an `<svg>` element without script, style sheet or address.
    """
    ink, line, soft = _SENTINELS
    rows = list(dict.fromkeys(point.row for point in points))
    series = list(dict.fromkeys(point.series for point in points))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "perce-lite", "font.size": _FONT}):
        spread = 0.7 / max(1, len(series))
        figure = Figure(figsize=(5.0, 0.9 + len(rows) * max(0.3, 0.17 * len(series)) + 0.25 * len(series)))
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        for point in points:
            number = series.index(point.series)
            y = rows.index(point.row) + (number - (len(series) - 1) / 2) * spread
            colour, marker = _SERIES[number % len(_SERIES)], _MARKERS[number % len(_MARKERS)]
            if point.low is not None and point.high is not None:
                axes.plot([point.low, point.high], [y, y], color=colour, linewidth=1.6)
            axes.plot(point.value, y, marker, color=colour, markersize=5, label=_plain(point.series))
            if len(point.dots) > 1:
                axes.plot(point.dots, [y] * len(point.dots), "o", color=colour, markersize=2.2, alpha=0.55)
        low, high = axes.get_xlim()
        if low - (high - low) / 2 <= 0 <= high + (high - low) / 2:
            axes.axvline(0, color=soft, linewidth=0.8, linestyle="--")
        axes.set_yticks(range(len(rows)), [_wrapped(row) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlabel(unit, color=soft)
        axes.tick_params(colors=ink, length=0)
        axes.grid(axis="x", color=line, linewidth=0.5)
        for side in axes.spines.values():
            side.set_visible(False)
        handles = {text: handle for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)}
        if len(series) > 1:
            figure.legend(
                handles.values(),
                handles.keys(),
                loc="outside upper left",
                frameon=False,
                labelcolor=ink,
                fontsize=_FONT,
            )
        return _svg_of(figure)


def _svg_of(figure: Figure) -> str:
    figure.set_layout_engine("constrained")
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return _inlined(out.getvalue())


def _wrapped(text: str, width: int = 22) -> str:
    """Broken after a comma or a colon where it is long."""
    return _plain(text) if len(text) <= width else _plain(re.sub(r"([,:]) ", r"\1\n", text))


def _plain(text: str) -> str:
    """As it stands: matplotlib reads $ as mathematics, and leaves a label out that begins with _."""
    return re.sub(r"^_", "\u200b_", text.replace("$", r"\$"))


def _inlined(svg: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    for sentinel, variable in _SENTINELS.items():
        svg = svg.replace(sentinel, variable)
    return svg
