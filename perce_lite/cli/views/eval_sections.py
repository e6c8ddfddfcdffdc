"""Figures of `perce-lite eval` as tables and as a verdict in words."""

from collections.abc import Mapping, Sequence
from typing import Any

from perce_lite.cli.views.sections import (
    CHOSEN,
    CHOSEN_NOTE,
    PARTS,
    TEXT_FIGURES,
    WHO_NOTE,
    Section,
    caution,
    held_out_texts,
    interval_note,
    named,
    plain,
    point,
    signed,
    way_of,
)
from perce_lite.words import counted

UNTRAINED = {"base": "base (RAG: no training)", "untrained": "untrained (RAG: no training)"}
"""The base with a profile in its prompt: what retrieval alone gives."""

_LIKENESS = ("rouge1", "rougeL", "chrf", "meteor")


def evaluation(figures: Mapping[str, Any]) -> list[Section]:
    """The tables of `perce-lite eval`, the primary figure first."""
    made = []
    for name, split in figures["splits"].items():
        tokens = split["tokens"]
        counted = (
            f"{held_out_texts(name, split)}, {tokens['all']} response tokens; personal are the {tokens['personal']} "
            f"whose PIR under the base is above {figures['clip_min']:g}"
        )
        made += [_worth(name, split), _losses(name, counted, split), _changes(name, split), *_chosen(name, split)]
        made += _who(name, split)
    return [*made, *generated_texts(figures["texts"]), *_general(figures), *_memory(figures)]


def _worth(name: str, split: Mapping[str, Any]) -> Section:
    return Section(
        f"{name}: what the own profile is worth (the primary figure)",
        "Loss a token with another profile less that with the own one, nats over all tokens; higher is more personal. "
        "Gives and costs: over the tokens that the own profile makes likelier, and less likely. Over none it is the "
        "mean PIR of the arm.",
        ("arm", "own profile over", "all tokens", "change against the base", "gives", "costs"),
        [
            (
                worth["arm"],
                worth["over"],
                signed(worth["all"]),
                "–" if worth["change"] is None else signed(worth["change"]["all"]),
                plain(worth["gives"]),
                plain(worth["costs"]),
            )
            for worth in split["worth"]
        ],
        tuple(point(f"over {worth['over']}", worth["arm"], worth["all"]) for worth in split["worth"]),
        "nats a token over all response tokens",
    )


def _losses(name: str, counted: str, split: Mapping[str, Any]) -> Section:
    return Section(
        f"{name}: loss a token",
        f"Nats, lower is better. {counted}.",
        ("arm", "profile in the prompt", *PARTS.values()),
        [(loss["arm"], loss["profile"], *(plain(loss[part]) for part in PARTS)) for loss in split["losses"]],
        tuple(point(loss["profile"], loss["arm"], loss["all"]) for loss in split["losses"]),
        "loss a token over all response tokens, nats",
    )


def _changes(name: str, split: Mapping[str, Any]) -> Section:
    changed = [loss for loss in split["losses"] if loss["change"] is not None]
    return Section(
        f"{name}: change against the base with the same profile",
        f"Nats a token, negative is better; {interval_note(split)}.",
        ("arm", "profile in the prompt", *PARTS.values()),
        [(loss["arm"], loss["profile"], *(signed(loss["change"][part]) for part in PARTS)) for loss in changed],
        tuple(
            point(f"{PARTS[part]}, {loss['arm']}", f"profile: {loss['profile']}", loss["change"][part])
            for loss in changed
            for part in PARTS
            if loss["profile"] in ("own", "none") and loss["change"][part] is not None
        ),
        "change of the loss, nats a token",
    )


def _chosen(name: str, split: Mapping[str, Any]) -> list[Section]:
    parts = [part for part in CHOSEN if split["tokens"].get(part)]
    if not parts:
        return []
    own = [loss for loss in split["losses"] if loss["profile"] == "own"]
    counts = ", ".join(f"{split['tokens'][part]} tokens {CHOSEN[part]}" for part in parts)
    rows = [(loss["arm"], *(_with_change(loss, part) for part in parts)) for loss in own]
    head = ("arm", *(CHOSEN[part] for part in parts))
    note = f"{CHOSEN_NOTE} Loss with the own profile, nats a token, then the change against the base; {counts}."
    return [Section(f"{name}: personal tokens, chosen by something else", note, head, rows)]


def _with_change(loss: Mapping[str, Any], part: str) -> str:
    return plain(loss[part]) + ("" if loss["change"] is None else f" {signed(loss['change'][part])}")


def _who(name: str, split: Mapping[str, Any]) -> list[Section]:
    who = split["who"]
    if who is None:
        return [Section(f"{name}: who wrote it", "No other users, so nobody to tell the writer from.", ("arm",), [])]
    rows: list[tuple[str, ...]] = [("chance", f"{who['chance']['top1']:.3f}", f"{who['chance']['mrr']:.3f}", "–", "–")]
    for arm in who["arms"]:
        change = arm["change"]
        cells = [plain(arm[figure]) + ("" if change is None else f" {signed(change[figure])}") for figure in _FOUND]
        rows.append((arm["arm"], *cells, plain(arm.get("top1 relative")), plain(arm.get("mrr relative"))))
    head = ("arm", "top-1", "MRR", "relative: top-1", "MRR")
    note = f"{WHO_NOTE} {who['candidates']} profiles a text; then the change against the base."
    return [Section(f"{name}: who wrote it", note, head, rows)]


_FOUND = ("top1", "mrr")


def generated_texts(table: Sequence[Mapping[str, Any]]) -> list[Section]:
    """What generated answers are like, by arm and way."""
    if not table:
        return []
    shown = [figure for figure in TEXT_FIGURES if any(figure in row["scores"] for row in table)]
    usual = [figure for figure in shown if figure in _LIKENESS]
    person = [figure for figure in shown if figure not in usual]
    drawn = next((row["answers"] // row["rows"] for row in table if row["sampled"]), None)
    queries = counted(table[0]["rows"], "query", "queries")
    answers = f"{queries}, an answer each" + ("" if drawn is None else f", {drawn} where sampled")
    return [
        _text_table(
            "Generated text: likeness to what the user wrote",
            f"{answers}; 0 to 1, higher is better; then the change against the base in the same way.",
            [row for row in table if usual and usual[0] in row["scores"]],
            usual,
        ),
        _text_table(
            "Generated text: style, content, copies",
            "Style: share attributed to its user among all users by character 3- to 5-grams of the training texts; "
            "masked: without the content words. Content kept: share of the reference's names, numbers and terms in the "
            "query that the answer keeps. Copied: share of 8-word runs that stand in the user's training texts and not "
            "in the query; longest copy in words. Distinct-2: different bigrams; repeated: 4-grams said before; "
            "length: times the reference. The person's own texts are the ceiling.",
            table,
            person,
        ),
    ]


def _text_table(title: str, note: str, table: Sequence[Mapping[str, Any]], shown: Sequence[str]) -> Section:
    head = ("arm", "profile", *(TEXT_FIGURES[figure] for figure in shown))
    rows = []
    for row in table:
        cells = [_text_figure(row, figure) for figure in shown]
        arm = UNTRAINED.get(row["arm"], named(row["arm"])) if row["profile"] == "own" else named(row["arm"])
        rows.append((arm, way_of(row), *cells))
    return Section(title, note, head, rows)


def text_differences(differences: Sequence[Mapping[str, Any]]) -> list[Section]:
    """What separates the answers of two arms, a table for each arm that others are set against."""
    made = []
    for against in dict.fromkeys(difference["against"] for difference in differences):
        changed = [
            difference
            for difference in differences
            if difference["against"] == against and difference["change"] is not None
        ]
        shown = [figure for figure in TEXT_FIGURES if any(figure in difference["change"] for difference in changed)]
        made.append(
            Section(
                f"Generated text: difference from {named(against)}",
                "Paired over the same queries and seeds, 95 % interval over queries grouped by user.",
                ("arm", "profile", *(TEXT_FIGURES[figure] for figure in shown)),
                [
                    (
                        named(difference["arm"]),
                        way_of(difference),
                        *(signed(difference["change"].get(figure)) for figure in shown),
                    )
                    for difference in changed
                ],
            )
        )
    return made


def _text_figure(row: Mapping[str, Any], figure: str) -> str:
    change = None if row["change"] is None else row["change"].get(figure)
    return plain(row["scores"].get(figure)) + ("" if change is None else f" {signed(change)}")


def _general(figures: Mapping[str, Any]) -> list[Section]:
    table, spill = figures["general"], figures["spill_over"]
    if not table:
        return []
    rows = []
    for row, spilled in zip(table, spill, strict=True):
        share = "–" if spilled["answers"] is None else f"{spilled['answers']:.2f}"
        rows.append((row["arm"], plain(row["loss"]), signed(row["change"]), signed(spilled["loss"]), share))
    return [
        Section(
            "General ability and spill-over",
            f"Loss a token on {table[0]['tokens']} tokens of text that has nothing to do with the users. Spill-over: "
            "what a user's profile in the prompt adds to that loss, and the share of generated answers with words that "
            "only the profile has.",
            ("arm", "loss", "change against the base", "spill-over: loss", "answers"),
            rows,
        )
    ]


def _memory(figures: Mapping[str, Any]) -> list[Section]:
    table = figures["memory"]
    if not table:
        return []
    split = next(iter(figures["splits"].values()))
    held_out = {loss["arm"]: loss for loss in split["losses"] if loss["profile"] == "own"}
    rows = []
    for row in table:
        change = held_out[row["arm"]]["change"]
        rows.append(
            (row["arm"], plain(row["loss"]), signed(row["change"]), "–" if change is None else signed(change["all"]))
        )
    return [
        Section(
            "Memory",
            f"Loss a token on {table[0]['rows']} training texts with the own profile, and the change against the base: "
            "where it is much larger than on held-out texts, the adapter knows its training texts by heart.",
            ("arm", "training texts", "change", "change on held-out texts"),
            rows,
        )
    ]


# The verdict


def evaluation_sentences(figures: Mapping[str, Any]) -> list[str]:
    """The verdict: at most six sentences an adapter, judged on the first split, then what to be careful about."""
    arms = list(figures["arms"])[1:]
    sentences = []
    for arm in arms:
        lines = _verdict(figures, arm)
        sentences += lines if len(arms) == 1 else [f"{arm}: {line[0].lower()}{line[1:]}" for line in lines]
    return sentences + caution(figures["splits"])


def _verdict(figures: Mapping[str, Any], arm: str) -> list[str]:
    name, split = next(iter(figures["splits"].items()))
    own = next(loss for loss in split["losses"] if loss["arm"] == arm and loss["profile"] == "own")
    worth = {row["over"]: row for row in split["worth"] if row["arm"] == arm}
    texts = {(row["arm"], row["profile"]): row for row in figures["texts"] if not (row["sampled"] or row["personal"])}
    lines = [
        _person(name, worth.get("other user's"), own),
        _topic(worth.get("topical match"), own),
        _content(texts.get((arm, "own"))),
        _copies(texts.get((arm, "own")), texts.get(("the person", "–"))),
        _ability(figures, arm),
        _advice(figures, arm, own, texts.get((arm, "own"))),
    ]
    return [line for line in lines if line]


def _person(name: str, worth: Mapping[str, Any] | None, own: Mapping[str, Any]) -> str:
    loss = f"the loss over all tokens {improved(own['change']['all'])}"
    if worth is None:
        return f"No other users, so whether it is more personal cannot be told; {loss}."
    change = worth["change"]["all"]
    verdicts = {
        "higher": "More personal",
        "lower": "Less personal",
        "same": "Not told apart from the base in how personal it is",
    }
    what = f"the own profile is worth {signed(change)} nats a token more over another user's than for the base"
    return f"{verdicts[side(change)]}, on {name} texts: {what}; {loss}."


def _topic(worth: Mapping[str, Any] | None, own: Mapping[str, Any]) -> str:
    if worth is None:
        return ""
    change = worth["change"]["all"]
    verdicts = {
        "higher": "It is the person, not the topic",
        "lower": "It leans more on the topic than the base does",
        "same": "Topic or person cannot be told",
    }
    words = own["change"].get("by words")
    chosen = "" if words is None else f"; on words typical of the user the loss changes by {signed(words)}"
    worth_changes = f"over the best topical match the own profile's worth changes by {signed(change)}"
    return f"{verdicts[side(change)]}: {worth_changes}{chosen}."


def _content(texts: Mapping[str, Any] | None) -> str:
    change = None if texts is None else texts["change"].get("content")
    if change is None:
        return ""
    kept = texts["scores"]["content"] if texts is not None else change
    verdicts = {
        "higher": "Content is kept better",
        "lower": "Content is lost",
        "same": "Content is kept as by the base",
    }
    return (
        f"{verdicts[side(change)]}: answers keep {kept['value']:.0%} of the names, numbers and terms of the query, "
        f"{signed(change)} against the base with the same profile."
    )


def _copies(texts: Mapping[str, Any] | None, person: Mapping[str, Any] | None) -> str:
    copied = None if texts is None else texts["scores"].get("copied")
    human = None if person is None else person["scores"].get("copied")
    if copied is None or human is None:
        return ""
    verdict = "It copies" if (copied["low"] or 0.0) > human["value"] + 0.02 else "It does not parrot"
    return (
        f"{verdict}: {copied['value']:.1%} of the 8-word runs of its answers stand in the user's training texts; in "
        f"the person's own held-out texts {human['value']:.1%}."
    )


def _ability(figures: Mapping[str, Any], arm: str) -> str:
    general = next((row for row in figures["general"] if row["arm"] == arm), None)
    spill = next((row for row in figures["spill_over"] if row["arm"] == arm), None)
    if general is None or spill is None:
        return ""
    return (
        f"General text: the loss {improved(general['change'])}; a profile in the prompt changes it by "
        f"{signed(spill['loss'])}."
    )


def _advice(figures: Mapping[str, Any], arm: str, own: Mapping[str, Any], texts: Mapping[str, Any] | None) -> str:
    """What to change; empty where nothing stands out."""
    change = own["change"]["all"]
    if side(change) == "higher":
        return "To change: it is worse than the base on held-out texts; lower train.learning_rate or the epochs."
    memory = next((row for row in figures["memory"] if row["arm"] == arm), None)
    if memory is not None and memory["change"]["value"] < 3 * min(0.0, change["value"]) - 0.1:
        return "To change: it knows its training texts far better than new ones; fewer epochs, or more texts."
    content = None if texts is None else texts["change"].get("content")
    if content is not None and side(content) == "lower":
        return "To change: lower train.learning_rate or train.clip_max, so that what is asked for is kept."
    if side(change) == "same":
        return "To change: nothing can be told yet; more texts, or a higher train.learning_rate."
    return ""


def side(change: Mapping[str, Any]) -> str:
    """`higher` or `lower` where the interval is clear of zero, else `same`."""
    if change["low"] is not None and change["low"] > 0:
        return "higher"
    return "lower" if change["high"] is not None and change["high"] < 0 else "same"


def improved(change: Mapping[str, Any] | None) -> str:
    """A change of a loss against the base in words."""
    if change is None:
        return "has no tokens to judge by"
    if side(change) == "lower":
        return f"is better than the base's by {-change['value']:.3f} nats a token"
    if side(change) == "higher":
        return f"is worse than the base's by {change['value']:.3f} nats a token"
    return f"cannot be told from the base's, {signed(change)}"
