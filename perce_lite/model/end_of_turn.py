"""Whether a base has learned the token that ends a turn: one that has not will not stop."""

import math
import statistics
from weakref import WeakSet

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from perce_lite.console import warn
from perce_lite.data.chat_template import Chat
from perce_lite.model.compat import LoraLayer

UNTRAINED = 0.25
"""Share of the median row's norm below which a row of the output head is taken for one that training never met."""

_SAMPLE, _AT_ONCE = 4096, 256
"""Rows that the median is taken over at the most, and rows whose norms are computed at once."""

_told: WeakSet[nn.Module] = WeakSet()


def norm_share(weight: Tensor, token_id: int) -> float:
    """The norm of a row of `weight` (V, D) as a share of the median row's, of `_SAMPLE` rows at equal distances."""
    rows = weight.detach()
    norms: list[float] = []
    for chunk in rows[:: math.ceil(len(rows) / _SAMPLE)].split(_AT_ONCE):
        norms += torch.linalg.vector_norm(chunk.float(), dim=1).tolist()
    return float(torch.linalg.vector_norm(rows[token_id].float())) / max(statistics.median_low(norms), 1e-12)


def warn_of_untrained_end(model: PreTrainedModel | PeftModel, chat: Chat) -> None:
    """Warns, once a model, where its end-of-turn token was never trained."""
    head = model.get_output_embeddings()
    layer = head.get_base_layer() if isinstance(head, LoraLayer) else head
    end = chat.end_of_turn_id()
    if end is None or model in _told or not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point():
        return  # a head in 4 bit shows no rows
    _told.add(model)
    share = norm_share(layer.weight, end)
    if share < UNTRAINED:
        token = chat.tokenizer.convert_ids_to_tokens(end)
        warn(
            f"the base has hardly been trained on {token!r}, which ends a turn in this chat template: its row in the "
            f"output head has {share:.0%} of the median norm. Answers will not stop. Use an instruct model, or a "
            "template (train.chat_template_path) that ends turns with a token that the base knows."
        )
