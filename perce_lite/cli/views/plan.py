"""A plan as a person reads it in the terminal."""

import shlex
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from perce_lite.console import console
from perce_lite.planning.gpus import GIB

_HELD = {
    "base": "base in 4 bit, with its quantisation constants",
    "unquantized": "what stays whole: embeddings, norms, head",
    "adapter": "LoRA weights, float32",
    "optimizer": "optimizer state",
}
_AT_WORK = {
    "gradients": "gradients, float32, all of them: at the optimizer's step",
    "gradients_ahead": "gradients of the batches ahead of one in its accumulation window",
    "saved": "saved for the backward pass",
    "layer": "one layer at work: computed again, de-quantised, its gradients, less what is gone by then",
    "attention": "(a part of these: one layer's attention and the masks)",
    "head": "head: a tile of logits",
    "scoring_alone": "scoring before training, a row at a time",
    "scoring": "the same with the batches that are tried first, halved where they do not fit",
}
_PREFIX_PARTS = {
    "prefixes": "keys and values of prefixes, with those kept for later rows",
    "reading": "reading a prefix, before anything is saved",
}
_NARROW = 0.05
"""Share of a GPU below which what is left over is no comfort."""

_BASIS = "estimate"
"""Stands in every row: the figures come from the model's shape, none from a run on a GPU."""

_REST = {"spill": "lost to the allocator", "context": "CUDA itself"}


def show_plan(figures: dict[str, Any], recipe: str, overrides: Sequence[str] = ()) -> None:
    """`perce-lite plan`: the parts on the first GPU, then what each GPU takes and what would make the recipe fit.

    overrides: those that the recipe was planned with, which a command for it needs too
    """
    rows, settings = figures["rows"], figures["settings"]
    first = figures["cards"][0]
    batch = f"{settings['batch']} x {rows['longest']} tokens, {first['dtype']}"
    title = f"{figures['model']} ({figures['shape_from']}), {batch}"
    table = Table(title=Text(title), title_justify="left")
    for name in ("part", "GiB", "basis"):
        table.add_column(name, justify="right" if name == "GiB" else "left")
    parts = first["parts"]
    frozen = settings["profile_pass"] == "frozen"
    for names in (_HELD, {**_AT_WORK, **(_PREFIX_PARTS if frozen else {})}, _REST):
        for name, what in names.items():
            table.add_row(what, _gib(parts[name]), _BASIS)
        table.add_section()
    table.add_row(f"peak on {first['card']}", _gib(parts["total"]), _BASIS, style="bold")
    console.print(table)
    with_, without = _gib(parts["saved_with_checkpointing"]), _gib(parts["saved_without"])
    sentences = [
        f"Longest row: {rows['longest']} tokens, {rows['with_loss']} with loss ({rows['source']}).",
        f"Saved for the backward pass: {with_} GiB with gradient checkpointing, {without} without.",
        "The peak: the first four, gradients of batches ahead, what is saved with a layer or the head at work (or "
        "scoring, before there is an optimizer), and the last two. No weights were loaded.",
    ]
    if frozen:
        sentences.append(
            f"With profile_pass: frozen the prefixes are there too; the longest has {rows['prefix']} tokens."
        )
    for sentence in sentences:
        console.print(Text(sentence))
    console.print(_gpus(figures["cards"], figures["fleet"]))
    for card in figures["cards"]:
        if card["overflow"] is not None:
            console.print(Text(f"{card['card']}: {card['overflow']}"), style="red", soft_wrap=True)
        console.print(Text(_advice(card, recipe, figures["fleet"], overrides)), soft_wrap=True)


def _gpus(gpus: list[dict[str, Any]], fleet: str | int | None) -> Table:
    """fleet: `fleet.slots` of a recipe that speaks of a fleet, so that users at once are of interest; else None"""
    table = Table(title="GPUs", title_justify="left")
    names = ["GPU", "GiB seen", "peak", "fits", "longest row", "longest row, batch 1", "largest batch"]
    for name in [*names, *([] if fleet is None else ["users at once"]), "basis"]:
        narrowest = len("users at") if name == "users at once" else None
        table.add_column(name, justify="left" if name in ("GPU", "basis") else "right", min_width=narrowest)
    for gpu in gpus:
        fits = Text("yes", style="green") if gpu["fits"] else Text("no", style="red")
        table.add_row(
            gpu["card"], _gib(gpu["bytes"]), _gib(gpu["parts"]["total"]), fits, _or_none(gpu["longest_row"]),
            _or_none(gpu["longest_row_alone"]), _or_none(gpu["largest_batch"]),
            *([] if fleet is None else [_or_none(gpu["users_at_once"])]), _BASIS,
        )  # fmt: skip
    return table


def _advice(card: dict[str, Any], recipe: str, fleet: str | int | None, overrides: Sequence[str]) -> str:
    command = f"perce-lite {'train' if fleet is None else 'fleet'} {shlex.quote(recipe)}"
    if card["fits"] and fleet is not None and not card["slots_fit"]:
        most = card["users_at_once"]
        return f"{card['card']}: {fleet} users at once do not fit, {most} do\n  {command} " + _with(
            overrides, [f"fleet.slots={most}"]
        )
    spare = card["bytes"] - card["parts"]["total"]
    if card["fits"] and spare < _NARROW * card["bytes"]:
        return f"{card['card']}: fits with {_gib(spare)} GiB to spare, by an estimate that may be off by more."
    if card["fits"]:
        return f"{card['card']}: fits as it is."
    if card["change"] is not None:
        alone = ["fleet.slots=1"] if isinstance(fleet, int) and fleet > 1 else []  # the estimate is of one at a time
        line = _with(overrides, [*card["change"], *alone])
        return f"{card['card']}: fits ({_gib(card['total_after_change'])} GiB) with\n  {command} {line}"
    if card["smaller_model"] is not None:
        line = _with(overrides, card["smaller_model"])
        return f"{card['card']}: fits with a smaller model alone, such as\n  {command} {line}"
    return f"{card['card']}: nothing that is known makes it fit; take a smaller model and shorter rows."


def _with(overrides: Sequence[str], words: Sequence[str]) -> str:
    """The user's own overrides and `words`, which take the place of those of the same key, as options."""
    replaced = {word.partition("=")[0] for word in words}
    kept = [word for word in overrides if word.partition("=")[0] not in replaced]
    return " ".join(f"--set {shlex.quote(word)}" for word in [*kept, *words])


def show_probe(figures: dict[str, Any]) -> None:
    """`perce-lite plan --probe`: the estimate beside what one real step took."""
    console.print(_beside_the_estimate(f"One real step on {figures['card']}", figures["parts"], "measured"))


def show_imitation(figures: dict[str, Any]) -> None:
    """`perce-lite plan --imitate`: the estimate beside what a step with shapes alone took."""
    rows, card = figures["rows"], figures["card"]
    title = f"One imitated step: {card}"
    console.print(_beside_the_estimate(title, figures["parts"], "imitated"))
    kernels = ", ".join(figures["attention"]) or "plain mathematics"
    fits = "fits" if figures["fits"] else "does not fit"
    for sentence in (
        f"Longest row: {rows['longest']} tokens, {rows['with_loss']} with loss ({rows['source']}).",
        f"Attention: {kernels}. The host waits {figures['waits']} times a step for the GPU.",
        f"{card}: {fits}: {_gib(figures['total'])} of {_gib(figures['bytes'])} GiB with what the allocator loses and "
        f"CUDA takes, both estimates. It took {figures['seconds']:.0f} s; no weights were loaded.",
    ):
        console.print(Text(sentence), soft_wrap=True)


def _beside_the_estimate(title: str, parts: dict[str, Sequence[int]], how: str) -> Table:
    """A part a line: bytes by the formulas, and as they came out."""
    table = Table(title=Text(title), title_justify="left")
    for name in ("GiB", "estimate", how):
        table.add_column(name, justify="left" if name == "GiB" else "right")
    for name, (estimate, measured) in parts.items():
        table.add_row(name, _gib(estimate), _gib(measured))
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"


def _or_none(count: int) -> str:
    return str(count) if count else "none"
