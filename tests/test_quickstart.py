"""The quickstart's promise: a gain that is plain to see on texts that were held out."""

import os
from pathlib import Path

import pytest

from perce_lite.evaluation.summary import train_and_measure
from perce_lite.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_quickstart_gains_with_the_own_profile_and_with_no_other(real_model, monkeypatch):
    """Takes the figures of the run that the README's first command left; trains where there is none."""
    monkeypatch.chdir(ROOT)
    figures = train_and_measure(load_recipe("recipes/quickstart.yaml"))
    losses = {one["profile"]: one for one in figures["losses"]}
    own, other = losses["own"], losses["other user's"]
    assert own["adapter"] < own["base"] - 0.2
    assert own["personal"]["adapter"] < own["personal"]["base"] - 0.2
    assert own["adapter"] < losses["none"]["adapter"] - 0.5
    assert own["adapter"] < other["adapter"] - 0.5
    assert 0.2 < figures["weights"]["share_above_min"] < 0.8
    assert figures["sample"]["adapter"] != figures["sample"]["base"]
    assert os.path.isfile(Path(figures["adapter"]) / "adapter_model.safetensors")
