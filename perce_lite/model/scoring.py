"""Log-probs of scored tokens, adapters on or off: one autocast, one head, one place."""

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
from perce_lite.files import digest
from perce_lite.model.fingerprint import adapter_fingerprint, fingerprint
from perce_lite.model.fused_head import base_of, scoring_forward
from perce_lite.model.logprob_store import Store, entry_key
from perce_lite.model.prefix_cache import PrefixCache, enable_prefix_attention

SCORING_VERSION = 1
"""Part of a store's key: raise it when the arithmetic below changes."""

_GPU_TOKENS = 8192  # tokens of a padded batch; the head is tiled, so hidden states are what counts
_SECONDS_BETWEEN_WRITES = 20.0


class ScoringJob(NamedTuple):
    """One sequence to score; `user` names its store file."""

    user: str
    tokens: Tokens


class Scored(NamedTuple):
    """Log-probs, one (R,) float32 tensor on the CPU a job, in order; `hits` of them came from the store."""

    log_probs: list[Tensor]
    hits: int


@contextmanager
def no_grad_eval(model: torch.nn.Module, adapters: bool) -> Iterator[None]:
    """Eval mode, no-grad, adapters off unless `adapters`; afterwards every mode and `requires_grad` is as before.

    peft switches gradients on for every active adapter when `disable_adapter` ends, a frozen one included.
    """
    training = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    off = model.disable_adapter() if isinstance(model, PeftModel) and not adapters else nullcontext()
    try:
        model.eval()
        with torch.no_grad(), off:
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter, mode in wanted.items():
            parameter.requires_grad_(mode)


def autocast_to(device: torch.device, autocast: torch.dtype | None) -> torch.autocast:
    """The context in which every forward of ours runs: autocast to a dtype, or None for float32."""
    return torch.autocast(device.type, dtype=autocast, enabled=autocast is not None)


def batch_log_probs(forward: Callable[..., Tensor], inputs: Mapping[str, Any], autocast: torch.dtype | None) -> Tensor:
    """Log-probs (N,) float32 of a batch's scored tokens, by `scoring_forward`. Call it in `no_grad_eval`."""
    with autocast_to(inputs["input_ids"].device, autocast):
        return forward(**inputs, use_cache=False).float()


def padded(sequences: Sequence[Tokens], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """`input_ids`, `labels`, `attention_mask`, each (B, T), padded on the right."""
    length = max(len(one.ids) for one in sequences)
    ids = [one.ids + [pad_id] * (length - len(one.ids)) for one in sequences]
    labels = [one.labels + [IGNORED] * (length - len(one.ids)) for one in sequences]
    mask = [[1] * len(one.ids) + [0] * (length - len(one.ids)) for one in sequences]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "labels": torch.tensor(labels, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def encode_prefix(
    model: torch.nn.Module, ids: Sequence[int], autocast: torch.dtype | None, cache: DynamicCache | None = None
) -> DynamicCache:
    """Keys and values (1, heads, P, d) a layer that the bare base has for `ids`, read without gradients.

    cache: an empty one to fill
    """
    cache = DynamicCache() if cache is None else cache
    _read(model, [ids], autocast, cache)
    return cache


def encode_prefixes(
    model: torch.nn.Module, prefixes: Sequence[Sequence[int]], autocast: torch.dtype | None
) -> list[DynamicCache]:
    """As `encode_prefix`, of several in one forward: they are padded behind their ends, where none of them looks."""
    whole, length = DynamicCache(), max(map(len, prefixes))
    _read(model, [[*ids, *[0] * (length - len(ids))] for ids in prefixes], autocast, whole)
    if len(prefixes) == 1:
        return [whole]
    found = [DynamicCache() for _ in prefixes]
    for number in range(len(whole.layers)):
        layer = whole.layers.pop(0)  # so that never two copies of all layers are there
        for row, (ids, cache) in enumerate(zip(prefixes, found, strict=True)):
            mine = slice(row, row + 1), slice(None), slice(len(ids))
            cache.update(layer.keys[mine], layer.values[mine], number)
    return found


def _read(
    model: torch.nn.Module, ids: Sequence[Sequence[int]], autocast: torch.dtype | None, cache: DynamicCache
) -> None:
    """Fills `cache` with what the bare base has for `ids` (B, P)."""
    device = next(model.parameters()).device
    with no_grad_eval(model, adapters=False), autocast_to(device, autocast):
        base_of(model).base_model(input_ids=torch.tensor(ids, device=device), past_key_values=cache, use_cache=True)


def prefix_cache_of(model: torch.nn.Module, autocast: torch.dtype | None) -> PrefixCache:
    """The prefixes of `model`, none read yet; from now on its layers can look at what stands ahead of a batch.

    Raises:
        ConfigError: its attention cannot.
    """
    prefixes = PrefixCache(lambda several: encode_prefixes(model, several, autocast))
    enable_prefix_attention(base_of(model), prefixes)
    return prefixes


def model_inputs(
    sequences: Sequence[Tokens], pad_id: int, device: torch.device, prefixes: PrefixCache | None
) -> dict[str, Any]:
    """Inputs of a forward: of the whole sequences (B, T), or with `prefixes` of what follows each one's prefix."""
    if prefixes is None:
        return dict(padded(sequences, pad_id, device))
    awake = [one.after_prefix for one in sequences]
    inputs = padded(awake, pad_id, device)
    del inputs["attention_mask"]  # what is ahead has its own
    segments = [[(whole.prefix_ids, len(rest.ids))] for whole, rest in zip(sequences, awake, strict=True)]
    return {**inputs, **prefixes.before(segments, inputs["input_ids"].shape[1], device)}


def with_prefix(inputs: Mapping[str, Any], numbers: Tensor, prefixes: PrefixCache) -> dict[str, Any]:
    """`inputs` of a forward of what follows the prefixes, whose `numbers` (B, T) name each token's; -1 is padding."""
    rest = {name: given for name, given in inputs.items() if name != "attention_mask"}
    return {**rest, **prefixes.ahead(numbers, rest.get("position_ids"))}


def compute_log_probs(
    model: torch.nn.Module,
    sequences: Sequence[Tokens],
    adapters: bool,
    autocast: torch.dtype | None,
    done: Callable[[int, Tensor], None],
    prefixes: PrefixCache | None = None,
) -> None:
    """Calls `done(index, log-probs (R,) float32 on the CPU)` for each sequence, in the order that suits the device.

    On a CPU a row is scored alone, so that its values depend on nothing but itself. An adapter sleeps through the
    prefix of a sequence that has one: through those of `prefixes`, where the model is not one of peft's.
    """
    device = next(model.parameters()).device
    forward = scoring_forward(model)
    if not (adapters and any(one.prefix_length for one in sequences)):
        prefixes = None
    elif prefixes is None:
        prefixes = prefix_cache_of(model, autocast)

    def scored(rows: Sequence[Tokens]) -> Tensor:
        return batch_log_probs(forward, model_inputs(rows, 0, device, prefixes), autocast)

    with no_grad_eval(model, adapters):
        todo = list(_batches(sequences, alone=device.type == "cpu"))
        while todo:
            batch = todo.pop(0)
            flat = _where_it_fits(scored, [sequences[index] for index in batch])
            if flat is None:
                torch.cuda.empty_cache()
                todo[:0] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
                continue
            counts = [sum(label != IGNORED for label in sequences[index].labels) for index in batch]
            for index, values in zip(batch, flat.split(counts), strict=True):
                done(index, values.clone())


def _where_it_fits(scored: Callable[[Sequence[Tokens]], Tensor], rows: Sequence[Tokens]) -> Tensor | None:
    """What `scored` gives, on the CPU, or None where several rows and their prefixes do not fit the card's memory."""
    try:
        return scored(rows).cpu()
    except torch.OutOfMemoryError:
        if len(rows) == 1:
            raise
        return None


def _batches(sequences: Sequence[Tokens], alone: bool) -> Iterator[list[int]]:
    if alone:
        yield from ([index] for index in range(len(sequences)))
        return
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index].ids))
    while order:
        size = max(1, _GPU_TOKENS // len(sequences[order[0]].ids))
        yield order[:size]
        order = order[size:]


def store_key(model: torch.nn.Module, autocast: torch.dtype | None, adapters: bool = False) -> str:
    """The store's folder for a base: its weights, quantisation, compute dtype, device kind and what its config says.

    Float32 products that are allowed to be less than that (`tf32: true`) count as well.
    adapters: for the base with its adapters on; what they weigh is then part of the key.
    """
    device = next(model.parameters()).device.type
    config = {name: value for name, value in base_of(model).config.to_dict().items() if name not in _NO_ARITHMETIC}
    four_bit = sorted({str(one.compute_dtype) for one in model.modules() if isinstance(one, bnb.nn.Linear4bit)})
    products = (torch.backends.cuda if device == "cuda" else torch.backends.mkldnn).matmul.fp32_precision
    more = [] if products in ("none", "ieee") else [products]
    more += [adapter_fingerprint(model)] if adapters else []
    return digest([fingerprint(model), str(autocast), four_bit, device, config, SCORING_VERSION, *more])


def store_of(
    folder: str | None, model: torch.nn.Module, autocast: torch.dtype | None, adapters: bool = False
) -> Store | None:
    """The store in `folder` for the base of `model`, or for it with its adapters on.

    None where there is no folder, and then nothing is hashed.
    """
    return None if not folder else Store(Path(folder), store_key(model, autocast, adapters))


_NO_ARITHMETIC = (
    "_name_or_path", "transformers_version", "dtype", "architectures", "use_cache", "quantization_config",
    "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
"""Keys of a config that do not change a log-prob; trainers set some of them."""


def cached_log_probs(
    model: torch.nn.Module,
    jobs: Sequence[ScoringJob],
    store: Store | None,
    autocast: torch.dtype | None,
    what: str,
    adapters: bool = False,
    prefixes: PrefixCache | None = None,
) -> Scored:
    """Log-probs of `jobs`, the adapters off unless `adapters`: from `store` where it has them, else one forward each.

    `store` is of `store_key(model, autocast, adapters)`; `what` names the progress bar; `prefixes` as in
    `compute_log_probs`. What is new goes to the store every few seconds, so that a killed pass resumes there.
    """
    # Without adapters it is all one where a prefix ends.
    keys = [
        entry_key(one.ids, one.labels, one.prefix_length if adapters else 0) for one in (job.tokens for job in jobs)
    ]
    known = {user: store.get(user) if store is not None else {} for user in dict.fromkeys(job.user for job in jobs)}
    cached = [known[job.user].get(key) for job, key in zip(jobs, keys, strict=True)]
    found = {index: values for index, values in enumerate(cached) if values is not None}
    hits = len(found)
    fresh: dict[str, dict[str, Tensor]] = defaultdict(dict)
    todo = sorted(set(range(len(jobs))) - set(found), key=lambda index: jobs[index].user)
    written = time.monotonic()

    def keep() -> None:
        nonlocal written
        if store is not None:
            for user, entries in fresh.items():
                store.put(user, entries)
        fresh.clear()
        written = time.monotonic()

    with progress_bar() as bar:
        task = bar.add_task(what, total=len(jobs), completed=hits, note="")

        def done(position: int, values: Tensor) -> None:
            index = todo[position]
            found[index] = fresh[jobs[index].user][keys[index]] = values
            bar.advance(task)
            if time.monotonic() - written > _SECONDS_BETWEEN_WRITES:
                keep()

        try:
            if todo:
                compute_log_probs(model, [jobs[index].tokens for index in todo], adapters, autocast, done, prefixes)
        finally:
            keep()
    return Scored([found[index] for index in range(len(jobs))], hits)


def runs(labels: Sequence[int]) -> list[int]:
    """Lengths of the runs of scored tokens in `labels`: one a response, R in sum."""
    return [len(list(group)) for scored, group in itertools.groupby(labels, lambda one: one != IGNORED) if scored]
