"""A step of a real training on an imitated card, with shapes alone: its peak beside the plan's; `plan --imitate`."""

import contextlib
import gc
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from perce_lite.config import chosen_dtype
from perce_lite.console import no_bars, progress_bar
from perce_lite.data.pairs import PairMaker
from perce_lite.data.readers import read_rows
from perce_lite.data.rows import Row, of_split
from perce_lite.errors import DataError, ModelError, TemplateError
from perce_lite.evaluation.bench.exactrows import TEMPLATE, exact_rows
from perce_lite.evaluation.bench.imitation.card import Card, attention_kernels
from perce_lite.evaluation.bench.imitation.libraries import imitated
from perce_lite.evaluation.bench.imitation.tensors import CUDA
from perce_lite.evaluation.bench.randombase import random_base, write_shape
from perce_lite.model.base import load_tokenizer
from perce_lite.model.host_embedding import keep_on_host
from perce_lite.model.scoring import GPU_TOKENS
from perce_lite.planning.gpus import GIB, Gpu
from perce_lite.planning.plan import SPILL, Plan, held, peak_of_a_step
from perce_lite.planning.row_lengths import Rows, longest_pass
from perce_lite.recipe import Recipe
from perce_lite.training.reference_logprobs import scored_passes, trained_tokens
from perce_lite.training.train import make_trainer
from perce_lite.training.trainer import PerCETrainer

ENDLESS = 4096 * GIB
"""Memory of the card, so that what does not fit can be measured too."""

_WORDS = [letter * length for length in (*range(1, 9), 64, 512) for letter in "abcdefgh"]
"""What rows are made of: a letter is a token, and long words make up long rows."""

_QUIETLY = {
    "max_steps": 2,
    "num_train_epochs": 2,
    "store": None,
    "save_strategy": "no",
    "eval_strategy": "no",
    "eval_on_start": False,
    "load_best_model_at_end": False,
    "logging_strategy": "no",
    "report_to": "none",
    "push_to_hub": False,
}
"""Two steps, of which the second finds the optimizer's state; nothing is kept."""


@dataclass(frozen=True)
class Step:
    """The second step of a training whose tensors have shapes alone; bytes.

    made, scoring, peak: with base and adapter there, the most while the rows were scored, the most in the step
    planned: the parts of `plan` for the same rows; planned_scoring: its peak of scoring as many at once
    counts, places: of the step alone, as those of `Card`
    rows: as long as they were trained
    """

    made: int
    scoring: int
    peak: int
    planned: dict[str, int]
    planned_scoring: int
    counts: Counter[str]
    places: Counter[str]
    rows: Rows

    @property
    def planned_made(self) -> int:
        return sum(self.planned[part] for part in ("base", "unquantized", "adapter"))

    @property
    def planned_peak(self) -> int:
        return held(self.planned) + peak_of_a_step(self.planned)

    @property
    def attention(self) -> dict[str, int]:
        """How often each attention kernel ran, by name."""
        return attention_kernels(self.counts)


def imitate(recipe: Recipe, gpu: Gpu) -> dict[str, Any]:
    """What `perce-lite plan --imitate` shows: a step of the recipe with its longest rows, over a base of random shapes.

    The rows are the recipe's own where data and tokenizer are at hand, else made of words. Of an accumulation window
    two batches are enough: the second finds the gradients of the first.

    Gives `card`, `rows`, `parts` (by name: bytes by the formulas, and as imitated), `total` (with what the allocator
    loses and CUDA takes), `bytes` and `fits` of the GPU, `attention` (kernels that ran), `waits` (of the host in a
    step) and `seconds`.

    Raises:
        ModelError, PlanError: as `Plan`; BenchError: rows so short that none can be made up.
    """
    started = time.perf_counter()
    plan = Plan(recipe)
    batches = min(2, plan.choice.accumulation)
    with tempfile.TemporaryDirectory(prefix="perce-lite-imitate-") as folder, progress_bar() as bar:
        task = bar.add_task("Imitating a GPU", total=3 + 2 * batches, note="reading the rows")

        def now(note: str) -> None:
            bar.update(task, note=note, advance=1)
            bar.refresh()

        options = {"output_dir": str(Path(folder) / "out"), "gradient_accumulation_steps": batches}
        recipe = recipe.model_copy(update={"device": "auto", "train": {**recipe.train, **options}})
        with no_bars():
            recipe, rows = _with_rows(recipe, plan, plan.choice.batch * batches, Path(folder))
            capability = (8, 6) if gpu.bf16 else (7, 5)
            with imitated(capability=capability, memory=ENDLESS, shapes=True, triton=plan.triton) as card:
                step = step_of(card, recipe, plan.config, rows, now)
    return {**_judged(step, gpu), "seconds": time.perf_counter() - started}


def _judged(step: Step, gpu: Gpu) -> dict[str, Any]:
    """What `imitate` gives of a step."""
    lost = int(SPILL * (step.peak - held(step.planned)))
    alone = step.planned_made + int((1 + SPILL) * step.planned["scoring_alone"])
    total = max(step.peak + lost, alone) + step.planned["context"]
    return {
        "card": gpu.name,
        "rows": {"longest": step.rows.length, "with_loss": step.rows.scored, "source": step.rows.source},
        "parts": {
            "base and adapter": (step.planned_made, step.made),
            "peak of scoring": (step.planned_scoring, step.scoring),
            "peak of the step": (step.planned_peak, step.peak),
        },
        "total": total,
        "bytes": gpu.bytes,
        "fits": total <= gpu.bytes,
        "attention": step.attention,
        "waits": step.counts["synchronisations"],
    }


# Rows


def _with_rows(recipe: Recipe, plan: Plan, count: int, folder: Path) -> tuple[Recipe, list[Row]]:
    """The recipe, whose model may have become a folder with a tokenizer alone, and `count` of its longest rows."""
    if plan.at_hand and not plan.packs:
        with contextlib.suppress(ModelError, DataError, TemplateError):  # as `rows_of` does
            return recipe, _own_rows(recipe, plan, count)
    write_shape(plan.config, folder / "shape")
    made = {"model": str(folder / "shape"), "template": TEMPLATE}
    train = {name: value for name, value in recipe.train.items() if name != "chat_template_path"}
    recipe = recipe.model_copy(update={**made, "train": {**train, "max_length": plan.rows.length}})
    if plan.packs:  # two fill one
        return recipe, exact_rows(recipe, _WORDS, plan.rows.length // 2, 1, 2 * count)
    return recipe, exact_rows(recipe, _WORDS, plan.rows.length, 1, count)


def _own_rows(recipe: Recipe, plan: Plan, count: int) -> list[Row]:
    maker = PairMaker.of(recipe, load_tokenizer(recipe), plan.limit)
    pairs = maker.make(of_split(read_rows(recipe), "train"))
    if not pairs:
        raise DataError("no row is left")
    bare = recipe.train.get("train_on") == "counterfactual"
    longest = sorted(pairs, key=lambda pair: -len((pair.counterfactual if bare else pair.factual).ids))
    return [pair.row for pair in longest[:count]]


# The step


def step_of(
    card: Card, recipe: Recipe, config: PretrainedConfig, rows: Sequence[Row], now: Callable[[str], None] | None = None
) -> Step:
    """The second step of the recipe's training on `rows`, over a base of the shape `config`. Call it inside `imitated`.

    recipe: its model is a folder, a built-in model or a Hub id that is on this machine, for the tokenizer
    now: is told what is being done
    """
    progress = now or (lambda note: None)
    progress("making the base")
    quantized = recipe.quantization == "nf4"
    made = random_base(config, chosen_dtype(recipe.dtype, CUDA), CUDA, quantized=quantized)
    base = replace(made, tokenizer=load_tokenizer(recipe))
    if recipe.embedding_on_host:
        keep_on_host(base.model)
    progress("scoring")
    recipe = recipe.model_copy(update={"train": {**recipe.train, **_QUIETLY}})
    trainer = make_trainer(recipe, base, rows)
    gc.collect()
    held_before = card.allocated
    torch.cuda.reset_peak_memory_stats()
    trainer.prepare()
    scoring = card.peak
    peak, counts, places = _last_step(trainer, card, progress)
    trained = _as_trained(trainer)
    plan = Plan(recipe, None if trainer.args.packing else trained, triton=card.triton)
    gpu = Gpu(card.name, card.memory, card.capability[0] >= 8)
    parts = plan.parts(plan.choice, gpu)
    together = 0 if parts["scoring"] == 0 else plan.scoring_pass(plan.choice, gpu, _scored_together(trainer))
    before = sum(parts[part] for part in ("base", "unquantized", "adapter"))
    return Step(held_before, scoring, peak, parts, before + together, counts, places, trained)


def _last_step(
    trainer: PerCETrainer, card: Card, progress: Callable[[str], None]
) -> tuple[int, Counter[str], Counter[str]]:
    """Trains; gives the peak, the counts and the places of the last batch with the optimizer's step behind it."""
    step, last = trainer.training_step, {}

    def watched(*args: Any, **kwargs: Any) -> Any:
        progress("a step of training")
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        last["counts"], last["places"] = Counter(card.counts), Counter(card.places)
        return step(*args, **kwargs)

    trainer.training_step = watched
    trainer.train()
    return card.peak, card.counts - last["counts"], card.places - last["places"]


def _as_trained(trainer: PerCETrainer) -> Rows:
    """The longest row of a trainer, as `plan` takes it."""
    pairs = trainer.pairs["train"]
    passes = [trained_tokens(pair, trainer.args) for pair in pairs]
    return longest_pass(pairs, passes, f"the longest of {len(pairs)} rows that were trained")


def _scored_together(trainer: PerCETrainer) -> int:
    """How many sequences the first batch of scoring has."""
    passes = scored_passes(trainer.args)
    lengths = [len(pair.factual) for pair in trainer.pairs["train"]]
    return min(len(passes) * len(lengths), max(1, GPU_TOKENS // max(lengths)))
