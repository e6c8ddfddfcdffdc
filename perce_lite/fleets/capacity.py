"""How many users of a fleet are trained at once: what the plan says that the memory here takes."""

import psutil
import torch

from perce_lite.errors import PlanError
from perce_lite.planning.cards import Card
from perce_lite.planning.longest import alike
from perce_lite.planning.plan import Plan
from perce_lite.recipe import Recipe, training_config

_CONTEXT_LENGTH = 1024
"""Tokens a row where a recipe sets no limit."""


def users_at_once(recipe: Recipe) -> int:
    """`fleet.slots`; where it is `auto`, as many users with the longest rows allowed as fit, 1 to `plan.MOST_USERS`.

    On a GPU all of its free memory counts, on a CPU half of what the system has available. A family whose memory is
    not known is trained one user after another.

    Raises:
        ModelError: as `models.load_base`; RecipeError: as `recipe.training_config`.
    """
    if recipe.fleet.slots != "auto":
        return recipe.fleet.slots
    own = recipe.model_copy(update={"train": {**recipe.train, **recipe.fleet.train}})
    args = training_config(own)
    rows = alike(args.max_length or _CONTEXT_LENGTH, "train.max_length")
    try:
        plan = Plan(own, rows, on_cpu=bool(args.use_cpu))
    except PlanError:
        return 1
    free = psutil.virtual_memory().available // 2 if args.use_cpu else torch.cuda.mem_get_info()[0]
    return max(1, plan.most_users(plan.choice, Card("this machine", free, args.use_cpu or not args.fp16)))
