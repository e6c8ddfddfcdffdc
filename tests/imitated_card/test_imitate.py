"""`perce-lite plan --imitate`: a step of the recipe on an imitated card, whatever the recipe says."""

import json

import pytest
import torch

from imitated_card.runs import toy_recipe

pytest_plugins = ["cli_fixtures"]

RECIPES = {
    "its own rows, a window of batches": ("chatml", ["train.gradient_accumulation_steps=8"], "8GB", "flash"),
    "made rows, profiles frozen": ("chatml", ["train.profile_pass=frozen"], "8GB", None),
    "packed, on a T4": ("chatml", ["train.packing=true"], "T4", "memory-efficient with a mask"),
    "whole, its table on the host": ("llama3", ["quantization=none", "embedding_on_host=true"], "8GB", "flash"),
    "bootstrap": ("chatml", ["train.estimator=bootstrap"], "8GB", "flash"),
}
"""Model family, overrides, the GPU, the attention kernel that runs; None: several."""


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_imitated(tmp_path, run, name):
    family, more, gpu, kernel = RECIPES[name]
    recipe = toy_recipe(tmp_path, family)
    if "made rows" in name:
        (tmp_path / "model" / "tokenizer.json").unlink()  # as of a model that is known by its configuration alone
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    overrides = [word for one in more for word in ("--set", one)]
    code, out, err = run("plan", recipe.source, "--gpu", gpu, "--imitate", "--json", tmp_path / "step.json", *overrides)
    assert code == 0, err
    figures = json.loads((tmp_path / "step.json").read_text())
    assert f"{figures['waits']} times a step" in out
    assert "Imitating a GPU" in err
    made = figures["parts"]["base and adapter"]
    assert made[0] == pytest.approx(made[1], rel=0.2)  # a toy's tensors are smaller than the allocator's 512 bytes
    assert figures["fits"]
    assert figures["parts"]["peak of the step"][1] > made[1]
    assert kernel is None or set(figures["attention"]) == {kernel}
    made_up = "made rows" in name or "packed" in name
    assert made_up == (figures["rows"]["longest"] in (512, 256))
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before | {tmp_path / "step.json"}
    assert not torch.cuda.is_available()


def test_what_it_takes_is_said(tmp_path, run):
    recipe = toy_recipe(tmp_path)
    for words in (["--probe"], ["--gpu", "8GB", "--gpu", "T4"]):
        code, _, err = run("plan", recipe.source, "--imitate", *words)
        assert code == 2
        assert "--imitate" in err
