"""One user in one slot: rows, their order, optimizer, schedule, log; saved to disk and resumed."""

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, get_scheduler

from perce_lite.config import PerCEConfig
from perce_lite.console import warn
from perce_lite.data.pairs import IGNORED, Pair
from perce_lite.errors import PerceLiteError
from perce_lite.files import settle, written_aside
from perce_lite.model.lora_core import Cored
from perce_lite.model.prefix_cache import PrefixCache
from perce_lite.model.scoring import ScoringJob
from perce_lite.recipe import EarlyStopping
from perce_lite.training.early_stopping import BestStep
from perce_lite.training.loss import Weighting, weight_statistics
from perce_lite.training.order import steps_of, windows
from perce_lite.training.reference_logprobs import ReferenceLogProbs, trained_tokens
from perce_lite.training.trainer import non_finite_error

_RUN = ("epoch", "loss", "unweighted_loss", "grad_norm", "learning_rate")
"""Entries of a step's log that are not weight statistics."""


@dataclass(frozen=True)
class UserJob:
    """One user's adapter to train.

    pairs: the user's rows, tokenised
    steps: optimizer steps, at least 1; None: what the config says for so many rows
    seed: of the first weights, of the order of rows and of the `shuffled` control; None: the config's
    adapter: where training starts, by PEFT's names; None: fresh weights. With cores it is what is frozen: users who
        are given the very same mapping share it
    begun: fingerprint of the inputs; a saved state is resumed only if it has the same
    validation: rows whose loss says when training ends, as `stopping` has it; none: it goes to its last step
    """

    user: str
    pairs: Sequence[Pair]
    steps: int | None = None
    seed: int | None = None
    adapter: Mapping[str, Tensor] | None = None
    begun: str = ""
    validation: Sequence[ScoringJob] = ()
    stopping: EarlyStopping = field(default_factory=EarlyStopping)


@dataclass(frozen=True)
class Result:
    """The result of a job.

    slot: where it was trained; its weights stay there until the next user takes the slot
    adapter: by PEFT's names, on the CPU; empty where the user failed
    core: the same as a core in its parent; None where slots have no cores
    log: a step each: epoch, loss, unweighted_loss (nats a token), grad_norm, learning_rate, health of the weights
    store_hits: share of the scored sequences that came from the store
    stopping: `BestStep.figures`, whose step the adapter is; None: it is the last one
    error: why the user failed; None: the adapter is whole
    """

    user: str
    slot: int
    adapter: dict[str, Tensor] = field(default_factory=dict)
    core: Cored | None = None
    log: list[dict[str, float]] = field(default_factory=list)
    store_hits: float = 0.0
    stopping: dict[str, Any] | None = None
    error: PerceLiteError | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return len(self.log)

    @property
    def weights(self) -> dict[str, float]:
        """`weight_statistics`, means over the last epoch; empty for `uniform`."""
        last = [step for step in self.log if step["epoch"] > self.log[-1]["epoch"] - 1]
        return {
            name: sum(step[name] for step in last) / len(last) for name in (last[0] if last else {}) if name not in _RUN
        }


class SlotUser:
    """One user in one slot: rows, their order, optimizer, schedule, log.

    parameters: the slot's tensors; job: the user's rows; reference: their log-probs under the
    frozen base; prefixes: KV prefix cache of all users
    """

    def __init__(
        self,
        slot: int,
        job: UserJob,
        reference: ReferenceLogProbs,
        parameters: list[Tensor],
        args: PerCEConfig,
        prefixes: PrefixCache,
    ) -> None:
        seed = args.seed if job.seed is None else job.seed
        self.slot, self.job, self.reference, self.parameters, self.args = slot, job, reference, parameters, args
        self.weighting = Weighting.of(args, reference.scale)
        rows = [prefixes.features(trained_tokens(pair, args), args.profile_pass) for pair in job.pairs]
        self.features: list[dict[str, Any]] = [
            {**features, **{name: reference.columns[name][row] for name in reference.columns}}
            for row, features in enumerate(rows)
        ]
        self.windows = windows(args, [features["input_ids"] for features in self.features], seed)
        self.total = job.steps if job.steps is not None else steps_of(args, len(self.features))
        stops = job.stopping.patience is not None and job.validation
        self.best = BestStep.of(job.stopping, args, len(self.features), self.total) if stops else None
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
        return len(self.log) >= self.total or (self.best is not None and self.best.stopped)

    def record(self, loss: float) -> None:
        """Notes the figures of the batch that was taken; read after the backward is under way, as a GPU would wait."""
        log_probs, pir = self.seen
        figures = {"loss": loss, "unweighted_loss": float(-log_probs.sum() / self.tokens)}
        if pir is not None:
            figures |= weight_statistics(pir, self.weighting)
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
        summed = {name: sum(figures[name] for figures in self.figures) for name in self.figures[0]}
        means = {name: value / len(self.figures) for name, value in summed.items()}
        losses = {name: summed[name] for name in ("loss", "unweighted_loss")}
        self.log.append({**means, **losses, "epoch": self.epoch, "grad_norm": norm, "learning_rate": rate})
        if not self.finished:
            self._open()

    def state(self) -> dict[str, Any]:
        """All that `restore` needs, on the CPU; what a window has gathered in gradients is the model's to keep."""
        return {
            "parameters": [
                tensor.detach().cpu().clone() for tensor in self.parameters
            ],  # views, so not their whole storage
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "log": self.log,
            "figures": self.figures,
            "waiting": len(self.waiting),
            "best": None if self.best is None else self.best.state(),
        }

    @torch.no_grad()
    def restore(self, state: Mapping[str, Any]) -> None:
        """Resumes from `state`: the same weights, moments, rate and next row."""
        for parameter, kept in zip(self.parameters, state["parameters"], strict=True):
            parameter.copy_(kept)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        for step in state["log"]:
            self.log.append(step)
            self._open()
        self.waiting = self.waiting[len(self.waiting) - state["waiting"] :]
        self.figures = list(state["figures"])
        if self.best is not None:
            self.best.restore(state["best"])

    def named(self, rows: Sequence[int], what: str) -> PerceLiteError:
        of_rows = [self.job.pairs[row].row for row in sorted(set(rows))]
        return non_finite_error(what, len(self.log) + 1, of_rows, self.args.autocast)


class Unfinished:
    """Saved states of users whose training was interrupted, in one file, all taken after the same batch.

    Raises:
        DiskFullError: no space left; what was there stays.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        settle(file)
        self._states: dict[str, dict[str, Any]] = {}
        if file.is_file():
            try:
                self._states = torch.load(file, map_location="cpu", weights_only=True)
            except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
                warn(f"{file} is broken ({error}); users who were in the middle of their training start anew")

    @property
    def users(self) -> list[str]:
        """Users to be resumed, in the order of their slots."""
        return list(self._states)

    def take(self, job: UserJob) -> dict[str, Any] | None:
        """Removes and returns the saved state of the job's user; None without one, or where its inputs differ."""
        state = self._states.pop(job.user, None)
        return state if state is not None and state["begun"] == job.begun else None

    def write(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Saves `states` by user, with those not yet resumed; removes the file where there are none."""
        unfinished = {**states, **self._states}
        if not unfinished:
            self._file.unlink(missing_ok=True)
            return
        with written_aside(self._file) as aside:
            torch.save(unfinished, aside)
