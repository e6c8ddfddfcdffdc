"""`PerCEConfig`: what it refuses and why, what it lets through, and the dtype that follows the device."""

import pytest
import torch
from transformers.trainer_pt_utils import AcceleratorConfig

from perce_lite import PerCEConfig
from perce_lite.config import VERDICTS, compute_dtype, pick_device
from perce_lite.errors import ConfigError, DeviceError, PerceLiteError

REFUSED = {
    "label_smoothing_factor": [{"label_smoothing_factor": 0.1}],
    "loss_type": [{"loss_type": "dft"}, {"loss_type": "chunked_nll"}],
    "completion_only_loss": [{"completion_only_loss": False}],
    "neftune_noise_alpha": [{"neftune_noise_alpha": 5.0, "estimator": name} for name in ("mixed", "bootstrap")],
    "packing": [{"packing": True, "max_length": None}],
    "packing_strategy": [{"packing": True, "packing_strategy": name} for name in ("bfd_split", "wrapped")],
    "eval_packing": [{"eval_packing": True}],
    "padding_free": [{"padding_free": True}],
    "use_liger_kernel": [{"use_liger_kernel": True}],
    "train_sampling_strategy": [{"train_sampling_strategy": "batch_rebalance"}],
    "chat_template_path": [{"chat_template_path": "Qwen/Qwen3-4B"}],
    "truncation_mode": [{"truncation_mode": "keep_end"}],
    "dataset_kwargs": [{"dataset_kwargs": {"skip_prepare_dataset": True}}],
    "auto_find_batch_size": [{"auto_find_batch_size": True}],
    "ignore_data_skip": [{"ignore_data_skip": True}],
    "save_only_model": [{"save_only_model": True}],
    "bf16_full_eval": [{"bf16_full_eval": True}],
    "fp16_full_eval": [{"fp16_full_eval": True}],
    "torch_compile": [{"torch_compile": True}],
    "eos_token": [{"eos_token": "<|im_end|>"}],
    "activation_offloading": [{"activation_offloading": True, "use_cpu": True}],
    "accelerator_config": [
        {"accelerator_config": one}
        for one in (
            {"split_batches": True},
            {"dispatch_batches": True},
            AcceleratorConfig(split_batches=True),
            "a.json",
        )
    ],
    "deepspeed": [{"deepspeed": {"zero_optimization": {"stage": 2}}}],
    "fsdp": [{"fsdp": True}, {"fsdp": "full_shard"}],
    "parallelism_config": [{"parallelism_config": "any"}],
}
"""By option, every way to trigger its verdict."""

ALLOWED = [
    {"label_smoothing_factor": 0.0},
    {"loss_type": "nll"},
    {"completion_only_loss": True},
    {"completion_only_loss": None},
    {"assistant_only_loss": True},
    *({"neftune_noise_alpha": 5.0, "estimator": name} for name in ("base", "shuffled", "uniform")),
    {"packing": True, "max_length": 64},
    {"packing": True, "packing_strategy": "bfd"},
    {"packing": True, "padding_free": True},
    {"packing_strategy": "wrapped"},
    {"eval_packing": False},
    *({"train_sampling_strategy": name} for name in ("random", "sequential", "group_by_length")),
    {"chat_template_path": "mine.jinja"},
    {"max_length": None},
    {"max_length": 1},
    {"shuffle_dataset": True, "pad_to_multiple_of": 8},
    *({"dataset_num_proc": count} for count in (1, 2)),
    {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 500},
    {"dataset_kwargs": {}},
    {"fsdp": ""},
    {"pad_token": "<|endoftext|>"},
    {"tf32": False},
    *({"average_tokens_across_devices": one} for one in (True, False)),
    {"clip_min": 0.0, "clip_max": 0.0},
    {"clip_min": 2.0, "clip_max": 2.0},
    {"clip_min": 0.0, "normalize_weights": "mean"},
    {"weighting": "additive", "clip_min": 0.0, "clip_max": 0.0, "normalize_weights": "mean"},
    *({"train_on": "counterfactual", "estimator": name} for name in ("base", "shuffled", "uniform")),
]


@pytest.fixture
def make(tmp_path):
    return lambda **more: PerCEConfig(output_dir=str(tmp_path), report_to="none", **more)


def faults(make, **more) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        make(**more)
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, PerceLiteError)
    assert all(fault in str(caught.value) for fault in caught.value.faults)
    return caught.value.faults


def named(fault: str) -> str:
    return fault.partition(":")[0]


def test_every_verdict_that_refuses_is_tried():
    assert set(REFUSED) == {name for name, verdict in VERDICTS.items() if verdict.refused is not None}


@pytest.mark.parametrize(
    ("name", "more"), [(name, more) for name, cases in REFUSED.items() for more in cases], ids=lambda one: str(one)[:50]
)
def test_what_would_not_be_perce_is_refused_by_name(make, name, more):
    (fault,) = faults(make, **more)
    assert named(fault) == name
    assert repr(more[name]) in fault
    assert VERDICTS[name].reason in fault


@pytest.mark.parametrize("more", ALLOWED, ids=str)
def test_what_stands_beside_it_is_allowed(make, more):
    config = make(**more)
    assert config.assistant_only_loss is False
    kept = {name: value for name, value in more.items() if name not in ("assistant_only_loss", "fsdp")}
    assert {name: getattr(config, name) for name in kept} == kept


@pytest.mark.parametrize("given", [None, {}, {"even_batches": False}, AcceleratorConfig(non_blocking=True)], ids=str)
def test_an_accelerator_config_that_spreads_nothing_is_allowed(make, given):
    read = make(accelerator_config=given).accelerator_config
    assert (read.split_batches, bool(read.dispatch_batches)) == (False, False)


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"clip_min": -0.1}, "clip_min"),
        ({"clip_min": 2.0, "clip_max": 1.9}, "clip_max"),
        ({"strength": 0.0}, "strength"),
        ({"weighting": "cubic"}, "weighting"),
        ({"clip_max": 0.5}, "clip_max"),  # below the default clip_min
        ({"weighting": "clip", "clip_min": 0, "clip_max": 0, "normalize_weights": "mean"}, "clip_max"),
        ({"estimator": "best"}, "estimator"),
        ({"normalize_weights": "sum"}, "normalize_weights"),
        ({"train_on": "both"}, "train_on"),
        ({"train_on": "counterfactual", "estimator": "mixed"}, "train_on"),
        ({"train_on": "counterfactual", "estimator": "bootstrap"}, "train_on"),
        ({"max_length": 0}, "max_length"),
        ({"max_length": -1}, "max_length"),
    ],
    ids=str,
)
def test_faults_of_our_own_fields(make, more, name):
    (fault,) = faults(make, **more)
    assert named(fault) == name


def test_a_wrong_word_is_answered_with_the_right_ones(make):
    (fault,) = faults(make, estimator="best")
    assert "base, mixed, bootstrap, uniform, shuffled" in fault


@pytest.mark.parametrize("name", ["clip_min", "clip_max"])
def test_a_clip_that_is_no_number_is_refused(make, name):
    assert named(faults(make, **{name: float("nan")})[0]) == name


def test_all_faults_at_once(make):
    found = faults(
        make,
        estimator="best",
        train_on="both",
        clip_min=-1,
        max_length=0,
        loss_type="dft",
        eval_packing=True,
        use_liger_kernel=True,
    )
    expected = ["estimator", "train_on", "clip_min", "max_length", "loss_type", "use_liger_kernel", "eval_packing"]
    assert sorted(map(named, found)) == sorted(expected)


def test_defaults(make):
    config = make()
    assert (config.estimator, config.train_on, config.normalize_weights) == ("base", "factual", "none")
    assert (config.clip_min, config.clip_max, config.store) == (0.8, 5.0, None)
    assert config.logging_nan_inf_filter is False


# Devices


@pytest.fixture
def card(monkeypatch):
    """Pretends that there is a CUDA card of a capability, or none."""

    def make(capability: tuple[int, int] | None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return make


@pytest.fixture
def cpu(monkeypatch):
    return lambda **has: monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((7, 0), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16"), ((8, 9), "bfloat16"), ((10, 0), "bfloat16")],
)
def test_a_card_computes_in_what_it_is_fast_in(card, capability, dtype):
    card(capability)
    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda")
    assert compute_dtype(pick_device()) == getattr(torch, dtype)


@pytest.mark.parametrize(
    ("has", "dtype"),
    [
        ({"avx2": True, "avx512_f": True}, "float32"),
        ({"avx512_bf16": False, "amx_bf16": False}, "float32"),
        ({"avx512_bf16": True}, "bfloat16"),
        ({"amx_bf16": True}, "bfloat16"),
        ({"amx_tile": True}, "bfloat16"),
    ],
    ids=str,
)
def test_a_cpu_computes_in_what_it_is_fast_in(card, cpu, make, has, dtype):
    card(None)
    cpu(**has)
    assert pick_device() == torch.device("cpu")
    assert compute_dtype(torch.device("cpu")) == getattr(torch, dtype)
    config = make()
    assert (config.bf16, config.fp16, config.use_cpu) == (dtype == "bfloat16", False, True)


def test_cpu_is_had_where_there_is_a_card(card):
    card((8, 0))
    assert pick_device("cpu") == torch.device("cpu")


def test_cuda_that_is_absent_is_a_clear_error(card):
    card(None)
    with pytest.raises(DeviceError, match=r"device: cuda .*no CUDA device.*device: auto or cpu"):
        pick_device("cuda")


def test_precision_that_was_asked_for_is_kept(card, cpu, make):
    card(None)
    cpu(avx512_bf16=True)
    assert make(bf16=False).bf16 is False
    cpu()
    assert make(bf16=True).bf16 is True
    half = make(fp16=True)
    assert (half.bf16, half.fp16) == (False, True)
