"""Figures as tables and sentences: written once, shown by the terminal and by the page."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perce_lite.evaluation.interval_rules import FEW_USERS, FEWEST_ROWS, FEWEST_USERS
from perce_lite.fleet.registry import Adapter, held_out
from perce_lite.fleet.result import FleetResult, Gains
from perce_lite.words import counted

PARTS = {"all": "all tokens", "personal": "personal", "others": "others"}

CHOSEN = {"by words": "by words", "against topic": "against topic", "by another base": "by another base"}
"""Personal tokens chosen by something else than the training's own weights."""

CHOSEN_NOTE = (
    "Personal tokens that the training's weights did not choose. By words: tokens of words that the user's training "
    "texts use more than the other users' do (log-odds, z above 2; no model). Against topic: tokens that the own "
    "profile makes likelier under the base than the best topical match of other users does."
)

WHO_NOTE = (
    "Each text is set under the profiles of several users: how often its writer's gives the lowest loss (top-1), and "
    "the mean of 1 / rank (MRR). Relative: of what training changed, loss less the base's."
)

TEXT_FIGURES = {
    "rouge1": "ROUGE-1",
    "rougeL": "ROUGE-L",
    "chrf": "chrF",
    "meteor": "METEOR",
    "style": "style",
    "masked_style": "style, masked",
    "content": "content kept",
    "copied": "copied",
    "longest_copy": "longest copy",
    "distinct2": "distinct-2",
    "repeated4": "repeated",
    "length": "length",
}

WEIGHT_FIGURES = {
    "tokens": ("response tokens", "{:,}"),
    "pir_mean": ("mean PIR, nats", "{:+.3f}"),
    "pir_p10": ("PIR, 10th percentile", "{:+.3f}"),
    "pir_p50": ("PIR, median", "{:+.3f}"),
    "pir_p90": ("PIR, 90th percentile", "{:+.3f}"),
    "share_above_min": ("share of tokens above the lowest weight", "{:.1%}"),
    "share_at_min": ("share at the lowest weight", "{:.1%}"),
    "share_at_max": ("share at the highest weight", "{:.1%}"),
    "weight_mean": ("mean weight", "{:.2f}"),
    "effective_tokens": ("effective tokens", "{:.1%}"),
}
"""Figures of `loss.weight_statistics`, in the order of the table: what they are called, how they are written."""


@dataclass(frozen=True)
class Point:
    """One mark of a chart: a figure with its interval; `dots` are single seeds."""

    row: str
    series: str
    value: float
    low: float | None
    high: float | None
    dots: tuple[float, ...] = ()


@dataclass(frozen=True)
class Line:
    """One line of a chart over optimizer steps."""

    name: str
    steps: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Section:
    """A table with what it shows; `points`, or `lines` over steps, are drawn on the page, `unit` at the axis."""

    title: str
    note: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    points: tuple[Point, ...] = ()
    unit: str = ""
    lines: tuple[Line, ...] = ()


def plain(one: Mapping[str, Any] | None) -> str:
    """3.461, or a dash where there is none."""
    return "–" if one is None else f"{one['value']:.3f}"


def signed(one: Mapping[str, Any] | None) -> str:
    """-0.334 (-0.381 to -0.290): a difference and its interval."""
    if one is None:
        return "–"
    value = f"{one['value']:+.3f}"
    return value if one["low"] is None else f"{value} ({one['low']:+.3f} to {one['high']:+.3f})"


def named(arm: str) -> str:
    """An arm's name, with room to break it: "base: clip_min=0.2"."""
    return arm.replace(":", ": ")


def point(row: str, series: str, figure: Mapping[str, Any]) -> Point:
    """The mark of a figure {value, low, high}, with those of its seeds."""
    return Point(row, series, figure["value"], figure["low"], figure["high"], tuple(figure.get("seeds", ())))


def way_of(one: Mapping[str, Any]) -> str:
    """How answers were had: "own", "own, sampled", "own, personal 0.5"."""
    sampled, personal = ", sampled" if one["sampled"] else "", f", personal {one['personal']:g}"
    return f"{one['profile']}{sampled}{personal if one['personal'] else ''}"


def held_out_texts(name: str, split: Mapping[str, Any]) -> str:
    """How many texts of how many users, and whether training knew them."""
    instead = " (there is no test split)" if name == "validation" else ""
    known = f"{counted(split['users'], 'user')}, {split['trained_users']} of them in training"
    return f"{counted(split['rows'], 'held-out text')}{instead} of {known}"


def without_interval(split: Mapping[str, Any]) -> str:
    """Why the figures of a split have no interval: "3 rows of 1 user are too few"; empty where they have one."""
    if split["rows"] >= FEWEST_ROWS and split["users"] >= FEWEST_USERS:
        return ""
    are = "is" if split["rows"] == 1 else "are"
    return f"{counted(split['rows'], 'row')} of {counted(split['users'], 'user')} {are} too few"


def interval_note(split: Mapping[str, Any]) -> str:
    """What stands in brackets behind a figure of a split, or why nothing does."""
    few = without_interval(split)
    return f"{few} for an interval" if few else "in brackets the 95 % interval over rows, grouped by user"


def caution(splits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A sentence about splits that are too small for an interval, or for an honest one; none where all are large."""
    sentences = [
        f"{name}: {none} for an interval." for name, split in splits.items() if (none := without_interval(split))
    ]
    few = [name for name, split in splits.items() if split["users"] < FEW_USERS and not without_interval(split)]
    if few:
        sentences.append(f"{', '.join(few)}: with so few users the intervals are too narrow: take them as a hint.")
    return [" ".join(sentences)] if sentences else []


# fleet


def fleet(adapters: Sequence[Adapter]) -> list[Section]:
    """The table of a fleet: what others start from, then users, those whom training helped most first."""
    ordered = sorted(
        adapters, key=lambda adapter: (adapter.kind == "user", adapter.kind == "cohort", -(adapter.gain or 0.0))
    )
    note = (
        "Gain: nats a token on held-out rows (positive is better) against what the adapter started from, and against "
        "the base; then the loss of the base, of what it started from, and of the adapter."
    )
    head = ("adapter", "state", "rows", "over start", "over base", "base / start / own", "trained", "MiB")
    return [Section("Adapters", note, head, [_adapter_row(adapter) for adapter in ordered])]


def _adapter_row(adapter: Adapter) -> tuple[str, ...]:
    losses = held_out(adapter)
    figures = ("–", "–", "–")
    worse = ""
    if losses is not None:
        own, base, start = losses["own"], losses["base"], losses["start"]
        figures = (f"{start - own:+.3f}", f"{base - own:+.3f}", f"{base:.3f} / {start:.3f} / {own:.3f}")
        worse = " (worse than what it replaces)" if own > start else " (worse than the base)" if own > base else ""
    count = adapter.metrics.get("parameters")
    trained = "–" if count is None else f"{count:,}" + (" core" if adapter.metrics["core_only"] else "")
    name = {"user": adapter.name, "cohort": f"cohort {adapter.name}"}.get(adapter.kind, adapter.kind)
    return name, adapter.state + worse, str(adapter.examples), *figures, trained, f"{adapter.bytes / 2**20:.1f}"


def fleet_sentences(result: FleetResult) -> list[str]:
    """A fleet's result in sentences."""
    gains = [adapter.gain for adapter in result.adapters if adapter.kind == "user" and adapter.gain is not None]
    sentences = [", ".join(f"{count} {state}" for state, count in result.states.items() if count) + "."]
    sentences += stopped_early(result.adapters)
    if gains:
        better = sum(gain > 0 for gain in gains)
        users, served = counted(len(gains), "user"), counted(better, "is", "are")
        sentences.append(f"Of {users} with held-out rows {served} better served by their own adapter.")
        sentences.append(mean_gain(result.gains))
    return sentences


def stopped_early(adapters: Sequence[Adapter]) -> list[str]:
    """How many adapters ended their training early; nothing where none had early stopping."""
    stops = [adapter.metrics["early_stopping"] for adapter in adapters if "early_stopping" in adapter.metrics]
    if not stops:
        return []
    early = sum(stop["steps"] < stop["of"] for stop in stops)
    earlier = sum(stop["kept_step"] < stop["steps"] for stop in stops)
    taken = sum(stop["steps"] for stop in stops) / sum(stop["of"] for stop in stops)
    adapters_with = counted(len(stops), "adapter")
    return [
        f"Early stopping: of {adapters_with} {early} ended before their last step (in all {taken:.0%} of the "
        f"steps were taken), and {earlier} are of an earlier step than they ended at."
    ]


def kept_step(stopping: Mapping[str, Any]) -> str:
    """Which step a training with early stopping kept, in a sentence; `stopping`: `BestStep.figures`."""
    loss = next(
        (measurement["loss"] for measurement in stopping["validation"] if measurement["step"] == stopping["kept_step"]),
        math.nan,
    )
    return (
        f"Early stopping: kept step {stopping['kept_step']}, with {loss:.3f} nats a token on validation rows; ended at "
        f"step {stopping['steps']} of {stopping['of']}."
    )


def mean_gain(gains: Gains) -> str:
    """The mean gain of a fleet's users in a sentence."""
    if not gains.users:
        return "No user of this run has held-out rows."
    return (
        f"In the mean over {counted(gains.users, 'user')} their own adapter gains {gains.over_start:+.3f} nats a token "
        f"over what it started from, {gains.over_base:+.3f} over the base."
    )


# export
