"""More like the user while the model writes: the contrast of the loss, applied to the next token's log-probs."""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor

from perce_lite.data.pairs import Tokens
from perce_lite.model.fused_head import base_of
from perce_lite.model.scoring import encode_prefix

PLAUSIBLE = 0.1
"""A token that is less likely than this share of the most likely one, with the profile, is never taken."""


class PersonalContrast(LogitsProcessor):
    """log P(y | profile, query) + strength * (log P(y | profile, query) - log P(y | query)), of plausible tokens.

    The pass without the profile runs beside `generate`'s own, with a KV cache of its own: two forwards a token.
    Sources: Context Steering, arXiv 2405.01768; the cut of implausible tokens is that of CoPe, EMNLP 2025.

    tokens: the prompt without the profile; with adapters on they are off in its prefix, where it has one
    strength: at least 0; 0 is plain decoding
    adapters_off: whether the pass without the profile switches the adapters off (the estimators over the base)
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokens: Tokens,
        strength: float,
        adapters_off: bool,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.base, self.strength = base_of(model), strength
        self.switched = model if adapters_off and isinstance(model, PeftModel) else None
        self.cache = DynamicCache(config=self.base.config)
        self.unread = tokens.ids
        if tokens.prefix_length and not adapters_off:
            self.cache = encode_prefix(model, tokens.prefix_ids, autocast, self.cache)
            self.unread = tokens.after_prefix.ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Log-probs to choose the next token by, -inf where it is implausible; `input_ids` (B, T), `scores` (B, V)."""
        factual = scores.float().log_softmax(-1)
        counterfactual = self._without_profile(input_ids).to(factual.device).float().log_softmax(-1)
        contrasted = factual + self.strength * (factual - counterfactual)
        least = factual.amax(-1, keepdim=True) + math.log(PLAUSIBLE)
        return contrasted.masked_fill(factual < least, -torch.inf)

    def _without_profile(self, input_ids: Tensor) -> Tensor:
        """Logits (B, V) of the next token after the prompt without the profile and what was generated since."""
        read = input_ids[:, -1:]
        if self.unread:
            read = torch.tensor([self.unread], device=input_ids.device).expand(len(input_ids), -1)
            if self.cache.get_seq_length():
                self.cache.batch_repeat_interleave(len(input_ids))
            self.unread = []
        with nullcontext() if self.switched is None else self.switched.disable_adapter():
            out = self.base(input_ids=read, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = out.logits
        return logits[:, -1]
