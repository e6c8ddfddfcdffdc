"""A look at the rows before any training: what is kept, how long it is, one example as the model will see it."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from perce_lite.console import warn
from perce_lite.data.pairs import IGNORED, Audit, Pair, PairMaker, require
from perce_lite.data.readers import read_rows
from perce_lite.data.rows import SPLIT_NAMES, of_split
from perce_lite.evaluation.findings import findings
from perce_lite.model.base import load_tokenizer
from perce_lite.model.float16 import overflow_of
from perce_lite.model.footprint import adapter_bytes, config_of, refuse_exports
from perce_lite.recipe import Recipe, training_config


def check(recipe: Recipe) -> dict[str, Any]:
    """The figures that `perce-lite check` shows; reads rows and tokenizer, loads no weights.

    Raises:
        DataError, TemplateError, RecipeError: as training would.
    """
    rows = read_rows(recipe)
    refuse_exports(recipe)
    size = adapter_bytes(recipe)  # a `lora` that does not go with the model is refused here
    config = training_config(recipe)
    overflow = overflow_of(config_of(recipe).model_type, "float16" if config.fp16 else "another")
    if overflow is not None:
        warn(f"{recipe.model}: {overflow}")
    maker = PairMaker.of(recipe, load_tokenizer(recipe), config.max_length)
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
            "with_profile_tokens": _spread([len(pair.factual) for pair in pairs]),
            "without_profile_tokens": _spread([len(pair.counterfactual) for pair in pairs]),
            "response_tokens": _spread([sum(label != IGNORED for label in pair.factual.labels) for pair in pairs]),
            "rows_with_items_left_out": sum(pair.items_left_out > 0 for pair in pairs),
        }
    return {
        "max_length": config.max_length,
        "adapter_bytes": size,
        "findings": [finding.figures() for finding in findings(rows)],
        "splits": splits,
        "example": example,
    }


def shown(maker: PairMaker, pair: Pair) -> dict[str, Any]:
    """The example as spans of text; decoded from the very ids that are trained on."""
    return {
        "row": pair.row.where,
        "user": pair.row.user,
        "with_profile": maker.spans(pair, with_profile=True),
        "without_profile": maker.spans(pair, with_profile=False),
    }


def _spread(lengths: Sequence[int]) -> dict[str, int]:
    if not lengths:
        return {}
    ordered = sorted(lengths)
    return {"min": ordered[0], "median": ordered[len(ordered) // 2], "max": ordered[-1], "sum": sum(ordered)}
