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
from perce_lite.words import counted

_HUB_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
_SHOWN = ("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size", "seed")


def model_card(
    metadata: Mapping[str, Any],
    merged: bool = False,
    size: int | None = None,
    evaluated: Sequence[str] = (),
    licence: str | None = None,
) -> str:
    """The README.md of an adapter, with the front matter that the Hub reads.

    metadata: the adapter's `perce_lite.json`
    merged: the model card is for a full model that the adapter is merged into
    size: bytes of the weights; evaluated: sentences of `perce-lite eval`; licence: the base's, if it is known
    """
    model = metadata["recipe"]["model"]
    name = _HUB_NAMES.get(model, model)
    base_licence = licence or (BUILT_IN[model].licence if model in BUILT_IN else None)
    what = "With a personal LoRA adapter merged in:" if merged else "A personal LoRA adapter for"
    head = [
        "---",
        f"library_name: {'transformers' if merged else 'peft'}",
        *([] if Path(name).exists() else [f"base_model: {name}"]),
        *([f"license: {base_licence}"] if base_licence else []),
        "tags: [lora, perce, personalization]",
        "---",
        "",
        f"# {what} {Path(name).name}",
        "",
        _trained(metadata),
        "",
    ]
    return "\n".join([*head, *_facts(metadata, base_licence, size), *_use(metadata), *_held_out(metadata, evaluated)])


def _trained(metadata: Mapping[str, Any]) -> str:
    if metadata.get("foreign"):
        return "Trained by another program than PerCE Lite, which exported it."
    return f"Trained with PerCE Lite: {_weighting(metadata)}. {_profile_use(metadata)}"


def _facts(metadata: Mapping[str, Any], licence: str | None, size: int | None) -> Iterable[str]:
    """Data, base, recipe and sizes, one line each."""
    recipe, data = metadata["recipe"], metadata["data"]
    lora, train = recipe.get("lora", {}), recipe.get("train", {})
    options = ", ".join(f"{name} {train[name]}" for name in _SHOWN if name in train)
    rank = ", ".join(f"{name} {value}" for name, value in lora.items()) or "the default LoRA"
    steps = f", {counted(metadata['steps'], 'step')}" if "steps" in metadata else ""
    users = counted(data["users"], "user")
    if data["rows"]:
        yield f"- Data: {counted(data['rows'], 'row')} of {users} (fingerprint `{data['fingerprint']}`)"
    yield (
        f"- Base: `{recipe['model']}`, quantization `{recipe['quantization']}`, licence {licence or 'see its files'}; "
        "it applies to what is derived from the base too"
    )
    if lora.get(CORE_ONLY):
        yield "- One r x r matrix a layer was trained, between the A and B of the adapter that it started from."
    mark = f" `{metadata['recipe_fingerprint']}`" if "recipe_fingerprint" in metadata else ""
    if not metadata.get("foreign"):
        yield f"- Recipe{mark}: {rank}{steps}{f'; {options}' if options else ''}"
    if size is not None:
        yield f"- Size: {size / 2**20:.1f} MiB of weights"
    yield "- An adapter can leak the texts it was trained on: share it as you would share them."
    yield ""


def _use(metadata: Mapping[str, Any]) -> Iterable[str]:
    """The intended use, and its limits."""
    yield "## Intended use"
    yield ""
    owner = "this one user" if metadata["data"]["users"] == 1 else "these users"
    yield (
        f"Drafts that sound like {owner}, for {owner} and with their consent. Not for passing off its words as theirs. "
        "Its answers are no more reliable than those of its base."
    )
    yield ""


def _profile_use(metadata: Mapping[str, Any]) -> str:
    if metadata["recipe"].get("train", {}).get("profile_pass") == "frozen":
        return (
            "It was trained as activated LoRA: the user's profile is in the prompt, and the adapter is active only "
            "after it. Give the profile when you use it, with a program that knows activated LoRA (peft, llama.cpp's "
            "server) or with `perce-lite`. Any other program activates it at every token: not as it was trained."
        )
    if metadata["train_on"] == "factual":
        return "It was trained with the user's profile in the prompt: give the profile when you use it."
    return "It was trained without the profile in the prompt: use it without one."


def _held_out(metadata: Mapping[str, Any], evaluated: Sequence[str]) -> Iterable[str]:
    """Losses on held-out responses and the sentences of `perce-lite eval`, if there are any."""
    losses = metadata["metrics"]["losses"]
    if losses:
        yield from ("## Evaluation", "", "Loss a token on held-out responses, nats:", "")
        yield from ("| profile in the prompt | base | with this adapter |", "|---|---|---|")
        for loss in losses:
            yield f"| {loss['profile']} | {loss['base']:.3f} | {loss['adapter']:.3f} |"
        yield ""
    if evaluated:
        yield from ("What `perce-lite eval` found:", "")
        yield from (f"- {sentence}" for sentence in evaluated)
        yield ""


def _weighting(metadata: Mapping[str, Any]) -> str:
    """How the adapter's loss was weighted, in words."""
    estimator = metadata["estimator"]
    paper = f"clip(PIR, {metadata['clip_min']:g}, {metadata['clip_max']:g})"  # of an adapter that names no formula
    clipped = f"weight {metadata.get('weighting', paper)}"
    if estimator == "uniform":
        return "plain SFT, all response tokens weigh the same (estimator `uniform`, a control)"
    if estimator == "shuffled":
        return f"weights shuffled inside each response (estimator `shuffled`, a control; {clipped})"
    weighted = "every response token weighted by how much it depends on the user's profile"
    return f"{weighted} (estimator `{estimator}`, {clipped})"


def licence_of(recipe: Recipe) -> str | None:
    """The licence that the base's own files name, or None."""
    if recipe.model in BUILT_IN:
        return BUILT_IN[recipe.model].licence
    path = Path(model_source(recipe)) / "README.md"
    text = path.read_text("utf-8", errors="replace") if path.is_file() else ""
    front_matter = re.match(r"---\n(.*?)\n---", text, re.S)
    licence = re.search(r"^license: *(\S+)", front_matter[1], re.M) if front_matter else None
    return licence[1] if licence else None


def write_licence(recipe: Recipe, folder: Path) -> None:
    """Writes a note of the base's licence, and the licence's text if the base's folder has it."""
    source = Path(model_source(recipe))
    lines = [
        f"Base: {recipe.model}",
        f"Its licence: {licence_of(recipe) or 'not named in its files; look where you downloaded it'}",
        "It applies to everything derived from the base, this export included.",
    ]
    write_text(folder / "BASE_LICENCE.txt", "\n".join(lines) + "\n")
    for name in ("LICENSE", "LICENSE.txt", "LICENSE.md"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / f"BASE_{name}")
