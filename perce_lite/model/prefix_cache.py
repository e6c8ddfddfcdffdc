"""KV prefix cache: the base encodes a profile once; only query and response run with the adapter (activated LoRA).

`profile_pass: frozen`. A prefix (the profile, and what stands before it) runs through the base with the adapters off
and without gradients. Its keys and values are cached, and the tokens after it attend to them with the adapter on.

`PrefixCache` holds the prefixes of a data set, `BatchPrefixes` those of one batch with the attention mask that belongs
to them, and `PrefixAttention` is the one place where a sequence meets its prefix.
"""

import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from perce_lite.data.pairs import Tokens
from perce_lite.errors import ConfigError
from perce_lite.model import repeated_heads
from perce_lite.model.compat import (
    attention_function,
    attention_implementation,
    cache_bytes,
    key_values,
    register_attention,
)

MAX_CACHED_BYTES = 256 * 2**20
"""Of keys and values that are kept for the next row with the same prefix."""

Ids = tuple[int, ...]
"""A prefix (P,)."""

_NO_SEGMENT, _PADDING = -2, -1
"""Segment numbers of a padded key, which no token may attend to, and of a padded token."""


class BatchPrefixes:
    """Keys and values of the prefixes of a batch (B, T), and which of them each token may attend to.

    A row has one segment, or several if it is packed; each segment follows a prefix of its own. The keys of a row are
    those of its prefixes, P in all, padded on the left to the longest of the batch, then its own T.

    caches: of each row, the prefix of each segment
    counts: of each row, the tokens of each segment
    position_ids: (B, T), counted from the start of each prefix
    """

    def __init__(
        self, caches: Sequence[Sequence[DynamicCache]], counts: Sequence[Sequence[int]], length: int, device: Any
    ) -> None:
        self._caches = caches
        sizes = [[cache.get_seq_length() for cache in row] for row in caches]
        self._width = max(sum(row) for row in sizes)  # P
        prefixes = [_left_padded(row, self._width) for row in sizes]
        tokens = [_right_padded(*rows, length) for rows in zip(sizes, counts, strict=True)]

        def tensor(rows: Sequence[Sequence[int]]) -> Tensor:
            return torch.tensor(rows, dtype=torch.long, device=device)  # the dtype is stated, since P may be 0

        self.position_ids = tensor([positions for _, positions in tokens])
        self._segments = tensor([segments for segments, _ in tokens])  # (B, T)
        self._key_segments = torch.cat([tensor([segments for segments, _ in prefixes]), self._segments], 1)  # (B, P+T)
        self._key_positions = torch.cat([tensor([positions for _, positions in prefixes]), self.position_ids], 1)
        self._masks: dict[int | None, Tensor] = {}
        self.layers_reached: set[int] = set()

    def mask(self, window: int | None) -> Tensor:
        """Whether a token may attend to a key, bool (B, 1, T, P+T).

        window: how many positions back a sliding layer attends; None: all of them
        """
        if window not in self._masks:
            distance = self.position_ids[:, :, None] - self._key_positions[:, None, :]  # (B, T, P+T)
            allowed = (self._segments[:, :, None] == self._key_segments[:, None, :]) & (distance >= 0)
            self._masks[window] = (allowed if window is None else allowed & (distance < window))[:, None]
        return self._masks[window]

    def joined(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, those of the prefixes first: (B, heads, T, d) to (B, heads, P+T, d)."""
        self.layers_reached.add(layer)
        cached = [[key_values(cache, layer) for cache in row if cache.get_seq_length()] for row in self._caches]
        keys = [self._padded([keys for keys, _ in row], key) for row in cached]
        values = [self._padded([values for _, values in row], value) for row in cached]
        return torch.cat([torch.cat(keys), key], 2), torch.cat([torch.cat(values), value], 2)

    def _padded(self, parts: Sequence[Tensor], own: Tensor) -> Tensor:
        """(1, heads, P, d): a row's prefixes in order, padded on the left, in the dtype of the row's `own`."""
        empty = own.new_empty(1, own.shape[1], 0, own.shape[3])
        joined = torch.cat([empty, *(part.to(own.dtype) for part in parts)], 2)
        return torch.nn.functional.pad(joined, (0, 0, self._width - joined.shape[2], 0))


def _left_padded(sizes: Sequence[int], width: int) -> tuple[list[int], list[int]]:
    """Segment and position of each key of a row's prefixes, padded on the left to `width`."""
    padding = width - sum(sizes)
    segments = [segment for segment, size in enumerate(sizes) for _ in range(size)]
    positions = [position for size in sizes for position in range(size)]
    return [_NO_SEGMENT] * padding + segments, [0] * padding + positions


def _right_padded(sizes: Sequence[int], counts: Sequence[int], length: int) -> tuple[list[int], list[int]]:
    """Segment and position of each token of a row, whose positions follow its prefix, padded to `length`."""
    padding = length - sum(counts)
    segments = [segment for segment, count in enumerate(counts) for _ in range(count)]
    positions = [size + place for size, count in zip(sizes, counts, strict=True) for place in range(count)]
    return segments + [_PADDING] * padding, positions + [0] * padding


class PrefixCache:
    """The prefixes of a data set and their keys and values, (1, heads, P, d) a layer, as `encode` gives them.

    A prefix that several rows share is encoded alone, so that its values depend on nothing but itself, and cached while
    there is room. Prefixes of one row each are encoded together, a batch at a time, which is cheaper. So what is
    encoded depends on the batch alone and not on earlier batches: a resumed run ends in the same adapter. The empty
    prefix of a row without a profile has no keys.
    """

    def __init__(self, encode: Callable[[Sequence[Ids]], list[DynamicCache]]) -> None:
        """encode: gives a cache for each prefix"""
        self._encode = encode
        self._numbers: dict[Ids, int] = {}
        self._ids: dict[int, Ids] = {}
        self._rows: Counter[Ids] = Counter()
        self._next_number = itertools.count()
        self._cached: OrderedDict[Ids, DynamicCache] = OrderedDict()  # the least recently used first
        self._bytes = 0

    def __len__(self) -> int:
        """How many prefixes there are rows of."""
        return len(self._ids)

    def features(self, tokens: Tokens, profile_pass: str) -> dict[str, list[int]]:
        """A row's columns, each (T,): `input_ids`, `labels` and, with "frozen", `prefix`, the number of its prefix.

        An empty prefix has a number too: rows with a prefix and rows without one share a batch.
        """
        own, prefix = tokens.after_prefix, tokens.prefix_ids
        features = {"input_ids": own.ids, "labels": own.labels}
        if profile_pass == "frozen":
            if prefix not in self._numbers:
                number = self._numbers[prefix] = next(self._next_number)
                self._ids[number] = prefix
            self._rows[prefix] += 1
            features["prefix"] = [self._numbers[prefix]] * len(own)
        return features

    def forget(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Drops rows, as `features` gave them, that will not come again: a fleet has more users than memory."""
        for prefix in [self._ids[row["prefix"][0]] for row in rows if "prefix" in row]:
            self._rows[prefix] -= 1
            if not self._rows[prefix]:
                del self._rows[prefix], self._ids[self._numbers.pop(prefix)]

    def inputs_of_tokens(self, numbers: Tensor, position_ids: Tensor | None = None) -> dict[str, Any]:
        """As `inputs_of_segments`, of rows that came through `features`.

        numbers: (B, T), of each token's prefix; -1 for padding
        position_ids: (B, T) of packed rows, starting at 0 in each segment; None: a row is one segment
        """
        rows = numbers.tolist()
        positions = [[0]] * len(rows) if position_ids is None else position_ids.tolist()
        segments = [_segments(row, starts) for row, starts in zip(rows, positions, strict=True)]
        with_ids = [[(self._ids[number], count) for number, count in row] for row in segments]
        return self.inputs_of_segments(with_ids, numbers.shape[1], numbers.device)

    def inputs_of_segments(
        self, segments: Sequence[Sequence[tuple[Ids, int]]], length: int, device: Any
    ) -> dict[str, Any]:
        """Inputs of a forward of rows (B, `length`): `position_ids`, and `batch_prefixes` instead of `attention_mask`.

        segments: of each row, the prefix and the number of tokens of each segment
        """
        caches = self._caches_of(list(dict.fromkeys(prefix for row in segments for prefix, _ in row)))
        prefixes = BatchPrefixes(
            [[caches[prefix] for prefix, _ in row] for row in segments],
            [[count for _, count in row] for row in segments],
            length,
            device,
        )
        return {"position_ids": prefixes.position_ids, "batch_prefixes": prefixes}

    def _caches_of(self, prefixes: Sequence[Ids]) -> dict[Ids, DynamicCache]:
        """Keys and values of the prefixes of a batch."""
        unshared = [prefix for prefix in prefixes if prefix and self._rows[prefix] < 2]
        together = dict(zip(unshared, self._encode(unshared), strict=True)) if len(unshared) > 1 else {}
        return {prefix: together[prefix] if prefix in together else self._cache_of(prefix) for prefix in prefixes}

    def _cache_of(self, prefix: Ids) -> DynamicCache:
        """Keys and values of a prefix, encoded alone and cached while there is room."""
        if prefix not in self._cached:
            self._cached[prefix] = self._encode([prefix])[0] if prefix else DynamicCache()
            self._bytes += cache_bytes(self._cached[prefix])
        self._cached.move_to_end(prefix)
        cache = self._cached[prefix]
        while self._bytes > MAX_CACHED_BYTES and self._cached:
            self._bytes -= cache_bytes(self._cached.popitem(last=False)[1])
        return cache


def _segments(numbers: Sequence[int], positions: Sequence[int]) -> list[tuple[int, int]]:
    """Prefix number and token count of each segment of a row (T,): one starts at each position 0; padding has none."""
    starts = [index for index, place in enumerate(positions) if place == 0 and numbers[index] != _PADDING]
    ends = [*starts[1:], len(numbers) - numbers.count(_PADDING)]
    return [(numbers[start], end - start) for start, end in zip(starts, ends, strict=True)]


class PrefixAttention:
    """Attention of tokens (B, T) to their prefixes and to themselves: the one place where a sequence meets its prefix.

    It is an attention function in transformers' registry, the extension point that transformers documents: no layer and
    no modelling file is patched. The forward gets `batch_prefixes` as a keyword, which transformers hands down to the
    attention function of each layer; without it attention is what it was.

    Why not a cache passed as `past_key_values`, which would be shorter:

    - Under gradient checkpointing transformers drops such a cache, unless every layer carries a private mark.
    - Attention would save the joined keys and values for the backward, P+T positions in each layer, and memory would
      grow with the profile. Here query, key and value of the T own tokens are saved, and they are joined with the
      prefix again in the backward.
    """

    def __init__(self, implementation: str) -> None:
        """implementation: "sdpa" or "eager", transformers' own, or "sdpa" with repeated heads"""
        self.implementation = implementation
        self.name = f"perce_lite_{implementation}"
        register_attention(self.name, implementation, self)

    def __call__(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        batch_prefixes: BatchPrefixes | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The attention of a layer; query, key and value are (B, heads, T, d)."""
        attention = attention_function(self.implementation, module)
        if batch_prefixes is None:
            return attention(module, query, key, value, attention_mask, **options)
        prefixes = batch_prefixes
        mask = prefixes.mask(options.get("sliding_window"))
        if self.implementation == "eager":  # it adds its mask to the scores
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = prefixes.joined(module.layer_idx, key, value)  # type: ignore[arg-type]
            return attention(module, query, keys, values, mask, **options)[0]

        return _Recomputed.apply(query, key, value, attend), None


class _Recomputed(torch.autograd.Function):
    """Saves query, key and value of the own tokens alone, and computes attention again in the backward."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor:
        kind = query.device.type
        ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        ctx.attend = attend
        ctx.save_for_backward(query, key, value)
        return attend(query, key, value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        leaves = [saved.detach().requires_grad_() for saved in ctx.saved_tensors]
        kind, dtype, enabled = ctx.autocast
        with torch.enable_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled):
            out = ctx.attend(*leaves)
        return *torch.autograd.grad(out, leaves, gradients[0]), None


_ATTENTIONS = {
    implementation: PrefixAttention(implementation) for implementation in ("sdpa", "eager", repeated_heads.NAME)
}


def plain_implementation(base: PreTrainedModel) -> str:
    """The attention implementation that `base` was loaded with, prefix attention or not."""
    names = {attention.name: attention.implementation for attention in _ATTENTIONS.values()}
    name = attention_implementation(base)
    name = names.get(name, name)
    return "sdpa" if name == repeated_heads.NAME else name


def enable_prefix_attention(base: PreTrainedModel, prefixes: PrefixCache) -> None:
    """Lets every layer of `base` attend to the `batch_prefixes` of a forward; without them nothing changes.

    Raises:
        ConfigError: every reason why the model's attention cannot.
    """
    implementation = attention_implementation(base)
    if any(attention.name == implementation for attention in _ATTENTIONS.values()):
        return
    faults = _attention_faults(base, implementation)
    if faults:
        raise ConfigError(faults)
    base.set_attn_implementation(_ATTENTIONS[implementation].name)
    if not _every_layer_reached(base, prefixes):
        base.set_attn_implementation(implementation)
        raise ConfigError(
            [f"profile_pass: frozen does not reach every layer of {type(base).__name__}, whose attention is its own"]
        )


def _attention_faults(base: PreTrainedModel, implementation: str) -> list[str]:
    """Why the attention of `base` cannot attend to prefixes, as far as its configuration tells."""
    config = base.config.get_text_config().to_dict()
    faults = []
    if others := layers_without_attention(base):
        faults.append(f"profile_pass: frozen needs attention in every layer; this model also has {', '.join(others)}")
    if implementation not in _ATTENTIONS:
        faults.append(f"profile_pass: frozen works with attn_implementation sdpa or eager, not {implementation}")
    if config.get("attention_dropout"):
        faults.append(f"profile_pass: frozen needs an attention_dropout of 0, not {config['attention_dropout']}")
    return faults


def layers_without_attention(base: PreTrainedModel) -> list[str]:
    """Kinds of layers of `base` that carry a state from token to token, where attention would look at a mask."""
    kinds = base.config.get_text_config().to_dict().get("layer_types") or ()
    return sorted({str(kind) for kind in kinds} - {"full_attention", "sliding_attention", "chunked_attention"})


def _every_layer_reached(base: PreTrainedModel, prefixes: PrefixCache) -> bool:
    """Whether a forward of one token after a prefix of one token meets the prefix in every layer."""
    inputs = prefixes.inputs_of_segments([[((0,), 1)]], 1, base.device)
    with torch.no_grad():
        base.base_model(input_ids=torch.zeros_like(inputs["position_ids"]), use_cache=False, **inputs)
    layers: int = base.config.get_text_config().num_hidden_layers
    return bool(inputs["batch_prefixes"].layers_reached == set(range(layers)))
