"""What TRL's own tests of its trainer try, as far as a LoRA and a profile column allow it: written by us, on toys."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import toys
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import log_softmax
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    EarlyStoppingCallback,
    TrainerCallback,
)

from perce_lite import PerCEConfig, PerCETrainer, load_recipe
from perce_lite.data.pairs import IGNORED
from perce_lite.errors import ConfigError, DataError, ModelError
from perce_lite.model.adapter_files import read_metadata
from perce_lite.model.architecture import experts_share
from perce_lite.model.base import config_of, load_base
from perce_lite.model.full_gpu import on_meta
from perce_lite.model.generate import generate, load_adapter

pytest_plugins = ["cli_fixtures"]

SMALL = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
}
TEXT = {
    "gemma3": {**SMALL, "sliding_window": 64},
    "qwen3_5": {
        **SMALL,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "mistral3": {**SMALL, "model_type": "mistral"},
}
EYES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {
    "gemma3": {**EYES, "image_size": 28, "patch_size": 14},
    "qwen3_5": {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64},
    "mistral3": {**EYES, "model_type": "pixtral", "image_size": 28, "patch_size": 14, "head_dim": 16},
}
MORE = {
    "gemma3": {"mm_tokens_per_image": 4, "image_token_index": 599, "boi_token_index": 598, "eoi_token_index": 597},
    "qwen3_5": {},
    "mistral3": {"image_token_index": 599},
}
FAMILY = {"gemma3": "gemma", "qwen3_5": "qwen3", "mistral3": "chatml"}
"""Whose chat template a vision-language checkpoint gets here."""


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """Folders of toy vision-language checkpoints by kind."""
    folders = {}
    for kind, family in FAMILY.items():
        config = AutoConfig.for_model(kind, text_config=TEXT[kind], vision_config=VISION[kind], **MORE[kind])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForImageTextToText.from_config(config)
        folders[kind] = tmp_path_factory.mktemp("seeing") / kind
        model.save_pretrained(folders[kind])
        toys.toy_tokenizer(family).save_pretrained(folders[kind])
    return folders


OPTIONS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "max_length": 512,
    "bf16": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "logging_steps": 1,
}


@pytest.fixture
def script(tmp_path):
    """A trainer as a TRL script makes it; keyword arguments of the trainer, `config` for its `PerCEConfig`."""

    def make(model="chatml", rows=None, config=None, **arguments) -> PerCETrainer:
        family = model if isinstance(model, str) and model in toys.TEMPLATES else "chatml"
        trained = toys.toy_model(model, toys.VOCAB_SIZE) if isinstance(model, str) and family == model else model
        by_name = isinstance(trained, str)
        given = {
            "train_dataset": datasets.Dataset.from_list(rows or toys.toy_rows(2, 3)),
            **({} if by_name else {"processing_class": toys.toy_tokenizer(family)}),
            **({} if isinstance(trained, PeftModel) else {"peft_config": LoraConfig(r=4, target_modules="all-linear")}),
        }
        args = PerCEConfig(str(tmp_path / "out"), **{**OPTIONS, **(config or {})})
        return PerCETrainer(trained, args, **{**given, **arguments})

    return make


def lora(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" in name}


def trains(trainer):
    """Trains, and asserts that the adapter has changed, that all of it is finite, and that the base has not."""
    base = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" not in name}
    before = lora(trainer)
    assert before
    trainer.train()
    after = lora(trainer)
    assert any(not torch.equal(before[name], after[name]) for name in after)
    assert all(torch.isfinite(weight).all() for weight in after.values())
    now = dict(trainer.model.named_parameters())
    assert all(torch.equal(base[name], now[name]) for name in base)
    return trainer.state.log_history


# Formats

USER, REPLY = {"role": "user", "content": "a note?"}, {"role": "assistant", "content": "a quiet otter"}
FORMATS = {
    "texts": {"prompt": "a note?", "completion": "a quiet otter"},
    "messages": {"prompt": [USER], "completion": [REPLY]},
    "dialogue": {"messages": [USER, REPLY]},
    "several turns": {"messages": [USER, REPLY, USER, REPLY]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "a note?"}, {"from": "gpt", "value": "a quiet otter"}],
    },
    "alpaca": {"instruction": "a note?", "input": "", "output": "a quiet otter"},
    "with system": {"prompt": [{"role": "system", "content": "be short"}, USER], "completion": [REPLY]},
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "profile", ["short words", [{"title": "t", "text": "otters"}], ["otters", "lanterns"]], ids=str
)
def test_every_format_trains(script, form, profile):
    trainer = script(rows=[{"profile": profile, **FORMATS[form]}] * 3)
    labels = [label for label in trainer.train_dataset[0]["labels"] if label != IGNORED]
    assert trainer.processing_class.decode(labels).startswith("a quiet otter")
    trains(trainer)


@pytest.mark.parametrize("family", list(toys.TEMPLATES))
@pytest.mark.parametrize("config", [{}, {"packing": True}, {"gradient_checkpointing": True}], ids=str)
def test_every_family_trains(script, family, config):
    trains(script(family, config=config))


def test_arrow_formats_and_other_columns(script):
    rows = datasets.Dataset.from_list([{**row, "id": number} for number, row in enumerate(toys.toy_rows(2, 3))])
    plain = script(train_dataset=rows).train_dataset["input_ids"][:]
    for kind in ("numpy", "torch"):
        assert script(train_dataset=rows.with_format(kind)).train_dataset["input_ids"][:] == plain


# Arguments


def test_arguments_come_in_trls_order(script, tmp_path):
    args = PerCEConfig(str(tmp_path / "out"), **OPTIONS)
    rows, tokenizer = datasets.Dataset.from_list(toys.toy_rows(2, 3)), toys.toy_tokenizer("chatml")
    adapter = LoraConfig(r=4, target_modules="all-linear")
    model = toys.toy_model("chatml", toys.VOCAB_SIZE)
    trainer = PerCETrainer(model, args, None, rows, rows, tokenizer, peft_config=adapter)
    assert (len(trainer.train_dataset), len(trainer.eval_dataset)) == (6, 6)
    with pytest.raises(TypeError, match="unexpected keyword argument 'train_set'"):
        script(train_set=rows)


def streamed():
    return datasets.Dataset.from_list(toys.toy_rows(1, 2)).to_iterable_dataset()


def refusals():
    rows = datasets.Dataset.from_list(toys.toy_rows(1, 2))
    transformers_own = toys.toy_model("chatml", toys.VOCAB_SIZE)
    transformers_own.add_adapter(LoraConfig(target_modules=["q_proj"]))
    frozen = get_peft_model(toys.toy_model("chatml", toys.VOCAB_SIZE), LoraConfig(target_modules=["q_proj"]))
    frozen.requires_grad_(False)
    adapted = get_peft_model(toys.toy_model("chatml", toys.VOCAB_SIZE), LoraConfig(target_modules=["q_proj"]))
    return {
        "a stream": ({"train_dataset": streamed()}, "train_dataset: a streaming data set"),
        "a stream in a dict": ({"eval_dataset": {"a": rows, "b": streamed()}}, r"eval_dataset\['b'\]: a streaming"),
        "splits": ({"train_dataset": datasets.DatasetDict(train=rows)}, "this is a DatasetDict of train"),
        "a dict for an adapter": ({"peft_config": {"r": 8}}, "peft_config: a LoraConfig is needed, this is dict"),
        "add_adapter": ({"model": transformers_own}, "by transformers' add_adapter"),
        "nothing to train": ({"model": frozen}, "nothing in it is trained"),
        "two adapters": ({"model": adapted, "peft_config": LoraConfig()}, "has an adapter already"),
        "a transform": ({"train_dataset": rows.with_transform(lambda batch: batch)}, "with_transform makes rows anew"),
        "no profile to report on": (
            {"eval_dataset": rows.remove_columns("profile")},
            "eval_dataset: no profile column",
        ),
        "images": ({"train_dataset": rows.add_column("images", [["a"], ["b"]])}, "images: text alone is trained on"),
    }


@pytest.mark.parametrize("case", list(refusals()))
def test_what_cannot_be_trained_is_one_clear_error(script, case):
    arguments, told = refusals()[case]
    with pytest.raises(ConfigError, match=told):
        script(**arguments)


def test_what_cannot_be_reported_on_is_one_clear_error(script):
    trainer = script()
    with pytest.raises(ConfigError, match="eval: a streaming data set"):
        trainer.evaluate(streamed())
    with pytest.raises(ConfigError, match="a: a streaming data set"):
        trainer.evaluate({"a": streamed()})
    with pytest.raises(ConfigError, match="eval: no profile column"):
        trainer.evaluate(datasets.Dataset.from_list(toys.toy_rows(1, 2)).remove_columns("profile"))


def test_an_empty_data_set_is_named(script):
    with pytest.raises(DataError, match="train_dataset: there is no row in it"):
        script(train_dataset=datasets.Dataset.from_list(toys.toy_rows(1, 2)).select([]))


def test_a_model_in_memory_needs_its_tokenizer(script):
    with pytest.raises(ConfigError, match="nobody knows its tokenizer"):
        script(processing_class=None)


# Evaluation


def test_fresh_rows_are_evaluated_and_predicted(script):
    rows = datasets.Dataset.from_list(toys.toy_rows(1, 3, seed=5))
    trainer = script(eval_dataset=rows)
    known = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(known)
    assert trainer.evaluate({"a": rows})["eval_a_loss"] == pytest.approx(known)


@pytest.mark.filterwarnings("ignore:`return_outputs=True`:FutureWarning")
def test_compute_metrics_and_predict_have_the_logits(script):
    rows = datasets.Dataset.from_list(toys.toy_rows(1, 3, seed=5))
    seen = []

    def accuracy(predicted):
        logits, labels = predicted.predictions[:, :-1], predicted.label_ids[:, 1:]
        scored = labels != IGNORED
        seen.append((logits.shape, labels.shape))
        return {"accuracy": float((logits.argmax(-1) == labels)[scored].mean())}

    trainer = script(eval_dataset=rows, compute_metrics=accuracy, config={"eval_strategy": "steps", "eval_steps": 1})
    trainer.train()
    figures = trainer.evaluate()
    assert figures["eval_accuracy"] == pytest.approx(figures["eval_mean_token_accuracy"], abs=0.2)
    assert len(seen) == 3
    done = trainer.predict(rows)
    assert done.predictions.shape[:2] == done.label_ids.shape
    scored = done.label_ids[:, 1:] != IGNORED
    logits = torch.tensor(done.predictions[:, :-1])
    told = log_softmax(logits, -1).numpy()[np.where(scored)]
    nll = -told[np.arange(len(told)), done.label_ids[:, 1:][scored]].mean()
    assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(nll, rel=0.3)


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_strategy": "steps",
    "save_steps": 1,
    "max_steps": 6,
    "learning_rate": 0.02,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,  # training lowers it, so that the best step is not the last
    "save_total_limit": 1,
}


def test_the_best_step_is_loaded_at_the_end(script, tmp_path):
    trainer = script(eval_dataset=datasets.Dataset.from_list(toys.toy_rows(1, 3, seed=5)), config=BEST)
    trainer.train()
    losses = {log["step"]: log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log}
    best = max(losses, key=losses.get)
    assert best < 6
    assert trainer.state.best_global_step == best
    weights = load_file(Path(trainer.state.best_model_checkpoint) / "adapter_model.safetensors")
    for name, weight in lora(trainer).items():
        assert torch.equal(weight, weights[name.replace(".default", "")])
        assert weight.dtype == torch.float32
    trainer.save_model(str(tmp_path / "best"))
    saved = load_file(tmp_path / "best" / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], weights[name]) for name in weights)


def test_a_recipe_that_resumes_at_its_end_takes_the_best_step_too(recipe, run, tmp_path):
    text = f"train: {json.dumps({**BEST, 'output_dir': 'out', 'store': None})}\n"
    path = recipe(text=text + "evaluation: {max_rows: 4, max_new_tokens: 2}\n")
    code, _, err = run("train", path)
    assert code == 0, err
    saved = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    for file in (tmp_path / "out" / "adapter").iterdir():
        file.unlink()
    (tmp_path / "out" / "adapter").rmdir()
    code, _, err = run("train", path)
    assert code == 0, err
    assert "Resuming from" in err
    again = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], again[name]) for name in saved)


def test_early_stopping(script):
    stop = EarlyStoppingCallback(early_stopping_patience=1)
    rows = datasets.Dataset.from_list(toys.toy_rows(1, 3, seed=5))
    trainer = script(eval_dataset=rows, callbacks=[stop], config={**BEST, "max_steps": 30})
    trainer.train()
    assert trainer.state.global_step < 30


# Callbacks, resume, cards


class Counter(TrainerCallback):
    def __init__(self):
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1


def test_callbacks_are_called(script):
    counter = Counter()
    script(callbacks=[counter]).train()
    assert counter.steps == 2


@pytest.mark.parametrize("config", [{}, {"packing": True, "max_length": 400}, {"estimator": "bootstrap"}], ids=str)
def test_a_resumed_run_is_the_run(script, tmp_path, config):
    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **config}
    whole = script(config=saved)
    whole.train()
    resumed = script(config=saved)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    ours, theirs = lora(whole), lora(resumed)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_card_and_the_tags_say_perce(script, tmp_path):
    trainer = script(config={"save_strategy": "steps", "save_steps": 2})
    trainer.train()
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "PerCE" in card
    assert "trained with SFT" not in card
    assert "perce" in trainer._tag_names
    assert (trainer._name, trainer._paper["id"]) == ("PerCE", "2603.06595")


def test_pairs_are_made_whatever_the_processes(script):
    plain = script().train_dataset["input_ids"][:]
    assert script(config={"dataset_num_proc": 2}).train_dataset["input_ids"][:] == plain


# Kinds of LoRA


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": r".*\.layers\.1\..*(q|k)_proj"},
        {"use_rslora": True},
        {"use_dora": True},
        {"lora_dropout": 0.1},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}},
        {"layers_to_transform": [1], "layers_pattern": "layers", "target_modules": ["q_proj"]},
        {"exclude_modules": ["k_proj"]},
        {"init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_kinds_of_lora_train(script, options):
    trains(script(peft_config=LoraConfig(**{"r": 4, "target_modules": "all-linear", **options})))


def test_an_adapter_goes_on_from_where_it_was(script):
    model = get_peft_model(
        toys.toy_model("chatml", toys.VOCAB_SIZE), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    trainer = script(model)
    assert all(torch.equal(before[name], weight) for name, weight in lora(trainer).items())
    trains(trainer)


# Checkpoints that see


@pytest.mark.parametrize("kind", list(FAMILY))
def test_vision_language_checkpoints_train_on_text_by_name(script, seeing, kind, tmp_path):
    trainer = script(str(seeing[kind]))
    assert type(trainer.model.get_base_model()).__name__.endswith("ForConditionalGeneration")
    names = list(lora(trainer))
    assert names
    assert not [name for name in names if any(part in name for part in ("vision", "visual", "projector"))]
    trains(trainer)
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = load_adapter(read_metadata(tmp_path / "adapter"))
    assert type(loaded.model.get_base_model()) is type(trainer.model.get_base_model())
    pair = trainer.pairs["train"][0]
    inputs = {"input_ids": torch.tensor([pair.factual.ids])}
    with torch.no_grad():
        ours, theirs = loaded.model(**inputs).logits, trainer.model.eval()(**inputs).logits
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert isinstance(generate(loaded.model, loaded.maker, [USER], "otters", 3), str)


@pytest.mark.parametrize("kind", list(FAMILY))
def test_a_seeing_bases_log_probs_are_those_of_its_own_forward(script, seeing, kind):
    trainer = script(str(seeing[kind]))
    trainer.prepare()
    pair, row = trainer.pairs["train"][0], trainer.train_dataset[0]
    labels = torch.tensor(pair.factual.labels[1:])
    scored = labels != IGNORED
    model = AutoModelForImageTextToText.from_pretrained(seeing[kind], dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([pair.factual.ids])).logits[0, :-1]
    expected = log_softmax(logits, -1)[scored].gather(1, labels[scored, None])[:, 0]
    got = [value for value, label in zip(row["factual_log_probs"], row["labels"], strict=True) if label != IGNORED]
    assert got == pytest.approx(expected.tolist(), abs=2e-3)


@pytest.mark.parametrize("kind", list(FAMILY))
def test_check_and_train_take_a_vision_language_checkpoint(recipe, run, seeing, kind):
    path = recipe(text="train: {max_steps: 1, output_dir: out}\nevaluation: {max_rows: 2, max_new_tokens: 2}\n")
    for command in ("check", "train"):
        code, _, err = run(command, path, "--set", f"model={seeing[kind]}")
        assert code == 0, err


def test_the_processors_chat_template_is_found(seeing, tmp_path, recipe):
    from perce_lite.model.base import text_tokenizer

    tokenizer = toys.toy_tokenizer("chatml")
    template, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.save_pretrained(tmp_path / "processor")
    (tmp_path / "processor" / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert text_tokenizer(str(tmp_path / "processor")).chat_template == template


def stored_as(folder: Path, toy: Path, quantization: dict) -> Path:
    folder.mkdir()
    for file in toy.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    return folder


@pytest.mark.parametrize(
    ("quantization", "told"),
    [
        ({"quant_method": "mxfp4"}, "is stored in MXFP4"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "is stored in FP8"),
        ({"quant_method": "fbgemm_fp8"}, "is stored in FP8"),
        ({"quant_method": "compressed-tensors", "format": "float-quantized"}, "is stored in FP8"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["quant_method"],
)
def test_what_weights_are_stored_in_is_said(recipe, run, script, toy, tmp_path, quantization, told):
    folder = stored_as(tmp_path / "stored", toy, quantization)
    for command in ("check", "train"):
        code, _, err = run(command, recipe(), "--set", f"model={folder}")
        assert (code, told in err, "Traceback" in err, "Hub" in err) == (2, True, False, False), err
    with pytest.raises(ModelError, match=told):
        script(str(folder))


def test_nf4_that_would_leave_experts_as_they_are_is_refused(recipe, run, tmp_path):
    config = AutoConfig.for_model(
        "qwen3_moe", **SMALL, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, decoder_sparse_step=1
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mixture")
    toys.toy_tokenizer("qwen3").save_pretrained(tmp_path / "mixture")
    share = experts_share(on_meta(config))
    assert 0.3 < share < 1
    path = recipe(text="train: {max_steps: 1, output_dir: out}\nevaluation: {max_rows: 2, max_new_tokens: 2}\n")
    words = ["--set", f"model={tmp_path / 'mixture'}"]
    for command in ("check", "train"):
        code, _, err = run(command, path, *words, "--set", "quantization=nf4")
        assert (code, f"{share:.0%} of the weights" in err) == (2, True), err
    loaded = load_recipe(path, [f"model={tmp_path / 'mixture'}", "quantization=none"])
    assert config_of(loaded).model_type == "qwen3_moe"
    assert load_base(loaded).model.config.num_experts == 8


# Several processes


def test_several_processes_are_refused_by_name(script, monkeypatch):
    monkeypatch.setattr(PerCEConfig, "world_size", 2)
    with pytest.raises(ConfigError, match="torchrun: 2 processes train together, and PerCE Lite trains in one"):
        script()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_torchrun_with_two_processes_says_so(toy, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, toys.toy_rows(1, 4))))
    (tmp_path / "script.py").write_text(
        "import datasets\nfrom peft import LoraConfig\nfrom perce_lite import PerCEConfig, PerCETrainer\n"
        "rows = datasets.load_dataset('json', data_files='rows.jsonl', split='train')\n"
        f"PerCETrainer({str(toy)!r}, PerCEConfig('out', bf16=False, use_cpu=True, report_to='none'), "
        "train_dataset=rows, peft_config=LoraConfig(target_modules='all-linear')).train()\n"
    )
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    words += ["--master_addr=127.0.0.1", f"--master_port={free_port()}", "script.py"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    assert "torchrun: 2 processes train together, and PerCE Lite trains in one" in done.stderr
