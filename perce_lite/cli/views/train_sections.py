"""Figures of `perce-lite train` as sentences and tables: for its page, and the sentences for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from perce_lite.cli.views.sections import WEIGHT_FIGURES, Line, Section, kept_step
from perce_lite.words import counted

_LOGGED = ("share_above_min", "share_at_max", "weight_mean", "pir_mean", "effective_tokens")

WEIGHTS = {
    **{name: WEIGHT_FIGURES[name] for name in _LOGGED},
    "store_hits": ("log-probs that the store had", "{:.0%}"),
}
"""Figures of the weights, means over the last epoch: what they are called, how they are written."""


def training_sentences(figures: Mapping[str, Any]) -> list[str]:
    """What came of a training, the most important first."""
    losses = figures["losses"]
    if not losses:
        return ["No held-out rows: raise split.test to see what training did."]
    stopping = [kept_step(figures["early_stopping"])] if "early_stopping" in figures else []
    return [sentence for sentence in (worse_than_the_base(losses), worth(losses), *stopping) if sentence]


def training(figures: Mapping[str, Any]) -> list[Section]:
    """Held-out losses, the loss curve, the weights."""
    made = []
    if figures["losses"]:
        made.append(_losses(figures["losses"]))
    curve = figures.get("curve")  # absent from figures of an earlier version
    if curve:
        made.append(_curve(curve))
    known = {name: value for name, value in figures["weights"].items() if name in WEIGHTS}
    if "weight_mean" in known:
        rows = [(WEIGHTS[name][0], WEIGHTS[name][1].format(value)) for name, value in known.items()]
        made.append(Section("Weights", "Means over the logged steps of the last epoch.", ("figure", "value"), rows))
    return made


def sample_answers(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The answers of base and adapter to one held-out query, as `page.write_figures` takes them."""
    sample = figures["sample"]
    if sample is None:
        return []
    known = {"row": f"A held-out query of {sample['user']}", "user": sample["user"], "query": sample["query"]}
    way = {"profile": "own", "sampled": False, "personal": 0.0, "written": sample["written"]}
    return [{**known, **way, "arm": arm, "text": sample[arm]} for arm in ("base", "adapter")]


_SHOWN = 0.0005
"""Nats a token that show in three digits."""


def worse_than_the_base(losses: Sequence[Mapping[str, Any]]) -> str:
    """A sentence where training did harm, or nothing, on held-out rows with the own profile; else empty."""
    own = next((loss for loss in losses if loss["profile"] == "own"), None)
    if own is None or own["adapter"] < own["base"]:
        return ""
    worse = own["adapter"] - own["base"]
    if worse < _SHOWN:
        return (
            "Do not use this adapter: training changed nothing that shows on held-out rows with the own profile. "
            "Raise train.learning_rate, or train for more steps."
        )
    return (
        f"Do not use this adapter: on held-out rows with the own profile it is {worse:.3f} nats "
        "a token worse than the untrained base. Lower train.learning_rate, or train on more rows."
    )


def worth(losses: Sequence[Mapping[str, Any]]) -> str:
    """What the own profile is worth over another user's, before and after."""
    by_profile = {loss["profile"]: loss for loss in losses}
    other, own = by_profile.get("other user's"), by_profile["own"]
    if other is None:
        return "No other users, so whether it is more personal cannot be told."
    before, after = other["base"] - own["base"], other["adapter"] - own["adapter"]
    return (
        f"The own profile is worth {after:.3f} nats a token over another user's, {before:.3f} before training; "
        "perce-lite eval says with which certainty, and more."
    )


def held_out(losses: Sequence[Mapping[str, Any]]) -> str:
    """On what the losses are."""
    first = losses[0]
    rows = counted(first["rows"], "held-out response")
    return f"{counted(first['tokens'], 'token')} of {rows}, {first['personal']['tokens']} personal"


def _losses(losses: Sequence[Mapping[str, Any]]) -> Section:
    head = ("profile in the prompt", "before", "after", "change", "personal: before", "personal: after", "change")
    rows = [(loss["profile"], *_before_after(loss), *_before_after(loss["personal"])) for loss in losses]
    return Section("Loss a token on held-out rows", f"Nats, lower is better; {held_out(losses)}.", head, rows)


def _before_after(loss: Mapping[str, Any]) -> tuple[str, str, str]:
    return f"{loss['base']:.3f}", f"{loss['adapter']:.3f}", f"{loss['adapter'] - loss['base']:+.3f}"


def _curve(curve: Sequence[Mapping[str, float]]) -> Section:
    steps = tuple(log["step"] for log in curve)
    series = (("unweighted_loss", "loss"), ("loss", "weighted loss"))
    lines = [
        Line(name, steps, tuple(log[key] for log in curve)) for key, name in series if all(key in log for log in curve)
    ]
    first, last = curve[0], curve[-1]
    rows = [
        (f"{log['step']:g}", f"{log['unweighted_loss']:.3f}", f"{log.get('learning_rate', 0.0):.1e}")
        for log in ((first, last) if len(curve) > 1 else (first,))
    ]
    note = "Of the training rows, nats a token, as logged; first and last in the table, all in figures.json."
    return Section("Training loss", note, ("step", "loss", "rate"), rows, (), "nats a token", tuple(lines))
