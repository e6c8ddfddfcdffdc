"""Log-probs of scored positions alone: the backbone runs, its output is cut, TRL's kernel projects what is left.

TRL's own fused head leaves positions without a label out where it has Triton. Elsewhere, on a CPU above all, it
projects every position, and with a long profile most of that is thrown away.
"""

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from perce_lite.data.pairs import IGNORED
from perce_lite.model.compat import (
    FusedCausalLMOutput,
    HeadSettings,
    chunked_log_probs,
    head_projects_scored_positions_only,
    head_settings,
    router_loss,
    settings_of,
)


def base_of(model: torch.nn.Module) -> PreTrainedModel:
    """The model under peft's wrapper, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def head_adapter_faults(lora: LoraConfig) -> list[str]:
    """Faults of a `LoraConfig` that puts an adapter on the output head: the fused head reads its base weight alone."""
    faults = []
    for name in ("target_modules", "modules_to_save"):
        modules = vars(lora)[name]
        if any("lm_head" in module for module in ([modules] if isinstance(modules, str) else modules or ())):
            faults.append(f"lora: {name}: the fused head reads lm_head's own weight and would never use its adapter")
    return faults


def scoring_forward(model: torch.nn.Module) -> Callable[..., Tensor]:
    """A forward that gives log-probs (N,) of a batch's scored tokens, row after row, from a float32 head.

    It takes what the model takes, with `labels` (B, T), and never builds full logits. The model's own forward is not
    touched.
    """
    return _log_probs_of(base_of(model), cast_lm_head_to_fp32=True)


def training_forward(model: torch.nn.Module) -> Callable[..., Tensor]:
    """As `scoring_forward`, with the head in the dtype that TRL trains in: for a training loop that is not TRL's."""
    return _log_probs_of(base_of(model), cast_lm_head_to_fp32=False)


def without_needless_mask(base: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """`inputs` of a forward of rows padded on the right, without their `attention_mask` where nothing needs it.

    Causal attention never looks at what stands behind a token, so the mask changes no value of a real one, and with it
    torch leaves its flash attention. A router's loss counts tokens by it, and attention both ways looks at padding.
    """
    config = vars(base.config.get_text_config())
    routed = inputs.get("output_router_logits", config.get("output_router_logits"))
    others = set(config.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
    if routed or others or config.get("use_bidirectional_attention"):
        return dict(inputs)
    return {name: value for name, value in inputs.items() if name != "attention_mask"}


def _log_probs_of(base: PreTrainedModel, cast_lm_head_to_fp32: bool) -> Callable[..., Tensor]:
    settings = head_settings(base, cast_lm_head_to_fp32)
    return lambda labels, **inputs: _run(base, settings, labels, **inputs).per_token["log_probs"]


def project_scored_positions_only(model: torch.nn.Module) -> None:
    """Makes the fused head that TRL has put on `model` project scored positions alone; its results stay the same.

    Where TRL's does so by itself nothing is changed.
    """
    base = base_of(model)
    if head_projects_scored_positions_only(base.device):
        return
    trl_forward = base.forward
    settings = settings_of(trl_forward.__func__)

    @functools.wraps(trl_forward)
    def fused_forward(
        self: PreTrainedModel,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        **inputs: Any,
    ) -> Any:
        if not fused_lm_head or labels is None:
            optional = {"labels": labels, "num_items_in_batch": num_items_in_batch}
            passed = {name: value for name, value in optional.items() if value is not None}
            return trl_forward(*args, fused_lm_head=fused_lm_head, **passed, **inputs)
        return _output_of(_run(base, settings, labels, *args, **inputs), num_items_in_batch)

    base.forward = types.MethodType(fused_forward, base)


class _Scored(NamedTuple):
    """What a forward gives of its N scored positions.

    per_token: fields of TRL's output, each (N,) or None
    mask: (B, T-1), where the next token is scored
    router_loss: of a mixture whose config asks for it; router_weight: by which it enters the loss
    """

    per_token: dict[str, Any]
    mask: Tensor
    router_loss: Tensor | None
    router_weight: float


def _run(base: PreTrainedModel, settings: HeadSettings, labels: Tensor, *args: Any, **inputs: Any) -> _Scored:
    """Runs the backbone and projects the scored positions.

    labels: (B, T), IGNORED where a token is not scored
    args, inputs: of the backbone
    """
    config = vars(base.config.get_text_config())
    inputs["use_cache"] = False
    if config.get("output_router_logits"):
        inputs.setdefault("output_router_logits", True)
    outputs = base.base_model(*args, **inputs)
    head = base.get_output_embeddings()
    hidden = outputs.last_hidden_state[:, :-1]  # (B, T-1, H)
    mask = labels[:, 1:].to(hidden.device) != IGNORED
    targets = labels[:, 1:].to(hidden.device)[mask]  # (N,)
    per_token = chunked_log_probs(hidden[mask].to(head.weight.device), head, targets, settings)
    loss = None
    if inputs.get("output_router_logits"):
        loss = router_loss(base.config, outputs.router_logits, inputs.get("attention_mask"))
    return _Scored(per_token, mask, loss, config.get("router_aux_loss_coef", 0.0))


def _output_of(scored: _Scored, num_items_in_batch: Any) -> FusedCausalLMOutput:
    """TRL's output: per-token fields (B, T-1), zero where nothing is scored."""
    mask = scored.mask
    laid_out = {
        name: None if values is None else values.new_zeros(mask.shape).masked_scatter(mask, values)
        for name, values in scored.per_token.items()
    }
    tokens = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss = -scored.per_token["log_probs"].sum() / tokens
    if scored.router_loss is not None:
        loss = loss + scored.router_weight * scored.router_loss
    return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=scored.router_loss, **laid_out)
