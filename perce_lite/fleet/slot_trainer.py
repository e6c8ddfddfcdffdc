"""The training loop over slots: several users at once over one forward of the base, each as `PerCETrainer` would.

A step takes one batch of every slot's user, runs them as one batch and gives each user's tensors to that user's own
optimizer, schedule and clipping. Users are isolated: a loss that is not finite drops its
user, and the slot goes to the next.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase, Trainer

from perce_lite.config import PerCEConfig
from perce_lite.data.collator import PairCollator
from perce_lite.data.pairs import IGNORED
from perce_lite.errors import AdapterError, ConfigError, DataError, PerceLiteError
from perce_lite.fleet.slot_lora import SlotModel, attach
from perce_lite.fleet.slot_user import Result, SlotUser, Unfinished, UserJob
from perce_lite.model.compat import forward_hooks, restore_forward_hooks
from perce_lite.model.fused_head import head_adapter_faults, scoring_forward, training_forward, without_needless_mask
from perce_lite.model.prefix_cache import PrefixCache, enable_prefix_attention
from perce_lite.model.scoring import (
    autocast_to,
    batch_log_probs,
    encode_prefixes,
    model_inputs,
    no_grad_eval,
    store_of,
    with_prefix,
)
from perce_lite.training.early_stopping import validation_loss
from perce_lite.training.loss import weighted_nll
from perce_lite.training.reference_logprobs import reference_log_probs, scored_passes

_GIVEN = ("input_ids", "labels", "attention_mask", "position_ids", "batch_prefixes")
"""What a forward takes of a batch."""


class SlotTrainer:
    """Trains users' adapters over one base, `slots` of them at once.

    args: what every user is trained with; `per_device_train_batch_size` rows of each are in a batch
    lora: see `slot_lora.attach` for what it may hold
    core: every job has an adapter, which is frozen, and trains a core (see `perce_lite.model.lora_core`)

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
        core: bool = False,
    ) -> None:
        faults = _faults(base, args) + head_adapter_faults(lora)
        if faults:
            raise ConfigError(faults)
        self.args = args
        self.model = attach(base, lora, slots, dtype, core)
        self.device = next(base.parameters()).device
        self.collator = PairCollator(pad_token_id=tokenizer.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of)
        # One hash of the base for all users.
        self.store = store_of(args.store, base, args.autocast) if scored_passes(args) else None
        self.forward = training_forward(base)
        self.scoring_forward = scoring_forward(base)
        self.prefixes = PrefixCache(_reader(self.model, args))
        if args.profile_pass == "frozen":
            enable_prefix_attention(base, self.prefixes)

    def run(
        self,
        jobs: Iterable[UserJob],
        on_done: Callable[[Result], None],
        kept: Unfinished | None = None,
        on_progress: Callable[[float, float], None] | None = None,
    ) -> None:
        """Trains all `jobs`, calling `on_done` for each as it ends, failed or not; `jobs` is read as slots come free.

        kept: saved states to resume from; all users in slots are saved there every `save_steps` batches
        on_progress: called after each batch, from the first step on, with the unweighted loss of the last step (nats a
            token, mean over the users in slots) and the sum of their shares of finished steps
        """
        waiting = iter(jobs)
        base = self.model.base
        running: dict[int, SlotUser] = {}
        base.train()
        hooks = forward_hooks(base)
        if self.args.gradient_checkpointing:
            options = {**(self.args.gradient_checkpointing_kwargs or {}), "use_reentrant": False}
            base.activation_checkpointing_enable(options)
        try:
            for batch in itertools.count(1):
                if not self._fill(running, waiting, on_done, kept):
                    break
                errors = self._step([running[slot] for slot in sorted(running)])
                self._validate(user for slot, user in running.items() if slot not in errors)
                begun = [user for user in running.values() if user.log]
                if on_progress is not None and begun:
                    loss = sum(user.log[-1]["unweighted_loss"] for user in begun) / len(begun)
                    on_progress(loss, sum(len(user.log) / max(1, user.total) for user in begun))
                for slot, user in list(running.items()):
                    if slot in errors or user.finished:
                        on_done(self._result(user, errors.get(slot)))
                        del running[slot]
                if kept is not None and self._is_due(batch, running.values()):
                    kept.write({running[slot].job.user: self._state(running[slot]) for slot in sorted(running)})
            if kept is not None:
                kept.write({})
        finally:
            if self.args.gradient_checkpointing:
                base.activation_checkpointing_disable()
            restore_forward_hooks(base, hooks)
            base.eval()

    def _is_due(self, batch: int, running: Iterable[SlotUser]) -> bool:
        """Whether states are saved after this batch; `save_steps` below 1 is a share of a user's steps."""
        if self.args.save_strategy == "no":
            return False
        interval = self.args.save_steps
        if interval < 1:
            interval *= max((user.total for user in running), default=1)
        return batch % max(1, int(interval)) == 0

    def _state(self, user: SlotUser) -> dict[str, Any]:
        gradients = self.model.gradients_of(user.slot) if user.figures else []
        return {**user.state(), "begun": user.job.begun, "gradients": gradients}

    def _fill(
        self,
        running: dict[int, SlotUser],
        waiting: Iterator[UserJob],
        on_done: Callable[[Result], None],
        kept: Unfinished | None,
    ) -> dict[int, SlotUser]:
        """Gives each free slot the next job that can start."""
        for slot in range(self.model.slots):
            while slot not in running:
                job = next(waiting, None)
                if job is None:
                    return running
                try:
                    running[slot] = self._start(slot, job, None if kept is None else kept.take(job))
                except PerceLiteError as error:
                    on_done(Result(job.user, slot, error=error))
        return running

    def _start(self, slot: int, job: UserJob, state: Mapping[str, Any] | None) -> SlotUser:
        """state: of `_state`, where the user was stopped in the middle."""
        if not job.pairs:
            raise DataError(f"No rows of user {job.user} can be trained on")
        if job.adapter is None and self.model.core:
            raise AdapterError(f"user {job.user}: a core needs an adapter to start from (lora.core_only)")
        seed = self.args.seed if job.seed is None else job.seed
        reference = reference_log_probs(self.model.base, job.pairs, self.args, seed, self.store)
        self.model.load_slot(slot, self.model.fresh(seed) if job.adapter is None else job.adapter)
        user = SlotUser(slot, job, reference, self.model.parameters_of(slot), self.args, self.prefixes)
        if state is not None:
            user.restore(state)
            self.model.add_gradients(slot, state["gradients"])
        return user

    def _result(self, user: SlotUser, error: PerceLiteError | None) -> Result:
        adapter, core, stopping = {}, None, None
        if error is None and user.best is not None:
            user.best.put_back(user.parameters)
            stopping = user.best.figures(len(user.log))
        if error is None:
            adapter, core = self.model.read_slot(user.slot), self.model.read_core(user.slot)
        self.model.clear_gradients(user.slot)
        self.prefixes.forget(user.features)
        return Result(user.job.user, user.slot, adapter, core, user.log, user.reference.store_hits, stopping, error)

    def _validate(self, users: Iterable[SlotUser]) -> None:
        """Measures the validation rows of those users whose early stopping asks for it after their last step."""
        for user in users:
            if user.best is not None and user.best.is_due(len(user.log)):
                with self.model.route.everything_to(user.slot):
                    loss = validation_loss(self.model.base, user.job.validation, self.args.autocast, self.prefixes)
                user.best.add(len(user.log), loss, user.parameters)

    def _step(self, users: Sequence[SlotUser]) -> dict[int, PerceLiteError]:
        """Runs one batch of every user: one forward, one backward, and the due steps. Returns errors by slot."""
        taken = [(user, row) for user in users for row in user.take()]
        batch = self.collator([user.features[row] for user, row in taken])
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        if "prefix" in batch:
            batch = with_prefix(batch, batch.pop("prefix"), self.prefixes)
        with self.model.route.of([user.slot for user, _ in taken]):
            if self.args.estimator == "bootstrap":
                batch["counterfactual"] = self._without_profile(taken)
            losses = self._losses(users, batch)
            torch.stack([user.scaler.scale(loss) for user, loss in zip(users, losses, strict=True)]).sum().backward()
        errors: dict[int, PerceLiteError] = {}
        due = []
        for user, loss in zip(users, torch.stack(losses).tolist(), strict=True):
            if not math.isfinite(loss):
                errors[user.slot] = user.named(user.rows, f"The loss is {loss}")
                continue
            user.record(loss)
            if user.closes:
                due.append(user)
        left = len(users) - len(errors) - len(due)  # users whose window is still open
        errors |= self._update(due)
        if not left:
            self.model.drop_gradients()
        for user in due if left else ():
            self.model.clear_gradients(user.slot)
        return errors

    def _losses(self, users: Sequence[SlotUser], batch: dict[str, Any]) -> list[Tensor]:
        """Each user's weighted loss, nats a token of that user's accumulation window."""
        scored = batch["labels"][:, 1:] != IGNORED
        inputs = without_needless_mask(self.model.base, {name: batch[name] for name in _GIVEN if name in batch})
        with autocast_to(self.device, self.args.autocast):
            flat = self.forward(**inputs, use_cache=False)  # (N,), row after row
        constant = {name: batch[name][:, 1:][scored] for name in users[0].reference.columns}
        if "counterfactual" in batch:
            constant["counterfactual_log_probs"] = batch["counterfactual"]
        counts = iter(scored.sum(1).tolist())
        sizes = [sum(itertools.islice(counts, len(user.rows))) for user in users]
        columns = {name: values.split(sizes) for name, values in constant.items()}
        return [
            self._loss(user, log_probs, {name: values[index] for name, values in columns.items()})
            for index, (user, log_probs) in enumerate(zip(users, flat.split(sizes), strict=True))
        ]

    def _loss(self, user: SlotUser, log_probs: Tensor, constant: dict[str, Tensor]) -> Tensor:
        """One user's part of the batch; all tensors are (n,), a scored token each."""
        weighted = weighted_nll(
            log_probs,
            constant.get("counterfactual_log_probs"),
            constant.get("factual_log_probs"),
            weighting=user.weighting,
        )
        user.seen = log_probs.detach(), weighted.pir
        return weighted.per_token.sum() / user.tokens

    def _without_profile(self, taken: Sequence[tuple[SlotUser, int]]) -> Tensor:
        """Log-probs (N,) of the same rows under the same slots, without the profile."""
        twins = [user.job.pairs[row].counterfactual for user, row in taken]
        prefixes = self.prefixes if self.args.profile_pass == "frozen" else None
        inputs = without_needless_mask(
            self.model.base, model_inputs(twins, self.collator.pad_token_id, self.device, prefixes)
        )
        with no_grad_eval(self.model.base, adapters=True):
            return batch_log_probs(self.scoring_forward, inputs, self.args.autocast)

    def _update(self, due: Sequence[SlotUser]) -> dict[int, PerceLiteError]:
        """Clips and steps each user on its own; a user whose gradient is not finite does not step."""
        errors: dict[int, PerceLiteError] = {}
        norms = []
        for user in due:
            self.model.hand_gradients(user.slot, user.parameters)
            norms.append(user.norm())
        for user, norm in zip(due, torch.stack(norms).tolist() if norms else [], strict=True):
            if math.isfinite(norm) or user.scaler.is_enabled():  # under fp16 an overflow is skipped and scaled down
                user.update(norm)
            else:
                errors[user.slot] = user.named(user.window, f"The gradient's norm is {norm}")
            user.optimizer.zero_grad()  # its view of them; the gradients themselves are the model's
        return errors


def _reader(model: SlotModel, args: PerCEConfig) -> Callable[[Sequence[tuple[int, ...]]], list[DynamicCache]]:
    """Encodes prefixes under the bare base. It holds no reference to the trainer, so that its memory can be freed."""

    def read(prefixes: Sequence[tuple[int, ...]]) -> list[DynamicCache]:
        with model.route.bare():
            return encode_prefixes(model.base, prefixes, args.autocast)

    return read


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
            faults.append(f"optim {args.optim!s}: it looks at a whole model; use adamw_torch or adamw_8bit")
    except (ValueError, ImportError) as error:
        faults.append(f"optim {args.optim!s}: {error}")
    if base.config.get_text_config().to_dict().get("output_router_logits"):
        faults.append(
            "model: the load-balancing loss of a mixture (output_router_logits) would mix users; set it false"
        )
    return faults
