"""What `perce-lite bench --gpu-report` measures over one base: memory by part, speed, slots of users, numerics."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from perce_lite.config import DTYPES
from perce_lite.console import no_bars
from perce_lite.data.pairs import PairMaker
from perce_lite.data.rows import Row, to_records
from perce_lite.errors import PerceLiteError
from perce_lite.evaluation.bench.arms import ARMS
from perce_lite.evaluation.bench.bench import summary
from perce_lite.evaluation.bench.children import out_of_memory
from perce_lite.evaluation.bench.exactrows import exact_rows
from perce_lite.evaluation.bench.measuring import Job, make, measured, peak_bytes, recipe_of, reset_peak
from perce_lite.evaluation.bench.randombase import random_base
from perce_lite.fleet.engines.sequential import bare
from perce_lite.fleet.slot_trainer import SlotTrainer
from perce_lite.fleet.slot_user import Result, UserJob
from perce_lite.model.base import Base, with_adapter
from perce_lite.model.fused_head import training_forward
from perce_lite.model.scoring import autocast_to, batch_log_probs, no_grad_eval, padded
from perce_lite.planning.oom_advice import free_gpu_memory
from perce_lite.recipe import Recipe, lora_config, training_config

SPEED = ("sft", "uniform", "base", "mixed", "bootstrap", "base-cold", "mixed-cold")
"""Arms of `measuring.ARMS` whose speed is told: plain SFT, and each estimator with a warm and a cold store."""

SLOT_TOKENS, SLOT_RANK = 64, 8
"""Of a user's row and adapter in slots, as `bench --fleet` has them."""

WORDS = [letter * length for length in range(1, 9) for letter in "abcdefgh"]
"""What rows are made of; in a tokenizer of bytes a word is as long as its letters."""


@dataclass(frozen=True)
class Place:
    """Where a report's measurements happen.

    recipe: its model is a folder with a configuration and a tokenizer; scratch: a folder for all that is written
    """

    recipe: Recipe
    scratch: Path
    steps: int
    warmup: int

    def rows(self, length: int, users: int, each: int) -> list[Row]:
        """`each` rows of `users` users, of `length` tokens."""
        return exact_rows(self.recipe, WORDS, length, users, each)

    def job(self, arm: str, rows: Sequence[Row], steps: int, warmup: int) -> Job:
        """One arm over `rows`; warm arms of one estimator share a store."""
        store = self.scratch / "stores" / (f"{arm}" if ARMS[arm].cold else str(ARMS[arm].store))
        places = {"store": str(store), "scratch": str(self.scratch), "result": str(self.scratch / "result.json")}
        return Job(arm, self.recipe.model_dump(mode="json"), to_records(rows), steps, warmup, **places)


def told(what: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `what` gives; where the memory does not do for it `out_of_memory`, where it cannot be done `refused`."""
    try:
        with no_bars():
            return what()
    except (MemoryError, RuntimeError, PerceLiteError) as error:
        if out_of_memory(error):
            return {"out_of_memory": (str(error).strip().splitlines() or ["no memory left"])[0]}
        if not isinstance(error, PerceLiteError):
            raise
        return {"refused": str(error)}
    finally:
        free_gpu_memory()


# Memory


def memory(place: Place, base: Base, length: int) -> dict[str, Any]:
    """Bytes by part of a training on one row of `length` tokens, estimator `base`.

    base, unquantized: the frozen weights on the device: in 4 bit with their constants, and the others
    adapter, gradients, optimizer: what is trained, and what goes with it
    scoring: what the scoring pass takes beside what is held
    working: what a step's peak holds beside these, so that base, unquantized, adapter, optimizer and working add up to
        it: activations, the gradients so far, a layer, the head
    total: the peak, of the step or of scoring; paged state is a part of it wherever it lies
    reserved, on a GPU: by torch's allocator. On a CPU working, scoring and total are the process's
    """
    job = place.job("base-cold", place.rows(length, 1, 1), 2, 0)
    _empty(Path(job.store))
    device = base.model.device
    held = frozen_bytes(base.model)
    with bare(base.model):
        reset_peak(device)
        before = peak_bytes(device)
        trainer = make(ARMS[job.arm], recipe_of(job), base, job.rows)
        scoring = peak_bytes(device)
        adapter = sum(parameter.nbytes for parameter in trainer.model.parameters() if parameter.requires_grad)
        reset_peak(device)
        trainer.train()
        peak = peak_bytes(device)
        states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    kept = [value for value in states if isinstance(value, Tensor)]
    paged = size_of([tensor for tensor in kept if "is_paged" in vars(tensor)])  # torch's allocator knows nothing of it
    parts = {
        **held,
        "adapter": adapter,
        "gradients": adapter,
        "optimizer": size_of(kept),
        "scoring": scoring - before,
    }
    peak += paged
    working = peak - sum(parts[name] for name in ("base", "unquantized", "adapter", "optimizer"))
    most = {"reserved": torch.cuda.max_memory_reserved(device)} if device.type == "cuda" else {}
    return {**parts, "working": working, "total": max(peak, scoring), **most}


def frozen_bytes(model: PreTrainedModel) -> dict[str, int]:
    """Bytes of a model's weights: `base`, in 4 bit with the constants of quantisation, and `unquantized`."""
    quantised = [module.weight for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    constants = [value for weight in quantised for value in weight.quant_state.as_dict().values()]
    constants += [weight.quant_state.offset for weight in quantised]  # a number in that dictionary, here a tensor
    base = sum(tensor.nbytes for tensor in [*quantised, *constants] if isinstance(tensor, Tensor))
    total = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    return {"base": base, "unquantized": total - sum(weight.nbytes for weight in quantised)}


def size_of(tensors: Sequence[Tensor]) -> int:
    """Bytes of the tensors' storages, each once: bitsandbytes' states share their tables of codes."""
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


# Speed


def speed(
    place: Place, base: Base, length: int, repeats: int, epochs: int, said: Callable[[str], None]
) -> dict[str, Any]:
    """Rows of `length` tokens, one a step; arms take turns. `speed`: by arm of `SPEED`, as `bench.summary` gives it;
    `runs`: every measurement.
    """
    rows = place.rows(length, 1, place.steps)

    def measurement(arm: str, steps: int, warmup: int) -> dict[str, Any]:
        with bare(base.model):
            return measured(place.job(arm, rows, steps, warmup), base)

    for arm in ("base", "mixed"):
        told(partial(measurement, arm, 0, 0))
    runs = []
    for repeat in range(repeats):
        shift = repeat * len(SPEED) // repeats
        by_arm: dict[str, Any] = {}
        for arm in [*SPEED[shift:], *SPEED[:shift]]:
            said(f"{arm}, repeat {repeat + 1} of {repeats}")
            if ARMS[arm].cold:
                _empty(Path(place.job(arm, rows, 0, 0).store))
            by_arm[arm] = told(partial(measurement, arm, place.steps, place.warmup))
        runs.append(by_arm)
    return {"speed": summary(SPEED, runs, epochs), "runs": runs}


def _empty(store: Path) -> None:
    """Removes what was scored before, so that it is scored again."""
    for file in store.rglob("*.safetensors") if store.is_dir() else []:
        file.unlink()


# Slots of users


def slots(place: Place, base: Base, users: int) -> dict[str, Any]:
    """`users` at once, a row of `SLOT_TOKENS` a step each, rank `SLOT_RANK`, their log-probs in a store.

    Gives `tokens_per_second`, `seconds` and `peak_bytes`. Time runs from the end of the first step on: making the users
    is not a part of it.
    """
    options = {"max_length": SLOT_TOKENS, "max_steps": place.steps, "store": str(place.scratch / "stores" / "slots")}
    recipe = place.recipe.model_copy(
        update={"train": {**place.recipe.train, **options}, "lora": {**place.recipe.lora, "r": SLOT_RANK}}
    )
    args = training_config(recipe)
    maker = PairMaker.of(recipe, base.tokenizer, args.max_length)
    pairs = maker.make(place.rows(SLOT_TOKENS, users, 1))
    engine = SlotTrainer(base.model, base.tokenizer, args, lora_config(recipe), users)
    try:
        _trained(engine, [UserJob(pair.row.user, [pair], max(1, place.warmup)) for pair in pairs])  # fills the store
        reset_peak(engine.device)
        ends = _trained(engine, [UserJob(pair.row.user, [pair], place.steps + 1) for pair in pairs])
        seconds = ends[-1] - ends[0]
        peak = peak_bytes(engine.device)
    finally:
        engine.model.detach()
    return {"tokens_per_second": users * place.steps * SLOT_TOKENS / seconds, "seconds": seconds, "peak_bytes": peak}


def _trained(engine: SlotTrainer, jobs: Sequence[UserJob]) -> list[float]:
    """Trains `jobs`; the second at which each step ended. Raises what one of them met."""
    results: list[Result] = []
    ends: list[float] = []
    engine.run(jobs, results.append, on_progress=lambda loss, done: ends.append(_now()))
    for result in results:
        if result.error is not None:
            raise result.error
    return ends


def _now() -> float:
    """Seconds, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# Numerics


def numerics(place: Place, config: PretrainedConfig, device: torch.device, length: int) -> dict[str, Any]:
    """How far bf16 and fp16 are from float32, with the same 4-bit weights: `config` with 4 layers and a smaller head.

    By dtype: `mean` and `max` difference of log-probs in nats, `cosine` of the adapter's gradient with float32's, and
    its `norm` over float32's; the loss is multiplied by 1,024 in all three, as a scaler would.
    """
    cut = type(config).from_dict(config.to_dict())
    text = cut.get_text_config()
    text.num_hidden_layers, text.vocab_size = min(4, text.num_hidden_layers), min(32768, text.vocab_size)
    base = random_base(cut, torch.float32, device)
    model = with_adapter(base.model, place.recipe)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    pair = PairMaker.of(place.recipe, base.tokenizer, length).make(place.rows(length, 1, 1))[0]
    batch = padded([pair.factual], 0, device)
    whole = {
        name: tensor
        for name, tensor in model.named_parameters()
        if not tensor.requires_grad and tensor.is_floating_point()
    }
    kept = {name: tensor.data for name, tensor in whole.items()}
    by_dtype = {}
    for name, dtype in {"float32": torch.float32, **DTYPES}.items():
        _compute_in(model, dtype)
        for key, parameter in whole.items():
            parameter.data = kept[key].to(dtype)
        by_dtype[name] = _log_probs_and_gradient(model, batch, dtype)
    reference, slope = by_dtype["float32"]
    return {
        name: {
            "mean": float((log_probs - reference).abs().mean()),
            "max": float((log_probs - reference).abs().max()),
            "cosine": float(torch.cosine_similarity(gradient, slope, 0)),
            "norm": float(gradient.norm() / slope.norm()),
        }
        for name, (log_probs, gradient) in by_dtype.items()
        if name != "float32"
    }


def _compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = dtype


def _log_probs_and_gradient(model: nn.Module, batch: dict[str, Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Log-probs (N,) of the scored tokens, and the adapter's gradient, one vector, both in float64 on the CPU."""
    autocast = None if dtype == torch.float32 else dtype
    forward = training_forward(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with no_grad_eval(model, adapters=True):
        scored = batch_log_probs(forward, batch, autocast).double().cpu()
    model.zero_grad()
    with autocast_to(batch["input_ids"].device, autocast):
        loss = -forward(**batch, use_cache=False).mean()
    (loss * 1024).backward()
    gradient = (
        torch.cat([parameter.grad.flatten().double().cpu() for parameter in trained if parameter.grad is not None])
        / 1024
    )
    return scored, gradient
