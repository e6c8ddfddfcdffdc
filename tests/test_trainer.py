"""`PerCETrainer` in use: determinism, logs, options that go with it, arguments that do not."""

from dataclasses import replace

import datasets
import pytest
import torch
import toys
from peft import IA3Config, LoraConfig, PeftModel

from perce_lite import PerCEConfig, PerCETrainer
from perce_lite.data.pairs import IGNORED
from perce_lite.data.rows import from_columns
from perce_lite.errors import ConfigError, DataError, NonFiniteLossError

LOGGED = {
    "unweighted_loss", "pir_mean", "pir_p10", "pir_p50", "pir_p90", "weight_mean",
    "share_at_min", "share_above_min", "share_at_max", "effective_tokens", "store_hits",
}  # fmt: skip


def adapter(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_" in name}


def test_same_seed_same_adapter_other_seed_another(toy_trainer):
    trained = []
    for seed in (1, 1, 2):
        trainer = toy_trainer(seed=seed, max_steps=4)
        trainer.train()
        trained.append(adapter(trainer))
    one, same, other = trained
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_every_step_logs_loss_pir_weights_and_hits(toy_trainer, tmp_path):
    trainer = toy_trainer(max_steps=3, store=str(tmp_path / "store"))
    trainer.train()
    steps = [log for log in trainer.state.log_history if "loss" in log]
    assert len(steps) == 3
    assert all(set(log) >= LOGGED | {"loss", "grad_norm"} for log in steps)
    assert all(log["share_at_min"] + log["share_above_min"] == pytest.approx(1) for log in steps)
    assert [log["store_hits"] for log in steps] == [0, 0, 0]
    again = toy_trainer(max_steps=1, store=str(tmp_path / "store"))
    again.train()
    assert again.state.log_history[0]["store_hits"] == 1
    first = [trainer.train_dataset[name] for name in ("factual_log_probs", "counterfactual_log_probs")]
    second = [again.train_dataset[name] for name in ("factual_log_probs", "counterfactual_log_probs")]
    assert first == second


def test_the_logged_loss_is_the_mean_over_the_tokens_of_a_step(toy_trainer):
    rows = [
        {**row, "completion": row["completion"] * (1 + 5 * (number % 2))} for number, row in enumerate(toys.toy_rows())
    ]
    options = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 5,
        "train_sampling_strategy": "sequential",
    }
    trainer = toy_trainer(rows=rows, estimator="uniform", max_steps=4, num_train_epochs=2, **options)
    trainer.train()
    steps = [log for log in trainer.state.log_history if "unweighted_loss" in log]
    assert len(steps) == 4, "the last of an epoch is of three rows"
    assert [log["unweighted_loss"] for log in steps] == pytest.approx([log["loss"] for log in steps], rel=1e-4)


def test_training_on_counterfactual_has_no_profile_in_the_batch(toy_trainer):
    trainer = toy_trainer(train_on="counterfactual", prepared=True)
    with_profile = toy_trainer(train_on="factual", prepared=True)
    for row, pair in zip(trainer.train_dataset, trainer.pairs["train"], strict=True):
        assert row["input_ids"] == pair.counterfactual.ids
    assert [r["input_ids"] for r in with_profile.train_dataset] == [p.factual.ids for p in with_profile.pairs["train"]]
    scored = [
        [
            [x for x, label in zip(r["factual_log_probs"], r["labels"], strict=True) if label != IGNORED]
            for r in t.train_dataset
        ]
        for t in (trainer, with_profile)
    ]
    assert scored[0] == scored[1]


def test_scoring_is_a_step_of_its_own(toy_trainer, tmp_path):
    trainer = toy_trainer(store=str(tmp_path / "store"))
    assert "factual_log_probs" not in trainer.train_dataset.column_names
    assert not (tmp_path / "store").exists(), "making a trainer scores nothing"
    trainer.prepare()
    scored = trainer.train_dataset
    assert {"factual_log_probs", "counterfactual_log_probs"} <= set(scored.column_names)
    trainer.train()
    assert trainer.train_dataset is scored, "training does not score again"


def test_rows_go_in_as_rows(toy_trainer):
    """A text profile stays a text beside profiles that are lists, as in `check` and slots."""
    rows = [from_columns(record, f"line {number}") for number, record in enumerate(toys.toy_rows())]
    rows[0] = replace(rows[0], profile="likes otters and lanterns, and short words")
    trainer = toy_trainer(rows=rows)
    assert [pair.row for pair in trainer.pairs["train"]] == rows
    assert trainer.pairs["train"][0].profile == rows[0].profile
    trainer.train()
    again = toy_trainer(rows=toys.toy_rows()[1:])
    assert trainer.train_dataset["input_ids"][1:] == again.train_dataset["input_ids"][:]


def test_packing_cuts_nothing_and_keeps_log_probs_in_place(toy_trainer):
    plain, packed = (
        toy_trainer(prepared=True),
        toy_trainer(packing=True, max_length=400, shuffle_dataset=True, prepared=True),
    )
    rows = {row["row"][0]: row for row in plain.train_dataset}
    seen = []
    for bin_ in packed.train_dataset:
        start = 0
        for length in bin_["seq_lengths"]:
            row = rows[bin_["row"][start]]
            for name in ("input_ids", "labels", "factual_log_probs", "counterfactual_log_probs"):
                assert bin_[name][start : start + length] == row[name]
            seen.append(row["row"][0])
            start += length
    assert sorted(seen) == sorted(rows)
    assert len(packed.train_dataset) < len(rows)


@pytest.mark.parametrize(
    "options",
    [
        {"neftune_noise_alpha": 5.0},
        {"assistant_only_loss": True},
        {"completion_only_loss": True},
        {"train_sampling_strategy": "group_by_length"},
        {"pad_to_multiple_of": 64},
        {"pad_token": "<|im_start|>"},
        {"max_length": None},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_supported_options_train(toy_trainer, options):
    plain, trainer = toy_trainer(), toy_trainer(**options)
    assert trainer.train_dataset["labels"] == plain.train_dataset["labels"]
    trainer.train()
    assert all(torch.isfinite(p).all() for p in adapter(trainer).values())
    assert any(p.abs().max() > 0 for name, p in adapter(trainer).items() if "lora_B" in name)


def test_neftune_noise_does_not_reach_the_scores(toy_trainer):
    plain, noisy = toy_trainer(prepared=True), toy_trainer(neftune_noise_alpha=50.0, prepared=True)
    for name in ("factual_log_probs", "counterfactual_log_probs"):
        assert plain.train_dataset[name] == noisy.train_dataset[name]


@pytest.mark.parametrize("name", ["data_collator", "compute_loss_func", "formatting_func"])
def test_arguments_that_would_replace_the_loss_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=name):
        PerCETrainer(
            toys.toy_model("chatml", 600),
            PerCEConfig(str(tmp_path)),
            train_dataset=datasets.Dataset.from_list(toys.toy_rows()),
            peft_config=LoraConfig(),
            **{name: lambda *args: None},
        )


def refused(tmp_path, rows=None, **kwargs):
    arguments = {
        "train_dataset": datasets.Dataset.from_list(rows if rows is not None else toys.toy_rows()),
        "processing_class": toys.toy_tokenizer("chatml"),
        "peft_config": LoraConfig(target_modules="all-linear"),
    }
    return PerCETrainer(
        toys.toy_model("chatml", 600),
        PerCEConfig(str(tmp_path), bf16=False, report_to="none"),
        **{**arguments, **kwargs},
    )


def test_what_cannot_be_contrasted_is_refused(tmp_path):
    streaming = datasets.Dataset.from_list(toys.toy_rows()).to_iterable_dataset()
    with pytest.raises(ConfigError, match="streaming"):
        refused(tmp_path, train_dataset=streaming)
    with pytest.raises(ConfigError, match="adapters off"):
        refused(tmp_path, peft_config=None)
    with pytest.raises(ConfigError, match="LoraConfig is needed"):
        refused(tmp_path, peft_config=IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    for changes_the_base in ({"bias": "all"}, {"init_lora_weights": "OLoRA"}):
        with pytest.raises(ConfigError, match=next(iter(changes_the_base))):
            refused(tmp_path, peft_config=LoraConfig(target_modules="all-linear", **changes_the_base))
    for head_adapter_faults in ({"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ".*lm_head"}):
        with pytest.raises(ConfigError, match="fused head"):
            refused(tmp_path, peft_config=LoraConfig(**head_adapter_faults))
    with pytest.raises(ConfigError, match="no profile column"):
        refused(tmp_path, rows=[{"prompt": "a", "completion": "b"}])
    with pytest.raises(ConfigError, match="prompt and completion"):
        refused(tmp_path, rows=[{"profile": "a", "text": "b"}])
    with pytest.raises(DataError, match="empty in all 2 rows"):
        refused(tmp_path, rows=[{"profile": "", "prompt": "a", "completion": "b"}] * 2)
    with pytest.raises(DataError, match="max_length"):
        PerCETrainer(
            toys.toy_model("chatml", 600),
            PerCEConfig(str(tmp_path), max_length=8),
            train_dataset=datasets.Dataset.from_list(toys.toy_rows()),
            processing_class=toys.toy_tokenizer("chatml"),
            peft_config=LoraConfig(target_modules="all-linear"),
        )


@pytest.mark.parametrize("packing", [False, True])
def test_loss_that_is_not_finite_stops_names_the_rows_and_saves_nothing(toy_trainer, tmp_path, packing):
    rows = [{**row, "where": f"rows.jsonl, line {number}"} for number, row in enumerate(toys.toy_rows(), 1)]
    trainer = toy_trainer(rows=rows, save_strategy="steps", save_steps=1, packing=packing)
    with torch.no_grad():
        next(p for name, p in trainer.model.named_parameters() if "lora_A" in name)[0, 0] = float("nan")
    with pytest.raises(NonFiniteLossError, match=r"rows\.jsonl, line \d+ \(user"):
        trainer.train()
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_saved_adapter_reloads_with_plain_peft_and_is_no_no_op(toy_trainer, tmp_path):
    trainer = toy_trainer(max_steps=4)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    base = toys.toy_model("chatml", 600)
    ids = torch.tensor([trainer.pairs["train"][0].factual.ids])
    with torch.no_grad():
        bare = base(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")(input_ids=ids).logits
        trained = trainer.model.eval()(input_ids=ids).logits
    assert torch.equal(loaded, trained)
    assert (loaded - bare).abs().max() > 0.05


def test_weights_that_are_not_finite_are_not_saved(toy_trainer, tmp_path):
    trainer = toy_trainer(save_strategy="steps", save_steps=1)
    step = trainer.training_step

    def poisoned(*args, **kwargs):
        loss = step(*args, **kwargs)
        next(p for name, p in trainer.model.named_parameters() if "lora_B" in name).grad[0, 0] = float("nan")
        return loss

    trainer.training_step = poisoned
    with pytest.raises(NonFiniteLossError, match="not finite after step 1"):
        trainer.train()
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_evaluation_beside_bootstrap_and_under_any_name(toy_trainer):
    """The evaluation set is larger than the training set, and called as it is."""
    rows = toys.toy_rows()
    held_out = {"train": datasets.Dataset.from_list(rows), "other": datasets.Dataset.from_list(rows[:2])}
    trainer = toy_trainer(
        rows=rows[:3], estimator="bootstrap", eval_dataset=held_out, eval_strategy="steps", eval_steps=1
    )
    trainer.train()
    assert len(trainer.pairs["train"]) == 3
    evaluated = [log for log in trainer.state.log_history if "eval_train_loss" in log]
    assert len(evaluated) == 2
    assert evaluated[0]["eval_train_loss"] != evaluated[1]["eval_train_loss"]


@pytest.mark.parametrize("trained_as", ["rows", "a data set"])
@pytest.mark.parametrize("evaluated_as", ["rows", "a data set"])
def test_an_evaluation_set_called_train_is_kept_apart(toy_trainer, trained_as, evaluated_as):
    records = toys.toy_rows()
    rows = [from_columns(record, f"line {number}") for number, record in enumerate(records)]
    trained = rows[:3] if trained_as == "rows" else records[:3]
    evaluated = rows if evaluated_as == "rows" else datasets.Dataset.from_list(records)
    trainer = toy_trainer(rows=trained, eval_dataset={"train": evaluated})
    assert {name: len(pairs) for name, pairs in trainer.pairs.items()} == {"train": 3, "eval train": len(rows)}
    assert trainer.audits.keys() == trainer.pairs.keys()
    if evaluated_as == "a data set":
        assert trainer.pairs["eval train"][0].row.where == "eval train row 0"
    trainer.train()
    assert "eval_train_loss" in trainer.evaluate()


def test_dialogues_score_every_assistant_turn(toy_trainer):
    turns = [("user", "hello there"), ("assistant", "good day"), ("user", "and you"), ("assistant", "well, thanks")]
    messages = [{"role": role, "content": content} for role, content in turns]
    trainer = toy_trainer(rows=[{"profile": "likes short words", "messages": messages, "user": "a"}] * 4, max_steps=1)
    labels = [label for label in trainer.train_dataset[0]["labels"] if label != IGNORED]
    text = trainer.processing_class.decode(labels)
    assert text == "good day<|im_end|>well, thanks<|im_end|>"
    trainer.train()


def by_name(folder, **config):
    return PerCETrainer(
        str(toys.toy_folder(folder / "toy")),
        PerCEConfig(str(folder / "out"), bf16=False, report_to="none", **config),
        train_dataset=datasets.Dataset.from_list(toys.toy_rows(1, 2)),
        peft_config=LoraConfig(target_modules="all-linear"),
    )


@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential", {"model": 0, "lm_head": 1}], ids=str)
def test_a_device_map_over_several_cards_is_refused(tmp_path, device_map):
    with pytest.raises(ConfigError, match=r"model_init_kwargs: device_map .* leave device_map out"):
        by_name(tmp_path, model_init_kwargs={"device_map": device_map})


def test_a_model_by_name_goes_on_the_trainings_own_card(tmp_path, monkeypatch):
    asked = []

    def load(name, **kwargs):
        asked.append(kwargs)
        raise OSError("seen enough")

    monkeypatch.setattr("trl.trainer.sft_trainer.create_model_from_path", load)
    monkeypatch.setattr(PerCEConfig, "device", torch.device("cuda", 0))
    with pytest.raises(OSError, match="seen enough"):
        by_name(tmp_path, model_init_kwargs={"dtype": "float32"})
    assert asked[0]["device_map"] == {"": torch.device("cuda", 0)}
    assert asked[0]["dtype"] == "float32"
    with pytest.raises(OSError, match="seen enough"):
        by_name(tmp_path, model_init_kwargs={"device_map": {"": 1}})
    assert asked[1]["device_map"] == {"": 1}, "one that names one device is kept"


def test_a_model_by_name_trains_on_a_cpu(tmp_path):
    trainer = by_name(tmp_path, max_steps=1, use_cpu=True)
    assert {p.device.type for p in trainer.model.parameters()} == {"cpu"}


def test_a_model_that_lies_on_several_devices_is_refused(toy_trainer):
    model = toys.toy_model("chatml", toys.VOCAB_SIZE)
    model.model.norm.to("meta")
    with pytest.raises(ConfigError, match="model: it lies on cpu, meta, and PerCE Lite trains on one device"):
        toy_trainer(model=model)


def test_the_model_card_says_perce_and_replaces_nothing_of_others(toy_trainer, tmp_path, capsys):
    toy_trainer(save_strategy="steps", save_steps=1).train()
    card = tmp_path / "out" / "README.md"
    assert "PerCE" in card.read_text("utf-8")
    assert "trained with SFT" not in card.read_text("utf-8")
    assert "2603.06595" in card.read_text("utf-8")
    card.write_text("my own notes", "utf-8")
    toy_trainer(save_strategy="steps", save_steps=1).train()
    assert card.read_text("utf-8") == "my own notes"
    assert capsys.readouterr().err.count("is not ours") == 1, "two checkpoints, said once"
    card.unlink()
    toy_trainer(save_strategy="steps", save_steps=1).train()
    assert "PerCE" in card.read_text("utf-8")
