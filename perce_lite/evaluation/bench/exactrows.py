"""Rows of exactly so many tokens, from the recipe's own words: what users are compared by, whatever their data."""

import itertools
import re
from collections.abc import Iterable, Sequence

from perce_lite.data.pairs import PairMaker
from perce_lite.data.readers import read_rows
from perce_lite.data.rows import Row, of_split
from perce_lite.errors import BenchError, DataError
from perce_lite.model.base import load_tokenizer
from perce_lite.recipe import Recipe, Template

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
"""A turn a line. A model's own template alone is longer than the shortest rows."""

TEMPLATE = Template(system=None, profile="{profile}", separator="\n", chat_template_kwargs={})
"""Nothing around the profile either."""

_TRIED = 2000  # words, before it is said that they do not come out even


def words_of(recipe: Recipe) -> list[str]:
    """The words of the recipe's training responses, long ones in pieces, so that a text without spaces has words too.

    Raises:
        DataError: there are none; and what reading the rows raises.
    """
    texts = [message["content"] for row in of_split(read_rows(recipe), "train") for message in row.completion]
    words = [word for text in texts for word in re.findall(r"\S{1,8}", text)]
    if not words:
        raise DataError("No training rows: every row is held out, or empty. Lower split.test and split.validation.")
    return words


def exact_rows(recipe: Recipe, words: Sequence[str], length: int, users: int, each: int) -> list[Row]:
    """`each` rows of `users` users, user after user: `length` tokens with the profile, the last third the response.

    recipe: with `CHAT_TEMPLATE`, `TEMPLATE` and `train.max_length` no less than `length`

    Raises:
        BenchError: the words do not make up such a row.
    """
    maker = PairMaker(load_tokenizer(recipe), recipe.template, recipe.train["max_length"])
    sayable = [word for word in words if not maker.safe(word)[1]]
    third = length // 3
    rows = []
    for number in range(users * each):
        stream = itertools.islice(itertools.cycle(sayable), number * length % max(1, len(sayable)), None)
        response = _exactly(third, stream, maker)
        query = _exactly(third, stream, maker)
        profile = _exactly(length - third, stream, maker, f"\n{query}\n")
        asked, answer = ({"role": "user", "content": query},), ({"role": "assistant", "content": response},)
        row = Row(f"row {number}", f"user {number // each}", profile, asked, answer, "train")
        made = [len(pair.factual) for pair in maker.make([row])]
        if made != [length]:
            raise BenchError(
                f"A row of {length} tokens came out with {made[0] if made else 'none'} as it is trained on."
            )
        rows.append(row)
    return rows


def _exactly(count: int, words: Iterable[str], maker: PairMaker, after: str = "") -> str:
    """A text of `words`, in their order, of `count` tokens with `after` behind it; too long a word is left out."""
    text = ""
    for word in itertools.islice(words, _TRIED):
        longer = f"{text} {word}".strip()
        size = len(maker.ids(longer + after))
        if size == count:
            return longer
        if size < count:
            text = longer
    raise BenchError(f"The recipe's training responses have no words that make up exactly {count} tokens.")
