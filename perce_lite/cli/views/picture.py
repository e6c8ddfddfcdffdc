"""One response as a small SVG, each token coloured by its PIR; for light and dark, without script or address."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markupsafe import escape

from perce_lite.locks import write_alone

_COLUMNS = 46
_CHARACTER, _LINE, _MARGIN = 8.4, 26, 16  # pixels, of a monospaced font of 14 pixels
_SHADES = ((4.0, 0.85), (2.0, 0.6), (1.0, 0.4), (0.4, 0.22))
"""Nats from which on a token is drawn with an opacity."""

_STYLE = """\
text { font: 14px ui-monospace, Menlo, Consolas, monospace; fill: #1a1a1a; white-space: pre; }
.small { font-size: 12px; fill: #555; }
.paper { fill: #ffffff; }
.more { fill: #e08214; }
.less { fill: #6f8fc9; }
@media (prefers-color-scheme: dark) {
  text { fill: #eeeeee; } .small { fill: #aaa; } .paper { fill: #161616; }
  .more { fill: #b35806; } .less { fill: #3f5f9f; }
}
"""


def write_picture(figures: dict[str, Any], path: Path) -> None:
    """Draws the response with the highest mean PIR of `perce-lite inspect`'s figures.

    Raises:
        DiskFullError: no space left.
    """
    write_alone(path, picture(max(figures["rows"], key=lambda row: row["pir_mean"])))


def picture(row: dict[str, Any]) -> str:
    """The SVG of one row: its query, its response token by token, a legend.

    row: `query`, and `units` of {text, pir (nats), end_of_turn}
    """
    lines = list(_lines([unit for unit in row["units"] if not unit["end_of_turn"]]))
    width, top = _COLUMNS * _CHARACTER + 2 * _MARGIN, 2 * _LINE
    height = top + (len(lines) + 1.6) * _LINE
    body = [f'<text class="small" x="{_MARGIN}" y="{_LINE}">{escape(_shortened(row["query"]))}</text>']
    for number, line in enumerate(lines):
        body += _drawn(line, top + number * _LINE)
    body.append(_legend(top + (len(lines) + 0.9) * _LINE))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="A response whose tokens are coloured by how much likelier the profile makes them">\n'
        f"<style>\n{_STYLE}</style>\n"
        f'<rect class="paper" width="100%" height="100%" rx="8"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _COLUMNS else text[: _COLUMNS - 1] + "…"


def _lines(units: list[dict[str, Any]]) -> Iterator[list[tuple[int, str, float]]]:
    """Lines of (column, text, PIR), broken at tokens that begin a word."""
    line: list[tuple[int, str, float]] = []
    column = 0
    for unit in units:
        pieces = unit["text"].replace("\t", " ").split("\n")
        for number, piece in enumerate(pieces):
            if number or (column + len(piece) > _COLUMNS and piece.startswith(" ")):
                yield line
                line, column = [], 0
                piece = piece.lstrip()
            if piece:
                line.append((column, piece, unit["pir"]))
                column += len(piece)
    if line:
        yield line


def _drawn(line: list[tuple[int, str, float]], y: float) -> list[str]:
    parts = []
    for column, text, pir in line:
        x = _MARGIN + column * _CHARACTER
        opacity = next((shade for bound, shade in _SHADES if abs(pir) > bound), 0.0)
        if opacity:
            kind = "more" if pir > 0 else "less"
            parts.append(
                f'<rect class="{kind}" opacity="{opacity}" x="{x:.1f}" y="{y - 17:.1f}" '
                f'width="{len(text) * _CHARACTER:.1f}" height="23" rx="3"><title>PIR {pir:+.2f} nats</title></rect>'
            )
        fitted = f'textLength="{len(text) * _CHARACTER:.1f}" lengthAdjust="spacingAndGlyphs"'
        parts.append(f'<text x="{x:.1f}" y="{y:.1f}" {fitted}>{escape(text)}</text>')
    return parts


def _legend(y: float) -> str:
    return (
        f'<rect class="more" opacity="0.6" x="{_MARGIN}" y="{y - 11}" width="14" height="14" rx="3"/>'
        f'<text class="small" x="{_MARGIN + 20}" y="{y}">the profile makes it likelier</text>'
        f'<rect class="less" opacity="0.6" x="{_MARGIN + 240}" y="{y - 11}" width="14" height="14" rx="3"/>'
        f'<text class="small" x="{_MARGIN + 260}" y="{y}">less likely</text>'
    )
