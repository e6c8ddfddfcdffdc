"""Random models of every family for the plan's tests: saved, loaded and trained as on a GPU."""

import itertools
from contextlib import contextmanager
from pathlib import Path

import bitsandbytes as bnb
import datasets
import torch
import toys
from transformers import AutoConfig, AutoModelForCausalLM

from perce_lite import PerCEConfig, PerCETrainer
from perce_lite.model.base import Base, load_base, with_adapter
from perce_lite.planning import parts as memory
from perce_lite.recipe import Recipe, load_recipe

TOKENIZERS = {"qwen2": "qwen3", "qwen3": "qwen3", "gemma2": "gemma", "gemma3_text": "gemma"}
SMALL = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16, "max_position_embeddings": 2048,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "tie_word_embeddings": True,
}  # fmt: skip
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8}


def save_toy(folder: Path, kind: str, **shape) -> None:
    """Saves a random model of the family, with a tokenizer that fits."""
    tokenizer = toys.toy_tokenizer(TOKENIZERS.get(kind, "chatml"))
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **{**SMALL, **shape})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def recipe_for(folder: Path, kind: str, shape: dict, lora: str = "r: 4", quantization: str = "nf4") -> Recipe:
    """A recipe over a random model of the family, saved to `folder`."""
    save_toy(folder / "model", kind, **shape)
    path = folder / "mine.yaml"
    path.write_text(
        f"model: model\nquantization: {quantization}\ndtype: float32\ndevice: cpu\ndata: {{path: rows.jsonl}}\n"
        f"lora: {{{lora}}}\n"
    )
    return load_recipe(path)


def base_as_on_a_card(recipe: Recipe, dtype: torch.dtype) -> Base:
    """The recipe's model as a GPU would hold it: what stays unquantised in the compute dtype."""
    base = load_base(recipe)
    for module in base.model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = module.weight.quant_state.dtype = dtype
    for parameter in base.model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return base


@contextmanager
def what_is_saved(model: torch.nn.Module):
    """A dict that has, afterwards, the `bytes` saved for a backward: each storage once, none of the model's own."""
    own = itertools.chain(model.parameters(), model.buffers())
    parameters = {one.untyped_storage().data_ptr() for one in own}
    storages, alive, found = {}, [], {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no storage takes the place of another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        yield found
    found["bytes"] = sum(storages.values())


def trainer_for(recipe: Recipe, dtype=torch.float32, words: int = 1, profile: int = 1, **options) -> PerCETrainer:
    """The trainer over the recipe's model as a GPU would hold it.

    words, profile: how many times as long completions and profiles are
    """
    base = base_as_on_a_card(recipe, dtype)
    rows = [
        {**row, "completion": row["completion"] * words, "profile": row["profile"] * profile}
        for row in toys.toy_rows(users=1, per_user=4)
    ]
    defaults = {"max_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "max_length": 4096,
                "estimator": "uniform", "gradient_checkpointing": False}  # fmt: skip
    return PerCETrainer(
        with_adapter(base.model, recipe),
        PerCEConfig(str(recipe.output_dir), **{**defaults, "bf16": dtype == torch.bfloat16, **options}),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=base.tokenizer,
    )


def weights(recipe: Recipe, itemsize: int) -> memory.Weights:
    """What the plan counts for the recipe's model."""
    return memory.weights_of(AutoConfig.from_pretrained(recipe.model_folder), recipe, itemsize)


def prefix_of(trainer: PerCETrainer, inputs: dict) -> int:
    """Tokens of the longest prefix that stands ahead of a batch; 0: none does."""
    pairs = trainer.pairs["train"]
    return max(pairs[row].factual.prefix_length for row in inputs["row"][:, 0].tolist()) if "prefix" in inputs else 0


def size_of(tensors: list[torch.Tensor]) -> int:
    """Bytes of the tensors' storages, each once."""
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())
