"""How many users of a fleet are trained at once: what the plan says that the memory here takes."""

from dataclasses import replace

import torch

from perce_lite.errors import PlanError
from perce_lite.memory import available_memory
from perce_lite.planning.gpus import Gpu, present
from perce_lite.planning.plan import CONTEXT, Plan
from perce_lite.planning.row_lengths import NO_LIMIT, alike
from perce_lite.recipe import Recipe, training_config


def users_at_once(recipe: Recipe, sharers: int = 1) -> int:
    """`fleet.slots`; where it is `auto`, as many users with rows of `train.max_length` as fit, 1 to `plan.MOST_USERS`.

    On a GPU all of its free memory counts, on a CPU half of what the system, or a container's limit, leaves. A family
    whose memory is not known is trained one user after another.

    sharers: processes that train on this machine at once, and share a CPU's memory; each has a GPU of its own

    Raises:
        ModelError: as `load_base`; RecipeError, DeviceError: as `recipe.training_config`.
    """
    if recipe.fleet.slots != "auto":
        return recipe.fleet.slots
    planned = _planned(recipe, sharers)
    if planned is None:
        return 1
    plan, here = planned
    return max(1, plan.most_users(plan.choice, here))


def optimizer_of(recipe: Recipe, users: int) -> str | None:
    """The `optim` for so many users in slots where the recipe leaves it open; None: the recipe's default.

    On a GPU that is torch's fused AdamW if its float32 state has room: a few kernels a user, where bitsandbytes starts
    one for each tensor and waits for it, some 450 a user in a step of an 8B.

    Raises:
        ModelError, RecipeError, DeviceError: as `users_at_once`.
    """
    own = recipe.of_users()
    planned = None if "optim" in own.train or training_config(own).use_cpu else _planned(recipe)
    if planned is None:
        return None
    plan, here = planned
    return _FUSED if plan.fits(replace(plan.choice, users=users, optim=_FUSED), here) else None


_FUSED = "adamw_torch_fused"


def _planned(recipe: Recipe, sharers: int = 1) -> tuple[Plan, Gpu] | None:
    """The plan of users with rows of `train.max_length`, and the free memory here; None: the family is not known."""
    own = recipe.of_users()
    args = training_config(own)
    try:
        plan = Plan(own, alike(args.max_length or NO_LIMIT, "train.max_length"), on_cpu=bool(args.use_cpu))
    except PlanError:
        return None
    here = None if args.use_cpu else present()
    if here is None:
        return plan, Gpu("this machine", available_memory() // 2 // sharers)
    # Asking has made the context, which the plan counts.
    return plan, replace(here, bytes=torch.cuda.mem_get_info()[0] + CONTEXT)
