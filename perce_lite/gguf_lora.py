"""An adapter as GGUF, for llama.cpp's `--lora`: names, order of rows, scale, and the proof that it works there."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

from perce_lite import llamacpp
from perce_lite.errors import ExportError
from perce_lite.models import same_base
from perce_lite.proof import Proof, check_not_idle, does_as_recorded, fingerprint, gap

FILE = "adapter.gguf"

ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}
"""llama.cpp's architecture for transformers' model type."""

_NOT_DONE = "llama.cpp was not asked: give the base as a GGUF file with --base-gguf"


def write(path: Path, model: PeftModel) -> tuple[dict[str, str], dict[str, int]]:
    """Writes the adapter of `model` in float32; gives fingerprints in PyTorch's order of rows, and `Proof.heads`.

    Raises:
        ExportError: LoRA on a layer that llama.cpp has no name for.
    """
    config = model.get_base_model().config.get_text_config()
    architecture = ARCHITECTURES[config.model_type]
    # llama.cpp rotates neighbours of q and k where PyTorch's Llama rotates halves, and wants the rows in that order.
    heads = (
        {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        if architecture == gguf.MODEL_ARCH.LLAMA
        else {}
    )
    alpha = float(model.peft_config[model.active_adapter].lora_alpha)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    prints = {}
    for name, tensor in _tensors(model, architecture, config.num_hidden_layers, alpha):
        prints[name] = fingerprint(tensor)
        writer.add_tensor(name, permuted(name, tensor, heads).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return prints, heads


def _tensors(
    model: PeftModel, architecture: gguf.MODEL_ARCH, layers: int, alpha: float
) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's name and float32 values of every A (rank, in) and B (out, rank)."""
    names = gguf.get_tensor_name_map(architecture, layers)
    adapter = model.active_adapter
    for path, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer) or adapter not in layer.lora_A:
            continue
        plain = path.replace("language_model.", "")
        name = names.get_name(plain)
        if name is None:
            raise ExportError(f"gguf-lora: llama.cpp has no name for {path}, on which this adapter has LoRA.")
        a, b = (part[adapter].weight.detach().float().cpu() for part in (layer.lora_A, layer.lora_B))
        # llama.cpp scales by alpha / rank, with one alpha for all: what differs (rsLoRA, patterns) goes into B.
        more = layer.scaling[adapter] * a.shape[0] / alpha
        yield f"{name}.weight.lora_a", a.contiguous()
        yield f"{name}.weight.lora_b", (b if more == 1 else b * more).contiguous()


def _heads_of(name: str, heads: dict[str, int]) -> int:
    """How many heads the rows of tensor `name` are to be permuted in; 0: they stay."""
    kind = name.removesuffix(".weight.lora_b").split(".")[-1]
    return heads.get(kind, 0) if name.endswith("lora_b") else 0


def permuted(name: str, tensor: Tensor, heads: dict[str, int]) -> Tensor:
    """B (out, rank) of q or k with the two halves of each head's rows interleaved; anything else as it is."""
    count = _heads_of(name, heads)
    if not count:
        return tensor
    return tensor.view(count, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape).contiguous()


def restored(name: str, tensor: Tensor, heads: dict[str, int]) -> Tensor:
    """What `permuted` was given."""
    count = _heads_of(name, heads)
    if not count:
        return tensor
    return tensor.view(count, -1, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape).contiguous()


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of an adapter GGUF, as they lie in it.

    Raises:
        ExportError: no such file, or a damaged one.
    """
    try:
        reader = gguf.GGUFReader(path)
        return {one.name: torch.from_numpy(np.array(one.data)) for one in reader.tensors}
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ExportError(f"{path}: a damaged file: {error}. Export again.") from error


# The proof


def verify(folder: Path, proof: Proof, base: Path | None) -> dict[str, Any]:
    """Reads the adapter back, and has a llama.cpp run it on `base` where that is given.

    Raises:
        ExportError: whatever is wrong, each fault with a message of its own.
    """
    found = read(folder / FILE)
    check_not_idle(found.items(), folder)
    _check_rows(found, proof, folder)
    if base is None:
        return {"off_adapter": None, "off_base": None, "not_done": _NOT_DONE}
    known = llamacpp.read_base(base)
    _check_vocabulary(known, proof)
    _check_model(known, proof)
    on, off = llamacpp.log_probs(known, folder / FILE, proof.ids, len(proof.adapter), scales=(1.0, 0.0))
    if not known.exact:
        return _loosely(proof, on, off, folder)
    bare = gap(off, proof.base)
    if bare > proof.tolerance:
        raise ExportError(
            f"{base}: another base: alone it is {bare:.4f} nats off the one that this adapter is for; "
            f"{proof.tolerance:.4f} are allowed."
        )
    return {"off_adapter": does_as_recorded(proof, on, str(folder / FILE)), "off_base": bare, "base_gguf": str(base)}


def _check_rows(found: dict[str, Tensor], proof: Proof, folder: Path) -> None:
    """Raises ExportError where tensors are missing, not permuted or changed."""
    if missing := sorted(set(proof.fingerprints) ^ set(found)):
        raise ExportError(
            f"{folder / FILE}: tensors are missing or were added: {', '.join(missing[:5])}. Export again."
        )
    for name, tensor in found.items():
        if tensor.dim() == 2 and fingerprint(restored(name, tensor, proof.heads)) == proof.fingerprints[name]:
            continue
        if fingerprint(tensor) == proof.fingerprints[name]:
            raise ExportError(
                f"{folder / FILE}: q and k are not permuted: the rows of {name} are in PyTorch's order, so llama.cpp "
                "would rotate the wrong ones. Export again."
            )
        raise ExportError(f"{folder / FILE}: a corrupted tensor: {name} is not what was exported. Export again.")


def _check_vocabulary(known: llamacpp.GgufBase, proof: Proof) -> None:
    """Raises ExportError where the ids of the fixed text are other tokens in the GGUF model."""
    size = len(known.tokens)
    theirs = [known.tokens[one] if one < size else None for one in proof.ids]
    wrong = [index for index, (one, other) in enumerate(zip(theirs, proof.pieces, strict=True)) if one != other]
    if wrong:
        first = wrong[0]
        raise ExportError(
            f"{known.path}: a swapped tokenizer: token {proof.ids[first]} is {theirs[first]!r} there and was "
            f"{proof.pieces[first]!r} in training."
        )


def _check_model(known: llamacpp.GgufBase, proof: Proof) -> None:
    """Raises ExportError where the GGUF model is of another architecture, size or embedding."""
    kind, layers, width = proof.sketch.shape[:3]
    ours = (gguf.MODEL_ARCH_NAMES[ARCHITECTURES[kind]], layers, width)
    theirs = (known.architecture, known.layers, known.width)
    if ours != theirs:
        told = (f"{name}, {count} layers of {size}" for name, count, size in (theirs, ours))
        raise ExportError(f"{known.path}: another base: {', not '.join(told)}.")
    if known.exact:
        same = same_base(
            {"shape": [], "embedding": known.embedding}, {"shape": [], "embedding": proof.sketch.embedding}
        )
    else:
        same = float(np.corrcoef(known.embedding, proof.sketch.embedding)[0, 1]) > 0.9
    if not same:
        raise ExportError(f"{known.path}: another base: its embedding is not that of {proof.model}.")


def _loosely(proof: Proof, on: list[float], off: list[float], folder: Path) -> dict[str, Any]:
    """On a base of rounded weights: the adapter has to move log-probs as it does on the whole one, by and large.

    Raises:
        ExportError: it moves them elsewhere by half as much as it should move them, on average.
    """
    moved = np.array(on) - np.array(off)
    meant = np.array(proof.adapter) - np.array(proof.base)
    off_by, effect = float(np.abs(moved - meant).mean()), float(np.abs(meant).mean())
    if float(np.abs(moved).max()) < 0.05 * float(np.abs(meant).max()):
        raise ExportError(
            f"{folder / FILE}: it loads and does nothing: a fixed text has the log-probs of the bare base."
        )
    if not off_by <= effect / 2:
        raise ExportError(
            f"{folder / FILE}: on a quantised base it moves the log-probs of a fixed text {off_by:.3f} nats a token "
            f"elsewhere than in training, where it moved them by {effect:.3f}; half of that is allowed."
        )
    return {"off_adapter": None, "off_base": None, "off_shift": off_by, "mean_shift": effect}
