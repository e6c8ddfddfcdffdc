"""Hashes by which a base, an adapter or a file is recognised: of weights, of a few numbers, of a folder's files.

The base is hashed once a process: `load_base` remembers each base that it loads, and `fingerprint` hashes such a base
again only if one of its weights was replaced or written to. Files are read again only if their size or time changed.
"""

import functools
import hashlib
import math
import re
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes as bnb
import numpy as np
import torch
import xxhash
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from perce_lite.model.compat import base_weight_name, is_base_weight, is_lora_weight, quantisation_state, write_count
from perce_lite.model.host_embedding import tables_on_host


class _State(NamedTuple):
    """A tensor as it was when it was hashed; the reference is weak, so that a new tensor at an old address differs."""

    tensor: "weakref.ref[torch.Tensor]"
    address: int
    writes: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "_State":
        return cls(weakref.ref(tensor), tensor.data_ptr(), write_count(tensor))

    def still(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is this one, neither moved nor written to since."""
        return self.tensor() is tensor and self.address == tensor.data_ptr() and self.writes == write_count(tensor)


class _Hashed(NamedTuple):
    """The hash of a base, and its tensors as they were when it was made."""

    fingerprint: str
    states: list[_State]

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether nothing of the base was replaced or written to since."""
        pairs = zip(self.states, tensors, strict=False)
        return len(self.states) == len(tensors) and all(state.still(tensor) for state, tensor in pairs)


_remembered: "weakref.WeakKeyDictionary[nn.Module, _Hashed | None]" = weakref.WeakKeyDictionary()
"""Bases to hash once; None: not hashed yet."""


def remember_fingerprint(base: nn.Module) -> None:
    """From now on `fingerprint` hashes `base`, bare or with adapters on it, once.

    It is hashed again if a weight was replaced or written to, as torch counts writes. A write through `.data` is not
    counted: call `forget_fingerprint` after one.
    """
    _remembered.setdefault(base, None)


def forget_fingerprint(base: nn.Module) -> None:
    """`fingerprint` hashes `base` anew each time, as a base that was never remembered."""
    _remembered.pop(base, None)


def fingerprint(model: nn.Module) -> str:
    """Hash of what the frozen base computes with: every weight as loaded, quantisation constants included.

    Adapters do not count, so it is the same before and after training. It depends on device and dtype, as the
    log-probs do for which it is a key. To tell whether an adapter fits a base use `sketch`.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    weights = sorted(_base_weights(model))
    if base not in _remembered:
        return _hash_of(weights)
    tensors = [tensor for _, weight in weights for tensor in _tensors_of(weight)]
    known = _remembered[base]
    if known is None or not known.holds(tensors):
        known = _remembered[base] = _Hashed(_hash_of(weights), [_State.of(tensor) for tensor in tensors])
    return known.fingerprint


def adapter_fingerprint(model: nn.Module) -> str:
    """Hash of the adapters' weights."""
    return _hash_of([(name, weight) for name, weight in sorted(model.named_parameters()) if is_lora_weight(name)])


def _base_weights(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Weights of the base by their names in the bare base, embedding tables on the host included."""
    return [
        (base_weight_name(name), weight)
        for name, weight in [*model.named_parameters(), *tables_on_host(model)]
        if is_base_weight(name)
    ]


def _tensors_of(weight: torch.Tensor) -> list[torch.Tensor]:
    """A weight and, if it is quantised, its absolute maxima."""
    state = quantisation_state(weight)
    return [weight] if state is None else [weight, state.absmax]


def _hash_of(weights: Sequence[tuple[str, torch.Tensor]]) -> str:
    state = xxhash.xxh3_128()
    for name, weight in weights:
        hash_parameter(state, name, weight)
    return str(state.hexdigest())


def hash_parameter(state: xxhash.xxh3_128, name: str, parameter: torch.Tensor) -> None:
    """Adds a parameter to `state`, the constants of its quantisation included."""
    tensors = {name: parameter.data}
    quantisation = quantisation_state(parameter)
    if quantisation is not None:
        tensors |= {f"{name}.{key}": value for key, value in quantisation.as_dict(packed=True).items()}
    for key, tensor in tensors.items():
        hash_tensor(state, key, tensor)


def hash_tensor(state: xxhash.xxh3_128, name: str, tensor: torch.Tensor) -> None:
    """Adds a tensor's name, dtype, shape and bytes to `state`."""
    flat = tensor.detach().cpu().contiguous()
    state.update(f"{name} {flat.dtype} {tuple(flat.shape)}".encode())
    state.update(flat.view(-1).view(torch.uint8).numpy().data)


# A base on any device, in any dtype


def sketch(model: PreTrainedModel) -> dict[str, Any]:
    """A few numbers by which a base is recognised on any device, in any dtype, in 4 bit or not.

    `shape`: model type, layers, width, vocabulary size, tied head; `embedding`: 64 of its values; `layers`: values of
    the matrices of the first, the middle and the last layer; `numbers`: what kind of numbers those are
    """
    embedding = model.get_input_embeddings().weight
    rows = torch.linspace(0, embedding.shape[0] - 1, 64, device=embedding.device).long()
    columns = torch.linspace(0, embedding.shape[1] - 1, 64, device=embedding.device).long()
    values = embedding.detach()[rows, columns].float().cpu()
    config = model.config.get_text_config()
    shape = [
        config.model_type,
        config.num_hidden_layers,
        config.hidden_size,
        int(embedding.shape[0]),
        config.tie_word_embeddings,
    ]
    matrices = _matrices_of_three_layers(model)
    return {
        "shape": shape,
        "embedding": [round(float(value), 6) for value in values],
        "layers": [value for matrix in matrices for value in _values_of(matrix)],
        "numbers": ", ".join(sorted({_kind_of(matrix) for matrix in matrices})),
    }


_MATRICES = 8
"""At the most, of a layer: a mixture of experts has hundreds."""

_FOUR_BIT = "4 bit"


def _matrices_of_three_layers(model: PreTrainedModel) -> list[torch.Tensor]:
    """Matrices of the first, the middle and the last layer of the decoder, each layer's by name."""
    layers: dict[int, list[tuple[str, torch.Tensor]]] = {}
    for name, weight in model.get_decoder().named_parameters():
        layer = re.search(r"(?:^|\.)(\d+)\.", name)
        if layer and is_base_weight(name) and (weight.ndim > 1 or quantisation_state(weight) is not None):
            layers.setdefault(int(layer[1]), []).append((base_weight_name(name), weight))
    order = sorted(layers)
    chosen = dict.fromkeys(order[place] for place in (0, len(order) // 2, -1)) if order else ()
    matrices = []
    for number in chosen:
        of_layer = [weight for _, weight in sorted(layers[number], key=lambda named: named[0])]
        places = dict.fromkeys(round(place) for place in np.linspace(0, len(of_layer) - 1, _MATRICES))
        matrices += [of_layer[place] for place in places]
    return matrices


def _kind_of(matrix: torch.Tensor) -> str:
    state = quantisation_state(matrix)
    dtype = str(matrix.dtype if state is None else state.dtype).removeprefix("torch.")
    return dtype if state is None else f"{_FOUR_BIT} of {dtype}"


_values: dict[int, tuple[_State, list[float]]] = {}
"""Of matrices in 4 bit, by `id`: to read a value, the whole matrix has to be dequantised."""


def _values_of(matrix: torch.Tensor) -> list[float]:
    """Eight values of a matrix, from corner to corner, with six digits."""
    state = quantisation_state(matrix)
    if state is None:
        return _eight_of(matrix.detach())
    known = _values.get(id(matrix))
    if known is None or not known[0].still(matrix):
        for gone in [key for key, (of, _) in _values.items() if of.tensor() is None]:
            del _values[gone]
        known = _State.of(matrix), _eight_of(bnb.functional.dequantize_4bit(matrix.data, state))
        _values[id(matrix)] = known
    return known[1]


def _eight_of(matrix: torch.Tensor) -> list[float]:
    flat = matrix.reshape(-1, matrix.shape[-1])
    rows = torch.linspace(0, flat.shape[0] - 1, 8, device=flat.device).long()
    columns = torch.linspace(0, flat.shape[1] - 1, 8, device=flat.device).long()
    return [float(f"{value:.6g}") for value in flat[rows, columns].float().tolist()]


def same_base(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two sketches are of one base: its shape, its embedding and, where both have them, its layers.

    The tolerance of the embedding is that of rounding to bf16; that of the layers depends on what numbers they are.
    """
    if first["shape"] != second["shape"] or not _near(first["embedding"], second["embedding"], 2**-8):
        return False
    if not (has_layers(first) and has_layers(second)):
        return True
    first_layers, second_layers = first["layers"], second["layers"]
    if len(first_layers) != len(second_layers):
        return False
    in_4_bit = [_FOUR_BIT in base["numbers"] for base in (first, second)]
    if not any(in_4_bit):
        return _near(first_layers, second_layers, 1e-5 if first["numbers"] == second["numbers"] else 2**-8)
    if not all(in_4_bit):
        return _near_by_norm(first_layers, second_layers)
    return _mostly_equal(first_layers, second_layers, 1e-3 if first["numbers"] == second["numbers"] else 2**-6)


_LEAST_EQUAL = 0.95
"""Share of the values in 4 bit that two devices, or two dtypes that were quantised, have alike."""

_QUANTISED_AWAY = 0.2
"""What 4 bit may take of a matrix, by norm: half of that is usual, and two trainings from scratch are 1.4 apart."""


def has_layers(sketched: dict[str, Any]) -> bool:
    """Whether a sketch holds values of layers; those of earlier versions do not."""
    return bool(sketched.get("layers"))


def _near(first: Sequence[float], second: Sequence[float], share: float) -> bool:
    pairs = zip(first, second, strict=True)
    return all(math.isclose(value, other, rel_tol=share, abs_tol=1e-6) for value, other in pairs)


def _mostly_equal(first: Sequence[float], second: Sequence[float], share: float) -> bool:
    """Whether values of two bases in 4 bit may be of one: a few land on another level on another device or dtype."""
    return bool(np.isclose(np.asarray(first), np.asarray(second), rtol=share, atol=1e-6).mean() >= _LEAST_EQUAL)


def _near_by_norm(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether values in 4 bit and whole ones may be of one base."""
    vector, other = np.asarray(first), np.asarray(second)
    return bool(np.linalg.norm(vector - other) <= _QUANTISED_AWAY * max(np.linalg.norm(vector), np.linalg.norm(other)))


# Files, each read once a process


class FileStamp(NamedTuple):
    """A file as the disk describes it; it changes when the file is written."""

    path: Path
    modified_ns: int
    size: int

    @classmethod
    def of(cls, path: Path) -> "FileStamp":
        """
        Raises:
            OSError: no such file.
        """
        status = path.stat()
        return cls(path.absolute(), status.st_mtime_ns, status.st_size)


def sha256(path: Path) -> str:
    """SHA-256 of a file."""
    return _sha256(FileStamp.of(path))


@functools.lru_cache(maxsize=64)
def _sha256(stamp: FileStamp) -> str:
    with stamp.path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sampled_hash(head: str, files: Sequence[Path]) -> str:
    """Hash of `head` and of each file's name, size and 64 samples of 4096 bytes: enough to notice other weights."""
    return _sampled_hash(head, tuple(FileStamp.of(file) for file in files))


@functools.lru_cache(maxsize=256)
def _sampled_hash(head: str, stamps: tuple[FileStamp, ...]) -> str:
    state = xxhash.xxh3_128()
    state.update(head.encode())
    for stamp in stamps:
        state.update(f"{stamp.path.name} {stamp.size}".encode())
        with stamp.path.open("rb") as file:
            for part in range(64):
                file.seek(max(0, stamp.size - 4096) * part // 63)
                state.update(file.read(4096))
    return str(state.hexdigest())
