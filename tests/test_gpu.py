"""Training on a CUDA device: a real one where there is one (`pytest -m gpu`), else an imitated one.

So no test here waits for its first GPU to show a slip of its own. What only a real one can show says why it skips.
"""

import datasets
import pytest
import torch
import toys
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from perce_lite import PerCEConfig, PerCETrainer
from perce_lite.config import compute_dtype
from perce_lite.evaluation.bench.gpureport import gpu_report, markdown
from perce_lite.evaluation.bench.imitation.libraries import imitated
from perce_lite.model.fingerprint import fingerprint
from perce_lite.model.host_embedding import keep_on_host
from perce_lite.model.scoring import compute_log_probs

pytestmark = pytest.mark.gpu

REAL = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def card():
    """The imitated GPU; None where there is a real one."""
    if REAL:
        yield None
        return
    with imitated() as card:
        yield card


def trainer_on_gpu(tmp_path, family="chatml", hosted=False, **options):
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    quantization = BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=torch.float16)
    folder = toys.toy_folder(tmp_path / family, family)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, device_map={"": "cuda"})
    if hosted:
        keep_on_host(model)
    defaults = {"max_steps": 4, "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "max_length": 512}
    return PerCETrainer(
        model,
        PerCEConfig(str(tmp_path / "out"), **{**defaults, **options}),
        train_dataset=datasets.Dataset.from_list(toys.toy_rows()),
        processing_class=toys.toy_tokenizer(family),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )


@pytest.mark.parametrize("estimator", ["base", "mixed", "bootstrap"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_trains_in_half_precision_with_float32_adapters(tmp_path, estimator, precision):
    if precision == "bf16" and compute_dtype(torch.device("cuda")) != torch.bfloat16:
        pytest.skip("this GPU has no bf16")
    trainer = trainer_on_gpu(tmp_path, estimator=estimator, **{precision: True})
    before = fingerprint(trainer.model)
    trainer.train()
    assert fingerprint(trainer.model) == before
    adapters = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert {p.dtype for p in adapters} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in adapters)
    assert any(p.abs().max() > 0 for p in adapters)


def test_scores_of_a_padded_batch_equal_those_of_rows_alone(tmp_path):
    trainer = trainer_on_gpu(tmp_path, bf16=False, fp16=False)
    sequences = [pair.factual for pair in trainer.pairs["train"]]
    together: dict[int, torch.Tensor] = {}
    compute_log_probs(trainer.model, sequences, False, None, together.__setitem__)
    for index, tokens in enumerate(sequences):
        alone: dict[int, torch.Tensor] = {}
        compute_log_probs(trainer.model, [tokens], False, None, alone.__setitem__)
        torch.testing.assert_close(together[index], alone[0], rtol=0, atol=2e-2)


def test_packed_rows_do_not_see_each_other(tmp_path):
    trainer = trainer_on_gpu(
        tmp_path, estimator="uniform", packing=True, per_device_train_batch_size=1, bf16=False, fp16=False
    )
    batch = next(iter(trainer.get_train_dataloader()))
    indices = [index for index in batch["row"].unique().tolist() if index >= 0]
    assert len(indices) > 1
    total = int((batch["labels"] != -100).sum())
    loss = float(trainer.compute_loss(trainer.model.train(), dict(batch), num_items_in_batch=total).detach())
    alone: dict[int, torch.Tensor] = {}
    sequences = [trainer.pairs["train"][index].factual for index in indices]
    compute_log_probs(trainer.model, sequences, True, None, alone.__setitem__)
    assert loss == pytest.approx(-sum(float(values.sum()) for values in alone.values()) / total, rel=1e-2)


def losses_of(trainer):
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_the_table_on_the_host_trains_the_same_in_less_memory(tmp_path):
    losses, held, tables = [], [], []
    for hosted in (False, True):
        trainer = trainer_on_gpu(tmp_path, "llama3", hosted, logging_steps=1)
        assert {parameter.device.type for parameter in trainer.model.parameters()} == {"cuda"}
        held.append(sum(parameter.nbytes for parameter in trainer.model.parameters()))
        tables.append(trainer.model.get_input_embeddings().weight)
        losses.append(losses_of(trainer))
    assert [table.device.type for table in tables] == ["cuda", "cpu"]
    assert held[0] - held[1] == tables[1].nbytes
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_offloaded_activations_change_no_loss(tmp_path):
    options = {"logging_steps": 1, "gradient_checkpointing": False}
    plain = losses_of(trainer_on_gpu(tmp_path, **options))
    offloaded = losses_of(trainer_on_gpu(tmp_path, activation_offloading=True, **options))
    assert offloaded == pytest.approx(plain, rel=1e-3)


def test_paged_8_bit_adamw_with_checkpointing_learns(tmp_path):
    losses = losses_of(
        trainer_on_gpu(
            tmp_path,
            **{"optim": "paged_adamw_8bit", "gradient_checkpointing": True, "max_steps": 12},
            **{"learning_rate": 1e-2, "logging_steps": 1, "estimator": "uniform"},
        )
    )
    assert losses[-1] < losses[0]


def test_nothing_of_scoring_stays_on_the_card(tmp_path):
    trainer = trainer_on_gpu(tmp_path, estimator="uniform")
    sequences = [pair.factual for pair in trainer.pairs["train"]]
    compute_log_probs(
        trainer.model, sequences[:1], False, None, lambda index, values: None
    )  # tables that are made once
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    compute_log_probs(trainer.model, sequences, False, None, lambda index, values: None)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.skipif(not REAL, reason="torch sees no CUDA device, and an imitated one has no speed to report")
def test_the_report_of_an_8b_stays_within_the_bars_of_memory():
    report = gpu_report()
    print(markdown(report))  # the bars of time are told there
    missed = [bar for bar in report["bars"] if "GiB" in bar["bar"] and bar["met"] is not True]
    assert missed == []
