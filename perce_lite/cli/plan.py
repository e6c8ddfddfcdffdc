"""The command `perce-lite plan`."""

from typing import Annotated, Any

import typer

from perce_lite.cli.lazy import Lazy
from perce_lite.cli.options import Json, RecipePath, Set, readable_recipe, write
from perce_lite.console import say
from perce_lite.recipe import training_config

device = Lazy("perce_lite.device")
gpus = Lazy("perce_lite.planning.gpus")
imitating = Lazy("perce_lite.evaluation.bench.imitation.step")
planning = Lazy("perce_lite.planning.plan")
probing = Lazy("perce_lite.planning.probe")
views = Lazy("perce_lite.cli.views.plan")

_FOR_GPUS = ("activation_offloading", "bf16", "fp16", "tf32")
"""Fields of `train:` that a machine without a GPU refuses."""

_IMITATED = 12
"""GB of the GPU that is imitated where none is named and none is there; the peak does not depend on it."""


def plan(
    recipe: RecipePath,
    gpu: Annotated[
        list[str] | None, typer.Option(help='A GPU, such as 8GB or "RTX 4070"; once for each. Else the one here.')
    ] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Run one real step on the GPU here and compare.")] = False,
    imitate: Annotated[
        bool, typer.Option("--imitate", help="Run a real step with shapes alone on an imitated GPU and compare.")
    ] = False,
    set_: Set = None,
    json: Json = None,
) -> None:
    """Say whether the recipe fits a GPU, what takes the memory and what to change. Loads no weights."""
    if probe and (gpu or imitate):
        raise typer.BadParameter("--probe measures the GPU of this machine; leave --gpu and --imitate out")
    if imitate and len(gpu or []) > 1:
        raise typer.BadParameter("--imitate takes one --gpu")
    named = [gpus.gpu(name) for name in gpu or []]
    loaded = readable_recipe(recipe, set_, rows=False)
    if probe:
        measured = probing.probe(loaded)
        write(json, measured)
        views.show_probe(measured)
        return
    if not named:
        device.warn_of_an_unused_gpu()
    here = gpus.present()
    sizes = [_IMITATED] if imitate else gpus.COMMON_SIZES
    chosen = named or ([here] if here is not None else [gpus.of_size(size) for size in sizes])
    where = "" if named else " (in this machine)" if here is not None else " (torch sees none in this machine)"
    say(f"GPU: {', '.join(gpu.name for gpu in chosen)}{where}")
    # What a trainer refuses is refused here, less what needs a GPU, which this machine may not have.
    plain = {name: value for name, value in loaded.train.items() if name not in _FOR_GPUS}
    training_config(loaded.model_copy(update={"train": plain}), bf16=False, fp16=False)
    if imitate:
        imitated = imitating.imitate(loaded.without_cores(), chosen[0])
        write(json, imitated)
        views.show_imitation(imitated)
        return
    figures: dict[str, Any] = planning.figures(loaded, chosen)
    write(json, figures)
    views.show_plan(figures, str(recipe), set_ or [])
