"""A trained adapter for other programs: written aside, loaded again, proven, and only then given its name."""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, PreTrainedTokenizerBase

from perce_lite import adapters, gguf_lora, llamacpp
from perce_lite.errors import ExportError
from perce_lite.files import folder_written_aside, read_json, write_json, write_text
from perce_lite.models import BUILT_IN, load_base, model_source
from perce_lite.proof import (
    OTHER_PROGRAM,
    PROOF,
    ROUNDED,
    TIGHT,
    Proof,
    check_not_idle,
    expected,
    fingerprint,
    gap,
    on_cpu,
    read_proof,
    record,
    sketched,
    tensors_of,
    verify_merged,
    verify_peft,
)
from perce_lite.recipe import Recipe
from perce_lite.sections import drifted

Card = Mapping[str, Any]


def export(folder: Path, target: str, out: Path | None, force: bool, base_gguf: Path | None = None) -> dict[str, Any]:
    """Exports the adapter in `folder`; gives what `--json` writes. What lies at `out` in the end was proven.

    out: where to; None: beside the adapter, `<adapter>-<target>`
    force: replace an earlier export there
    base_gguf: for gguf-lora, the base as a GGUF file, for a llama.cpp to run the adapter on

    Raises:
        ExportError: no such target, one that cannot take this adapter, a folder in the way, or a proof that fails.
        AdapterError: no adapter, or one of another base; DiskFullError: no space left, and nothing was written.
    """
    writer = _writer(target)
    _check_gguf(target, base_gguf)
    card = adapters.about(folder)
    source = Path(card["folder"])
    preflight(card, target)
    place = out or source.with_name(f"{source.name}-{target}")
    _check_free(place, force)
    with folder_written_aside(place) as aside:
        figures = writer(source, card, aside)
        try:
            figures |= {"proof": verify(aside, base_gguf)["proof"]}
        except ExportError as error:
            told = str(error).replace(str(aside), str(place))
            raise ExportError(f"The proof failed, so nothing was kept. {told}") from error
    return {"target": target, "adapter": str(source), "folder": str(place), **figures}


def verify(folder: Path, base_gguf: Path | None = None) -> dict[str, Any]:
    """Repeats the proof of an export from its files; `base_gguf` as in `export`.

    Raises:
        ExportError: no export, or its proof fails; each fault has a message of its own.
    """
    proof = read_proof(folder)
    if proof.target not in _VERIFIERS:
        raise ExportError(f"{folder / PROOF}: target {proof.target} is not one of {', '.join(_VERIFIERS)}")
    effect = gap(proof.adapter, proof.base)
    _check_gguf(proof.target, base_gguf)
    found = _VERIFIERS[proof.target](folder, proof, base_gguf)
    return {
        "target": proof.target,
        "folder": str(folder),
        "proof": {**found, "tolerance": proof.tolerance, "effect": effect, "tokens": len(proof.adapter)},
    }


# Before any work


def _writer(target: str) -> Callable[[Path, Card, Path], dict[str, Any]]:
    if target not in _WRITERS:
        raise ExportError(f"--to {target}: there is no such target. There is: {', '.join(_WRITERS)}.")
    return _WRITERS[target]


def preflight(card: Card, target: str) -> None:
    """Asks whether `target` can take the adapter of `card`; no weights are loaded.

    Raises:
        ExportError: with every reason why it cannot.
    """
    config = read_json(Path(card["folder"]) / "adapter_config.json")
    if not isinstance(config, dict):
        raise ExportError(f"{card['folder']}: its adapter_config.json cannot be read")
    tied = bool(card["base"]["shape"][-1])
    faults = _gguf_faults(card, config) if target == "gguf-lora" else []
    if target != "peft" and tied and (heads := _vocabulary_modules(config)):
        faults.append(
            f"it has LoRA on {', '.join(heads)}, but this base has one matrix for its input and its head, which would "
            "be changed in both places"
        )
    if faults:
        raise ExportError(f"{card['folder']}: {target} cannot take this adapter: {'; '.join(faults)}.")


def _gguf_faults(card: Card, config: Card) -> list[str]:
    """Why llama.cpp cannot take an adapter."""
    faults = []
    kind = card["base"]["shape"][0]
    if kind not in gguf_lora.ARCHITECTURES:
        faults.append(f"its base is a {kind}, and the converter knows {', '.join(gguf_lora.ARCHITECTURES)}")
    if config.get("use_dora"):
        faults.append("it was trained with DoRA (use_dora), which llama.cpp does not know; --to merged takes it")
    if config.get("modules_to_save"):
        saved = ", ".join(config["modules_to_save"])
        faults.append(f"it holds whole layers (modules_to_save: {saved}), and an adapter GGUF holds LoRA alone")
    if config.get("lora_bias"):
        faults.append("it was trained with lora_bias, which llama.cpp does not know")
    if "embed_tokens" in _vocabulary_modules(config):
        faults.append("it has LoRA on embed_tokens, which is not converted")
    return faults


def _check_gguf(target: str, base_gguf: Path | None) -> None:
    """Raises ExportError where --base-gguf cannot be used; nothing is loaded yet."""
    if base_gguf is None:
        return
    if target != "gguf-lora":
        raise ExportError(f"--base-gguf goes with gguf-lora, not with {target}.")
    llamacpp.read_base(base_gguf)
    llamacpp.need_llamacpp()


def _vocabulary_modules(config: Card) -> list[str]:
    """Embedding or head, where the adapter names them."""
    named = config["target_modules"] or []
    names = ("embed_tokens", "lm_head")
    return [name for name in names if (re.fullmatch(named, name) if isinstance(named, str) else name in named)]


def _check_free(place: Path, force: bool) -> None:
    """Raises ExportError where something stands at `place` that may not be replaced."""
    standing = next(one for one in place.absolute().parents if one.exists())
    if standing.is_dir() and not os.access(standing, os.W_OK):
        raise ExportError(f"{place}: nothing may be written in {standing}. Give another --out.")
    if file := next((one for one in place.parents if one.exists() and not one.is_dir()), None):
        raise ExportError(f"{place}: cannot be a folder, for {file} is a file. Give another --out.")
    if not place.exists() and not place.is_symlink():
        return
    ours = place.is_dir() and not place.is_symlink() and ((place / PROOF).is_file() or not any(place.iterdir()))
    if force and ours:
        return
    if ours:
        raise ExportError(f"{place}: is there already. Give --force to replace it, or another --out.")
    raise ExportError(f"{place}: is there already and is no export, so it is never replaced. Give another --out.")


# One target each


def _write_peft(source: Path, card: Card, aside: Path) -> dict[str, Any]:
    check_not_idle(tensors_of(source), source)
    recipe = on_cpu(card, quantised=True)
    model, tokenizer = _loaded(recipe, card, source)
    proof = record(model, tokenizer, recipe, "peft", TIGHT)
    for name in ("adapter_model.safetensors", "adapter_config.json", adapters.CARD):
        shutil.copyfile(source / name, aside / name)
    tokenizer.save_pretrained(aside)
    write_text(aside / "README.md", adapters.model_card(dict(card)))
    _write_licence(recipe, aside)
    proof.fingerprints = {name: fingerprint(tensor) for name, tensor in tensors_of(aside)}
    write_json(aside / PROOF, proof.model_dump(mode="json"))
    return {}


def _write_merged(source: Path, card: Card, aside: Path) -> dict[str, Any]:
    """Merges in float32 and rounds once, to what the base is kept in."""
    check_not_idle(tensors_of(source), source)
    recipe = on_cpu(card, quantised=False)
    kept = _kept_dtype(recipe)
    model, tokenizer = _loaded(recipe, card, source)
    proof = record(model, tokenizer, recipe, "merged", TIGHT if kept == torch.float32 else ROUNDED)
    merged = model.merge_and_unload(safe_merge=True).to(kept)
    merged.config.dtype = kept
    merged.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    proof.sketch = sketched(merged)
    proof.fingerprints = {name: fingerprint(tensor) for name, tensor in tensors_of(aside)}
    del model, merged  # the base as trained is loaded next
    drift = _measured_drift(source, card, proof)
    write_json(aside / PROOF, proof.model_dump(mode="json"))
    write_text(aside / "README.md", _merged_card(card, kept, drift))
    _write_licence(recipe, aside)
    return {"dtype": str(kept).removeprefix("torch."), "drift": drift}


def _write_gguf_lora(source: Path, card: Card, aside: Path) -> dict[str, Any]:
    check_not_idle(tensors_of(source), source)
    recipe = on_cpu(card, quantised=False)
    model, tokenizer = _loaded(recipe, card, source)
    proof = record(model, tokenizer, recipe, "gguf-lora", OTHER_PROGRAM)
    proof.fingerprints, proof.heads = gguf_lora.write(aside / gguf_lora.FILE, model)
    write_json(aside / PROOF, proof.model_dump(mode="json"))
    use = f"## Use\n\n    llama-server --model BASE.gguf --lora {gguf_lora.FILE}\n"
    write_text(aside / "README.md", f"{adapters.model_card(dict(card))}\n{use}")
    _write_licence(recipe, aside)
    return {}


def _loaded(recipe: Recipe, card: Card, source: Path) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Base and adapter, and the tokenizer with the chat template that training saw."""
    base = load_base(recipe)
    base.tokenizer.chat_template = card["chat_template"]
    return adapters.load(base.model, source), base.tokenizer


def _kept_dtype(recipe: Recipe) -> torch.dtype:
    """The dtype that the base's own files are in.

    Raises:
        ExportError: they are quantised, so there are no original weights to merge into.
    """
    config = AutoConfig.from_pretrained(model_source(recipe))
    if "quantization_config" in config.to_dict():
        raise ExportError(
            f"{recipe.model}: its own files are quantised, so there are no original weights to merge into."
        )
    return config.dtype or torch.float32


def _measured_drift(source: Path, card: Card, proof: Proof) -> dict[str, Any]:
    """How far the merged model is from base and adapter as trained, on the fixed text, in nats."""
    trained = on_cpu(card, quantised=True)
    if trained.quantization == "none":
        return {"quantization": "none", "mean": 0.0, "max": 0.0}
    model, _ = _loaded(trained, card, source)
    as_trained = expected(model, proof.ids, adapters=True)
    differences = [abs(one - other) for one, other in zip(as_trained, proof.adapter, strict=True)]
    mean = sum(differences) / len(differences)
    return {"quantization": trained.quantization, "mean": mean, "max": max(differences)}


def _merged_card(card: Card, kept: torch.dtype, drift: Card) -> str:
    """The model card: what the adapter's own says, and what merging did."""
    text = adapters.model_card(dict(card)).replace("library_name: peft", "library_name: transformers", 1)
    text = text.replace("# A personal LoRA adapter for", "# With a personal LoRA adapter merged in:", 1)
    dtype = str(kept).removeprefix("torch.")
    return f"{text}\n## Merged\n\nThe adapter is merged into the original weights, kept in {dtype}. {drifted(drift)}\n"


def _write_licence(recipe: Recipe, aside: Path) -> None:
    """A note of the base's licence, and the licence's own text where the base's folder has it."""
    source = Path(model_source(recipe))
    texts = [path for name in ("LICENSE", "LICENSE.txt", "LICENSE.md") if (path := source / name).is_file()]
    card = source / "README.md"
    front = re.match(r"---\n(.*?)\n---", card.read_text("utf-8", errors="replace"), re.S) if card.is_file() else None
    named = re.search(r"^license: *(\S+)", front[1], re.M) if front else None
    if recipe.model in BUILT_IN:
        known = BUILT_IN[recipe.model].licence
    elif named:
        known = named[1]
    else:
        known = "not named in its files; ask where you had it from"
    lines = [
        f"Base: {recipe.model}",
        f"Its licence: {known}",
        "It holds for what is derived from it, this export included.",
    ]
    write_text(aside / "BASE_LICENCE.txt", "\n".join(lines) + "\n")
    for path in texts:
        shutil.copyfile(path, aside / f"BASE_{path.name}")


_WRITERS: dict[str, Callable[[Path, Card, Path], dict[str, Any]]] = {
    "peft": _write_peft,
    "merged": _write_merged,
    "gguf-lora": _write_gguf_lora,
}
_VERIFIERS: dict[str, Callable[[Path, Proof, Path | None], dict[str, Any]]] = {
    "peft": lambda folder, proof, _: verify_peft(folder, proof),
    "merged": lambda folder, proof, _: verify_merged(folder, proof),
    "gguf-lora": gguf_lora.verify,
}
