"""Figures of `eval` and `compare` as tables and sentences: written once, shown by the terminal and by the page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perce_lite.evaluation.metrics import FEW_USERS
from perce_lite.fleet.registry import Adapter, held_out
from perce_lite.fleet.result import FleetResult, Gains

PARTS = {"all": "all tokens", "personal": "personal", "others": "others"}

METRICS = {"rouge1": "ROUGE-1", "rougeL": "ROUGE-L", "chrf": "chrF", "meteor": "METEOR"}


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
class Section:
    """A table with what it shows; `points` are drawn beside it on the page, `unit` under their axis."""

    title: str
    note: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    points: tuple[Point, ...] = ()
    unit: str = ""


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


def _held_out(name: str, split: Mapping[str, Any]) -> str:
    """How many texts of how many users, and whether training knew them."""
    instead = " (there is no test split)" if name == "validation" else ""
    known = f"{split['users']} users, {split['trained_users']} of them in training"
    return f"{split['rows']} held-out texts{instead} of {known}"


def _caution(splits: Mapping[str, Mapping[str, Any]]) -> list[str]:
    few = [name for name, split in splits.items() if split["users"] < FEW_USERS]
    return [f"{', '.join(few)}: with so few users the intervals are too narrow: take them as a hint."] if few else []


# eval


def evaluation(figures: Mapping[str, Any]) -> list[Section]:
    """The tables of `perce-lite eval`."""
    made = []
    for name, split in figures["splits"].items():
        tokens = split["tokens"]
        counted = (
            f"{_held_out(name, split)}, {tokens['all']} response tokens; personal are the {tokens['personal']} whose "
            f"PIR under the base is above {figures['clip_min']:g}"
        )
        made += [_losses(name, counted, split), _changes(name, split), _worth(name, split)]
    return [*made, *_texts(figures["texts"]), *_general(figures["general"])]


def _losses(name: str, counted: str, split: Mapping[str, Any]) -> Section:
    return Section(
        f"{name}: loss a token",
        f"Nats, lower is better. {counted}.",
        ("arm", "profile in the prompt", *PARTS.values()),
        [(one["arm"], one["profile"], *(plain(one[part]) for part in PARTS)) for one in split["losses"]],
        tuple(_point(one["profile"], one["arm"], one["all"]) for one in split["losses"]),
        "loss a token over all response tokens, nats",
    )


def _changes(name: str, split: Mapping[str, Any]) -> Section:
    changed = [one for one in split["losses"] if one["change"] is not None]
    return Section(
        f"{name}: change against the base with the same profile",
        "Nats a token, negative is better; in brackets the 95 % interval over rows, grouped by user.",
        ("arm", "profile in the prompt", *PARTS.values()),
        [(one["arm"], one["profile"], *(signed(one["change"][part]) for part in PARTS)) for one in changed],
        tuple(
            _point(f"{PARTS[part]}, {one['arm']}", f"profile: {one['profile']}", one["change"][part])
            for one in changed
            for part in PARTS
            if one["profile"] in ("own", "none") and one["change"][part] is not None
        ),
        "change of the loss, nats a token",
    )


def _worth(name: str, split: Mapping[str, Any]) -> Section:
    return Section(
        f"{name}: what the own profile is worth",
        "Loss a token with another profile less that with the own one, nats; over none it is the mean PIR of the arm.",
        ("arm", "own profile over", *PARTS.values()),
        [(one["arm"], one["over"], *(signed(one[part]) for part in PARTS)) for one in split["worth"]],
        tuple(_point(f"over {one['over']}", one["arm"], one["all"]) for one in split["worth"]),
        "nats a token over all response tokens",
    )


def _texts(table: Sequence[Mapping[str, Any]]) -> list[Section]:
    if not table:
        return []
    metrics = [metric for metric in METRICS if metric in table[0]["scores"]]
    rows = []
    for one in table:
        told = [
            f"{plain(one['scores'][metric])}" + ("" if one["change"] is None else f" {signed(one['change'][metric])}")
            for metric in metrics
        ]
        rows.append((one["arm"], one["profile"], *told))
    note = f"{table[0]['rows']} generated answers each, 0 to 1, higher is better; then the change against the base."
    return [Section("Generated text", note, ("arm", "profile", *(METRICS[metric] for metric in metrics)), rows)]


def _general(table: Sequence[Mapping[str, Any]]) -> list[Section]:
    if not table:
        return []
    return [
        Section(
            "General ability",
            f"Loss a token on {table[0]['tokens']} tokens of text that has nothing to do with the users, no profile.",
            ("arm", "loss", "change against the base"),
            [(one["arm"], plain(one["loss"]), signed(one["change"])) for one in table],
        )
    ]


def evaluation_sentences(figures: Mapping[str, Any]) -> list[str]:
    """What the figures say of every adapter, in words."""
    told = []
    for arm in list(figures["arms"])[1:]:
        for name, split in figures["splits"].items():
            own = next(one["change"] for one in split["losses"] if one["arm"] == arm and one["profile"] == "own")
            told.append(f"{arm}, {name}: with the own profile {_better(own)}.")
            match = [one for one in split["worth"] if one["arm"] == arm and one["over"] == "topical match"]
            for one in match:
                told.append(f"{arm}, {name}: its own profile against the best topical match of others {_topic(one)}.")
        for one in figures["general"]:
            if one["arm"] == arm:
                told.append(f"{arm}: general text {_improved(one['change'])}.")
    return told + _caution(figures["splits"])


def _improved(change: Mapping[str, Any] | None) -> str:
    if change is None:
        return "has no tokens to judge by"
    if change["high"] is not None and change["high"] < 0:
        return f"is better than the base's by {-change['value']:.3f} nats a token"
    if change["low"] is not None and change["low"] > 0:
        return f"is worse than the base's by {change['value']:.3f} nats a token"
    return f"cannot be told from the base's, {signed(change)}"


def _better(change: Mapping[str, Any]) -> str:
    return f"the loss over all tokens {_improved(change['all'])}, over personal tokens {_improved(change['personal'])}"


def _topic(worth: Mapping[str, Any]) -> str:
    one = worth["all"]
    if one["low"] is not None and one["low"] > 0:
        return f"is worth {signed(one)} nats a token: more than topic"
    return f"is worth {signed(one)} nats a token, which cannot be told from topic"


# compare


def comparison(figures: Mapping[str, Any]) -> list[Section]:
    """The tables of `perce-lite compare`."""
    rates = [f"{rate:g}" for rate in figures["rates"]]
    chosen = Section(
        "Arms",
        f"Trained on {figures['train_rows']} rows, seeds {', '.join(map(str, figures['seeds']))}. Validation loss a "
        "token of the first seed at each rate, nats; the lowest was chosen.",
        ("arm", "judged with profile", *(f"rate {rate}" for rate in rates), "chosen"),
        [_arm(arm, rates) for arm in figures["arms"]],
    )
    made = [chosen]
    for name, split in figures["splits"].items():
        tokens = split["tokens"]
        note = f"{_held_out(name, split)}, {tokens['all']} tokens, {tokens['personal']} "
        made.append(_compared(name, f"{note}of them personal", split["losses"]))
        for against in dict.fromkeys(one["against"] for one in split["differences"]):
            mine = [one for one in split["differences"] if one["against"] == against]
            made.append(_differences(name, against, mine))
    return made


def _compared(name: str, counted: str, losses: Sequence[Mapping[str, Any]]) -> Section:
    """One row an arm: every part with the own profile, all tokens with the others."""
    by_arm: dict[str, dict[str, Mapping[str, Any]]] = {}
    for one in losses:
        by_arm.setdefault(one["arm"], {})[one["profile"]] = one
    others = [profile for profile in next(iter(by_arm.values())) if profile != "own"]
    return Section(
        f"{name}: loss a token",
        f"Nats, mean over the seeds, lower is better. {counted}.",
        ("arm", *(f"own profile, {part}" for part in PARTS.values()), *(f"{other}, all tokens" for other in others)),
        [
            (
                named(arm),
                *(plain(by_profile["own"][part]) for part in PARTS),
                *(plain(by_profile[other]["all"]) for other in others),
            )
            for arm, by_profile in by_arm.items()
        ],
    )


def _arm(one: Mapping[str, Any], rates: Sequence[str]) -> tuple[str, ...]:
    rate = "failed" if one["rate"] is None else f"{one['rate']:g}" + (" (edge)" if one["at_edge"] else "")
    tried = ["–" if one["validation"][at] is None else f"{one['validation'][at]:.3f}" for at in rates]
    return named(one["arm"]), one["profile"], *tried, rate


def _differences(split: str, against: str, mine: Sequence[Mapping[str, Any]]) -> Section:
    return Section(
        f"{split}: difference from {against}",
        "Nats a token, negative is better: paired over the same rows, mean over the seeds, 95 % interval over rows "
        "grouped by user; on the page a dot is one seed.",
        ("arm", *PARTS.values()),
        [(named(one["arm"]), *(signed(one[part]) for part in PARTS)) for one in mine],
        tuple(
            _point(named(one["arm"]), PARTS[part], one[part])
            for one in mine
            for part in ("all", "personal")
            if one[part] is not None
        ),
        f"difference from {against}, nats a token",
    )


def comparison_sentences(figures: Mapping[str, Any]) -> list[str]:
    """What the figures say, in words: one sentence for each split, reference and part."""
    told = []
    for name, split in figures["splits"].items():
        for against in dict.fromkeys(one["against"] for one in split["differences"]):
            mine = [one for one in split["differences"] if one["against"] == against]
            for part in ("all", "personal"):
                sides: dict[str, list[str]] = {"better": [], "worse": [], "not told from chance": []}
                for one in mine:
                    if one[part] is not None:
                        sides[_side(one[part])].append(f"{one['arm']} ({one[part]['value']:+.3f})")
                said = "; ".join(f"{side}: {', '.join(names)}" for side, names in sides.items() if names)
                told.append(f"{name}, {PARTS[part].removesuffix(' tokens')} tokens, against {against}: {said or '–'}.")
    edges = [arm["arm"] for arm in figures["arms"] if arm["at_edge"]]
    if edges:
        told.append(f"The best rate lies at the edge of the grid for {', '.join(edges)}: widen --rates.")
    return told + _caution(figures["splits"])


def _side(one: Mapping[str, Any]) -> str:
    if one["low"] is None or one["low"] <= 0 <= one["high"]:
        return "not told from chance"
    return "better" if one["value"] < 0 else "worse"


def _point(row: str, series: str, one: Mapping[str, Any] | None) -> Point:
    assert one is not None
    return Point(row, series, one["value"], one["low"], one["high"], tuple(one.get("seeds", ())))


# fleet


def fleet(adapters: Sequence[Adapter]) -> list[Section]:
    """The table of a fleet: what others start from, then users, those whom training helped most first."""
    ordered = sorted(adapters, key=lambda one: (one.kind == "user", one.kind == "cohort", -(one.gain or 0.0)))
    note = (
        "Gain: nats a token on held-out rows (positive is better) against what the adapter started from, and against "
        "the base; then the loss of the base, of what it started from, and of the adapter."
    )
    head = ("adapter", "state", "rows", "over start", "over base", "base / start / own", "trained", "MiB")
    return [Section("Adapters", note, head, [_adapter_row(one) for one in ordered])]


def _adapter_row(one: Adapter) -> tuple[str, ...]:
    losses = held_out(one)
    figures = ("–", "–", "–")
    worse = ""
    if losses is not None:
        own, base, start = losses["own"], losses["base"], losses["start"]
        figures = (f"{start - own:+.3f}", f"{base - own:+.3f}", f"{base:.3f} / {start:.3f} / {own:.3f}")
        worse = " (worse than what it replaces)" if own > start else " (worse than the base)" if own > base else ""
    count = one.metrics.get("parameters")
    trained = "–" if count is None else f"{count:,}" + (" core" if one.metrics["core_only"] else "")
    name = {"user": one.name, "cohort": f"cohort {one.name}"}.get(one.kind, one.kind)
    return name, one.state + worse, str(one.examples), *figures, trained, f"{one.bytes / 2**20:.1f}"


def fleet_sentences(result: FleetResult) -> list[str]:
    """A fleet's result in sentences."""
    gains = [adapter.gain for adapter in result.adapters if adapter.kind == "user" and adapter.gain is not None]
    sentences = [", ".join(f"{count} {state}" for state, count in result.states.items() if count) + "."]
    if gains:
        better = sum(gain > 0 for gain in gains)
        sentences.append(f"Of {len(gains)} users with held-out rows {better} are better served by their own adapter.")
        sentences.append(mean_gain(result.gains))
    return sentences


def mean_gain(gains: Gains) -> str:
    """The mean gain of a fleet's users in a sentence."""
    if not gains.users:
        return "No user of this run has held-out rows."
    return (
        f"In the mean over {gains.users} users their own adapter gains {gains.over_start:+.3f} nats a token "
        f"over what it started from, {gains.over_base:+.3f} over the base."
    )


# export
