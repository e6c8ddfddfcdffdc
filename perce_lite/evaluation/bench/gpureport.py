"""`perce-lite bench --gpu-report`: what a GPU does with an 8B model, in one go, without downloading one."""

import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from perce_lite.config import chosen_dtype, pick_device
from perce_lite.console import progress_bar
from perce_lite.errors import BenchError
from perce_lite.evaluation.bench.exactrows import TEMPLATE
from perce_lite.evaluation.bench.gpumeasuring import SPEED, Place, memory, numerics, slots, speed, told
from perce_lite.evaluation.bench.measuring import machine
from perce_lite.evaluation.bench.randombase import config_of_shape, elements, random_base, write_shape
from perce_lite.model.base import Base
from perce_lite.model.host_embedding import keep_on_host
from perce_lite.planning.gpus import of_size, present
from perce_lite.planning.plan import Plan, held, peak_of_a_step
from perce_lite.planning.row_lengths import Rows
from perce_lite.recipe import Recipe

SHAPE, LENGTH, RANK = "llama-3.1-8b", 2048, 32
"""What the bars are set for, one row a batch."""

USERS = (1, 4, 8)
"""Users at once, in slots."""

_ON_A_CPU = 500_000_000  # weights beyond which a rehearsal on a CPU makes no sense

GIB = 2**30

ON_GPU, HOST = "table on the GPU", "table on the host"
"""Where the embedding table lies in the two measurements of memory."""

PARTS = {
    "base": "base in 4 bit, with its constants",
    "unquantized": "embeddings, norms and head",
    "adapter": "adapter, float32",
    "optimizer": "optimizer",
    "working": "the rest of a step's peak: activations, gradients so far, a layer, the head",
    "gradients": "(gradients, all of them)",
    "scoring": "scoring, beside what is held",
    "total": "peak",
    "reserved": "reserved by the allocator",
}
"""Parts of memory, in the order of the table."""

Planned = Callable[[Recipe, torch.device], dict[str, int]]


def gpu_report(
    shape: str = SHAPE,
    length: int = LENGTH,
    steps: int = 3,
    warmup: int = 1,
    repeats: int = 2,
    epochs: int = 3,
    planned: Planned | None = None,
) -> dict[str, Any]:
    """The figures of the report; `markdown` makes its table.

    shape: a name in `SHAPES`, or a folder with a config.json
    length: tokens of a row
    steps, warmup, repeats, epochs: as `bench.bench` takes them
    planned: bytes by part of a recipe, known beforehand, by the names of `PARTS`: they stand beside what was measured

    Raises:
        BenchError: no such shape, or one that is too large to rehearse on a CPU.
    """
    started = time.perf_counter()
    config, device = config_of_shape(shape), pick_device()
    many = elements(config)
    if device.type == "cpu" and many > _ON_A_CPU:
        raise BenchError(
            f"--gpu-report: the shape {shape} has {many / 1e9:.1f} billion weights and needs a CUDA device, and torch "
            f"{torch.__version__} sees none. `--shape toy` goes through the same report on this CPU."
        )
    with tempfile.TemporaryDirectory(prefix="perce-lite-gpu-") as folder:
        write_shape(config, Path(folder) / "shape")
        place = Place(recipe_of_report(Path(folder) / "shape", length), Path(folder), steps, warmup)
        figures = _measure(place, config, device, length, repeats, epochs)
        plan = None if planned is None else planned(place.recipe, device)
    return {
        "shape": shape,
        "weights": many,
        "machine": machine(device),
        "card_bytes": torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
        "settings": {
            **{"length": length, "rank": RANK, "steps": steps, "warmup": warmup, "repeats": repeats, "epochs": epochs},
            "dtype": str(_dtype(place, device)).removeprefix("torch."),
        },
        **figures,
        "plan": plan,
        "bars": judged(figures, shape == SHAPE and length == LENGTH and device.type == "cuda"),
        "seconds": time.perf_counter() - started,
    }


def planned_parts(recipe: Recipe, device: torch.device) -> dict[str, int]:
    """Bytes by part of the report's recipe as `perce-lite plan` knows them beforehand, by the names of `PARTS`.

    `reserved` is with what the allocator loses; CUDA itself is in none, as in what is measured.
    """
    if chosen_dtype(recipe.dtype, device) == torch.float32:
        recipe = recipe.model_copy(update={"dtype": "float32"})
    length = recipe.train["max_length"]
    plan = Plan(recipe, Rows(length, length // 3, length, "rows of one length"))
    parts = plan.parts(plan.choice, present() or of_size(8))
    reserved, step = parts["total"] - parts["context"], held(parts) + peak_of_a_step(parts)
    working = step - sum(parts[name] for name in ("base", "unquantized", "adapter", "optimizer"))
    return {**parts, "working": working, "total": reserved - parts["spill"], "reserved": reserved}


def recipe_of_report(folder: Path, length: int) -> Recipe:
    """What is trained: rank 32 on every linear layer, one row a step, otherwise as a recipe's own defaults are."""
    train = {"max_length": length, "per_device_train_batch_size": 1, "lr_scheduler_type": "constant", "warmup_steps": 0}
    return Recipe.model_validate(
        {
            "model": str(folder),
            "data": {"path": "made of words"},
            "template": TEMPLATE.model_dump(),
            "lora": {"r": RANK},
            "train": train,
        }
    )


def _dtype(place: Place, device: torch.device) -> torch.dtype:
    return chosen_dtype(place.recipe.dtype, device)


def _measure(place: Place, config: Any, device: torch.device, length: int, repeats: int, epochs: int) -> dict[str, Any]:
    """Every measurement, one after another; the table goes to the host last, for it does not come back."""
    with progress_bar(refresh_per_second=1) as bar:
        task = bar.add_task("Measuring", total=6 + len(USERS) + len(SPEED) * repeats, note="")

        def now(note: str) -> None:
            bar.update(task, note=note, advance=1)
            bar.refresh()

        now("numerics")
        numbers = told(partial(numerics, place, config, device, min(length, 512)))
        now("making the base")
        base: Base = random_base(config, _dtype(place, device), device)
        now("memory")
        parts = {ON_GPU: told(partial(memory, place, base, length))}
        now("filling the store")
        pace = speed(place, base, length, repeats, epochs, now)
        at_once = {}
        for users in USERS:
            now(f"{users} users at once")
            at_once[str(users)] = told(partial(slots, place, base, users))
        now(f"memory, {HOST}")

        def on_host() -> dict[str, Any]:
            keep_on_host(base.model)
            return memory(place, base, length)

        parts[HOST] = told(on_host)
        now("done")
    return {"memory": parts, **pace, "slots": at_once, "numerics": numbers}


def judged(found: dict[str, Any], meant: bool) -> list[dict[str, Any]]:
    """The bars with what was measured, and whether each was `met`; None where it cannot be told, `why` says why."""
    gib = {where: parts["total"] / GIB if "total" in parts else None for where, parts in found["memory"].items()}
    ratio = {arm: (found["speed"][arm].get("time") or {}).get("median") for arm in ("base", "mixed")}
    bars = [
        ("peak of training, GiB", 7.0, gib[ON_GPU]),
        ("peak of training with embedding_on_host, GiB", 6.0, gib[HOST]),
        ("base, warm store, x plain SFT", 1.02, ratio["base"]),
        ("mixed, warm store, x plain SFT", 1.02, ratio["mixed"]),
    ]
    why = None if meant else f"it is set for {SHAPE}, rows of {LENGTH} tokens, on a GPU"
    return [
        {
            "bar": name,
            "limit": limit,
            "value": value,
            "met": None if value is None or why else value <= limit,
            "why": why or ("not measured" if value is None else None),
        }
        for name, limit, value in bars
    ]


# As Markdown


def markdown(figures: dict[str, Any]) -> str:
    """The report as one page of tables."""
    settings, computer = figures["settings"], figures["machine"]
    gpu = "" if figures["card_bytes"] is None else f", {figures['card_bytes'] / GIB:.1f} GiB"
    lines = [
        f"# {figures['shape']} on {computer['name']}{gpu}",
        "",
        f"{figures['weights'] / 1e6:,.1f} million random weights in NF4, {settings['dtype']}, rank {settings['rank']}, "
        f"rows of {settings['length']} tokens, one a step; torch {computer['torch']}; {figures['seconds']:.0f} s",
        "",
        *_table(["bar", "limit", "here", ""], [_bar_cells(bar) for bar in figures["bars"]]),
        "",
        *_memory_table(figures["memory"], figures["plan"]),
        "",
        *_table(["arm", "tokens/s", "step, s", "x plain SFT", "scoring, s"], _speed_cells(figures["speed"])),
        "",
        *_table(["users at once", "tokens/s", "peak, GiB"], _slot_cells(figures["slots"])),
        "",
        *_table(["dtype", "log-probs off float32, nats: mean", "max", "gradient: cosine", "norm"],
                _numeric_cells(figures["numerics"])),
        "",
    ]  # fmt: skip
    return "\n".join(lines)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]


def _bar_cells(bar: dict[str, Any]) -> list[str]:
    verdict = {True: "met", False: "not met", None: f"not judged: {bar['why']}"}[bar["met"]]
    return [bar["bar"], f"{bar['limit']:g}", "-" if bar["value"] is None else f"{bar['value']:.3f}", verdict]


def _memory_table(by_place: dict[str, Any], plan: dict[str, int] | None) -> list[str]:
    """A part a line; GiB, four digits behind the point, so that a toy's parts can be told apart as well."""
    columns = {**by_place, **({} if plan is None else {"plan": plan})}
    rows = [
        [name, *(_gib(column[part]) if part in column else "-" for column in columns.values())]
        for part, name in PARTS.items()
    ]
    notes = [f"{where}: {_why(column)}" for where, column in by_place.items() if _why(column)]
    return [*_table(["memory, GiB", *columns], rows), *(["", *notes] if notes else [])]


def _speed_cells(by_arm: dict[str, Any]) -> list[list[str]]:
    return [
        [arm, _why(figures), "", "", ""]
        if _why(figures)
        else [
            arm,
            f"{figures['tokens_per_second']:.0f}",
            f"{figures['step_seconds']:.3f}",
            "-" if figures["time"] is None else f"{figures['time']['median']:.3f}",
            f"{figures['scoring_seconds']:.2f}",
        ]
        for arm, figures in by_arm.items()
    ]


def _slot_cells(by_users: dict[str, Any]) -> list[list[str]]:
    return [
        [users, _why(figures), ""]
        if _why(figures)
        else [users, f"{figures['tokens_per_second']:.0f}", _gib(figures["peak_bytes"])]
        for users, figures in by_users.items()
    ]


def _numeric_cells(by_dtype: dict[str, Any]) -> list[list[str]]:
    if _why(by_dtype):
        return [["-", _why(by_dtype), "", "", ""]]
    return [
        [dtype, f"{figures['mean']:.5f}", f"{figures['max']:.5f}", f"{figures['cosine']:.5f}", f"{figures['norm']:.4f}"]
        for dtype, figures in by_dtype.items()
    ]


def _why(figures: dict[str, Any]) -> str:
    """Why a figure is not there; empty where it is."""
    return str(figures.get("out_of_memory") or figures.get("refused") or "")


def _gib(size: int) -> str:
    return f"{size / GIB:.4f}"
