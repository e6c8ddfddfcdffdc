"""What vLLM takes of an adapter: said before training where the recipe names it, and proven with peft afterwards."""

import json
import re

import pytest
from export_fixtures import adapter_for, toy_base
from test_export import change_json, change_tensors

from perce_lite.errors import ExportError, RecipeError
from perce_lite.export import export as exports
from perce_lite.export import writers
from perce_lite.export_targets import PROOF, VLLM_RANKS, faults, max_rank
from perce_lite.model.footprint import refuse_exports
from perce_lite.recipe import Recipe, load_recipe

pytest_plugins = ["cli_fixtures"]

REFUSED = [
    ({"use_dora": True}, "DoRA"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save: lm_head"),
    ({"bias": "all"}, "biases"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    ({"r": 513}, "its rank is 513, and vLLM takes 512 at the most"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    ({"alpha_pattern": {"k_proj": 3}}, "alpha_pattern"),
    ({"target_modules": ["q_proj", "embed_tokens"]}, "LoRA on embed_tokens; vLLM is known to take q_proj"),
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    return adapter_for(toy_base(folder / "toy"), folder / "run", quantization="nf4", r=9)


@pytest.fixture
def exported(adapter, tmp_path):
    exports.export(adapter, "vllm", tmp_path / "out", False)
    return tmp_path / "out"


def test_ranks():
    assert [max_rank(rank) for rank in (1, 2, 8, 9, 16, 300, 512, 513)] == [1, 8, 8, 16, 16, 320, 512, None]
    assert all(max_rank(rank) == rank for rank in VLLM_RANKS)


def test_the_folder_is_pefts_and_says_how_vllm_is_given_it(adapter, tmp_path):
    figures = exports.export(adapter, "vllm", tmp_path / "my out", False)
    assert figures["max_lora_rank"] == 16
    assert figures["proof"]["off_adapter"] < 1e-3 < figures["proof"]["effect"]
    assert json.loads((tmp_path / "my out/adapter_config.json").read_text())["r"] == 9
    card = (tmp_path / "my out/README.md").read_text()
    place = str(tmp_path / "my out")
    assert f'LoRARequest("personal", 1, "{place}")' in card
    assert "--enable-lora --max-lora-rank 16" in card
    assert f"--lora-modules 'personal={place}' --chat-template '{place}/chat_template.jinja'" in card
    assert f'adapter_id="{place}", adapter_source="local"' in card
    assert str(tmp_path) not in card.replace(place, ""), "nothing of the folder that it was written in aside"
    assert exports.verify(tmp_path / "my out")["proof"] == figures["proof"]


@pytest.mark.parametrize(("lora", "told"), REFUSED)
def test_what_vllm_does_not_take_is_said_before_any_work(adapter, tmp_path, monkeypatch, lora, told):
    config = json.loads((adapter / "adapter_config.json").read_text()) | lora
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    card = json.loads((adapter / "perce_lite.json").read_text()) | {"folder": str(tmp_path)}
    monkeypatch.setattr(writers, "base_for", None)
    with pytest.raises(ExportError, match=f"vllm cannot take this adapter: .*{re.escape(told)}"):
        exports.preflight(card, "vllm")
    exports.preflight(card | {"folder": str(adapter)}, "vllm")


@pytest.mark.parametrize(("lora", "told"), REFUSED)
def test_a_recipe_that_names_vllm_is_refused_before_training(tmp_path, lora, told):
    path = tmp_path / "mine.yaml"
    text = f"data: {{path: rows.jsonl}}\nlora: {json.dumps(lora)}\n"
    path.write_text(text)
    assert load_recipe(path).export.to == []
    path.write_text(f"{text}export: {{to: [peft, vllm]}}\n")
    with pytest.raises(RecipeError, match=rf"line 3.*export\.to: vllm cannot take this adapter: .*{re.escape(told)}"):
        load_recipe(path)


def test_where_it_goes_does_not_change_what_is_trained(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("data: {path: rows.jsonl}\n")
    plain = load_recipe(path).fingerprint()
    assert load_recipe(path, ["export.to=[vllm, ollama]"]).fingerprint() == plain
    with pytest.raises(RecipeError, match=r"export\.to"):
        load_recipe(path, ["export.to=[tgi]"])


def test_the_base_counts_too(recipe, run, tmp_path):
    base = toy_base(tmp_path / "toy")
    config = json.loads((base / "config.json").read_text()) | {"model_type": "olmo"}
    (base / "config.json").write_text(json.dumps(config))
    plain = {"model": str(base), "data": {"path": "rows.jsonl"}, "export": {"to": ["gguf", "peft"]}}
    with pytest.raises(RecipeError, match="gguf cannot take this adapter: its base is a olmo, and the converter knows"):
        refuse_exports(Recipe.model_validate(plain))
    mine = recipe(text="train: {max_steps: 1, output_dir: out}\nexport: {to: [vllm]}\n")
    for command in ("check", "train", "fleet"):
        code, _, err = run(command, mine, "--set", "lora.target_modules=[lm_head]")
        assert code == 2
        assert "export.to: vllm cannot take this adapter: it has LoRA on lm_head, but this base has one" in err
    assert not (tmp_path / "out").exists()


def test_planted_faults(exported, tmp_path):
    config = (exported / "adapter_config.json").read_text()
    change_json(exported / "adapter_config.json", use_dora=True)
    with pytest.raises(ExportError, match="vLLM does not take it any more: it is trained with DoRA"):
        exports.verify(exported)
    (exported / "adapter_config.json").write_text(config)
    weights = exported / "adapter_model.safetensors"
    whole = weights.read_bytes()
    change_tensors(weights, lambda name, one: one * 0 if "lora_B" in name else one)
    with pytest.raises(ExportError, match="a no-op adapter"):
        exports.verify(exported)
    weights.write_bytes(whole)
    change_tensors(weights, lambda name, one: one + ("layers.1.self_attn.k_proj.lora_A" in name))
    with pytest.raises(ExportError, match="a corrupted tensor"):
        exports.verify(exported)
    weights.write_bytes(whole)
    assert json.loads((exported / PROOF).read_text())["target"] == "vllm"
    exports.verify(exported)


def test_faults_are_asked_of_plain_mappings():
    assert faults("vllm", {}) == []
    assert faults("peft", {"use_dora": True, "r": 4000}) == []
    assert len(faults("vllm", {"use_dora": True, "r": 4000, "bias": "all"})) == 3
