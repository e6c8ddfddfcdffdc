"""Adapters for the tests of exports: LoRA drawn at random over a toy model, saved as training saves it."""

from pathlib import Path

import torch
import toys
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from perce_lite.model import adapters
from perce_lite.model.base import load_base
from perce_lite.recipe import load_recipe


def adapter_for(
    base: Path,
    folder: Path,
    quantization: str = "none",
    scale: float = 0.1,
    seed: int = 1,
    profile_pass: str = "full",
    **lora: object,
) -> Path:
    """An adapter of rank 4 over the model in `base`, B drawn with the standard deviation `scale`; gives its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    mine = folder / "mine.yaml"
    mine.write_text(
        f"model: {base}\nquantization: {quantization}\ndtype: float32\ndevice: cpu\ndata: {{path: rows.jsonl}}\n"
        f"train: {{profile_pass: {profile_pass}}}\n"
    )
    recipe = load_recipe(mine)
    loaded = load_base(recipe)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    with torch.random.fork_rng():
        torch.manual_seed(seed + 2)  # A is drawn from torch's own generator; not with the numbers of B
        model = get_peft_model(loaded.model, LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    about = {
        "run": "x",
        "recipe": recipe.model_dump(mode="json") | {"model": str(base)},
        "estimator": "base",
        "train_on": "factual",
        "clip_min": 0.8,
        "clip_max": 5.0,
        "data": {"fingerprint": "x", "rows": 1, "users": 1},
        "chat_template": loaded.tokenizer.chat_template,
        "metrics": {"losses": [], "weights": {}},
    }
    adapters.save(model, folder / "adapter", about)
    return folder / "adapter"


FAMILIES = {
    "llama": "chatml",
    "llama-untied": "llama3",
    "mistral": "chatml",
    "qwen2": "qwen3",
    "qwen3": "qwen3",
    "gemma2": "gemma",
    "gemma3_text": "gemma",
}
"""Model types by the toy tokenizer that goes with each."""


def toy_base(folder: Path, kind: str = "llama", seed: int = 0) -> Path:
    """A toy model of a model type, with a licence in its folder."""
    family = FAMILIES[kind]
    toys.toy_folder(folder, family, seed)
    if kind in ("mistral", "qwen2", "gemma3_text"):
        tokenizer = toys.toy_tokenizer(family)
        sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
        more = dict(num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16, tie_word_embeddings=kind != "mistral")
        ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=None)
        config = AutoConfig.for_model(
            kind, vocab_size=len(tokenizer), max_position_embeddings=2048, initializer_range=0.2, **sizes, **more, **ids
        )
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder
