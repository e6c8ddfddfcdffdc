"""Merged GGUFs and Ollama folders, run by a real llama.cpp, say what the merged model says; faults are named."""

import json
from pathlib import Path

import gguf
import pytest
import torch
import toys
from export_fixtures import FAMILIES, adapter_for, toy_base
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from perce_lite.errors import ExportError
from perce_lite.export import export as exports
from perce_lite.export import llamacpp, modelfile, writers
from perce_lite.export.gguf import common as ggufs
from perce_lite.export.gguf import model as gguf_model
from perce_lite.export.gguf import vocabulary as gguf_vocabulary
from perce_lite.export.proof import gap, plain_log_probs, read_proof
from perce_lite.export_targets import PROOF

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


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


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


def test_dora_is_merged_though_llama_cpp_does_not_know_it(made, tmp_path):
    adapter = adapter_for(made().parent.parent / "toy", tmp_path / "run", use_dora=True)
    assert exports.export(adapter, "gguf", tmp_path / "out", False, quant="F32")["proof"]["off_adapter"] < 5e-3


def test_rounding_that_drowns_the_adapter_is_refused(made, tmp_path):
    faint = adapter_for(made().parent.parent / "toy", tmp_path / "run", scale=0.005)
    with pytest.raises(ExportError, match=r"nothing was kept.*(finer --quant|does nothing)"):
        exports.export(faint, "gguf", tmp_path / "out", False, quant="Q4_0")
    assert not (tmp_path / "out").exists()


SCALED = {
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "linear": {},
    "yarn": {"original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("scaling", SCALED)
def test_rotary_angles_that_are_scaled(tmp_path, scaling):
    """On a text that is longer than what the model was first trained on."""
    base = toy_base(tmp_path / "toy", "llama-untied")
    config = json.loads((base / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": scaling, "rope_theta": 10000.0, "factor": 8.0, **SCALED[scaling]}
    (base / "config.json").write_text(json.dumps(config))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    gguf_model.write(tmp_path / "m.gguf", model, tokenizer)
    ids = list(range(40, 220))
    got = llamacpp.Llama(llamacpp.read_base(tmp_path / "m.gguf"), None, 400).log_probs(ids, 20)
    assert gap(got, plain_log_probs(model, ids, 20)) < 1e-3
    del config["rope_parameters"]
    (base / "config.json").write_text(json.dumps(config))
    assert gap(got, plain_log_probs(AutoModelForCausalLM.from_pretrained(base), ids, 20)) > 0.1


def sentencepiece(words: list[str]) -> Tokenizer:
    """A BPE as sentencepiece's is converted: bytes for what it does not know, every pair that makes a piece listed."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = sorted({letter for word in words for letter in word} | {"▁", "\n"})
    parts = sorted({word[:end] for word in words for end in range(2, len(word) + 1)}, key=lambda one: (len(one), one))
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys([*pieces, *parts, *letters]))}
    merges = [(one[:at], one[at:]) for one in parts for at in range(1, len(one)) if {one[:at], one[at:]} <= set(vocab)]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def test_a_tokenizer_of_sentencepieces(tmp_path):
    base = toy_base(tmp_path / "toy", "mistral")
    plain = sentencepiece("▁the ▁otter ▁and ▁lantern ▁snow ▁first ▁winter user assistant ▁it's ▁came".split())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for one in messages %}[{{ one.role }}] {{ one.content }}</s>{% endfor %}"
    tokenizer.save_pretrained(base)
    (base / "chat_template.jinja").write_text(tokenizer.chat_template)
    figures = exports.export(adapter_for(base, tmp_path / "run"), "gguf", tmp_path / "out", False, quant="F32")
    assert figures["proof"]["off_adapter"] < 5e-3
    model, tokenizer = merged_of(tmp_path / "run/adapter")
    llama = llamacpp.Llama(llamacpp.read_base(tmp_path / "out" / gguf_model.FILE), None, 400)
    for text in ("the otter  and", "the lantern came,\nand it's winter", "otterly Ünknown 抹茶"):
        messages = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(messages, return_dict=False)
        count, told = llama.chat(messages, {}, 262)
        assert count == len(prompt), text
        assert gap([told], plain_log_probs(model, [*prompt, 262], 1)) < 5e-3


def test_tokens_that_the_model_has_no_row_for_are_left_out(made, tmp_path):
    model, tokenizer = merged_of(made())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert tokenizer.convert_tokens_to_ids("<image>") == len(model.get_input_embeddings().weight)
    gguf_model.write(tmp_path / "m.gguf", model, tokenizer)
    ids = list(range(40, 80))
    got = llamacpp.Llama(llamacpp.read_base(tmp_path / "m.gguf"), None, 400).log_probs(ids, 20)
    assert gap(got, plain_log_probs(model, ids, 20)) < 1e-3


def test_names_of_splittings():
    for family in toys.TEMPLATES:
        assert gguf_vocabulary.splitting(toys.toy_tokenizer(family)) == "llama-bpe"
    other = toys.toy_tokenizer("chatml")
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    assert gguf_vocabulary.splitting(other) == "gpt-2"
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("e", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    with pytest.raises(ExportError, match=r"splits text in a way that is not known here.*llama-bpe, qwen2, gpt-2"):
        gguf_vocabulary.splitting(other)
    unigram = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0)))
    with pytest.raises(ExportError, match="The tokenizer is a Unigram"):
        gguf_vocabulary.splitting(unigram)


# Planted faults


def test_q_and_k_that_are_not_permuted_fail(exported, made, tmp_path, monkeypatch):
    heads = {"attn_q": 4, "attn_k": 2}
    rewrite(exported / gguf_model.FILE, lambda name, one: ggufs.restored(name, one, heads))
    with pytest.raises(ExportError, match=r"q and k are not permuted: the rows of blk\.0\.attn_"):
        exports.verify(exported)
    monkeypatch.setattr(ggufs, "_heads_of", lambda name, heads: 0)
    with pytest.raises(ExportError, match=r"nothing was kept.*nats off what the adapter did in training"):
        exports.export(made(), "gguf", tmp_path / "wrong", False)
    assert not (tmp_path / "wrong").exists()


def test_a_model_without_its_adapter_fails(exported, made):
    base = made().parent.parent / "toy"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    for quant in ("F32", "Q8_0"):
        gguf_model.write(exported / gguf_model.FILE, model, tokenizer, quant)
        change_json(exported / PROOF, quant=quant)
        with pytest.raises(ExportError, match="it loads and does nothing"):
            exports.verify(exported)


def test_a_corrupted_tensor_or_file_fails(exported):
    path = exported / gguf_model.FILE
    rewrite(path, lambda name, one: one + 1e-4 * (name == "blk.1.ffn_up.weight"))
    with pytest.raises(ExportError, match=r"a corrupted tensor: blk\.1\.ffn_up\.weight"):
        exports.verify(exported)
    rewrite(path, lambda name, one: one * float("nan") if name == "blk.1.ffn_norm.weight" else one)
    for quant in ("F32", "Q8_0"):
        change_json(exported / PROOF, quant=quant)
        with pytest.raises(ExportError, match=r"a corrupted tensor: blk\.1\.ffn_(up|norm)\.weight"):
            exports.verify(exported)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ExportError, match="no GGUF file of a language model"):
        exports.verify(exported)
    path.unlink()
    with pytest.raises(ExportError, match=r"FROM names model\.gguf, which is not there"):
        exports.verify(exported)


def test_another_base_fails(exported, tmp_path):
    other = toy_base(tmp_path / "other", seed=5)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(other), AutoTokenizer.from_pretrained(other)
    gguf_model.write(exported / gguf_model.FILE, model, tokenizer)
    with pytest.raises(ExportError, match="another base: its embedding"):
        exports.verify(exported)


def test_a_swapped_tokenizer_fails(exported):
    path = exported / gguf_model.FILE
    whole = path.read_bytes()
    swapped = {
        "tokenizer.ggml.tokens": (lambda value: [*value[7:], *value[:7]], "a swapped tokenizer: token"),
        "tokenizer.ggml.merges": (lambda value: value[-100:], "a swapped tokenizer: its chat template and"),
        "tokenizer.chat_template": (lambda value: value.replace("system", "user"), "a swapped tokenizer: its chat"),
    }
    for key, (change, told) in swapped.items():
        path.write_bytes(whole)
        rewrite(path, keys=lambda name, value, key=key, change=change: change(value) if name == key else value)
        with pytest.raises(ExportError, match=told):
            exports.verify(exported)


def test_a_changed_modelfile_fails(exported):
    path = exported / modelfile.NAME
    whole = path.read_text()
    for old, new, told in (
        ("<|im_end|>\n<|im_start|>assistant", "<|im_end|>\n<|im_start|>model", "another template"),
        ("eq $i 0", "eq $i 1", "does not write"),
        ("{{ end }}{{ end }}", "{{ end }}", "an `if` without its end"),
        ('stop "<|im_end|>"', 'stop "</s>"', "other stop tokens: </s>"),
        ("You are a helpful assistant", "You are a pirate", "another system prompt"),
        ("FROM ./model.gguf", "FROM ./README.md", r"FROM names README\.md, and what is proven is model\.gguf"),
        ("TEMPLATE", "TEMPLATES", "damaged"),
    ):
        assert old in whole, old
        path.write_text(whole.replace(old, new))
        with pytest.raises(ExportError, match=told):
            exports.verify(exported)


# Bad input


def test_what_cannot_be_a_gguf_is_said_before_any_work(made, tmp_path, monkeypatch, run):
    monkeypatch.setattr(writers, "load_base", None)
    for words, told in (
        (["--to", "gguf", "--quant", "Q4_K_M"], "There is: F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1, Q4_0"),
        (["--to", "peft", "--quant", "F16"], "--quant goes with gguf and ollama"),
        (["--to", "gguf", "--base-gguf", "x"], "--base-gguf goes with gguf-lora"),
    ):
        code, _, err = run("export", made(), *words)
        assert (code, len(err.splitlines())) == (2, 1)
        assert told in err
    card = json.loads((made() / "perce_lite.json").read_text()) | {"folder": str(made())}
    card["base"]["shape"][0] = "mamba"
    for target in ("gguf", "ollama"):
        with pytest.raises(ExportError, match="a mamba, and the converter knows llama, mistral"):
            exports.preflight(card, target)


def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused():
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=2, query_pre_attn_scalar=7, head_dim=16)
    config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ExportError, match=r"take turns.*query_pre_attn_scalar is 7, and llama\.cpp takes 16"):
        gguf_model.refuse_unlike(config)
    with pytest.raises(ExportError, match="its activation is relu"):
        gguf_model.refuse_unlike(AutoConfig.for_model("llama", hidden_act="relu"))


def test_a_template_that_cannot_be_retold_is_refused_before_any_work(made, monkeypatch):
    monkeypatch.setattr(writers, "load_base", None)
    card = json.loads((made() / "perce_lite.json").read_text()) | {"folder": str(made())}
    plain = card["chat_template"]
    for template in (
        plain.replace("message['content']", "message['content'] | upper"),
        plain.replace("message['content']", "(message['content'] | length | string) + message['content']"),
        plain.replace("\\n'", "{{ x }}\\n'"),
    ):
        with pytest.raises(ExportError, match="ollama: the chat template"):
            exports.preflight(card | {"chat_template": template}, "ollama")
    exports.preflight(card, "ollama")
