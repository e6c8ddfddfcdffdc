"""Exports, loaded again by plain libraries, do what the adapter did; each planted fault has a message of its own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import toys
from export_fixtures import adapter_for, toy_base
from peft import LoraModel, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from perce_lite.errors import AdapterError, DiskFullError, ExportError
from perce_lite.export import export as exports
from perce_lite.export import writers
from perce_lite.export.proof import TIGHT, gap, plain_log_probs
from perce_lite.export_targets import PROOF, TARGETS

pytest_plugins = ["cli_fixtures"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports")
    return adapter_for(toy_base(folder / "toy"), folder / "run")


@pytest.fixture(scope="module")
def trained_in_4_bit(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exports4")
    return adapter_for(toy_base(folder / "toy"), folder / "run", quantization="nf4")


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(path: Path, change) -> None:
    save_file({name: change(name, tensor) for name, tensor in load_file(path).items()}, path, {"format": "pt"})


# What comes out


def test_peft_gives_the_recorded_log_probs_with_plain_peft(adapter, tmp_path):
    figures = exports.export(adapter, "peft", tmp_path / "out", force=False)
    assert {one.name for one in (tmp_path / "out").iterdir()} >= {
        "adapter_model.safetensors",
        "adapter_config.json",
        "README.md",
        "BASE_LICENCE.txt",
        PROOF,
    }
    assert "mit" in (tmp_path / "out" / "BASE_LICENCE.txt").read_text()
    proof = json.loads((tmp_path / "out" / PROOF).read_text())
    base = AutoModelForCausalLM.from_pretrained(proof["model"])
    assert gap(plain_log_probs(base, proof["ids"], len(proof["base"])), proof["base"]) < 1e-4
    model = PeftModel.from_pretrained(base, tmp_path / "out")
    assert gap(plain_log_probs(model, proof["ids"], len(proof["base"])), proof["adapter"]) < 1e-4
    assert gap(proof["adapter"], proof["base"]) > 0.1
    assert figures["proof"]["off_adapter"] < 1e-4
    assert exports.verify(tmp_path / "out")["proof"] == figures["proof"]


def test_peft_of_a_4_bit_base_gives_what_training_gave(trained_in_4_bit, tmp_path):
    figures = exports.export(trained_in_4_bit, "peft", tmp_path / "out", force=False)
    assert figures["proof"]["off_adapter"] < 1e-3 < figures["proof"]["effect"]


def test_merged_is_the_original_base_with_the_adapter(trained_in_4_bit, tmp_path):
    figures = exports.export(trained_in_4_bit, "merged", tmp_path / "out", force=False)
    out = tmp_path / "out"
    whole = AutoModelForCausalLM.from_pretrained(json.loads((out / PROOF).read_text())["model"])
    beside = PeftModel.from_pretrained(whole, trained_in_4_bit)
    merged, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "the otter"}], return_dict=False)
    assert gap(*(plain_log_probs(one, ids, 20) for one in (merged, beside))) < 1e-3
    assert figures["drift"]["max"] > 0.01, "4 bit and whole differ, and that is measured"
    assert f"{figures['drift']['max']:.3f} at the most" in (out / "README.md").read_text()


def test_merged_keeps_the_dtype_of_the_base(tmp_path):
    base = toy_base(tmp_path / "toy")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    figures = exports.export(adapter_for(base, tmp_path / "run", scale=0.3), "merged", tmp_path / "out", force=False)
    assert figures["dtype"] == "bfloat16"
    assert {one.dtype for one in load_file(tmp_path / "out/model.safetensors").values()} == {torch.bfloat16}
    assert figures["proof"]["off_adapter"] <= TIGHT, "what was rounded is loaded as it was rounded"
    assert TIGHT < figures["drift"]["max"] < figures["proof"]["effect"] / 4, "and what rounding changed is told"


def test_an_adapter_that_rounding_would_take_away_is_not_merged(tmp_path):
    base = toy_base(tmp_path / "toy")
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    small = adapter_for(base, tmp_path / "run", scale=3e-4)
    with pytest.raises(ExportError, match=r"kept in bfloat16.* would be lost.*--to peft"):
        exports.export(small, "merged", tmp_path / "out", force=False)
    assert not (tmp_path / "out").exists()
    assert exports.export(small, "peft", tmp_path / "beside", force=False)["proof"]["off_adapter"] <= TIGHT


# Planted faults


@pytest.fixture(params=["peft", "merged", "vllm"])
def exported(request, adapter, tmp_path) -> Path:
    return Path(exports.export(adapter, request.param, tmp_path / "out", force=False)["folder"])


@pytest.fixture(params=["peft", "vllm"])
def peft(request, adapter, tmp_path) -> Path:
    return Path(exports.export(adapter, request.param, tmp_path / "out", force=False)["folder"])


def test_an_adapter_that_does_nothing_fails(peft):
    change_tensors(peft / "adapter_model.safetensors", lambda name, one: one * 0 if "lora_B" in name else one)
    with pytest.raises(ExportError, match="a no-op adapter: every B matrix is zero"):
        exports.verify(peft)


def test_a_merged_model_without_its_adapter_fails(adapter, tmp_path):
    out = tmp_path / "out"
    exports.export(adapter, "merged", out, force=False)
    shutil.copy(json.loads((out / PROOF).read_text())["model"] + "/model.safetensors", out / "model.safetensors")
    with pytest.raises(ExportError, match="it loads and does nothing"):
        exports.verify(out)


def test_a_corrupted_tensor_fails(exported):
    [path] = exported.glob("*.safetensors")
    last = list(load_file(path))[-1]
    change_tensors(path, lambda name, one: one + 1e-4 if name == last else one)
    with pytest.raises(ExportError, match=f"a corrupted tensor: {last} "):
        exports.verify(exported)


def test_a_torn_file_fails(exported):
    [path] = exported.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ExportError, match=r"a damaged file|cannot load it"):
        exports.verify(exported)


def test_another_scale_or_no_config_fails(peft):
    change_json(peft / "adapter_config.json", lora_alpha=5)
    with pytest.raises(ExportError, match="nats off what the adapter did in training"):
        exports.verify(peft)
    (peft / "adapter_config.json").write_text("{}")
    with pytest.raises(ExportError, match="peft cannot load it"):
        exports.verify(peft)


def test_a_swapped_tokenizer_fails(exported):
    toys.toy_tokenizer("qwen3").save_pretrained(exported)
    with pytest.raises(ExportError, match="a swapped tokenizer"):
        exports.verify(exported)


@pytest.mark.parametrize("same_embedding", [False, True])
def test_another_base_fails(peft, tmp_path, same_embedding):
    other = toy_base(tmp_path / "other", seed=5)
    if same_embedding:
        theirs = load_file(Path(json.loads((peft / PROOF).read_text())["model"]) / "model.safetensors")
        change_tensors(other / "model.safetensors", lambda name, one: theirs[name] if "embed" in name else one)
    card = json.loads((peft / "perce_lite.json").read_text())
    change_json(peft / "perce_lite.json", recipe=card["recipe"] | {"model": str(other)})
    what = "the weights of its layers" if same_embedding else "its embedding"
    with pytest.raises(ExportError, match=f"another base: {what}"):
        exports.verify(peft)


def test_a_merged_model_of_another_base_fails(adapter, tmp_path):
    exports.export(adapter, "merged", tmp_path / "out", force=False)
    other = toy_base(tmp_path / "other", seed=5)
    shutil.copy(other / "model.safetensors", tmp_path / "out")
    with pytest.raises(ExportError, match="another base: its embedding"):
        exports.verify(tmp_path / "out")


def test_a_damaged_proof_is_one_clear_error(peft):
    whole = (peft / PROOF).read_text()
    for name, value in {"tolerance": 9.0, "version": 2, "sketch": {}, "base": [None], "ids": [1]}.items():
        (peft / PROOF).write_text(whole)
        change_json(peft / PROOF, **{name: value})
        with pytest.raises(ExportError, match=f"damaged.*{name}"):
            exports.verify(peft)
    (peft / PROOF).write_text("{")
    with pytest.raises(ExportError, match=r"no readable proof\.json"):
        exports.verify(peft)


def test_a_proof_that_fails_keeps_nothing(adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self, **_: self.unload())
    with pytest.raises(ExportError, match=r"nothing was kept.*it loads and does nothing"):
        exports.export(adapter, "merged", tmp_path / "out", force=False)
    assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]


# Bad input


def test_an_untrained_adapter_is_not_exported(tmp_path):
    idle = adapter_for(toy_base(tmp_path / "toy"), tmp_path / "run", scale=0.0)
    for target in TARGETS:
        with pytest.raises(ExportError, match="a no-op adapter"):
            exports.export(idle, target, tmp_path / "out", force=False)
    faint = adapter_for(tmp_path / "toy", tmp_path / "faint", scale=1e-8)
    for target in TARGETS:
        with pytest.raises(ExportError, match="This adapter does nothing"):
            exports.export(faint, target, tmp_path / "out", force=False)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_adapter_or_of_another_base(adapter, tmp_path):
    with pytest.raises(AdapterError, match="no adapter of PerCE Lite"):
        exports.export(tmp_path, "peft", None, force=False)
    mine = shutil.copytree(adapter, tmp_path / "mine")
    card = json.loads((mine / "perce_lite.json").read_text())
    recipe = card["recipe"] | {"model": str(toy_base(tmp_path / "other", seed=5))}
    change_json(mine / "perce_lite.json", recipe=recipe)
    for target in TARGETS:
        with pytest.raises(AdapterError, match="not on the base that is loaded"):
            exports.export(mine, target, None, force=False)


def test_a_folder_in_the_way(adapter, tmp_path, monkeypatch):
    out = tmp_path / "out"
    exports.export(adapter, "peft", out, force=False)
    with pytest.raises(ExportError, match="Give --force to replace it"):
        exports.export(adapter, "peft", out, force=False)
    (out / "old").touch()
    exports.export(adapter, "peft", out, force=True)
    assert not (out / "old").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").touch()
    with pytest.raises(ExportError, match="is no export, so it is never replaced"):
        exports.export(adapter, "peft", tmp_path / "mine", force=True)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ExportError, match="nothing may be written in"):
        exports.export(adapter, "peft", tmp_path / "elsewhere", force=True)
    with pytest.raises(ExportError, match=r"diary\.txt is a file"):
        exports.export(adapter, "peft", tmp_path / "mine" / "diary.txt" / "out", force=True)


@pytest.mark.parametrize("target", TARGETS)
def test_a_full_disk_leaves_nothing_half_written(adapter, small_disk, target):
    with (small_disk / "filler").open("wb") as file:
        file.write(bytes(shutil.disk_usage(small_disk).free - 40_000))
    with pytest.raises(DiskFullError, match="The disk is full"):
        exports.export(adapter, target, small_disk / "out", force=False)
    assert {one.name for one in small_disk.iterdir()} <= {"filler", ".out.lock"}


@pytest.mark.parametrize("target", ["merged", "gguf-lora"])
def test_one_matrix_for_input_and_head_is_refused_before_any_work(tmp_path, monkeypatch, target):
    tied = adapter_for(toy_base(tmp_path / "toy"), tmp_path / "run", target_modules=["q_proj", "lm_head"])
    monkeypatch.setattr(writers, "load_base", None)
    monkeypatch.setattr(writers, "base_for", None)
    with pytest.raises(ExportError, match=f"{target} cannot take this adapter: it has LoRA on lm_head"):
        exports.export(tied, target, None, force=False)


def test_the_command(adapter, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = shutil.copytree(adapter, tmp_path / "mine")
    code, out, err = run("export", mine, "--to", "peft", "--json", "figures.json")
    assert code == 0, err
    assert "Proven over 32 tokens" in out
    assert json.loads(Path("figures.json").read_text())["folder"] == str(tmp_path / "mine-peft")
    assert run("export", "--verify", "mine-peft")[0] == 0
    code, out, err = run("export", mine, "--to", "mlx")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "--to mlx: there is no such target. There is: peft, merged" in err
    assert run("export", mine)[0] == 2
    assert run("export", mine, "--to", "peft", "--verify", "mine-peft")[0] == 2
    assert run("export", "--verify", "mine-peft", "--force")[0] == 2


def test_what_training_left_is_exported(recipe, run, figures):
    mine = recipe(text="train: {max_steps: 2, learning_rate: 0.05, output_dir: out}\nevaluation: {max_rows: 4}\n")
    assert run("train", mine)[0] == 0
    for target in TARGETS:
        told = figures("export", "out", "--to", target)
        assert told["folder"] == f"out/adapter-{target}"
        assert told["proof"]["effect"] > 0.01
        assert run("export", "--verify", told["folder"])[0] == 0
