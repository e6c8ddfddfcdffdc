"""A row becomes a `Pair`: the same response behind the prompt with the profile and behind the one without.

The chat template is rendered with a placeholder for each scored turn; the turns are tokenised once and put into both
prompts, so that both passes score identical ids by construction, end-of-turn token included.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from perce_lite.data.chat_template import Chat, Span
from perce_lite.data.pair_cache import PairCache, tokenizer_fingerprint
from perce_lite.data.rows import Message, Profiled, Row
from perce_lite.errors import DataError, TemplateError
from perce_lite.files import digest
from perce_lite.recipe import Recipe, Template

IGNORED = -100
"""Label of a token that carries no loss."""


class Tokens(NamedTuple):
    """Ids (T,) and labels (T,), `IGNORED` where no loss falls.

    prefix: how many of them, the profile's among these, an adapter sleeps through (`profile_pass: frozen`)
    """

    ids: list[int]
    labels: list[int]
    prefix_length: int = 0

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Ids of the prefix (P,)."""
        return tuple(self.ids[: self.prefix_length])

    @property
    def after_prefix(self) -> "Tokens":
        """What follows the prefix (T - P,)."""
        return Tokens(self.ids[self.prefix_length :], self.labels[self.prefix_length :])


@dataclass(frozen=True)
class Pair:
    """One row, tokenised twice. Both have the same scored ids, R of them, in the same order.

    profile: the profile's text as it stands in the factual prompt
    items_left_out: profile items (of a text profile: words) left out to fit
    broken_tokens: places where user text spelled one of the template's control tokens
    """

    row: Row
    factual: Tokens
    counterfactual: Tokens
    profile: str
    items_left_out: int
    broken_tokens: int


@dataclass
class Audit:
    """What became of the rows: counts by user and reason, items left out, control tokens broken."""

    read: int = 0
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[tuple[str, str], str] = field(default_factory=dict)
    items_left_out: int = 0
    broken_tokens: int = 0

    def drop(self, row: Row, reason: str) -> None:
        self.dropped[row.user, reason] += 1
        self.examples.setdefault((row.user, reason), row.where)

    def summary(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "read": self.read,
            "kept": self.read - self.dropped.total(),
            "dropped": [
                {"user": user, "reason": reason, "rows": count, "such_as": self.examples[user, reason]}
                for (user, reason), count in sorted(self.dropped.items())
            ],
            "profile_items_left_out": self.items_left_out,
            "control_tokens_broken": self.broken_tokens,
        }


_CACHE = PairCache()

NO_PROFILE, NO_RESPONSE = "empty profile", "empty response"
TOO_LONG, PROFILE_TOO_LONG = "query and response exceed max_length", "no profile item fits beside query and response"


class PairMaker(Chat):
    """Makes pairs with one tokenizer, one template and one limit.

    max_length: tokens of a whole row, profile included; None: no limit
    max_profile_tokens: tokens of the profile alone; None: no limit
    profile_pass: that of `PerCEConfig`; with "frozen" every sequence says where its prefix ends
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template | None = None,
        max_length: int | None = None,
        max_profile_tokens: int | None = None,
        profile_pass: str = "full",
    ) -> None:
        super().__init__(tokenizer, template)
        self.max_length = max_length
        self.max_profile_tokens = max_profile_tokens
        self.sleeps = profile_pass == "frozen"
        if self.sleeps and not tokenizer.is_fast:
            raise TemplateError(
                f"profile_pass: frozen has to know where in the text a token stands, which {type(tokenizer).__name__} "
                "does not tell. Use a model with a fast tokenizer, or profile_pass: full."
            )
        known = tokenizer_fingerprint(tokenizer)
        settings = (self.template.model_dump(mode="json"), max_length, max_profile_tokens, profile_pass)
        self._settings = None if known is None else (known, digest(settings))

    @classmethod
    def of(cls, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> "PairMaker":
        """As the recipe's training makes them; `max_length` is that of its `PerCEConfig`."""
        return cls(tokenizer, recipe.template, max_length, recipe.profile.max_tokens, recipe.profile_pass)

    def make(self, rows: Sequence[Row], audit: Audit | None = None) -> list[Pair]:
        """The pairs of `rows`, in order; `audit` counts those that are dropped, by user and reason.

        Raises:
            TemplateError: the template refuses a row, or its profile leaves no trace in the prompt.
        """
        audit = audit if audit is not None else Audit()
        made = []
        for row in rows:
            audit.read += 1
            pair = self._cached_pair(row)
            if isinstance(pair, str):
                audit.drop(row, pair)
                continue
            audit.items_left_out += pair.items_left_out
            audit.broken_tokens += pair.broken_tokens
            made.append(pair)
        return made

    def fitting(self, prompt: Sequence[Message], profile: Profiled) -> Profiled:
        """As much of `profile` as the limits leave room for in a prompt that waits for an answer."""

        def fits(count: int) -> bool:
            part = _first(profile, count)
            if self.max_profile_tokens is not None and len(self.ids(self.profile_text(part))) > self.max_profile_tokens:
                return count == 0
            return count == 0 or self.max_length is None or len(self.prompt_ids(prompt, part)) <= self.max_length

        units = len(profile.split()) if isinstance(profile, str) else len(profile)
        return _first(profile, most_that_fit(units, fits))

    def spans(self, pair: Pair, with_profile: bool) -> list[Span]:
        """The row of `pair` as one pass sees it, decoded from its very ids, in spans that say what each piece is."""
        tokens = pair.factual if with_profile else pair.counterfactual
        prompt, completion, _ = self._cleaned(pair.row)
        contexts = self.segments(prompt, completion, pair.profile if with_profile else "", pair.row.where)
        responses = [(one["content"].strip(), "response") for one in completion if one["role"] == "assistant"]
        rendered = contexts[0] + [
            span for response, after in zip(responses, contexts[1:], strict=True) for span in (response, *after)
        ]
        # A tokenizer may normalise: what is decoded has to be found in what was rendered.
        decoded = [(self._decoded(self.ids(text)), kind) for text, kind in rendered]
        text, kinds = "".join(part for part, _ in decoded), [kind for part, kind in decoded for _ in part]
        spans: list[Span] = []
        at = 0
        runs = itertools.groupby(zip(tokens.ids, tokens.labels, strict=True), lambda one: one[1] != IGNORED)
        for scored, run in runs:
            seen = self._decoded([one for one, _ in run])
            own = kinds[at : at + len(seen)] if text[at : at + len(seen)] == seen else ["template"] * len(seen)
            pieces = zip(seen, ["response"] * len(seen) if scored else own, strict=True)
            grouped = itertools.groupby(pieces, lambda one: one[1])
            spans += [("".join(letter for letter, _ in letters), kind) for kind, letters in grouped]
            at += len(seen)
        return spans

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    # One row

    def _cached_pair(self, row: Row) -> Pair | str:
        """As `_pair`, made once a process for rows of equal content."""
        if self._settings is None:
            return self._pair(row)
        key = self._settings, row.fingerprint()
        cached = _CACHE.get(key)
        if cached is None:
            pair = self._pair(row)
            if isinstance(pair, str):
                _CACHE.put(key, [], pair)
            else:
                passes = (pair.factual, pair.counterfactual)
                prefixes = [tokens.prefix_length for tokens in passes]
                beside = (prefixes, pair.profile, pair.items_left_out, pair.broken_tokens)
                _CACHE.put(key, [sequence for tokens in passes for sequence in (tokens.ids, tokens.labels)], beside)
            return pair
        sequences, beside = cached
        if isinstance(beside, str):
            return beside
        (factual, counterfactual), *rest = beside
        ids, labels, other_ids, other_labels = sequences
        return Pair(row, Tokens(ids, labels, factual), Tokens(other_ids, other_labels, counterfactual), *rest)

    def _pair(self, row: Row) -> Pair | str:
        """The pair, or the reason why there is none."""
        scored = [one for one in row.completion if one["role"] == "assistant"]
        if not any(one["content"].strip() for one in scored):
            return NO_RESPONSE
        if not row.profile or not self.profile_text(row.profile).strip():
            return NO_PROFILE
        prompt, completion, broken = self._cleaned(row)
        responses = [self.ids(one["content"].strip()) for one in completion if one["role"] == "assistant"]
        counterfactual = self._tokens(prompt, completion, "", responses, row.where)
        if self.max_length is not None and len(counterfactual.ids) > self.max_length:
            return TOO_LONG
        units = len(row.profile.split()) if isinstance(row.profile, str) else len(row.profile)

        def fits(profile: Profiled) -> bool:
            text, _ = self.safe_profile(profile)
            if not profile:
                return True
            if self.max_profile_tokens is not None and len(self.ids(text)) > self.max_profile_tokens:
                return False
            if self.max_length is None:
                return True
            return len(self._tokens(prompt, completion, text, responses, row.where).ids) <= self.max_length

        taken = most_that_fit(units, lambda count: fits(_first(row.profile, count)))
        chosen = _first(row.profile, taken)
        text, broken_in_profile = self.safe_profile(chosen)
        if not text.strip() and not isinstance(row.profile, str):
            # The nearest item alone is too long, or shows nothing in the template: the next that does neither.
            seen = ((item,) for item in row.profile if self.profile_text((item,)).strip())
            chosen = next((one for one in seen if fits(one)), ())
            taken = len(chosen)
            text, broken_in_profile = self.safe_profile(chosen)
        if not text.strip():
            return PROFILE_TOO_LONG
        factual = self._tokens(prompt, completion, text, responses, row.where)
        if factual.ids == counterfactual.ids:
            raise TemplateError(
                f"{row.where}: the profile leaves no trace in the prompt: with and without it the template renders "
                "the same text. Try template.position: user, or another template."
            )
        factual = self._asleep(factual, prompt, completion, text, row.where)
        counterfactual = self._asleep(counterfactual, prompt, completion, "", row.where)
        return Pair(row, factual, counterfactual, text, units - taken, broken + broken_in_profile)

    def _cleaned(self, row: Row) -> tuple[list[Message], list[Message], int]:
        """Prompt and completion with control tokens in user text broken, and how many there were."""
        cleaned, count = [], 0
        for one in (*row.prompt, *row.completion):
            content, broken = self.safe(one["content"])
            cleaned.append({"role": self.safe(one["role"])[0], "content": content})
            count += broken
        return cleaned[: len(row.prompt)], cleaned[len(row.prompt) :], count

    def _tokens(
        self, prompt: list[Message], completion: list[Message], profile: str, responses: list[list[int]], where: str
    ) -> Tokens:
        """Ids and labels of one pass. `profile` is the text as it stands in the prompt, empty for the one without."""
        contexts = self.contexts(prompt, completion, profile, where)
        ids = self.ids(contexts[0])
        labels = [IGNORED] * len(ids)
        afters = [self.ids(text) for text in contexts[1:]]
        # A token that stands behind inner turns alone opens the next one; it ends none.
        ends_turns = self.end_of_turn(afters[-1]) > 0
        for response, after in zip(responses, afters, strict=True):
            end = after[: self.end_of_turn(after)] if ends_turns else []
            ids += response + after
            labels += response + end + [IGNORED] * (len(after) - len(end))
        return _without_tail(ids, labels)

    def prompt(self, prompt: Sequence[Message], profile: Profiled) -> Tokens:
        """As `prompt_ids`, with the prefix that an adapter sleeps through; nothing in it is scored."""
        ids = self.prompt_ids(prompt, profile)
        messages = [{"role": self.safe(one["role"])[0], "content": self.safe(one["content"])[0]} for one in prompt]
        answer: list[Message] = [{"role": "assistant", "content": "."}]
        asked = Tokens(ids, [IGNORED] * len(ids))
        return self._asleep(asked, messages, answer, self.profile_text(profile), "the prompt")

    def _asleep(
        self, tokens: Tokens, prompt: list[Message], completion: list[Message], profile: str, where: str
    ) -> Tokens:
        """`tokens` of that prompt, with the prefix that an adapter sleeps through, if it does."""
        if not self.sleeps:
            return tokens
        context = self.contexts(prompt, completion, profile, where)[0]
        return tokens._replace(prefix_length=self._prefix(context, prompt, completion, profile, where))

    def invocation(self) -> list[int]:
        """Ids at whose start an adapter wakes, for programs that look for them (activated LoRA).

        The last token of the system's turn, and what opens the user's; empty where only the profile's end says it.
        """
        asked = [self.prompt([{"role": "user", "content": query}], "") for query in ("x", "7")]
        both = zip(*(one.after_prefix.ids for one in asked), strict=False)
        shared = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both)]
        while shared and not self.tokenizer.decode(shared[-1:]).strip():  # it may melt into what the query begins with
            shared.pop()
        return shared if asked[0].prefix_length and len(shared) > 1 and shared[1] in self._control_ids else []

    def _prefix(self, context: str, prompt: list[Message], completion: list[Message], profile: str, where: str) -> int:
        """How many tokens of `context`, all that stands before the first response, end before the first query."""
        end = self.wakes_at(context, prompt, completion, profile, where)
        read = self.tokenizer(context, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts = [start for start, _ in read["offset_mapping"]]
        # A token that reaches over the end carries some of the profile, so it belongs to the prefix.
        first = next((index for index, start in enumerate(starts) if start >= end), len(starts))
        # llama.cpp wakes one token ahead of what it looks for, and that is to be the token that opens the turn.
        opens_a_turn = 0 < first < len(starts) and read["input_ids"][first] in self._control_ids
        return first - 1 if opens_a_turn else first


def require(pairs: Sequence[Pair], audit: Audit, what: str) -> None:
    """Raises DataError with every reason where `pairs` is empty."""
    if pairs:
        return
    reasons: Counter[str] = Counter()
    examples = {reason: where for (_, reason), where in audit.examples.items()}
    for (_, reason), count in audit.dropped.items():
        reasons[reason] += count
    told = "; ".join(f"{count} x {reason} (such as {examples[reason]})" for reason, count in reasons.items())
    mend = " Raise train.max_length." if TOO_LONG in reasons or PROFILE_TOO_LONG in reasons else ""
    raise DataError(f"No {what} rows are left of {audit.read}: {told or 'there were none'}.{mend}")


def _first(profile: Profiled, count: int) -> Profiled:
    """The first `count` units: words of a text, items of a list."""
    if not isinstance(profile, str):
        return profile[:count]
    words = re.findall(r"\s*\S+", profile)
    return "".join(words[:count]).strip()


def most_that_fit(total: int, fits: Callable[[int], bool]) -> int:
    """The largest count from 0 to `total` for which `fits` holds; 0 always fits, and fewer do where more do."""
    if fits(total):
        return total
    low, high = 0, total  # low fits (nothing is always allowed), high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _without_tail(ids: list[int], labels: list[int]) -> Tokens:
    """Cuts what follows the last scored token: it would be computed for nothing."""
    last = max(index for index, label in enumerate(labels) if label != IGNORED)
    return Tokens(ids[: last + 1], labels[: last + 1])
