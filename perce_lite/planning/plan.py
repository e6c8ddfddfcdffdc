"""Will it fit? Memory by part before a run, per GPU: the longest row, the largest batch, the smallest change."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from transformers import PretrainedConfig

from perce_lite.config import PerCEConfig
from perce_lite.data.pairs import most_that_fit
from perce_lite.model.compat import head_projects_scored_positions_only
from perce_lite.model.float16 import overflow_of
from perce_lite.model.host_embedding import tied
from perce_lite.model.prefix_cache import MAX_CACHED_BYTES
from perce_lite.model.repeated_heads import fused_attention_shares_heads
from perce_lite.model.scoring import GPU_TOKENS
from perce_lite.planning import parts as memory
from perce_lite.planning.gpus import GIB, Gpu
from perce_lite.planning.row_lengths import NO_LIMIT, Rows, packed, rows_of
from perce_lite.planning.shapes import KNOWN, model_config, shape_of
from perce_lite.recipe import Recipe, train_defaults

CONTEXT = int(0.45 * GIB)
"""Bytes that CUDA, cuBLAS and loaded kernels take. Experience, not measured here."""

SPILL = 0.06
"""Share of what a step allocates and frees that the allocator cannot use again. Experience, not measured here."""

CUDA = torch.device("cuda")

MOST_USERS = 16
"""Users at once that `fleet.slots: auto` takes at the most."""


@dataclass(frozen=True)
class Choice:
    """What a recipe may change to need less memory. `rank` None: as its `lora` has it.

    users: trained at once in slots, each with a batch and an optimizer of their own
    """

    batch: int
    accumulation: int
    length: int
    checkpointing: bool
    offload: bool
    optim: str
    quantization: str
    embedding_on_host: bool = False
    profile_pass: str = "full"
    rank: int | None = None
    users: int = 1


Need = Callable[[Choice, Gpu], int]
"""Bytes that something takes on a GPU."""


class Plan:
    """A recipe's memory on any GPU. No weights are loaded: the model is there on the meta device alone.

    rows: what batches are made of; None: as the recipe's data says, else `train.max_length`
    on_cpu: with a recipe's defaults for a CPU, which has no context of CUDA and works in float32
    triton: whether the GPU's machine has Triton; None: as this machine, where that has a GPU

    Raises:
        ModelError: the model's configuration can neither be read nor is it known by heart; or its head is tied to the
            embedding table, which `embedding_on_host` is to keep off the GPU.
        PlanError: a family whose memory is not known beforehand.
    """

    def __init__(
        self, recipe: Recipe, rows: Rows | None = None, on_cpu: bool = False, triton: bool | None = None
    ) -> None:
        self.recipe, self.on_cpu = recipe, on_cpu
        self.triton = (
            not torch.cuda.is_available() or head_projects_scored_positions_only(CUDA) if triton is None else triton
        )
        self.config, self.at_hand = model_config(recipe)
        self.shape = shape_of(self.config)
        if recipe.embedding_on_host and _is_tied(self.config):
            raise tied(self.config.model_type)
        self._train = {**train_defaults(on_cpu), **recipe.train}
        self.positions: int = self.config.get_text_config().max_position_embeddings
        self.limit: int | None = self._option("max_length")
        self.packs = bool(self._option("packing"))
        full = packed(self.limit or NO_LIMIT) if self.packs else None
        self.rows = rows or full or rows_of(recipe, self.limit, self.positions, self.at_hand)
        self.itemsize = memory.FLOAT32 if on_cpu or recipe.dtype == "float32" else 2
        self.context = 0 if on_cpu else CONTEXT
        self.choice = Choice(
            batch=self._option("per_device_train_batch_size"),
            accumulation=self._option("gradient_accumulation_steps"),
            length=self.rows.length,
            checkpointing=bool(self._option("gradient_checkpointing")),
            offload=bool(self._option("activation_offloading")),
            optim=str(self._option("optim")),
            quantization=recipe.quantization,
            embedding_on_host=recipe.embedding_on_host,
            profile_pass=recipe.profile_pass,
        )
        self._weights = lru_cache(maxsize=16)(self._weights_of)

    def parts(self, choice: Choice, gpu: Gpu) -> dict[str, int]:
        """Bytes by part, and the sum at the peak as `total`."""
        weights = self._weights(choice.rank, choice.quantization)
        step = self._step(choice, gpu)
        kept = {name: memory.saved(self.shape, weights, step, name) for name in (True, False)}
        saved = kept[choice.checkpointing]
        goes = 0 if choice.offload else saved
        if choice.offload:
            saved = min(saved, memory.kept_by_offloading(self.shape, weights, step, choice.checkpointing))
        layer = memory.layer_at_work(self.shape, weights, step, choice.checkpointing)
        ahead = memory.gradients_ahead(weights, step, choice.accumulation)
        behind = 0 if ahead else memory.gradients_behind(self.shape, weights, step, goes)
        sizes = {
            "base": weights.base,
            "unquantized": weights.unquantized - (weights.table if choice.embedding_on_host else 0),
            "adapter": memory.FLOAT32 * weights.elements(choice.users),
            "gradients": memory.FLOAT32 * choice.users * sum(weights.by_user),
            "optimizer": choice.users * memory.optimizer_bytes(weights.by_user, choice.optim),
            "saved": saved,
            "saved_with_checkpointing": kept[True],
            "saved_without": kept[False],
            "layer": layer + behind,
            "attention": memory.attention(self.shape, step),
            "head": memory.head_at_work(self.shape, step) + memory.casts(weights, step),
            "prefixes": max(memory.prefixes(self.shape, step), MAX_CACHED_BYTES) if step.prefix else 0,
            "reading": memory.reading(self.shape, weights, step),
            "gradients_ahead": ahead,
            **self._scoring(choice, gpu),
        }
        return {**sizes, **self._sum(sizes)}

    def _sum(self, parts: dict[str, int]) -> dict[str, int]:
        """The peak of training or of the scoring before it, with what is lost and what CUDA takes."""
        step, scoring = peak_of_a_step(parts), parts["scoring_alone"]
        training = held(parts) + int((1 + SPILL) * step)
        before = parts["base"] + parts["unquantized"] + parts["adapter"] + int((1 + SPILL) * scoring)
        spill = int(SPILL * (step if training >= before else scoring))
        return {"spill": spill, "context": self.context, "total": max(training, before) + self.context}

    def _scoring(self, choice: Choice, gpu: Gpu) -> dict[str, int]:
        """What the scoring pass takes with the batches that it tries first, and with one row at a time."""
        if self._option("estimator") == "uniform":
            return {"scoring": 0, "scoring_alone": 0, "scoring_rows": 0}
        rows = 1 if self.on_cpu else max(1, GPU_TOKENS // self._read(choice.length))
        many, alone = (self.scoring_pass(choice, gpu, count) for count in (rows, 1))
        return {"scoring": many, "scoring_alone": alone, "scoring_rows": rows}

    def training(self, choice: Choice, gpu: Gpu) -> int:
        """Bytes of training at its peak."""
        return self.parts(choice, gpu)["total"]

    def scoring(self, choice: Choice, gpu: Gpu) -> int:
        """Bytes of scoring with an adapter on, at its peak: what `eval` and `inspect` need."""
        parts = self.parts(choice, gpu)
        lasting = parts["base"] + parts["unquantized"] + parts["adapter"] + parts["prefixes"]
        return lasting + int((1 + SPILL) * self.scoring_pass(choice, gpu, adapters=True)) + parts["context"]

    def scoring_pass(self, choice: Choice, gpu: Gpu, rows: int = 1, adapters: bool = False) -> int:
        """Bytes that work while `rows` of the longest rows are scored together, with the adapters off or on."""
        step = self._step(choice, gpu)
        batch = step._replace(rows=rows, length=self._read(choice.length), scored=min(step.scored, choice.length))
        return memory.scoring(self.shape, self._weights(choice.rank, choice.quantization), batch, adapters)

    def fits(self, choice: Choice, gpu: Gpu, need: Need | None = None) -> bool:
        """Whether `need` (training where it is None) stays within what a program sees of the GPU."""
        return (need or self.training)(choice, gpu) <= gpu.bytes

    def longest_row(self, choice: Choice, gpu: Gpu, need: Need | None = None) -> int:
        """Tokens of the longest row that fits with the batch of `choice`, at most what the model can read; 0: none."""
        return 16 * most_that_fit(
            self.positions // 16, lambda many: self.fits(replace(choice, length=16 * many), gpu, need)
        )

    def largest_batch(self, choice: Choice, gpu: Gpu) -> int:
        """Rows of a batch of the longest rows that fits; 0: not even one."""
        return most_that_fit(256, lambda many: self.fits(replace(choice, batch=many), gpu))

    def most_users(self, choice: Choice, gpu: Gpu) -> int:
        """Users at once in slots that fit, at most `MOST_USERS`; 0: not even one. Slots do not pack rows."""
        if self.packs:
            return int(self.fits(choice, gpu))
        return most_that_fit(MOST_USERS, lambda many: self.fits(replace(choice, users=many), gpu))

    def smallest_change(self, gpu: Gpu, scoring: bool = False) -> tuple[list[str], Choice] | None:
        """The fewest and mildest overrides of the recipe with which it fits on `gpu`; None: nothing in it would do.

        In this order: what costs time alone, then what changes the rows, then what changes the adapter.

        scoring: it is to be scored with an adapter that is there, not trained
        """
        need = self.scoring if scoring else self.training
        in_training = () if scoring else (self._batches(), self._offloaded(), self._frozen_profile(), self._ranks())
        groups = (self._cheaper(scoring), *in_training)
        kinds = [kind for kind in map(list, groups) if kind]
        shorter: list[bool] = [False, True]
        ways = [
            (len(chosen) + cut, chosen, cut)
            for many in range(len(kinds) + 1)
            for chosen in itertools.combinations(kinds, many)
            for cut in shorter
        ]
        for count, chosen, cut in sorted(ways, key=lambda way: (way[0], way[2])):
            for changes in itertools.product(*chosen) if count else ():
                choice = self.choice
                words: list[str] = []
                for values, overrides in changes:
                    choice, words = replace(choice, **values), [*words, *overrides]
                if cut:
                    length = min(self.longest_row(choice, gpu, need), choice.length - 1) // 64 * 64
                    if length < 128:
                        continue
                    choice, words = replace(choice, length=length), [*words, f"train.max_length={length}"]
                if self.fits(choice, gpu, need):
                    return words, choice
        return None

    def smaller_model(self, gpu: Gpu) -> list[str] | None:
        """The overrides that take the first model known by heart with which the recipe, else as it is, fits on `gpu`.

        A table that has to stay on the GPU, since the head is tied to it, is left there.
        """
        for name in KNOWN.values():
            recipe = self.recipe.model_copy(update={"model": name})
            words = [f"model={name}"]
            if recipe.embedding_on_host and _is_tied(model_config(recipe)[0]):
                recipe = recipe.model_copy(update={"embedding_on_host": False})
                words.append("embedding_on_host=false")
            other = Plan(recipe, self.rows)
            if name != self.recipe.model and other.fits(other.choice, gpu):
                return words
        return None

    # The kinds of change, each mildest first: what is replaced, and the overrides that say so

    def _cheaper(self, scoring: bool = False) -> Iterator[tuple[dict[str, Any], list[str]]]:
        todo: list[tuple[dict[str, Any], list[str]]] = []
        if not (scoring or self.choice.checkpointing):
            todo.append(({"checkpointing": True}, ["train.gradient_checkpointing=true"]))
        if not scoring and self.choice.optim not in memory.EIGHT_BIT:
            todo.append(({"optim": "adamw_8bit"}, ["train.optim=adamw_8bit"]))
        if self._weights(None, self.choice.quantization).table and not self.choice.embedding_on_host:
            todo.append(({"embedding_on_host": True}, ["embedding_on_host=true"]))
        if self.choice.quantization != "nf4":
            todo.append(({"quantization": "nf4"}, ["quantization=nf4"]))
        for many in range(1, len(todo) + 1):
            for chosen in itertools.combinations(todo, many):
                values = {name: value for fields, _ in chosen for name, value in fields.items()}
                yield values, [word for _, words in chosen for word in words]

    def _batches(self) -> Iterator[tuple[dict[str, Any], list[str]]]:
        whole = self.choice.batch * self.choice.accumulation
        for batch in range(self.choice.batch - 1, 0, -1):
            if whole % batch == 0:
                accumulation = whole // batch
                words = [f"train.per_device_train_batch_size={batch}"]
                words.append(f"train.gradient_accumulation_steps={accumulation}")
                yield {"batch": batch, "accumulation": accumulation}, words

    def _offloaded(self) -> Iterator[tuple[dict[str, Any], list[str]]]:
        if not self.choice.offload:
            yield {"offload": True}, ["train.activation_offloading=true"]

    def _frozen_profile(self) -> Iterator[tuple[dict[str, Any], list[str]]]:
        possible = self.rows.prefix > 0 and self._option("train_on") == "factual"
        if possible and self.choice.profile_pass == "full":
            yield {"profile_pass": "frozen"}, ["train.profile_pass=frozen"]

    def _ranks(self) -> Iterator[tuple[dict[str, Any], list[str]]]:
        given = self.recipe.lora.get("r", 16)
        yield from (({"rank": rank}, [f"lora.r={rank}"]) for rank in (16, 8, 4) if rank < given)

    # What the numbers are made of

    def _option(self, name: str) -> Any:
        """A field of `train:` as it is on a GPU."""
        return self._train.get(name, PerCEConfig.__dataclass_fields__[name].default)

    def _step(self, choice: Choice, gpu: Gpu) -> memory.Step:
        """The batch of a choice; packed rows lie end to end in one, and attention takes a mask to keep them apart.

        Where the profile is read ahead, the longest prefix meets the longest rest.
        """
        rows, many, whole = choice.users * choice.batch, 1, self.rows.length
        prefix = choice.length * self.rows.prefix // whole if choice.profile_pass == "frozen" else 0
        awake = -(-choice.length * self.rows.awake // whole) if prefix else choice.length
        scored = min(awake, -(-choice.length * self.rows.scored // whole))
        if self.packs:
            rows, many = 1, choice.batch
        sizes = rows, many * (prefix + awake), many * scored, many * prefix
        dtype = torch.float32 if self.itemsize == memory.FLOAT32 else torch.float16
        shared = self.on_cpu or fused_attention_shares_heads(gpu.bf16, dtype)
        return memory.Step(*sizes, self.itemsize, self.packs, shared, self.triton, choice.users)

    def _read(self, length: int) -> int:
        """Tokens of the longest scored row where the longest trained one has `length`."""
        if length == self.rows.length:
            return self.rows.read
        return max(self.rows.read, length) if length > self.rows.length else min(self.rows.read, length)

    def _weights_of(self, rank: int | None, quantization: str) -> memory.Weights:
        lora = self.recipe.lora if rank is None else {**self.recipe.lora, "r": rank}
        recipe = self.recipe.model_copy(update={"lora": lora, "quantization": quantization})
        return memory.weights_of(self.config, recipe, self.itemsize)


def peak_of_a_step(parts: dict[str, int]) -> int:
    """The most that a training step holds beside weights and optimizer: saved, with a layer or the head at work.

    Gradients of earlier batches of the accumulation window are there from the start; all are at the optimizer's step.
    With `profile_pass: frozen` prefixes are there all the while, and each is read before anything is saved.
    """
    passes = max(parts["saved"] + max(parts["layer"], parts["head"]), parts["reading"])
    return max(parts["gradients_ahead"] + parts["prefixes"] + passes, parts["gradients"])


def held(parts: dict[str, int]) -> int:
    """What lies on the GPU all the time in training."""
    return sum(parts[name] for name in ("base", "unquantized", "adapter", "optimizer"))


def _is_tied(config: PretrainedConfig) -> bool:
    return bool(config.get_text_config().tie_word_embeddings)


def figures(recipe: Recipe, gpus: Sequence[Gpu]) -> dict[str, Any]:
    """What `perce-lite plan` shows, bytes and tokens, for each GPU: of one adapter, and how many users fit at once.

    Raises:
        ModelError, PlanError: as `Plan`.
    """
    plan = Plan(recipe.without_cores())
    rows = None if recipe.fleet.train else plan.rows  # the data is read again only where its rows may be others
    users = Plan(recipe.of_users(), rows) if recipe.core_only or recipe.fleet.train else plan
    return {
        "model": recipe.model,
        "shape_from": "its config.json" if plan.at_hand else "a shape known by heart",
        "rows": {
            "longest": plan.rows.length,
            "with_loss": plan.rows.scored,
            "prefix": plan.rows.prefix,
            "source": plan.rows.source,
        },
        "settings": vars(plan.choice) | {"rank": recipe.lora.get("r", 16)},
        "fleet": recipe.fleet.slots if "fleet" in recipe.model_fields_set else None,
        "cards": [{**_on(plan, gpu), **_together(users, gpu)} for gpu in gpus],
    }


def _on(plan: Plan, gpu: Gpu) -> dict[str, Any]:
    parts = plan.parts(plan.choice, gpu)
    fits = parts["total"] <= gpu.bytes
    change = None if fits else plan.smallest_change(gpu)
    dtype = plan.recipe.dtype if plan.recipe.dtype != "auto" else "bfloat16" if gpu.bf16 else "float16"
    return {
        "card": gpu.name,
        "bytes": gpu.bytes,
        "dtype": dtype,
        "overflow": overflow_of(plan.config.model_type, dtype),
        "fits": fits,
        "parts": parts,
        "longest_row": plan.longest_row(plan.choice, gpu),
        "longest_row_alone": plan.longest_row(replace(plan.choice, batch=1), gpu),
        "largest_batch": plan.largest_batch(plan.choice, gpu),
        "change": None if change is None else change[0],
        "smaller_model": None if fits or change is not None else plan.smaller_model(gpu),
        "total_after_change": None if change is None else plan.parts(change[1], gpu)["total"],
    }


def _together(plan: Plan, gpu: Gpu) -> dict[str, Any]:
    """How many users fit at once, and whether as many as `fleet.slots` says do."""
    slots = plan.recipe.fleet.slots
    fit = slots == "auto" or (plan.fits(replace(plan.choice, users=slots), gpu) and not (plan.packs and slots > 1))
    return {"users_at_once": plan.most_users(plan.choice, gpu), "slots_fit": fit}
