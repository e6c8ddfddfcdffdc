"""PerCE Lite: LoRA adapters that make a language model personal, on one GPU.

`PerCETrainer` trains in a script; `load`, `score`, `fleet` and `export` do what the commands do. What they raise on
purpose is a `PerceLiteError`, whose message says how to mend it.
"""

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, overload

from perce_lite.errors import PerceLiteError

if TYPE_CHECKING:
    from perce_lite.config import PerCEConfig
    from perce_lite.fleet.engines.protocol import EngineName
    from perce_lite.fleet.engines.ray import RayOptions
    from perce_lite.fleet.result import AdapterResult, FleetResult
    from perce_lite.model.generate import LoadedAdapter
    from perce_lite.recipe import Recipe, Template, load_recipe
    from perce_lite.training.trainer import PerCETrainer
    from perce_lite.training.weights import WeightedRow

__version__ = "0.1.0"
__all__ = [
    "PerCEConfig",
    "PerCETrainer",
    "PerceLiteError",
    "Recipe",
    "Template",
    "export",
    "fleet",
    "load",
    "load_recipe",
    "score",
]

_ROOM_OF = {
    "PerCEConfig": "config",
    "PerCETrainer": "training.trainer",
    "Recipe": "recipe",
    "Template": "recipe",
    "load_recipe": "recipe",
}


def load(
    adapter: str | Path,
    *,
    model: str | None = None,
    data: str | Path | None = None,
    template: str | Path | None = None,
) -> "LoadedAdapter":
    """An adapter on its base, ready to answer: of a recipe, of a script's `PerCETrainer.save_model`, or of peft.

    >>> writer = perce_lite.load("out/adapter")
    >>> writer.generate("Write a note about the snow.", profile="Short sentences.", max_new_tokens=8)
    '...'

    model: its base, where its files name none that is here
    data: rows or documents, for `generate(user=...)` of an adapter that a script trained
    template: for an adapter of another trainer, its chat template (.jinja), or a recipe's `template:` section (.yaml)

    Raises:
        AdapterError: no adapter there, or one of another base; ModelError: its base cannot be loaded.
    """
    from perce_lite.model.adapter_files import Said, read_metadata
    from perce_lite.model.generate import load_adapter

    said = Said(model, None if data is None else Path(data), None if template is None else Path(template))
    return load_adapter(read_metadata(Path(adapter), said))


def score(
    recipe: "str | Path | Recipe", rows: Sequence[Mapping[str, Any]] | None = None, *, set: Sequence[str] = ()
) -> "list[WeightedRow]":
    """Token ids, labels, PIR and weights of every row, as the recipe's training has them: `perce-lite weights`.

    >>> rows = perce_lite.score("recipe.yaml", set=["train.clip_max=3"])
    >>> len(rows[0]["input_ids"]) == len(rows[0]["weights"])
    True
    >>> snow = {"profile": "Snow is white.", "prompt": "A note?", "completion": "White snow."}
    >>> [row["user"] for row in perce_lite.score("recipe.yaml", [snow])]
    ['all']

    rows: {profile, prompt, completion} or {profile, messages}, with a user or without, instead of the recipe's data
    set: overrides, each "train.clip_max=3"

    Raises:
        RecipeError, DataError, ModelError: as training would.
    """
    from perce_lite.training.weights import weighted_rows

    return weighted_rows(_recipe(recipe, set), rows)


@overload
def _fleet(
    recipe: "str | Path | Recipe",
    *,
    only: Sequence[str] = (),
    retrain: Sequence[str] = (),
    dry_run: bool = False,
    set: Sequence[str] = (),
) -> "FleetResult": ...


@overload
def _fleet(
    recipe: "str | Path | Recipe",
    *,
    engine: "EngineName",
    options: "RayOptions | None" = None,
    only: Sequence[str] = (),
    retrain: Sequence[str] = (),
    set: Sequence[str] = (),
) -> "Iterator[AdapterResult]": ...


def _fleet(
    recipe: "str | Path | Recipe",
    *,
    engine: "EngineName | None" = None,
    options: "RayOptions | None" = None,
    only: Sequence[str] = (),
    retrain: Sequence[str] = (),
    dry_run: bool = False,
    set: Sequence[str] = (),
) -> "FleetResult | Iterator[AdapterResult]":
    """Trains an adapter for every user who is due, over one base, or resumes: `perce-lite fleet`.

    >>> planned = perce_lite.fleet("recipe.yaml", dry_run=True)
    >>> planned.trained
    0
    >>> done = perce_lite.fleet("recipe.yaml", only=["user0"])
    >>> [adapter.name for adapter in done.adapters if adapter.verdict == "in service"]
    [...]
    >>> for result in perce_lite.fleet("recipe.yaml", engine="local", only=["user0"], retrain=["user0"]):
    ...     print(result.user, result.state, result.error)
    user0 in service None

    engine: where to train, this process or a Ray cluster; then each adapter is yielded as it ends, and it is trained
        as long as somebody iterates; options: of the cluster
    only: users to train now; retrain: users to train again; dry_run: says what is due and trains nothing
    set: overrides, each "fleet.min_examples=4"

    Raises:
        RecipeError, DataError, FleetError: nothing is trained. One user's failure is in the result's `failed`.
    """
    from perce_lite.fleet.engines.slots import engine_for
    from perce_lite.fleet.fleet import fleet as train_fleet
    from perce_lite.fleet.results import fleet as iterate_fleet

    if engine is not None and dry_run:
        raise PerceLiteError("fleet: dry_run says what is due at once, so it goes without engine")
    if engine is not None:
        return iterate_fleet(_recipe(recipe, set), engine, only, retrain, options)
    return train_fleet(_recipe(recipe, set), engine_for, only, retrain, dry_run)


def _export(
    adapter: str | Path,
    to: str,
    out: str | Path | None = None,
    *,
    force: bool = False,
    quant: str | None = None,
    user: str | None = None,
    base_gguf: str | Path | None = None,
    model: str | None = None,
    template: str | Path | None = None,
) -> dict[str, Any]:
    """Takes an adapter to another program, loads it again and proves that it does what it did: `perce-lite export`.

    >>> figures = perce_lite.export("out/adapter", "merged", "out/merged")
    >>> figures["proof"]["off_adapter"] < figures["proof"]["tolerance"]  # nats
    True

    to: peft, merged, gguf-lora, gguf, vllm or ollama
    out: where to; None: beside the adapter; force: replace an earlier export there
    quant: gguf, ollama: what the weights are written as; user: whose texts the export carries as its profile
    base_gguf: gguf-lora: the base as a GGUF file, to prove the adapter on; model, template: as in `load`

    Raises:
        ExportError: no such target, one that cannot take this adapter, a folder in the way, or a proof that fails.
    """
    from perce_lite.export.export import export as export_adapter
    from perce_lite.model.adapter_files import Said

    folder, place, gguf, file = (None if path is None else Path(path) for path in (adapter, out, base_gguf, template))
    assert folder is not None
    return export_adapter(folder, to, place, force, gguf, quant, None, user, Said(model, None, file))


def _recipe(recipe: "str | Path | Recipe", overrides: Sequence[str]) -> "Recipe":
    from perce_lite.errors import RecipeError
    from perce_lite.recipe import load_recipe

    if isinstance(recipe, str | Path):
        return load_recipe(recipe, overrides)
    if overrides:
        raise RecipeError("set", ["overrides go with the path of a recipe; this one is loaded already"])
    return recipe


_CALLED: dict[str, Callable[..., Any]] = {"fleet": _fleet, "export": _export}
"""Rooms whose name is a function too: `perce_lite.fleet(recipe)` trains a fleet, `perce_lite.fleet.registry` is a file
in that room."""


class _CalledRoom(ModuleType):
    """A room that can be called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _CALLED[self.__name__.rpartition(".")[2]](*args, **kwargs)


class _House(ModuleType):
    """This package: a room whose name is a function's can be called as soon as Python binds it here."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CALLED and isinstance(value, ModuleType):
            value.__class__ = _CalledRoom
            value.__doc__ = _CALLED[name].__doc__
            value.__wrapped__ = _CALLED[name]  # type: ignore[attr-defined]  # its signature
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _House

if TYPE_CHECKING:
    fleet, export = _fleet, _export


def __getattr__(name: str) -> Any:
    # Torch is imported when a name that needs it is first used, so that `perce-lite --help` answers at once.
    if name in _CALLED:
        return importlib.import_module(f"perce_lite.{name}")
    if name in _ROOM_OF:
        return getattr(importlib.import_module(f"perce_lite.{_ROOM_OF[name]}"), name)
    raise AttributeError(f"module 'perce_lite' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
