"""A look at the rows before any training: what is kept, how long it is, one example as the model will see it."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from perce_lite.data import read_rows
from perce_lite.models import load_tokenizer
from perce_lite.pairs import IGNORED, Audit, Pair, PairMaker, Tokens, require
from perce_lite.recipe import Recipe, training_config
from perce_lite.rows import SPLIT_NAMES, of_split

Span = tuple[str, str]
"""A piece of text and what it is: template, profile, query or response."""


def check(recipe: Recipe) -> dict[str, Any]:
    """The figures that `perce-lite check` shows; reads rows and tokenizer, loads no weights.

    Raises:
        DataError, TemplateError: as training would.
    """
    rows = read_rows(recipe)
    config = training_config(recipe)
    maker = PairMaker(load_tokenizer(recipe), recipe.template, config.max_length, recipe.profile.max_tokens)
    splits, example = {}, None
    for name in SPLIT_NAMES:
        audit = Audit()
        pairs = maker.make(of_split(rows, name), audit)
        if name == "train":
            require(pairs, audit, name)
            example = shown(maker, pairs[len(pairs) // 2])
        kept = Counter(pair.row.user for pair in pairs)
        splits[name] = {
            **audit.summary(),
            "users": dict(sorted(kept.items())),
            "with_profile_tokens": _spread([len(pair.factual.ids) for pair in pairs]),
            "without_profile_tokens": _spread([len(pair.counterfactual.ids) for pair in pairs]),
            "response_tokens": _spread([sum(one != IGNORED for one in pair.factual.labels) for pair in pairs]),
            "rows_with_items_left_out": sum(pair.items_left_out > 0 for pair in pairs),
        }
    return {"max_length": config.max_length, "splits": splits, "example": example}


def shown(maker: PairMaker, pair: Pair) -> dict[str, Any]:
    """The example as spans of text; decoded from the very ids that are trained on."""
    return {
        "row": pair.row.where,
        "user": pair.row.user,
        "with_profile": _spans(maker, pair.factual, pair.profile, pair.row.query),
        "without_profile": _spans(maker, pair.counterfactual, "", pair.row.query),
    }


def _spans(maker: PairMaker, tokens: Tokens, profile: str, query: str) -> list[Span]:
    spans: list[Span] = []
    start = 0
    scored = [label != IGNORED for label in tokens.labels]
    for end in range(1, len(scored) + 1):
        if end == len(scored) or scored[end] != scored[start]:
            text = maker.tokenizer.decode(tokens.ids[start:end], clean_up_tokenization_spaces=False)
            spans += [(text, "response")] if scored[start] else _context(text, profile, query)
            start = end
    return spans


def _context(text: str, profile: str, query: str) -> list[Span]:
    """Splits a piece of context at the profile and at the query, where they stand in it."""
    for part, kind in ((profile, "profile"), (query, "query")):
        before, found, after = text.partition(part) if part else (text, "", "")
        if found:
            return [
                *_context(before, "", query),
                (found, kind),
                *_context(after, "", query if kind == "profile" else ""),
            ]
    return [(text, "template")] if text else []


def _spread(lengths: Sequence[int]) -> dict[str, int]:
    if not lengths:
        return {}
    ordered = sorted(lengths)
    return {"min": ordered[0], "median": ordered[len(ordered) // 2], "max": ordered[-1], "sum": sum(ordered)}
