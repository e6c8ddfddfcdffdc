"""The recipes for GPUs: each is read, fits its GPU by the plan, and trains a toy of its model's family."""

import json
from pathlib import Path

import pytest
import toys
from memory_fixtures import save_toy

from perce_lite.evaluation.summary import train_and_measure
from perce_lite.fleet.engines.slots import engine_for
from perce_lite.fleet.fleet import fleet
from perce_lite.planning.gpus import gpu
from perce_lite.planning.plan import Plan
from perce_lite.planning.shapes import known_config
from perce_lite.recipe import load_recipe

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
GPUS = {
    "colab-t4": "T4", "rtx-8gb": "8GB", "rtx-12gb": "12GB", "rtx-24gb": "24GB", "longlamp": "16GB", "dialogue": "8GB",
    "fleet": "8GB",
}  # fmt: skip
SMALL = [
    "device=cpu", "dtype=float32", "train.max_steps=1", "train.max_length=600", "evaluation.max_rows=2",
    "evaluation.max_new_tokens=2", "lora.r=2",
]  # fmt: skip


def turns(row: dict) -> dict:
    """A row of the toys as a dialogue of two turns."""
    asked, answered = ({"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]})
    return {"user": row["user"], "profile": row["profile"], "messages": [asked, answered, asked, answered]}


@pytest.mark.parametrize("name", GPUS)
def test_a_recipe_fits_its_gpu(name):
    plan = Plan(load_recipe(RECIPES / f"{name}.yaml"))
    here = gpu(GPUS[name])
    assert plan.fits(plan.choice, here)
    assert plan.longest_row(plan.choice, here) >= plan.rows.length


@pytest.mark.parametrize("name", GPUS)
def test_a_recipe_trains_a_toy_of_its_family(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind = known_config(load_recipe(RECIPES / f"{name}.yaml").model).model_type
    save_toy(tmp_path / "toy", kind)
    users, rows = 2, toys.toy_rows(users=2, per_user=12)
    if name == "dialogue":
        rows = [turns(row) for row in rows]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = [f"model={tmp_path / 'toy'}", f"data.path={tmp_path / 'rows.jsonl'}", "data.hub=null", "data.hub_config=null"]
    recipe = load_recipe(RECIPES / f"{name}.yaml", [*own, *SMALL, "train.output_dir=out"])
    if name == "fleet":
        told = fleet(recipe, engine_for, [], [], False)
        assert not told.failed
        assert len(list(Path("out").rglob("adapter_model.safetensors"))) >= users
        return
    figures = train_and_measure(recipe)
    assert figures["rows"]["kept"] > 0
    assert (Path(figures["adapter"]) / "adapter_model.safetensors").is_file()


def test_the_dialogues_that_come_along_are_read_and_planned(real_model):
    """With the built-in model's tokenizer, since Qwen's is not at hand here."""
    plan = Plan(load_recipe(RECIPES / "dialogue.yaml", ["model=smollm2-135m"]))
    assert "of 9 training rows" in plan.rows.source or "of 10 training rows" in plan.rows.source
    assert 100 < plan.rows.length < 1024


def test_a_beginner_finds_a_comment_on_what_to_change():
    for name in GPUS:
        lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
        for key in ("model:", "num_train_epochs:", "per_device_train_batch_size:", "max_length:", "r:"):
            line = next(one for one in lines if one.strip().startswith(key))
            assert "# " in line, f"{name}: {key}"
