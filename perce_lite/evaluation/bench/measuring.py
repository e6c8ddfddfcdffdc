"""One measurement of `perce-lite bench`: one arm trains a few steps in a process of its own.

`python -m perce_lite.evaluation.bench.measuring JOB.json`; see `perce_lite.evaluation.bench.children`.
"""

import gc
import itertools
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import PrinterCallback, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from perce_lite.data.collator import PairCollator
from perce_lite.data.pairs import IGNORED, PairMaker
from perce_lite.data.rows import from_columns
from perce_lite.evaluation.bench import children
from perce_lite.evaluation.bench.arms import ARMS, Arm
from perce_lite.files import bytes_of, digest
from perce_lite.model.base import Base, load_base
from perce_lite.recipe import Recipe, lora_config, training_config
from perce_lite.training.reference_logprobs import trained_tokens
from perce_lite.training.train import make_trainer
from perce_lite.training.trainer import PerCETrainer

STILL = {
    "logging_strategy": "no",
    "logging_first_step": False,
    "save_strategy": "no",
    "eval_strategy": "no",
    "eval_on_start": False,
    "report_to": "none",
    "push_to_hub": False,
    "train_sampling_strategy": "sequential",
    "shuffle_dataset": False,
    "packing": False,
    "train_on": "factual",
    "profile_pass": "full",
}
"""Options under which a training only trains, its rows in their order."""


@dataclass(frozen=True)
class Job:
    """What one process measures; every field is what JSON can hold.

    arm: a name of `ARMS`
    recipe: a `Recipe`, as `model_dump(mode="json")` gives it
    rows: records of `to_records`, `steps` batches of them in their order
    steps, warmup: optimizer steps; 0 steps: nothing is trained, the store is filled
    store, scratch, result: a folder, a folder for all else, and the file that the figures go to
    """

    arm: str
    recipe: dict[str, Any]
    rows: list[dict[str, Any]]
    steps: int
    warmup: int
    store: str
    scratch: str
    result: str


class Clock(TrainerCallback):
    """Seconds of each step, from the end of one to the end of the next: fetching and collating the batch count."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark()

    def _mark(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())

    def seconds(self, warmup: int) -> list[float]:
        """Of the steps after the first `warmup`."""
        return [after - before for before, after in itertools.pairwise(self.marks[warmup:])]


class HandWrittenTrainer(SFTTrainer):
    """PerContrast the obvious way: two passes of the model in training, full logits each, weights from their ratio."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of `bootstrap`, divided by the label tokens of the accumulation window."""
        inputs.pop("row")
        factual = _full_log_probs(model, inputs)
        with torch.no_grad():
            counterfactual = _full_log_probs(model, inputs["counterfactual"])
        weights = 1 + self.args.strength * (factual.detach() - counterfactual).clamp(0, self.args.clip_max)
        return -(weights * factual).sum() / num_items_in_batch


def _full_log_probs(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Log-probs (N,) of a batch's scored tokens, row after row, by way of all logits (B, T, V)."""
    labels = inputs["labels"][:, 1:]
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
    log_probs = log_softmax(logits[:, :-1].float(), -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return log_probs[labels != IGNORED]


def measure(job: Job) -> dict[str, Any]:
    """Trains the job's arm; gives seconds, bytes and tokens.

    Keys: `step_seconds` of each step after warm-up, `scoring_seconds` (reading a warm store included), `peak_bytes`
    with `peak_of` (see `reset_peak`), `activation_bytes`, `adapter_bytes`, `store_bytes`, `store_hits` (share of scored
    sequences), `tokens` and `digest` of the rows as they are trained on, `trained_tokens` (warm-up included), `loss`,
    `machine`.
    """
    return measured(job, load_base(recipe_of(job)))


def measured(job: Job, base: Base) -> dict[str, Any]:
    """What `measure` gives, over a base that is there already; it keeps the adapter and the trainer's forward."""
    arm, recipe = ARMS[job.arm], recipe_of(job)
    device = base.model.device
    peak_of = reset_peak(device)
    trainer = make(arm, recipe, base, job.rows)
    if isinstance(trainer, PerCETrainer):
        trainer.prepare()  # a job without steps fills the store
    trainer.remove_callback(PrinterCallback)
    clock = Clock()
    trainer.add_callback(clock)
    loss = trainer.train().training_loss if job.steps else None
    peak = peak_bytes(device)
    adapter = Path(job.scratch) / "adapter"
    trainer.model.save_pretrained(adapter)
    ours = isinstance(trainer, PerCETrainer)
    token_count = int(trainer._total_train_tokens) if arm.kind != "hand-written" else None
    passes = [trained_tokens(pair, trainer.args) for pair in trainer.pairs["train"]] if ours else []
    ids = [tokens.ids for tokens in passes] or list(trainer.train_dataset["input_ids"])
    labels = [tokens.labels for tokens in passes] or list(trainer.train_dataset["labels"])
    return {
        "step_seconds": clock.seconds(job.warmup),
        "scoring_seconds": trainer.scoring_seconds if ours else 0.0,
        "store_hits": trainer.store_hits if ours else None,
        "peak_bytes": peak,
        "peak_of": peak_of,
        "activation_bytes": activation_bytes(trainer) if job.steps and arm.kind != "hand-written" else None,
        "adapter_bytes": _bytes(adapter),
        "store_bytes": _bytes(Path(job.store)) if arm.store is not None else 0,
        "tokens": sum(map(len, ids)),
        "digest": digest([ids, labels]),
        "trained_tokens": token_count,
        "loss": loss,
        "machine": machine(device),
    }


def activation_bytes(trainer: SFTTrainer) -> int:
    """What the forward of a training step keeps for its backward, parameters left out: of the first batch."""
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in trainer.model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    trainer.model.train()
    tokens = int((batch["labels"] != IGNORED).sum())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=tokens)
    del loss
    return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in parameters)


def recipe_of(job: Job) -> Recipe:
    """The job's recipe with the arm's options, rows in their order, and nothing logged, saved or evaluated."""
    arm = ARMS[job.arm]
    own = {
        "max_steps": job.warmup + job.steps,
        "output_dir": str(Path(job.scratch) / "out"),
        "store": job.store if arm.store is not None else None,
    }
    recipe = Recipe.model_validate(job.recipe)
    return recipe.model_copy(update={"train": {**recipe.train, **STILL, **own, **arm.options}})


def make(arm: Arm, recipe: Recipe, base: Base, records: Sequence[dict[str, Any]]) -> Any:
    """The arm's trainer over `records`, with the recipe's LoRA on `base`."""
    rows = [replace(from_columns(record, f"row {number}"), split="train") for number, record in enumerate(records)]
    if arm.kind == "perce":
        return make_trainer(recipe, base, rows)
    config: SFTConfig = training_config(recipe)
    pairs = PairMaker.of(recipe, base.tokenizer, config.max_length).make(rows)
    columns = {"input_ids": [pair.factual.ids for pair in pairs], "labels": [pair.factual.labels for pair in pairs]}
    set_seed(config.seed)
    shared = {"processing_class": base.tokenizer, "peft_config": lora_config(recipe)}
    if arm.kind == "hand-written":
        columns["row"] = [[index] * len(pair.factual) for index, pair in enumerate(pairs)]
        twins = [{"input_ids": pair.counterfactual.ids, "labels": pair.counterfactual.labels} for pair in pairs]
        collator = PairCollator(pad_token_id=_pad_id(base), counterfactuals=twins)
        data = datasets.Dataset.from_dict(columns)
        return HandWrittenTrainer(base.model, config, train_dataset=data, data_collator=collator, **shared)
    trainer = SFTTrainer(base.model, config, train_dataset=datasets.Dataset.from_dict(columns), **shared)
    if arm.kind == "trl-fp32":
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return trainer


def _pad_id(base: Base) -> int:
    """As TRL chooses it."""
    tokenizer = base.tokenizer
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def reset_peak(device: torch.device) -> Literal["training", "process"]:
    """Starts the peak anew, so that loading the base does not count; says what a peak read later is the peak of.

    CUDA: the allocator's. Linux: the kernel's, `VmHWM`. Elsewhere it cannot be started anew, and loading counts.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return "training"
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # another system, or a container that forbids it
        return "process"
    return "training"


def peak_bytes(device: torch.device) -> int:
    """CUDA: most that the allocator held (`max_memory_allocated`). CPU: largest resident set, the base included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    lines = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")] if status.is_file() else []
    if lines:
        return int(lines[0].split()[1]) * 1024
    import resource  # not on Windows, where a GPU's peak can be read all the same

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def machine(device: torch.device) -> dict[str, Any]:
    """What it was measured on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "device": device.type,
        "name": name or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _bytes(folder: Path) -> int:
    return sum(map(bytes_of, folder.rglob("*.safetensors")))


if __name__ == "__main__":
    children.main(Job, measure)
