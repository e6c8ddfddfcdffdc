"""TRL's fused head, given the scored positions alone.

On a GPU TRL projects only positions that carry a label; on a CPU it projects all of them, and with a long profile most
of that is thrown away. Here the backbone's output is cut to the scored positions before the head sees it.
"""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from perce_lite.data.pairs import IGNORED

_PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def base_of(model: torch.nn.Module) -> PreTrainedModel:
    """The model under peft's wrapper, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def never_met(lora: LoraConfig) -> list[str]:
    """Faults of a `LoraConfig` that puts an adapter where the fused head does not look: on the head itself."""
    faults = []
    for name in ("target_modules", "modules_to_save"):
        given = vars(lora)[name]
        if any("lm_head" in one for one in ([given] if isinstance(given, str) else given or ())):
            faults.append(f"lora: {name}: the fused head reads lm_head's own weight and would never meet its adapter")
    return faults


def scoring_forward(model: torch.nn.Module) -> Callable[..., Tensor]:
    """A forward that gives log-probs (N,) of a batch's scored tokens, row after row, from a float32 head.

    It takes what the model takes, `labels` (B, T) included, and never builds full logits. The model's own forward stays
    as it was: training keeps the head that TRL gave it.
    """
    return _forward_beside(base_of(model), cast_lm_head_to_fp32=True)


def training_forward(model: torch.nn.Module) -> Callable[..., Tensor]:
    """As `scoring_forward`, with the head in the dtype that TRL trains in: for a training loop that is not TRL's."""
    return _forward_beside(base_of(model), cast_lm_head_to_fp32=False)


def _forward_beside(base: PreTrainedModel, cast_lm_head_to_fp32: bool) -> Callable[..., Tensor]:
    """A fused forward of `base` that leaves the one it has in place."""
    own = base.__dict__.get("forward")
    add_fused_lm_head(base, cast_lm_head_to_fp32=cast_lm_head_to_fp32)
    fused = base.__dict__.pop("forward").__func__
    if own is not None:
        base.forward = own
    forward = _compacted(fused, base)
    return lambda labels, **inputs: forward(labels, **inputs)[0].log_probs[0]


def project_scored_positions_only(model: torch.nn.Module) -> None:
    """Makes the fused head that TRL has put on `model` project scored positions alone; its results stay the same."""
    base = base_of(model)
    original = base.forward
    forward = _compacted(original.__func__, base)

    @functools.wraps(original)
    def fused_forward(
        self: PreTrainedModel, *args: Any, fused_lm_head: bool = False, labels: Tensor | None = None, **inputs: Any
    ) -> Any:
        if not fused_lm_head or labels is None:
            given = inputs if labels is None else {**inputs, "labels": labels}
            return original(*args, fused_lm_head=fused_lm_head, **given)
        outputs, scored = forward(labels, *args, **inputs)
        for name in [name for name in _PER_TOKEN if name in outputs]:
            outputs[name] = outputs[name].new_zeros(scored.shape).masked_scatter(scored, outputs[name])
        outputs.label_mask = scored
        return outputs

    base.forward = types.MethodType(fused_forward, base)


def _compacted(fused: Callable[..., Any], base: PreTrainedModel) -> Callable[..., tuple[Any, Tensor]]:
    """`fused` (a function of TRL's) run on a stand-in for `base`; gives its output (1, N) and the mask (B, T-1)."""
    stand_in = _ScoredPositions(base)

    def forward(labels: Tensor, *args: Any, **inputs: Any) -> tuple[Any, Tensor]:
        scored = labels[:, 1:] != IGNORED
        shifted = labels[:, 1:][scored][None]
        return fused(stand_in, *args, scored=scored, shift_labels=shifted, fused_lm_head=True, **inputs), scored

    return forward


class _ScoredPositions:
    """What TRL's fused forward takes for the model: a backbone whose last hidden state (1, N, H) is the scored ones."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def base_model(self, *args: Any, scored: Tensor, **inputs: Any) -> Any:
        outputs = self._model.base_model(*args, **inputs)
        outputs.last_hidden_state = outputs.last_hidden_state[:, :-1][scored.to(outputs.last_hidden_state.device)][None]
        return outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
