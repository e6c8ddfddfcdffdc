"""A trained adapter for other programs: written aside, loaded again, proven, and only then given its name."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from perce_lite.console import say
from perce_lite.data.chat_template import Chat
from perce_lite.data.pairs import PairMaker
from perce_lite.data.readers import user_texts
from perce_lite.errors import DataError, ExportError
from perce_lite.export import llamacpp, modelfile, usage
from perce_lite.export.folder_proof import verify_merged, verify_peft
from perce_lite.export.gguf import lora as gguf_lora
from perce_lite.export.gguf import model as gguf_model
from perce_lite.export.gguf import proof as gguf_proof
from perce_lite.export.gguf.vocabulary import splitting
from perce_lite.export.proof import QUESTION, Proof, gap, on_cpu, read_proof
from perce_lite.export.writers import Job, Metadata, source_hash, write
from perce_lite.export_targets import PROOF, TARGETS, faults, refuse_unknown
from perce_lite.files import folder_written_aside, read_json
from perce_lite.locks import held_alone
from perce_lite.model import adapter_files
from perce_lite.model.adapter_files import lora_options, recipe_of
from perce_lite.model.base import load_tokenizer
from perce_lite.model.footprint import base_faults, config_of

QUANT = "F16"
"""What the weights of a GGUF are written as unless `--quant` says otherwise."""


def export(
    folder: Path,
    target: str,
    out: Path | None,
    force: bool,
    base_gguf: Path | None = None,
    quant: str | None = None,
    evaluation: Path | None = None,
    user: str | None = None,
    said: adapter_files.Said | None = None,
) -> dict[str, Any]:
    """Exports the adapter in `folder`; gives what `--json` writes. What lies at `out` in the end was proven.

    out: where to; None: beside the adapter, `<adapter>-<target>`
    force: replace an earlier export there
    base_gguf: for gguf-lora, the base as a GGUF file, for a llama.cpp to run the adapter on
    quant: for gguf and ollama, what the weights are written as; None: F16
    evaluation: what `perce-lite eval --json` wrote, for the model card
    user: a user of the adapter's data, whose texts the export carries as its profile; None: it carries none
    said: of the adapter, where its files do not say it

    Raises:
        DataError: no such user.
        ExportError: no such target, one that cannot take this adapter, a folder in the way, or a proof that fails.
        AdapterError: no adapter, or one of another base; DiskFullError: no space left, and nothing was written.
    """
    check_options(target, base_gguf, quant)
    metadata = adapter_files.read_metadata(folder, said)
    source = Path(metadata["folder"])
    preflight(metadata, target)
    place = out or source.with_name(f"{source.name}-{target}")
    evaluated = () if evaluation is None else _evaluated(evaluation, source)
    _check_free(place, force)
    profile = "" if user is None else carried_profile(metadata, user)
    if user is None and (lacks := usage.without_profile(metadata)):
        say(lacks)
    job = Job(target, metadata, source, place, quant or QUANT, evaluated, profile)

    def refuse(who: str) -> ExportError:
        return ExportError(f"{place}: another export is writing there ({who}). Wait for it, or give another --out.")

    with held_alone(place.with_name(f".{place.name}.lock"), refuse):
        figures = _written(job, base_gguf)
    return {"target": target, "adapter": str(source), "folder": str(place), "profile": profile, **figures}


def _written(job: Job, base_gguf: Path | None) -> dict[str, Any]:
    """Writes an export and proves it; gives figures of its own. Nobody else writes to its place."""
    exported = source_hash(job.source)
    changed = f"{job.source}: was removed or replaced while it was exported, so nothing was kept. Export it again."
    try:
        with folder_written_aside(job.place) as aside:
            say(f"Writing {job.target} ...")
            figures = write(job, aside)
            say("Loading it again, to prove it ...")
            try:
                figures |= {"proof": verify(aside, base_gguf)["proof"]}
            except ExportError as error:
                reason = str(error).replace(str(aside), str(job.place))
                raise ExportError(f"The proof failed, so nothing was kept. {reason}") from error
            if source_hash(job.source) != exported:
                raise ExportError(changed)
    except OSError as error:
        if not job.source.is_dir():  # a user who was deleted, with what was being written of theirs
            raise ExportError(changed) from error
        raise
    return figures


def verify(folder: Path, base_gguf: Path | None = None) -> dict[str, Any]:
    """Repeats the proof of an export from its files; `base_gguf` as in `export`.

    Raises:
        ExportError: no export, or its proof fails; each fault has a message of its own.
    """
    proof = read_proof(folder)
    if proof.target not in TARGETS:
        raise ExportError(f"{folder / PROOF}: target {proof.target} is not one of {', '.join(TARGETS)}")
    effect = gap(proof.adapter, proof.base)
    _check_base_gguf(proof.target, base_gguf)
    result = _VERIFIERS[proof.target](folder, proof, base_gguf)
    return {
        "target": proof.target,
        "folder": str(folder),
        "proof": {**result, "tolerance": proof.tolerance, "effect": effect, "tokens": len(proof.adapter)},
    }


# Before any work


def check_options(target: str, base_gguf: Path | None, quant: str | None) -> None:
    """Raises ExportError where there is no such target, or an option does not go with it; nothing is loaded yet."""
    refuse_unknown(target, quant)
    _check_base_gguf(target, base_gguf)


def _check_base_gguf(target: str, base_gguf: Path | None) -> None:
    if base_gguf is None:
        return
    if target != "gguf-lora":
        raise ExportError(f"--base-gguf goes with gguf-lora, not with {target}.")
    llamacpp.read_base(base_gguf)
    llamacpp.need_llamacpp()


def preflight(metadata: Metadata, target: str) -> None:
    """Asks whether `target` can take the adapter with this `metadata`; no weights are loaded.

    Raises:
        ExportError: with every reason why it cannot.
    """
    config = lora_options(Path(metadata["folder"]))
    shape = metadata["base"]["shape"]
    recipe = on_cpu(metadata, quantised=False)
    adapters_own = faults(target, config, shape[0], bool(shape[-1]), recipe.profile_pass)
    if reasons := [*adapters_own, *base_faults(recipe, target)]:
        raise ExportError(f"{metadata['folder']}: {target} cannot take this adapter: {'; '.join(reasons)}.")
    if target not in ("gguf", "ollama") and recipe.profile_pass == "full":
        return
    tokenizer = load_tokenizer(recipe)
    tokenizer.chat_template = metadata["chat_template"]
    if recipe.profile_pass == "frozen":
        _need_invocation(metadata["folder"], PairMaker.of(recipe, tokenizer, None))
        return
    gguf_model.refuse_unlike(config_of(recipe).get_text_config())
    splitting(tokenizer)  # raises where llama.cpp has no equal
    if target == "ollama":
        chat = Chat(tokenizer, recipe.template)
        modelfile.retold(chat, chat.composed([{"role": "user", "content": QUESTION}], ""))


def carried_profile(metadata: Metadata, user: str) -> str:
    """The profile of `user` for an export: those of their texts that are nearest to all of them, as many as fit.

    They fit where `profile.max_tokens` and `max_length` say so, as in training; without the former there are
    `profile.top_k`. Held-out texts are left out.

    Raises:
        DataError: no such user, or none of their texts fits; ExportError: the adapter needs no profile.
    """
    if metadata["train_on"] == "counterfactual":
        raise ExportError(
            f"--user {user}: this adapter was trained without the profile in the prompt (train_on: counterfactual), so "
            "it needs none. Export without --user."
        )
    recipe = recipe_of(dict(metadata))
    texts = user_texts(recipe, user)
    tokenizer = load_tokenizer(recipe)
    tokenizer.chat_template = metadata["chat_template"]
    maker = PairMaker.of(recipe, tokenizer, recipe.train.get("max_length", 1024))
    rule = recipe.profile
    if rule.max_tokens is not None:
        rule = rule.model_copy(update={"top_k": max(1, len(texts.history.items))})
    everything = "\n".join(item.text for item in texts.history.items)
    chosen = maker.fitting([{"role": "user", "content": QUESTION}], texts.profile_for(everything, rule))
    if not (profile := maker.profile_text(chosen)):
        raise DataError(f"--user {user}: none of their texts fits beside a question; raise train.max_length.")
    return profile


def _need_invocation(folder: str, maker: PairMaker) -> None:
    """Raises ExportError where no other program could know at which token an adapter wakes."""
    if not maker.invocation_ids():
        raise ExportError(
            f"{folder}: it sleeps through the profile (profile_pass: frozen), and others find where it wakes by the "
            "tokens that open the user's turn; here the profile stands inside that turn. It works with "
            "`perce-lite generate` and `chat`. For others train with a system message (template.position: system), if "
            "the chat template knows one, or with profile_pass: full."
        )


def _evaluated(path: Path, source: Path) -> tuple[str, ...]:
    """The sentences of what `perce-lite eval --json` wrote.

    Raises:
        ExportError: no such file, or one of other adapters.
    """
    figures = read_json(path)
    if not isinstance(figures, dict) or not {"sentences", "arms"} <= set(figures):
        raise ExportError(f"--evaluation {path}: is not what `perce-lite eval --json FILE` writes.")
    judged = {Path(folder).resolve() for folder in figures["arms"].values() if folder is not None}
    if not judged & {source.resolve(), source.resolve().parent}:
        raise ExportError(f"--evaluation {path}: it judges {', '.join(map(str, sorted(judged)))}, not {source}.")
    return tuple(figures["sentences"])


def _check_free(place: Path, force: bool) -> None:
    """Raises ExportError where something stands at `place` that may not be replaced."""
    standing = next(parent for parent in place.absolute().parents if parent.exists())
    if standing.is_dir() and not os.access(standing, os.W_OK):
        raise ExportError(f"{place}: nothing may be written in {standing}. Give another --out.")
    if file := next((parent for parent in place.parents if parent.exists() and not parent.is_dir()), None):
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


def _verify_vllm(folder: Path, proof: Proof) -> dict[str, Any]:
    """As for peft, and the adapter's config once more against what vLLM takes."""
    config = read_json(folder / "adapter_config.json")
    if isinstance(config, dict) and (reasons := faults("vllm", config)):
        raise ExportError(f"{folder}: vLLM does not take it any more: {'; '.join(reasons)}. Export again.")
    return dict(verify_peft(folder, proof))


def _verify_ollama(folder: Path, proof: Proof) -> dict[str, Any]:
    """The Modelfile read back, and the GGUF as for gguf."""
    modelfile.check(folder, proof, gguf_model.FILE)
    return gguf_proof.verify(folder, proof)


_VERIFIERS: dict[str, Callable[[Path, Proof, Path | None], dict[str, Any]]] = {
    "peft": lambda folder, proof, _: verify_peft(folder, proof),
    "merged": lambda folder, proof, _: verify_merged(folder, proof),
    "gguf-lora": gguf_lora.verify,
    "gguf": lambda folder, proof, _: gguf_proof.verify(folder, proof),
    "vllm": lambda folder, proof, _: _verify_vllm(folder, proof),
    "ollama": lambda folder, proof, _: _verify_ollama(folder, proof),
}
