"""Exports are read by transformers 4 as well: the same ids, the same log-probs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export_fixtures import FAMILIES, adapter_for, toy_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from perce_lite.export import export as exports
from perce_lite.export.transformers4 import make_readable

PACKAGES = ("transformers<5", "huggingface_hub<1", "tokenizers<0.23")

CHILD = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
assert transformers.__version__.startswith("4."), transformers.__version__
told = {}
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager").eval()
    messages = [{"role": "user", "content": "Write a note about the river."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    told[folder] = {"text": text, "ids": ids, "log_probs": logits.max(-1).values.tolist(),
                    "special": sorted(tokenizer.all_special_tokens)}
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> list[Path]:
    """A merged export of each model type; one with scaled rotary angles."""
    folders = []
    for kind in FAMILIES:
        folder = tmp_path_factory.mktemp(kind)
        base = toy_base(folder / "toy", kind)
        if kind == "llama-untied":
            config = json.loads((base / "config.json").read_text())
            scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
            config["rope_parameters"] |= {**scaling, "original_max_position_embeddings": 512}
            (base / "config.json").write_text(json.dumps(config))
        exports.export(adapter_for(base, folder / "run", seed=2), "merged", folder / "out", False)
        folders.append(folder / "out")
    return folders


def told_here(folder: Path) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    messages = [{"role": "user", "content": "Write a note about the river."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1).max(-1).values.tolist()
    return {"text": text, "ids": ids, "log_probs": log_probs, "special": sorted(tokenizer.all_special_tokens)}


@pytest.mark.slow
def test_transformers_4_says_what_transformers_5_says(merged, tmp_path):
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        str(tmp_path / "older"),
        *PACKAGES,
    ]
    if subprocess.run(install, capture_output=True, check=False).returncode:
        pytest.skip("pip cannot bring transformers 4 here")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "older"), "OMP_NUM_THREADS": "1"}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, merged)], env=environment, capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr[-2000:]
    said = json.loads(child.stdout.splitlines()[-1])
    for folder in merged:
        here, there = told_here(folder), said[str(folder)]
        assert there["text"] == here["text"], folder
        assert there["ids"] == here["ids"], folder
        assert there["special"] == here["special"], folder
        assert there["log_probs"] == pytest.approx(here["log_probs"], abs=1e-4), folder


def test_names_of_both_versions_stand_side_by_side(tmp_path):
    rope = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3_text", "rope_parameters": rope}))
    tokenizer = {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "extra_special_tokens": ["<a>"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    make_readable(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_parameters"] == rope
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 1e4)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
    }
