"""What keeps memory low: no full logits, one pass at a time, nothing left of scoring; fp16 as a T4 trains it."""

import gc
import math

import pytest
import torch
import toys
import trl.trainer.utils
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from perce_lite.config import compute_dtype
from perce_lite.evaluation.bench.measuring import _full_log_probs
from perce_lite.model import compat
from perce_lite.model.scoring import ScoringJob, cached_log_probs
from perce_lite.recipe import Recipe, train_defaults, training_config

WIDTH = toys.VOCAB_SIZE


class Watch(TorchDispatchMode):
    """Every tensor that is made while it is on, views of `model`'s weights aside: its shape, and whether it lives."""

    def __init__(self, model: torch.nn.Module | None = None) -> None:
        super().__init__()
        self.weights = (
            {parameter.untyped_storage().data_ptr() for parameter in model.parameters()} if model is not None else set()
        )
        self.made: list[tuple[tuple[int, ...], StorageWeakRef]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.weights:
                self.made.append((tuple(tensor.shape), StorageWeakRef(tensor.untyped_storage())))
        return out

    def of_the_vocabulary(self) -> list[tuple[int, ...]]:
        """Shapes of what has a number for each word of the vocabulary, the model's own weights aside."""
        weights = {(WIDTH, 64), (64, WIDTH)}
        return [shape for shape, _ in self.made if shape and shape[-1] == WIDTH and shape not in weights]

    def alive(self) -> list[tuple[int, ...]]:
        gc.collect()
        return [shape for shape, storage in self.made if not storage.expired()]

    def largest(self) -> int:
        """Numbers in the largest of those that still live."""
        return max(map(math.prod, self.alive()), default=0)


@pytest.fixture
def narrow_tiles(monkeypatch):
    """A head that looks at 128 words at a time: the toy's vocabulary is several tiles, as a real one's is."""
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 128)
    monkeypatch.setattr(compat, "VOCABULARY_CHUNK_SIZE", 128)


@pytest.mark.parametrize("estimator", ["base", "mixed", "bootstrap", "uniform"])
def test_no_pass_holds_full_logits(toy_trainer, narrow_tiles, estimator):
    with Watch() as scoring:
        trainer = toy_trainer("llama3", rows=toys.toy_rows(2, 2), estimator=estimator)
    batch = next(iter(trainer.get_train_dataloader()))
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    with Watch() as step:
        trainer.compute_loss(trainer.model.train(), batch, num_items_in_batch=9).backward()
    with Watch() as by_hand:
        _full_log_probs(trainer.model, plain)
    assert by_hand.of_the_vocabulary()  # this is what it would look like
    assert (scoring.of_the_vocabulary(), step.of_the_vocabulary()) == ([], [])
    assert len(step.made) > 100


def test_one_pass_is_gone_before_the_next_begins(toy_trainer):
    trainer = toy_trainer("llama3", rows=toys.toy_rows(2, 2), estimator="bootstrap")
    backbone = trainer.model.get_base_model().base_model
    batch = next(iter(trainer.get_train_dataloader()))
    most = batch["labels"].numel()  # a number a token: log-probs and masks, never activations
    before, after = [], []
    with Watch(trainer.model) as watch:
        backbone.register_forward_pre_hook(lambda *_: before.append(watch.largest()))
        backbone.register_forward_hook(lambda *_: after.append(watch.largest()))
        trainer.compute_loss(trainer.model.train(), batch, num_items_in_batch=9)
    assert (len(before), len(after)) == (2, 2)  # without the profile first, then the training forward
    assert max(before) <= most
    assert min(after) > 2 * most  # what would be found if it still lived


def test_nothing_of_scoring_stays_but_the_log_probs(toy_trainer):
    trainer = toy_trainer("llama3", rows=toys.toy_rows(2, 2))
    jobs = [ScoringJob("ann", pair.factual) for pair in trainer.pairs["train"]]
    cached_log_probs(
        trainer.model, jobs[:1], None, None, "x"
    )  # rotary tables and the like are made at the first forward
    backbone, before = trainer.model.get_base_model().base_model, []
    with Watch(trainer.model) as watch:
        backbone.register_forward_pre_hook(lambda *_: before.append(watch.largest()))
        scored = cached_log_probs(trainer.model, jobs, None, None, "x")
    assert len(before) == len(jobs)
    assert max(before) <= max(len(job.tokens.ids) for job in jobs)
    alive = {shape for shape in watch.alive() if math.prod(shape) > 1}
    assert alive == {tuple(log_probs.shape) for log_probs in scored.log_probs}
    assert all(log_probs.device.type == "cpu" and log_probs.grad_fn is None for log_probs in scored.log_probs)
    del scored
    assert not [shape for shape in watch.alive() if math.prod(shape) > 1]


# As a T4 trains: fp16 compute, float32 adapters, a grad scaler


SHORT = {"rows": toys.toy_rows(1, 4), "max_steps": 3, "learning_rate": 1e-3, "max_profile_tokens": 20}


def scaled(toy_trainer, start: float, **options):
    """A trainer in fp16 whose accelerator has the scaler that it would have on a GPU."""
    trainer = toy_trainer(**{**SHORT, **options}, fp16=True, use_cpu=True)
    assert trainer.autocast == torch.float16
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=start)
    return trainer


def in_four_bit(tmp_path):
    """The toy in NF4 with the compute dtype that `load_base` takes on a T4."""
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    quantization = BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=torch.float16)
    folder = toys.toy_folder(tmp_path / "toy")
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=torch.float16, device_map={"": "cpu"}
    )


@pytest.mark.parametrize("estimator", ["base", "mixed", "bootstrap"])
def test_fp16_with_a_scaler_trains_as_float32_does(toy_trainer, estimator):
    half = scaled(toy_trainer, 2.0**10, estimator=estimator)
    half.train()
    single = toy_trainer(**SHORT, estimator=estimator)
    single.train()
    assert half.accelerator.scaler.get_scale() == 2.0**10  # no step was skipped
    losses = [[log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in (half, single)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    trained = [p for p in half.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    moved = [p for name, p in half.model.named_parameters() if "lora_B" in name]
    assert all(p.abs().max() > 0 for p in moved)


def test_a_step_that_overflows_changes_no_weight(toy_trainer):
    trainer = scaled(toy_trainer, 2.0**40)
    seen = []
    step = trainer.accelerator.scaler.update

    def update(*args, **kwargs):
        moved = max(float(p.detach().abs().max()) for name, p in trainer.model.named_parameters() if "lora_B" in name)
        seen.append(moved)
        return step(*args, **kwargs)

    trainer.accelerator.scaler.update = update
    trainer.train()
    assert (len(seen), seen[0]) == (3, 0.0)
    assert trainer.accelerator.scaler.get_scale() < 2.0**40
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_a_four_bit_base_in_fp16_trains_with_a_scaler(toy_trainer, tmp_path):
    trainer = scaled(toy_trainer, 2.0**10, model=in_four_bit(tmp_path))
    dtypes = {str(p.dtype) for p in trainer.model.parameters()}
    assert dtypes == {"torch.float16", "torch.float32", "torch.uint8"}  # nowhere bf16
    trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters() if p.requires_grad)
    assert trainer.accelerator.scaler.get_scale() == 2.0**10


def test_half_precision_adapters_fail_in_the_scaler(toy_trainer):
    trainer = scaled(toy_trainer, 2.0**10)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.half()
    with pytest.raises(ValueError, match="unscale FP16 gradients"):
        trainer.train()


# What a GPU's recipe starts from


def test_a_card_trains_with_8_bit_adamw_and_checkpointing(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert compute_dtype(torch.device("cuda")) == torch.float16
    defaults = train_defaults(on_cpu=False)
    assert (defaults["optim"], defaults["gradient_checkpointing"]) == ("adamw_8bit", True)
    config = training_config(Recipe.model_validate({"data": {"path": "x.jsonl"}, "train": {"use_cpu": True}}))
    assert (config.fp16, config.bf16, config.optim) == (True, False, "adamw_8bit")


def test_checkpointing_is_without_re_entrancy(toy_trainer):
    trainer = toy_trainer(gradient_checkpointing=True, rows=toys.toy_rows(1, 3))
    trainer.train()
    layers = trainer.model.get_base_model().base_model.layers
    assert [layer._gradient_checkpointing_func.keywords for layer in layers] == [{"use_reentrant": False}] * 2
