"""Base and adapters on held-out rows, under controls, with intervals: the story of `perce-lite eval`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, set_seed

from perce_lite.config import PerCEConfig
from perce_lite.console import progress_bar, say, warn
from perce_lite.data.pairs import PairMaker, Tokens
from perce_lite.data.readers import library, plain_rows, read_rows
from perce_lite.data.rows import Row, of_split, spread_over_users
from perce_lite.errors import AdapterError, DataError
from perce_lite.evaluation.conditions import Case, Judge, Topics, cases, losses, score_cases, sizes
from perce_lite.evaluation.metrics import Bootstrap, has_meteor, text_scores
from perce_lite.files import digest, read_json, write_json
from perce_lite.model import adapters
from perce_lite.model.base import load_base
from perce_lite.model.generate import generate
from perce_lite.model.logprob_store import Store
from perce_lite.model.scoring import ScoringJob, cached_log_probs, store_key
from perce_lite.recipe import Recipe, training_config

BASE = "base"

GENERAL = Path(__file__).parent / "general.jsonl"
"""Questions and answers of everyday knowledge that have nothing to do with any user; our own text."""

_WITH_TEXTS = ("own", "none")
"""Controls under which answers are generated."""


def evaluate(recipe: Recipe, folders: Sequence[Path]) -> dict[str, Any]:
    """The figures that `perce-lite eval` shows: of the base, and of the adapter in each of `folders`.

    Log-probs and answers are kept as they come, so that a stopped evaluation resumes.

    Raises:
        AdapterError: a folder that holds no adapter of this base, or two of one name; DataError: no held-out rows.
    """
    arms: dict[str, Path | None] = {BASE: None, **_named(folders, recipe)}
    rows = read_rows(recipe)
    trained = {row.user for row in of_split(rows, "train")}
    config = training_config(recipe)
    base = load_base(recipe)
    maker = PairMaker.of(recipe, base.tokenizer, config.max_length)
    topics = Topics(library(recipe), recipe.profile.top_k)
    found = held_out(recipe, maker, rows, topics)
    general = _general(recipe, maker)
    answered = next(iter(found.values()))[: recipe.evaluation.generated_rows]
    kept = Answers(recipe, config, maker, recipe.output_dir / "eval-answers.json")
    scored: dict[str, dict[str, dict[str, list[Tensor]]]] = {}
    plain: dict[str, list[Tensor]] = {}
    texts: list[dict[str, Any]] = []
    for arm, folder in arms.items():
        with adapters.attached(base.model, folder) as model:
            on = folder is not None
            key = store_key(model, config.autocast, on)
            store = Store(Path(config.store), key) if config.store else None
            scored[arm] = {
                split: score_cases(model, some, list(some[0].passes), store, config.autocast, f"{arm}, {split}", on)
                for split, some in found.items()
            }
            jobs = [ScoringJob("general", tokens) for tokens in general]
            plain[arm] = cached_log_probs(model, jobs, store, config.autocast, f"{arm}, general", on).log_probs
            texts += kept.of(model, answered, arm, on, key)
    return {
        "model": recipe.model,
        "arms": {arm: None if folder is None else str(folder) for arm, folder in arms.items()},
        "clip_min": config.clip_min,
        "splits": {
            name: _split(some, trained, {arm: one[name] for arm, one in scored.items()}, config.clip_min)
            for name, some in found.items()
        },
        "texts": _texts(texts, list(arms)),
        "general": _changes(plain),
        "answers": texts,
    }


def held_out(
    recipe: Recipe,
    maker: PairMaker,
    rows: Sequence[Row],
    topics: Topics | None = None,
    splits: Sequence[str] = ("test", "unseen"),
) -> dict[str, list[Case]]:
    """Cases of each of `splits` that has rows, `evaluation.max_rows` at the most, spread over users.

    Where there is no test split, validation stands for it.

    Raises:
        DataError: nothing is held out.
    """
    if "test" in splits and not of_split(rows, "test"):
        splits = ["validation" if split == "test" else split for split in splits]
    found = {}
    for split in splits:
        picked = spread_over_users([row for row in of_split(rows, split) if row.profile], recipe.evaluation.max_rows)
        some = cases(maker, picked, topics, of_split(rows, "train"))
        if some:
            found[split] = some
        elif picked:
            warn(f"none of the {len(picked)} {split} rows can be had under every control; perce-lite check shows why")
    if not found:
        raise DataError("No held-out rows to judge by: raise split.test, or give the rows a split of their own.")
    return found


def _named(folders: Sequence[Path], recipe: Recipe) -> dict[str, Path | None]:
    """What each adapter is called: its folder as given, without the `adapter` at its end."""
    if not folders:
        raise AdapterError("No adapter was given: --adapter FOLDER, once for each.")
    named: dict[str, Path | None] = {}
    for folder in folders:
        metadata = adapters.read_metadata(folder)  # all faults before any scoring
        adapters.require_profile_pass(folder, recipe)
        if _split_of(metadata["recipe"]) != _split_of(recipe.model_dump(mode="json")):
            warn(f"{folder} was trained with another split of the data: rows it is judged on may be rows it has seen")
        name = str(folder.parent if folder.name == "adapter" else folder)
        if name in named or name == BASE:
            raise AdapterError(f"{folder}: two arms would be called {name}; give each adapter once.")
        named[name] = folder
    return named


def _split_of(plain: dict[str, Any]) -> Any:
    """What decides which rows are held out, but for where the data lie."""
    return plain["split"], plain["data"]["format"], plain["data"]["columns"]


def _general(recipe: Recipe, maker: PairMaker) -> list[Tokens]:
    """The general text, tokenised without any profile."""
    given = recipe.evaluation.general
    path = GENERAL if given is None else Path(recipe.source).parent / Path(given).expanduser()
    if not path.is_file():
        raise DataError(f"evaluation.general: there is no file {path}")
    rows = plain_rows(path)
    # A pair needs a profile; the one put in is dropped again with the factual side.
    tokens = [pair.counterfactual for pair in maker.make([replace(row, profile="-") for row in rows])]
    if len(tokens) < len(rows):
        warn(f"{len(rows) - len(tokens)} of {len(rows)} rows of {path.name} are empty or do not fit, and are left out")
    return tokens


# Figures


def _split(
    found: list[Case], trained: set[str], scored: dict[str, dict[str, list[Tensor]]], clip_min: float
) -> dict[str, Any]:
    """Losses of every arm under every control, what changed against the base, what the own profile is worth."""
    judge = Judge(found, scored[BASE], clip_min)
    sums = {arm: judge.sums(by_profile) for arm, by_profile in scored.items()}
    table = [
        {
            "arm": arm,
            "profile": name,
            **judge.figures(by_part),
            "change": None if arm == BASE else judge.figures(by_part, sums[BASE][name]),
        }
        for arm, by_profile in sums.items()
        for name, by_part in by_profile.items()
    ]
    worth = [
        {"arm": arm, "over": name, **judge.figures(by_part, by_profile["own"])}
        for arm, by_profile in sums.items()
        for name, by_part in by_profile.items()
        if name != "own"
    ]
    return {
        **judge.told(trained),
        "losses": table,
        "worth": worth,
    }


def _changes(plain: dict[str, list[Tensor]]) -> list[dict[str, Any]]:
    """Loss a token of each arm on the general text, and the change against the base."""
    if not plain[BASE]:
        return []
    every = [torch.ones_like(values, dtype=torch.bool) for values in plain[BASE]]
    counts = sizes(every)
    bootstrap = Bootstrap([str(number) for number in range(len(every))])  # rows of nobody: each its own group
    totals = {arm: losses(values, every) for arm, values in plain.items()}
    return [
        {
            "arm": arm,
            "tokens": int(counts.sum()),
            "loss": bootstrap.ratio(mine, counts)._asdict(),
            "change": None if arm == BASE else bootstrap.ratio(mine - totals[BASE], counts)._asdict(),
        }
        for arm, mine in totals.items()
    ]


def _texts(answers: list[dict[str, Any]], arms: Sequence[str]) -> list[dict[str, Any]]:
    """Text metrics of every arm with the own profile and with none, and the change against the base."""
    table = []
    for arm in arms:
        for name in _WITH_TEXTS:
            mine = [answer for answer in answers if answer["arm"] == arm and answer["profile"] == name]
            theirs = [one for one in answers if one["arm"] == BASE and one["profile"] == name]
            if not mine:
                continue
            bootstrap = Bootstrap([one["user"] for one in mine])
            scores = {metric: [one["scores"][metric] for one in mine] for metric in mine[0]["scores"]}
            changes = {
                metric: [own - one["scores"][metric] for own, one in zip(values, theirs, strict=True)]
                for metric, values in scores.items()
            }
            table.append(
                {
                    "arm": arm,
                    "profile": name,
                    "rows": len(mine),
                    "scores": {metric: bootstrap.ratio(values)._asdict() for metric, values in scores.items()},
                    "change": None
                    if arm == BASE
                    else {metric: bootstrap.ratio(values)._asdict() for metric, values in changes.items()},
                }
            )
    return table


# Answers


class Answers:
    """Generated answers, kept in `path` as they come: generating is what an evaluation spends its time on."""

    def __init__(self, recipe: Recipe, config: PerCEConfig, maker: PairMaker, path: Path) -> None:
        self.options, self.config, self.maker = recipe.evaluation, config, maker
        self.path = path
        self.known: dict[str, str] = read_json(path) or {}
        if self.options.generated_rows and not has_meteor():
            say("METEOR is left out: nltk has no WordNet here (python -m nltk.downloader wordnet)")

    def of(self, model: PreTrainedModel, found: Sequence[Case], arm: str, on: bool, key: str) -> list[dict[str, Any]]:
        """One arm's answers to the queries of `found`, with the own profile and with none, and their scores.

        key: `store_key` of the model, adapters on or off
        """
        answers = []
        with progress_bar() as bar:
            task = bar.add_task(f"{arm}, answers", total=len(found) * len(_WITH_TEXTS), note="")
            for name in _WITH_TEXTS:
                for case in found:
                    text = self._one(model, case.pair.row, "" if name == "none" else case.pair.profile, key, on)
                    row = case.pair.row
                    written = next(one["content"] for one in row.completion if one["role"] == "assistant")
                    known = {"row": row.where, "user": row.user, "query": row.query, "written": written}
                    scores = text_scores(written, text)
                    answers.append({"arm": arm, "profile": name, **known, "text": text, "scores": scores})
                    bar.advance(task)
        return answers

    def _one(self, model: PreTrainedModel, row: Row, profile: str, key: str, on: bool) -> str:
        limit, options, seed = self.options.max_new_tokens, self.options.generation, self.config.seed
        asked = digest([key, self.maker.prompt_ids(row.prompt, profile), limit, options, seed])
        if asked not in self.known:
            set_seed(seed)
            answer = generate(model, self.maker, row.prompt, profile, limit, on, self.config.autocast, **options)
            self.known[asked] = answer
            write_json(self.path, self.known)
        return self.known[asked]
