"""A GGUF file as a base: the model that it was made of, converted once, with clear errors for what is none."""

import json
import os
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import toys
from cli_fixtures import TRAIN, figures, recipe, run, toy  # noqa: F401
from export_fixtures import FAMILIES, toy_base
from safetensors.torch import load_file
from toy_gguf import write_base
from transformers import AutoModelForCausalLM, AutoTokenizer

from perce_lite.errors import ModelError
from perce_lite.export.gguf.model import write as write_gguf
from perce_lite.model import gguf_base
from perce_lite.model.base import load_base, load_tokenizer
from perce_lite.model.builtin import built_in_folder, built_in_gguf
from perce_lite.model.footprint import source_fingerprint
from perce_lite.model.gguf_base import gguf_folder
from perce_lite.recipe import Recipe

HOME = os.environ.get("PERCE_LITE_HOME")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("PERCE_LITE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "models"


def recipe_of(path: Path) -> Recipe:
    plain = {"model": str(path), "quantization": "none", "dtype": "float32", "device": "cpu", "data": {"path": "x"}}
    return Recipe.model_validate(plain)


def logits(model) -> torch.Tensor:
    ids = torch.arange(40).reshape(1, 40) + 3
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("kind", FAMILIES)
def test_it_computes_what_the_model_does_that_it_was_made_of(tmp_path, kind):
    folder = toy_base(tmp_path / "toy", kind)
    base = load_base(recipe_of(write_base(folder, tmp_path / "toy.gguf")))
    torch.testing.assert_close(logits(base.model), logits(AutoModelForCausalLM.from_pretrained(folder)))


@pytest.mark.parametrize("kind", FAMILIES)
def test_it_reads_as_its_tokenizer_did(tmp_path, kind):
    folder = toy_base(tmp_path / "toy", kind)
    original = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    write_gguf(tmp_path / "toy.gguf", model, original)
    base = load_base(recipe_of(tmp_path / "toy.gguf"))
    torch.testing.assert_close(logits(base.model), logits(model))
    text = "The harbour, 12345: it's GREY.\n\n\tNever   mind <b>that</b>! I'LL été 你好"
    assert base.tokenizer.encode(text) == original.encode(text)
    for name in ("chat_template", "eos_token", "bos_token", "pad_token"):
        assert getattr(base.tokenizer, name) == getattr(original, name)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        gguf_base._LLAMA3[0],
    ],
    ids=["linear", "yarn", "llama3"],
)  # fmt: skip
def test_scaled_rotary_angles_stay_scaled(tmp_path, rope):
    folder = toy_base(tmp_path / "toy", "llama")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {**rope, "rope_theta": 500000.0}
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(folder)
    write_gguf(tmp_path / "toy.gguf", model, AutoTokenizer.from_pretrained(folder))
    base = load_base(recipe_of(tmp_path / "toy.gguf"))
    torch.testing.assert_close(logits(base.model), logits(model))


def test_it_is_converted_once_whatever_it_is_called(tmp_path, home, capfd):
    path = write_base(toy_base(tmp_path / "toy"), tmp_path / "toy.gguf")
    folder = gguf_folder(path)
    assert "De-quantising toy.gguf" in " ".join(capfd.readouterr().err.split())
    made = (folder / "model.safetensors").stat().st_mtime_ns
    copy = shutil.copyfile(path, tmp_path / "sha256-of-ollama")
    assert gguf_folder(copy) == gguf_folder(path) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert "De-quantising" not in capfd.readouterr().err
    assert source_fingerprint(recipe_of(path)) == source_fingerprint(recipe_of(copy))
    assert [one.name for one in home.iterdir() if one.is_dir()] == [folder.name]


def test_a_file_is_hashed_again_only_where_it_changed(tmp_path, monkeypatch):
    path = write_base(toy_base(tmp_path / "toy"), tmp_path / "toy.gguf")
    folder = gguf_folder(path)
    monkeypatch.setattr(gguf_base, "sha256", lambda path: pytest.fail("it was hashed before"))
    assert gguf_folder(path) == folder
    monkeypatch.undo()
    monkeypatch.setenv("PERCE_LITE_HOME", str(tmp_path / "home"))
    write_base(toy_base(tmp_path / "other", seed=5), path)
    assert gguf_folder(path) != folder


def test_what_lies_beside_the_file_is_not_taken_for_its_own(tmp_path):
    folder = toy_base(tmp_path / "toy", "llama")
    write_base(folder, tmp_path / "toy.gguf", template=True)
    alone = gguf_folder(tmp_path / "toy.gguf")
    shutil.rmtree(alone.parent)
    other = toy_base(tmp_path / "other", "gemma2", seed=3)
    shutil.copyfile(tmp_path / "toy.gguf", other / "toy.gguf")
    tokenizer = AutoTokenizer.from_pretrained(gguf_folder(other / "toy.gguf"))
    assert tokenizer.chat_template == (folder / "chat_template.jinja").read_text("utf-8")


def test_a_damaged_conversion_is_made_anew(tmp_path):
    path = write_base(toy_base(tmp_path / "toy"), tmp_path / "toy.gguf")
    folder = gguf_folder(path)
    (folder / "model.safetensors").write_bytes(b"torn")
    assert gguf_folder(path) == folder
    load_base(recipe_of(path))


def test_quantised_weights_are_those_of_the_file(tmp_path):
    path = write_base(toy_base(tmp_path / "toy"), tmp_path / "toy.gguf", gguf.GGMLQuantizationType.Q8_0)
    model = load_base(recipe_of(path)).model
    [tensor] = [one for one in gguf.GGUFReader(path).tensors if one.name == "blk.1.ffn_up.weight"]
    expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    np.testing.assert_array_equal(model.model.layers[1].mlp.up_proj.weight.numpy(), expected)


@pytest.mark.slow
def test_the_file_of_the_built_in_model_gives_the_built_in_model(tmp_path, monkeypatch):
    if HOME is None:
        monkeypatch.delenv("PERCE_LITE_HOME")
    else:
        monkeypatch.setenv("PERCE_LITE_HOME", HOME)
    original, path = built_in_folder("smollm2-135m"), built_in_gguf("smollm2-135m")
    monkeypatch.setenv("PERCE_LITE_HOME", str(tmp_path / "home"))
    folder = gguf_folder(path)
    ours, theirs = load_file(folder / "model.safetensors"), load_file(original / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    tokenizer, other = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(original)
    text = "The harbour, 12345: it's GREY.\n\n\tNever mind! été 你好 <|im_start|>user"
    assert tokenizer.encode(text) == other.encode(text)
    assert tokenizer.chat_template == other.chat_template


def torn(folder: Path, path: Path) -> None:
    path.write_bytes(write_base(folder, path).read_bytes()[:-5000])


def torn_head(folder: Path, path: Path) -> None:
    path.write_bytes(write_base(folder, path).read_bytes()[:3000])


def with_too_few_weights(folder: Path, path: Path) -> None:
    """It says that it has two layers, as the toy has, and a third."""
    content = write_base(folder, path).read_bytes()
    key = b"llama.block_count" + (4).to_bytes(4, "little")  # its type: UINT32
    at = content.index(key) + len(key)
    path.write_bytes(content[:at] + (3).to_bytes(4, "little") + content[at + 4 :])


def of_another_architecture(folder: Path, path: Path) -> None:
    content = write_base(folder, path).read_bytes()
    path.write_bytes(content.replace(b"llama", b"mamba", 1))


def of_unknown_angles(folder: Path, path: Path) -> None:
    write_base(folder, path, llama__rope__scaling__type="longrope")


BROKEN = {
    "torn": (torn, "is torn"),
    "torn in its head": (torn_head, "is torn, or no GGUF that can be read"),
    "another architecture": (of_another_architecture, "holds a model of architecture mamba; read are llama, mistral"),
    "an adapter": (lambda folder, path: write_base(folder, path, general__type="adapter"), "is a GGUF of type adapter"),
    "too few weights": (with_too_few_weights, "and a llama of its sizes has 29; it lacks"),
    "one part": (lambda folder, path: write_base(folder, path, split__count=3), "is one part of a model that is split"),
    "no GGUF": (lambda folder, path: path.write_text("model"), "is a file, but no GGUF file"),
    "unknown angles": (of_unknown_angles, "scales its rotary angles by longrope"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_base_is_one_clear_error_and_leaves_nothing(tmp_path, home, case):
    write, told = BROKEN[case]
    path = tmp_path / "x.gguf"
    write(toy_base(tmp_path / "toy"), path)
    with pytest.raises(ModelError, match=told):
        load_tokenizer(recipe_of(path))
    assert not home.exists() or not [one for one in home.iterdir() if one.is_dir()]


def test_a_file_that_is_gone_is_not_looked_for_on_the_hub(tmp_path):
    with pytest.raises(ModelError, match="A GGUF that was moved"):
        load_tokenizer(recipe_of(tmp_path / "gone.gguf"))


def test_from_a_gguf_file_to_an_adapter_for_that_very_file(run, figures, recipe, toy):  # noqa: F811
    """check, train, generate and export, by the commands; gguf-lora is proven on the file without --base-gguf."""
    path = recipe(toys.toy_rows(), TRAIN.replace("max_steps: 1", "max_steps: 3, learning_rate: 0.05"))
    write_base(toy, Path("base.gguf"), template=True)
    mine = ["--set", "model=base.gguf"]
    assert figures("check", path, *mine)["splits"]["train"]["kept"]
    trained = figures("train", path, *mine)
    asked = ["--prompt", "Hi", "--no-profile", "--max-new-tokens", "2"]
    assert run("generate", "--adapter", trained["adapter"], *asked)[0] == 0
    pytest.importorskip("xllamacpp")
    told = figures("export", trained["adapter"], "--to", "gguf-lora", "--out", "lora")
    assert told["proof"]["off_adapter"] < 0.02
    assert "base.gguf" in Path("lora/README.md").read_text()
