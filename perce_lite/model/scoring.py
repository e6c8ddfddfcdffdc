"""Log-probs of scored tokens, adapters on or off, in nats: the one place where they are computed."""

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache

from perce_lite.console import progress_bar
from perce_lite.data.pairs import IGNORED, Tokens
from perce_lite.errors import NonFiniteLossError
from perce_lite.files import digest
from perce_lite.model.compat import split_cache, version_of
from perce_lite.model.fingerprint import adapter_fingerprint, fingerprint
from perce_lite.model.float16 import advice
from perce_lite.model.full_gpu import gpu_is_full
from perce_lite.model.fused_head import base_of, scoring_forward, without_needless_mask
from perce_lite.model.logprob_store import Store, entry_key
from perce_lite.model.prefix_cache import PrefixCache, enable_prefix_attention, plain_implementation

SCORING_VERSION = 2
"""Part of a store's key; raise it when the arithmetic in this room changes."""

_SECONDS_BETWEEN_WRITES = 20.0


GPU_TOKENS = 8192
"""Of a padded batch that is scored on a GPU; the head is tiled, so the hidden states decide what fits."""


class ScoringJob(NamedTuple):
    """One sequence to score; `user` names its store file."""

    user: str
    tokens: Tokens


class Scored(NamedTuple):
    """Log-probs of each job in order, (R,) float32 on the CPU; `hits` of them came from the store."""

    log_probs: list[Tensor]
    hits: int


@contextmanager
def no_grad_eval(model: torch.nn.Module, adapters: bool) -> Iterator[None]:
    """Eval mode, no-grad, adapters off unless `adapters`; afterwards every mode and `requires_grad` is as before.

    When `disable_adapter` ends, peft switches gradients on for every active adapter, a frozen one included.
    """
    training = {module: module.training for module in model.modules()}
    requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    off = model.disable_adapter() if isinstance(model, PeftModel) and not adapters else nullcontext()
    try:
        model.eval()
        with torch.no_grad(), off:
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter, required in requires_grad.items():
            parameter.requires_grad_(required)


def autocast_to(device: torch.device, autocast: torch.dtype | None) -> torch.autocast:
    """The context in which every forward of ours runs: autocast to a dtype; None: float32."""
    return torch.autocast(device.type, dtype=autocast, enabled=autocast is not None)


def batch_log_probs(forward: Callable[..., Tensor], inputs: Mapping[str, Any], autocast: torch.dtype | None) -> Tensor:
    """Log-probs (N,) float32 of a batch's scored tokens, by `scoring_forward`. Call it in `no_grad_eval`."""
    with autocast_to(inputs["input_ids"].device, autocast):
        return forward(**inputs, use_cache=False).float()


def padded(sequences: Sequence[Tokens], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """`input_ids`, `labels`, `attention_mask`, each (B, T), padded on the right."""
    length = max(len(tokens) for tokens in sequences)
    padding = [length - len(tokens) for tokens in sequences]
    rows = list(zip(sequences, padding, strict=True))
    return {
        "input_ids": torch.tensor([tokens.ids + [pad_id] * count for tokens, count in rows], device=device),
        "labels": torch.tensor([tokens.labels + [IGNORED] * count for tokens, count in rows], device=device),
        "attention_mask": torch.tensor([[1] * (length - count) + [0] * count for count in padding], device=device),
    }


def encode_prefix(
    model: torch.nn.Module, ids: Sequence[int], autocast: torch.dtype | None, cache: DynamicCache | None = None
) -> DynamicCache:
    """Keys and values (1, heads, P, d) a layer that the base has for `ids` (P,), adapters off, without gradients.

    cache: an empty cache to fill, or one that holds the first ids already
    """
    cache = DynamicCache() if cache is None else cache
    _encode(model, [ids], autocast, cache)
    return cache


def encode_prefixes(
    model: torch.nn.Module, prefixes: Sequence[Sequence[int]], autocast: torch.dtype | None
) -> list[DynamicCache]:
    """As `encode_prefix`, of several in one forward: padded on the right, where no token of theirs attends to."""
    cache, lengths = DynamicCache(), [len(ids) for ids in prefixes]
    _encode(model, [[*ids, *[0] * (max(lengths) - len(ids))] for ids in prefixes], autocast, cache)
    return [cache] if len(prefixes) == 1 else split_cache(cache, lengths)


def _encode(
    model: torch.nn.Module, ids: Sequence[Sequence[int]], autocast: torch.dtype | None, cache: DynamicCache
) -> None:
    """Fills `cache` with the keys and values of the base for `ids` (B, P)."""
    device = next(model.parameters()).device
    with no_grad_eval(model, adapters=False), autocast_to(device, autocast):
        base_of(model).base_model(input_ids=torch.tensor(ids, device=device), past_key_values=cache, use_cache=True)


def prefix_cache_of(model: torch.nn.Module, autocast: torch.dtype | None) -> PrefixCache:
    """Enables prefix attention on `model`; returns an empty prefix cache.

    Raises:
        ConfigError: the model's attention cannot attend to prefixes.
    """
    prefixes = PrefixCache(lambda several: encode_prefixes(model, several, autocast))
    enable_prefix_attention(base_of(model), prefixes)
    return prefixes


def model_inputs(
    sequences: Sequence[Tokens], pad_id: int, device: torch.device, prefixes: PrefixCache | None
) -> dict[str, Any]:
    """Inputs of a forward: of complete sequences (B, T), or with `prefixes` of what follows the prefix of each."""
    if prefixes is None:
        return dict(padded(sequences, pad_id, device))
    following = [tokens.after_prefix for tokens in sequences]
    inputs = padded(following, pad_id, device)
    del inputs["attention_mask"]  # the prefixes bring their own
    segments = [[(tokens.prefix_ids, len(own))] for tokens, own in zip(sequences, following, strict=True)]
    return {**inputs, **prefixes.inputs_of_segments(segments, inputs["input_ids"].shape[1], device)}


def with_prefix(inputs: Mapping[str, Any], numbers: Tensor, prefixes: PrefixCache) -> dict[str, Any]:
    """`inputs` of a forward with the prefixes that its tokens follow.

    numbers: (B, T), of each token's prefix; -1 for padding
    """
    without_mask = {name: tensor for name, tensor in inputs.items() if name != "attention_mask"}
    return {**without_mask, **prefixes.inputs_of_tokens(numbers, without_mask.get("position_ids"))}


def compute_log_probs(
    model: torch.nn.Module,
    sequences: Sequence[Tokens],
    adapters: bool,
    autocast: torch.dtype | None,
    done: Callable[[int, Tensor], None],
    prefixes: PrefixCache | None = None,
) -> None:
    """Scores `sequences` and calls `done(index, log-probs (R,) float32 on the CPU)` for each, in any order.

    On a CPU a row is scored alone, so that its values depend on nothing but itself.

    adapters: on or off; they are off in the prefix of a sequence that has one
    prefixes: needed for such sequences only if the model is not one of peft's
    """
    device = next(model.parameters()).device
    forward = scoring_forward(model)
    if not (adapters and any(tokens.prefix_length for tokens in sequences)):
        prefixes = None
    elif prefixes is None:
        prefixes = prefix_cache_of(model, autocast)

    def score(rows: Sequence[Tokens]) -> Tensor:
        inputs = without_needless_mask(base_of(model), model_inputs(rows, 0, device, prefixes))
        return batch_log_probs(forward, inputs, autocast)

    with no_grad_eval(model, adapters):
        batches = list(_batches(sequences, alone=device.type == "cpu"))
        while batches:
            batch = batches.pop(0)
            flat = _score_if_it_fits(score, [sequences[index] for index in batch])
            if flat is None:
                torch.cuda.empty_cache()
                batches[:0] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
                continue
            counts = [sum(label != IGNORED for label in sequences[index].labels) for index in batch]
            for index, log_probs in zip(batch, flat.split(counts), strict=True):
                done(index, log_probs.clone())


def _score_if_it_fits(score: Callable[[Sequence[Tokens]], Tensor], rows: Sequence[Tokens]) -> Tensor | None:
    """`score(rows)` on the CPU; None if several rows and their prefixes do not fit the GPU's memory together."""
    try:
        return score(rows).cpu()
    except RuntimeError as error:
        if len(rows) == 1 or not gpu_is_full(error):
            raise
        return None


def _batches(sequences: Sequence[Tokens], alone: bool) -> Iterator[list[int]]:
    if alone:
        yield from ([index] for index in range(len(sequences)))
        return
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index].ids))
    while order:
        size = max(1, GPU_TOKENS // len(sequences[order[0]].ids))
        yield order[:size]
        order = order[size:]


def store_key(model: torch.nn.Module, autocast: torch.dtype | None, adapters: bool = False) -> str:
    """The store's folder for a base: a hash of everything that changes a log-prob, whatever row is scored.

    That is its weights and quantisation, compute dtype, device kind, configuration, attention implementation, whether
    float32 products may be less than that (`tf32: true`), and the versions of the libraries that compute.

    adapters: for the base with its adapters on; their weights are then part of the key
    """
    device = next(model.parameters()).device.type
    base = base_of(model)
    config = {name: value for name, value in base.config.to_dict().items() if name not in _NO_ARITHMETIC}
    layers = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    products = (torch.backends.cuda if device == "cuda" else torch.backends.mkldnn).matmul.fp32_precision
    parts = {
        "base": fingerprint(model),
        "autocast": str(autocast),
        "four_bit": sorted({str(layer.compute_dtype) for layer in layers}),
        "device": device,
        "config": config,
        "attention": plain_implementation(base),
        "products": None if products in ("none", "ieee") else products,
        "adapters": adapter_fingerprint(model) if adapters else None,
        "versions": {name: _major_minor(name) for name in _COMPUTING},
        "scoring": SCORING_VERSION,
    }
    return digest(parts)


_COMPUTING = ("torch", "transformers", "trl", "bitsandbytes")


def _major_minor(package: str) -> str:
    return ".".join(version_of(package).split(".")[:2])


_NO_ARITHMETIC = (
    "_name_or_path", "transformers_version", "dtype", "architectures", "use_cache", "quantization_config",
    "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
"""Keys of a config that do not change a log-prob; trainers set some of them."""


def store_of(
    folder: str | None, model: torch.nn.Module, autocast: torch.dtype | None, adapters: bool = False
) -> Store | None:
    """The store in `folder` for the base of `model`, adapters off or on; no folder: None, and nothing is hashed."""
    return None if not folder else Store(Path(folder), store_key(model, autocast, adapters))


def cached_log_probs(
    model: torch.nn.Module,
    jobs: Sequence[ScoringJob],
    store: Store | None,
    autocast: torch.dtype | None,
    what: str,
    adapters: bool = False,
    prefixes: PrefixCache | None = None,
) -> Scored:
    """Log-probs of `jobs`: from `store` if it has them, else one forward each; adapters are off unless `adapters`.

    New values are written to the store every few seconds, so that a killed pass resumes there.

    store: that of `store_key(model, autocast, adapters)`
    what: label of the progress bar
    prefixes: as in `compute_log_probs`

    Raises:
        NonFiniteLossError: a log-prob of the base is not finite; nothing of that row is stored.
    """
    # Without adapters the length of a prefix changes nothing.
    keys = [entry_key(job.tokens.ids, job.tokens.labels, job.tokens.prefix_length if adapters else 0) for job in jobs]
    stored = {user: store.get(user) if store is not None else {} for user in dict.fromkeys(job.user for job in jobs)}
    log_probs: dict[int, Tensor] = {}
    for index, (job, key) in enumerate(zip(jobs, keys, strict=True)):
        if key in stored[job.user]:
            log_probs[index] = stored[job.user][key]
    hits = len(log_probs)
    missing = sorted(set(range(len(jobs))) - set(log_probs), key=lambda index: jobs[index].user)
    with progress_bar() as bar, _Unwritten(store) as unwritten:
        task = bar.add_task(what, total=len(jobs), completed=hits, note="")

        def done(position: int, values: Tensor) -> None:
            index = missing[position]
            log_probs[index] = values
            bar.advance(task)
            if bool(values.isfinite().all()):
                unwritten.add(jobs[index].user, keys[index], values)
            elif not adapters:
                raise _base_not_finite(jobs[index].user, autocast)

        if missing:
            sequences = [jobs[index].tokens for index in missing]
            compute_log_probs(model, sequences, adapters, autocast, done, prefixes)
    return Scored([log_probs[index] for index in range(len(jobs))], hits)


def _base_not_finite(user: str, autocast: torch.dtype | None) -> NonFiniteLossError:
    mend = (
        advice(autocast) or "Look at the row with `perce-lite check`, and at whether the model's files arrived whole."
    )
    return NonFiniteLossError(
        f"A log-prob of the frozen base is not finite, in a row of user {user}, so nothing can be weighted by it. "
        f"Nothing of the row was stored. {mend}"
    )


class _Unwritten:
    """New entries of a store, written every few seconds and when the block ends, also by an error."""

    def __init__(self, store: Store | None) -> None:
        self._store = store
        self._entries: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self._written = time.monotonic()

    def __enter__(self) -> "_Unwritten":
        return self

    def __exit__(self, *error: object) -> None:
        self._write()

    def add(self, user: str, key: str, values: Tensor) -> None:
        self._entries[user][key] = values
        if time.monotonic() - self._written > _SECONDS_BETWEEN_WRITES:
            self._write()

    def _write(self) -> None:
        if self._store is not None:
            for user, entries in self._entries.items():
                self._store.put(user, entries)
        self._entries.clear()
        self._written = time.monotonic()


def runs(labels: Sequence[int]) -> list[int]:
    """Lengths of the runs of scored tokens in `labels`: one a response, R in sum."""
    groups = itertools.groupby(labels, lambda label: label != IGNORED)
    return [len(list(group)) for scored, group in groups if scored]
