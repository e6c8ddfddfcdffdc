"""Exports that do not lose the person: what they lack is said, `--user` puts a profile in, the prompt is as trained."""

import json
import re
from pathlib import Path

import pytest
import torch
import toys
from transformers import AutoConfig, AutoModelForCausalLM

from perce_lite.errors import DataError, ExportError, RecipeError
from perce_lite.evaluation.summary import train_and_measure
from perce_lite.export import modelfile
from perce_lite.export.export import carried_profile, export, verify
from perce_lite.export.proof import ANSWER, QUESTION, read_proof
from perce_lite.export.usage import SYSTEM, as_trained, llama_cpp, vllm, without_profile
from perce_lite.export_targets import base_faults
from perce_lite.model import adapter_files
from perce_lite.model.base import modules_beside_text, with_adapter
from perce_lite.model.footprint import refuse_exports
from perce_lite.model.generate import load_adapter, recipe_of
from perce_lite.recipe import load_recipe

pytest_plugins = ["cli_fixtures"]


def trained(folder: Path, family: str, text: str = "") -> Path:
    """The folder of a toy adapter of a family, trained for some steps on rows of at most 300 tokens."""
    toys.toy_folder(folder / "toy", family)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, toys.toy_rows())))
    steps = f"{{max_steps: 3, learning_rate: 0.05, output_dir: {folder / 'out'}, store: null, max_length: 300}}"
    head = "model: toy\nquantization: none\ndtype: float32\ndevice: cpu\ndata: {path: rows.jsonl}\n"
    (folder / "r.yaml").write_text(f"{head}train: {steps}\nevaluation: {{max_rows: 4, max_new_tokens: 2}}\n{text}")
    return Path(train_and_measure(load_recipe(folder / "r.yaml"))["adapter"])


@pytest.fixture(scope="module", params=["qwen3", "gemma"])
def folder(request, tmp_path_factory):
    """Adapters with the profile in the system message (and a template option), and ahead of the question."""
    return trained(tmp_path_factory.mktemp(request.param), request.param)


def its_profile(folder: Path) -> str:
    return carried_profile(adapter_files.read_metadata(folder), "user1")


def trained_prompt(folder: Path, profile: str) -> str:
    """What training puts ahead of an answer to the fixed question."""
    maker = load_adapter(adapter_files.read_metadata(folder)).maker
    messages = maker.composed([{"role": "user", "content": QUESTION}], profile)
    return maker.render(messages, "a test", add_generation_prompt=True)


def test_ollama_is_asked_with_the_profile(folder, tmp_path):
    figures = export(folder, "ollama", tmp_path / "out", False, quant="F32", user="user1")
    profile = its_profile(folder)
    assert figures["profile"] == profile
    theirs = {
        f"{item['title']}\n{item['text']}"
        for row in toys.toy_rows()
        if row["user"] == "user1"
        for item in row["profile"]
    }
    assert set(profile.split("\n\n")) <= theirs
    file = modelfile.read(tmp_path / "out" / modelfile.NAME)
    assert profile in file.system
    assert dict(file.parameters) == {"num_ctx": "500", "temperature": "0"}
    asked = [{"role": "system", "content": file.system}, {"role": "user", "content": QUESTION}]
    bos = "<bos>" if "gemma" in str(folder) else ""  # Ollama puts it first by itself
    assert bos + modelfile.render(file.template, asked) == trained_prompt(folder, profile)
    assert profile not in (text := modelfile.render(file.template, asked[1:]))
    assert text
    assert "the Modelfile, as its SYSTEM" in (tmp_path / "out/README.md").read_text()


def test_a_modelfile_may_get_parameters_and_no_other_system(folder, tmp_path):
    out = tmp_path / "out"
    export(folder, "ollama", out, False, user="user1")
    path = out / modelfile.NAME
    text = path.read_text()
    path.write_text(f"{text}PARAMETER top_k 20\nPARAMETER num_gpu 0\nPARAMETER num_ctx 4096\n")
    assert verify(out)["target"] == "ollama"
    path.write_text(text.replace(its_profile(folder)[:20], "Somebody else's text"))
    with pytest.raises(ExportError, match="another system prompt"):
        verify(out)
    path.write_text(text.replace("FROM ./", "FROM ../"))
    with pytest.raises(ExportError, match="FROM names"):
        verify(out)


@pytest.mark.parametrize("target", ["peft", "vllm", "merged", "gguf", "gguf-lora"])
def test_other_exports_carry_it_beside_their_files_and_prove_it(folder, tmp_path, target):
    out = tmp_path / "out"
    export(folder, target, out, False, user="user1")
    profile, proof, card = its_profile(folder), read_proof(out), (out / "README.md").read_text()
    assert profile in (system := (out / SYSTEM).read_text())
    if "qwen3" in str(folder):
        assert system.startswith("You are a helpful assistant.\n\nTexts by this user:\n\n")
    assert proof.profile == profile
    maker = load_adapter(adapter_files.read_metadata(folder)).maker
    assert proof.ids[: -len(proof.adapter)] == maker.prompt_ids([{"role": "user", "content": QUESTION}], profile)
    assert ANSWER.startswith(maker.tokenizer.decode(proof.ids[-len(proof.adapter) :]).strip())
    assert verify(out)["proof"]["effect"] > 0
    assert f"The profile is in {SYSTEM}" in card
    assert ("--system-prompt-file system.txt" in card) == target.startswith("gguf")
    assert ("enable_thinking" in card) == ("qwen3" in str(folder))


def test_a_profile_is_as_long_as_the_recipe_says(tmp_path):
    folder = trained(tmp_path, "chatml", "profile: {max_tokens: 60, top_k: 1}\n")
    profile, maker = its_profile(folder), load_adapter(adapter_files.read_metadata(folder)).maker
    assert len(profile.split("\n\n")) > 1
    assert len(maker.ids(profile)) <= 60
    metadata = adapter_files.read_metadata(folder)
    metadata["recipe"]["profile"]["max_tokens"] = None
    assert len(carried_profile(metadata, "user1").split("\n\n")) == 1  # top_k, as in training
    with pytest.raises(DataError, match="no such user; it has user0, user1, user2"):
        carried_profile(metadata, "zoe")
    with pytest.raises(DataError, match="none of their texts fits"):
        carried_profile({**metadata, "recipe": {**metadata["recipe"], "profile": {"max_tokens": 1}}}, "user1")
    with pytest.raises(ExportError, match="trained without the profile"):
        carried_profile({**metadata, "train_on": "counterfactual"}, "user1")


def test_what_an_export_lacks_is_said_before_it_starts(adapter_folder, run, tmp_path):
    losses = {
        loss["profile"]: loss["adapter"] for loss in adapter_files.read_metadata(adapter_folder)["metrics"]["losses"]
    }
    code, _, err = run("export", adapter_folder, "--to", "peft", "--out", tmp_path / "out")
    said = " ".join(err.split())
    assert code == 0
    assert f"{losses['own']:.3f} nats a token with the own profile and {losses['none']:.3f} without" in said
    assert said.index("carries no profile") < said.index("Writing peft")
    assert "--user NAME" in said
    assert "train_on: counterfactual" in said
    assert "Texts by this user" in (tmp_path / "out/README.md").read_text()
    code, _, err = run("export", adapter_folder, "--to", "peft", "--out", tmp_path / "with", "--user", "user1")
    assert code == 0
    assert "carries no profile" not in err
    assert run("export", "--verify", tmp_path / "with")[0] == 0


def test_what_is_said_without_figures_and_of_adapters_that_need_none():
    metadata = {"train_on": "factual", "metrics": {"losses": []}}
    assert "nats" not in without_profile(metadata)
    assert without_profile({**metadata, "train_on": "counterfactual"}) is None


def test_options_that_do_not_go_with_a_profile(adapter_folder, run, tmp_path):
    for words in (
        ["--all", "--to", "peft", "--user", "user1"],
        ["--verify", tmp_path, "--user", "user1"],
        [adapter_folder, "--to", "peft", "--user", "user1", "--push-to-hub", "me/it"],
    ):
        assert run("export", *words)[0] == 2
    code, _, err = run("export", adapter_folder, "--to", "peft", "--out", tmp_path / "out", "--user", "zoe")
    assert code == 2
    assert "no such user" in err
    assert not (tmp_path / "out").exists()


def test_commands_serve_as_trained(adapter_folder):
    metadata = adapter_files.read_metadata(adapter_folder)
    recipe = recipe_of(metadata)
    assert "kwargs" not in llama_cpp("m.gguf", metadata, recipe, "") + as_trained("gguf", metadata, recipe, "")
    thinking = {**metadata, "chat_template": "{% if enable_thinking %}"}
    assert """--chat-template-kwargs '{"enable_thinking": false}'""" in llama_cpp("m.gguf", thinking, recipe, "")
    assert "chat_template_kwargs={'enable_thinking': False}" in vllm(adapter_folder, thinking, recipe, 8)
    assert '{"enable_thinking": false}' in as_trained("peft", thinking, recipe, "")
    drawing = recipe.evaluation.model_copy(update={"generation": {"do_sample": True, "temperature": 0.7}})
    drawn = recipe.model_copy(update={"evaluation": drawing})
    assert dict(modelfile.parameters_of(drawn)) == {"num_ctx": "1224", "temperature": "0.7"}


# Bases


def toy_gemma3():
    """A multimodal model on the meta device: a vision tower, a projector, a language model."""
    text = {"vocab_size": 600, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
            "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"target_modules": ["q_proj", "fc1"]},
        {"target_modules": r".*\.(q_proj|fc1)"},
        {"exclude_modules": ["down_proj"]},
        {"exclude_modules": r".*\.down_proj"},
    ],
)
def test_no_lora_on_what_reads_no_text(recipe, lora):
    loaded = load_recipe(recipe(text=f"lora: {json.dumps({'r': 2, **lora})}\n"))
    model = toy_gemma3()
    beside = modules_beside_text(model)
    assert any("vision_tower" in path for path in beside)
    adapted = with_adapter(model, loaded)
    layers = {name.partition(".lora_A")[0] for name, _ in adapted.named_parameters() if ".lora_A" in name}
    assert layers
    assert all(re.match(r"base_model\.model\.model\.language_model\.layers\.\d", layer) for layer in layers)
    assert any(layer.endswith("q_proj") for layer in layers)
    if "exclude_modules" in lora:
        assert not any(layer.endswith("down_proj") for layer in layers)
    assert modules_beside_text(toys.toy_model("chatml", 600)) == []


def test_bases_that_a_target_cannot_take_are_refused_before_training(recipe, toy, tmp_path):
    quantised = {"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "bitsandbytes"}}
    for target in ("merged", "gguf", "gguf-lora", "ollama"):
        assert base_faults(target, {"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM") == []
        assert "quantised" in base_faults(target, quantised, "LlamaForCausalLM")[0]
    assert base_faults("vllm", quantised, "LlamaForCausalLM") == []
    assert "vLLM builds the base as Whole" in base_faults("vllm", {"architectures": ["Whole"]}, "Half")[0]
    config = json.loads((toy / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for file in toy.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    changed = {
        **config,
        "architectures": ["LlamaForSomethingElse"],
        "quantization_config": {"quant_method": "bitsandbytes"},
    }
    (other / "config.json").write_text(json.dumps(changed))
    loaded = load_recipe(recipe(text="export: {to: [merged, vllm]}\n").rename(tmp_path / "b.yaml"), [f"model={other}"])
    with pytest.raises(RecipeError) as fault:
        refuse_exports(loaded)
    assert "merged cannot take this adapter: the base's own files are quantised" in str(fault.value)
    assert "vLLM builds the base as LlamaForSomethingElse" in str(fault.value)
