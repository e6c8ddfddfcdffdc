"""What the tests run on the imitated card: recipes over toys, and steps of an 8B's shape."""

import gc
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import toys

from perce_lite.evaluation.bench.gpumeasuring import Place
from perce_lite.evaluation.bench.gpureport import recipe_of_report
from perce_lite.evaluation.bench.imitation.card import Card
from perce_lite.evaluation.bench.imitation.libraries import imitated
from perce_lite.evaluation.bench.randombase import random_base, write_shape
from perce_lite.evaluation.summary import train_and_measure
from perce_lite.model.host_embedding import keep_on_host
from perce_lite.planning.gpus import Gpu
from perce_lite.planning.plan import Plan, held, peak_of_a_step
from perce_lite.planning.row_lengths import Rows
from perce_lite.planning.shapes import known_config
from perce_lite.recipe import Recipe, load_recipe
from perce_lite.training.train import make_trainer
from perce_lite.training.trainer import PerCETrainer

_RECIPE = """
model: model
data: {path: rows.jsonl}
lora: {r: 4}
train: {max_steps: 2, max_length: 512, learning_rate: 1e-2}
evaluation: {max_rows: 2, max_new_tokens: 2}
"""


def toy_recipe(
    folder: Path, family: str = "chatml", more: Sequence[str] = (), rows: Sequence[dict[str, Any]] | None = None
) -> Recipe:
    """A recipe over a toy model in `folder`; more: overrides."""
    toys.toy_folder(folder / "model", family)
    lines = toys.toy_rows() if rows is None else rows
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "mine.yaml").write_text(_RECIPE)
    own = [f"train.output_dir={folder / 'out'}", f"train.store={folder / 'store'}"]
    return load_recipe(folder / "mine.yaml", [*own, *more])


def train(recipe: Recipe) -> dict[str, float]:
    """The held-out loss of base and adapter after what `perce-lite train` does."""
    loss = train_and_measure(recipe)["losses"][0]
    return {name: loss[name] for name in ("base", "adapter")}


@dataclass(frozen=True)
class Step:
    """The second step of a training whose tensors have shapes alone.

    peak, scoring: most live bytes in the step, and while the rows were scored; planned: the parts of `plan`
    planned_scoring: the most that `plan` says of rows that are scored in one batch
    counts, places: of the step alone, as those of `Card`
    """

    peak: int
    scoring: int
    planned: dict[str, int]
    planned_scoring: int
    counts: Counter[str]
    places: Counter[str]

    @property
    def planned_peak(self) -> int:
        return held(self.planned) + peak_of_a_step(self.planned)


def step_of_shape(
    folder: Path,
    shape: str = "Llama-3.1-8B",
    layers: int = 4,
    lengths: Sequence[int] = (2048,),
    card: dict[str, Any] | None = None,
    hosted: bool = False,
    **train: Any,
) -> Step:
    """A step over a batch of rows of these `lengths`, with a known model's shape cut to `layers` layers.

    card: options of `Card`; hosted: the embedding table on the host; train: fields of `train:`
    """
    config = known_config(shape)
    assert config is not None
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[-layers:]
    with imitated(shapes=True, memory=2**36, **(card or {})) as gpu:
        write_shape(config, folder / "shape")
        recipe = recipe_of_report(folder / "shape", max(lengths))
        own = {"per_device_train_batch_size": len(lengths), "max_steps": 2, "save_strategy": "no", "store": None}
        recipe = recipe.model_copy(
            update={
                "train": {**recipe.train, "output_dir": str(folder / "out"), **own, **train},
                "embedding_on_host": hosted,
            }
        )
        base = random_base(config, torch.bfloat16 if gpu.capability[0] >= 8 else torch.float16, torch.device("cuda", 0))
        if hosted:
            keep_on_host(base.model)
        place = Place(recipe, folder, 2, 0)
        rows = [place.rows(length, 1, 1)[0] for length in lengths]
        torch.cuda.reset_peak_memory_stats()
        trainer = make_trainer(recipe, base, rows)
        trainer.prepare()
        scoring = gpu.peak
        peak, counts, places = _watched(trainer, gpu)
    planned = _planned(recipe, trainer, gpu)
    return Step(peak, scoring, planned, counts, places)


def _watched(trainer: PerCETrainer, card: Card) -> tuple[int, Counter[str], Counter[str]]:
    """Trains; gives the peak, the counts and the places of the last step."""
    step, last = trainer.training_step, {}

    def watched(*args: Any, **kwargs: Any) -> Any:
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        last["counts"], last["places"] = Counter(card.counts), Counter(card.places)
        return step(*args, **kwargs)

    trainer.training_step = watched
    trainer.train()
    return card.peak, card.counts - last["counts"], card.places - last["places"]


def _planned(recipe: Recipe, trainer: PerCETrainer, card: Card) -> dict[str, int]:
    """What `plan` says of the rows that were trained."""
    pairs = trainer.pairs["train"]
    longest = max(len(pair.factual.ids) for pair in pairs)
    scored = max(sum(label != -100 for label in pair.factual.labels) for pair in pairs)
    prefix = max(pair.factual.prefix_length for pair in pairs)
    rows = Rows(longest, scored, longest, "as trained", prefix, longest - prefix)
    plan = Plan(recipe, None if trainer.args.packing else rows, triton=card.triton)
    return plan.parts(plan.choice, Gpu(card.name, card.memory, card.capability[0] >= 8))
