"""A base that lies on the disk as a GGUF file: looked at, de-quantised once into a folder of transformers, and kept.

The folder is keyed by the file's hash, so that a copy or a renamed file is not converted again. What transformers'
reader of GGUF leaves out in silence is put right or refused here: the scaling of rotary angles, the width of heads, a
tensor that has no place.
"""

import contextlib
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from perce_lite.console import errors as console
from perce_lite.console import say, warn
from perce_lite.errors import ModelError, first_line
from perce_lite.files import folder_written_aside, home, read_json, write_json
from perce_lite.memory import available_memory
from perce_lite.model.compat import llama3_frequencies
from perce_lite.model.fingerprint import FileStamp, sha256

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")
"""Architectures of GGUF files that are read: tests compare each with the model that it was made of."""

_WHOLE_UP_TO = 2 * 10**9
"""Weights of a model that is kept in float32, like the built-in one; a larger one is kept in 16 bit."""

_LLAMA3 = [
    {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192}
    for factor in (8.0, 32.0)
]  # fmt: skip
"""The scalings of Llama 3.1, and of 3.2 and 3.3 in their small sizes."""

_ROPE_FACTORS = "rope_freqs.weight"


def is_gguf(path: Path) -> bool:
    """Whether a file begins as a GGUF does; Ollama's have no ending."""
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def gguf_folder(path: Path) -> Path:
    """The folder of the model in a GGUF file; at first use it is de-quantised and kept under `PERCE_LITE_HOME`.

    Raises:
        ModelError: no GGUF file, a torn one, a part of one, an adapter, or a model that is not read.
        DiskFullError: no space left.
    """
    try:
        if not is_gguf(path):
            raise ModelError(f"model: {path} is a file, but no GGUF file. Give a folder, a Hub id or a GGUF file.")
        digest = _hash(path)
        folder = home() / "models" / f"gguf-{digest[:16]}"
        if folder.is_dir() and not damage(folder):
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir() or damage(folder):
                _convert(path, digest, folder)
    except OSError as error:
        raise ModelError(f"model: {path} cannot be read or converted: {first_line(error)}") from error
    return folder


def _hash(path: Path) -> str:
    """SHA-256 of the file; what it was is kept beside its size and time, as reading many GB takes a while."""
    stamp, known = FileStamp.of(path), home() / "models" / "gguf-hashes.json"
    kept = read_json(known)
    kept = kept if isinstance(kept, dict) else {}
    match kept.get(str(stamp.path)):
        case [stamp.modified_ns, stamp.size, str(digest)]:
            return digest
    with console.status(f"Reading {path.name} (once) ..."):
        digest = sha256(path)
    write_json(known, {**kept, str(stamp.path): [stamp.modified_ns, stamp.size, digest]})
    return digest


def _convert(path: Path, digest: str, folder: Path) -> None:
    """Writes the model of a GGUF file, whose SHA-256 is `digest`, to `folder`, which appears only when it is complete.

    Raises:
        ModelError: as `gguf_folder`.
    """
    reader = _opened(path)
    weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
    _warn_of_memory(path, weights)
    say(f"De-quantising {path.name}, {weights / 1e9:.2f} billion weights (once): {folder}")
    dtype = torch.float32 if weights <= _WHOLE_UP_TO else torch.float16
    with folder_written_aside(folder) as aside, console.status(f"De-quantising {path.name} ..."):
        dequantise(path, aside, dtype, reader)
        write_json(aside / "made_of.json", {"file": path.name, "sha256": digest})


def _warn_of_memory(path: Path, weights: int) -> None:
    need, free = 4 * weights, available_memory()
    if need > free:
        warn(f"{path.name}: de-quantising takes {need / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} are free")


def _opened(path: Path) -> gguf.GGUFReader:
    """A GGUF file that is whole and a model.

    Raises:
        ModelError: each fault with a message of its own.
    """
    try:
        reader = gguf.GGUFReader(path)
        torn = any(tensor.data_offset + tensor.n_bytes > path.stat().st_size for tensor in reader.tensors)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise ModelError(f"model: {path} is torn, or no GGUF that can be read: {first_line(error)}") from error
    if torn:
        raise ModelError(f"model: {path} is torn: its tensors end behind its end. Fetch it again.")
    kind, architecture = _value(reader, "general.type", "model"), _value(reader, "general.architecture", "none")
    if kind != "model":
        raise ModelError(f"model: {path} is a GGUF of type {kind}, not a model; give the base that it goes with.")
    if int(_value(reader, "split.count", 0)) > 1:
        raise ModelError(
            f"model: {path} is one part of a model that is split into {_value(reader, 'split.count', 0)} files. "
            "Merge them first: llama-gguf-split --merge FIRST_PART whole.gguf"
        )
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"model: {path} holds a model of architecture {architecture}; read are {', '.join(ARCHITECTURES)}. "
            "Take the model's folder in transformers' form instead."
        )
    return reader


def _value(reader: gguf.GGUFReader, key: str, otherwise: Any) -> Any:
    field = reader.get_field(key)
    return otherwise if field is None else field.contents()


def dequantise(
    path: Path, folder: Path, dtype: torch.dtype = torch.float32, reader: gguf.GGUFReader | None = None
) -> None:
    """Writes the model and the tokenizer of a GGUF file as an ordinary folder of transformers.

    reader: of the file, to check the model against; None: it is known to be right

    Raises:
        ModelError: a weight of the model that the file lacks, or the other way round; a scaling that is not known.
    """
    try:
        # Alone in a folder: transformers takes a chat template or a tokenizer that lies beside the file for its own.
        with tempfile.TemporaryDirectory() as alone:
            (Path(alone) / "model.gguf").symlink_to(path.absolute())
            source = {"pretrained_model_name_or_path": alone, "gguf_file": "model.gguf"}
            config = AutoConfig.from_pretrained(**source)
            if reader is not None:
                _put_right(path, config, reader)
            model, loaded = AutoModelForCausalLM.from_pretrained(
                **source, config=config, dtype=dtype, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(**source)
    except (ValueError, KeyError, NotImplementedError, RuntimeError, AttributeError, TypeError) as error:
        raise ModelError(f"model: {path} cannot be de-quantised: {first_line(error)}") from error
    if reader is not None:
        _require_all(path, model, loaded["missing_keys"], reader)
    # What transformers keeps of the GGUF's quantisation would make it expect a quantised file in the new folder.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if reader is not None:  # a family's own class would build its pipeline anew, not take the file's
        about = folder / "tokenizer_config.json"
        write_json(about, {**read_json(about), "tokenizer_class": "PreTrainedTokenizerFast"})


def _require_all(path: Path, model: PreTrainedModel, missing: Sequence[str], reader: gguf.GGUFReader) -> None:
    """Raises ModelError where model and file have not the same weights."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    places = len(set(model.state_dict()) - tied)
    given = sum(tensor.name != _ROPE_FACTORS for tensor in reader.tensors)
    if set(missing) - tied or places != given:
        raise ModelError(
            f"model: {path} has {given} tensors, and a {model.config.model_type} of its sizes has {places}"
            f"{'; it lacks ' + ', '.join(sorted(set(missing) - tied)[:3]) if set(missing) - tied else ''}."
        )


def _put_right(path: Path, config: PretrainedConfig, reader: gguf.GGUFReader) -> None:
    """Gives the configuration what the file says of heads, attention and rotary angles, and transformers left out.

    Raises:
        ModelError: a scaling of the angles that is not known.
    """
    architecture = _value(reader, "general.architecture", "")
    width = _value(reader, f"{architecture}.attention.key_length", None)
    if width is not None:
        config.head_dim = int(width)
    if architecture.startswith("gemma"):
        largest = config.num_hidden_layers == (46 if architecture == "gemma2" else 62)  # as llama.cpp has it
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if largest else config.head_dim
    _put_angles_right(path, config, reader, architecture)


def _put_angles_right(path: Path, config: PretrainedConfig, reader: gguf.GGUFReader, architecture: str) -> None:
    scaling = _value(reader, f"{architecture}.rope.scaling.type", "none")
    factor = float(_value(reader, f"{architecture}.rope.scaling.factor", 1.0))
    theta = config.rope_parameters.get("rope_theta")
    factors = next((tensor.data for tensor in reader.tensors if tensor.name == _ROPE_FACTORS), None)
    if factors is not None:
        config.rope_parameters = _llama3_of(path, config, torch.from_numpy(factors.copy()))
    elif scaling == "yarn":
        length = int(_value(reader, f"{architecture}.rope.scaling.original_context_length", 0))
        config.rope_parameters = {
            "rope_type": "yarn", "rope_theta": theta, "factor": factor, "original_max_position_embeddings": length,
        }  # fmt: skip
    elif scaling == "linear" and theta is None:  # Gemma 3 scales those of its full attention alone
        full = {**config.rope_parameters["full_attention"], "rope_type": "linear", "factor": factor}
        config.rope_parameters = {**config.rope_parameters, "full_attention": full}
    elif scaling == "linear":
        config.rope_parameters = {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    elif scaling not in ("none", ""):
        raise ModelError(f"model: {path} scales its rotary angles by {scaling}, which is not read for this family.")


def _llama3_of(path: Path, config: PretrainedConfig, factors: Tensor) -> dict[str, Any]:
    """The scaling of Llama 3 that gives these factors, (head / 2,)."""
    before = config.rope_parameters
    for scaling in _LLAMA3:
        config.rope_parameters = {**scaling, "rope_theta": before["rope_theta"]}
        if torch.allclose(llama3_factors(config), factors.float(), rtol=1e-3):
            return config.rope_parameters
    raise ModelError(f"model: {path} slows its rotary angles in a way that neither Llama 3.1 nor 3.2 does.")


def llama3_factors(config: PretrainedConfig) -> Tensor:
    """By how much each rotary frequency is slowed, (head / 2,), in Llama 3's scaling."""
    size = int(config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads)
    plain = 1 / config.rope_parameters["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    return plain / llama3_frequencies(config)


# A converted folder


_TEXT_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
_WEIGHTS = "model.safetensors"


def damage(folder: Path, *more: str) -> str:
    """What a converted model's folder lacks, `more` files among it; "" if nothing. It was complete once."""
    parts = [path.name for path in sorted(folder.glob("model-*.safetensors"))] or [_WEIGHTS]
    try:
        stamps = tuple(FileStamp.of(folder / name) for name in (*_TEXT_FILES, *more, *parts))
    except OSError as error:
        return f"{Path(error.filename).name} cannot be read"
    return _damage_of(stamps)


@functools.lru_cache(maxsize=16)
def _damage_of(stamps: tuple[FileStamp, ...]) -> str:
    """As `damage`, of files that are there: they are read once a process, and again where one has changed."""
    for stamp in stamps:
        path = stamp.path
        if path.suffix == ".json" and read_json(path) is None:
            return f"{path.name} cannot be read"
        try:
            # Checks the header against the file's length.
            with safe_open(path, framework="pt") if path.suffix == ".safetensors" else contextlib.nullcontext():
                continue
        except (SafetensorError, OSError) as error:
            return f"{path.name}: {first_line(error)}"
    return ""
