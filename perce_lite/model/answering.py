"""Answers of one adapter, for chat and server: the profile for a question, the last prompt's cache, a stop."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

from perce_lite.data.readers import UserTexts
from perce_lite.data.rows import Message, Profiled
from perce_lite.model.compat import keeps_every_position
from perce_lite.model.fused_head import base_of
from perce_lite.model.generate import LoadedAdapter, generate


class Stop(StoppingCriteria):
    """Ends an answer after the token at which `asked` was set."""

    def __init__(self) -> None:
        self.asked = False

    def ask(self) -> None:
        """Ends the answer after its next token."""
        self.asked = True

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self.asked, device=input_ids.device)


@dataclass
class Kept:
    """Keys and values of the last prompt (T ids), adapter on or off: the next prompt mostly starts as it did."""

    use_adapter: bool
    ids: list[int]
    cache: DynamicCache

    def start_of(self, ids: Sequence[int], prefix: int, use_adapter: bool) -> DynamicCache | None:
        """The cache cut to what `ids` has in common with its own prompt; None where nothing of it can be used.

        A sliding window forgets, so it cannot be cut. The last id stays out: a forward needs something to read. A
        prefix that the adapter sleeps through is there whole or not at all.
        """
        pairs = zip(self.ids, ids[:-1], strict=False)
        shared = next((at for at, (old, new) in enumerate(pairs) if old != new), min(len(self.ids), len(ids) - 1))
        if use_adapter != self.use_adapter or not keeps_every_position(self.cache) or shared < max(1, prefix):
            return None
        self.cache.crop(shared - self.cache.get_seq_length())
        return self.cache


@dataclass
class Answerer:
    """Answers with one adapter or its base, prompt after prompt; keys and values that two prompts share are kept."""

    opened: LoadedAdapter
    _kept: Kept | None = None

    @property
    def context(self) -> int:
        """Tokens that the model can look at, the answer included."""
        return int(base_of(self.opened.model).config.get_text_config().max_position_embeddings)

    def profile_for(self, question: str, source: str | UserTexts) -> Profiled:
        """As much of a profile as fits beside `question`: `source` itself, or of a user's texts those nearest to it."""
        wanted = source if isinstance(source, str) else source.profile_for(question, self.opened.recipe.profile)
        return self.opened.maker.fitting([{"role": "user", "content": question}], wanted)

    def answer(
        self,
        prompt: Sequence[Message],
        profile: Profiled,
        use_adapter: bool,
        max_new_tokens: int,
        stop: Stop,
        stream: bool | BaseStreamer = False,
        personal: float = 0.0,
        **options: Any,
    ) -> str:
        """As `generate`, until `stop` is asked; what `prompt` shares with the last one is not read again.

        personal: strength of the contrast, see `generate.Personal`

        Raises:
            DataError: `personal` without a profile.
        """
        its = self.opened
        tokens = its.maker.prompt(prompt, profile)
        ids = tokens.ids
        cache = None if self._kept is None else self._kept.start_of(ids, tokens.prefix_length, use_adapter)
        if cache is None:
            cache = DynamicCache(config=base_of(its.model).config)
        self._kept = None  # an answer that fails halfway leaves keys that nobody knows
        more: dict[str, Any] = {"stopping_criteria": StoppingCriteriaList([stop]), "past_key_values": cache}
        answer = generate(
            its.model,
            its.maker,
            prompt,
            profile,
            max_new_tokens,
            use_adapter,
            its.autocast,
            stream=stream,
            personal=its.personal(personal),
            **{**options, **more},
        )
        self._kept = Kept(use_adapter, ids, cache)
        return answer

    def forget(self) -> None:
        """Drops the keys and values of the last prompt."""
        self._kept = None
