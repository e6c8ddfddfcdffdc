"""What each target of an export consists of: written into a folder aside, with the proof that it will be held to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from perce_lite.data.chat_template import Chat
from perce_lite.errors import ExportError
from perce_lite.export import modelfile, usage
from perce_lite.export.gguf import lora as gguf_lora
from perce_lite.export.gguf import model as gguf_model
from perce_lite.export.gguf import proof as gguf_proof
from perce_lite.export.proof import (
    OTHER_PROGRAM,
    QUESTION,
    ROUNDED,
    TIGHT,
    Proof,
    base_for,
    check_not_idle,
    clear_answer,
    does_as_recorded,
    expected,
    fingerprint,
    gap,
    on_cpu,
    plain_log_probs,
    record,
    sketched,
    tensors_of,
)
from perce_lite.export.transformers4 import make_readable
from perce_lite.export_targets import PROOF, max_rank, merge_drift
from perce_lite.files import bytes_of, digest, read_json, write_json, write_text
from perce_lite.model import adapter_files, adapter_weights, adapters
from perce_lite.model.base import load_base
from perce_lite.model.footprint import config_of
from perce_lite.model.model_card import licence_of, model_card, write_licence
from perce_lite.recipe import Recipe

Metadata = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """One export of one adapter.

    metadata: the adapter's metadata (`perce_lite.json`)
    source: the adapter's folder
    place: the folder that the finished export gets
    quant: for GGUF, the type that the matrices are written as
    evaluated: sentences of an evaluation, for the model card
    profile: text of a profile that the export carries; empty: none
    """

    target: str
    metadata: Metadata
    source: Path
    place: Path
    quant: str
    evaluated: tuple[str, ...] = ()
    profile: str = ""


def write(job: Job, aside: Path) -> dict[str, Any]:
    """Writes the export into `aside`; gives figures of its own."""
    check_not_idle(adapter_weights.tensors(job.source).items(), job.source)
    return _WRITERS[job.target](job, aside)


def _write_adapter(job: Job, aside: Path) -> dict[str, Any]:
    """The adapter as peft has it, for peft or for vLLM."""
    recipe = on_cpu(job.metadata, quantised=True)
    with base_for(recipe) as base:
        model, tokenizer = _on(base.model, base.tokenizer, job)
        proof = record(model, tokenizer, recipe, job.target, TIGHT, job.profile)
        tokenizer.save_pretrained(aside)
    adapter_weights.copy_plain(job.source, aside)
    write_json(aside / adapters.METADATA, adapter_files.given_away(dict(job.metadata)))
    if proof.invocation:
        config = read_json(aside / "adapter_config.json")
        write_json(aside / "adapter_config.json", {**config, "alora_invocation_tokens": proof.invocation})
    proof.fingerprints = {name: fingerprint(tensor) for name, tensor in tensors_of(aside)}
    rank = max(tensor.shape[0] for name, tensor in tensors_of(aside) if "lora_A" in name or "embedding_A" in name)
    use = usage.vllm(job.place, job.metadata, recipe, rank) if job.target == "vllm" else ""
    _finish(job, recipe, aside, proof, use)
    return {"max_lora_rank": max_rank(rank)} if job.target == "vllm" else {}


def _write_merged(job: Job, aside: Path) -> dict[str, Any]:
    """Merges in float32 and rounds once, to what the base is kept in; its proof is of the rounded weights."""
    recipe = on_cpu(job.metadata, quantised=False)
    kept = _kept_dtype(recipe)
    merged, tokenizer, proof = _merge(job, recipe, TIGHT)
    in_float32 = proof.adapter
    if kept != torch.float32:
        does_as_recorded(proof, plain_log_probs(merged, proof.ids, len(in_float32)), "merged in float32")
        proof.adapter = _rounded(merged, kept, proof)
    merged = merged.to(kept)
    merged.config.dtype = kept
    merged.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    proof.sketch = sketched(merged)
    proof.fingerprints = {name: fingerprint(tensor) for name, tensor in tensors_of(aside)}
    del merged  # the base as trained is loaded next
    drift = _drift(job, proof, in_float32)
    dtype = str(kept).removeprefix("torch.")
    section = f"## Merged\n\nThe adapter is merged into the original weights, kept in {dtype}. {merge_drift(drift)}\n"
    _finish(job, recipe, aside, proof, section)
    return {"dtype": dtype, "drift": drift}


def _rounded(merged: PreTrainedModel, kept: torch.dtype, proof: Proof) -> list[float]:
    """Rounds the weights of `merged` to what `kept` can hold, in place; its log-probs of the fixed text after that.

    Raises:
        ExportError: rounding changes more than a quarter of what the adapter does.
    """
    for parameter in merged.parameters():
        parameter.data = parameter.data.to(kept).float()
    rounded = plain_log_probs(merged, proof.ids, len(proof.adapter))
    off, effect = gap(rounded, proof.adapter), gap(proof.adapter, proof.base)
    if off > effect / 4:
        raise ExportError(
            f"Merged into weights that are kept in {str(kept).removeprefix('torch.')}, this adapter would be lost: "
            f"rounding moves the log-probs of a fixed text by up to {off:.4f} nats, the adapter by {effect:.4f}. "
            "Export it beside its base (--to peft), or train it for longer or with a higher rate."
        )
    return rounded


def _write_gguf_lora(job: Job, aside: Path) -> dict[str, Any]:
    recipe = on_cpu(job.metadata, quantised=False)
    with base_for(recipe) as base:
        model, tokenizer = _on(base.model, base.tokenizer, job)
        proof = record(model, tokenizer, recipe, job.target, OTHER_PROGRAM, job.profile)
        proof.fingerprints, proof.heads = gguf_lora.write(aside / gguf_lora.FILE, model, proof.invocation)
    use = usage.llama_cpp(f"BASE.gguf --lora {gguf_lora.FILE}", job.metadata, recipe, job.profile)
    _finish(job, recipe, aside, proof, use)
    return {}


def _write_gguf(job: Job, aside: Path) -> dict[str, Any]:
    proof, recipe, _ = _write_model(job, aside)
    _finish(job, recipe, aside, proof, usage.llama_cpp(gguf_model.FILE, job.metadata, recipe, job.profile))
    return {"quant": job.quant}


def _write_ollama(job: Job, aside: Path) -> dict[str, Any]:
    proof, recipe, chat = _write_model(job, aside)
    proof.rendered = modelfile.prompts(chat, proof.messages)
    proof.stops = chat.tokenizer.convert_ids_to_tokens(chat.stop_ids())
    template, system = modelfile.retold(chat, proof.messages), modelfile.system_of(proof.messages)
    asked = [{"role": "system", "content": system}] if system else []
    if modelfile.render(template, [*asked, {"role": "user", "content": QUESTION}]) != proof.rendered[0]:
        raise ExportError(
            "ollama: as a SYSTEM prompt the profile would stand elsewhere in the prompt than in training, because of "
            "template.separator. Export without --user, and give the profile with each question."
        )
    parameters = modelfile.parameters_of(recipe)
    file = modelfile.Modelfile(gguf_model.FILE, template, tuple(proof.stops), system, parameters)
    write_text(aside / modelfile.NAME, file.text())
    _finish(job, recipe, aside, proof, "## Use\n\n    ollama create mine -f Modelfile && ollama run mine\n")
    return {"quant": job.quant}


def _write_model(job: Job, aside: Path) -> tuple[Proof, Recipe, Chat]:
    """The merged model as GGUF, and what its proof holds."""
    recipe = on_cpu(job.metadata, quantised=False)
    merged, tokenizer, proof = _merge(job, recipe, gguf_proof.TOLERANCES.get(job.quant, ROUNDED))
    chat = Chat(tokenizer, recipe.template)
    proof.quant, proof.sketch = job.quant, sketched(merged)
    prompt = proof.ids[: len(proof.ids) - len(proof.adapter)]
    proof.greedy = clear_answer(merged, prompt, tokenizer, lead=2 * proof.tolerance)
    proof.fingerprints, proof.heads = gguf_model.write(aside / gguf_model.FILE, merged, tokenizer, job.quant)
    return proof, recipe, chat


def _merge(job: Job, recipe: Recipe, allowed: float) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Proof]:
    """The adapter merged into a base of its own, in float32."""
    base = load_base(recipe)
    model, tokenizer = _on(base.model, base.tokenizer, job)
    proof = record(model, tokenizer, recipe, job.target, allowed, job.profile)
    return model.merge_and_unload(safe_merge=True), tokenizer, proof


def _on(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, job: Job
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Base and adapter, and the tokenizer with the chat template that training saw."""
    tokenizer.chat_template = job.metadata["chat_template"]
    return adapters.load(base, job.source, metadata=dict(job.metadata)), tokenizer


def _finish(job: Job, recipe: Recipe, aside: Path, proof: Proof, more: str) -> None:
    """Proof, model card and licence. more: what this model card says beside the rest."""
    proof.source = source_hash(job.source)
    write_json(aside / PROOF, proof.model_dump(mode="json"))
    whole = job.target in ("merged", "gguf", "ollama")
    kinds = ("*.gguf", "*.safetensors")
    if job.profile and job.target != "ollama":
        write_text(aside / usage.SYSTEM, modelfile.system_of(proof.messages))
    size = (
        sum(bytes_of(path) for kind in kinds for path in aside.glob(kind))
        if whole
        else adapter_files.weights_bytes(job.source)
    )
    text = model_card(job.metadata, whole, size, job.evaluated, licence_of(recipe))
    parts = [text, more, usage.as_trained(job.target, job.metadata, recipe, job.profile)]
    write_text(aside / "README.md", "\n".join(part for part in parts if part))
    write_licence(recipe, aside)
    make_readable(aside)


def source_hash(folder: Path) -> str:
    """Hash of the weights and the scale of an adapter in `folder`, by which an export is known to be of it."""
    tensors = sorted(adapter_weights.tensors(folder).items())
    return digest([adapter_files.lora_options(folder), *([name, fingerprint(tensor)] for name, tensor in tensors)])


def _kept_dtype(recipe: Recipe) -> torch.dtype:
    """The dtype that the base's own files are in."""
    return config_of(recipe).dtype or torch.float32


def _drift(job: Job, proof: Proof, in_float32: list[float]) -> dict[str, Any]:
    """How far the merged model is from base and adapter as trained, on the fixed text, in nats.

    in_float32: log-probs of the adapter on the original weights, before merging and rounding
    """
    trained = on_cpu(job.metadata, quantised=True)
    as_trained = in_float32
    if trained.quantization != "none":
        with base_for(trained) as base:
            model, _ = _on(base.model, base.tokenizer, job)
            as_trained = expected(model, proof.ids, adapters=True)
    differences = [abs(value - other) for value, other in zip(as_trained, proof.adapter, strict=True)]
    mean = sum(differences) / len(differences)
    return {"quantization": trained.quantization, "mean": mean, "max": max(differences)}


_WRITERS: dict[str, Callable[[Job, Path], dict[str, Any]]] = {
    "peft": _write_adapter,
    "merged": _write_merged,
    "gguf-lora": _write_gguf_lora,
    "gguf": _write_gguf,
    "vllm": _write_adapter,
    "ollama": _write_ollama,
}
