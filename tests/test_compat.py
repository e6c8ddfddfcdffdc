"""What PerCE Lite leans on in other libraries is still there, and does what it is needed for."""

import ast
from pathlib import Path

import bitsandbytes as bnb
import datasets
import pytest
import torch
import toys
from peft import LoraConfig, get_peft_model
from test_base import nf4
from transformers import DynamicCache
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import add_fused_lm_head

import perce_lite
from perce_lite.errors import CompatibilityError
from perce_lite.files import read_json
from perce_lite.model import compat
from perce_lite.model.fingerprint import fingerprint

HOUSE = Path(perce_lite.__file__).parent


def test_no_other_file_imports_private_names_of_other_libraries():
    """Names that start with an underscore, and modules that hold no public interface."""
    private = ("peft.tuners", "transformers.cache_utils", "transformers.masking_utils", "transformers.modeling_utils",
               "transformers.modeling_rope_utils", "transformers.models", "transformers.quantizers",
               "transformers.trainer", "trl.kernels", "trl.trainer.utils", "bitsandbytes.")  # fmt: skip
    found = []
    for path in HOUSE.rglob("*.py"):
        if path == HOUSE / "model" / "compat.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and not node.module.startswith("perce_lite"):
                hidden = any(alias.name.startswith("_") for alias in node.names) and node.module != "__future__"
                if hidden or node.module.startswith(private):
                    found.append(f"{path.relative_to(HOUSE)}: {node.module}")
    assert not found


# torch


def test_a_write_in_place_is_counted():
    weight = torch.nn.Parameter(torch.zeros(2))
    before = compat.write_count(weight)
    with torch.no_grad():
        weight[0] = 1
    assert compat.write_count(weight) > before


# bitsandbytes


def test_the_switch_against_repacking_is_there_and_is_read(tmp_path, monkeypatch):
    """With the switch on, a no-grad forward repacks the weights; that is why it is set off."""
    model = nf4(toys.toy_folder(tmp_path / "toy"))
    layer = next(module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit))
    assert "support_avx512bf16_for_cpu" in vars(layer)
    repacked = []
    monkeypatch.setattr(
        bnb.nn.modules, "_convert_weight_packed_for_cpu", lambda data, state: (repacked.append(1), (data, state))[1]
    )
    ids = torch.arange(4)[None]
    layer.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        model(input_ids=ids)
    assert repacked
    compat.keep_base_constant(model)
    repacked.clear()
    with torch.no_grad():
        model(input_ids=ids)
    assert not repacked


def test_a_bitsandbytes_without_the_switch_is_refused(tmp_path):
    model = nf4(toys.toy_folder(tmp_path / "toy"))
    layer = next(module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit))
    del layer.support_avx512bf16_for_cpu
    with pytest.raises(CompatibilityError, match=r"bitsandbytes \S+: Linear4bit has no attribute"):
        compat.keep_base_constant(model)


def test_the_constants_of_a_quantisation_are_part_of_the_hash(tmp_path):
    model = nf4(toys.toy_folder(tmp_path / "toy"))
    before = fingerprint(model)
    layer = next(module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit))
    state = compat.quantisation_state(layer.weight)
    assert {"absmax", "quant_map"} <= {key.rpartition(".")[2] for key in state.as_dict(packed=True)}
    state.absmax += 1
    assert fingerprint(model) != before


# peft


def test_names_tell_adapters_from_the_base():
    base = toys.toy_model("chatml", 600)
    names = {name for name, _ in base.named_parameters()}
    config = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["model.norm"])
    adapted = get_peft_model(base, config)
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    every = {name for name, _ in adapted.named_parameters()}
    assert trained == {name for name in every if compat.is_lora_weight(name)} | {
        "base_model.model.model.norm.modules_to_save.default.weight"
    }
    bare = {compat.base_weight_name(name) for name in every if compat.is_base_weight(name)}
    assert bare - {"model.norm.original_module.weight"} == names - {"model.norm.weight"}


def test_lora_layers_have_their_dictionaries():
    layers = compat.lora_layers(get_peft_model(toys.toy_model("chatml", 600), LoraConfig(r=2, lora_alpha=6)))
    assert len(layers) == 4
    for layer in layers.values():
        assert (layer.r, layer.lora_alpha, layer.scaling) == ({"default": 2}, {"default": 6}, {"default": 3.0})
        assert layer.lora_A["default"].weight.shape[0] == layer.lora_B["default"].weight.shape[1] == 2
        assert not layer.lora_variant
        assert isinstance(layer, compat.LoraLinear)


# transformers


def test_the_config_does_not_tell_the_attention_so_it_is_asked_for():
    model = toys.toy_model("chatml", 600)
    assert compat.attention_implementation(model) == "sdpa"
    assert not [name for name in model.config.to_dict() if "attn_implementation" in name]


@pytest.mark.parametrize("family", ["chatml", "gemma", "qwen3"])
def test_attention_functions_take_what_prefix_attention_gives_them(family):
    attention = toys.toy_model(family, 600).model.layers[0].self_attn
    query, key = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 5, 16)
    for name, mask in (("sdpa", torch.ones(1, 1, 3, 5, dtype=torch.bool)), ("eager", torch.zeros(1, 1, 3, 5))):
        out, _ = compat.attention_function(name, attention)(attention, query, key, key, mask, scaling=0.25, dropout=0.0)
        assert out.shape == (1, 3, 4, 16)


def test_a_cache_keeps_every_position_of_every_row():
    cache = DynamicCache()
    keys = torch.arange(24.0).view(2, 1, 3, 4)
    for layer in range(2):
        cache.update(keys + layer, -keys - layer, layer)
    assert compat.cache_bytes(cache) == 4 * 24 * 4
    short, whole = compat.split_cache(cache, [2, 3])
    for layer in range(2):
        assert torch.equal(compat.key_values(short, layer)[0], keys[:1, :, :2] + layer)
        assert torch.equal(compat.key_values(whole, layer)[1], -keys[1:] - layer)
    assert not cache.layers


def test_a_cache_that_forgets_positions_is_refused():
    model = toys.toy_model("gemma", 600)
    assert "sliding_attention" in model.config.layer_types
    sliding = DynamicCache(config=model.config)
    model(input_ids=torch.arange(4)[None], past_key_values=sliding, use_cache=True)
    with pytest.raises(CompatibilityError, match="a DynamicCache without a configuration holds"):
        compat.key_values(sliding, model.config.layer_types.index("sliding_attention"))
    assert not compat.keeps_every_position(sliding)
    plain = DynamicCache()
    model(input_ids=torch.arange(4)[None], past_key_values=plain, use_cache=True)
    for layer in range(2):
        assert compat.key_values(plain, layer)[0].shape[2] == 4
    assert compat.keeps_every_position(plain)


def test_the_state_of_a_checkpoint_is_written_last(toy_trainer, monkeypatch, tmp_path):
    """A checkpoint that a kill left incomplete is known by its missing state."""
    trainer = toy_trainer(max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    (folder,) = (tmp_path / "out").glob("checkpoint-*")
    assert read_json(folder / "trainer_state.json")["global_step"] == 1
    written = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(written) > 5
    assert max(written, key=written.__getitem__) == "trainer_state.json"


# TRL


def test_trls_head_keeps_its_settings_where_they_are_read():
    gemma = toys.toy_model("gemma", 600)
    settings = compat.head_settings(gemma, cast_lm_head_to_fp32=True)
    assert settings == compat.HeadSettings(1.0, True, ("log_probs",), 30.0, 1.0)
    assert "forward" not in vars(gemma)
    with pytest.raises(CompatibilityError, match=r"trl \S+: the forward of add_fused_lm_head has no temperature"):
        compat.settings_of(lambda: None)


def test_fields_of_trls_output_are_in_the_order_of_its_kernel():
    """Each field is asked for alone: it is the only one that is filled, besides the log-probs."""
    model = toys.toy_model("chatml", 600)
    ids = torch.arange(6)[None]
    for name in compat.PER_TOKEN:
        add_fused_lm_head(model, outputs=("log_probs", name))
        settings = compat.settings_of(model.forward.__func__)
        theirs = model(input_ids=ids, labels=ids, fused_lm_head=True)[name][0]
        hidden = model.base_model(input_ids=ids).last_hidden_state[0, :-1]
        fields = compat.chunked_log_probs(hidden, model.lm_head, ids[0, 1:], settings)
        assert {field for field, values in fields.items() if values is not None} == {"log_probs", name}
        torch.testing.assert_close(fields[name], theirs)


def test_trls_loss_is_made_of_the_log_probs_alone(toy_trainer):
    """What the weighted forward puts there is what is trained on."""
    trainer = toy_trainer(estimator="uniform", prepared=True)
    batch = next(iter(trainer.get_train_dataloader()))
    plain = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    trainer.model.train()

    def halved(**inputs):
        outputs = trainer.model(**inputs)
        outputs.log_probs = outputs.log_probs / 2
        outputs.loss = None
        return outputs

    whole = SFTTrainer.compute_loss(trainer, trainer.model, dict(plain), num_items_in_batch=7)
    half = SFTTrainer.compute_loss(trainer, halved, dict(plain), num_items_in_batch=7)
    torch.testing.assert_close(half, whole / 2)


def test_trl_prepares_the_training_set_first(tmp_path):
    prepared = []

    class Watched(SFTTrainer):
        def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
            prepared.append(dataset_name)
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)

    rows = datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}])
    config = SFTConfig(str(tmp_path), report_to="none", bf16=False)
    Watched(
        toys.toy_model("chatml", 600), config, train_dataset=rows, eval_dataset={"train": rows, "more": rows},
        processing_class=toys.toy_tokenizer("chatml"),
    )  # fmt: skip
    assert prepared[0] == "train"
    assert len(prepared) == 3


def test_the_trainer_has_its_hooks_and_attributes(toy_trainer):
    compat.require_trainer_hooks(SFTTrainer)
    trainer = toy_trainer(max_steps=1)
    trainer.train()
    assert not [name for name in compat.TRAINER_ATTRIBUTES if name not in vars(trainer)]
    assert trainer._metrics.keys() == {"train", "eval"}


@pytest.mark.parametrize("changed", compat.TRAINER_HOOKS)
def test_a_trainer_whose_hook_takes_other_arguments_is_refused(changed):
    with pytest.raises(CompatibilityError, match=rf"trl \S+: SFTTrainer\.{changed} takes \('other',\), not"):
        compat.require_trainer_hooks(type("Trainer", (SFTTrainer,), {changed: lambda self, other: None}))


def test_a_trainer_without_hooks_is_refused():
    with pytest.raises(CompatibilityError, match=r"SFTTrainer\._prepare_dataset takes None"):
        compat.require_trainer_hooks(object)
