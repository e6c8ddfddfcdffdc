"""Adapters for the tests of exports: LoRA drawn at random over a toy model, saved as training saves it."""

from pathlib import Path

import torch
import toys
from peft import LoraConfig, get_peft_model

from perce_lite import adapters
from perce_lite.models import load_base
from perce_lite.recipe import load_recipe


def adapter_for(
    base: Path, folder: Path, quantization: str = "none", scale: float = 0.1, seed: int = 1, **lora: object
) -> Path:
    """An adapter of rank 4 over the model in `base`, B drawn with the standard deviation `scale`; gives its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    mine = folder / "mine.yaml"
    mine.write_text(
        f"model: {base}\nquantization: {quantization}\ndtype: float32\ndevice: cpu\ndata: {{path: rows.jsonl}}\n"
    )
    recipe = load_recipe(mine)
    loaded = load_base(recipe)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
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


def toy_base(folder: Path, family: str = "chatml", seed: int = 0) -> Path:
    """A toy model with a licence in its folder."""
    toys.toy_folder(folder, family, seed)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder
