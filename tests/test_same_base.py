"""A fine-tune whose embedding nobody touched is another base; the same base in other numbers is not."""

import json
from pathlib import Path

import pytest
import torch
import toys
from fleet_fixtures import TEXT, Clock, rows_of
from safetensors.torch import load_file, save_file
from test_base import nf4

from perce_lite.errors import AdapterError, FleetError, RunError
from perce_lite.evaluation.summary import train_and_measure
from perce_lite.fleet.fleet import fleet
from perce_lite.fleet.registry import opened
from perce_lite.model import adapters
from perce_lite.model.fingerprint import same_base, sketch
from perce_lite.recipe import load_recipe

pytest_plugins = ["cli_fixtures"]

TRAIN = "train: {max_steps: 1, output_dir: out, store: store}\nevaluation: {max_rows: 2, max_new_tokens: 2}\n"
MATRICES = ["layers.0.self_attn.q_proj", "layers.0.mlp.down_proj", "layers.1.self_attn.o_proj", "layers.1.mlp.up_proj"]


def tuned(model, name: str, share: float = 1e-3):
    """A fine-tune of one matrix: it moved by that share of its size."""
    weight = model.get_submodule(f"model.{name}").weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    weight.data += (share * weight.std() * noise).to(weight.dtype)
    return model


@pytest.mark.parametrize("name", MATRICES)
def test_a_fine_tune_of_any_matrix_is_another_base(name):
    base, other = toys.toy_model("chatml", 600), tuned(toys.toy_model("chatml", 600), name)
    assert torch.equal(base.get_input_embeddings().weight, other.get_input_embeddings().weight)
    assert not same_base(sketch(base), sketch(other))
    assert same_base(sketch(base), sketch(toys.toy_model("chatml", 600)))


def test_other_numbers_are_the_same_base(tmp_path):
    folder = toys.toy_folder(tmp_path / "toy")
    full = toys.toy_model("chatml", 600)
    sketches = [sketch(full)]
    sketches += [sketch(toys.toy_model("chatml", 600, dtype=dtype)) for dtype in (torch.bfloat16, torch.float16)]
    sketches += [sketch(nf4(folder)), sketch(nf4(folder, torch.bfloat16))]
    for one in sketches:
        assert all(same_base(one, other) for other in sketches)
        assert not same_base(one, sketch(toys.toy_model("chatml", 600, seed=5)))
        json.dumps(one)


def test_a_fine_tune_in_4_bit_is_another_base(tmp_path):
    folder = toys.toy_folder(tmp_path / "toy")
    before = sketch(nf4(folder))
    weights = load_file(folder / "model.safetensors")
    moved = {name: tensor * 1.02 if "proj" in name else tensor for name, tensor in weights.items()}
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    assert not same_base(before, sketch(nf4(folder)))


def test_a_sketch_of_an_earlier_version_is_compared_as_far_as_it_goes(toy_trainer, tmp_path, capfd):
    trainer = toy_trainer(max_steps=1)
    adapters.save(trainer.model, tmp_path / "adapter", toys.ABOUT)
    other = tuned(toys.toy_model("chatml", 600), MATRICES[0])
    with pytest.raises(AdapterError, match="not on the base"):
        adapters.load(other, tmp_path / "adapter")
    file = tmp_path / "adapter" / "perce_lite.json"
    known = json.loads(file.read_text())
    for name in ("layers", "numbers"):
        del known["base"][name]
    file.write_text(json.dumps(known))
    capfd.readouterr()
    adapters.load(other, tmp_path / "adapter")
    assert "noted only the embedding of its base" in " ".join(capfd.readouterr().err.split())
    with pytest.raises(AdapterError, match="not on the base"):
        adapters.load(toys.toy_model("chatml", 600, seed=5), tmp_path / "adapter")


def test_train_does_not_call_another_base_s_run_its_own(recipe, tmp_path):
    toys.toy_folder(Path("mine"))
    path = recipe(text=TRAIN)
    path.write_text(path.read_text().replace(f"model: {load_recipe(path).model}", "model: mine"))
    first = train_and_measure(load_recipe(path))
    assert train_and_measure(load_recipe(path)) == first
    weights = load_file("mine/model.safetensors")
    save_file(weights, "mine/model.safetensors", metadata={"format": "pt"})  # written anew, the same
    assert train_and_measure(load_recipe(path)) == first
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] += 0.5
    save_file(weights, "mine/model.safetensors", metadata={"format": "pt"})
    kept = Path("out/adapter/adapter_model.safetensors").read_bytes()
    with pytest.raises(RunError, match="another recipe, data or base"):
        train_and_measure(load_recipe(path))
    assert Path("out/adapter/adapter_model.safetensors").read_bytes() == kept


def test_a_fleet_notes_the_layers_of_a_base_that_an_earlier_version_did_not(recipe):
    class Engine(Clock):
        def base(self):
            return {**super().base(), "layers": self.layers, "numbers": "float32"}

    path = recipe(rows_of(2), TEXT)
    fleet(load_recipe(path), Clock())
    engine = Engine()
    engine.layers = [1.0]
    fleet(load_recipe(path), engine, retrain=["user0"])
    with opened(Path("out")) as registry:
        assert json.loads(registry.meta("base"))["layers"] == [1.0]
    engine.layers = [2.0]
    with pytest.raises(FleetError, match="of another base"):
        fleet(load_recipe(path), engine, retrain=["user0"])
