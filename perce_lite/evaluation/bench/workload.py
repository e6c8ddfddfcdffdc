"""The rows of a bench: batches as a training would see them, the same ones for every arm."""

from dataclasses import dataclass
from typing import Any

from perce_lite.console import say
from perce_lite.data.pairs import IGNORED, Audit, Pair, PairMaker, require
from perce_lite.data.readers import read_rows
from perce_lite.data.rows import from_columns, of_split, to_records
from perce_lite.errors import BenchError
from perce_lite.files import digest
from perce_lite.model.base import load_tokenizer
from perce_lite.recipe import Recipe, training_config
from perce_lite.training.order import train_sampler


@dataclass(frozen=True)
class Workload:
    """The rows that every arm trains on, batch after batch: `steps` times `batch` of them."""

    pairs: list[Pair]
    batch: int

    @property
    def steps(self) -> int:
        return len(self.pairs) // self.batch

    @property
    def profile_share(self) -> float:
        """Share of the tokens that is there for the profile alone."""
        return 1 - self.tokens(profile=False) / self.tokens(profile=True)

    def tokens(self, profile: bool) -> int:
        """Tokens of all rows, with the profile in the prompt or without."""
        return sum(len((pair.factual if profile else pair.counterfactual).ids) for pair in self.pairs)

    def digest(self, profile: bool) -> str:
        """As `measuring.measure` gives it for these rows."""
        trained = [pair.factual if profile else pair.counterfactual for pair in self.pairs]
        return digest([[tokens.ids for tokens in trained], [tokens.labels for tokens in trained]])

    def told(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "rows": len(self.pairs),
            "batch": self.batch,
            "tokens": self.tokens(profile=True),
            "tokens_without_profile": self.tokens(profile=False),
            "response_tokens": sum(label != IGNORED for pair in self.pairs for label in pair.factual.labels),
            "longest": max(len(pair.factual) for pair in self.pairs),
            "profile_share": self.profile_share,
        }


def workload(recipe: Recipe, steps: int) -> Workload:
    """The first `steps` batches that a training of `recipe` would see, and the one with the longest row in any case.

    Raises:
        BenchError: there are fewer rows than one batch takes; and what training raises.
    """
    config = training_config(recipe)
    if config.packing:
        say("packing is left out in every arm: a row is measured as it is.")
    maker = PairMaker.of(recipe, load_tokenizer(recipe), config.max_length)
    audit = Audit()
    # There and back again, as training does it: a column has one type, so a profile may become a list of one item.
    records = to_records(of_split(read_rows(recipe), "train"))
    pairs = maker.make([from_columns(record, f"row {number}") for number, record in enumerate(records)], audit)
    require(pairs, audit, "train")
    lengths = [len(pair.factual) for pair in pairs]
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    if len(pairs) < batch:
        raise BenchError(
            f"There are {len(pairs)} training rows, and one step takes {batch}: lower "
            "train.per_device_train_batch_size or train.gradient_accumulation_steps."
        )
    order = list(train_sampler(config, [pair.factual.ids for pair in pairs], config.seed))
    batches = [order[start : start + batch] for start in range(0, len(order) - batch + 1, batch)]
    longest = max(order, key=lambda index: lengths[index])
    taken = batches[:steps]
    if not any(longest in indices for indices in taken):  # peak memory is that of the longest row
        holding = [indices for indices in batches if longest in indices]
        taken[-1] = holding[0] if holding else [*taken[-1][1:], longest]
    return Workload([pairs[index] for indices in taken for index in indices], batch)
