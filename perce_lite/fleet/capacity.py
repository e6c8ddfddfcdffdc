"""How many users of a fleet are trained at once: what the plan says that the memory here takes."""

from dataclasses import replace

import psutil
import torch

from perce_lite.errors import PlanError
from perce_lite.planning.gpus import Gpu, present
from perce_lite.planning.plan import CONTEXT, Plan
from perce_lite.planning.row_lengths import NO_LIMIT, alike
from perce_lite.recipe import Recipe, training_config


def users_at_once(recipe: Recipe) -> int:
    """`fleet.slots`; where it is `auto`, as many users with rows of `train.max_length` as fit, 1 to `plan.MOST_USERS`.

    On a GPU all of its free memory counts, on a CPU half of what the system has available. A family whose memory is
    not known is trained one user after another.

    Raises:
        ModelError: as `load_base`; RecipeError, DeviceError: as `recipe.training_config`.
    """
    if recipe.fleet.slots != "auto":
        return recipe.fleet.slots
    own = recipe.of_users()
    args = training_config(own)
    try:
        plan = Plan(own, alike(args.max_length or NO_LIMIT, "train.max_length"), on_cpu=bool(args.use_cpu))
    except PlanError:
        return 1
    here = None if args.use_cpu else present()
    if here is None:
        here = Gpu("this machine", psutil.virtual_memory().available // 2)
    else:  # asking has made the context, which the plan counts
        here = replace(here, bytes=torch.cuda.mem_get_info()[0] + CONTEXT)
    return max(1, plan.most_users(plan.choice, here))
