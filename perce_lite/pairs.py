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

from jinja2.exceptions import TemplateError as JinjaError
from transformers import PreTrainedTokenizerBase

from perce_lite.errors import DataError, TemplateError
from perce_lite.profiles import Item
from perce_lite.recipe import Template
from perce_lite.rows import Message, Profiled, Row

IGNORED = -100
"""Label of a token that carries no loss."""


class Tokens(NamedTuple):
    """Ids (T,) and labels (T,), `IGNORED` where no loss falls."""

    ids: list[int]
    labels: list[int]


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


NO_PROFILE, NO_RESPONSE = "empty profile", "empty response"
TOO_LONG, PROFILE_TOO_LONG = "query and response exceed max_length", "no profile item fits beside query and response"


class PairMaker:
    """Makes pairs with one tokenizer, one template and one limit.

    max_length: tokens of a whole row, profile included; None: no limit
    max_profile_tokens: tokens of the profile alone; None: no limit

    Raises:
        TemplateError: the tokenizer has no chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template | None = None,
        max_length: int | None = None,
        max_profile_tokens: int | None = None,
    ) -> None:
        if not tokenizer.chat_template:
            raise TemplateError(
                f"The tokenizer of {tokenizer.name_or_path} has no chat template, so there are no turns to score. Use "
                "an instruct model, or set tokenizer.chat_template (train.chat_template_path: template.jinja)."
            )
        self.tokenizer = tokenizer
        self.template = template or Template()
        self.max_length = max_length
        self.max_profile_tokens = max_profile_tokens
        self._control = _control_tokens(tokenizer)
        self._control_ids = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        takes_system, self._own_system = self._template_system()
        auto = "system" if takes_system else "user"
        self._position = auto if self.template.position == "auto" else self.template.position
        self._system = (self.template.system or "") if takes_system else ""

    def make(self, rows: Sequence[Row], audit: Audit | None = None) -> list[Pair]:
        """The pairs of `rows`, in order; `audit` counts those that are dropped, by user and reason.

        Raises:
            TemplateError: the template refuses a row, or its profile leaves no trace in the prompt.
        """
        audit = audit if audit is not None else Audit()
        made = []
        for row in rows:
            audit.read += 1
            pair = self._pair(row)
            if isinstance(pair, str):
                audit.drop(row, pair)
                continue
            audit.items_left_out += pair.items_left_out
            audit.broken_tokens += pair.broken_tokens
            made.append(pair)
        return made

    def prompt_ids(self, prompt: Sequence[Message], profile: Profiled) -> list[int]:
        """Ids (T,) of a prompt that waits for an answer, `profile` in it where there is one; for generation."""
        text, _ = self._safe_profile(profile)
        messages = [{**one, "content": self._safe(one["content"])[0]} for one in prompt]
        composed = self._messages(messages, text, "the prompt")
        return self._ids(self._render(composed, "the prompt", add_generation_prompt=True))

    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the tokenizer's own, and the template's end-of-turn token."""
        turn = [{"role": "user", "content": "x"}], [{"role": "assistant", "content": "y"}]
        after = self._ids(self._contexts(*turn, "", "a short conversation")[1])
        ends = [self.tokenizer.eos_token_id, *after[: self._end_of_turn(after)][-1:]]
        return sorted({one for one in ends if one is not None})

    def profile_text(self, profile: Profiled) -> str:
        """The profile as it stands in the prompt; empty where there is none."""
        return self._safe_profile(profile)[0]

    # One row

    def _pair(self, row: Row) -> Pair | str:
        """The pair, or the reason why there is none."""
        scored = [one for one in row.completion if one["role"] == "assistant"]
        if not any(one["content"].strip() for one in scored):
            return NO_RESPONSE
        if not row.profile or not self.profile_text(row.profile).strip():
            return NO_PROFILE
        prompt, completion, broken = self._cleaned(row)
        responses = [self._ids(one["content"].strip()) for one in completion if one["role"] == "assistant"]
        counterfactual = self._tokens(prompt, completion, "", responses, row.where)
        if self.max_length is not None and len(counterfactual.ids) > self.max_length:
            return TOO_LONG
        units = len(row.profile.split()) if isinstance(row.profile, str) else len(row.profile)

        def fits(profile: Profiled) -> bool:
            text, _ = self._safe_profile(profile)
            if not profile:
                return True
            if self.max_profile_tokens is not None and len(self._ids(text)) > self.max_profile_tokens:
                return False
            if self.max_length is None:
                return True
            return len(self._tokens(prompt, completion, text, responses, row.where).ids) <= self.max_length

        taken = _most_that_fit(units, lambda count: fits(_first(row.profile, count)))
        chosen = _first(row.profile, taken)
        text, broken_in_profile = self._safe_profile(chosen)
        if not text.strip() and not isinstance(row.profile, str):
            # The nearest item alone is too long, or shows nothing in the template: the next that does neither.
            seen = ((item,) for item in row.profile if self.profile_text((item,)).strip())
            chosen = next((one for one in seen if fits(one)), ())
            taken = len(chosen)
            text, broken_in_profile = self._safe_profile(chosen)
        if not text.strip():
            return PROFILE_TOO_LONG
        factual = self._tokens(prompt, completion, text, responses, row.where)
        if factual.ids == counterfactual.ids:
            raise TemplateError(
                f"{row.where}: the profile leaves no trace in the prompt: with and without it the template renders "
                "the same text. Try template.position: user, or another template."
            )
        return Pair(row, factual, counterfactual, text, units - taken, broken + broken_in_profile)

    def _cleaned(self, row: Row) -> tuple[list[Message], list[Message], int]:
        """Prompt and completion with control tokens in user text broken, and how many there were."""
        cleaned, count = [], 0
        for one in (*row.prompt, *row.completion):
            content, broken = self._safe(one["content"])
            cleaned.append({"role": self._safe(one["role"])[0], "content": content})
            count += broken
        return cleaned[: len(row.prompt)], cleaned[len(row.prompt) :], count

    def _tokens(
        self, prompt: list[Message], completion: list[Message], profile: str, responses: list[list[int]], where: str
    ) -> Tokens:
        """Ids and labels of one pass. `profile` is the text as it stands in the prompt, empty for the one without."""
        contexts = self._contexts(prompt, completion, profile, where)
        ids = self._ids(contexts[0])
        labels = [IGNORED] * len(ids)
        for response, text in zip(responses, contexts[1:], strict=True):
            after = self._ids(text)
            end = after[: self._end_of_turn(after)]
            ids += response + after
            labels += response + end + [IGNORED] * (len(after) - len(end))
        return _without_tail(ids, labels)

    def _end_of_turn(self, after: list[int]) -> int:
        """How many of the ids behind a response end its turn: up to the first control token, if it stands first.

        Some templates put a space ahead of it.
        """
        first = next((index for index, one in enumerate(after) if one in self._control_ids), None)
        stands_first = first is not None and not self.tokenizer.decode(after[:first]).strip()
        return first + 1 if first is not None and stands_first else 0

    def _contexts(self, prompt: list[Message], completion: list[Message], profile: str, where: str) -> list[str]:
        """The rendered text around the scored turns: n + 1 pieces for n turns."""
        spoken = "".join(one["content"] for one in self._messages([*prompt, *completion], profile, where))
        mark = next(mark for n in range(10**6) if (mark := f"response{n}slot") not in spoken)
        turns = iter(range(len(completion)))
        marked = [
            {**one, "content": f"{mark}{next(turns)}."} if one["role"] == "assistant" else one for one in completion
        ]
        messages = self._messages([*prompt, *marked], profile, where)
        pieces = re.split(rf"{mark}\d+\.", self._render(messages, where))
        expected = sum(one["role"] == "assistant" for one in completion) + 1
        if len(pieces) != expected:
            raise TemplateError(
                f"{where}: the chat template shows {len(pieces) - 1} of {expected - 1} assistant turns; a dialogue "
                "needs a template that keeps them all"
            )
        if expected == 2:  # what precedes a single answer is exactly what generation will see
            ahead = list(itertools.takewhile(lambda one: one["role"] != "assistant", completion))
            asked = self._messages([*prompt, *ahead], profile, where)
            pieces[0] = self._render(asked, where, add_generation_prompt=True)
        return pieces

    # Text

    def _messages(self, messages: Sequence[Message], profile: str, where: str) -> list[Message]:
        """`messages` with the profile where the template puts it, and the same system message in both passes."""
        said = profile and self.template.profile.replace("{profile}", profile)
        rest = list(messages)
        system = rest.pop(0)["content"] if rest and rest[0]["role"] == "system" else self._system
        given = len(rest) < len(messages)
        if self._position == "system":
            system = self.template.separator.join(part for part in (system or self._own_system, said) if part)
        elif said:
            at = next((index for index, one in enumerate(rest) if one["role"] == "user"), None)
            if at is None:
                raise TemplateError(f"{where}: template.position is user, but there is no user message for the profile")
            rest[at] = {**rest[at], "content": f"{said}{self.template.separator}{rest[at]['content']}"}
        first = [{"role": "system", "content": system}] if system or given else []
        # Once more: two harmless halves may have met.
        return [{**one, "content": self._safe(one["content"])[0]} for one in [*first, *rest]]

    def _render(self, messages: list[Message], where: str, add_generation_prompt: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.template.chat_template_kwargs,
            )
        except JinjaError as error:
            roles = ", ".join(one["role"] for one in messages)
            raise TemplateError(f"{where}: the chat template refuses the messages ({roles}): {error}") from error
        return str(text)

    def _template_system(self) -> tuple[bool, str]:
        """Whether the chat template shows a system message, and the text that it puts in where there is none."""
        user = {"role": "user", "content": "x"}
        try:
            before, shown, after = self._render([{"role": "system", "content": "probe7"}, user], "").partition("probe7")
        except TemplateError:
            return False, ""
        bare = self._render([user], "the template")
        fills_in = shown and bare.startswith(before) and bare.endswith(after) and len(bare) > len(before) + len(after)
        return bool(shown), bare[len(before) : len(bare) - len(after)] if fills_in else ""

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _safe_profile(self, profile: Profiled) -> tuple[str, int]:
        return self._safe(format_profile(profile, self.template))

    def _safe(self, text: str) -> tuple[str, int]:
        """`text` with a space inside everything that spells a control token, and how many there were.

        A lone surrogate, which no tokenizer takes, becomes a question mark.
        """
        text = text.encode("utf-8", "replace").decode("utf-8") if not text.isascii() else text
        broken = 0
        while True:  # a break may not make a new one; a few rounds settle even nested spellings
            text, found = self._control.subn(lambda match: re.sub(r"(?<=\S)", " ", match[0], count=1), text)
            broken += found
            if not found:
                return text, broken


def format_profile(profile: Profiled, template: Template) -> str:
    """A profile as one text: a text as it is, items by `template.item`, in order."""
    if isinstance(profile, str):
        return profile

    def shown(item: Item) -> str:
        fields = {"{title}": item.title, "{text}": item.text}
        return re.sub(r"\{title\}|\{text\}", lambda match: fields[match[0]], template.item).strip()

    return template.separator.join(filter(None, map(shown, profile)))


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


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """What user text must not spell: special tokens, and added ones that the chat template itself writes."""
    source = str(tokenizer.chat_template)
    words = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if len(token.content.strip()) > 1 and (token.special or token.content in source)
    }
    words |= {token for token in tokenizer.all_special_tokens if len(token.strip()) > 1}
    if not words:
        return re.compile(r"(?!)")
    return re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)))


def _first(profile: Profiled, count: int) -> Profiled:
    """The first `count` units: words of a text, items of a list."""
    if not isinstance(profile, str):
        return profile[:count]
    words = re.findall(r"\s*\S+", profile)
    return "".join(words[:count]).strip()


def _most_that_fit(total: int, fits: Callable[[int], bool]) -> int:
    """The largest count from 0 to `total` for which `fits` holds; fewer always fit where more do."""
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
