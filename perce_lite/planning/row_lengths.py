"""The longest training row of a recipe: of its data where data and tokenizer are at hand, else as long as allowed."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from perce_lite.data.pairs import IGNORED, Pair, PairMaker, Tokens
from perce_lite.data.readers import read_rows
from perce_lite.data.rows import Row, of_split
from perce_lite.errors import DataError, ModelError, TemplateError
from perce_lite.model.base import load_tokenizer
from perce_lite.recipe import Recipe

NO_LIMIT = 4096
"""Tokens of the rows that are reckoned with where no limit is set and the data are not at hand."""


@dataclass(frozen=True)
class Rows:
    """Tokens of the longest row in training, of them with loss, of the longest scored row; where that is from.

    prefix: tokens of the longest prefix that the bare base can read ahead of an adapter (`profile_pass: frozen`);
        0: it cannot
    awake: tokens of the longest rest that follows a prefix
    """

    length: int
    scored: int
    read: int
    source: str
    prefix: int = 0
    awake: int = 0


def alike(length: int, source: str) -> Rows:
    """Rows of `length` tokens, all of which may be response; where the profile is read ahead, it is two thirds."""
    prefix = 2 * length // 3
    return Rows(length, length, length, source, prefix, length - prefix)


def packed(limit: int) -> Rows:
    """Rows that are filled up to `limit`; prefixes, twice as long as what follows them, are not packed with it."""
    return Rows(limit, limit, limit, "packed rows of train.max_length", 2 * limit, limit)


def rows_of(recipe: Recipe, max_length: int | None, positions: int, at_hand: bool) -> Rows:
    """The longest training row: of the recipe's data where data and tokenizer are at hand, else of `max_length` tokens.

    positions: the most that the model can read, for a recipe without a limit
    at_hand: whether the model's configuration was; else its tokenizer is not asked for, which may take minutes
    """
    why = "the tokenizer is not at hand"
    try:
        if at_hand:
            return longest_of(recipe, read_rows(recipe), max_length)
    except ModelError:
        pass
    except (DataError, TemplateError) as error:
        why = str(error).partition(". ")[0]
    length = max_length or min(positions, NO_LIMIT)
    return alike(length, f"{'train.max_length' if max_length else 'no limit is set'}, as {why}")


def longest_of(recipe: Recipe, rows: Sequence[Row], max_length: int | None) -> Rows:
    """The longest of the training rows among `rows`; `max_length` is that of the recipe's `PerCEConfig`.

    Raises:
        ModelError: the tokenizer is not at hand; TemplateError: it has no template for these rows.
        DataError: no row is left.
    """
    tokenizer = load_tokenizer(recipe)
    pairs = _pairs(recipe, tokenizer, of_split(rows, "train"), max_length)
    if not pairs:
        raise DataError("no row is left")
    passes = [pair.counterfactual if _without_profile(recipe) else pair.factual for pair in pairs]
    return longest_pass(pairs, passes, f"the longest of {len(pairs)} training rows")


def longest_pass(pairs: Sequence[Pair], passes: Sequence[Tokens], source: str) -> Rows:
    """The lengths of the longest among `passes`, which are those of `pairs` that train; `source`: as in `Rows`."""
    return Rows(
        length=max(len(tokens) for tokens in passes),
        scored=max(sum(label != IGNORED for label in tokens.labels) for tokens in passes),
        read=max(len(pair.factual) for pair in pairs),
        source=source,
        prefix=max(tokens.prefix_length for tokens in passes),
        awake=max(len(tokens.after_prefix) for tokens in passes),
    )


def _pairs(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], max_length: int | None
) -> list[Pair]:
    """The recipe's pairs, which say where a prefix ends, unless the template cannot have one."""
    if _without_profile(recipe):
        return PairMaker.of(recipe, tokenizer, max_length).make(rows)
    frozen = recipe.model_copy(update={"train": {**recipe.train, "profile_pass": "frozen"}})
    try:
        return PairMaker.of(frozen, tokenizer, max_length).make(rows)
    except TemplateError:
        return PairMaker.of(recipe, tokenizer, max_length).make(rows)


def _without_profile(recipe: Recipe) -> bool:
    return recipe.train.get("train_on") == "counterfactual"
