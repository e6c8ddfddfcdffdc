"""The folder of an adapter as files: its metadata, and whether it is whole. Nothing here imports torch."""

import importlib.metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from perce_lite.errors import AdapterError
from perce_lite.files import METADATA, read_json
from perce_lite.recipe import Recipe

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def read_metadata(folder: Path) -> dict[str, Any]:
    """The metadata of the adapter in `folder` or in `folder/adapter`, with `folder`, the folder of its files, added.

    Raises:
        AdapterError: the folder is not there, holds no adapter of PerCE Lite, one of an incompatible version, or files
            that are empty or cut off.
    """
    if not folder.is_dir():
        raise AdapterError(
            f"{folder}: there is no such folder. An adapter lies in <output_dir>/adapter after training."
        )
    for nested in (folder, folder / "adapter"):
        metadata = read_json(nested / METADATA)
        if isinstance(metadata, dict) and (nested / WEIGHTS).is_file():
            _check(metadata, nested)
            _check_whole(nested)
            return {**_with_base_found(metadata, nested), "folder": str(nested)}
    for nested in (folder, folder / "adapter"):
        if (nested / METADATA).is_file():
            lacks = f"{METADATA} is empty or cut off" if (nested / WEIGHTS).is_file() else f"{WEIGHTS} is missing"
            raise AdapterError(f"{nested}: its {lacks}. {_ANEW}")
    raise AdapterError(
        f"{folder}: no adapter of PerCE Lite: it needs {WEIGHTS}, {CONFIG} and {METADATA}. "
        "Give the folder that `perce-lite train` named at its end."
    )


def given_away(metadata: dict[str, Any]) -> dict[str, Any]:
    """`metadata` as an export has them: without paths of this machine, names of users and tokens of the Hub.

    A base that is a folder is called by the folder's name.
    """
    recipe = metadata["recipe"]
    public = {name: value if name == "template" else _without_paths(value) for name, value in recipe.items()}
    public["model"] = base_name(recipe["model"])
    public["data"] = {name: value for name, value in public["data"].items() if name not in ("path", "users")}
    return {**{name: value for name, value in metadata.items() if name != "folder"}, "recipe": public}


def base_name(model: str) -> str:
    """What a base is called to others: a built-in name or a Hub id as it is, a folder by its last part."""
    return Path(model).name if Path(model).is_absolute() else model


def _without_paths(value: Any) -> Any:
    """`value` without what is an absolute path in it, or a token of the Hub."""
    if isinstance(value, dict):
        return {name: _without_paths(inner) for name, inner in value.items() if not _is_private(name, inner)}
    return (
        [_without_paths(inner) for inner in value if not _is_private("", inner)] if isinstance(value, list) else value
    )


def _is_private(name: str, value: Any) -> bool:
    return name == "hub_token" or (isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute()))


def _with_base_found(metadata: dict[str, Any], folder: Path) -> dict[str, Any]:
    """`metadata` with the folder of a base that `given_away` left the name of: peft's own config says where it was."""
    model, config = metadata["recipe"]["model"], read_json(folder / CONFIG)
    place = Path((config.get("base_model_name_or_path") or "") if isinstance(config, dict) else "")
    if not place.is_absolute() or place.name != model or not place.is_dir():
        return metadata
    return {**metadata, "recipe": {**metadata["recipe"], "model": str(place)}}


def require_profile_pass(folder: Path, recipe: Recipe) -> None:
    """Raises AdapterError if the adapter in `folder` was not trained with the `profile_pass` of `recipe`."""
    theirs, ours = Recipe.model_validate(read_metadata(folder)["recipe"]).profile_pass, recipe.profile_pass
    if theirs != ours:
        raise AdapterError(
            f"{folder}: this adapter was trained with profile_pass: {theirs} and would be used with {ours}, which is "
            f"not what it learned. Add --set train.profile_pass={theirs}."
        )


def _check(metadata: dict[str, Any], folder: Path) -> None:
    """Raises AdapterError if `metadata` lack what this version needs."""
    unfit = [key for key in ("recipe", "base", "train_on", "chat_template", "run") if key not in metadata]
    try:
        if not unfit:
            Recipe.model_validate(metadata["recipe"])
            return
    except ValidationError as error:
        unfit = [".".join(map(str, fault["loc"])) for fault in error.errors()]
    writer, here = metadata.get("versions", {}).get("perce-lite", "unknown"), importlib.metadata.version("perce-lite")
    version = "an earlier state of this version" if writer == here else f"another version, {writer}; this is {here}"
    raise AdapterError(
        f"{folder}: its {METADATA} was written by PerCE Lite in {version}. It does not fit in: {', '.join(unfit)}. "
        "Train it anew, install what wrote it, or load the folder with peft."
    )


def _check_whole(folder: Path) -> None:
    """Raises AdapterError where a file is empty, cut off or no such file; reads the head of the weights alone."""
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or "peft_type" not in config:
        raise AdapterError(f"{folder / CONFIG}: is missing, empty or cut off, so the adapter cannot be used. {_ANEW}")
    try:
        with safe_open(folder / WEIGHTS, framework="numpy") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{folder / WEIGHTS}: is empty, cut off or damaged: {error}. {_ANEW}") from error
    if not names:
        raise AdapterError(f"{folder / WEIGHTS}: holds no weights. {_ANEW}")


_ANEW = "Copy the whole folder once more from where it was trained, or train it anew."


def require_profile(metadata: dict[str, Any], profile: str | None, user: str | None) -> None:
    """Raises AdapterError where neither is named, and the adapter with this metadata was trained with profiles."""
    if profile is not None or user is not None:
        return
    if metadata["train_on"] == "factual":
        raise AdapterError(
            "This adapter was trained with the user's profile in the prompt. Give --profile TEXT (or --profile @FILE), "
            "--user NAME for a user of its data, or --no-profile to go without."
        )


def recipe_of(metadata: dict[str, Any]) -> Recipe:
    """The recipe that an adapter was trained with; the metadata hold the text of its chat template file."""
    recipe = Recipe.model_validate(metadata["recipe"])
    recipe.train.pop("chat_template_path", None)
    return recipe


def weights_bytes(folder: Path) -> int:
    """Bytes that the weights of the adapter in `folder`, the folder of its files, take in memory."""
    return (folder / WEIGHTS).stat().st_size
