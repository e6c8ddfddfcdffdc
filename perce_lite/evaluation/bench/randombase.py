"""A base of a given shape with random weights, made layer by layer where it computes: nothing is downloaded or loaded.

Time and memory of a training do not depend on what the weights say, so an 8B model can be measured on any machine.
"""

import string
from pathlib import Path

import bitsandbytes as bnb
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedTokenizerFast

from perce_lite.errors import BenchError
from perce_lite.evaluation.bench.arms import SHAPES, require_shape
from perce_lite.evaluation.bench.exactrows import CHAT_TEMPLATE
from perce_lite.model.base import Base
from perce_lite.model.compat import Bnb4BitHfQuantizer, initialise, keep_base_constant
from perce_lite.planning.shapes import known_config

TOY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
"""A llama small enough for any CPU."""


def config_of_shape(shape: str) -> PretrainedConfig:
    """The configuration of a name in `SHAPES`, or of a folder with a config.json.

    Raises:
        BenchError: neither.
    """
    if shape == "toy":
        return AutoConfig.for_model("llama", **TOY)
    known = known_config("Llama-3.1-8B") if shape in SHAPES else None
    if known is not None:
        return known
    require_shape(shape)
    try:
        return AutoConfig.from_pretrained(shape)
    except (OSError, ValueError, KeyError) as error:
        raise BenchError(f"--shape: {shape}: its config.json cannot be used: {error}") from error


def elements(config: PretrainedConfig) -> int:
    """How many weights a model of this shape has; none is made."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def random_base(
    config: PretrainedConfig, dtype: torch.dtype, device: torch.device, seed: int = 0, quantized: bool = True
) -> Base:
    """A base in NF4 with double quantisation, its other weights in `dtype`, frozen, in eval mode, and a tokenizer.

    quantized: else all of its weights are in `dtype`

    Never is more than one weight whole, and all of it on `device`: host memory stays small.
    """
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    quantizer = Bnb4BitHfQuantizer(quantization, pre_quantized=False)
    if quantized:
        quantizer.preprocess_model(model, device_map={"": device.type})
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                _fill(module, dtype, device)
            elif any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(False)):
                module.to_empty(device=device, recurse=False)
                initialise(model, module)
        model.tie_weights()
    if quantized:
        quantizer.postprocess_model(model)
        model.hf_quantizer, model.config.quantization_config = quantizer, quantization
    keep_base_constant(model)
    return Base(model.eval().requires_grad_(False), byte_tokenizer())


def _fill(layer: bnb.nn.Linear4bit, dtype: torch.dtype, device: torch.device) -> None:
    """Random 4-bit weights (and no bias) of a layer that lies on the meta device."""
    whole = torch.empty(layer.weight.shape, dtype=dtype, device=device).normal_(std=0.02)
    layer.weight = bnb.nn.Params4bit(
        whole, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
    ).to(device)
    if layer.bias is not None:
        layer.bias = torch.nn.Parameter(torch.zeros(layer.bias.shape, dtype=dtype, device=device), requires_grad=False)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, in which a space belongs to the small letter behind it and a turn is a line.

    A word has as many tokens as letters. The ids are small; the head is as wide as ever.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    starts = [("Ġ", letter) for letter in string.ascii_lowercase]  # Ġ: a space, in byte-level BPE
    vocabulary = {token: number for number, token in enumerate(["<end>", *alphabet, *map("".join, starts)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=starts))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    made.chat_template = CHAT_TEMPLATE
    return made


def write_shape(config: PretrainedConfig, folder: Path) -> None:
    """Configuration and tokenizer as a model's folder has them, without weights."""
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
