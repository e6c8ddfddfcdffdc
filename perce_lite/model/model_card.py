"""The model card of an adapter, and a note of its base's licence: what a reader needs to know before using it."""

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from perce_lite.files import write_text
from perce_lite.model.base import model_source
from perce_lite.model.builtin import BUILT_IN
from perce_lite.recipe import CORE_ONLY, Recipe

_HUB_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
_TOLD = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "seed")


def model_card(
    about: Mapping[str, Any],
    merged: bool = False,
    size: int | None = None,
    evaluated: Sequence[str] = (),
    licence: str | None = None,
) -> str:
    """The README.md of an adapter, with the front matter that the Hub reads.

    about: what `perce_lite.json` says
    merged: the card is of a whole model that the adapter is merged into
    size: bytes of the weights; evaluated: sentences of `perce-lite eval`; licence: the base's, where it is known
    """
    model = about["recipe"]["model"]
    name = _HUB_NAMES.get(model, model)
    known = licence or (BUILT_IN[model].licence if model in BUILT_IN else None)
    what = "With a personal LoRA adapter merged in:" if merged else "A personal LoRA adapter for"
    head = [
        "---",
        f"library_name: {'transformers' if merged else 'peft'}",
        *([] if Path(name).exists() else [f"base_model: {name}"]),
        *([f"license: {known}"] if known else []),
        "tags: [lora, perce, personalization]",
        "---",
        "",
        f"# {what} {Path(name).name}",
        "",
        f"Trained with PerCE Lite: {_weighting(about)}. {_needs(about)}",
        "",
    ]
    return "\n".join([*head, *_facts(about, known, size), *_use(about), *_held_out(about, evaluated)])


def _facts(about: Mapping[str, Any], licence: str | None, size: int | None) -> Iterable[str]:
    """Data, base, recipe and sizes, one line each."""
    recipe, data = about["recipe"], about["data"]
    lora, train = recipe.get("lora", {}), recipe.get("train", {})
    given = ", ".join(f"{name} {train[name]}" for name in _TOLD if name in train)
    rank = ", ".join(f"{name} {value}" for name, value in lora.items()) or "the default LoRA"
    steps = f", {about['steps']} steps" if "steps" in about else ""
    users = "1 user" if data["users"] == 1 else f"{data['users']} users"
    yield f"- Data: {data['rows']} rows of {users} (fingerprint `{data['fingerprint']}`)"
    yield (
        f"- Base: `{recipe['model']}`, quantization `{recipe['quantization']}`, licence {licence or 'see its files'}; "
        "it holds for what is derived from it too"
    )
    if lora.get(CORE_ONLY):
        yield "- Of each layer a matrix of r x r was trained, between the A and B of the adapter that it started from."
    mark = f" `{about['recipe_fingerprint']}`" if "recipe_fingerprint" in about else ""
    yield f"- Recipe{mark}: {rank}{steps}{f'; {given}' if given else ''}"
    if size is not None:
        yield f"- Size: {size / 2**20:.1f} MiB of weights"
    yield "- An adapter can leak the texts it was trained on: share it as you would share them."
    yield ""


def _use(about: Mapping[str, Any]) -> Iterable[str]:
    """What it is for, and what not."""
    yield "## Intended use"
    yield ""
    whose = "this one user" if about["data"]["users"] == 1 else "these users"
    yield (
        f"Drafts that sound like {whose}, for {whose} and with their consent. Not for passing off its words as theirs. "
        "What it says is no more reliable than what its base says."
    )
    yield ""


def _needs(about: Mapping[str, Any]) -> str:
    if about["recipe"].get("train", {}).get("profile_pass") == "frozen":
        return (
            "It was trained with the user's profile in the prompt, and wakes behind it: give the profile when you use "
            "it, to a program that knows activated LoRA (peft, llama.cpp's server) or to `perce-lite`. With any other "
            "it is awake at every token, which is not what it learned."
        )
    if about["train_on"] == "factual":
        return "It was trained with the user's profile in the prompt: give the profile when you use it."
    return "It was trained without the profile in the prompt: use it without one."


def _held_out(about: Mapping[str, Any], evaluated: Sequence[str]) -> Iterable[str]:
    """What was measured on held-out responses, where something was."""
    losses = about["metrics"]["losses"]
    if losses:
        yield from ("## Evaluation", "", "Loss a token on held-out responses, nats:", "")
        yield from ("| profile in the prompt | base | with this adapter |", "|---|---|---|")
        for one in losses:
            yield f"| {one['profile']} | {one['base']:.3f} | {one['adapter']:.3f} |"
        yield ""
    if evaluated:
        yield from ("What `perce-lite eval` found:", "")
        yield from (f"- {one}" for one in evaluated)
        yield ""


def _weighting(about: Mapping[str, Any]) -> str:
    """How the adapter's loss was weighted, in words."""
    estimator, clipped = about["estimator"], f"weights clipped to {about['clip_min']} .. {about['clip_max']}"
    if estimator == "uniform":
        return "plain SFT, all response tokens weigh the same (estimator `uniform`, a control)"
    if estimator == "shuffled":
        return f"weights shuffled inside each response (estimator `shuffled`, a control; {clipped})"
    leans = "every response token weighted by how much it leans on the user's profile"
    return f"{leans} (estimator `{estimator}`, {clipped})"


def licence_of(recipe: Recipe) -> str | None:
    """The licence that the base's own files name; None where they name none."""
    if recipe.model in BUILT_IN:
        return BUILT_IN[recipe.model].licence
    card = Path(model_source(recipe)) / "README.md"
    front = re.match(r"---\n(.*?)\n---", card.read_text("utf-8", errors="replace"), re.S) if card.is_file() else None
    named = re.search(r"^license: *(\S+)", front[1], re.M) if front else None
    return named[1] if named else None


def write_licence(recipe: Recipe, folder: Path) -> None:
    """A note of the base's licence, and the licence's own text where the base's folder has it."""
    source = Path(model_source(recipe))
    lines = [
        f"Base: {recipe.model}",
        f"Its licence: {licence_of(recipe) or 'not named in its files; ask where you had it from'}",
        "It holds for what is derived from it, this export included.",
    ]
    write_text(folder / "BASE_LICENCE.txt", "\n".join(lines) + "\n")
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / f"BASE_{name}")
