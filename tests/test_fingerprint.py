"""A base and the files that it comes from are hashed once a process, and again only where something has changed."""

import os
from pathlib import Path

import pytest
import torch
import toys
from fleet_fixtures import TEXT, Clock, rows_of
from peft import LoraConfig, get_peft_model
from test_base import nf4

from perce_lite.evaluation.summary import train_and_measure
from perce_lite.fleet.fleet import fleet
from perce_lite.model import builtin, gguf_base
from perce_lite.model import fingerprint as hashing
from perce_lite.model.base import load_base
from perce_lite.model.fingerprint import fingerprint, forget_fingerprint, remember_fingerprint
from perce_lite.model.footprint import source_fingerprint
from perce_lite.recipe import load_recipe

pytest_plugins = ["cli_fixtures"]

TRAIN = """
train: {max_steps: 1, output_dir: out, store: store}
split: {test: 0.25, validation: 0.25}
evaluation: {max_rows: 2, max_new_tokens: 2}
"""


@pytest.fixture
def hashed(monkeypatch):
    """Names of the base's weights, as they are hashed."""
    names = []
    real = hashing.hash_parameter

    def counted(state, name, parameter):
        names.append(name)
        real(state, name, parameter)

    monkeypatch.setattr(hashing, "hash_parameter", counted)
    return names


def weights_of(model):
    return sorted(name for name, _ in model.named_parameters())


def test_training_scoring_measuring_and_saving_hash_the_base_once(recipe, hashed):
    read = load_recipe(recipe(toys.toy_rows(2, 8), TRAIN))
    figures = train_and_measure(read)
    assert figures["losses"], "it was measured, and its log-probs were kept in the store"
    assert sorted(hashed) == weights_of(toys.toy_model("chatml", 600))


def test_a_base_that_is_loaded_is_hashed_once_with_adapters_and_without(recipe, hashed):
    base = load_base(load_recipe(recipe())).model
    expected = weights_of(base)
    prints = [fingerprint(base)]
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    prints += [fingerprint(adapted), fingerprint(base)]
    assert len(set(prints)) == 1
    assert sorted(hashed) == expected


@pytest.mark.parametrize("quantised", [False, True])
def test_a_weight_that_was_written_to_or_replaced_is_noticed(tmp_path, quantised):
    base = nf4(toys.toy_folder(tmp_path / "toy")) if quantised else toys.toy_model("chatml", 600)
    remember_fingerprint(base)
    prints = [fingerprint(base)]
    with torch.no_grad():
        base.model.norm.weight[0] += 1
    prints.append(fingerprint(base))
    base.model.norm.weight = torch.nn.Parameter(base.model.norm.weight + 1)
    prints.append(fingerprint(base))
    base.model.norm.weight.data = base.model.norm.weight.data + 1
    prints.append(fingerprint(base))
    layer = base.model.layers[0].mlp.up_proj
    if quantised:
        layer.weight.quant_state.absmax += 1
    else:
        layer.weight.requires_grad_(False).mul_(2)
    prints.append(fingerprint(base))
    base.model.norm.weight.data[0] += 1  # not counted by torch
    forget_fingerprint(base)
    prints.append(fingerprint(base))
    assert len(set(prints)) == 6


def test_a_merged_adapter_is_noticed():
    base = toys.toy_model("chatml", 600)
    remember_fingerprint(base)
    before = fingerprint(base)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    assert fingerprint(adapted) == before
    merged = adapted.merge_and_unload(safe_merge=True)
    assert merged is base
    assert fingerprint(merged) != before


def test_files_that_have_not_changed_are_read_once(recipe, monkeypatch):
    """A thousand users' enrolment asks for the hash of the model's files; it reads them once."""
    opened = []
    real = Path.open

    def counted(self, *args, **kwargs):
        opened.append(self)
        return real(self, *args, **kwargs)

    read = load_recipe(recipe(rows_of(3), TEXT))
    weights = Path(read.model) / "model.safetensors"
    monkeypatch.setattr(Path, "open", counted)
    os.utime(weights)  # another test may have read it
    first = source_fingerprint(read)
    assert source_fingerprint(read) == first
    assert opened.count(weights) == 1
    with weights.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        changed = file.read(4)
        file.seek(-4, os.SEEK_END)
        file.write(bytes(255 - byte for byte in changed))
    try:
        assert source_fingerprint(read) != first
    finally:
        with weights.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(changed)
    assert source_fingerprint(read) == first


def test_a_fleet_asks_for_the_hash_of_the_files_once_a_recipe(recipe, monkeypatch):
    asked = []
    real = source_fingerprint
    monkeypatch.setattr("perce_lite.fleet.fleet.source_fingerprint", lambda read: (asked.append(read), real(read))[1])
    fleet(load_recipe(recipe(rows_of(5), TEXT)), Clock())
    assert len(asked) == len({id(read) for read in asked}) <= 2, "of the shared adapter, and of the users"


def test_a_built_in_folder_is_looked_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("PERCE_LITE_HOME", str(tmp_path))
    looked = []
    folder = builtin._folder_of("smollm2-135m")
    toys.toy_folder(folder)
    real = gguf_base.read_json
    monkeypatch.setattr(gguf_base, "read_json", lambda path: (looked.append(path.name), real(path))[1])
    for _ in range(3):
        assert builtin.built_in_folder("smollm2-135m") == folder
    assert sorted(looked) == ["config.json", "tokenizer.json", "tokenizer_config.json"]


def test_sha256_is_of_the_file_as_it_is(tmp_path):
    file = tmp_path / "file"
    prints = []
    for content in (b"a", b"bb"):
        file.write_bytes(content)
        prints += [hashing.sha256(file), hashing.sha256(file)]
    assert prints[0] == prints[1] == "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    assert prints[2] == prints[3] != prints[0]
