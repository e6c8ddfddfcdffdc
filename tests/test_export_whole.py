"""Merged GGUFs and Ollama folders, run by a real llama.cpp, say what the merged model says; faults are named."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
import toys
from export_fixtures import FAMILIES, adapter_for, toy_base
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from perce_lite import export as exports
from perce_lite import gguf_model, ggufs, llamacpp, modelfile
from perce_lite.errors import DiskFullError, ExportError
from perce_lite.proof import PROOF, gap, plain_log_probs, read_proof

pytest_plugins = ["cli_fixtures"]


@pytest.fixture(autouse=True)
def llama_cpp():
    pytest.importorskip("xllamacpp", reason="there is no llama.cpp here: pip install 'perce-lite[export]'")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The adapter of a model type, made once."""
    known: dict[str, Path] = {}

    def make(kind: str = "llama") -> Path:
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            known[kind] = adapter_for(toy_base(folder / "toy", kind), folder / "run", seed=2)
        return known[kind]

    return make


@pytest.fixture
def exported(made, tmp_path) -> Path:
    exports.export(made(), "ollama", tmp_path / "out", False, quant="F32")
    return tmp_path / "out"


def merged_of(adapter: Path) -> tuple[AutoModelForCausalLM, AutoTokenizer]:
    base = json.loads((adapter / "perce_lite.json").read_text())["recipe"]["model"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return model.merge_and_unload(), AutoTokenizer.from_pretrained(base)


def rewrite(path: Path, change=lambda name, one: one, keys=lambda name, value: value) -> None:
    """The GGUF at `path` once more, tensors through `change(name, tensor)`, keys through `keys(name, value)`."""
    reader = gguf.GGUFReader(path)
    tensors = {one.name: (one.data.copy(), one.tensor_type) for one in reader.tensors}
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind, *inner = field.types
        writer.add_key_value(name, keys(name, field.contents()), kind, *inner[:1])
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, change(name, torch.from_numpy(data)).contiguous().numpy(), raw_dtype=kind)
    ggufs.finish(writer)


# What comes out


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("target", ["gguf", "ollama"])
def test_llama_cpp_says_what_the_merged_model_says(made, tmp_path, kind, target):
    figures = exports.export(made(kind), target, tmp_path / "out", False, quant="F32")
    assert figures["proof"]["off_adapter"] < 5e-3 < 0.1 < figures["proof"]["effect"]
    proof = read_proof(tmp_path / "out")
    assert figures["proof"]["greedy"] == len(proof.greedy)
    model, tokenizer = merged_of(made(kind))
    llama = llamacpp.Llama(llamacpp.read_base(tmp_path / "out" / gguf_model.FILE), None, 400)
    messages = [{"role": "user", "content": "Who let the otter in? It's 12 or 1234."}]
    options = {"enable_thinking": False}
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **options)
    count, told = llama.chat(messages, options, 100)
    assert count == len(prompt)
    assert gap([told], plain_log_probs(model, [*prompt, 100], 1)) < 5e-3
    assert exports.verify(tmp_path / "out")["proof"] == figures["proof"]
    assert gap(llama.log_probs(proof.ids, 32), proof.base) > 0.1


@pytest.mark.parametrize("quant", ["F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"])
def test_rounded_weights(made, tmp_path, quant):
    adapter = adapter_for(made().parent.parent / "toy", tmp_path / "run", scale=0.3)
    figures = exports.export(adapter, "gguf", tmp_path / "out", False, quant=quant)
    kinds = {one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "out" / gguf_model.FILE).tensors}
    assert kinds == {"F32", quant} | ({"Q8_0"} if quant[0] == "Q" else set())
    if quant == "F16":
        assert figures["proof"]["off_adapter"] < 0.1
    else:
        assert figures["proof"]["off_adapter"] is None
        assert figures["proof"]["share"] > 0.5
    assert exports.verify(tmp_path / "out")["proof"] == figures["proof"]


def test_rounding_that_drowns_the_adapter_is_refused(made, tmp_path):
    faint = adapter_for(made().parent.parent / "toy", tmp_path / "run", scale=0.005)
    with pytest.raises(ExportError, match=r"nothing was kept.*(finer --quant|does nothing)"):
        exports.export(faint, "gguf", tmp_path / "out", False, quant="Q4_0")
    assert not (tmp_path / "out").exists()


def test_llama_3s_slower_frequencies(tmp_path):
    """Positions of a text that is longer than what the model was first trained on."""
    base = toy_base(tmp_path / "toy", "llama-untied")
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"] = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    gguf_model.write(tmp_path / "m.gguf", model, tokenizer)
    ids = list(range(40, 220))
    got = llamacpp.Llama(llamacpp.read_base(tmp_path / "m.gguf"), None, 400).log_probs(ids, 20)
    assert gap(got, plain_log_probs(model, ids, 20)) < 1e-3
    del config["rope_parameters"]
    (base / "config.json").write_text(json.dumps(config))
    assert gap(got, plain_log_probs(AutoModelForCausalLM.from_pretrained(base), ids, 20)) > 0.1
