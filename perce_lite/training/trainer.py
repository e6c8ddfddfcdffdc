"""`PerCETrainer`: TRL's `SFTTrainer` with each response token weighted by how much it depends on the profile.

A training step: `compute_loss` gives TRL a forward whose log-probs are replaced by those of `loss.weighted_nll`; TRL
sums them, divides by the tokens of the accumulation window and does the rest: metrics, evaluation, logging, resume. The
reference log-probs are columns of the data set, scored once before training (`prepare`) with the adapters off; only
`bootstrap` runs a second forward in each step, before the training forward.
"""

import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase
from trl import SFTTrainer, pack_dataset

from perce_lite.config import PerCEConfig
from perce_lite.console import say, warn
from perce_lite.data.chat_template import Chat
from perce_lite.data.collator import LOG_PROB_COLUMNS, PairCollator
from perce_lite.data.pairs import IGNORED, Audit, Pair, PairMaker, require
from perce_lite.data.rows import Row, from_columns
from perce_lite.errors import ConfigError, DataError, NonFiniteLossError
from perce_lite.files import METADATA, disk_full_is_clear, write_json
from perce_lite.model.adapters import all_finite, origin_of
from perce_lite.model.base import on_text_alone
from perce_lite.model.compat import keep_base_constant, require_trainer_hooks
from perce_lite.model.end_of_turn import warn_of_untrained_end
from perce_lite.model.float16 import advice
from perce_lite.model.fused_head import (
    base_of,
    project_scored_positions_only,
    scoring_forward,
    without_needless_mask,
)
from perce_lite.model.prefix_cache import PrefixCache, enable_prefix_attention, layers_without_attention
from perce_lite.model.repeated_heads import repeat_heads_where_needed
from perce_lite.model.scoring import ScoringJob, batch_log_probs, encode_prefixes, no_grad_eval, with_prefix
from perce_lite.recipe import Recipe, Template
from perce_lite.training.arguments import as_trl_takes_them, check_arguments, check_rows, shapes_of, tokenizer_for
from perce_lite.training.early_stopping import BestStep, Validation
from perce_lite.training.loss import Weighting, weight_statistics, weighted_nll
from perce_lite.training.metadata import SCRIPT, mean_statistics, script_recipe, trainer_metadata
from perce_lite.training.order import train_sampler
from perce_lite.training.reference_logprobs import reference_log_probs, trained_tokens
from perce_lite.words import counted

require_trainer_hooks(SFTTrainer)

_BEST_STEP = "best_step.pt"
"""File of a checkpoint with the best step so far."""

TAG = "perce"
"""Tag of a model card that PerCE Lite wrote."""


class PerCETrainer(SFTTrainer):
    """`SFTTrainer` whose data set has a `profile` column beside `prompt` and `completion` (or `messages`).

    >>> from peft import LoraConfig
    >>> trainer = PerCETrainer(
    ...     model="toy",
    ...     args=PerCEConfig(output_dir="script", max_steps=2, report_to="none", disable_tqdm=True),
    ...     train_dataset=datasets.load_dataset("json", data_files="rows.jsonl", split="train"),
    ...     peft_config=LoraConfig(r=4, target_modules="all-linear"),
    ... )
    >>> trainer.train().global_step
    {...}
    2
    >>> trainer.save_model("script/adapter")  # for perce_lite.load and every command

    Arguments are `SFTTrainer`'s, in its order; beyond them:
        template: how profile and query become chat messages
        max_profile_tokens: tokens of the profile at the most; None: what `args.max_length` leaves

    Columns: `profile` (a text, or a list of texts or {title, text}), `prompt` and `completion` (texts or messages) or
    `messages` (every assistant turn is scored); optional `user`, which names a store file, and `where`, which names the
    row in errors. A list of `perce_lite.data.rows.Row` is taken as it is; it needs `processing_class`.

    Raises:
        ConfigError: an argument or a model that PerCE cannot be computed with.
        DataError, TemplateError: see `perce_lite.data.pairs`.
        NonFiniteLossError: in training; nothing of that step is kept.
    """

    _tag_names = ("trl", TAG)
    _name = "PerCE"
    _paper = {  # noqa: RUF012 (TRL reads it from the class)
        "title": "Rethinking Personalization in Large Language Models at the Token Level",
        "id": "2603.06595",
    }

    def __init__(
        self,
        model: Any,
        args: PerCEConfig | None = None,
        *in_order: Any,
        template: Template | None = None,
        max_profile_tokens: int | None = None,
        **named: Any,
    ) -> None:
        args = args if args is not None else PerCEConfig(output_dir="perce-output")
        given = as_trl_takes_them(self, model, args, *in_order, **named)
        check_arguments(model, args, given)
        train_dataset, eval_dataset = given.pop("train_dataset"), given.pop("eval_dataset", None)
        if isinstance(model, str):
            args.model_init_kwargs = _on_one_device(args)
        given["processing_class"] = tokenizer_for(model, args, given.get("processing_class"))
        if given.get("peft_config") is not None:
            given["peft_config"] = on_text_alone(given["peft_config"], shapes_of(model, args))
        self._train_dataset_seen, self._told_card = False, False
        self.best_step: BestStep | None = None  # kept with every checkpoint
        self.recipe: Recipe | None = None  # of the command that trains; None: a script does
        self.audits: dict[str, Audit] = {}
        self.pairs: dict[str, list[Pair]] = {}
        self._template, self._max_profile_tokens = template, max_profile_tokens
        self._prefixes = PrefixCache(lambda several: encode_prefixes(self.model, several, self.autocast))
        self.scoring_seconds, self.weight_scale, self.store_hits, self._prepared = 0.0, 1.0, 0.0, False
        tokenized = functools.partial(self._tokenized_rows, given["processing_class"], args)
        train_dataset = tokenized("train", train_dataset)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: tokenized(_eval_name(name), rows) for name, rows in eval_dataset.items()}
        else:
            eval_dataset = tokenized("eval", eval_dataset)
        initial = {name: p.data for name, p in model.named_parameters()} if isinstance(model, PeftModel) else {}
        super().__init__(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **given)
        # TRL makes a 4-bit model's adapter bf16, in which small updates round away and fp16's scaler fails.
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.data = initial.get(name, parameter.data).to(parameter.device, torch.float32)
        keep_base_constant(self.model)
        warn_of_untrained_end(self.model, Chat(self._tokenizer, template))
        self.autocast = args.autocast
        repeat_heads_where_needed(base_of(self.model), self.autocast)
        project_scored_positions_only(self.model)
        if args.packing and (others := layers_without_attention(base_of(self.model))):
            raise ConfigError(
                [f"packing: rows would leak into the next in this model's layers of {', '.join(others)}; leave it out"]
            )
        if args.profile_pass == "frozen":
            enable_prefix_attention(base_of(self.model), self._prefixes)
        self.current_gradient_accumulation_steps = args.gradient_accumulation_steps  # until the training loop counts
        bootstrap = args.estimator == "bootstrap"
        self._scoring_forward = scoring_forward(self.model) if bootstrap else None
        self.data_collator = self._collator(bootstrap)

    def _collator(self, bootstrap: bool) -> PairCollator:
        args, pairs = self.args, self.pairs["train"]
        twins = [self._prefixes.features(pair.counterfactual, args.profile_pass) for pair in pairs if bootstrap]
        padding = {"pad_token_id": self._tokenizer.pad_token_id, "pad_to_multiple_of": args.pad_to_multiple_of}
        return PairCollator(**padding, counterfactuals=twins if bootstrap else None)

    # Before training: rows become pairs, pairs get their reference log-probs

    def _prepare_dataset(
        self,
        dataset: datasets.Dataset,
        processing_class: PreTrainedTokenizerBase,
        args: PerCEConfig,
        packing: bool,
        formatting_func: None,
        dataset_name: str,
    ) -> datasets.Dataset:
        """TRL's hook: tokenises a data set of someone's script; rows of our own were tokenised in `__init__`."""
        if self._train_dataset_seen:  # TRL prepares it first
            dataset_name = _eval_name(dataset_name)
        self._train_dataset_seen = True
        check_rows(dataset, dataset_name)
        if "input_ids" in dataset.column_names:
            return dataset
        records = dataset.with_format(None)  # as they were read, not as arrays
        rows = [from_columns(record, f"{dataset_name} row {number}") for number, record in enumerate(records)]
        tokenized = self._tokenized(rows, processing_class, args, dataset_name)
        audit = self.audits[dataset_name]
        if audit.dropped:  # rows of our own commands are told of by these
            warn(f"{audit.dropped.total()} of {audit.read} {dataset_name} rows are left out: {audit.reasons()}")
        if audit.thoughts_left_out:
            thoughts = counted(audit.thoughts_left_out, "thought")
            warn(f"{thoughts} of the {dataset_name} rows left out: the chat template does not show them")
        return tokenized

    def _tokenized_rows(
        self,
        processing_class: Any,
        args: PerCEConfig,
        dataset_name: str,
        rows: datasets.Dataset | Sequence[Row] | None,
    ) -> datasets.Dataset | None:
        """As `_tokenized` for a list of rows; a data set is left to `_prepare_dataset`."""
        if rows is None or isinstance(rows, datasets.Dataset):
            return rows
        return self._tokenized(rows, processing_class, args, dataset_name)

    def _tokenized(
        self, rows: Sequence[Row], processing_class: Any, args: PerCEConfig, dataset_name: str
    ) -> datasets.Dataset:
        """Columns `input_ids`, `labels`, with `profile_pass: frozen` `prefix`, in training `row`, each (T,) a row."""
        if not any(row.profile for row in rows):
            raise DataError(f"The {dataset_name} data set's profile column is empty in all {len(rows)} rows")
        limits = args.max_length, self._max_profile_tokens
        maker = PairMaker(processing_class, self._template, *limits, args.profile_pass)
        audit = self.audits[dataset_name] = Audit()
        pairs = self.pairs[dataset_name] = maker.make(rows, audit)
        require(pairs, audit, dataset_name)
        features = [self._prefixes.features(trained_tokens(pair, args), args.profile_pass) for pair in pairs]
        columns = {name: [feature[name] for feature in features] for name in features[0]}
        if dataset_name == "train":
            columns["row"] = [[index] * len(feature["input_ids"]) for index, feature in enumerate(features)]
        return datasets.Dataset.from_dict(columns)

    def prepare(self) -> None:
        """Adds the reference log-probs to the training set, then shuffles and packs it; `train` calls it, once.

        One scoring pass with the adapters off, or store hits: the longest step before training.
        """
        if self._prepared:
            return
        started = time.perf_counter()
        reference = reference_log_probs(self.model, self.pairs["train"], self.args, self.args.seed)
        self.scoring_seconds = time.perf_counter() - started
        self.weight_scale, self.store_hits = reference.scale, reference.store_hits
        dataset = self.train_dataset
        for name, column in reference.columns.items():
            dataset = dataset.add_column(name, column)
        if self.args.shuffle_dataset:
            dataset = dataset.shuffle(seed=self.args.seed)
        self.train_dataset = pack_dataset(dataset, self.args.max_length, "bfd") if self.args.packing else dataset
        self._prepared = True

    def get_train_dataloader(self) -> Any:
        """As TRL's, after `prepare`: a batch holds the reference log-probs."""
        self.prepare()
        return super().get_train_dataloader()

    # In training

    def stop_early(self, best: BestStep, validation: Sequence[ScoringJob]) -> None:
        """Measures `validation` where `best` is due, and ends the training where its patience has run out.

        `best` is saved with every checkpoint. Whoever trains puts the best step's weights back.
        """
        self.best_step = best
        self.add_callback(Validation(best, validation, self.autocast, self._prefixes))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss over `weighted_nll` of each token; plain NLL in evaluation.

        inputs: `input_ids`, `labels` (B, T), and what the collator adds: `row`, `prefix`, reference log-probs (B, T),
            with `bootstrap` the rows without their profile
        """
        row_numbers, prefix_numbers = inputs.pop("row", None), inputs.pop("prefix", None)
        without_profile = inputs.pop("counterfactual", None)
        reference = {name: inputs.pop(name)[:, 1:] for name in LOG_PROB_COLUMNS if name in inputs}  # (B, T-1)
        if without_profile is not None and model.training:
            reference["counterfactual_log_probs"] = self._without_profile(without_profile, inputs["labels"])

        def forward(**forward_inputs: Any) -> Any:
            return model(**self._with_prefix(forward_inputs, prefix_numbers))

        def weighted_forward(**forward_inputs: Any) -> Any:
            outputs = forward(**forward_inputs)
            weighted = weighted_nll(
                outputs.log_probs,
                reference.get("counterfactual_log_probs"),
                reference.get("factual_log_probs"),
                weighting=Weighting.of(self.args, self.weight_scale),
            )
            self._record(outputs, weighted.pir, num_items_in_batch)
            outputs.log_probs = -weighted.per_token  # TRL sums them and divides by the window's tokens
            return outputs

        result = super().compute_loss(
            weighted_forward if model.training else forward,
            inputs,
            return_outputs,
            num_items_in_batch=num_items_in_batch,
        )
        loss = result[0] if return_outputs else result
        if model.training and not torch.isfinite(loss):
            rows = [
                self.pairs["train"][index].row for index in row_numbers.unique().tolist() if index >= 0
            ]  # -1: padding
            raise non_finite_error(f"The loss is {loss.item()}", self.state.global_step + 1, rows, self.autocast)
        return result

    def _with_prefix(self, inputs: dict[str, Any], numbers: Tensor | None) -> dict[str, Any]:
        """`inputs` of a forward (B, T) with the KV prefixes that `numbers` (B, T) name, if there are any."""
        if numbers is None:
            return without_needless_mask(base_of(self.model), inputs)
        return with_prefix(inputs, numbers, self._prefixes)

    def _without_profile(self, twin: dict[str, Any], labels: Tensor) -> Tensor:
        """Log-probs of the same adapter without the profile, at the places of the training forward's (B, T-1)."""
        assert self._scoring_forward is not None
        twin = self._with_prefix(twin, twin.pop("prefix", None))
        with no_grad_eval(self.model, adapters=True):
            flat = batch_log_probs(self._scoring_forward, twin, self.autocast)
        mask = labels[:, 1:] != IGNORED
        return torch.zeros(mask.shape, device=flat.device).masked_scatter(mask, flat)

    def _record(self, outputs: Any, pir: Tensor | None, window_tokens: Any) -> None:
        """Adds the step's figures to those that TRL averages and logs; `window_tokens`: of the accumulation window.

        The unweighted loss is scaled so that its mean over a window's batches is the window's mean over tokens.
        """
        mask = outputs.label_mask
        batches = 1 if window_tokens is None else self.current_gradient_accumulation_steps
        tokens = torch.as_tensor(mask.sum() if window_tokens is None else window_tokens).clamp(min=1)
        figures = {"unweighted_loss": -(outputs.log_probs.detach().sum() * batches / tokens).item()}
        if pir is not None:
            figures |= weight_statistics(pir[mask], Weighting.of(self.args, self.weight_scale))
            figures["store_hits"] = self.store_hits
        for name, value in figures.items():
            self._metrics["train"][name].append(value)

    # Hooks of TRL and transformers

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*dict.fromkeys([*self._signature_columns, "row", "prefix", *LOG_PROB_COLUMNS])]

    def _get_train_sampler(self, train_dataset: datasets.Dataset | None = None) -> Sampler[int] | None:
        """As TRL's, in an order that a resumed run repeats."""
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        return train_sampler(self.args, dataset["input_ids"], self.args.seed)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As TRL's, without a draw from training's random state, so that a resumed run draws the same numbers."""
        device = self.args.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            return super().evaluate(*args, **kwargs)

    def predict(self, test_dataset: datasets.Dataset, *args: Any, **kwargs: Any) -> Any:
        """As TRL's, of rows as `train_dataset` has them too."""
        prepared = self._prepare_dataset(test_dataset, self.processing_class, self.args, False, None, "test")
        return super().predict(prepared, *args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As TRL's; a README.md in the output folder that no trainer of ours wrote is left as it is."""
        card = Path(self.args.output_dir) / "README.md"
        if card.exists() and f"- {TAG}\n" not in card.read_text(encoding="utf-8", errors="replace"):
            if not self._told_card:  # a card is due at every checkpoint
                say(f"{card} is not ours: it is left as it is, and no model card is written")
            self._told_card = True
            return
        super().create_model_card(*args, **kwargs)

    @functools.cached_property
    def _origin(self) -> dict[str, Any]:
        """Of the adapter's base, which no training changes: it is hashed once."""
        return origin_of(self.model)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As TRL's, with the metadata by which our commands load the adapter."""
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        rows = [pair.row for pair in self.pairs["train"]]
        about = trainer_metadata(
            self.recipe or script_recipe(self.model, self.args, self._template, self._max_profile_tokens),
            self.args,
            str(self._tokenizer.chat_template),
            rows,
            self.state.global_step,
            mean_statistics(self.state.log_history, self.store_hits),
        )
        name = self.model.active_adapter
        folder = Path(output_dir or self.args.output_dir) / ("" if name == "default" else name)  # as peft has it
        write_json(folder / METADATA, {**about, SCRIPT: self.recipe is None, **self._origin})

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        advice = "Free some space and run the same command again: it resumes from the last whole checkpoint."
        if not all_finite(parameter for parameter in self.model.parameters() if parameter.requires_grad):
            raise NonFiniteLossError(
                f"The adapter's weights are not finite after step {self.state.global_step}: a gradient was not. "
                "Nothing of it was saved. Lower train.learning_rate."
            )
        with disk_full_is_clear(Path(self.args.output_dir), advice):
            if self.best_step is not None:  # ahead of trainer_state.json, which says that a checkpoint is whole
                folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
                folder.mkdir(parents=True, exist_ok=True)
                torch.save(self.best_step.state(), folder / _BEST_STEP)
            super()._save_checkpoint(model, trial)

    @staticmethod
    def load_best_step(checkpoint: str | Path) -> dict[str, Any]:
        """The state of `best_step` in a checkpoint."""
        state: dict[str, Any] = torch.load(Path(checkpoint) / _BEST_STEP, map_location="cpu", weights_only=True)
        return state


def _eval_name(name: str) -> str:
    """What an evaluation set called `name` is called beside the training set."""
    return "eval train" if name == "train" else name


def non_finite_error(
    what: str, step: int, rows: Sequence[Row], autocast: torch.dtype | None = None
) -> NonFiniteLossError:
    """The error that names the rows of a step whose loss or gradient is not finite.

    what: "The loss is nan"
    autocast: the dtype that the step ran in
    """
    named = "; ".join(f"{row.where} (user {row.user})" for row in rows)
    return NonFiniteLossError(
        f"{what} at step {step}, in these rows: {named}. Nothing of this step was kept. {advice(autocast)}"
        f"{' Else lower' if advice(autocast) else 'Lower'} train.learning_rate, or look at the rows with "
        "`perce-lite check`."
    )


def _on_one_device(args: PerCEConfig) -> dict[str, Any]:
    """What TRL loads a model's name with: on the training's own device, where TRL's "auto" takes every GPU it sees."""
    options = args.model_init_kwargs or {}
    return options if args.device.type == "cpu" else {"device_map": {"": args.device}, **options}
