"""Every option of TRL is known: a field that an upgrade brings or takes away fails here, by its name."""

import dataclasses

from transformers import TrainingArguments
from trl import SFTConfig

from perce_lite.config import VERDICTS

OF_TRL = set(
    """
    dataset_text_field model_init_kwargs trust_remote_code
    """.split()
)
"""Fields that `SFTConfig` adds and that need no verdict: how a model is loaded, and names of columns we never read."""

OF_TRANSFORMERS = set(
    """
    activation_checkpointing activation_checkpointing_kwargs adam_beta1 adam_beta2 adam_epsilon
    batch_eval_metrics bf16 data_seed dataloader_in_order dataloader_multiprocessing_context
    dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory dataloader_prefetch_factor
    ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout
    debug disable_tqdm do_eval do_predict do_train enable_jit_checkpoint eval_accumulation_steps eval_delay
    eval_do_concat_batches eval_on_start eval_steps eval_strategy eval_use_gather_object fp16 fsdp_config
    full_determinism gradient_accumulation_steps gradient_checkpointing gradient_checkpointing_kwargs
    greater_is_better hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy hub_token
    include_for_metrics include_num_input_tokens_seen label_names learning_rate length_column_name
    liger_kernel_config local_rank log_level log_level_replica log_on_each_node logging_first_step
    logging_nan_inf_filter logging_steps logging_strategy lr_scheduler_kwargs lr_scheduler_type max_grad_norm
    max_steps metric_for_best_model num_train_epochs optim optim_args optim_target_modules output_dir
    per_device_eval_batch_size per_device_train_batch_size prediction_loss_only project push_to_hub
    remove_unused_columns report_to restore_callback_states_from_checkpoint resume_from_checkpoint run_name
    save_on_each_node save_steps save_strategy save_total_limit seed skip_memory_metrics torch_compile_backend
    torch_compile_mode torch_empty_cache_steps trackio_bucket_id trackio_space_id trackio_static_space_id
    use_cache use_cpu warmup_steps weight_decay
    """.split()
)
"""Fields of `TrainingArguments` that work as in TRL: schedules, logging, saving, places, seeds."""

ARGUMENTS = {"compute_loss_func", "streaming data sets"}
"""Verdicts on arguments of the trainer, which are no fields."""


def fields(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}


def test_every_field_of_sft_config_has_a_verdict_or_is_known_to_need_none():
    assert fields(SFTConfig) - fields(TrainingArguments) - set(VERDICTS) == OF_TRL


def test_every_field_of_training_arguments_is_known():
    assert fields(TrainingArguments) - set(VERDICTS) == OF_TRANSFORMERS


def test_no_verdict_is_on_an_option_that_is_gone():
    assert set(VERDICTS) - ARGUMENTS <= fields(SFTConfig)
