"""Rows, a recipe and engines that train nothing, for the tests of fleets."""

import json

import toys

from perce_lite.errors import NonFiniteLossError
from perce_lite.fleet.engines.protocol import Outcome

TEXT = """
train: {max_steps: 3, learning_rate: 0.05, output_dir: out, store: store, clip_min: 0.05, warmup_steps: 0}
fleet: {min_examples: 4, gate: null}
"""


def rows_of(users: int, per_user: int = 8, cohorts: int = 0) -> list[dict]:
    """Of each user the first row is test, the second validation, the rest is trained on."""
    rows = toys.toy_rows(users=users, per_user=per_user)
    for number, row in enumerate(rows):
        row["split"] = {0: "test", 1: "validation"}.get(number % per_user, "train")
        if cohorts:
            row["cohort"] = f"c{int(row['user'][4:]) % cohorts}"
    return rows


class Clock:
    """An engine that trains nothing: it counts, and fails for whom it is told to."""

    def __init__(self, fails: tuple[str, ...] = (), gain: float = 0.1) -> None:
        self.trained: list[str] = []
        self.fails, self.gain = fails, gain

    def __call__(self, recipe):
        return self

    def base(self):
        return {"shape": ["toy", 1, 1, 1, True], "embedding": [1.0]}

    def run(self, tasks, done, told):
        for task in tasks:
            try:
                done(task, self.train(task))
            except NonFiniteLossError as error:
                done(task, error)

    def train(self, task):
        name = task.folder.name
        self.trained.append(name)
        if any(name.startswith(f"{fail}-") for fail in self.fails):
            raise NonFiniteLossError("The loss is nan")
        (task.folder / "adapter").mkdir(parents=True, exist_ok=True)
        origin = {"recipe": {"model": "toy"}, "base": {"fingerprint": "b"}, "data": {"fingerprint": "d"}}
        card = {"run": task.run, **origin, "recipe_fingerprint": "r"}
        (task.folder / "adapter/perce_lite.json").write_text(json.dumps(card))
        losses = {"base": 3.0, "start": 2.5, "own": 2.5 - self.gain, "tokens": 10.0}
        return Outcome({"validation": losses, "test": losses}, {}, 100, 50)


def names(engine: Clock) -> list[str]:
    done = [name.rpartition("-")[0] for name in engine.trained]
    engine.trained.clear()
    return done


class Quick(Clock):
    """Writes nothing either: for ten thousand."""

    def train(self, task):
        return Outcome({}, {}, 100, 50)
