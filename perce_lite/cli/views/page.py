"""Self-contained pages: one template, the figures put in, all text escaped, nothing loaded from anywhere."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from perce_lite.cli.lazy import Lazy
from perce_lite.cli.views.sections import WEIGHT_FIGURES, Section, way_of
from perce_lite.console import PIR_BOUNDS
from perce_lite.locks import write_alone

charts = Lazy("perce_lite.cli.views.charts")  # matplotlib takes half a second

_WIDTH, _HEIGHT = 640, 180

Filters = dict[str, Callable[..., Any]]


def write_inspection(figures: dict[str, Any], path: Path) -> None:
    """The page of `perce-lite inspect`, whole or not at all.

    Raises:
        DiskFullError: no space left.
    """
    filters: Filters = {"pir_class": pir_class, "weight_class": weight_class(figures), "shown": shown, "label": label}
    drawn = {"chart": chart(figures), "health": WEIGHT_FIGURES, "pir_bounds": PIR_BOUNDS}
    _write("inspect.html", path, filters, **figures, **drawn)


def write_figures(
    title: str,
    lead: str,
    sentences: Sequence[str],
    sections: Sequence[Section],
    path: Path,
    answers: Sequence[dict[str, Any]] = (),
) -> None:
    """The page of `perce-lite train`, `eval` and `compare`, whole or not at all.

    answers: generated ones, as `evaluate` gives them; shown folded, by query

    Raises:
        DiskFullError: no space left.
    """
    by_query: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for answer in answers:
        texts = by_query.setdefault((answer["row"], answer["query"]), [(f"{answer['user']} wrote", answer["written"])])
        texts.append((f"{answer['arm']}, profile: {way_of(answer)}", answer["text"]))
    filters: Filters = {"drawn": lambda section: Markup(charts.drawn(section)), "words": words, "folds": folds}
    told_by = [(f"{row}: {query}", pairs) for (row, query), pairs in by_query.items()]
    _write(
        "figures.html", path, filters, title=title, lead=lead, sentences=sentences, sections=sections, answers=told_by
    )


def words(section: Section) -> int:
    """How many columns of `section`, from the left, hold words and not figures."""
    worded = ("profile in the prompt", "profile", "own profile over", "state")
    last = next((name for name in worded if name in section.head), section.head[0])
    return section.head.index(last) + 1


def folds(section: Section) -> bool:
    """Whether each row becomes a card where the page is narrow; a long table scrolls inside itself instead."""
    return len(section.head) > 3 and len(section.rows) <= 16


def _write(template: str, path: Path, filters: Filters, **values: Any) -> None:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= filters
    text = environment.get_template(template).render(**values)
    write_alone(path, text)


def pir_class(pir: float) -> str:
    """p0 (the profile makes it much less likely) .. p5 (no difference) .. p10 (much likelier)."""
    return f"p{sum(pir > bound for bound in PIR_BOUNDS)}"


def weight_class(figures: dict[str, Any]) -> Callable[[float], str]:
    """w0 (the lowest weight) .. w5 (the highest)."""
    low, high = figures["weight_bounds"]

    def of(weight: float) -> str:
        return f"w{round(5 * (weight - low) / (high - low)) if high > low else 0}"

    return of


def shown(text: str) -> str:
    """A token's text with its line breaks made visible; they stay line breaks."""
    return text.replace("\r", "").replace("\n", "⏎\n").replace("\t", "⇥\t")


def label(unit: dict[str, Any]) -> str:
    """What the page says of a token, or of the tokens that make up one character."""
    pirs = unit["token_pirs"]
    parts = f" (of {len(pirs)} tokens: {', '.join(f'{pir:+.2f}' for pir in pirs)})" if len(pirs) > 1 else ""
    return (
        f"“{shown(unit['text'])}” PIR {unit['pir']:+.2f}{parts}, weight {unit['weight']:.2f}, "
        f"log-prob with the profile {unit['factual']:.2f}, without {unit['counterfactual']:.2f}"
    )


def chart(figures: dict[str, Any]) -> dict[str, Any]:
    """Coordinates of the histogram: two outlines, the clip bounds, ticks; the view box is 640 x 180."""
    histogram = figures["histogram"]
    edges: list[float] = histogram["edges"]

    def x(value: float) -> float:
        return round(_WIDTH * (value - edges[0]) / (edges[-1] - edges[0]), 1)

    def shares(counts: Sequence[int]) -> list[float]:
        return [(count / max(1, sum(counts))) ** 0.5 for count in counts]  # square root: the tails are what matters

    highest = max(1e-9, *shares(histogram["own"]), *shares(histogram["swapped"]))

    def outline(counts: Sequence[int]) -> str:
        heights = [share / highest for share in shares(counts)]
        return " ".join(
            f"{x(edge)},{round(_HEIGHT * (1 - heights[index]), 1)}"
            for index in range(len(counts))
            for edge in (edges[index], edges[index + 1])
        )

    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "own": outline(histogram["own"]),
        "swapped": outline(histogram["swapped"]),
        "clips": [
            {"x": x(min(max(bound, edges[0]), edges[-1])), "label": f"{name} clip {bound:g}", "anchor": anchor}
            for name, bound, anchor in (
                ("lower", figures["clip_min"], "end" if figures["clip_min"] > -2 else "start"),
                ("upper", figures["clip_max"], "end" if figures["clip_max"] > 6 else "start"),
            )
        ],
        "ticks": [{"x": x(value), "label": f"{value:+d}" if value else "0"} for value in range(-4, 9, 2)],
    }
