"""The commands that compute, from the command line on an imitated card, on the adapter of one training."""

import io
import sys

from fleet_fixtures import rows_of

from imitated_card.runs import toy_recipe
from perce_lite.evaluation.bench.imitation.libraries import imitated

pytest_plugins = ["cli_fixtures"]

COMMANDS = {
    "eval": ["eval", "RECIPE", "--adapter", "ADAPTER", "--out", "FOLDER/eval.html"],
    "inspect": ["inspect", "RECIPE", "--rows", "2", "--adapter", "ADAPTER", "--out", "FOLDER/inspect.html"],
    "compare": ["compare", "RECIPE", "--arms", "uniform,base", "--rates", "1e-2", "--seeds", "1"],
    "generate": ["generate", "--adapter", "ADAPTER", "--user", "user1", "--prompt", "write", "--max-new-tokens", "3"],
    "chat": ["chat", "ADAPTER", "--user", "user1", "--max-new-tokens", "3"],
    "plan --probe": ["plan", "RECIPE", "--probe"],
    "export merged": ["export", "ADAPTER", "--to", "merged", "--out", "FOLDER/merged"],
    "personal": ["generate", "--adapter", "ADAPTER", "--user", "user1", "--prompt", "write", "--max-new-tokens", "3",
                 "--personal", "0.5"],
}  # fmt: skip


def test_every_command_that_computes(tmp_path, run, monkeypatch):
    recipe = toy_recipe(tmp_path, rows=rows_of(2, per_user=6))
    places = {"RECIPE": str(recipe.source), "ADAPTER": f"{tmp_path}/out/adapter", "FOLDER": str(tmp_path)}
    overrides = ["--set", f"train.output_dir={tmp_path}/out", "--set", f"train.store={tmp_path}/store"]
    failed = {}
    with imitated() as card:
        code, _, err = run("train", places["RECIPE"], *overrides)
        assert code == 0, err
        assert err.startswith("Device: imitated GPU")
        for name, words in COMMANDS.items():
            for place, path in places.items():
                words = [word.replace(place, path) for word in words]
            more = overrides if str(recipe.source) in words else []
            monkeypatch.setattr(sys, "stdin", io.StringIO("write a note\n/compare\n/quit\n"))
            before = card.counts["launches"]
            code, _, err = run(*words, *more)
            if code != 0 or card.counts["launches"] < before + 100:
                failed[name] = code, err[-600:]
    assert failed == {}
