"""Answers of base and adapters, kept as they come, and what they say: text metrics, style, content, copies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, set_seed

from perce_lite.config import PerCEConfig
from perce_lite.console import progress_bar, say
from perce_lite.data.pairs import Pair, PairMaker
from perce_lite.data.retrieval import tokens_of
from perce_lite.data.rows import Row, items_of, written
from perce_lite.evaluation.answer_metrics import TrainingText, grounded_recall, repetition
from perce_lite.evaluation.authorship import Style, UserWords
from perce_lite.evaluation.conditions import Case
from perce_lite.evaluation.metrics import Bootstrap, has_meteor, text_scores
from perce_lite.files import digest, json_text, read_json
from perce_lite.locks import write_alone
from perce_lite.model.generate import Personal, generate_batch
from perce_lite.recipe import Evaluation, Recipe

PERSON = "the person"
"""The arm of the held-out texts themselves: what is attributed, copied and repeated in what the users wrote."""

SAMPLING = {"do_sample": True, "temperature": 0.7}

_AT_ONCE = {"cpu": 16, "cuda": 4}
"""Answers of one batch, by the device: a CPU has the memory, and de-quantises the base once for all of them."""


Asked = tuple[Row, str]
"""A row whose query is asked, and the profile in its prompt."""


class Way(NamedTuple):
    """How a query is answered: with which profile, drawn or greedy, at which strength of `Personal`."""

    profile: str
    sampled: bool = False
    personal: float = 0.0


def ways_of(options: Evaluation, profile: str = "own") -> list[Way]:
    """How `compare` has each query answered: greedy, and drawn where `evaluation.samples` are wanted."""
    return [Way(profile), *([Way(profile, True)] if options.samples else [])]


def all_ways(options: Evaluation) -> list[Way]:
    """How `eval` has each query answered: without a profile and at every strength of `Personal` as well."""
    greedy, *drawn = ways_of(options)
    return [greedy, Way("none"), *drawn, *(Way("own", False, strength) for strength in options.personal if strength)]


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


class Writer(NamedTuple):
    """Who answers: an arm's model, adapters `on` or off, with the prompts that it was trained with.

    key: `store_key` of the model, adapters on or off
    """

    arm: str
    model: PreTrainedModel
    maker: PairMaker
    on: bool
    key: str


class Answers:
    """Answers of every arm; the texts are kept in `path`, as generating is what an evaluation spends its time on.

    records: every answer: arm, the fields of its `Way`, row, user, query, written, text, scores
    spilled: by arm, for each general question 1 where the answer has words that only the profile has, else 0
    """

    def __init__(self, recipe: Recipe, config: PerCEConfig, path: Path, written_texts: WrittenTexts) -> None:
        self.options, self.config, self.written_texts = recipe.evaluation, config, written_texts
        self.path = path
        self.known: dict[str, list[list[str]]] = read_json(path) or {}
        self.records: list[dict[str, Any]] = []
        self.spilled: dict[str, list[float]] = {}
        if self.options.generated_rows and not has_meteor():
            say("METEOR is left out: nltk has no WordNet here (python -m nltk.downloader wordnet)")

    def add(self, writer: Writer, found: Sequence[Case], ways: Sequence[Way]) -> None:
        """The answers of `writer` to the queries of `found`, in each of `ways`."""
        with progress_bar() as bar:
            task = bar.add_task(f"{writer.arm}, answers", total=len(found) * len(ways), note="")
            for way in ways:
                asked = [(case.pair.row, "" if way.profile == "none" else case.pair.profile) for case in found]
                for batch in self._batches(writer, asked, way):
                    for (row, _), texts in zip(batch, self._texts(writer, batch, way), strict=True):
                        for text in texts:
                            self._record(writer.arm, way, row, text)
                    bar.advance(task, len(batch))

    def _count(self, way: Way) -> int:
        """Answers to each query."""
        drawn = {**(SAMPLING if way.sampled else {}), **self.options.generation}.get("do_sample", False)
        return self.options.samples if way.sampled and drawn else 1

    def _batches(self, writer: Writer, asked: Sequence[Asked], way: Way) -> Iterator[Sequence[Asked]]:
        device = next(writer.model.parameters()).device.type
        size = max(1, _AT_ONCE.get(device, 1) // self._count(way))
        for start in range(0, len(asked), size):
            yield asked[start : start + size]

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

    def add_general(self, writer: Writer, general: Sequence[Pair], words: UserWords) -> None:
        """Answers to general questions under the profiles of users: whether the profile shows in them."""
        asked = [(pair.row, pair.profile) for pair in general[: self.options.generated_rows]]
        batches = self._batches(writer, asked, Way("own"))
        answered = [text for batch in batches for [text] in self._texts(writer, batch, Way("own"))]
        for pair, text in zip(general, answered, strict=False):
            own = set(tokens_of(pair.profile)) & words.of(
                pair.row.user, [item.text for item in items_of(pair.row.profile)]
            )
            expected = set(tokens_of(f"{pair.row.query} {written(pair.row)[0]}"))
            self.spilled.setdefault(writer.arm, []).append(float(bool(set(tokens_of(text)) & own - expected)))

    def _texts(self, writer: Writer, batch: Sequence[Asked], way: Way) -> list[list[str]]:
        """The answers to each prompt of `batch`; a batch that is known is not generated again."""
        limit, seed, count = self.options.max_new_tokens, self.config.seed, self._count(way)
        options = {**(SAMPLING if way.sampled else {}), **self.options.generation}
        personal = Personal(way.personal, self.config.estimator != "bootstrap")
        model, maker = writer.model, writer.maker
        ids = [maker.prompt_ids(row.prompt, profile) for row, profile in batch]
        asked = digest([writer.key, ids, limit, options, seed, count, *(astuple(personal) if way.personal else ())])
        if asked not in self.known:
            set_seed(seed)
            prompts = [(row.prompt, profile) for row, profile in batch]
            self.known[asked] = generate_batch(
                model, maker, prompts, limit, count, writer.on, self.config.autocast, personal, **options
            )
            write_alone(self.path, json_text(self.known))
        return self.known[asked]

    def table(self, arms: Mapping[str, Sequence[str]], ways: Sequence[Way]) -> list[dict[str, Any]]:
        """Figures of every arm's answers by way, and the change against the first, the base; the person's own last.

        arms: by name, what its trainings were added as; a training of each seed, or one
        A figure that no answer has is left out.
        """
        base = next(iter(arms))
        rows = []
        for way in ways:
            for arm, trainings in arms.items():
                figures = self._figures(trainings, way)
                if figures is not None:
                    change = None if arm == base else self.difference(trainings, arms[base], way)
                    rows.append({"arm": arm, **way._asdict(), **figures, "change": change})
        persons = self._persons()
        return rows if persons is None else [*rows, persons]

    def _figures(self, trainings: Sequence[str], way: Way) -> dict[str, Any] | None:
        answers = [answer for training in trainings for answer in self._of(training, way)]
        if not answers:
            return None
        scores = _means(Bootstrap([answer["user"] for answer in answers]), [answer["scores"] for answer in answers])
        return {"rows": len({answer["row"] for answer in answers}), "answers": len(answers), "scores": scores}

    def difference(self, mine: Sequence[str], theirs: Sequence[str], way: Way) -> dict[str, Any] | None:
        """What separates the answers of `mine` from those of `theirs`, paired by training and query; None: no answers.

        Where `theirs` is one training, as of the base, every one of `mine` is set against it.
        """
        others = [*theirs] * len(mine) if len(theirs) == 1 else theirs
        paired = [
            both
            for training, other in zip(mine, others, strict=True)
            for both in zip(self._of(training, way), self._of(other, way), strict=True)
        ]
        if not paired:
            return None
        bootstrap = Bootstrap([answer["user"] for answer, _ in paired])
        return _means(bootstrap, [_less(answer["scores"], other["scores"]) for answer, other in paired])

    def _of(self, training: str, way: Way) -> list[dict[str, Any]]:
        wanted = {"arm": training, **way._asdict()}
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


def _less(scores: Mapping[str, float | None], other_scores: Mapping[str, float | None]) -> dict[str, float | None]:
    """Figure by figure the difference; None where one is not known."""
    return {name: _difference(value, other_scores[name]) for name, value in scores.items()}


def _difference(value: float | None, other: float | None) -> float | None:
    return None if value is None or other is None else value - other


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
