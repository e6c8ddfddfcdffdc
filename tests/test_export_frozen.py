"""Adapters that sleep through the profile, in other programs: activated LoRA, proven in plain peft and in llama.cpp."""

import json
from pathlib import Path

import gguf
import pytest
import torch
from export_fixtures import adapter_for, toy_base
from peft import PeftModel
from test_prefix import masked_forward
from transformers import AutoModelForCausalLM, AutoTokenizer

from perce_lite.data.pairs import IGNORED, PairMaker, Tokens
from perce_lite.errors import ExportError, RecipeError
from perce_lite.export.export import export, verify
from perce_lite.export.proof import plain_log_probs
from perce_lite.export_targets import PROOF
from perce_lite.recipe import load_recipe


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("frozen")
    return adapter_for(toy_base(folder / "base"), folder / "mine", profile_pass="frozen")


def opening(adapter):
    """Ids of the line break ahead of a user's turn, and of its header without its own."""
    tokenizer = AutoTokenizer.from_pretrained(adapter.parent.parent / "base")
    return tokenizer("\n<|im_start|>user", add_special_tokens=False)["input_ids"]


def test_plain_peft_wakes_where_training_did(adapter, tmp_path):
    told = export(adapter, "peft", tmp_path / "out", False)
    assert told["proof"]["off_adapter"] < 1e-4
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["alora_invocation_tokens"] == opening(adapter)
    assert "alora_invocation_tokens" not in (adapter / "adapter_config.json").read_text().replace(": null", "") or (
        json.loads((adapter / "adapter_config.json").read_text())["alora_invocation_tokens"] is None
    )
    # A prompt with a profile, which the proof's own text has not.
    base = AutoModelForCausalLM.from_pretrained(adapter.parent.parent / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    maker = PairMaker(tokenizer, profile_pass="frozen")
    asked = maker.prompt([{"role": "user", "content": "Which pet?"}], "An otter, a lantern and a fjord.")
    ids = [*asked.ids, *maker.ids("the otter finds the lantern")]
    scored = len(ids) - len(asked.ids)
    expected = masked_forward(
        PeftModel.from_pretrained(base, adapter).eval(),
        Tokens(ids, [IGNORED] * len(asked.ids) + ids[-scored:], asked.prefix_length),
    )
    plain = AutoModelForCausalLM.from_pretrained(adapter.parent.parent / "base", dtype=torch.float32)
    got = plain_log_probs(PeftModel.from_pretrained(plain, tmp_path / "out"), ids, scored)
    torch.testing.assert_close(torch.tensor(got), expected.detach(), rtol=0, atol=1e-4)


def test_a_wake_that_is_lost_or_elsewhere_fails(adapter, tmp_path):
    export(adapter, "peft", tmp_path / "out", False)
    path = tmp_path / "out" / "adapter_config.json"
    config = json.loads(path.read_text())
    for invocation in (None, config["alora_invocation_tokens"][:1], [5, 6, 7]):
        path.write_text(json.dumps({**config, "alora_invocation_tokens": invocation}))
        with pytest.raises(ExportError, match=r"nats off what the adapter did|does nothing"):
            verify(tmp_path / "out")


def test_llama_cpp_wakes_where_training_did(adapter, tmp_path):
    pytest.importorskip("xllamacpp")
    told = export(adapter, "gguf-lora", tmp_path / "out", False)
    assert told["proof"]["off_adapter"] < 5e-3
    assert told["proof"]["off_base"] < 5e-3
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    assert reader.get_field("adapter.alora.invocation_tokens").contents() == opening(adapter)[1:]
    # The same adapter awake at every token is another one.
    proof = json.loads((tmp_path / "out" / PROOF).read_text())
    awake = adapter_for(adapter.parent.parent / "base", tmp_path / "awake")
    export(awake, "gguf-lora", tmp_path / "full", False)
    theirs = json.loads((tmp_path / "full" / PROOF).read_text())
    assert max(abs(one - other) for one, other in zip(proof["adapter"], theirs["adapter"], strict=True)) > 0.05


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("merged", "merged weights are awake at every token"),
        ("gguf", "merged weights are awake at every token"),
        ("ollama", "merged weights are awake at every token"),
        ("vllm", "vLLM has no activated LoRA"),
    ],
)
def test_what_cannot_wake_is_refused_with_the_reason(adapter, tmp_path, target, told):
    with pytest.raises(ExportError, match=told):
        export(adapter, target, tmp_path / "out", False)
    assert not (tmp_path / "out").exists()
    recipe = tmp_path / "mine.yaml"
    text = "model: m\ndata: {path: rows.jsonl}\ntrain: {profile_pass: frozen}\nexport: {to: [TARGET]}\n"
    recipe.write_text(text.replace("TARGET", target))
    with pytest.raises(RecipeError, match=told):
        load_recipe(recipe)


@pytest.mark.parametrize("target", ["peft", "gguf-lora"])
def test_a_template_that_says_nothing_of_where_to_wake_is_refused(tmp_path, target):
    adapter = adapter_for(toy_base(tmp_path / "base", "gemma2"), tmp_path / "mine", profile_pass="frozen")
    with pytest.raises(ExportError, match=r"stands inside that turn"):
        export(adapter, target, tmp_path / "out", False)
    assert not (tmp_path / "out").exists()


def test_the_card_says_so(adapter, tmp_path):
    export(adapter, "peft", tmp_path / "out", False)
    assert "the adapter is active only after it" in (tmp_path / "out" / "README.md").read_text()
