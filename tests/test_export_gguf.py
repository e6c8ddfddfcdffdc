"""Adapter GGUFs, run by a real llama.cpp on F32 models that the tests write, do what they did in training."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from export_fixtures import FAMILIES, adapter_for, toy_base
from peft import PeftModel
from safetensors.torch import load_file, save_file
from toy_gguf import write_base
from transformers import AutoModelForCausalLM

from perce_lite.errors import DiskFullError, ExportError
from perce_lite.export import export as exports
from perce_lite.export import llamacpp, writers
from perce_lite.export.gguf import common as ggufs
from perce_lite.export.gguf import lora as gguf_lora
from perce_lite.export.proof import gap, plain_log_probs, read_proof
from perce_lite.export_targets import PROOF

pytest_plugins = ["cli_fixtures"]


@pytest.fixture(autouse=True)
def llama_cpp(request):
    if "without_llama_cpp" not in request.keywords:
        pytest.importorskip("xllamacpp", reason="there is no llama.cpp here: pip install 'perce-lite[export]'")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Adapter and F32 GGUF of a model type, made once."""
    known: dict[str, tuple[Path, Path]] = {}

    def make(kind: str = "llama") -> tuple[Path, Path]:
        if kind not in known:
            folder = tmp_path_factory.mktemp(kind)
            base = toy_base(folder / "toy", kind)
            known[kind] = adapter_for(base, folder / "run"), write_base(base, folder / "base.gguf")
        return known[kind]

    return make


@pytest.fixture
def exported(made, tmp_path) -> tuple[Path, Path]:
    """An export for a llama, and the base as GGUF."""
    adapter, base = made()
    return Path(exports.export(adapter, "gguf-lora", tmp_path / "out", False, base)["folder"]), base


def rewrite(path: Path, change, architecture: str = "llama", alpha: float = 8.0) -> None:
    """The adapter GGUF at `path` once more, every tensor through `change(name, tensor)`."""
    tensors = ggufs.read(path)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, tensor in tensors.items():
        writer.add_tensor(name, change(name, tensor).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", FAMILIES)
def test_llama_cpp_gives_the_log_probs_of_training(made, tmp_path, kind):
    adapter, base = made(kind)
    figures = exports.export(adapter, "gguf-lora", tmp_path / "out", False, base)
    proof = json.loads((tmp_path / "out" / PROOF).read_text())
    known = llamacpp.read_base(base)
    lora = tmp_path / "out" / "adapter.gguf"
    llama = llamacpp.Llama(known, lora, 200)
    on, off = (llama.log_probs(proof["ids"], 32, scale) for scale in (1.0, 0.0))
    bare = llamacpp.Llama(known, None, 200).log_probs(proof["ids"], 32)
    assert gap(on, proof["adapter"]) < 2e-3, "as in PyTorch"
    assert gap(on, proof["base"]) > 0.1, "far from the base"
    assert gap(off, proof["base"]) < 2e-3
    assert gap(off, bare) < 1e-5, "scale 0 gives the base back"
    assert figures["proof"]["off_adapter"] < 2e-3


def test_it_fits_the_whole_base_where_training_had_4_bits(made, tmp_path):
    _, base = made()
    adapter = adapter_for(base.parent / "toy", tmp_path / "run", quantization="nf4")
    figures = exports.export(adapter, "gguf-lora", tmp_path / "out", False, base)
    assert figures["proof"]["off_adapter"] < 2e-3


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 3}},
        {"target_modules": ["q_proj"]},
    ],
)
def test_scales_and_ranks_that_differ(made, tmp_path, lora):
    _, base = made()
    adapter = adapter_for(base.parent / "toy", tmp_path / "run", scale=0.3, **lora)
    assert exports.export(adapter, "gguf-lora", tmp_path / "out", False, base)["proof"]["off_adapter"] < 2e-3


def test_a_head_of_its_own_takes_lora(made, tmp_path):
    """Against plain PyTorch: the fused head that training scores with knows no LoRA on itself."""
    _, base = made("llama-untied")
    adapter = adapter_for(base.parent / "toy", tmp_path / "run", target_modules=["v_proj", "lm_head"])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.parent / "toy"), adapter)
    prints, _ = gguf_lora.write(tmp_path / "adapter.gguf", model, [])
    assert "output.weight.lora_b" in prints
    ids = list(range(40, 80))
    got = llamacpp.Llama(llamacpp.read_base(base), tmp_path / "adapter.gguf", 200).log_probs(ids, 20)
    assert gap(got, plain_log_probs(model, ids, 20)) < 2e-3


def test_the_gguf_that_a_built_in_model_was_made_of_is_found_by_itself(made, tmp_path, run, monkeypatch):
    adapter, whole = made()
    base = write_base(whole.parent / "toy", tmp_path / "q4.gguf", gguf.GGMLQuantizationType.Q8_0)
    model = str(whole.parent / "toy")
    monkeypatch.setattr(gguf_lora, "gguf_of", {model: base}.get)
    figures = exports.export(adapter, "gguf-lora", tmp_path / "out", False)["proof"]
    assert figures["base_gguf"] == str(base)
    assert 0 < figures["off_shift"] < 0.2 * figures["mean_shift"]
    assert figures["off_adapter"] < 2e-3
    faint = adapter_for(whole.parent / "toy", tmp_path / "run", scale=0.002)
    code, out, err = run("export", faint, "--to", "gguf-lora", "--out", tmp_path / "faint")
    assert code == 0, err
    assert "Too coarse to prove anything" in out
    assert "Proven over 32 tokens" in out
    assert run("export", "--verify", tmp_path / "faint", "--base-gguf", base)[0] == 2, "asked for, it has to prove it"


def test_no_room_for_the_bases_own_weights(made, tmp_path, small_disk, monkeypatch):
    with (small_disk / "filler").open("wb") as file:
        file.write(bytes(shutil.disk_usage(small_disk).free - 40_000))
    monkeypatch.setattr(gguf_lora.tempfile, "tempdir", str(small_disk))
    with pytest.raises(DiskFullError, match="The disk is full"):
        exports.export(made()[0], "gguf-lora", tmp_path / "out", False)
    assert not list(tmp_path.glob("out*"))
    assert [one.name for one in small_disk.iterdir()] == ["filler"]


def test_a_quantised_base_proves_it_loosely(made, tmp_path, run):
    adapter, whole = made()
    base = write_base(whole.parent / "toy", tmp_path / "q8.gguf", gguf.GGMLQuantizationType.Q8_0)
    figures = exports.export(adapter, "gguf-lora", tmp_path / "out", False, base)["proof"]
    assert 0 < figures["off_shift"] < 0.2 * figures["mean_shift"]
    assert figures["off_adapter"] < 2e-3, "and tightly on the base's own weights"
    code, out, err = run("export", "--verify", tmp_path / "out", "--base-gguf", base)
    assert code == 0, err
    assert "Proven loosely, on the rounded weights" in out
    proof = read_proof(tmp_path / "out")
    with pytest.raises(ExportError, match="it loads and does nothing"):
        gguf_lora._loosely(proof, proof.base, proof.base, tmp_path, True)
    with pytest.raises(ExportError, match="half of that is allowed"):
        gguf_lora._loosely(proof, proof.adapter[::-1], proof.base[::-1], tmp_path, True)


# Planted faults


def test_permuting_and_back():
    b, heads = torch.arange(32.0 * 3).view(32, 3), {"attn_q": 4}
    name = "blk.0.attn_q.weight.lora_b"
    there = ggufs.permuted(name, b, heads)
    assert torch.equal(ggufs.restored(name, there, heads), b)
    assert there[:4, 0].tolist() == [0.0, 12.0, 3.0, 15.0]
    assert torch.equal(ggufs.permuted("blk.0.attn_v.weight.lora_b", b, heads), b)


def test_q_and_k_that_are_not_permuted_fail(exported):
    folder, base = exported
    heads = {"attn_q": 4, "attn_k": 2}
    rewrite(folder / "adapter.gguf", lambda name, one: ggufs.restored(name, one, heads))
    for given in (None, base):
        with pytest.raises(ExportError, match=r"q and k are not permuted: the rows of blk\.0\.attn_"):
            exports.verify(folder, given)


def test_llama_cpp_itself_sees_that_q_and_k_are_not_permuted(made, tmp_path, monkeypatch):
    """Even where the converter and its fingerprints agree on the wrong order."""
    adapter, base = made()
    monkeypatch.setattr(ggufs, "_heads_of", lambda name, heads: 0)
    with pytest.raises(ExportError, match=r"nothing was kept.*nats off what the adapter did in training"):
        exports.export(adapter, "gguf-lora", tmp_path / "out", False, base)
    assert [path.name for path in tmp_path.iterdir()] == [".out.lock"]


def test_an_adapter_that_does_nothing_fails(exported):
    folder, base = exported
    rewrite(folder / "adapter.gguf", lambda name, one: one * 0 if name.endswith("lora_b") else one)
    with pytest.raises(ExportError, match="a no-op adapter: every B matrix is zero"):
        exports.verify(folder, base)


def test_a_corrupted_tensor_fails(exported):
    folder, _ = exported
    rewrite(folder / "adapter.gguf", lambda name, one: one + (name == "blk.1.ffn_up.weight.lora_a"))
    with pytest.raises(ExportError, match=r"a corrupted tensor: blk\.1\.ffn_up\.weight\.lora_a"):
        exports.verify(folder)
    path = folder / "adapter.gguf"
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ExportError, match="a damaged file"):
        exports.verify(folder)


def test_what_llama_cpp_refuses_or_scales_otherwise_fails(exported):
    folder, base = exported
    rewrite(folder / "adapter.gguf", lambda name, one: one, alpha=5.0)
    with pytest.raises(ExportError, match="nats off what the adapter did in training"):
        exports.verify(folder, base)
    rewrite(folder / "adapter.gguf", lambda name, one: one, architecture="qwen2")
    with pytest.raises(ExportError, match=r"llama\.cpp cannot load"):
        exports.verify(folder, base)


@pytest.mark.parametrize(("kind", "seed", "told"), [("llama", 5, "its embedding"), ("qwen3", 0, "qwen3, 2 layers")])
def test_another_base_fails(exported, tmp_path, kind, seed, told):
    other = write_base(toy_base(tmp_path / "other", kind, seed), tmp_path / "other.gguf")
    match = "a swapped tokenizer" if kind == "qwen3" else f"another base: {told}"
    with pytest.raises(ExportError, match=match):
        exports.verify(exported[0], other)


def test_another_base_of_the_same_embedding_fails(exported, tmp_path):
    theirs = load_file(exported[1].parent / "toy" / "model.safetensors")
    theirs["model.layers.1.mlp.up_proj.weight"] *= 1.1
    other = toy_base(tmp_path / "other")
    save_file(theirs, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match="another base: alone it is"):
        exports.verify(exported[0], write_base(other, tmp_path / "other.gguf"))


def test_a_swapped_tokenizer_fails(made, tmp_path):
    adapter, base = made("llama-untied")
    folder = exports.export(adapter, "gguf-lora", tmp_path / "out", False, base)["folder"]
    with pytest.raises(ExportError, match="a swapped tokenizer: token"):
        exports.verify(Path(folder), made()[1])


# Before any work


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")  # of the very options that are refused
@pytest.mark.parametrize(
    ("lora", "told"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: lm_head"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "trained with bias, which"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    ],
)
@pytest.mark.without_llama_cpp
def test_what_llama_cpp_cannot_take_is_said_before_any_work(tmp_path, monkeypatch, lora, told):
    adapter = adapter_for(toy_base(tmp_path / "toy", "llama-untied"), tmp_path / "run", **lora)
    monkeypatch.setattr(writers, "base_for", None)
    with pytest.raises(ExportError, match=f"gguf-lora cannot take this adapter: .*{told}"):
        exports.export(adapter, "gguf-lora", None, False)


@pytest.mark.without_llama_cpp
def test_an_unknown_architecture_names_those_that_are_known(made, monkeypatch):
    adapter, _ = made()
    card = json.loads((adapter / "perce_lite.json").read_text())
    card["base"]["shape"][0] = "mamba"
    with pytest.raises(
        ExportError, match="a mamba, and the converter knows llama, mistral, qwen2, qwen3, gemma2, gemma3"
    ):
        exports.preflight(card | {"folder": str(adapter)}, "gguf-lora")


def test_without_a_base_gguf_it_is_proven_on_the_bases_own_weights(made, tmp_path, run):
    adapter, base = made()
    code, out, err = run("export", adapter, "--to", "gguf-lora", "--out", tmp_path / "out")
    assert code == 0, err
    assert "Proven over 32 tokens" in out
    moved = shutil.move(base.parent / "toy", tmp_path / "elsewhere")
    try:
        code, _, err = run("export", "--verify", tmp_path / "out")
        assert (code, len(err.splitlines())) == (2, 1)
        assert "its base cannot be loaded, so nothing is proven" in err
        assert run("export", "--verify", tmp_path / "out", "--base-gguf", base)[0] == 0
    finally:
        shutil.move(moved, base.parent / "toy")


@pytest.mark.without_llama_cpp
def test_without_llama_cpp_it_says_that_nothing_is_proven(made, tmp_path, run, monkeypatch):
    adapter, base = made()
    monkeypatch.setattr(llamacpp.importlib.util, "find_spec", lambda name: None)
    for target in ("gguf-lora", "gguf"):
        code, out, err = run("export", adapter, "--to", target, "--out", tmp_path / target)
        assert code == 0, err
        assert "not proven" in out
        assert "pip install 'perce-lite" in out
    code, _, err = run("export", "--verify", tmp_path / "gguf-lora", "--base-gguf", base)
    assert code == 2
    assert "pip install 'perce-lite[export]'" in err


@pytest.mark.without_llama_cpp
def test_a_base_gguf_that_cannot_be_used(made, tmp_path, run):
    adapter, base = made()
    code, _, err = run("export", adapter, "--to", "peft", "--out", tmp_path / "x", "--base-gguf", base)
    assert code == 2
    (tmp_path / "bad.gguf").write_text("no")
    for path, told in (("none.gguf", "no such file"), ("bad.gguf", "no GGUF file of a language model")):
        code, _, err = run("export", adapter, "--to", "gguf-lora", "--base-gguf", tmp_path / path)
        assert (code, len(err.splitlines())) == (2, 1)
        assert told in err
