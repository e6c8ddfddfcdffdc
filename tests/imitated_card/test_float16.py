"""A base that float16 cannot hold, on a card without bf16: nothing of it is kept, and what to do is said."""

import pytest
from memory_fixtures import recipe_for
from safetensors.torch import load_file, save_file

from imitated_card.runs import toy_recipe, train
from perce_lite.errors import NonFiniteLossError
from perce_lite.evaluation.bench.imitation.libraries import imitated
from perce_lite.evaluation.check import check
from perce_lite.planning.gpus import gpu
from perce_lite.planning.plan import figures
from perce_lite.recipe import with_train

T4 = (7, 5)


def overflowing(folder, *more):
    """A recipe over a toy whose residual stream passes 65,504."""
    recipe = toy_recipe(folder, "llama3", more)
    file = folder / "model/model.safetensors"
    weights = load_file(file)
    large = {name: weight * 3e4 if "down_proj" in name else weight for name, weight in weights.items()}
    save_file(large, file, metadata={"format": "pt"})
    return recipe


def test_a_log_prob_that_is_not_finite_is_never_stored(tmp_path):
    recipe = overflowing(tmp_path)
    with (
        imitated(capability=T4),
        pytest.raises(NonFiniteLossError, match=r"frozen base .*In float16 .*Set dtype: float32"),
    ):
        train(recipe)
    assert not list((tmp_path / "store").rglob("*.safetensors"))
    with imitated(capability=(8, 6)):
        assert train(with_train(recipe, "in bf16", [f"output_dir={tmp_path / 'bf16'}"]))["base"] > 0


def test_a_loss_that_is_not_finite_at_once_names_the_dtype(tmp_path):
    recipe = overflowing(tmp_path, "train.estimator=uniform")
    with (
        imitated(capability=T4),
        pytest.raises(NonFiniteLossError, match=r"loss is nan at step 1, .*Set dtype: float32"),
    ):
        train(recipe)


def test_plan_and_check_know(tmp_path, capsys):
    recipe = recipe_for(tmp_path, "gemma3_text", {}).model_copy(update={"dtype": "auto", "device": "auto"})
    known = {card["card"]: card["overflow"] for card in figures(recipe, [gpu("T4"), gpu("L4")])["cards"]}
    assert known["L4"] is None
    assert "where float16 ends" in known["T4"]
    in_float32 = recipe.model_copy(update={"dtype": "float32"})
    assert figures(in_float32, [gpu("T4")])["cards"][0]["overflow"] is None
    toy_recipe(tmp_path / "rows")
    (tmp_path / "rows.jsonl").write_text((tmp_path / "rows/rows.jsonl").read_text())
    for capability, warned in ((T4, True), ((8, 6), False)):
        with imitated(capability=capability):
            check(recipe)
        assert ("where float16 ends" in capsys.readouterr().err) == warned
