"""The training loop over slots: several users at once over one forward of the base, each as `PerCETrainer` would.

A step takes one batch of every slot's user, runs them as one batch and gives each user's tensors to that user's own
optimizer, schedule and clipping. What one user does or meets never reaches another: a loss that is not finite drops its
user, and the slot goes to the next.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, Trainer, get_scheduler

from perce_lite import contrast
from perce_lite.collator import PairCollator
from perce_lite.config import PerCEConfig
from perce_lite.errors import ConfigError, DataError, PerceLiteError
from perce_lite.head import never_met, scoring_forward, training_forward
from perce_lite.pairs import IGNORED, Pair
from perce_lite.prefix import Prefixes, look_ahead
from perce_lite.score import batch_log_probs, behind, frozen, in_dtype, inputs_of, read_prefix, store_of
from perce_lite.slots import attach
from perce_lite.terms import Constants, constants, needed_terms, not_finite, steps_of, trained, windows

_GIVEN = ("input_ids", "labels", "attention_mask", "position_ids", "ahead")
"""What a forward takes of a batch."""

_RUN = ("epoch", "loss", "unweighted_loss", "grad_norm", "learning_rate")
"""Figures of a step that do not speak of its weights."""


@dataclass(frozen=True)
class UserJob:
    """One user's adapter to train.

    pairs: the user's rows, tokenised
    steps: optimizer steps, at least 1; None: what the config says for so many rows
    seed: of the first weights, of the order of rows and of the `shuffled` control; None: the config's
    adapter: where training starts, by PEFT's names; None: fresh weights
    """

    user: str
    pairs: Sequence[Pair]
    steps: int | None = None
    seed: int | None = None
    adapter: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Result:
    """What became of a job.

    adapter: by PEFT's names, on the CPU; empty where the user failed
    log: a step each: epoch, loss, unweighted_loss (nats a token), grad_norm, learning_rate, health of the weights
    store_hits: share of the scored sequences that came from the store
    error: why the user failed; None: the adapter is whole
    """

    user: str
    adapter: dict[str, Tensor] = field(default_factory=dict)
    log: list[dict[str, float]] = field(default_factory=list)
    store_hits: float = 0.0
    error: PerceLiteError | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return len(self.log)

    @property
    def weights(self) -> dict[str, float]:
        """Health of the weights (see `contrast.health`): means over the last epoch; empty for `uniform`."""
        last = [one for one in self.log if one["epoch"] > self.log[-1]["epoch"] - 1]
        return {
            name: sum(one[name] for one in last) / len(last) for one in last[:1] for name in one if name not in _RUN
        }


class _Training:
    """One user in one slot: rows, place in their order, optimizer, schedule, figures."""

    def __init__(
        self,
        slot: int,
        job: UserJob,
        found: Constants,
        parameters: list[Tensor],
        args: PerCEConfig,
        prefixes: Prefixes,
    ) -> None:
        seed = args.seed if job.seed is None else job.seed
        self.slot, self.job, self.found, self.parameters, self.args = slot, job, found, parameters, args
        self.features: list[dict[str, Any]] = [
            {**prefixes.features(trained(pair, args)), **{name: found.columns[name][row] for name in found.columns}}
            for row, pair in enumerate(job.pairs)
        ]
        self.windows = windows(args, [one["input_ids"] for one in self.features], seed)
        self.total = job.steps if job.steps is not None else steps_of(args, len(self.features))
        # The trainer's own optimizer and schedule, over this slot's tensors alone; peft's matrices all decay.
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args)
        self.optimizer = kind([{"params": parameters, "weight_decay": args.weight_decay}], **options)
        self.schedule = get_scheduler(
            args.lr_scheduler_type,
            optimizer=self.optimizer,
            num_warmup_steps=args.get_warmup_steps(self.total),
            num_training_steps=self.total,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
        self.scaler = torch.amp.GradScaler(parameters[0].device.type, enabled=bool(args.fp16))
        self.log: list[dict[str, float]] = []
        self._open()

    def _open(self) -> None:
        """Takes the next accumulation window."""
        self.waiting, self.epoch = next(self.windows)
        self.window = [row for batch in self.waiting for row in batch]
        self.tokens = sum(label != IGNORED for row in self.window for label in self.features[row]["labels"][1:])
        self.figures: list[dict[str, float]] = []
        self.seen: tuple[Tensor, Tensor | None]  # of the batch that was taken: log-probs and PIR, (n,)

    def take(self) -> list[int]:
        """Row numbers of the next batch."""
        self.rows = self.waiting.pop(0)
        return self.rows

    @property
    def closes(self) -> bool:
        """Whether the batch that was taken is the last of its window, so that a step is due."""
        return not self.waiting

    @property
    def finished(self) -> bool:
        return len(self.log) >= self.total

    def record(self, loss: float) -> None:
        """Notes the figures of the batch that was taken; read after the backward is under way, as a GPU would wait."""
        log_probs, pir = self.seen
        figures = {"loss": loss, "unweighted_loss": float(-log_probs.sum() / self.tokens)}
        if pir is not None:
            figures |= contrast.health(pir, self.args.clip_min, self.args.clip_max)
            figures["weight_mean"] *= self.found.scale
        self.figures.append(figures)

    def norm(self) -> Tensor:
        """Norm of this user's gradients, which are clipped."""
        self.scaler.unscale_(self.optimizer)
        limit = self.args.max_grad_norm if self.args.max_grad_norm > 0 else float("inf")
        return torch.nn.utils.clip_grad_norm_(self.parameters, limit)

    def update(self, norm: float) -> None:
        """One step of optimizer and schedule, and its line in the log."""
        rate = self.schedule.get_last_lr()[0]
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # else fp16 overflowed and no step was taken, as in accelerate
            self.schedule.step()
        summed = {name: sum(one[name] for one in self.figures) for name in self.figures[0]}
        means = {name: value / len(self.figures) for name, value in summed.items()}
        losses = {name: summed[name] for name in ("loss", "unweighted_loss")}
        self.log.append({**means, **losses, "epoch": self.epoch, "grad_norm": norm, "learning_rate": rate})
        if not self.finished:
            self._open()

    def named(self, rows: Sequence[int], what: str) -> PerceLiteError:
        return not_finite(what, len(self.log) + 1, [self.job.pairs[row].row for row in sorted(set(rows))])


class SlotEngine:
    """Trains users' adapters over one base, `slots` of them at once.

    args: what every user is trained with; `per_device_train_batch_size` rows of each are in a batch
    lora: see `slots.attach` for what it may hold

    Raises:
        ConfigError: every option that a loop over slots cannot do as the trainer does.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        args: PerCEConfig,
        lora: LoraConfig,
        slots: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        faults = _faults(base, args) + never_met(lora)
        if faults:
            raise ConfigError(faults)
        self.args = args
        self.model = attach(base, lora, slots, dtype)
        self.device = next(base.parameters()).device
        self.collator = PairCollator(pad_token_id=tokenizer.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of)
        # One hash of the base for all users.
        self.store = store_of(args.store, base, args.autocast) if needed_terms(args) else None
        self.forward = training_forward(base)
        self.scoring_forward = scoring_forward(base)
        self.prefixes = Prefixes(self._read)
        if args.profile_pass == "frozen":
            look_ahead(base, self.prefixes)

    def _read(self, ids: tuple[int, ...]) -> DynamicCache:
        with self.model.route.bare():
            return read_prefix(self.model.base, ids, self.args.autocast)

    def run(self, jobs: Iterable[UserJob], done: Callable[[Result], None]) -> None:
        """Trains all `jobs`, calling `done` for each as it ends, failed or not; `jobs` is read as slots come free."""
        waiting = iter(jobs)
        base = self.model.base
        running: dict[int, _Training] = {}
        base.train()
        if self.args.gradient_checkpointing:
            options = {**(self.args.gradient_checkpointing_kwargs or {}), "use_reentrant": False}
            base.gradient_checkpointing_enable(options)
        try:
            while self._fill(running, waiting, done):
                errors = self._step([running[slot] for slot in sorted(running)])
                for slot, training in list(running.items()):
                    if slot in errors or training.finished:
                        done(self._result(training, errors.get(slot)))
                        del running[slot]
        finally:
            if self.args.gradient_checkpointing:
                base.gradient_checkpointing_disable()
            base.eval()

    def _fill(
        self, running: dict[int, _Training], waiting: Iterator[UserJob], done: Callable[[Result], None]
    ) -> dict[int, _Training]:
        """Gives each free slot the next job that can start."""
        for slot in range(self.model.slots):
            while slot not in running:
                job = next(waiting, None)
                if job is None:
                    return running
                try:
                    running[slot] = self._start(slot, job)
                except PerceLiteError as error:
                    done(Result(job.user, error=error))
        return running

    def _start(self, slot: int, job: UserJob) -> _Training:
        if not job.pairs:
            raise DataError(f"No rows of user {job.user} can be trained on")
        seed = self.args.seed if job.seed is None else job.seed
        found = constants(self.model.base, job.pairs, self.args, seed, self.store)
        self.model.load_slot(slot, self.model.fresh(seed) if job.adapter is None else job.adapter)
        return _Training(slot, job, found, self.model.parameters_of(slot), self.args, self.prefixes)

    def _result(self, training: _Training, error: PerceLiteError | None) -> Result:
        adapter = {} if error is not None else self.model.read_slot(training.slot)
        self.model.clear_gradients(training.slot)
        return Result(training.job.user, adapter, training.log, training.found.hits, error)

    def _step(self, trainings: Sequence[_Training]) -> dict[int, PerceLiteError]:
        """One batch of every user: one forward, one backward, and the steps that are due. Gives errors by slot."""
        taken = [(training, row) for training in trainings for row in training.take()]
        batch = self.collator([training.features[row] for training, row in taken])
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        if "prefix" in batch:
            batch = behind(batch, batch.pop("prefix"), self.prefixes)
        with self.model.route.of([training.slot for training, _ in taken]):
            if self.args.estimator == "bootstrap":
                batch["counterfactual"] = self._without_profile(taken)
            losses = self._losses(trainings, batch)
            torch.stack([one.scaler.scale(loss) for one, loss in zip(trainings, losses, strict=True)]).sum().backward()
        errors: dict[int, PerceLiteError] = {}
        due = []
        for training, loss in zip(trainings, torch.stack(losses).tolist(), strict=True):
            if not math.isfinite(loss):
                errors[training.slot] = training.named(training.rows, f"The loss is {loss}")
                continue
            training.record(loss)
            if training.closes:
                due.append(training)
        return errors | self._update(due)

    def _losses(self, trainings: Sequence[_Training], batch: dict[str, Any]) -> list[Tensor]:
        """Each user's weighted loss, nats a token of that user's accumulation window."""
        scored = batch["labels"][:, 1:] != IGNORED
        given = {name: batch[name] for name in _GIVEN if name in batch}
        with in_dtype(self.device, self.args.autocast):
            flat = self.forward(**given, use_cache=False)  # (N,), row after row
        constant = {name: batch[name][:, 1:][scored] for name in trainings[0].found.columns}
        if "counterfactual" in batch:
            constant["counterfactual_log_probs"] = batch["counterfactual"]
        counts = iter(scored.sum(1).tolist())
        sizes = [sum(itertools.islice(counts, len(training.rows))) for training in trainings]
        columns = {name: values.split(sizes) for name, values in constant.items()}
        return [
            self._loss(training, log_probs, {name: values[index] for name, values in columns.items()})
            for index, (training, log_probs) in enumerate(zip(trainings, flat.split(sizes), strict=True))
        ]

    def _loss(self, training: _Training, log_probs: Tensor, constant: dict[str, Tensor]) -> Tensor:
        """One user's part of the batch; all tensors are (n,), a scored token each."""
        counterfactual = constant.get("counterfactual_log_probs")
        training.seen = log_probs.detach(), None
        weighted = log_probs
        if counterfactual is not None:
            pir = contrast.pir(constant.get("factual_log_probs", log_probs), counterfactual)
            training.seen = log_probs.detach(), pir
            weights = contrast.weights(pir, self.args.clip_min, self.args.clip_max, training.found.scale)
            weighted = weights * log_probs
        return -weighted.sum() / training.tokens

    def _without_profile(self, taken: Sequence[tuple[_Training, int]]) -> Tensor:
        """Log-probs (N,) of the same rows under the same slots, without the profile."""
        twins = [training.job.pairs[row].counterfactual for training, row in taken]
        slept = self.prefixes if self.args.profile_pass == "frozen" else None
        inputs = inputs_of(twins, self.collator.pad_token_id, self.device, slept)
        with frozen(self.model.base, adapters=True):
            return batch_log_probs(self.scoring_forward, inputs, self.args.autocast)

    def _update(self, due: Sequence[_Training]) -> dict[int, PerceLiteError]:
        """Clips and steps each user on its own; a user whose gradient is not finite does not step."""
        errors: dict[int, PerceLiteError] = {}
        norms = []
        for training in due:
            self.model.hand_gradients(training.slot, training.parameters)
            norms.append(training.norm())
        for training, norm in zip(due, torch.stack(norms).tolist() if norms else [], strict=True):
            if math.isfinite(norm) or training.scaler.is_enabled():  # under fp16 an overflow is skipped and scaled down
                training.update(norm)
            else:
                errors[training.slot] = training.named(training.window, f"The gradient's norm is {norm}")
            self.model.clear_gradients(training.slot)
        return errors


def _faults(base: PreTrainedModel, args: PerCEConfig) -> list[str]:
    """Options of the trainer that a loop over slots does not have."""
    refused = {
        "packing": (args.packing, "a slot's rows are padded, not packed; leave it out"),
        "neftune_noise_alpha": (bool(args.neftune_noise_alpha), "users would share one stream of random numbers"),
        "activation_offloading": (args.activation_offloading, "use gradient_checkpointing"),
        "lr_scheduler_type": (
            args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"),
            "it follows a figure of evaluation, which a fleet does not measure",
        ),
    }
    faults = [f"{name} {getattr(args, name)!r}: {why}" for name, (is_so, why) in refused.items() if is_so]
    try:
        kind, _ = Trainer.get_optimizer_cls_and_kwargs(args)
        if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
            faults.append(f"optim {args.optim!s}: it looks at a whole model; use adamw_torch or paged_adamw_8bit")
    except (ValueError, ImportError) as error:
        faults.append(f"optim {args.optim!s}: {error}")
    if base.config.get_text_config().to_dict().get("output_router_logits"):
        faults.append(
            "model: the load-balancing loss of a mixture (output_router_logits) would mix users; set it false"
        )
    return faults
