"""A tokenizer as GGUF keys: tokens, kinds, merges or scores, and llama.cpp's name for how it splits text."""

import json
from typing import Any

import gguf
from tokenizers import Regex, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split
from transformers import PreTrainedTokenizerBase

from perce_lite.errors import ExportError

_AFTER_DIGITS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PIECES = "pieces"
_PROBE = (
    "She said: I've seen it's 12,345.678 metres, don't WE'LL?\n\n  Yes -- no...\r\n\tfoo_bar(x) = {y[0]}; // "
    "naïve Straße Œuvre camelCase HTTPServer v2.0 100% 7 77 777 7777 € 抹茶 を кот 😀😀   end  \n \n x"
)
"""What a way of splitting is told by: letters of many kinds, digits, signs, runs of spaces and line breaks."""


def add_vocabulary(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Adds the tokenizer's keys, chat template included. rows: those of the embedding, (rows, width).

    Raises:
        ExportError: a kind of tokenizer that llama.cpp has no equal of.
    """
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    name = splitting(tokenizer)
    pieces = name == _PIECES
    tokens, kinds = [f"[PAD{index}]" for index in range(rows)], [gguf.TokenType.UNUSED] * rows
    for token, index in tokenizer.get_vocab().items():
        if index < rows:  # a tokenizer may know tokens that the model was never given, such as Gemma 3's for images
            tokens[index], kinds[index] = token, _kind(token, index, tokenizer, pieces)
    if pieces:
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(_scores(tokens, spec["model"]["merges"]))
        writer.add_add_space_prefix(_puts_space_first(tokenizer))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        writer.add_token_merges([" ".join(_pair(merge)) for merge in spec["model"]["merges"]])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    _add_special(writer, tokenizer)


def _kind(token: str, index: int, tokenizer: PreTrainedTokenizerBase, pieces: bool) -> gguf.TokenType:
    """llama.cpp's kind of a token."""
    added = tokenizer.added_tokens_decoder.get(index)
    if pieces and token == tokenizer.unk_token:
        return gguf.TokenType.UNKNOWN
    if added is not None:
        return gguf.TokenType.CONTROL if added.special else gguf.TokenType.USER_DEFINED
    is_byte = pieces and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return gguf.TokenType.BYTE if is_byte else gguf.TokenType.NORMAL


def _pair(merge: str | list[str]) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def _scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Sentencepiece's scores: the earlier a piece is merged, the higher; what is never merged comes last."""
    rank: dict[str, int] = {}
    for merge in merges:
        rank.setdefault("".join(_pair(merge)), len(rank))
    return [-float(rank.get(token, len(rank))) for token in tokens]


def _puts_space_first(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text is read as if a space stood ahead of it."""
    plain = tokenizer.backend_tokenizer.encode("x", add_special_tokens=False).tokens
    return plain[0].startswith("▁")


def splitting(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name for how a byte-level BPE splits text ahead of its merges.

    Of a BPE of sentencepiece's, which splits nothing, it is "pieces".

    Raises:
        ExportError: none of those that are known, or no BPE.
    """
    backend = tokenizer.backend_tokenizer
    model = json.loads(backend.to_str())["model"]
    if model["type"] != "BPE":
        raise ExportError(
            f"The tokenizer is a {model['type']}; a GGUF is written of BPE alone (byte-level, or sentencepiece's with "
            "byte_fallback)."
        )
    if model.get("byte_fallback"):
        return _PIECES
    others = {}
    for name, rules in _rules().items():
        others[name] = Tokenizer.from_str(backend.to_str())
        others[name].pre_tokenizer = Sequence([*rules, ByteLevel(add_prefix_space=False, use_regex=False)])
    for splitter in (_parts, _ids):  # the same parts, or at least the same tokens
        for name, other in others.items():
            if splitter(other) == splitter(backend):
                return name
    raise ExportError(
        f"The tokenizer splits text in a way that is not known here; known are llama.cpp's {', '.join(_rules())}. "
        "Export --to peft or merged, and convert that with llama.cpp's own converter."
    )


def _parts(tokenizer: Tokenizer) -> list[str]:
    """What the probe is split into ahead of merges."""
    return [part for part, _ in tokenizer.pre_tokenizer.pre_tokenize_str(_PROBE)] if tokenizer.pre_tokenizer else []


def _ids(tokenizer: Tokenizer) -> list[int]:
    return list(tokenizer.encode(_PROBE, add_special_tokens=False).ids)


def _rules() -> dict[str, list[PreTokenizer]]:
    """How llama.cpp splits text, by its name for it."""
    letters = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
    return {
        "llama-bpe": [_split(rf"{letters}|\p{{N}}{{1,3}}|{_AFTER_DIGITS}")],
        "qwen2": [_split(rf"{letters}|\p{{N}}|{_AFTER_DIGITS}")],
        "gpt-2": [_split(_GPT2)],
        "smollm": [Digits(individual_digits=True), _split(_GPT2)],
        "tekken": [_split(_TEKKEN)],
    }


def _split(pattern: str) -> Split:
    return Split(Regex(pattern), "isolated")


def _add_special(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    """The tokens with a role, whether bos is put ahead of a text, and the chat template."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for add, index in (
        (writer.add_bos_token_id, bos),
        (writer.add_eos_token_id, eos),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
    ):
        if index is not None:
            add(index)
    plain = tokenizer("x")["input_ids"]
    writer.add_add_bos_token(bos is not None and plain[0] == bos)
    writer.add_add_eos_token(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
