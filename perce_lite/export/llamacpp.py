"""A real llama.cpp, in this process: log-probs of given ids under a GGUF model, with an adapter GGUF on it or not."""

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from perce_lite.errors import ExportError

_EXACT = {gguf.GGMLQuantizationType.F32}
_ONE_TOKEN = {"max_tokens": 1, "temperature": 0.0, "logprobs": 1, "cache_prompt": True}
_CERTAIN = 1e4  # a bias of a logit that leaves no other token a chance


INSTALL = "pip install 'perce-lite[export]'"


@dataclass(frozen=True)
class GgufBase:
    """What is known of a GGUF model without running it.

    tokens: the vocabulary's spelling of each id
    embedding: 64 values of the embedding, those of `fingerprint.sketch`
    exact: every weight is float32
    """

    path: Path
    architecture: str
    layers: int
    width: int
    tokens: list[str]
    embedding: list[float]
    exact: bool


def read_base(path: Path) -> GgufBase:
    """Reads the facts of a GGUF model.

    Raises:
        ExportError: there is no such file, or it is no GGUF model.
    """
    if not path.is_file():
        raise ExportError(f"{path}: there is no such file, which should be a GGUF model.")
    try:
        reader = gguf.GGUFReader(path)
        architecture = str(_value(reader, "general.architecture"))
        layers, width = (int(_value(reader, f"{architecture}.{key}")) for key in ("block_count", "embedding_length"))
        tokens = [str(token) for token in _value(reader, "tokenizer.ggml.tokens")]
        [embedding] = [tensor for tensor in reader.tensors if tensor.name == "token_embd.weight"]
    except (ValueError, KeyError, IndexError) as error:
        raise ExportError(f"{path}: no GGUF file of a language model: {error}") from error
    rows = np.linspace(0, int(embedding.shape[1]) - 1, 64).astype(int)
    columns = np.linspace(0, width - 1, 64).astype(int)
    whole = gguf.quants.dequantize(embedding.data[rows], embedding.tensor_type)  # (64, width)
    exact = all(tensor.tensor_type in _EXACT for tensor in reader.tensors)
    return GgufBase(path, architecture, layers, width, tokens, whole[range(64), columns].tolist(), exact)


def _value(reader: gguf.GGUFReader, key: str) -> Any:
    """The value of a key.

    Raises:
        KeyError: the file has no such key.
    """
    field = reader.get_field(key)
    if field is None:
        raise KeyError(key)
    return field.contents()


def installed() -> bool:
    """Whether there is a llama.cpp to ask."""
    return importlib.util.find_spec("xllamacpp") is not None


def need_llamacpp() -> None:
    """Raises ExportError where xllamacpp is not installed."""
    if not installed():
        raise ExportError(f"The proof needs llama.cpp, which is not installed: {INSTALL}")


class Llama:
    """A GGUF model in a running llama.cpp, `lora` on it where one is given.

    context: tokens of the longest prompt and answer

    Raises:
        ExportError: xllamacpp is not installed, or llama.cpp cannot load the files or answer with them.
    """

    def __init__(self, base: GgufBase, lora: Path | None, context: int) -> None:
        need_llamacpp()
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(base.path)
        if lora is not None:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
        params.n_ctx = max(256, context)
        params.n_parallel, params.n_gpu_layers, params.cache_ram_mib = 1, 0, 0
        params.warmup = params.fit_params = False
        params.verbosity = -1
        # Its threads wait by spinning: with one for each core, any other work on the machine holds all of them up.
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = max(1, min(4, (os.cpu_count() or 1) // 2))
        # By default keys and values are kept in half precision.
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self._server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise ExportError(f"llama.cpp cannot load {lora or base.path} on {base.path}: {error}") from error
        self._path, self._lora = base.path, lora

    def log_probs(self, ids: Sequence[int], scored: int, scale: float = 1.0) -> list[float]:
        """Log-probs of the last `scored` tokens of `ids`, in nats, with the adapter at `scale`; NaN where it has none.

        The server's own interface gives no log-probs of a prompt, so each token is asked for behind those ahead of it.
        """
        start = len(ids) - scored
        return [self._next(ids[:at], ids[at], scale) for at in range(start, len(ids))]

    def _next(self, ahead: Sequence[int], wanted: int, scale: float) -> float:
        """Log-prob of `wanted` behind the ids `ahead`.

        The answer is made to be `wanted`: the server tells the log-prob of the token that it chose as the model gave
        it, ahead of any bias, and tells nothing of a token that ends the answer.
        """
        on = {} if self._lora is None else {"lora": [{"id": 0, "scale": scale}]}
        asked = {"prompt": list(ahead), "logit_bias": [[wanted, _CERTAIN]], **on, **_ONE_TOKEN}
        return self._of(wanted, self._server.handle_completions(asked))

    def greedy(self, ids: Sequence[int]) -> int | None:
        """The likeliest token behind `ids`; None where it ends the answer or is no whole character."""
        token = self._said(self._server.handle_completions({"prompt": list(ids), **_ONE_TOKEN}))
        return None if token is None else token[0]

    def chat(self, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any], wanted: int) -> tuple[int, float]:
        """How many ids the file's own chat template makes of `messages`, and the log-prob of `wanted` behind them.

        options: go to the template
        """
        asked = {
            "messages": list(messages),
            "chat_template_kwargs": dict(options),
            "logit_bias": {str(wanted): _CERTAIN},
        }
        answer = self._server.handle_chat_completions({**asked, **_ONE_TOKEN, "logprobs": True})
        log_prob = self._of(wanted, answer)
        return answer["usage"]["prompt_tokens"], log_prob

    def _of(self, wanted: int, answer: Mapping[str, Any]) -> float:
        token = self._said(answer)
        return math.nan if token is None or token[0] != wanted else token[1]

    def _said(self, answer: Mapping[str, Any]) -> tuple[int, float] | None:
        """Id and log-prob of the one token of an answer; None where it says none."""
        if "choices" not in answer:
            raise ExportError(f"llama.cpp cannot answer with {self._path}: {answer}")
        log_probs = answer["choices"][0].get("logprobs")
        if not log_probs or not log_probs["content"]:
            return None
        token = log_probs["content"][0]
        return None if token["logprob"] is None else (token["id"], float(token["logprob"]))
