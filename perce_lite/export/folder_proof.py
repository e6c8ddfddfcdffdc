"""The proof of an export that is a folder of transformers or peft: loaded by plain libraries, each fault named."""

from collections.abc import Iterable
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from perce_lite.errors import AdapterError, ExportError, ModelError
from perce_lite.export.proof import (
    Proof,
    Sketch,
    base_for,
    check_not_idle,
    does_as_recorded,
    fingerprint,
    fixed_ids,
    gap,
    on_cpu,
    plain_log_probs,
    sketched,
    tensors_of,
)
from perce_lite.model import adapter_files
from perce_lite.model.architecture import model_class
from perce_lite.model.fingerprint import same_base
from perce_lite.recipe import Recipe


def check_tensors(found: Iterable[tuple[str, Tensor]], proof: Proof, folder: Path) -> None:
    """Raises ExportError where a tensor is not what was exported."""
    hashes = {name: fingerprint(tensor) for name, tensor in found}
    if missing := sorted(set(proof.fingerprints) ^ set(hashes)):
        raise ExportError(f"{folder}: tensors are missing or were added: {', '.join(missing[:5])}. Export again.")
    if wrong := [name for name, digest in hashes.items() if digest != proof.fingerprints[name]]:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ExportError(f"{folder}: a corrupted tensor: {wrong[0]}{more} is not what was exported. Export again.")


def check_tokenizer(folder: Path, proof: Proof) -> None:
    """Raises ExportError where the tokenizer in `folder`, or its chat template, makes other ids of the fixed text."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"{folder}: its tokenizer cannot be loaded: {error}. Export again.") from error
    if not tokenizer.chat_template or fixed_ids(tokenizer, proof.template, proof.profile) != proof.ids:
        raise ExportError(
            f"{folder}: a swapped tokenizer: it, or its chat template, makes other ids of a fixed text than training "
            "saw. Export again."
        )


def check_base(found: Sketch, proof: Proof, where: str) -> None:
    """Raises ExportError where the sketch `found` is of another base than the proof's.

    Layers of a merged model are left to its log-probs and hashes, which say more of what is wrong.
    """
    sketch, ours = found.model_dump(), proof.sketch.model_dump()
    if not same_base({**sketch, "layers": []}, ours):
        what = "its embedding is not that"
    elif proof.target != "merged" and not same_base(sketch, ours):
        what = "the weights of its layers are not those"
    else:
        return
    raise ExportError(f"{where}: another base: {what} of {proof.model}, which the adapter is for.")


# Whole folders


def verify_peft(folder: Path, proof: Proof) -> dict[str, float]:
    """Loads the base and the adapter with plain peft; the largest differences in nats, adapter on and off.

    Raises:
        ExportError: whatever is wrong, each fault with a message of its own.
    """
    check_not_idle(tensors_of(folder), folder)
    check_tensors(tensors_of(folder), proof, folder)
    check_tokenizer(folder, proof)
    try:
        metadata = adapter_files.read_metadata(folder)
    except AdapterError as error:
        raise ExportError(f"{folder}: peft cannot load it: {error}") from error
    try:
        recipe = on_cpu(metadata, quantised=True)
        with base_for(recipe) as base:
            return _with_peft(base.model, recipe, folder, proof)
    except (AdapterError, ModelError) as error:
        raise ExportError(f"{folder}: its base cannot be loaded, so nothing is proven: {error}") from error


def _with_peft(base: PreTrainedModel, recipe: Recipe, folder: Path, proof: Proof) -> dict[str, float]:
    """What `verify_peft` gives, of a base that is loaded."""
    check_base(sketched(base), proof, recipe.model)
    bare = gap(plain_log_probs(base, proof.ids, len(proof.base)), proof.base)
    if bare > proof.tolerance:
        raise ExportError(
            f"{recipe.model}: another base: alone it is {bare:.4f} nats off the one that the adapter was trained on; "
            f"{proof.tolerance:.4f} are allowed."
        )
    try:
        model = PeftModel.from_pretrained(base, folder)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ExportError(f"{folder}: peft cannot load it: {error}. Export again.") from error
    off = does_as_recorded(proof, plain_log_probs(model, proof.ids, len(proof.adapter)), str(folder))
    return {"off_adapter": off, "off_base": bare}


def verify_merged(folder: Path, proof: Proof) -> dict[str, float]:
    """Loads the merged model with plain transformers; the largest difference in nats.

    Raises:
        ExportError: whatever is wrong, each fault with a message of its own.
    """
    check_tokenizer(folder, proof)
    try:
        model = model_class(AutoConfig.from_pretrained(folder)).from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
        raise ExportError(f"{folder}: transformers cannot load it: {error}. Export again.") from error
    check_base(sketched(model), proof, str(folder))
    got = plain_log_probs(model, proof.ids, len(proof.adapter))
    if gap(got, proof.base) <= proof.tolerance:
        does_as_recorded(proof, got, str(folder))  # says that the base speaks, which is more than that a hash is wrong
    check_tensors(tensors_of(folder), proof, folder)
    return {"off_adapter": does_as_recorded(proof, got, str(folder))}
