"""Answers of base and adapters, kept as they come, and what they say: text metrics, style, content, copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, set_seed

from perce_lite.config import PerCEConfig
from perce_lite.console import progress_bar, say
from perce_lite.data.pairs import Pair, PairMaker
from perce_lite.data.retrieval import tokens_of
from perce_lite.data.rows import Row, items_of
from perce_lite.evaluation.answer_metrics import TrainingText, grounded_recall, repetition
from perce_lite.evaluation.authorship import Style, UserWords, written
from perce_lite.evaluation.conditions import Case
from perce_lite.evaluation.metrics import Bootstrap, has_meteor, text_scores
from perce_lite.files import digest, read_json, write_json
from perce_lite.model.generate import Personal, generate_several
from perce_lite.recipe import Recipe

PERSON = "the person"
"""The arm of the held-out texts themselves: what is attributed, copied and repeated in what the users wrote."""

SAMPLING = {"do_sample": True, "temperature": 0.7}


class Way(NamedTuple):
    """How a query is answered: with which profile, drawn or greedy, at which strength of `Personal`."""

    profile: str
    sampled: bool = False
    personal: float = 0.0


class WrittenTexts:
    """Training texts by user, for what answers are attributed to and what they copy."""

    def __init__(self, texts: Mapping[str, Sequence[str]]) -> None:
        self._known = {user: TrainingText(several) for user, several in texts.items()}
        enough = sum(bool(several) for several in texts.values()) > 1
        self._styles = {masked: Style(texts, masked) for masked in (False, True)} if enough else {}

    def scores(self, text: str, row: Row) -> dict[str, float | None]:
        """`style` and `masked_style` (1: attributed to its user), `copied`, `longest_copy`; None where unknown."""
        known = self._known.get(row.user)
        style = self._styles if known is not None else {}
        return {
            "style": float(style[False].attributed([text], [row.user])[0]) if style else None,
            "masked_style": float(style[True].attributed([text], [row.user])[0]) if style else None,
            **(known.copied(text, row.query) if known is not None else {"copied": None, "longest_copy": None}),
        }


class Answers:
    """Answers of every arm; the texts are kept in `path`, as generating is what an evaluation spends its time on.

    ways: how each query is answered
    records: every answer: arm, the fields of its `Way`, row, user, query, written, text, scores
    spilled: by arm, for each general question 1 where the answer has words that only the profile has, else 0
    """

    def __init__(
        self, recipe: Recipe, config: PerCEConfig, maker: PairMaker, path: Path, written_texts: WrittenTexts
    ) -> None:
        self.options, self.config, self.maker, self.written_texts = recipe.evaluation, config, maker, written_texts
        sampled = [Way("own", True)] if self.options.samples else []
        self.ways = [
            Way("own"),
            Way("none"),
            *sampled,
            *(Way("own", False, strength) for strength in self.options.personal if strength),
        ]
        self.path = path
        self.known: dict[str, list[str]] = read_json(path) or {}
        self.records: list[dict[str, Any]] = []
        self.spilled: dict[str, list[float]] = {}
        if self.options.generated_rows and not has_meteor():
            say("METEOR is left out: nltk has no WordNet here (python -m nltk.downloader wordnet)")

    def add(self, model: PreTrainedModel, found: Sequence[Case], arm: str, on: bool, key: str) -> None:
        """One arm's answers to the queries of `found`: with the own profile, with none, and sampled with the own.

        key: `store_key` of the model, adapters on or off
        """
        with progress_bar() as bar:
            task = bar.add_task(f"{arm}, answers", total=len(found) * len(self.ways), note="")
            for way in self.ways:
                for case in found:
                    row = case.pair.row
                    profile = "" if way.profile == "none" else case.pair.profile
                    for text in self._texts(model, row, profile, key, on, way):
                        self._record(arm, way, row, text)
                    bar.advance(task)

    def _record(self, arm: str, way: Way, row: Row, text: str) -> None:
        reference = written(row)[0]
        scores = {
            **text_scores(reference, text),
            "content": grounded_recall(reference, row.query, text),
            **self.written_texts.scores(text, row),
            **repetition(text, reference),
        }
        known = {"row": row.where, "user": row.user, "query": row.query, "written": reference}
        self.records.append({"arm": arm, **way._asdict(), **known, "text": text, "scores": scores})

    def add_general(
        self, model: PreTrainedModel, general: Sequence[Pair], words: UserWords, arm: str, on: bool, key: str
    ) -> None:
        """One arm's answers to general questions under the profiles of users: whether the profile shows in them."""
        for pair in general[: self.options.generated_rows]:
            [text] = self._texts(model, pair.row, pair.profile, key, on, Way("own"))
            own = set(tokens_of(pair.profile)) & words.of(
                pair.row.user, [item.text for item in items_of(pair.row.profile)]
            )
            expected = set(tokens_of(f"{pair.row.query} {written(pair.row)[0]}"))
            self.spilled.setdefault(arm, []).append(float(bool(set(tokens_of(text)) & own - expected)))

    def _texts(self, model: PreTrainedModel, row: Row, profile: str, key: str, on: bool, way: Way) -> list[str]:
        """The answer, or `evaluation.samples` of them; those that are known are not generated again."""
        limit, seed = self.options.max_new_tokens, self.config.seed
        options = {**(SAMPLING if way.sampled else {}), **self.options.generation}
        count = self.options.samples if way.sampled and options["do_sample"] else 1
        personal = Personal(way.personal, self.config.estimator != "bootstrap")
        ids = self.maker.prompt_ids(row.prompt, profile)
        asked = digest([key, ids, limit, options, seed, count, *(astuple(personal) if way.personal else ())])
        if asked not in self.known:
            set_seed(seed)
            self.known[asked] = generate_several(
                model,
                self.maker,
                row.prompt,
                profile,
                limit,
                count,
                on,
                self.config.autocast,
                personal=personal,
                **options,
            )
            write_json(self.path, self.known)
        return self.known[asked]

    def table(self, arms: Sequence[str]) -> list[dict[str, Any]]:
        """Figures of every arm's answers by profile and way, and the change against the base; the person's own last.

        The first of `arms` is the base. A figure that no answer has is left out.
        """
        rows = [self._row(arm, arms[0], way) for way in self.ways for arm in arms]
        return [row for row in [*rows, self._persons()] if row is not None]

    def _row(self, arm: str, base: str, way: Way) -> dict[str, Any] | None:
        mine = self._of(arm, way)
        if not mine:
            return None
        theirs = self._of(base, way)
        bootstrap = Bootstrap([answer["user"] for answer in mine])
        changes = None
        if arm != base:
            paired = zip(mine, theirs, strict=True)
            changes = _means(bootstrap, [_less(answer["scores"], other["scores"]) for answer, other in paired])
        scores = _means(bootstrap, [answer["scores"] for answer in mine])
        known = {"arm": arm, **way._asdict(), "rows": len({answer["row"] for answer in mine})}
        return {**known, "answers": len(mine), "scores": scores, "change": changes}

    def _of(self, arm: str, way: Way) -> list[dict[str, Any]]:
        wanted = {"arm": arm, **way._asdict()}
        return [answer for answer in self.records if {name: answer[name] for name in wanted} == wanted]

    def _persons(self) -> dict[str, Any] | None:
        """What the users wrote themselves, judged as the answers are: the ceiling of style, the copies of a human."""
        unique = {answer["row"]: answer for answer in self.records}
        if not unique:
            return None
        scores = [
            {
                **self.written_texts.scores(answer["written"], _as_row(answer)),
                "content": grounded_recall(answer["written"], answer["query"], answer["written"]),
                **repetition(answer["written"], answer["written"]),
            }
            for answer in unique.values()
        ]
        bootstrap = Bootstrap([answer["user"] for answer in unique.values()])
        known = {"arm": PERSON, **Way("–")._asdict(), "rows": len(unique), "answers": len(unique)}
        return {**known, "scores": _means(bootstrap, scores), "change": None}


def _as_row(answer: Mapping[str, Any]) -> Row:
    prompt = ({"role": "user", "content": answer["query"]},)
    return Row(answer["row"], answer["user"], (), prompt, ())


def _less(mine: Mapping[str, float | None], theirs: Mapping[str, float | None]) -> dict[str, float | None]:
    """Figure by figure the difference; None where one is not known."""
    return {name: _difference(value, theirs[name]) for name, value in mine.items()}


def _difference(mine: float | None, theirs: float | None) -> float | None:
    return None if mine is None or theirs is None else mine - theirs


def _means(bootstrap: Bootstrap, scores: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    """Mean of each figure over the answers that have it, with its interval and how many those are."""
    means = {}
    for name in scores[0]:
        values = [answer[name] for answer in scores]
        has = [float(value is not None) for value in values]
        if any(has):
            ratio = bootstrap.ratio([value or 0.0 for value in values], has)
            means[name] = {**ratio._asdict(), "answers": int(sum(has))}
    return means
