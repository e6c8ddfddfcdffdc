"""An adapter as GGUF, for llama.cpp's `--lora`: names, order of rows, scale, and the proof that it works there."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from peft import PeftModel
from torch import Tensor

from perce_lite.errors import ExportError, ModelError
from perce_lite.export import llamacpp
from perce_lite.export.gguf import model as gguf_model
from perce_lite.export.gguf.common import (
    ARCHITECTURES,
    check_model,
    check_rows,
    check_vocabulary,
    finish,
    heads_of,
    mean_shift,
    permuted,
    read,
)
from perce_lite.export.gguf.proof import NOT_DONE
from perce_lite.export.proof import Proof, base_for, check_not_idle, does_as_recorded, fingerprint, gap
from perce_lite.export.reuse import reused
from perce_lite.files import disk_full_is_clear
from perce_lite.model.builtin import gguf_of
from perce_lite.model.compat import LoraLayer
from perce_lite.recipe import Recipe

FILE = "adapter.gguf"


def write(path: Path, model: PeftModel, invocation: Sequence[int]) -> tuple[dict[str, str], dict[str, int]]:
    """Writes the adapter of `model` in float32; gives fingerprints in PyTorch's order of rows, and `Proof.heads`.

    invocation: ids at whose last occurrence in a prompt the adapter wakes, the first included; empty: it always is

    Raises:
        ExportError: LoRA on a layer that llama.cpp has no name for.
    """
    config = model.get_base_model().config.get_text_config()
    architecture = ARCHITECTURES[config.model_type]
    heads = heads_of(config)
    alpha = float(model.peft_config[model.active_adapter].lora_alpha)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if invocation:
        kinds = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32  # llama.cpp takes no other
        looked_for = list(invocation)[1:]  # it wakes one token ahead
        writer.add_key_value(gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, looked_for, *kinds)
    prints = {}
    for name, tensor in _tensors(model, architecture, config.num_hidden_layers, alpha):
        prints[name] = fingerprint(tensor)
        writer.add_tensor(name, permuted(name, tensor, heads).numpy())
    finish(writer)
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


# The proof


def verify(folder: Path, proof: Proof, base: Path | None) -> dict[str, Any]:
    """Reads the adapter back, and has a llama.cpp run it: tightly on a float32 base, loosely on another.

    base: the base as GGUF; None: the file that the base was made of, where there is one. Unless it is float32, the
    base's own weights are written as a float32 GGUF into a temporary folder.

    Raises:
        ExportError: whatever is wrong, each fault with a message of its own.
    """
    tensors = read(folder / FILE)
    check_not_idle(tensors.items(), folder)
    check_rows(tensors, proof, folder / FILE)
    if base is None and not llamacpp.installed():
        return {"off_adapter": None, "off_base": None, "not_done": NOT_DONE}
    given = base is not None
    if base is None:
        base = gguf_of(proof.model)
    loose: dict[str, Any] = {}
    if base is not None:
        known = llamacpp.read_base(base)
        on_it = _run_on(known, proof, folder, given)
        if known.exact:
            return on_it
        loose = {**on_it, "base_gguf": str(base)}
    try:
        with _own_base(proof) as path:
            return {**_run_on(llamacpp.read_base(path), proof, folder, given), **loose}
    except ModelError as error:
        if given:
            return {**loose, "off_adapter": None}
        raise ExportError(
            f"{folder}: its base cannot be loaded, so nothing is proven: {error} Or give it with --base-gguf."
        ) from error


def _run_on(known: llamacpp.GgufBase, proof: Proof, folder: Path, given: bool) -> dict[str, Any]:
    """The adapter on one base; raises ExportError as `verify`."""
    check_vocabulary(known, proof)
    check_model(known, proof)
    llama = llamacpp.Llama(known, folder / FILE, 2 * len(proof.ids))
    on, off = (llama.log_probs(proof.ids, len(proof.adapter), scale) for scale in (1.0, 0.0))
    if not known.exact:
        return _loosely(proof, on, off, folder, given)
    bare = gap(off, proof.base)
    if bare > proof.tolerance:
        raise ExportError(
            f"{known.path}: another base: alone it is {bare:.4f} nats off the one that this adapter is for; "
            f"{proof.tolerance:.4f} are allowed."
        )
    off_adapter = does_as_recorded(proof, on, str(folder / FILE))
    return {"off_adapter": off_adapter, "off_base": bare}


@contextmanager
def _own_base(proof: Proof) -> Iterator[Path]:
    """The base's own weights as a float32 GGUF in a temporary folder, shared inside `reuse.kept`.

    Raises:
        ModelError: they are not at hand; DiskFullError: no space left.
    """
    recipe = Recipe.model_validate(
        {"model": proof.model, "quantization": "none", "dtype": "float32", "device": "cpu", "data": {"path": "none"}}
    )

    @contextmanager
    def made() -> Iterator[Path]:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "base-f32.gguf"
            with base_for(recipe) as base, disk_full_is_clear(path):
                gguf_model.write(path, base.model, base.tokenizer)
            yield path

    with reused(f"{proof.model} gguf", made) as path:
        yield path


def _loosely(proof: Proof, on: list[float], off: list[float], folder: Path, given: bool) -> dict[str, Any]:
    """On a base of rounded weights: the adapter has to move log-probs as it does on the whole one, by and large.

    given: the base was asked for; one that was found by itself may be too coarse to tell a small adapter from rounding

    Raises:
        ExportError: it moves them elsewhere by half as much as it should move them, on average.
    """
    moved = np.array(on) - np.array(off)
    meant = np.array(proof.adapter) - np.array(proof.base)
    off_by, effect = float(np.abs(moved - meant).mean()), mean_shift(proof)
    rounding = float(np.abs(np.array(off) - np.array(proof.base)).mean())
    if not given and rounding > effect / 2:
        return {"off_shift": off_by, "mean_shift": effect, "rounding": rounding}
    if float(np.abs(moved).max()) < 0.05 * float(np.abs(meant).max()):
        raise ExportError(
            f"{folder / FILE}: it loads and does nothing: a fixed text has the log-probs of the bare base."
        )
    if not off_by <= effect / 2:
        raise ExportError(
            f"{folder / FILE}: on a quantised base it moves the log-probs of a fixed text {off_by:.3f} nats a token "
            f"elsewhere than in training, where it moved them by {effect:.3f}; half of that is allowed."
        )
    return {"off_shift": off_by, "mean_shift": effect}
