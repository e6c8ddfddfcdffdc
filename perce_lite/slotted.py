"""A fleet's users many at once: one forward of the base for all slots, a user in each."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor

from perce_lite.adapters import about
from perce_lite.console import no_bars, say
from perce_lite.engine import Result, SlotEngine, UserJob
from perce_lite.errors import ConfigError, NonFiniteLossError, PerceLiteError
from perce_lite.files import bytes_of
from perce_lite.footprint import adapter_bytes, config_of
from perce_lite.inprocess import EVERYBODYS, Done, Engine, OneByOne, Outcome, Task, held_out_jobs, loss_of
from perce_lite.pairs import Audit, Pair, PairMaker, require
from perce_lite.recipe import Recipe, lora_config, training_config
from perce_lite.rows import of_split
from perce_lite.score import Job, kept_log_probs, store_of
from perce_lite.slots import save_slot
from perce_lite.store import Store
from perce_lite.train import describe

_ROUNDS = 4  # users a slot between two looks at the book: what a kill can cost


class Slotted(OneByOne):
    """Trains users in `slots` at once; what others start from (everybody's adapter, a cohort's) one after another.

    Tasks of one recipe share the slots. A user who is stopped in the middle starts anew.
    may_fall_back: train one after another, and say so, where the recipe asks for what slots cannot do
    """

    def __init__(self, recipe: Recipe, slots: int, may_fall_back: bool = False) -> None:
        super().__init__(recipe)
        self._slots, self._may_fall_back = slots, may_fall_back

    def run(self, tasks: Iterator[Task], done: Done) -> None:
        for kind, group in itertools.groupby(tasks, lambda task: (task.key[0], task.recipe)):
            if kind[0] != "user":
                super().run(group, done)
                continue
            while chunk := list(itertools.islice(group, self._slots * _ROUNDS)):
                if not self._together(chunk, done):
                    super().run(iter(chunk), done)

    def _together(self, tasks: Sequence[Task], done: Done) -> bool:
        """Trains the tasks, all of one recipe, then measures and saves each; False where slots cannot."""
        recipe, base = tasks[0].recipe, self._base()
        args = training_config(recipe)
        maker = PairMaker.of(recipe, base.tokenizer, args.max_length)
        count = min(self._slots, len(tasks))
        try:
            engine = SlotEngine(base.model, base.tokenizer, args, lora_config(recipe), count)
        except ConfigError as error:
            if not self._may_fall_back:
                raise
            say(f"One user after another: slots cannot do what the recipe asks for. {error}")
            return False
        try:
            results: dict[str, Result] = {}
            pairs: dict[str, list[Pair]] = {}
            with no_bars():
                engine.run(self._jobs(tasks, maker, pairs, done), lambda result: results.update({result.user: result}))
                store = engine.store or store_of(args.store, base.model, args.autocast)
                for task in tasks:
                    result = results.get(task.key[1])
                    if result is not None:
                        done(task, self._finished(engine, store, maker, task, result, len(pairs[result.user])))
        finally:
            engine.model.detach()
        return True

    def _jobs(
        self, tasks: Sequence[Task], maker: PairMaker, pairs: dict[str, list[Pair]], done: Done
    ) -> Iterator[UserJob]:
        for task in tasks:
            audit = Audit()
            try:
                made = maker.make(of_split(task.rows, "train"), audit)
                require(made, audit, "training")
                start = None if task.start is None else _weights(task.start)
            except EVERYBODYS:
                raise
            except PerceLiteError as error:
                done(task, error)
                continue
            pairs[task.key[1]] = made
            yield UserJob(task.key[1], made, adapter=start)

    def _finished(
        self, engine: SlotEngine, store: Store | None, maker: PairMaker, task: Task, result: Result, kept: int
    ) -> Outcome | PerceLiteError:
        """Measures a user's held-out rows under the base, what it started from, and its own adapter; saves that.

        store: of the bare base; kept: the user's training rows
        """
        if result.error is not None:
            return result.error
        args, model = engine.args, engine.model
        jobs = held_out_jobs(maker, task.recipe, args, task.rows)
        losses: dict[str, dict[str, float]] = {split: {} for split in jobs}
        start = model.fresh(args.seed) if task.start is None else _weights(task.start)
        for name, state in (("base", None), ("start", start), ("own", result.adapter)):
            for split, some in jobs.items():
                losses[split] |= loss_of(name, _scored(engine, store, some, state))
        figures = {"losses": [], "weights": result.weights}
        template = maker.tokenizer.chat_template
        told = describe(task.recipe, args, template, task.rows, kept, result.steps, task.run, figures)
        folder = task.folder / "adapter"
        try:
            save_slot(model, result.adapter, folder, told)
        except NonFiniteLossError as error:
            return error
        return Outcome(losses, {**result.weights, "store_hits": result.store_hits}, bytes_of(folder))


def _scored(
    engine: SlotEngine, store: Store | None, jobs: Sequence[Job], state: dict[str, Tensor] | None
) -> list[Tensor]:
    """Log-probs of `jobs` under the bare base (from `store` where it has them), or with `state` in the first slot."""
    model, args = engine.model, engine.args
    if state is None:
        return kept_log_probs(model.base, jobs, store, args.autocast, "base").log_probs
    model.load_slot(0, state)
    with model.route.everything_to(0):
        return kept_log_probs(model.base, jobs, None, args.autocast, "adapter", True, engine.prefixes).log_probs


def _weights(folder: Path) -> dict[str, Tensor]:
    """An adapter's tensors by PEFT's names."""
    return load_file(Path(about(folder)["folder"]) / "adapter_model.safetensors")


def engine_for(recipe: Recipe) -> Engine:
    """What trains this recipe's fleet: `fleet.slots` users at once, or one after another where that is 1."""
    wanted = recipe.fleet.slots
    count = slots_that_fit(recipe) if wanted == "auto" else wanted
    if count == 1:
        return OneByOne(recipe)
    say(f"{count} users at once (fleet.slots)")
    return Slotted(recipe, count, may_fall_back=wanted == "auto")


def slots_that_fit(recipe: Recipe) -> int:
    """As many users at once as half of the free memory takes, 1 to 16.

    A user takes its adapter four times (weights, gradients, two moments) and what its rows keep for the backward,
    estimated for the longest row: 34 bytes a token, layer and hidden unit, or 2 with gradient checkpointing.
    """
    args = training_config(recipe)
    config = config_of(recipe).get_text_config()
    kept = 2 if args.gradient_checkpointing else 34
    tokens = args.per_device_train_batch_size * (args.max_length or 1024)
    one = 4 * adapter_bytes(recipe) + tokens * config.num_hidden_layers * config.hidden_size * kept
    free = psutil.virtual_memory().available if args.use_cpu else torch.cuda.mem_get_info()[0]
    return max(1, min(16, int(free / 2 / one)))
