"""What every GGUF of ours has in common: names, the order of rows, reading back, and the checks of a proof."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from perce_lite.errors import ExportError
from perce_lite.export.llamacpp import GgufBase
from perce_lite.export.proof import Proof, fingerprint
from perce_lite.export_targets import GGUF_FAMILIES
from perce_lite.model.fingerprint import same_base

ARCHITECTURES = {kind: gguf.MODEL_ARCH[name.upper()] for kind, name in GGUF_FAMILIES.items()}
"""llama.cpp's architecture for transformers' model type."""

ROTATED = ("attn_q", "attn_k")
"""Kinds of tensor whose rows llama.cpp wants in another order for the llama architecture."""


def heads_of(config: Any) -> dict[str, int]:
    """`Proof.heads` for a model of this text config.

    llama.cpp rotates neighbours of q and k where PyTorch's Llama rotates halves, and wants the rows in that order.
    """
    if ARCHITECTURES[config.model_type] != gguf.MODEL_ARCH.LLAMA:
        return {}
    return dict(zip(ROTATED, (config.num_attention_heads, config.num_key_value_heads), strict=True))


def _heads_of(name: str, heads: Mapping[str, int]) -> int:
    """How many heads the rows of tensor `name` are to be permuted in; 0: they stay."""
    kind, _, part = name.partition(".weight") if ".weight" in name else name.partition(".bias")
    return heads.get(kind.split(".")[-1], 0) if part in ("", ".lora_b") else 0


def permuted(name: str, tensor: Tensor, heads: Mapping[str, int]) -> Tensor:
    """Rows of q or k, (out, ...), with the two halves of each head's interleaved; anything else as it is."""
    count = _heads_of(name, heads)
    if not count:
        return tensor
    return tensor.view(count, 2, -1, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape).contiguous()


def restored(name: str, tensor: Tensor, heads: Mapping[str, int]) -> Tensor:
    """What `permuted` was given."""
    count = _heads_of(name, heads)
    if not count:
        return tensor
    return tensor.view(count, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape).contiguous()


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a GGUF as they lie in it; quantised ones are the bytes of their rows, (out, bytes).

    Raises:
        ExportError: no such file, or a damaged one.
    """
    try:
        reader = gguf.GGUFReader(path)
        return {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise ExportError(f"{path}: a damaged file: {error}. Export again.") from error


def finish(writer: gguf.GGUFWriter) -> None:
    """Writes what was added to `writer`, and closes it."""
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def check_rows(found: Mapping[str, Tensor], proof: Proof, path: Path) -> None:
    """Raises ExportError where tensors are missing, not permuted or changed."""
    if missing := sorted(set(proof.fingerprints) ^ set(found)):
        raise ExportError(f"{path}: tensors are missing or were added: {', '.join(missing[:5])}. Export again.")
    for name, tensor in found.items():
        if fingerprint(restored(name, tensor, proof.heads)) == proof.fingerprints[name]:
            continue
        if fingerprint(tensor) == proof.fingerprints[name]:
            raise ExportError(
                f"{path}: q and k are not permuted: the rows of {name} are in PyTorch's order, so llama.cpp "
                "would rotate the wrong ones. Export again."
            )
        raise ExportError(f"{path}: a corrupted tensor: {name} is not what was exported. Export again.")


def check_vocabulary(known: GgufBase, proof: Proof) -> None:
    """Raises ExportError where the ids of the fixed text are other tokens in the GGUF model."""
    size = len(known.tokens)
    pieces = [known.tokens[token] if token < size else None for token in proof.ids]
    wrong = [index for index, (piece, other) in enumerate(zip(pieces, proof.pieces, strict=True)) if piece != other]
    if wrong:
        first = wrong[0]
        raise ExportError(
            f"{known.path}: a swapped tokenizer: token {proof.ids[first]} is {pieces[first]!r} there and was "
            f"{proof.pieces[first]!r} in training."
        )


def check_model(known: GgufBase, proof: Proof) -> None:
    """Raises ExportError where the GGUF model is of another architecture, size or embedding."""
    kind, layers, width = proof.sketch.shape[:3]
    ours = (gguf.MODEL_ARCH_NAMES[ARCHITECTURES[kind]], layers, width)
    shape = (known.architecture, known.layers, known.width)
    if ours != shape:
        descriptions = (f"{name}, {count} layers of {size}" for name, count, size in (shape, ours))
        raise ExportError(f"{known.path}: another base: {', not '.join(descriptions)}.")
    if known.exact:
        same = same_base(
            {"shape": [], "embedding": known.embedding}, {"shape": [], "embedding": proof.sketch.embedding}
        )
    else:
        same = float(np.corrcoef(known.embedding, proof.sketch.embedding)[0, 1]) > 0.9
    if not same:
        raise ExportError(f"{known.path}: another base: its embedding is not that of {proof.model}.")


def mean_shift(proof: Proof) -> float:
    """Nats a token by which the adapter moves the fixed text, without sign."""
    return float(np.abs(np.array(proof.adapter) - np.array(proof.base)).mean())
