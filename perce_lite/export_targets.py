"""Where an adapter can be exported to, and what each target cannot take; no torch, so that a recipe can ask."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perce_lite.errors import ExportError
from perce_lite.files import read_json

TARGETS = ("peft", "merged", "gguf-lora", "gguf", "vllm", "ollama")

PROOF = "proof.json"
"""The file beside an export that says what it has to do."""

GGUF_FAMILIES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
"""llama.cpp's architecture for transformers' model type."""

QUANTS = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""What the weights of a GGUF can be written as, finest first: what the gguf package quantises to."""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as --max-lora-rank."""

_VLLM_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_LORA_R = 16


def faults(
    target: str, lora: Mapping[str, Any], kind: str | None = None, tied: bool = False, profile_pass: str = "full"
) -> list[str]:
    """Why `target` cannot take an adapter, one reason each; empty: it can.

    lora: fields of peft.LoraConfig; what is absent is what a recipe starts from
    kind: transformers' model type of the base, where it is known; tied: whether its head is its embedding
    """
    reasons = []
    if profile_pass == "frozen" and target not in ("peft", "gguf-lora"):
        why = "vLLM has no activated LoRA" if target == "vllm" else "merged weights are awake at every token"
        reasons.append(f"it sleeps through the profile (profile_pass: frozen), and {why}")
    if target in ("gguf-lora", "gguf", "ollama") and kind is not None and kind not in GGUF_FAMILIES:
        reasons.append(f"its base is a {kind}, and the converter knows {', '.join(GGUF_FAMILIES)}")
    if target == "gguf-lora":
        reasons += _gguf_lora_faults(lora)
    if target == "vllm":
        reasons += _vllm_faults(lora)
    if target != "peft" and tied and (heads := vocabulary_modules(lora)):
        reasons.append(
            f"it has LoRA on {', '.join(heads)}, but this base has one matrix for its input and its head, which would "
            "be changed in both places"
        )
    return reasons


def base_faults(target: str, config: Mapping[str, Any], loaded: str) -> list[str]:
    """Why `target` cannot take any adapter of a base, one reason each.

    config: of the base's own files; loaded: the class that training loads it as
    """
    reasons = []
    if target in ("merged", "gguf-lora", "gguf", "ollama") and config.get("quantization_config"):
        reasons.append("the base's own files are quantised, so there are no original weights to merge into")
    named = (config.get("architectures") or [loaded])[0]
    if target == "vllm" and named != loaded:
        reasons.append(
            f"vLLM builds the base as {named}, and training loads it as {loaded}, whose layers have other names: vLLM "
            "would not find them"
        )
    return reasons


def _gguf_lora_faults(lora: Mapping[str, Any]) -> list[str]:
    """Why llama.cpp cannot take an adapter beside its base."""
    reasons = []
    if lora.get("use_dora"):
        reasons.append(
            "it was trained with DoRA (use_dora), which llama.cpp does not know; --to merged or gguf takes it"
        )
    if lora.get("modules_to_save"):
        saved = ", ".join(lora["modules_to_save"])
        reasons.append(f"it holds whole layers (modules_to_save: {saved}), and an adapter GGUF holds LoRA alone")
    for name in ("bias", "lora_bias", "trainable_token_indices"):
        if lora.get(name, "none") not in ("none", None, False):
            reasons.append(f"it was trained with {name}, which llama.cpp does not know")
    if "embed_tokens" in vocabulary_modules(lora):
        reasons.append("it has LoRA on embed_tokens, which is not converted")
    return reasons


def _vllm_faults(lora: Mapping[str, Any]) -> list[str]:
    """Why vLLM refuses an adapter, or would compute something else with it than training did."""
    reasons = []
    if lora.get("use_dora"):
        reasons.append("it is trained with DoRA (use_dora), which vLLM rejects")
    if lora.get("modules_to_save"):
        reasons.append(
            f"it holds whole layers (modules_to_save: {', '.join(lora['modules_to_save'])}): vLLM rejects them"
        )
    if lora.get("bias", "none") != "none" or lora.get("lora_bias"):
        reasons.append("it trains biases (bias, lora_bias), which vLLM rejects")
    if lora.get("trainable_token_indices"):
        reasons.append("it trains rows of the embedding (trainable_token_indices), which vLLM does not read")
    for name in ("rank_pattern", "alpha_pattern"):
        if lora.get(name):
            reasons.append(f"its layers differ in scale ({name}), and vLLM gives all layers one")
    rank = lora.get("r", _LORA_R)
    if isinstance(rank, int) and max_rank(rank) is None:
        reasons.append(f"its rank is {rank}, and vLLM takes {VLLM_RANKS[-1]} at the most")
    named = lora.get("target_modules")
    if isinstance(named, list | tuple | set) and (
        other := sorted({_layer(module) for module in named} - {*_VLLM_MODULES, "lm_head"})
    ):
        reasons.append(f"it has LoRA on {', '.join(other)}; vLLM is known to take {', '.join(_VLLM_MODULES)}")
    return reasons


def max_rank(rank: int) -> int | None:
    """The smallest --max-lora-rank of vLLM that holds `rank`; None where there is none."""
    return next((limit for limit in VLLM_RANKS if limit >= rank), None)


def vocabulary_modules(lora: Mapping[str, Any]) -> list[str]:
    """Embedding or head, where the adapter names them."""
    named: str | Sequence[str] = lora.get("target_modules") or []
    names = ("embed_tokens", "lm_head")
    if isinstance(named, str):
        return [name for name in names if re.fullmatch(named, name)]
    return [name for name in names if name in map(_layer, named)]


def _layer(path: str) -> str:
    """The last word of a module's path."""
    return path.rpartition(".")[2]


def merge_drift(drift: Mapping[str, Any]) -> str:
    """A sentence on how far merging moved the log-probs of a fixed text.

    drift: `quantization` that the adapter was trained in, `mean` and `max` absolute difference, nats a token
    """
    quantised = drift["quantization"] != "none"
    why = (
        f"Trained on the base in {drift['quantization']}, merged into its original weights"
        if quantised
        else "The base was whole in training, so merging changes nothing but rounding"
    )
    moved = f"{drift['mean']:.3f} nats a token, {drift['max']:.3f} at the most"
    return f"{why}: a fixed text's log-probs moved by {moved}."


def refuse_unknown(target: str, quant: str | None) -> None:
    """Raises ExportError where there is no such target, or no such type of weights for it."""
    if target not in TARGETS:
        raise ExportError(f"--to {target}: there is no such target. There is: {', '.join(TARGETS)}.")
    if quant is not None and target not in ("gguf", "ollama"):
        raise ExportError(f"--quant goes with gguf and ollama, not with {target}.")
    if quant is not None and quant not in QUANTS:
        raise ExportError(
            f"--quant {quant}: is not written here. There is: {', '.join(QUANTS)}. For others write F16, and "
            "give it to llama.cpp's own llama-quantize."
        )


def written_proof(folder: Path) -> dict[str, Any]:
    """What the proof beside an export says.

    Raises:
        ExportError: there is none, or it is torn.
    """
    proof = read_json(folder / PROOF)
    if not isinstance(proof, dict):
        raise ExportError(
            f"{folder}: no export of PerCE Lite: it has no readable {PROOF}. Give a folder that `perce-lite export` "
            "named at its end."
        )
    return proof
