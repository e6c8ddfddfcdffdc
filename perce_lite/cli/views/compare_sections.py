"""Figures of `perce-lite compare` as tables and sentences."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from perce_lite.cli.views.eval_sections import generated_texts, side, text_differences
from perce_lite.cli.views.sections import (
    CHOSEN,
    CHOSEN_NOTE,
    PARTS,
    WHO_NOTE,
    Section,
    caution,
    held_out_texts,
    interval_note,
    named,
    plain,
    point,
    signed,
)
from perce_lite.words import counted


def comparison(figures: Mapping[str, Any]) -> list[Section]:
    """The tables of `perce-lite compare`, the primary figure first."""
    rates = [f"{rate:g}" for rate in figures["rates"]]
    rows = counted(figures["train_rows"], "row")
    chosen = Section(
        "Arms",
        f"Trained on {rows}, seeds {', '.join(map(str, figures['seeds']))}. Validation loss a "
        "token of the first seed at each rate, nats; the lowest was chosen.",
        ("arm", "judged with profile", *(f"rate {rate}" for rate in rates), "chosen"),
        [_arm(arm, rates) for arm in figures["arms"]],
    )
    made = [chosen]
    for name, split in figures["splits"].items():
        tokens, interval = split["tokens"], interval_note(split)
        note = f"{held_out_texts(name, split)}, {tokens['all']} tokens, {tokens['personal']} "
        by_against = {
            against: [difference for difference in split["differences"] if difference["against"] == against]
            for against in dict.fromkeys(difference["against"] for difference in split["differences"])
        }
        made.append(_worth(name, split))
        made += [
            _worth_differences(name, interval, *group)
            for group in by_against.items()
            if any(difference["worth"] for difference in group[1])
        ]
        made.append(_compared(name, f"{note}of them personal", split["losses"]))
        made += [_differences(name, interval, *group) for group in by_against.items()]
        made += [_chosen(name, split, *group) for group in by_against.items()]
        made += _equal_loss(name, split["equal_loss"])
        made += _who(name, split)
    if figures["texts"] is not None:
        made += [*generated_texts(figures["texts"]["table"]), *text_differences(figures["texts"]["differences"])]
    return made


def _arm(arm: Mapping[str, Any], rates: Sequence[str]) -> tuple[str, ...]:
    rate = "failed" if arm["rate"] is None else f"{arm['rate']:g}" + (" (edge)" if arm["at_edge"] else "")
    tried = ["–" if arm["validation"][at] is None else f"{arm['validation'][at]:.3f}" for at in rates]
    return named(arm["arm"]), arm["profile"], *tried, rate


def _worth(name: str, split: Mapping[str, Any]) -> Section:
    """One row an arm: what its own profile is worth over each other condition."""
    over = list(dict.fromkeys(row["over"] for row in split["worth"]))
    by_arm: dict[str, dict[str, Mapping[str, Any]]] = {}
    for worth in split["worth"]:
        by_arm.setdefault(worth["arm"], {})[worth["over"]] = worth
    return Section(
        f"{name}: what the own profile is worth (the primary figure)",
        "Loss a token with another profile less that with the own one, nats over all tokens, mean over the seeds; "
        "higher is more personal. Gives and costs: over none, of the tokens that the own profile makes likelier, and "
        "less likely.",
        ("arm", *(f"over {profile}" for profile in over), "gives", "costs"),
        [
            (
                named(arm),
                *(plain(by_profile[profile]["all"]) for profile in over),
                plain(by_profile["none"]["gives"]),
                plain(by_profile["none"]["costs"]),
            )
            for arm, by_profile in by_arm.items()
        ],
    )


def _worth_differences(split: str, interval: str, against: str, differences: Sequence[Mapping[str, Any]]) -> Section:
    over = list(dict.fromkeys(profile for difference in differences for profile in difference["worth"]))
    return Section(
        f"{split}: the own profile's worth, difference from {against}",
        "Nats a token over all tokens, positive is more personal: paired over the same rows, mean over the seeds; "
        f"{interval}; on the page a dot is one seed.",
        ("arm", *(f"over {profile}" for profile in over)),
        [
            (named(difference["arm"]), *(signed(difference["worth"][profile]["all"]) for profile in over))
            for difference in differences
            if difference["worth"]
        ],
        tuple(
            point(named(difference["arm"]), f"over {profile}", difference["worth"][profile]["all"])
            for difference in differences
            for profile in difference["worth"]
        ),
        f"difference from {against}, nats a token",
    )


def _compared(name: str, counted: str, losses: Sequence[Mapping[str, Any]]) -> Section:
    """One row an arm: every part with the own profile, all tokens with the others."""
    by_arm: dict[str, dict[str, Mapping[str, Any]]] = {}
    for loss in losses:
        by_arm.setdefault(loss["arm"], {})[loss["profile"]] = loss
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


def _differences(split: str, interval: str, against: str, differences: Sequence[Mapping[str, Any]]) -> Section:
    return Section(
        f"{split}: difference from {against}",
        "Nats a token, negative is better: paired over the same rows, mean over the seeds; "
        f"{interval}; on the page a dot is one seed.",
        ("arm", *PARTS.values()),
        [(named(difference["arm"]), *(signed(difference[part]) for part in PARTS)) for difference in differences],
        tuple(
            point(named(difference["arm"]), PARTS[part], difference[part])
            for difference in differences
            for part in ("all", "personal")
            if difference[part] is not None
        ),
        f"difference from {against}, nats a token",
    )


def _chosen(name: str, split: Mapping[str, Any], against: str, differences: Sequence[Mapping[str, Any]]) -> Section:
    parts = [part for part in CHOSEN if split["tokens"].get(part)]
    counts = ", ".join(f"{split['tokens'][part]} {CHOSEN[part]}" for part in parts)
    return Section(
        f"{name}: personal tokens chosen by something else, difference from {against}",
        f"{CHOSEN_NOTE} Nats a token, negative is better; tokens: {counts or 'none'}.",
        ("arm", *(CHOSEN[part] for part in parts)),
        [(named(difference["arm"]), *(signed(difference[part]) for part in parts)) for difference in differences],
    )


def _equal_loss(name: str, equal: Sequence[Mapping[str, Any]]) -> list[Section]:
    if not equal:
        return []
    over = list(equal[0]["worth"])
    return [
        Section(
            f"{name}: at equal loss",
            "Each arm's first seed against the step on the way of plain SFT whose all-token validation loss is nearest "
            "to its own: what is left is not that the arm learned less. Nats a token.",
            ("arm", "plain SFT's step", "all tokens", "personal", *(f"worth over {profile}" for profile in over)),
            [
                (
                    named(difference["arm"]),
                    str(difference["step"]),
                    signed(difference["all"]),
                    signed(difference["personal"]),
                    *(signed(difference["worth"][profile]["all"]) for profile in over),
                )
                for difference in equal
            ],
        )
    ]


def _who(name: str, split: Mapping[str, Any]) -> list[Section]:
    who = split["who"]
    if who is None:
        return []
    rows: list[tuple[str, ...]] = [("chance", f"{who['chance']['top1']:.3f}", f"{who['chance']['mrr']:.3f}", "–", "–")]
    for arm in who["arms"]:
        differences: Mapping[str, Any] = next(
            (
                difference["who"]
                for difference in split["differences"]
                if (difference["arm"], difference["against"]) == (arm["arm"], "uniform")
            ),
            {},
        )
        cells = [
            plain(arm[figure]) + (f" {signed(differences[figure])}" if figure in differences else "")
            for figure in ("top1", "mrr")
        ]
        rows.append((named(arm["arm"]), *cells, plain(arm.get("top1 relative")), plain(arm.get("mrr relative"))))
    note = f"{WHO_NOTE} {who['candidates']} profiles a text; then the difference from uniform."
    return [Section(f"{name}: who wrote it", note, ("arm", "top-1", "MRR", "relative: top-1", "MRR"), rows)]


_DECISIVE: tuple[tuple[str, str, Callable[[Mapping[str, Any]], Mapping[str, Any] | None]], ...] = (
    ("the own profile's worth over another user's", "higher", lambda difference: _worth_of(difference, "other user's")),
    ("its worth over the topical match", "higher", lambda difference: _worth_of(difference, "topical match")),
    ("loss on all tokens", "lower", lambda difference: difference["all"]),
    ("loss on the user's own words", "lower", lambda difference: difference.get("by words")),
)
"""What a comparison is decided by: how it is called, which side is better, and where a difference has it."""


def _worth_of(difference: Mapping[str, Any], over: str) -> Mapping[str, Any] | None:
    return difference["worth"][over]["all"] if over in difference["worth"] else None


def comparison_sentences(figures: Mapping[str, Any]) -> list[str]:
    """What got better on the first split, what got worse, what cannot be told; then what to be careful about."""
    name, split = next(iter(figures["splits"].items()))
    against = next((difference["against"] for difference in split["differences"]), None)
    differences = [difference for difference in split["differences"] if difference["against"] == against]
    groups: dict[str, list[str]] = {"Better": [], "Worse": [], "Not told from chance": []}
    for what, wanted, figure_of in _DECISIVE:
        _sort_in(groups, what, wanted, [(difference["arm"], figure_of(difference)) for difference in differences])
    for what, figure in _OF_TEXTS.items():
        changes = _of_answers(figures["texts"], against)
        _sort_in(
            groups, what, "higher", [(difference["arm"], difference["change"].get(figure)) for difference in changes]
        )
    sentences = [
        f"{group}, {name}, against {against}: {'; '.join(findings)}." for group, findings in groups.items() if findings
    ]
    edges = [arm["arm"] for arm in figures["arms"] if arm["at_edge"]]
    if edges:
        sentences.append(f"The best rate lies at the edge of the grid for {', '.join(edges)}: widen --rates.")
    return sentences + caution(figures["splits"])


_OF_TEXTS = {
    "style of the user in generated answers, content words masked": "masked_style",
    "content kept in generated answers": "content",
}


def _sort_in(
    groups: Mapping[str, list[str]], what: str, wanted: str, figures: Sequence[tuple[str, Mapping[str, Any] | None]]
) -> None:
    """Adds to each group the arms of which `what` is better, worse or not told from chance, with their differences."""
    arms: dict[str, list[str]] = {group: [] for group in groups}
    better, worse, same = groups
    for arm, figure in figures:
        if figure is not None:
            came = side(figure)
            group = same if came == "same" else better if came == wanted else worse
            arms[group].append(f"{named(arm)} ({figure['value']:+.3f})")
    for group, names in arms.items():
        if names:
            groups[group].append(f"{what}: {', '.join(names)}")


def _of_answers(texts: Mapping[str, Any] | None, against: str | None) -> list[Mapping[str, Any]]:
    """Differences of generated answers, of the drawn ones where there are any: they are more."""
    if texts is None:
        return []
    differences = [
        difference
        for difference in texts["differences"]
        if difference["against"] == against and difference["change"] is not None
    ]
    return [difference for difference in differences if difference["sampled"]] or differences
