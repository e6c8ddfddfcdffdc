"""Trains several users at once: one forward of the base for all slots, a user in each."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from perce_lite.console import no_bars, say
from perce_lite.data.pairs import Audit, PairMaker, require
from perce_lite.data.rows import Row, of_split
from perce_lite.errors import ConfigError, NonFiniteLossError, PerceLiteError
from perce_lite.files import bytes_of, digest
from perce_lite.fleet.capacity import optimizer_of, users_at_once
from perce_lite.fleet.engines.protocol import FATAL_ERRORS, OnDone, OnProgress, Outcome, Task
from perce_lite.fleet.engines.sequential import SequentialEngine, figures_of
from perce_lite.fleet.registry import KEPT
from perce_lite.fleet.slot_lora import save_slot
from perce_lite.fleet.slot_trainer import SlotTrainer
from perce_lite.fleet.slot_user import Result, Unfinished, UserJob
from perce_lite.model.adapter_files import read_metadata
from perce_lite.model.adapter_weights import tensors
from perce_lite.model.fingerprint import fingerprint
from perce_lite.model.scoring import ScoringJob, cached_log_probs, store_of
from perce_lite.planning.oom_advice import explain_out_of_memory_in_fleet
from perce_lite.recipe import Recipe, lora_config, training_config
from perce_lite.training.held_out import held_out_jobs
from perce_lite.training.metadata import run_metadata
from perce_lite.words import counted


class SlotsEngine(SequentialEngine):
    """Trains users in `slots` at once; adapters of several users (shared, cohorts) one after another.

    Tasks of one recipe share the slots. Interrupted users resume from the last checkpoint of all slots.
    may_fall_back: train one after another, with a message, where slots do not support the recipe
    optimizer: `optim` where the recipe leaves it open; None: the default
    """

    def __init__(self, recipe: Recipe, slots: int, may_fall_back: bool = False, optimizer: str | None = None) -> None:
        super().__init__(recipe, slots)
        self._may_fall_back = may_fall_back
        self._options = {} if optimizer is None else {"optim": optimizer}

    def run(self, tasks: Iterator[Task], on_done: OnDone, on_progress: OnProgress) -> None:
        for (kind, recipe), group in itertools.groupby(tasks, lambda task: (task.key[0], task.recipe)):
            if kind == "user":
                self._train_in_slots(recipe, group, on_done, on_progress)
            else:
                super().run(group, on_done, on_progress)

    def _train_in_slots(self, recipe: Recipe, tasks: Iterator[Task], on_done: OnDone, on_progress: OnProgress) -> None:
        """Trains tasks that share a recipe; evaluates and saves each when it ends."""
        base, args = self._base(), training_config(recipe, **self._options)
        kept = Unfinished(self.kept or Path(args.output_dir) / KEPT)
        # Users who resume come first, in the order in which they shared a batch, those who failed included.
        order = {user: place for place, user in enumerate(kept.users)}
        first = list(itertools.islice(tasks, self.users + len(order)))
        first.sort(key=lambda task: order.get(task.key[1], len(order)))
        count = min(self.users, len(first))
        at_work: dict[str, tuple[Task, UserJob]] = {}

        def rows() -> list[Row]:
            return [row for task in ([task for task, _ in at_work.values()] or first) for row in task.rows]

        with explain_out_of_memory_in_fleet(recipe, count, rows, of_users=first[0].start is not None):
            try:
                engine = SlotTrainer(
                    base.model, base.tokenizer, args, lora_config(recipe), count, core=recipe.core_only
                )
            except ConfigError as error:
                if not self._may_fall_back:
                    raise
                say(f"One user after another: slots cannot do what the recipe asks for. {error}")
                super().run(itertools.chain(first, tasks), on_done, on_progress)
                return
            named = "".join(f", {optimizer}" for optimizer in self._options.values())
            say(f"{counted(count, 'user')} at once (fleet.slots){named}")
            try:
                with no_bars():
                    maker = PairMaker.of(recipe, base.tokenizer, args.max_length)
                    users = _Users(engine, maker, on_done, at_work)
                    users.train(itertools.chain(first, tasks), kept, fingerprint(base.model), on_progress)
            finally:
                engine.model.detach()


class _Users:
    """Feeds tasks of one recipe through a trainer's slots; `at_work`: the tasks in slots, by user."""

    def __init__(
        self, engine: SlotTrainer, maker: PairMaker, on_done: OnDone, at_work: dict[str, tuple[Task, UserJob]]
    ) -> None:
        self._engine, self._maker, self._on_done, self._at_work = engine, maker, on_done, at_work
        args = engine.args
        self._store = engine.store or store_of(args.store, engine.model.base, args.autocast)
        # What users start from, of each slot at the most: a cohort's users come from one mapping, which cores share.
        self._start_of = functools.lru_cache(maxsize=engine.model.slots)(_tensors)

    def train(self, tasks: Iterator[Task], kept: Unfinished, base: str, on_progress: OnProgress) -> None:
        """base: its fingerprint."""
        self._engine.run(self._jobs(tasks, base), self._ended, kept, on_progress)

    def _jobs(self, tasks: Iterator[Task], base: str) -> Iterator[UserJob]:
        for task in tasks:
            audit = Audit()
            stopping = task.recipe.early_stopping
            validation: list[ScoringJob] = []
            try:
                pairs = self._maker.make(of_split(task.rows, "train"), audit)
                require(pairs, audit, "training")
                if stopping.patience is not None:
                    jobs = held_out_jobs(self._maker, task.recipe, self._engine.args, task.rows, ["validation"])
                    validation = jobs.get("validation", [])
                start = None if task.start is None else self._start_of(task.start)
            except FATAL_ERRORS:
                raise
            except PerceLiteError as error:
                self._on_done(task, error)
                continue
            begun = digest([task.begun, base, str(self._engine.args.optim)])
            job = UserJob(task.key[1], pairs, adapter=start, begun=begun, validation=validation, stopping=stopping)
            self._at_work[job.user] = task, job
            yield job

    def _ended(self, result: Result) -> None:
        task, job = self._at_work.pop(result.user)
        self._on_done(task, self._finished(task, job, result) if result.error is None else result.error)

    def _finished(self, task: Task, job: UserJob, result: Result) -> Outcome | PerceLiteError:
        """Measures a user's held-out rows under the own adapter, the base, and what it started from; saves it."""
        args, model = self._engine.args, self._engine.model
        jobs = held_out_jobs(self._maker, task.recipe, args, task.rows)
        losses: dict[str, dict[str, float]] = {split: {} for split in jobs}
        for name in ("own", "base", "start"):
            if name == "start":
                model.load_slot(result.slot, model.fresh(args.seed) if job.adapter is None else job.adapter)
            for split, split_jobs in jobs.items():
                losses[split] |= figures_of(name, self._scored(split_jobs, None if name == "base" else result.slot))
        figures = {"losses": [], "weights": result.weights}
        template, kept = self._maker.tokenizer.chat_template, len(job.pairs)
        metadata = run_metadata(
            task.recipe, args, template, task.rows, kept, result.steps, task.run, figures, result.stopping
        )
        folder = task.folder / "adapter"
        try:
            save_slot(model, result.core or result.adapter, folder, metadata, task.storage)
        except NonFiniteLossError as error:
            return error
        weights = {**result.weights, "store_hits": result.store_hits}
        return Outcome(losses, weights, bytes_of(folder), model.parameters, result.stopping)

    def _scored(self, jobs: Sequence[ScoringJob], slot: int | None) -> list[Tensor]:
        """Log-probs of `jobs` with the adapter in `slot`, or under the bare base, from the store where it has them."""
        model, autocast = self._engine.model, self._engine.args.autocast
        if slot is None:
            return cached_log_probs(model.base, jobs, self._store, autocast, "base").log_probs
        with model.route.everything_to(slot):
            return cached_log_probs(model.base, jobs, None, autocast, "adapter", True, self._engine.prefixes).log_probs


def _tensors(folder: Path) -> dict[str, Tensor]:
    """An adapter's tensors by PEFT's names."""
    return tensors(Path(read_metadata(folder)["folder"]))


def engine_for(recipe: Recipe, sharers: int = 1) -> SequentialEngine:
    """The engine for a recipe: `fleet.slots` users at once, or one after another where that is 1.

    sharers: as `users_at_once`
    """
    count = users_at_once(recipe, sharers)
    if count == 1:
        return SequentialEngine(recipe)
    return SlotsEngine(recipe, count, recipe.fleet.slots == "auto", optimizer_of(recipe, count))
