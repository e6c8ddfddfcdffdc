"""Base and adapters on held-out rows, under controls, with intervals: the story of `perce-lite eval`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from perce_lite.config import PerCEConfig
from perce_lite.console import warn
from perce_lite.data.pairs import Pair, PairMaker
from perce_lite.data.readers import library, plain_rows, read_rows
from perce_lite.data.rows import Row, of_split, spread_over_users
from perce_lite.errors import AdapterError, DataError
from perce_lite.evaluation.answers import Answers, Writer, WrittenTexts, all_ways
from perce_lite.evaluation.authorship import UserWords, tokens_by_words, training_texts
from perce_lite.evaluation.conditions import Case, Topics, cases, is_candidate, score_cases
from perce_lite.evaluation.judging import BY_MODEL, BY_WORDS, ArmSums, Judge, chance, losses, sizes
from perce_lite.evaluation.metrics import Bootstrap
from perce_lite.evaluation.other_base import tokens_by_other_base
from perce_lite.model import adapter_files, adapters
from perce_lite.model.adapter_files import FOREIGN
from perce_lite.model.base import load_base, load_tokenizer
from perce_lite.model.logprob_store import Store
from perce_lite.model.scoring import ScoringJob, cached_log_probs, store_key
from perce_lite.recipe import Recipe, training_config
from perce_lite.training.metadata import SCRIPT

BASE = "base"

GENERAL = Path(__file__).parent / "general.jsonl"
"""Questions and answers of everyday knowledge that have nothing to do with any user; our own text."""


@dataclass(frozen=True)
class Material:
    """What every arm is judged on.

    found: by split, held-out rows under every condition
    chosen: by split and part, which tokens of each row are personal by something else than the training's weights
    general: text that has nothing to do with any user, with the profile of a held-out row and without
    learned: training rows, with the own profile alone
    """

    found: dict[str, list[Case]]
    chosen: dict[str, dict[str, list[Tensor]]]
    general: list[Pair]
    learned: list[Pair]


@dataclass(frozen=True)
class ArmScores:
    """Log-probs of one arm, nats: by split and condition, of the general text without and with a profile, and of
    training rows; (R,) a row."""

    splits: dict[str, dict[str, list[Tensor]]]
    general: list[Tensor]
    general_with_profile: list[Tensor]
    learned: list[Tensor]


def evaluate(recipe: Recipe, folders: Sequence[Path]) -> dict[str, Any]:
    """The figures that `perce-lite eval` shows: of the base, and of the adapter in each of `folders`.

    Log-probs and answers are kept as they come, so that a stopped evaluation resumes.

    Raises:
        AdapterError: a folder that holds no adapter of this base, or two of one name; DataError: no held-out rows.
    """
    arms: dict[str, Path | None] = {BASE: None, **_named(folders, recipe)}
    rows = read_rows(recipe)
    config = training_config(recipe)
    maker = PairMaker.of(recipe, load_tokenizer(recipe), config.max_length)
    texts = training_texts(rows)
    words = UserWords(texts)
    material = _material(recipe, maker, rows, words)
    base = load_base(recipe)
    answers = Answers(recipe, config, recipe.output_dir / "eval-answers.json", WrittenTexts(texts))
    answered = next(iter(material.found.values()))[: recipe.evaluation.generated_rows]
    ways = all_ways(recipe.evaluation)
    scored: dict[str, ArmScores] = {}
    for arm, folder in arms.items():
        with adapters.attached(base.model, folder) as model:
            on = folder is not None
            key = store_key(model, config.autocast, on)
            store = Store(Path(config.store), key) if config.store else None
            writer = Writer(arm, model, maker, on, key)
            scored[arm] = _score(model, material, store, config, arm, on)
            answers.add(writer, answered, ways)
            answers.add_general(writer, material.general, words)
    trained = {row.user for row in of_split(rows, "train")}
    judges = {
        name: Judge(split_cases, scored[BASE].splits[name], config.clip_min, material.chosen[name])
        for name, split_cases in material.found.items()
    }
    splits = {
        name: _split(judge, trained, {arm: judge.sums(scores.splits[name]) for arm, scores in scored.items()})
        for name, judge in judges.items()
    }
    return {
        "model": recipe.model,
        "arms": {arm: None if folder is None else str(folder) for arm, folder in arms.items()},
        "clip_min": config.clip_min,
        "splits": splits,
        "texts": answers.table({arm: [arm] for arm in arms}, ways),
        "general": _changes({arm: scores.general for arm, scores in scored.items()}),
        "spill_over": _spill_over(material.general, scored, answers.spilled),
        "memory": _memory(material.learned, scored),
        "answers": answers.records,
    }


def _material(recipe: Recipe, maker: PairMaker, rows: Sequence[Row], words: UserWords) -> Material:
    by_split = held_out(
        recipe, maker, rows, Topics(library(recipe), recipe.profile.top_k), recipe.evaluation.candidates
    )
    chosen = chosen_tokens(recipe, by_split, words, maker.tokenizer)
    with_profile = [row for row in of_split(rows, "train") if row.profile]
    learned = maker.make(spread_over_users(with_profile, recipe.evaluation.max_rows))
    profiles = [case.pair.row for split_cases in by_split.values() for case in split_cases]
    return Material(by_split, chosen, _general(recipe, maker, profiles), learned)


def chosen_tokens(
    recipe: Recipe, found: Mapping[str, Sequence[Case]], words: UserWords, tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict[str, list[Tensor]]]:
    """By split and part, personal tokens chosen without the training's weights: see `judging.masks`.

    Where `evaluation.personal_by` names another base, it is loaded and let go of: call it before the recipe's own.
    """
    chosen = {name: {BY_WORDS: tokens_by_words(split_cases, words, tokenizer)} for name, split_cases in found.items()}
    if recipe.evaluation.personal_by is not None:
        for name, masks in tokens_by_other_base(recipe, recipe.evaluation.personal_by, found, tokenizer).items():
            chosen[name][BY_MODEL] = masks
    return chosen


def _score(
    model: PreTrainedModel, material: Material, store: Store | None, config: PerCEConfig, arm: str, on: bool
) -> ArmScores:
    """One arm on all of `material`, adapters `on` or off."""
    splits = {
        split: score_cases(
            model, split_cases, list(split_cases[0].passes), store, config.autocast, f"{arm}, {split}", on
        )
        for split, split_cases in material.found.items()
    }
    jobs = [
        *(ScoringJob("general", pair.counterfactual) for pair in material.general),
        *(ScoringJob("general", pair.factual) for pair in material.general),
        *(ScoringJob(pair.row.user, pair.factual) for pair in material.learned),
    ]
    rest = cached_log_probs(model, jobs, store, config.autocast, f"{arm}, general and training rows", on).log_probs
    size = len(material.general)
    return ArmScores(splits, rest[:size], rest[size : 2 * size], rest[2 * size :])


def held_out(
    recipe: Recipe,
    maker: PairMaker,
    rows: Sequence[Row],
    topics: Topics | None = None,
    candidates: int = 0,
    splits: Sequence[str] = ("test", "unseen"),
) -> dict[str, list[Case]]:
    """Cases of each of `splits` that has rows, `evaluation.max_rows` at the most, spread over users.

    candidates: see `conditions.cases`
    Where there is no test split, validation stands for it.

    Raises:
        DataError: nothing is held out.
    """
    if "test" in splits and not of_split(rows, "test"):
        splits = ["validation" if split == "test" else split for split in splits]
    by_split = {}
    for split in splits:
        picked = spread_over_users([row for row in of_split(rows, split) if row.profile], recipe.evaluation.max_rows)
        split_cases = cases(maker, picked, topics, of_split(rows, "train"), candidates=candidates)
        if split_cases:
            by_split[split] = split_cases
        elif picked:
            warn(f"none of the {len(picked)} {split} rows can be had under every control; perce-lite check shows why")
    if not by_split:
        raise DataError("No held-out rows to judge by: raise split.test, or give the rows a split of their own.")
    return by_split


def _named(folders: Sequence[Path], recipe: Recipe) -> dict[str, Path | None]:
    """What each adapter is called: the shortest end of its folder that tells it from the others, without `adapter`."""
    if not folders:
        raise AdapterError("No adapter was given: --adapter FOLDER, once for each.")
    named: dict[str, Path | None] = {}
    for folder, name in zip(folders, short_names(folders), strict=True):
        metadata = adapter_files.read_metadata(folder)  # all faults before any scoring
        adapter_files.require_profile_pass(folder, recipe)
        if metadata.get(SCRIPT) or metadata.get(FOREIGN):
            warn(f"{folder} was not trained by a recipe: rows it is judged on may be rows it has seen")
        elif _split_of(metadata["recipe"]) != _split_of(recipe.model_dump(mode="json")):
            warn(f"{folder} was trained with another split of the data: rows it is judged on may be rows it has seen")
        if name in named or name == BASE:
            raise AdapterError(f"{folder}: two arms would be called {name}; give each adapter once.")
        named[name] = folder
    return named


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of each folder, as few as tell it from the others; a last part `adapter` is left out."""
    parts = [(folder.parent if folder.name == "adapter" else folder).absolute().parts for folder in folders]

    def name(folder_parts: tuple[str, ...]) -> str:
        others = [other for other in parts if other != folder_parts]
        for count in range(1, len(folder_parts) + 1):
            if all(other[-count:] != folder_parts[-count:] for other in others):
                return "/".join(folder_parts[-count:])
        return "/".join(folder_parts)

    return [name(folder_parts) for folder_parts in parts]


def _split_of(plain: dict[str, Any]) -> Any:
    """What decides which rows are held out, but for where the data lie."""
    return plain["split"], plain["data"]["format"], plain["data"]["columns"]


def _general(recipe: Recipe, maker: PairMaker, profiles: Sequence[Row]) -> list[Pair]:
    """The general text, each with the profile of one of `profiles` in turn and as that one's user."""
    given = recipe.evaluation.general
    path = GENERAL if given is None else Path(recipe.source).parent / Path(given).expanduser()
    if not path.is_file():
        raise DataError(f"evaluation.general: there is no file {path}")
    rows = plain_rows(path)
    lent = [profiles[number % len(profiles)] for number in range(len(rows))]
    pairs = maker.make(
        [replace(row, profile=other.profile, user=other.user) for row, other in zip(rows, lent, strict=True)]
    )
    if len(pairs) < len(rows):
        warn(f"{len(rows) - len(pairs)} of {len(rows)} rows of {path.name} are empty or do not fit, and are left out")
    return pairs


# Figures


def _split(judge: Judge, trained: set[str], sums: dict[str, ArmSums]) -> dict[str, Any]:
    """Losses of every arm under every control, what the own profile is worth, who wrote it; changes against the base.

    The first arm of `sums` is the base.
    """
    base = sums[BASE]
    table = [
        {
            "arm": arm,
            "profile": name,
            **judge.figures(by_part),
            "change": None if arm == BASE else judge.figures(by_part, base.losses[name]),
        }
        for arm, arm_sums in sums.items()
        for name, by_part in arm_sums.losses.items()
        if not is_candidate(name)
    ]
    worth = [
        {
            "arm": arm,
            "over": name,
            **judge.worth(arm_sums, name),
            "change": None if arm == BASE else judge.figures(arm_sums.worth(name), base.worth(name)),
        }
        for arm, arm_sums in sums.items()
        for name in arm_sums.losses
        if name != "own" and not is_candidate(name)
    ]
    candidates = len(base.losses) - 1  # without the condition "none"
    who = [
        {
            "arm": arm,
            **judge.identified(arm_sums),
            "change": None if arm == BASE else judge.identified(arm_sums, base),
        }
        for arm, arm_sums in sums.items()
        if arm_sums.identified
    ]
    return {
        **judge.told(trained),
        "losses": table,
        "worth": worth,
        "who": {"candidates": candidates, "chance": chance(candidates), "arms": who} if who else None,
    }


def _changes(plain: dict[str, list[Tensor]]) -> list[dict[str, Any]]:
    """Loss a token of each arm on rows of nobody, and the change against the base."""
    if not plain[BASE]:
        return []
    masks = [torch.ones_like(values, dtype=torch.bool) for values in plain[BASE]]
    counts = sizes(masks)
    bootstrap = Bootstrap([str(number) for number in range(len(masks))])  # rows of nobody: each its own group
    totals = {arm: losses(values, masks) for arm, values in plain.items()}
    return [
        {
            "arm": arm,
            "tokens": int(counts.sum()),
            "loss": bootstrap.ratio(total, counts)._asdict(),
            "change": None if arm == BASE else bootstrap.ratio(total - totals[BASE], counts)._asdict(),
        }
        for arm, total in totals.items()
    ]


def _spill_over(
    general: Sequence[Pair], scored: Mapping[str, ArmScores], spilled: Mapping[str, list[float]]
) -> list[dict[str, Any]]:
    """What a profile in the prompt does to answers that have nothing to do with it.

    A record an arm: `loss`, nats a token of the neutral answer with a profile less without; `answers`, share of
    generated answers with words that only the profile has.
    """
    if not general:
        return []
    bootstrap = Bootstrap([pair.row.user for pair in general])
    counts = np.array([float(values.numel()) for values in scored[BASE].general])
    gaps = {
        arm: np.array([float((a - b).sum()) for a, b in zip(scores.general, scores.general_with_profile, strict=True)])
        for arm, scores in scored.items()
    }
    return [
        {
            "arm": arm,
            "loss": bootstrap.ratio(gap, counts)._asdict(),
            "change": None if arm == BASE else bootstrap.ratio(gap - gaps[BASE], counts)._asdict(),
            "answers": float(np.mean(spilled[arm])) if spilled.get(arm) else None,
        }
        for arm, gap in gaps.items()
    ]


def _memory(learned: Sequence[Pair], scored: Mapping[str, ArmScores]) -> list[dict[str, Any]]:
    """Loss a token on training rows, with the own profile, and the change against the base: to set beside held-out."""
    if not learned:
        return []
    bootstrap = Bootstrap([pair.row.user for pair in learned])
    counts = np.array([float(values.numel()) for values in scored[BASE].learned])
    totals = {arm: np.array([-float(values.sum()) for values in scores.learned]) for arm, scores in scored.items()}
    return [
        {
            "arm": arm,
            "rows": len(learned),
            "loss": bootstrap.ratio(total, counts)._asdict(),
            "change": None if arm == BASE else bootstrap.ratio(total - totals[BASE], counts)._asdict(),
        }
        for arm, total in totals.items()
    ]
