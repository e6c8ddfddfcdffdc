"""A recipe for what somebody has, for a GPU and a purpose: the largest base that fits by the plan, with comments."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from perce_lite.errors import PlanError
from perce_lite.model.builtin import BUILT_IN
from perce_lite.model.float16 import overflow_of
from perce_lite.planning.gpus import GIB, Gpu
from perce_lite.planning.plan import Plan
from perce_lite.planning.row_lengths import alike
from perce_lite.recipe import Recipe

Have = Literal["writing", "rows", "lamp", "trl"]
Want = Literal["chat", "fleet", "ollama"]

_BASES = ("Qwen/Qwen3-8B", "Qwen/Qwen3-4B", "HuggingFaceTB/SmolLM2-1.7B-Instruct", next(iter(BUILT_IN)))
"""Bases to choose from, the largest first; all but the last come from the Hub, none asks for a licence."""

_HEADROOM = 0.9
"""Share of a GPU's memory that a draft fills at the most: the screen takes some, and the plan is an estimate."""

_SERVED = 4
"""Users that a fleet trains at once at the least."""


@dataclass(frozen=True)
class Draft:
    """What goes into a recipe.

    gpu: None: a CPU
    data: lines of the section `data`
    train, lora: fields that the user's own script sets; they go before ours
    notes: sentences that go above the recipe
    """

    have: Have
    want: Want
    gpu: Gpu | None
    data: Mapping[str, str]
    model: str | None = None
    train: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Chosen:
    """A base and what goes with it. bytes: that a training takes by the plan; None: it was not reckoned."""

    model: str
    length: int
    batch: int
    rank: int
    bytes: int | None = None


def choose(draft: Draft) -> Chosen:
    """The largest base that fits the draft's GPU by the plan with rows of good length; the draft's own if it has one.

    Raises:
        PlanError: not even the smallest fits.
    """
    if draft.gpu is None:
        return Chosen(draft.model or _BASES[-1], 384, 2, 16)
    if draft.model is not None:
        return Chosen(draft.model, 1024, 1, _rank(draft))
    for length in _lengths(draft.want, draft.gpu):  # a smaller base with room for a profile serves better
        for model in _bases(draft.want, draft.gpu):
            chosen = _if_it_fits(draft, draft.gpu, Chosen(model, length, 1, _rank(draft)))
            if chosen is not None:
                return chosen
    raise PlanError(f"{draft.gpu.name}: not even {_BASES[-1]} fits; train on the CPU (--gpu cpu)")


def _rank(draft: Draft) -> int:
    return 8 if draft.want == "fleet" else 16


def _bases(want: Want, gpu: Gpu) -> Sequence[str]:
    """A GPU without bf16 is an old one, on which an 8B is slow; of many users each has few texts."""
    return _BASES[2 if want == "fleet" and gpu.bytes < 15 * GIB else 1 if want == "fleet" or not gpu.bf16 else 0 :]


def _lengths(want: Want, gpu: Gpu) -> tuple[int, ...]:
    return (1024, 512) if want == "fleet" else (4096, 2048, 1024) if gpu.bytes > 20 * GIB else (2048, 1024)


def _if_it_fits(draft: Draft, gpu: Gpu, chosen: Chosen) -> Chosen | None:
    train = {"max_length": chosen.length, "per_device_train_batch_size": chosen.batch, **draft.train}
    plain = {"model": chosen.model, "data": {"path": "-"}, "lora": {"r": chosen.rank, **draft.lora}, "train": train}
    plan = Plan(Recipe.model_validate(plain), alike(int(train["max_length"] or chosen.length), "drafted"))
    if not gpu.bf16 and overflow_of(plan.config.model_type, "float16") is not None:
        return None
    total = plan.training(replace(plan.choice, users=_SERVED if draft.want == "fleet" else 1), gpu)
    return replace(chosen, bytes=total) if total <= _HEADROOM * gpu.bytes else None


def recipe_text(draft: Draft, chosen: Chosen, path: Path) -> str:
    """The recipe as YAML, with a comment on every line that somebody may want to change."""
    sections = [
        _head(draft, chosen, path),
        _line("model", chosen.model if draft.model is None else json.dumps(draft.model), _of_model(draft, chosen))
        + _line("quantization", "nf4", "the base in 4 bit"),
        "data:\n" + "".join(f"  {name}: {value}\n" for name, value in draft.data.items()),
        _profile(draft, chosen),
    ]
    if draft.want == "fleet":
        sections.append(_FLEET)
    lora = {"r": (chosen.rank, "rank: more learns more and needs more memory")}
    sections += [_section("lora", lora, draft.lora), _section("train", _train(draft, chosen), draft.train)]
    sections.append("evaluation:\n  max_rows: 16               # held-out rows in the table at the end\n")
    if draft.want == "ollama":
        sections.append("export:\n  to: [ollama]               # what Ollama cannot take is refused before training\n")
    return "\n".join(sections)


def commands(draft: Draft, path: Path, user: str) -> list[str]:
    """The commands that go on from the recipe, but for `import`."""
    run = f"runs/{path.stem}"
    lines = [["check", str(path)]]
    if draft.gpu is not None:
        lines.append(["plan", str(path), "--gpu", draft.gpu.name])
    if draft.want == "fleet":
        lines += [["fleet", str(path)], ["chat", run, "--user", user]]
    else:
        lines += [["train", str(path)], ["chat", f"{run}/adapter", "--user", user]]
    if draft.want == "ollama":
        lines.append(["export", f"{run}/adapter", "--to", "ollama", "--out", f"{run}/ollama"])
    return [shlex.join(["perce-lite", *line]) for line in lines]


_FLEET = """fleet:
  group_by: user             # or cohort, where the data names them
  min_examples: 8            # training rows that a user needs for an adapter of their own
  init_from: auto            # from the shared adapter, or the cohort's
  slots: auto                # users trained at once; 1 needs the least memory
"""
_COLUMN = 29


def _line(name: str, value: Any, comment: str = "", indent: str = "") -> str:
    """A line of YAML with its comment where the eye finds it."""
    shown = value if isinstance(value, str) else json.dumps(value)
    plain = f"{indent}{name}: {shown}"
    return f"{plain:<{_COLUMN}}{'' if len(plain) < _COLUMN else '   '}# {comment}\n" if comment else f"{plain}\n"


def _section(name: str, ours: Mapping[str, tuple[Any, str]], script: Mapping[str, Any]) -> str:
    """A section: our fields with comments, the script's own in their place and behind them."""
    lines = [
        _line(field, json.dumps(script[field]) if field in script else value, comment, "  ")
        for field, (value, comment) in ours.items()
    ]
    lines += [
        _line(field, json.dumps(value), "of the script", "  ") for field, value in script.items() if field not in ours
    ]
    return f"{name}:\n" + "".join(lines)


def _head(draft: Draft, chosen: Chosen, path: Path) -> str:
    card = "a CPU" if draft.gpu is None else draft.gpu.name
    needs = "" if chosen.bytes is None else f"; a training takes {chosen.bytes / GIB:.1f} GiB of it by the plan"
    what = {
        "writing": "a person's own writing", "rows": "rows", "lamp": "a LaMP set", "trl": "a TRL script",
    }[draft.have]  # fmt: skip
    lines = [f"Made by perce-lite init: {what}, for {card}{needs}.", *draft.notes]
    called = "fleet" if draft.want == "fleet" else "train"
    return "".join(f"# {line}\n" for line in lines) + f"#     perce-lite {called} {path}\n"


def _of_model(draft: Draft, chosen: Chosen) -> str:
    if chosen.model == draft.model:
        return "yours"
    return "built in" if chosen.model in BUILT_IN else "a Hub id; or a folder, or a GGUF file"


def _profile(draft: Draft, chosen: Chosen) -> str:
    lines = _line("select", "bm25", "the user's texts that are nearest to the query ...", "  ")
    lines += _line("top_k", 3, "... three of them at the most", "  ")
    if draft.have == "writing":
        lines += _line("max_tokens", chosen.length // 2, "of the profile; whole texts are left out to fit", "  ")
        lines += _line("earlier_by", "document", "or month, where texts of one month are one piece of work", "  ")
    return f"profile:\n{lines}"


def _train(draft: Draft, chosen: Chosen) -> dict[str, tuple[Any, str]]:
    large = chosen.model in _BASES[:2]
    rate = "1e-4" if large and draft.want != "fleet" else "3e-4"
    return {
        "num_train_epochs": (2, "times through the data; more overfits on few texts"),
        "learning_rate": (rate, "less if the loss jumps; bigger models want smaller rates"),
        "per_device_train_batch_size": (chosen.batch, "rows at once"),
        "gradient_accumulation_steps": (4 // chosen.batch, "rows to one step of learning: batch x this"),
        "max_length": (chosen.length, "tokens of a row; profile items are left out to fit, a response is never cut"),
    }
