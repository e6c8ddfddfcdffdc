"""A whole model as GGUF, as llama.cpp reads it: sizes, names, order of rows, rounding, the tokenizer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from perce_lite.errors import ExportError
from perce_lite.export.gguf.common import ARCHITECTURES, finish, heads_of, permuted
from perce_lite.export.gguf.vocabulary import add_vocabulary
from perce_lite.export.proof import fingerprint
from perce_lite.export_targets import QUANTS
from perce_lite.model.gguf_base import llama3_factors

FILE = "model.gguf"

_FILE_TYPES = {name: gguf.LlamaFileType["ALL_F32" if name == "F32" else f"MOSTLY_{name}"] for name in QUANTS}
_COARSE = QUANTS[QUANTS.index("Q8_0") :]
_VOCABULARY = ("token_embd.weight", "output.weight")


def write(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, quant: str = "F32"
) -> tuple[dict[str, str], dict[str, int]]:
    """Writes `model`, which has no adapter on it; gives fingerprints in PyTorch's order of rows, and `Proof.heads`.

    quant: one of `targets.QUANTS`, for the matrices; vectors stay float32, embedding and head are never below Q8_0

    Raises:
        ExportError: something about the model or its tokenizer that llama.cpp has no equal of.
    """
    config = model.config.get_text_config()
    architecture = ARCHITECTURES[config.model_type]
    refuse_unlike(config)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_file_type(_FILE_TYPES[quant])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_sizes(writer, config)
    _add_rope(writer, config)
    add_vocabulary(writer, tokenizer, model.get_input_embeddings().weight.shape[0])
    heads, prints = heads_of(config), {}
    for name, tensor in _tensors(model, config, architecture):
        kind = _kind(name, tensor, quant)
        data = torch.from_numpy(gguf.quants.quantize(tensor.numpy(), kind))  # (out, values), or (out, bytes)
        prints[name] = fingerprint(data)
        writer.add_tensor(name, permuted(name, data, heads).numpy(), raw_dtype=kind)
    finish(writer)
    return prints, heads


def refuse_unlike(config: Any) -> None:
    """Raises ExportError where llama.cpp would compute something else than a model of this text config."""
    faults = []
    kind, size = config.model_type, _head_size(config)
    act = config.hidden_activation if kind.startswith("gemma") else config.hidden_act
    if act != ("gelu_pytorch_tanh" if kind.startswith("gemma") else "silu"):
        faults.append(f"its activation is {act}")
    if kind.startswith("gemma"):
        step = 2 if kind == "gemma2" else 6
        pattern = [
            f"{'full' if index % step == step - 1 else 'sliding'}_attention"
            for index in range(config.num_hidden_layers)
        ]
        if list(config.layer_types) != pattern:
            faults.append(f"its layers do not take turns as {kind}'s do (layer_types)")
        largest = config.num_hidden_layers == (46 if kind == "gemma2" else 62)
        scale = config.hidden_size // config.num_attention_heads if largest else size
        if config.query_pre_attn_scalar != scale:
            faults.append(f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, and llama.cpp takes {scale}")
    elif kind.startswith("qwen") and config.use_sliding_window:
        faults.append("it attends to a sliding window (use_sliding_window)")
    if faults:
        raise ExportError(f"llama.cpp would compute something else than this {kind}: {'; '.join(faults)}.")


def _head_size(config: Any) -> int:
    """Width of a head; Qwen 2 and old Llamas do not name it."""
    named = config.to_dict().get("head_dim")
    return int(named or config.hidden_size // config.num_attention_heads)


def _add_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    """What the forward needs to know beside the weights."""
    size = _head_size(config)
    length = config.max_position_embeddings
    if config.model_type == "mistral" and config.sliding_window:  # llama.cpp lets every token see all others
        length = min(length, config.sliding_window)
    writer.add_context_length(length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
        for value, add in (
            (config.attn_logit_softcapping, writer.add_attn_logit_softcapping),
            (config.final_logit_softcapping, writer.add_final_logit_softcapping),
        ):
            if value:
                add(value)


def _add_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    """Base and scaling of the rotary angles; Llama 3's scaling is a tensor (`_llama3_factors`).

    Raises:
        ExportError: a scaling that llama.cpp has no equal of.
    """
    given = config.rope_parameters
    if config.model_type == "gemma3_text":
        writer.add_rope_freq_base_swa(given["sliding_attention"]["rope_theta"])
        given = given["full_attention"]
    writer.add_rope_freq_base(given["rope_theta"])
    kind = given.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[kind.upper()])
        writer.add_rope_scaling_factor(given["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(given["original_max_position_embeddings"])
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise ExportError(f"The base scales its rotary angles by {kind}, which is not converted.")


def _llama3_factors(config: Any) -> Tensor | None:
    """By how much each rotary frequency is slowed, (head / 2,), in Llama 3's scaling; None where nothing is."""
    given = config.rope_parameters
    if given.get("rope_type") != "llama3":
        return None
    return llama3_factors(config)


def _tensors(model: PreTrainedModel, config: Any, architecture: gguf.MODEL_ARCH) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's name and float32 values of every weight, in PyTorch's order of rows."""
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    if (factors := _llama3_factors(config)) is not None:
        yield "rope_freqs.weight", factors
    for path, tensor in model.state_dict().items():
        if path == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(path.replace("language_model.", ""), try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ExportError(f"llama.cpp has no name for {path} of this model.")
        values = tensor.detach().float().cpu().contiguous()
        if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1  # Gemma norms by 1 + weight, llama.cpp by weight
        yield name, values


def _kind(name: str, tensor: Tensor, quant: str) -> gguf.GGMLQuantizationType:
    """What a tensor is written as: a matrix as `quant`, where its rows fill whole blocks."""
    if tensor.dim() != 2:
        return gguf.GGMLQuantizationType.F32
    kind = gguf.GGMLQuantizationType["Q8_0" if name in _VOCABULARY and quant in _COARSE else quant]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kind if tensor.shape[1] % block == 0 else gguf.GGMLQuantizationType.F16
