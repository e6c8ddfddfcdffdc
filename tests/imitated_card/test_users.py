"""Many users one after another: nothing of one is left on the card when the next begins."""

import bitsandbytes as bnb
from fleet_fixtures import rows_of

from imitated_card.runs import toy_recipe
from perce_lite.evaluation.bench.imitation.libraries import imitated
from perce_lite.fleet.engines.sequential import SequentialEngine
from perce_lite.fleet.fleet import fleet

MORE = [
    "lora.target_modules=[down_proj]", "lora.r=800", "train.max_steps=1", "train.estimator=uniform",
    "train.warmup_steps=0", "train.save_strategy=no",
    "fleet.init_from=none", "fleet.min_examples=2", "fleet.gate=null", "fleet.slots=1",
]  # fmt: skip
"""Matrices of 100,000 elements and more, whose state bitsandbytes pages."""


def held_after_each(tmp_path, users, more=()) -> list[int]:
    """Live bytes of the card after each user, and of paged state, which bitsandbytes keeps in a list of its own."""
    recipe = toy_recipe(tmp_path, more=[*MORE, *more], rows=rows_of(users, per_user=4))
    held = []
    pages = bnb.functional.GlobalPageManager.get_instance().paged_tensors

    class Watched(SequentialEngine):
        def run(self, tasks, on_done, on_progress):
            def done(task, outcome):
                on_done(task, outcome)
                held.append(card.allocated + sum(page.nbytes for page in pages[before:]))

            super().run(tasks, done, on_progress)

    before = len(pages)
    with imitated() as card:
        result = fleet(recipe, Watched)
    del pages[before:]
    assert (result.trained, result.failed) == (users, 0)
    return held


def test_twenty_users_leave_nothing_on_the_card(tmp_path):
    held = held_after_each(tmp_path, 20)
    assert len(held) == 20
    assert max(held) == min(held)


def test_paged_state_would_stay(tmp_path):
    """What this test looks for is there to be found."""
    held = held_after_each(tmp_path, 3, ["train.optim=paged_adamw_8bit"])
    assert held[0] < held[1] < held[2]
