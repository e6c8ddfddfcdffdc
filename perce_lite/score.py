"""Log-probs of scored tokens, adapters on or off: one autocast, one head, one place."""

import itertools
import time
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from trl.trainer.utils import add_fused_lm_head

from perce_lite.console import progress_bar
from perce_lite.files import digest
from perce_lite.models import fingerprint
from perce_lite.pairs import IGNORED, Tokens
from perce_lite.store import Store, entry_key

SCORING_VERSION = 1
"""Part of a store's key: raise it when the arithmetic below changes."""

_GPU_TOKENS = 8192  # tokens of a padded batch; the head is tiled, so hidden states are what counts
_SECONDS_BETWEEN_WRITES = 20.0


class Job(NamedTuple):
    """One sequence to score under the frozen base; `user` names its store file."""

    user: str
    tokens: Tokens


class Scored(NamedTuple):
    """Log-probs, one (R,) float32 tensor on the CPU a job, in order; `hits` of them came from the store."""

    log_probs: list[Tensor]
    hits: int


@contextmanager
def frozen(model: torch.nn.Module, adapters: bool) -> Iterator[None]:
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


def scoring_forward(model: torch.nn.Module) -> Callable[..., Any]:
    """The model's forward through TRL's fused head in float32, which never builds full logits.

    The model's own forward stays as it was: training keeps the head that TRL gave it.
    """
    base = _base_of(model)
    own = base.__dict__.get("forward")
    add_fused_lm_head(base, cast_lm_head_to_fp32=True)
    scoring = base.__dict__.pop("forward")
    if own is not None:
        base.forward = own
    assert isinstance(scoring, types.MethodType)
    return scoring


def batch_log_probs(forward: Callable[..., Any], inputs: dict[str, Tensor], autocast: torch.dtype | None) -> Tensor:
    """Log-probs (N,) float32 of a batch's scored tokens, row after row. Call it inside `frozen`."""
    device = inputs["input_ids"].device
    with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        out = forward(**inputs, fused_lm_head=True, use_cache=False)
    scored: Tensor = out.log_probs[out.label_mask].float()
    return scored


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


def log_probs(
    model: torch.nn.Module, sequences: Sequence[Tokens], adapters: bool, autocast: torch.dtype | None
) -> Iterator[tuple[int, Tensor]]:
    """Yields (index, log-probs (R,) float32 on the CPU) of each sequence, in the order that suits the device.

    On a CPU a row is scored alone, so that its values depend on nothing but itself.
    """
    device = next(model.parameters()).device
    forward = scoring_forward(model)
    for batch in _batches(sequences, alone=device.type == "cpu"):
        with frozen(model, adapters):
            inputs = padded([sequences[index] for index in batch], 0, device)
            flat = batch_log_probs(forward, inputs, autocast).cpu()
        counts = [sum(label != IGNORED for label in sequences[index].labels) for index in batch]
        yield from zip(batch, (part.clone() for part in flat.split(counts)), strict=True)


def _batches(sequences: Sequence[Tokens], alone: bool) -> Iterator[list[int]]:
    if alone:
        yield from ([index] for index in range(len(sequences)))
        return
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index].ids))
    while order:
        size = max(1, _GPU_TOKENS // len(sequences[order[0]].ids))
        yield order[:size]
        order = order[size:]


def store_key(model: torch.nn.Module, autocast: torch.dtype | None) -> str:
    """The store's folder for a base: its weights, quantisation, compute dtype, device kind and what its config says."""
    device = next(model.parameters()).device.type
    config = {name: value for name, value in _base_of(model).config.to_dict().items() if name not in _NO_ARITHMETIC}
    return digest([fingerprint(model), str(autocast), device, config, SCORING_VERSION])


_NO_ARITHMETIC = (
    "_name_or_path", "transformers_version", "dtype", "architectures", "use_cache", "quantization_config",
    "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip
"""Keys of a config that do not change a log-prob; trainers set some of them."""


def _base_of(model: torch.nn.Module) -> PreTrainedModel:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def under_base(
    model: torch.nn.Module, jobs: Sequence[Job], store: Store | None, autocast: torch.dtype | None, what: str
) -> Scored:
    """Log-probs of `jobs` with the adapters off: from the store where it has them, else one no-grad forward each.

    What is new goes to the store user by user, so that a killed pass goes on where it was.
    """
    found: list[Tensor | None] = [None] * len(jobs)
    hits = 0
    by_user: dict[str, list[int]] = defaultdict(list)
    for index, job in enumerate(jobs):
        by_user[job.user].append(index)
    with progress_bar() as bar:
        task = bar.add_task(what, total=len(jobs), note="")
        for user, indices in by_user.items():
            keys = {index: entry_key(*jobs[index].tokens) for index in indices}
            known = store.get(user) if store is not None else {}
            for index in indices:
                if keys[index] in known:
                    found[index] = known[keys[index]]
                    hits += 1
            bar.update(task, advance=sum(found[index] is not None for index in indices))
            if all(found[index] is not None for index in indices):
                continue
            for entries in _in_portions(
                model, {i: jobs[i].tokens for i in indices if found[i] is None}, autocast, bar, task
            ):
                for index, values in entries.items():
                    found[index] = values
                if store is not None:
                    store.put(user, {keys[index]: values for index, values in entries.items()})
    return Scored([values for values in found if values is not None], hits)


def _in_portions(
    model: torch.nn.Module, todo: dict[int, Tokens], autocast: torch.dtype | None, bar: Any, task: Any
) -> Iterator[dict[int, Tensor]]:
    """Scores `todo` and hands it over every few seconds: what is handed over survives a kill."""
    indices = list(todo)
    portion: dict[int, Tensor] = {}
    since = time.monotonic()
    for position, values in log_probs(model, list(todo.values()), adapters=False, autocast=autocast):
        portion[indices[position]] = values
        bar.advance(task)
        if time.monotonic() - since > _SECONDS_BETWEEN_WRITES:
            yield portion
            portion, since = {}, time.monotonic()
    if portion:
        yield portion


def runs(labels: Sequence[int]) -> list[int]:
    """Lengths of the runs of scored tokens in `labels`: one a response, R in sum."""
    return [len(list(group)) for scored, group in itertools.groupby(labels, lambda one: one != IGNORED) if scored]
