"""A row becomes a `Pair`: the same response after the prompt with the profile and after the prompt without it.

The chat template is rendered with a placeholder for each scored turn. The turns are tokenised once and inserted into
both prompts, so that both passes score identical ids by construction, end-of-turn token included.
"""

import itertools
import re
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from perce_lite.data.chat_template import Chat, Span, Turns
from perce_lite.data.pair_cache import PairCache, tokenizer_fingerprint
from perce_lite.data.rows import Message, Profiled, Row, says_something
from perce_lite.errors import DataError, RowRefusedError, TemplateError
from perce_lite.files import digest
from perce_lite.recipe import Recipe, Template

IGNORED = -100
"""Label of a token without loss."""


class Tokens:
    """Ids (T,) and labels (T,), `IGNORED` where there is no loss; immutable, four bytes a number.

    Lists of Python's integers would take nine times that, for as long as the trainer holds its rows.

    prefix_length: number of leading tokens run with the adapter off, the profile included (`profile_pass: frozen`)
    """

    __slots__ = ("_ids", "_labels", "prefix_length")

    def __init__(self, ids: Sequence[int], labels: Sequence[int], prefix_length: int = 0) -> None:
        self._ids, self._labels = array("i", ids), array("i", labels)
        self.prefix_length = prefix_length

    @property
    def ids(self) -> list[int]:
        """Ids (T,), a new list."""
        return self._ids.tolist()

    @property
    def labels(self) -> list[int]:
        """Labels (T,), a new list."""
        return self._labels.tolist()

    def __len__(self) -> int:
        """T."""
        return len(self._ids)

    @property
    def nbytes(self) -> int:
        """Bytes of ids and labels."""
        return 2 * len(self) * self._ids.itemsize

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tokens):
            return NotImplemented
        own_arrays, other_arrays = (self._ids, self._labels), (other._ids, other._labels)
        return own_arrays == other_arrays and self.prefix_length == other.prefix_length

    def __repr__(self) -> str:
        return f"Tokens({self.ids}, {self.labels}, {self.prefix_length})"

    def with_prefix(self, length: int) -> "Tokens":
        """The same ids and labels, of which the first `length` run with the adapter off."""
        return Tokens(self._ids, self._labels, length)

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Ids of the prefix (P,)."""
        return tuple(self._ids[: self.prefix_length])

    @property
    def after_prefix(self) -> "Tokens":
        """Ids and labels after the prefix (T - P,)."""
        return Tokens(self._ids[self.prefix_length :], self._labels[self.prefix_length :])


@dataclass(frozen=True)
class Pair:
    """One row, tokenised twice. Both have the same scored ids, R of them, in the same order.

    profile: text of the profile in the factual prompt
    items_left_out: profile items (of a text profile: words) left out to fit
    broken_tokens: places where user text spelled one of the template's control tokens
    thoughts_left_out: thoughts of the response that the template does not show, as of turns that are not the last
    """

    row: Row
    factual: Tokens
    counterfactual: Tokens
    profile: str
    items_left_out: int
    broken_tokens: int
    thoughts_left_out: int = 0


@dataclass
class Audit:
    """Counts of rows read, rows dropped by user and reason, profile items left out, control tokens broken."""

    read: int = 0
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[tuple[str, str], str] = field(default_factory=dict)
    items_left_out: int = 0
    broken_tokens: int = 0
    thoughts_left_out: int = 0

    def drop(self, row: Row, reason: str) -> None:
        self.dropped[row.user, reason] += 1
        self.examples.setdefault((row.user, reason), row.where)

    def reasons(self) -> str:
        """The reasons for which rows were dropped, with counts and a row each; "" where none was."""
        counts: Counter[str] = Counter()
        for (_, reason), count in self.dropped.items():
            counts[reason] += count
        examples = {reason: where for (_, reason), where in self.examples.items()}
        return "; ".join(f"{count} x {reason} (such as {examples[reason]})" for reason, count in counts.items())

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
            "thoughts_left_out": self.thoughts_left_out,
        }


_CACHE = PairCache()

NO_PROFILE, NO_RESPONSE = "empty profile", "empty response"
TOO_LONG, PROFILE_TOO_LONG = "query and response exceed max_length", "no profile item fits beside query and response"


class PairMaker(Chat):
    """Makes pairs with one tokenizer, one template and one limit.

    max_length: tokens of a whole row, profile included; None: no limit
    max_profile_tokens: tokens of the profile alone; None: no limit
    profile_pass: as in `PerCEConfig`; with "frozen" every sequence has a `prefix_length`
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
        self.frozen_profile = profile_pass == "frozen"
        if self.frozen_profile and not tokenizer.is_fast:
            raise TemplateError(
                f"profile_pass: frozen needs the character offsets of tokens, which {type(tokenizer).__name__} does "
                "not give. Use a model with a fast tokenizer, or profile_pass: full."
            )
        known = tokenizer_fingerprint(tokenizer)
        settings = (self.template.model_dump(mode="json"), max_length, max_profile_tokens, profile_pass)
        self._settings = None if known is None else (known, digest(settings))

    @classmethod
    def of(cls, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> "PairMaker":
        """With the settings of the recipe's training; `max_length` is that of its `PerCEConfig`."""
        return cls(tokenizer, recipe.template, max_length, recipe.profile.max_tokens, recipe.profile_pass)

    def make(self, rows: Sequence[Row], audit: Audit | None = None) -> list[Pair]:
        """The pairs of `rows`, in order; `audit` counts dropped rows by user and reason.

        Raises:
            RowRefusedError: the template refuses every row, and there is no `audit` to say so.
            TemplateError: a profile leaves no trace in the prompt.
        """
        counted, refusals = audit is not None, 0
        audit = audit if audit is not None else Audit()
        pairs = []
        for row in rows:
            audit.read += 1
            try:
                pair = self._cached_pair(row)
            except RowRefusedError as error:
                refusals += 1
                if refusals == len(rows) and not counted:
                    raise
                pair = error.reason
            if isinstance(pair, str):
                audit.drop(row, pair)
                continue
            audit.items_left_out += pair.items_left_out
            audit.broken_tokens += pair.broken_tokens
            audit.thoughts_left_out += pair.thoughts_left_out
            pairs.append(pair)
        return pairs

    def fitting(self, prompt: Sequence[Message], profile: Profiled) -> Profiled:
        """As much of `profile` as fits into a prompt for generation under the limits."""

        def fits(count: int) -> bool:
            part = _first(profile, count)
            if self.max_profile_tokens is not None and len(self.ids(self.profile_text(part))) > self.max_profile_tokens:
                return count == 0
            return count == 0 or self.max_length is None or len(self.prompt_ids(prompt, part)) <= self.max_length

        units = len(profile.split()) if isinstance(profile, str) else len(profile)
        return _first(profile, most_that_fit(units, fits))

    def spans(self, pair: Pair, with_profile: bool) -> list[Span]:
        """One pass of `pair`, decoded from its ids, as spans of text with their kind."""
        tokens = pair.factual if with_profile else pair.counterfactual
        prompt, completion, options, _ = self._cleaned(pair.row)
        profile = pair.profile if with_profile else ""
        contexts = self.segments(prompt, completion, profile, pair.row.where, options)
        turns = self.turns(prompt, completion, profile, pair.row.where, options)
        responses = [(text, "response") for text in turns.responses]
        rendered = contexts[0] + [
            span for response, after in zip(responses, contexts[1:], strict=True) for span in (response, *after)
        ]
        # Tokenizers may normalise text, so the rendered text is decoded from its ids too before the two are compared.
        decoded = [(self._decoded(self.ids(text)), kind) for text, kind in rendered]
        text, kinds = "".join(part for part, _ in decoded), [kind for part, kind in decoded for _ in part]
        spans: list[Span] = []
        at = 0
        runs = itertools.groupby(zip(tokens.ids, tokens.labels, strict=True), lambda token: token[1] != IGNORED)
        for scored, run in runs:
            seen = self._decoded([token_id for token_id, _ in run])
            own = kinds[at : at + len(seen)] if text[at : at + len(seen)] == seen else ["template"] * len(seen)
            pieces = zip(seen, ["response"] * len(seen) if scored else own, strict=True)
            grouped = itertools.groupby(pieces, lambda piece: piece[1])
            spans += [("".join(letter for letter, _ in letters), kind) for kind, letters in grouped]
            at += len(seen)
        return spans

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
                _CACHE.put(key, (), pair)
            else:
                beside = pair.profile, pair.items_left_out, pair.broken_tokens, pair.thoughts_left_out
                _CACHE.put(key, (pair.factual, pair.counterfactual), beside)
            return pair
        passes, beside = cached
        if isinstance(beside, str):
            return beside
        factual, counterfactual = passes
        return Pair(row, factual, counterfactual, *beside)

    def _pair(self, row: Row) -> Pair | str:
        """The pair, or the reason why there is none."""
        if not any(says_something(message) for message in row.completion if message["role"] == "assistant"):
            return NO_RESPONSE
        if not row.profile or not self.profile_text(row.profile).strip():
            return NO_PROFILE
        prompt, completion, options, broken = self._cleaned(row)
        turns = self.turns(prompt, completion, "", row.where, options)
        responses = turns.responses, list(map(self.ids, turns.responses))
        counterfactual = self._tokens(turns, responses, row.where)
        if self.max_length is not None and len(counterfactual) > self.max_length:
            return TOO_LONG
        units = len(row.profile.split()) if isinstance(row.profile, str) else len(row.profile)

        def with_profile(text: str) -> Tokens:
            return self._tokens(self.turns(prompt, completion, text, row.where, options), responses, row.where)

        def fits(profile: Profiled) -> bool:
            text, _ = self.safe_profile(profile)
            if not profile:
                return True
            if self.max_profile_tokens is not None and len(self.ids(text)) > self.max_profile_tokens:
                return False
            if self.max_length is None:
                return True
            return len(with_profile(text).ids) <= self.max_length

        taken = most_that_fit(units, lambda count: fits(_first(row.profile, count)))
        chosen = _first(row.profile, taken)
        text, broken_in_profile = self.safe_profile(chosen)
        if not text.strip() and not isinstance(row.profile, str):
            # The most relevant item is too long by itself or renders as nothing: take the next one that does neither.
            rendered = ((item,) for item in row.profile if self.profile_text((item,)).strip())
            chosen = next((items for items in rendered if fits(items)), ())
            taken = len(chosen)
            text, broken_in_profile = self.safe_profile(chosen)
        if not text.strip():
            return PROFILE_TOO_LONG
        factual = with_profile(text)
        if factual.ids == counterfactual.ids:
            raise TemplateError(
                f"{row.where}: the profile leaves no trace in the prompt: with and without it the template renders "
                "the same text. Try template.position: user, or another template."
            )
        factual = self._with_prefix_length(factual, prompt, completion, text, row.where, options)
        counterfactual = self._with_prefix_length(counterfactual, prompt, completion, "", row.where, options)
        counts = units - taken, broken + broken_in_profile, turns.thoughts_left_out
        return Pair(row, factual, counterfactual, text, *counts)

    def _cleaned(self, row: Row) -> tuple[list[Message], list[Message], dict[str, Any], int]:
        """Prompt, completion and template options with control tokens in user text broken, and the number of those."""
        cleaned = [self.safe_message(message) for message in (*row.prompt, *row.completion)]
        options, count = self._safe_value(row.template_options)
        messages = [message for message, _ in cleaned]
        broken = count + sum(count for _, count in cleaned)
        return messages[: len(row.prompt)], messages[len(row.prompt) :], options, broken

    def _tokens(self, turns: Turns, responses: tuple[list[str], list[list[int]]], where: str) -> Tokens:
        """Ids and labels of one pass.

        responses: the texts of the turns and their ids, the same in both passes
        """
        texts, ids_of_responses = responses
        if turns.responses != texts:
            raise RowRefusedError(where, "the chat template writes a response otherwise with the profile than without")
        ids = self.ids(turns.contexts[0])
        labels = [IGNORED] * len(ids)
        afters = [self.ids(text) for text in turns.contexts[1:]]
        # A control token after inner turns only opens the next turn; it ends none.
        ends_turns = not turns.ends[-1] or self.end_of_turn(afters[-1]) > 0
        by_turn = zip(ids_of_responses, afters, turns.ends, turns.scored, strict=True)
        for response, after, ends_behind, scored in by_turn:
            end = after[: self.end_of_turn(after)] if ends_turns and ends_behind else []
            ids += response + after
            labels += response + end if scored else [IGNORED] * len(response + end)
            labels += [IGNORED] * (len(after) - len(end))
        return _without_tail(ids, labels)

    def prompt(self, prompt: Sequence[Message], profile: Profiled) -> Tokens:
        """Ids of a prompt for generation, with `prefix_length`; nothing is scored."""
        ids = self.prompt_ids(prompt, profile)
        messages = [self.safe_message(message)[0] for message in prompt]
        answer: list[Message] = [{"role": "assistant", "content": "."}]
        tokens = Tokens(ids, [IGNORED] * len(ids))
        return self._with_prefix_length(tokens, messages, answer, self.profile_text(profile), "the prompt")

    def _with_prefix_length(
        self,
        tokens: Tokens,
        prompt: list[Message],
        completion: list[Message],
        profile: str,
        where: str,
        options: Mapping[str, Any] | None = None,
    ) -> Tokens:
        """`tokens` with their `prefix_length`, if `profile_pass` is "frozen"."""
        if not self.frozen_profile:
            return tokens
        context = self.turns(prompt, completion, profile, where, options).contexts[0]
        end = self.activation_offset(context, prompt, completion, profile, where, options)
        return tokens.with_prefix(self._prefix_length(context, end))

    def invocation_ids(self) -> list[int]:
        """Invocation tokens of an activated LoRA: the ids from which on the adapter is on.

        The last token of the system turn and those that open the user turn; empty if the prefix ends with the profile.
        """
        prompts = [self.prompt([{"role": "user", "content": query}], "") for query in ("x", "7")]
        both = zip(*(prompt.after_prefix.ids for prompt in prompts), strict=False)
        shared = [first for first, _ in itertools.takewhile(lambda ids: ids[0] == ids[1], both)]
        while shared and not self.tokenizer.decode(shared[-1:]).strip():  # white space may merge with the query
            shared.pop()
        return shared if prompts[0].prefix_length and len(shared) > 1 and shared[1] in self._control_ids else []

    def _prefix_length(self, context: str, end: int) -> int:
        """Number of tokens of `context` (all text before the first response) that end before the adapter is on.

        end: offset in characters from which on it is on
        """
        read = self.tokenizer(context, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        starts = [start for start, _ in read["offset_mapping"]]
        # A token that spans the boundary carries some of the profile, so it belongs to the prefix.
        first = next((index for index, start in enumerate(starts) if start >= end), len(starts))
        # llama.cpp switches on one token before the invocation tokens, which have to begin with the turn's first token.
        opens_a_turn = 0 < first < len(starts) and read["input_ids"][first] in self._control_ids
        return first - 1 if opens_a_turn else first


def require(pairs: Sequence[Pair], audit: Audit, what: str) -> None:
    """Raises DataError with every reason if `pairs` is empty."""
    if pairs:
        return
    reasons = {reason for _, reason in audit.dropped}
    mend = " Raise train.max_length." if TOO_LONG in reasons or PROFILE_TOO_LONG in reasons else ""
    raise DataError(f"No {what} rows are left of {audit.read}: {audit.reasons() or 'there were none'}.{mend}")


def _first(profile: Profiled, count: int) -> Profiled:
    """The first `count` units: words of a text, items of a list."""
    if not isinstance(profile, str):
        return profile[:count]
    words = re.findall(r"\s*\S+", profile)
    return "".join(words[:count]).strip()


def most_that_fit(total: int, fits: Callable[[int], bool]) -> int:
    """The largest count from 0 to `total` for which `fits` holds, by bisection; 0 always fits."""
    if fits(total):
        return total
    low, high = 0, total  # low fits, high does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _without_tail(ids: list[int], labels: list[int]) -> Tokens:
    """Cuts the tokens after the last scored one, which would be computed for nothing."""
    last = max(index for index, label in enumerate(labels) if label != IGNORED)
    return Tokens(ids[: last + 1], labels[: last + 1])
