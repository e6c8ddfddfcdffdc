"""One real step with the longest row, beside the plan's estimate: what a GPU alone can show."""

from typing import Any

import torch

from perce_lite.data.readers import read_rows
from perce_lite.errors import DeviceError
from perce_lite.model.base import load_base
from perce_lite.planning.gpus import present
from perce_lite.planning.plan import CONTEXT, Plan, held, peak_of_a_step
from perce_lite.recipe import Recipe
from perce_lite.training import train


def probe(recipe: Recipe) -> dict[str, Any]:
    """Scores the rows and trains the longest for one step on this machine's GPU; only scores are kept, in the store.

    Gives `card`, the name of the GPU, and `parts`: (estimate, measured) bytes of what lies there after loading, of the
    peaks of scoring and of the step, as torch allocates, and of what the driver says is taken beside that. Rows that
    the store knows are not scored again, and the peak of scoring is then that of making the trainer.

    Raises:
        DeviceError: there is no CUDA device.
    """
    gpu = present()
    if gpu is None:
        raise DeviceError(
            "--probe: runs one real step, and torch sees no CUDA device here. Leave --probe out for the estimate alone."
        )
    plan = Plan(recipe)
    parts = plan.parts(plan.choice, gpu)
    rows = read_rows(recipe)
    base = load_base(recipe)
    loaded = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    one_step = recipe.model_copy(
        update={"train": {**recipe.train, "max_steps": 1, "save_strategy": "no", "eval_strategy": "no"}}
    )
    trainer = train.make_trainer(one_step, base, rows)
    trainer.prepare()
    scoring = torch.cuda.max_memory_allocated()
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    longest = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    trainer.train_dataset = trainer.train_dataset.select(longest[: plan.choice.batch * plan.choice.accumulation])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    step = torch.cuda.max_memory_allocated()
    free, total = torch.cuda.mem_get_info()
    weights = parts["base"] + parts["unquantized"]
    return {
        "card": gpu.name,
        "parts": {
            "base, as loaded": (weights, loaded),
            "peak of scoring": (weights + parts["adapter"] + parts["scoring"], scoring),
            "peak of the step": (held(parts) + peak_of_a_step(parts), step),
            "beside what torch holds": (CONTEXT, total - free - torch.cuda.memory_reserved()),
        },
    }
