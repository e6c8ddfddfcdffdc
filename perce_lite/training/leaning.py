"""How much a text leans on the profile, unit by unit: PIR of the smallest pieces that a reader sees."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from perce_lite.data.text_units import text_units
from perce_lite.training.loss import pir


def leaning_units(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], factual: Tensor, counterfactual: Tensor
) -> Iterator[tuple[slice, dict[str, Any]]]:
    """The units of `text_units`, each with the tokens that it is made of and the sums of their log-probs and PIR.

    factual, counterfactual: (R,), log-probs of `ids` with the profile and without, nats
    """
    leans = pir(factual, counterfactual)
    for start, end, text in text_units(tokenizer, ids):
        tokens = slice(start, end)
        yield (
            tokens,
            {
                "text": text,
                "end_of_turn": ids[start] in tokenizer.all_special_ids,
                "pir": float(leans[tokens].sum()),
                "factual": float(factual[tokens].sum()),
                "counterfactual": float(counterfactual[tokens].sum()),
                "token_pirs": leans[tokens].tolist(),
            },
        )
