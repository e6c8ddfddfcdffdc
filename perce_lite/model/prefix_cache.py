"""Adapters that wake behind the profile: a prefix runs through the bare base alone, and the rest reads what it left.

`profile_pass: frozen`. The prefix (the profile, and what stands ahead of it) is read once with the adapters off and
without gradients; its keys and values are kept, and only query and response run with the adapter. What attention saves
for the backward is of that short part alone: with the prefix it is joined anew when the backward comes.

The joining is an attention function of transformers' own registry, so it reaches every layer under gradient
checkpointing too, where a cache of transformers' would be thrown away.
"""

import functools
import inspect
import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from perce_lite.data.pairs import Tokens
from perce_lite.errors import ConfigError

KEPT_BYTES = 256 * 2**20
"""Of keys and values that wait for the next row with the same prefix."""

Ids = tuple[int, ...]
"""A prefix (P,)."""

_NOBODY, _PADDING = -2, -1
"""Owners of a place among the keys that no token may look at, and of a token that is padding."""


class PrefixAttention:
    """What stands ahead of a batch (B, T): the keys and values of its prefixes, and who may look at what.

    caches: a row's prefixes in the order of its segments; several in a packed row
    counts: how many tokens each segment has
    position_ids: (B, T), counted from the start of each prefix
    """

    def __init__(
        self, caches: Sequence[Sequence[DynamicCache]], counts: Sequence[Sequence[int]], length: int, device: Any
    ) -> None:
        self._caches = caches
        sizes = [[cache.get_seq_length() for cache in row] for row in caches]
        self._width = max(sum(row) for row in sizes)  # P
        owners, places, own, own_places = [], [], [], []
        for row_sizes, row_counts in zip(sizes, counts, strict=True):
            left, right = self._width - sum(row_sizes), length - sum(row_counts)
            segments = range(len(row_sizes))
            owners.append([_NOBODY] * left + [one for one in segments for _ in range(row_sizes[one])])
            places.append([0] * left + [place for size in row_sizes for place in range(size)])
            own.append([one for one in segments for _ in range(row_counts[one])] + [_PADDING] * right)
            ahead = zip(row_sizes, row_counts, strict=True)
            own_places.append([size + place for size, count in ahead for place in range(count)] + [0] * right)
        whole = {"dtype": torch.long, "device": device}  # P may be 0, and then there is no number to tell it by
        self.position_ids = torch.tensor(own_places, **whole)
        self._owners = torch.tensor(own, **whole)
        self._key_owners = torch.cat([torch.tensor(owners, **whole), self._owners], 1)  # (B, P + T)
        self._key_places = torch.cat([torch.tensor(places, **whole), self.position_ids], 1)
        self._masks: dict[int | None, Tensor] = {}
        self.met: set[int] = set()

    def mask(self, window: int | None) -> Tensor:
        """Whether a token may look at a key, bool (B, 1, T, P + T); `window`: how far back the layer looks at all."""
        if window not in self._masks:
            back = self.position_ids[:, :, None] - self._key_places[:, None, :]
            seen = (self._owners[:, :, None] == self._key_owners[:, None, :]) & (back >= 0)
            self._masks[window] = (seen if window is None else seen & (back < window))[:, None]
        return self._masks[window]

    def joined(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """`key` and `value` (B, heads, T, d) of a layer behind those of the prefixes: (B, heads, P + T, d)."""
        self.met.add(layer)
        kept = [[cache.layers[layer] for cache in row if cache.layers] for row in self._caches]
        keys = [self._padded([one.keys for one in row], key) for row in kept]
        values = [self._padded([one.values for one in row], value) for row in kept]
        return torch.cat([torch.cat(keys), key], 2), torch.cat([torch.cat(values), value], 2)

    def _padded(self, parts: Sequence[Tensor], own: Tensor) -> Tensor:
        """(1, heads, P, d) of a row's prefixes, padded on the left; in dtype and form of the row's `own`."""
        nothing = own.new_empty(1, own.shape[1], 0, own.shape[3])
        whole = torch.cat([nothing, *(one.to(own.dtype) for one in parts)], 2)
        return torch.nn.functional.pad(whole, (0, 0, self._width - whole.shape[2], 0))


class PrefixCache:
    """The prefixes of a data set, as `read` gives them: for several ids what each leaves, (1, heads, P, d) a layer.

    One that several rows share is read alone, so that what it leaves depends on nothing but itself, and kept for the
    next of them while there is room. Those of one row each are read together, a batch at a time, which is cheaper. So
    what is read depends on the batch alone, and not on what came before: a resumed run ends in the same adapter. An
    empty prefix, of a row without a profile, leaves nothing.
    """

    def __init__(self, read: Callable[[Sequence[Ids]], list[DynamicCache]]) -> None:
        self._read = read
        self._numbers: dict[Ids, int] = {}
        self._ids: dict[int, Ids] = {}
        self._rows: Counter[Ids] = Counter()
        self._fresh = itertools.count()
        self._kept: OrderedDict[Ids, DynamicCache] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        """How many prefixes there are rows of."""
        return len(self._ids)

    def features(self, tokens: Tokens, profile_pass: str) -> dict[str, list[int]]:
        """What a forward is given of a row: `input_ids`, `labels` and, with "frozen", the number of its `prefix`.

        An empty prefix has a number too: rows with one and rows without share a batch.
        """
        awake, ids = tokens.after_prefix, tokens.prefix_ids
        features = {"input_ids": awake.ids, "labels": awake.labels}
        if profile_pass == "frozen":
            if ids not in self._numbers:
                number = self._numbers[ids] = next(self._fresh)
                self._ids[number] = ids
            self._rows[ids] += 1
            features["prefix"] = [self._numbers[ids]] * len(awake.ids)
        return features

    def forget(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Rows, as `features` gave them, that will not come again: a fleet has more users than memory."""
        for ids in [self._ids[row["prefix"][0]] for row in rows if "prefix" in row]:
            self._rows[ids] -= 1
            if not self._rows[ids]:
                del self._rows[ids], self._ids[self._numbers.pop(ids)]

    def _of(self, prefixes: Sequence[Ids]) -> dict[Ids, DynamicCache]:
        """What the prefixes of a batch leave."""
        company = [ids for ids in prefixes if ids and self._rows[ids] < 2]
        together = dict(zip(company, self._read(company), strict=True)) if len(company) > 1 else {}
        return {ids: together[ids] if ids in together else self._alone(ids) for ids in prefixes}

    def _alone(self, ids: Ids) -> DynamicCache:
        if ids not in self._kept:
            self._kept[ids] = self._read([ids])[0] if ids else DynamicCache()
            self._bytes += _size(self._kept[ids])
        self._kept.move_to_end(ids)
        found = self._kept[ids]
        while self._bytes > KEPT_BYTES and self._kept:
            self._bytes -= _size(self._kept.popitem(last=False)[1])
        return found

    def ahead(self, numbers: Tensor, position_ids: Tensor | None = None) -> dict[str, Any]:
        """As `before`, of rows that came through `features`.

        numbers: (B, T), of each token's prefix; -1 for padding
        position_ids: (B, T) of packed rows, starting anew at each segment; None: a row is one segment
        """
        rows = numbers.tolist()
        places = [[0]] * len(rows) if position_ids is None else position_ids.tolist()
        segments = [_segments(row, at) for row, at in zip(rows, places, strict=True)]
        named = [[(self._ids[number], count) for number, count in row] for row in segments]
        return self.before(named, numbers.shape[1], numbers.device)

    def before(self, segments: Sequence[Sequence[tuple[Ids, int]]], length: int, device: Any) -> dict[str, Any]:
        """Inputs of a forward of rows (B, `length`): `position_ids` and `ahead`, in the place of an attention mask.

        segments: of each row, the prefix and the tokens of each of its segments
        """
        caches = self._of(list(dict.fromkeys(ids for row in segments for ids, _ in row)))
        made = PrefixAttention(
            [[caches[ids] for ids, _ in row] for row in segments],
            [[count for _, count in row] for row in segments],
            length,
            device,
        )
        return {"position_ids": made.position_ids, "ahead": made}


def _size(cache: DynamicCache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _segments(numbers: Sequence[int], places: Sequence[int]) -> list[tuple[int, int]]:
    """The prefix and the tokens of each segment of a row (T,); one starts wherever `places` is 0, padding has none."""
    starts = [index for index, place in enumerate(places) if place == 0 and numbers[index] != _PADDING]
    ends = [*starts[1:], len(numbers) - numbers.count(_PADDING)]
    return [(numbers[start], end - start) for start, end in zip(starts, ends, strict=True)]


# The attention function


class _Attention(torch.autograd.Function):
    """Attention that saves query, key and value of the awake part alone, and does its sum again in the backward."""

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
        leaves = [one.detach().requires_grad_() for one in ctx.saved_tensors]
        kind, dtype, enabled = ctx.autocast
        with torch.enable_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled):
            out = ctx.attend(*leaves)
        return *torch.autograd.grad(out, leaves, gradients[0]), None


def _attention(
    name: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    ahead: PrefixAttention | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function `name` on (B, heads, T, d), which looks at what is `ahead` too."""
    # Each modelling file has an eager function of its own.
    own = vars(inspect.getmodule(type(module)))["eager_attention_forward"] if name == "eager" else None
    plain: Callable[..., tuple[Tensor, Tensor | None]] = own or ALL_ATTENTION_FUNCTIONS[name]
    if ahead is None:
        return plain(module, query, key, value, attention_mask, **options)
    mask = ahead.mask(options.get("sliding_window"))
    if name == "eager":
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, torch.finfo(query.dtype).min)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = ahead.joined(module.layer_idx, key, value)  # type: ignore[arg-type]
        return plain(module, query, keys, values, mask, **options)[0]

    return _Attention.apply(query, key, value, attend), None


_OURS = {name: f"perce_lite_{name}" for name in ("sdpa", "eager")}

for _name, _own in _OURS.items():
    AttentionInterface.register(_own, functools.partial(_attention, _name))
    AttentionMaskInterface.register(_own, ALL_MASK_ATTENTION_FUNCTIONS[_name])


def enable_prefix_attention(base: PreTrainedModel, prefixes: PrefixCache) -> None:
    """Lets every layer of `base` take an `ahead` of its `prefixes`; without one all is as before.

    Raises:
        ConfigError: an attention that cannot, with the reason.
    """
    config = base.config.get_text_config()
    given = config._attn_implementation
    if given in _OURS.values():
        return
    faults = []
    others = {str(kind) for kind in config.to_dict().get("layer_types") or ()} - {"full_attention", "sliding_attention"}
    if others:
        faults.append(f"profile_pass: frozen needs attention in every layer; this model also has {', '.join(others)}")
    if given not in _OURS:
        faults.append(f"profile_pass: frozen works with attn_implementation sdpa or eager, not {given}")
    if config.to_dict().get("attention_dropout"):
        faults.append(f"profile_pass: frozen needs an attention_dropout of 0, not {config.attention_dropout}")
    if faults:
        raise ConfigError(faults)
    base.set_attn_implementation(_OURS[given])
    met = prefixes.before([[((0,), 1)]], 1, base.device)
    with torch.no_grad():
        base.base_model(input_ids=torch.zeros_like(met["position_ids"]), use_cache=False, **met)
    if met["ahead"].met != set(range(config.num_hidden_layers)):
        base.set_attn_implementation(given)
        raise ConfigError(
            [f"profile_pass: frozen does not reach every layer of {type(base).__name__}, whose attention is its own"]
        )
