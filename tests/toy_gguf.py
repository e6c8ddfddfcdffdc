"""A toy model as an F32 GGUF, as llama.cpp's own converter would write it: a second implementation, for the tests."""

import json
from pathlib import Path

import gguf
import numpy as np
from transformers import AutoModelForCausalLM

ARCHES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}


F32 = gguf.GGMLQuantizationType.F32


def write_base(
    folder: Path, path: Path, kind: gguf.GGMLQuantizationType = F32, template: bool = False, **more: object
) -> Path:
    """Writes the model of `folder`, its matrices as `kind`, and its byte-level BPE to `path`; returns `path`.

    template: its chat template too; more: further keys, general__type as general.type
    """
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = model.config
    arch = ARCHES[config.model_type]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(16)
    writer.add_value_length(16)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(16)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if arch.startswith("gemma"):
        writer.add_sliding_window(config.sliding_window)
    else:
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if arch == "gemma3":
        writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    _add_vocabulary(writer, json.loads((folder / "tokenizer.json").read_text("utf-8")))
    if template:
        writer.add_chat_template((folder / "chat_template.jinja").read_text("utf-8"))
    for name, value in more.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(name.replace("__", "."), value)
    names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if arch == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = interleaved(values, heads)
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if kind != F32 and values.ndim == 2:
            writer.add_tensor(known, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(known, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp's rotary embedding wants them: the two halves of each head, one by one in turn."""
    size = values.shape[0] // heads
    order = [head * size + half * size // 2 + at for head in range(heads) for at in range(size // 2) for half in (0, 1)]
    return np.ascontiguousarray(values[order])


def _add_vocabulary(writer: gguf.GGUFWriter, tokenizer: dict) -> None:
    added = {one["content"]: one for one in tokenizer["added_tokens"]}
    ids = {**tokenizer["model"]["vocab"], **{name: one["id"] for name, one in added.items()}}
    tokens = sorted(ids, key=ids.__getitem__)
    kinds = [gguf.TokenType.CONTROL if one in added else gguf.TokenType.NORMAL for one in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(one) for one in tokenizer["model"]["merges"]])
    writer.add_eos_token_id(ids[tokens[-1]])
    writer.add_add_bos_token(False)
