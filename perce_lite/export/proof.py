"""What an adapter does to a fixed text, written beside an export, and the proof that the export does the same.

The arithmetic of a proof is float32 on a CPU, wherever the adapter was trained: only then does a narrow tolerance hold
on every machine.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from peft import PeftModel
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from perce_lite.data.chat_template import Chat
from perce_lite.data.pairs import IGNORED, PairMaker, Tokens
from perce_lite.errors import ExportError
from perce_lite.export.reuse import reused
from perce_lite.export_targets import PROOF, written_proof
from perce_lite.model import adapters
from perce_lite.model.base import Base, load_base
from perce_lite.model.fingerprint import hash_tensor, sketch
from perce_lite.model.scoring import compute_log_probs
from perce_lite.recipe import Recipe, Template

QUESTION = "Write a short note about the first snow of the winter."
ANSWER = (
    "The first snow came over night. In the morning the garden was white and quiet, the old lamp at the gate wore a "
    "cap, and nobody wanted to be the first to walk across it."
)
"""The fixed text. It is nobody's: an export carries no text of a user beside it, unless `--user` asks for it."""

TIGHT = 1e-3
"""Nats: float32 against float32, summed in another order."""

ROUNDED = 0.1
"""Nats: weights written as F16, in another program; the most that a proof allows."""

OTHER_PROGRAM = 1e-2
"""Nats: float32 in another program, with its own approximations of exp and of the rotary angles."""

_SCORED = 32  # tokens of the answer; llama.cpp is asked token by token
_ANSWERED = 12  # tokens of the greedy answer
_MEASURABLE = 1e-4  # nats: less than this is the noise of float32


class Sketch(BaseModel):
    """What `sketch` gives: a model's type, layers, width, vocabulary and tied head; values of embedding and layers."""

    model_config = ConfigDict(extra="forbid")

    shape: tuple[str, int, int, int, bool]
    embedding: list[float] = Field(min_length=64, max_length=64)
    layers: list[float] = []
    numbers: str = ""


class Proof(BaseModel):
    """What `proof.json` says. Log-probs are nats, one for each of the last tokens of `ids`, in order.

    adapter: log-probs with the adapter on; base: with it off
    tolerance: nats by which a log-prob of the export may differ; at most a quarter of what the adapter changes
    pieces: the vocabulary's own spelling of `ids`
    sketch: of the base, or of the merged model (`fingerprint.sketch`)
    fingerprints: of the export's tensors, in PyTorch's order of rows
    heads: GGUF: heads by the kind of tensor whose rows llama.cpp wants permuted
    quant: GGUF: what the matrices were written as
    messages: the question as the chat template is given it
    greedy: the first tokens of the greedy answer, as long as each leads clearly
    rendered, stops: ollama: the prompts that its template has to make of fixed dialogues, and what ends an answer
    source: hash of the weights that were exported
    profile: text of the profile that the export carries
    prefix: how many of `ids` the adapter sleeps through; invocation: the ids at which it wakes
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    version: Literal[1] = 1
    target: str
    model: str
    quantization: str
    question: str = QUESTION
    answer: str = ANSWER
    template: Template
    ids: list[int]
    pieces: list[str]
    adapter: list[float]
    base: list[float]
    tolerance: float = Field(gt=0, le=ROUNDED)
    sketch: Sketch
    fingerprints: dict[str, str] = {}
    heads: dict[str, int] = {}
    quant: str = ""
    messages: list[dict[str, str]] = []
    greedy: list[int] = []
    rendered: list[str] = []
    stops: list[str] = []
    source: str = ""
    profile: str = ""
    prefix: int = 0
    invocation: list[int] = []


def read_proof(folder: Path) -> Proof:
    """The proof beside an export.

    Raises:
        ExportError: there is none, or it is torn or of another version.
    """
    fields = written_proof(folder)
    try:
        proof = Proof.model_validate(fields)
    except ValidationError as error:
        faults = ", ".join(sorted({".".join(map(str, fault["loc"])) for fault in error.errors()}))
        raise ExportError(f"{folder / PROOF}: damaged, or of another version of PerCE Lite: {faults}") from error
    if not 0 < len(proof.adapter) == len(proof.base) < len(proof.ids):
        raise ExportError(f"{folder / PROOF}: damaged: log-probs and ids do not go together")
    return proof


def on_cpu(metadata: Mapping[str, Any], quantised: bool) -> Recipe:
    """The recipe in an adapter's metadata for a proof: float32 on the CPU; the 4-bit base only where `quantised`."""
    recipe: Recipe = Recipe.model_validate(metadata["recipe"]).model_copy(deep=True)
    recipe.train.pop("chat_template_path", None)  # the metadata hold what the file said
    kept = recipe.quantization if quantised else "none"
    plain = {"device": "cpu", "dtype": "float32", "embedding_on_host": False}
    return recipe.model_copy(update={**plain, "quantization": kept})


@contextmanager
def base_for(recipe: Recipe) -> Iterator[Base]:
    """The recipe's base for a while, shared inside `reuse.kept`; what was put on it is taken off again.

    Raises:
        ModelError: as `load_base`.
    """
    key = f"{recipe.model} {recipe.quantization}"
    with reused(key, lambda: nullcontext(load_base(recipe))) as base:
        try:
            yield base
        finally:
            adapters.strip(base.model)


def record(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    recipe: Recipe,
    target: str,
    allowed: float,
    profile: str = "",
) -> Proof:
    """What `model` does to the fixed text with the adapter on and off, through the forward that training scores with.

    allowed: nats by which the export may differ, if the adapter changes enough for that
    profile: what the export carries, in the prompt of the fixed text

    Raises:
        ExportError: the adapter changes nothing that can be measured.
    """
    ids = fixed_ids(tokenizer, recipe.template, profile)
    maker = PairMaker.of(recipe, tokenizer, None)
    question = [{"role": "user", "content": QUESTION}]
    prefix = maker.prompt(question, profile).prefix_length
    adapter, base = (expected(model, ids, adapters=on, prefix=prefix) for on in (True, False))
    effect = gap(adapter, base)
    if effect < _MEASURABLE:
        raise ExportError(
            f"This adapter does nothing: with it and without it the log-probs of a fixed text differ by {effect:.0e} "
            "nats at the most. Train it for longer or with a higher rate."
        )
    return Proof(
        target=target,
        model=recipe.model,
        quantization=recipe.quantization,
        template=recipe.template,
        ids=ids,
        pieces=tokenizer.convert_ids_to_tokens(ids),
        adapter=adapter,
        base=base,
        tolerance=min(allowed, effect / 4),
        sketch=sketched(model.get_base_model()),
        profile=profile,
        messages=maker.composed(question, profile),
        prefix=prefix,
        invocation=maker.invocation_ids() if prefix else [],
    )


def sketched(model: PreTrainedModel) -> Sketch:
    """`fingerprint.sketch` of `model`."""
    return Sketch.model_validate(sketch(model))


def fixed_ids(tokenizer: PreTrainedTokenizerBase, template: Template, profile: str) -> list[int]:
    """Ids (T,) of the fixed text: profile and question in the chat template, and the beginning of the answer."""
    chat = Chat(tokenizer, template)
    return chat.prompt_ids([{"role": "user", "content": QUESTION}], profile) + chat.ids(ANSWER)[:_SCORED]


def clear_answer(model: nn.Module, prompt: Sequence[int], tokenizer: PreTrainedTokenizerBase, lead: float) -> list[int]:
    """The greedy answer's first tokens, up to one that is no whole text or leads the next by less than `lead` nats."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + _ANSWERED:
            best = model(input_ids=torch.tensor([ids])).logits[0, -1].float().topk(2)  # logits differ as log-probs do
            token = int(best.indices[0])
            whole = token not in special and "\ufffd" not in tokenizer.decode([token])
            if best.values[0] - best.values[1] < lead or not whole:
                break
            ids.append(token)
    return ids[len(prompt) :]


def expected(model: nn.Module, ids: Sequence[int], adapters: bool, prefix: int = 0) -> list[float]:
    """Log-probs of the last tokens of `ids` as training scores them; an adapter sleeps through the `prefix`."""
    scored = min(_SCORED, len(ids) - 1)
    labels = [IGNORED] * (len(ids) - scored) + list(ids[-scored:])
    log_probs: list[float] = []
    compute_log_probs(
        model, [Tokens(list(ids), labels, prefix)], adapters, None, lambda _, values: log_probs.extend(values.tolist())
    )
    return log_probs


def plain_log_probs(model: nn.Module, ids: Sequence[int], scored: int) -> list[float]:
    """Log-probs of the last `scored` tokens of `ids` as anybody would compute them from the model's logits."""
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([ids])).logits[0].float()  # (T, V)
    log_probs = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]  # (T-1,)
    return [float(value) for value in log_probs[-scored:]]


def gap(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference in nats; infinite where a value is no number."""
    differences = (torch.tensor(one) - torch.tensor(other)).abs()
    return float(differences.max()) if bool(torch.isfinite(differences).all()) else float("inf")


def does_as_recorded(proof: Proof, got: Sequence[float], where: str) -> float:
    """The largest difference (nats) of `got` to what the adapter did when it was recorded.

    Raises:
        ExportError: the difference exceeds the tolerance; says whether the base speaks instead.
    """
    off = gap(got, proof.adapter)
    if off <= proof.tolerance:
        return off
    if gap(got, proof.base) <= proof.tolerance:
        raise ExportError(f"{where}: it loads and does nothing: a fixed text has the log-probs of the bare base.")
    raise ExportError(
        f"{where}: the log-probs of a fixed text are {off:.4f} nats off what the adapter did in training; "
        f"{proof.tolerance:.4f} are allowed."
    )


# The parts of a folder, each with a fault of its own


def fingerprint(tensor: Tensor) -> str:
    """Hash of a tensor's dtype, shape and bytes."""
    state = xxhash.xxh3_128()
    hash_tensor(state, "", tensor)
    return str(state.hexdigest())


def tensors_of(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the safetensors files in `folder`, one at a time.

    Raises:
        ExportError: a file that cannot be read.
    """
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (no mapping)
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ExportError(f"{path}: a damaged file: {error}. Export again.") from error


def check_not_idle(matrices: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Raises ExportError where every B of an adapter is zero; `matrices` may hold other tensors too."""
    if not any(bool(tensor.any()) for name, tensor in matrices if re.search("lora_(embedding_)?b", name, re.I)):
        raise ExportError(f"{folder}: a no-op adapter: every B matrix is zero, so it loads and does nothing.")
