"""Chat templates: messages with a profile become text and ids; user text never becomes control tokens."""

import datetime
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jinja2.exceptions import TemplateError as JinjaError
from transformers import PreTrainedTokenizerBase

from perce_lite.data.retrieval import Item
from perce_lite.data.rows import Message, Profiled, content_of, says_something
from perce_lite.errors import RowRefusedError, TemplateError
from perce_lite.recipe import Template

Span = tuple[str, str]
"""A piece of text and its kind: template, profile, query (a user message) or response."""


class Turns(NamedTuple):
    """A dialogue as its chat template renders it, cut at the assistant turns of the completion.

    contexts: the text around the turns, n + 1 pieces for n turns; each but the last ends with a generation prompt
    responses: the turns, with what the template writes between its generation prompt and their text (TRL scores it too)
    ends: of each turn, whether what ends it stands in the context behind it
    scored: of each turn, whether it says something
    thoughts_left_out: number of thoughts that the template does not show
    """

    contexts: list[str]
    responses: list[str]
    ends: list[bool]
    scored: list[bool]
    thoughts_left_out: int


class Chat:
    """A tokenizer's chat template, and the place of a profile in it.

    Raises:
        TemplateError: the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template | None = None) -> None:
        if not tokenizer.chat_template:
            raise TemplateError(
                f"The tokenizer of {tokenizer.name_or_path} has no chat template, so there are no turns to score. Use "
                "an instruct model, or set tokenizer.chat_template (train.chat_template_path: template.jinja)."
            )
        self.tokenizer = tokenizer
        self.template = template or Template()
        self._source = dated(str(tokenizer.chat_template), self.template.date)
        self._control = _control_tokens(tokenizer)
        self._thought = _thoughts(tokenizer)
        self._control_ids = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        takes_system, self._own_system = self._template_system()
        auto = "system" if takes_system else "user"
        self._position = auto if self.template.position == "auto" else self.template.position
        self._system = (self.template.system or "") if takes_system else ""

    def prompt_ids(
        self, prompt: Sequence[Message], profile: Profiled, options: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Ids (T,) of a prompt for generation, with `profile` unless it is empty.

        options: a row's `template_options`
        """
        return self.ids(self.render(self.composed(prompt, profile), "the prompt", True, options))

    def composed(self, prompt: Sequence[Message], profile: Profiled) -> list[Message]:
        """The messages of a prompt as they are passed to the chat template, with `profile` unless it is empty."""
        text, _ = self.safe_profile(profile)
        return self._messages([self.safe_message(message)[0] for message in prompt], text, "the prompt")

    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the tokenizer's own, and the template's end-of-turn token."""
        ends = [self.tokenizer.eos_token_id, *self._closing_ids[-1:]]
        return sorted({token_id for token_id in ends if token_id is not None})

    def end_of_turn_id(self) -> int | None:
        """The token with which the template ends a turn; None where it ends with none."""
        return next(iter(self._closing_ids[-1:]), None)

    def profile_text(self, profile: Profiled) -> str:
        """The profile as text of the prompt, control tokens broken; may be empty."""
        return self.safe_profile(profile)[0]

    def end_of_turn(self, after: list[int]) -> int:
        """Number of ids after a response that end its turn: up to the first control token, after white space at most.

        Where the template ends its last turn with several control tokens, as Cohere's, all of them.

        after: ids between a response and the next
        """
        first = self._first_control(after)
        if first == 0:
            return 0
        more = zip(after[first:], self._closing_ids[self._first_control(self._closing_ids) :], strict=False)
        is_same = after[:first] == self._closing_ids[:first]
        return first + (sum(1 for _ in itertools.takewhile(lambda ids: ids[0] == ids[1], more)) if is_same else 0)

    @functools.cached_property
    def _closing_ids(self) -> list[int]:
        """The ids with which a rendered dialogue ends its last turn, without what white space follows."""
        turn = [{"role": "user", "content": "x"}], [{"role": "assistant", "content": "y"}]
        try:
            after = self.ids(self.turns(*turn, "", "a short conversation").contexts[1])
        except RowRefusedError:  # it asks for more than a question and its answer
            return []
        first = self._first_control(after)
        return after[:first] + list(itertools.takewhile(self._control_ids.__contains__, after[first:]))

    def _first_control(self, after: list[int]) -> int:
        """Number of ids up to the first control token, after white space at most."""
        first = next((index for index, token_id in enumerate(after) if token_id in self._control_ids), None)
        stands_first = first is not None and not self.tokenizer.decode(after[:first]).strip()
        return first + 1 if first is not None and stands_first else 0

    def turns(
        self,
        prompt: list[Message],
        completion: list[Message],
        profile: str,
        where: str,
        options: Mapping[str, Any] | None = None,
    ) -> Turns:
        """The dialogue as rendered, cut at the assistant turns of `completion`.

        Turns of text are found by a marker in their place, so that a template cannot change what is scored; turns with
        tool calls or thoughts by what stands around a marker that takes the whole turn's place.

        Raises:
            RowRefusedError: the template refuses the messages or leaves out a turn.
        """
        mark = self._unused_marker("response", [*prompt, *completion], profile, where)
        replies = [message for message in completion if message["role"] == "assistant"]
        plain = [not self._is_rich(message) for message in replies]
        messages = self._messages([*prompt, *_marked(completion, mark, plain)], profile, where)
        text = self.render(messages, where, options=options)
        shown = [text.count(f"{mark}{number}.") == 1 for number, is_plain in enumerate(plain) if is_plain]
        if not all(shown):
            raise RowRefusedError(
                where, f"the chat template shows {sum(shown)} of {len(shown)} assistant turns, and {_KEEPS}"
            )
        spans: list[tuple[int, int, bool]] = []
        first = len(messages) - len(completion)
        places = [first + at for at, message in enumerate(completion) if message["role"] == "assistant"]
        for number, (place, is_plain) in enumerate(zip(places, plain, strict=True)):
            prompted = self.render(messages[:place], where, True, options)
            if is_plain:
                at = text.index(f"{mark}{number}.")
                span = _common(prompted, text[:at]), at + len(f"{mark}{number}."), True
            else:
                span = self._rich_span(text, messages, place, f"{mark}{number}.", prompted, where, options)
            spans.append((_without_merges(text, prompted, span[0]), *span[1:]))
        edges = [0, *(edge for start, end, _ in spans for edge in (start, end)), len(text)]
        if edges != sorted(edges):
            raise RowRefusedError(
                where, f"the chat template does not show the assistant turns in their order, and {_KEEPS}"
            )
        contexts = [text[start:end] for start, end in zip(edges[::2], edges[1::2], strict=True)]
        responses = [
            text[start:end].replace(f"{mark}{number}.", content_of(replies[number]).strip())
            for number, (start, end, _) in enumerate(spans)
        ]
        hidden = sum(
            thought not in response
            for message, response in zip(replies, responses, strict=True)
            for thought in self._thoughts_of(message)
        )
        return Turns(contexts, responses, [ends for _, _, ends in spans], list(map(says_something, replies)), hidden)

    def _thoughts_of(self, message: Message) -> list[str]:
        """The thoughts of an assistant turn, less the white space around them."""
        inline = self._thought.match(content_of(message))
        thoughts = [message.get("reasoning_content"), message.get("thinking"), inline and inline["thought"]]
        return [thought.strip() for thought in thoughts if thought]

    def _is_rich(self, message: Message) -> bool:
        """Whether an assistant turn is more than a text: a chat template renders the rest in its own way."""
        return bool(message.get("tool_calls") or self._thoughts_of(message))

    def _rich_span(
        self,
        text: str,
        messages: list[Message],
        place: int,
        mark: str,
        prompted: str,
        where: str,
        options: Mapping[str, Any] | None,
    ) -> tuple[int, int, bool]:
        """Start and end in `text` of the turn at `place`, and whether what ends the turn stands behind it.

        prompted: the messages ahead of it with a generation prompt
        """
        marked = [*messages[:place], {"role": "assistant", "content": mark}]
        try:
            before, middle, after = self.render([*marked, *messages[place + 1 :]], where, options=options).partition(
                mark
            )
        except RowRefusedError:  # a tool's answer without its call
            before, middle, after = *self.render(marked, where, options=options).partition(mark)[:2], None
        behind = None
        if after is not None:
            ids = self.ids(after)
            end_of_turn = after[len(self._decoded(ids[: self.end_of_turn(ids)])) :]
            behind = next((rest for rest in (after, end_of_turn) if text.endswith(rest)), None)
        if behind is None:  # Gemma 4 ends a tool call in a way of its own
            until = self.render(messages[: place + 1], where, options=options)
            behind = text.removeprefix(until) if text.startswith(until) else None
        start = len(prompted) if text.startswith(prompted) else min(_common(prompted, before), _common(before, text))
        if not middle or behind is None or start > len(text) - len(behind):
            raise RowRefusedError(
                where, f"the chat template does not show a turn with tool calls or thoughts, and {_KEEPS}"
            )
        span = start, len(text) - len(behind), behind == after
        for call in messages[place].get("tool_calls") or ():
            name = str(call.get("function", call).get("name"))
            if name not in text[slice(*span[:2])]:
                raise RowRefusedError(where, "the chat template leaves out tool calls, which would not be trained on")
        return span

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def segments(
        self,
        prompt: list[Message],
        completion: list[Message],
        profile: str,
        where: str,
        options: Mapping[str, Any] | None = None,
    ) -> list[list[Span]]:
        """The contexts of `turns` as spans with their kind; exact for any text of query and profile.

        The messages are rendered once more with placeholders for the profile and the user messages. If a template does
        more to a text than trimming it, the whole context around it is one span of kind "template".
        """
        messages = [*prompt, *completion]
        contents = [profile, *(content_of(message) for message in messages if message["role"] == "user")]
        mark = self._unused_marker("part", messages, profile, where)
        turns = itertools.count(1)
        marked = [
            {**message, "content": f"{mark}{next(turns)}."} if message["role"] == "user" else message
            for message in messages
        ]
        at = len(prompt)
        outlines = self.turns(marked[:at], marked[at:], profile and f"{mark}0.", where, options).contexts
        texts = self.turns(prompt, completion, profile, where, options).contexts
        pairs = zip(texts, outlines, strict=True)
        return [_aligned(text, re.split(rf"{mark}(\d+)\.", outline), contents) for text, outline in pairs]

    def activation_offset(
        self,
        context: str,
        prompt: list[Message],
        completion: list[Message],
        profile: str,
        where: str,
        options: Mapping[str, Any] | None = None,
    ) -> int:
        """Offset in `context` (all text before the first response), in characters, from which on the adapter is on.

        With the profile in the system message: the start of the first user turn, its header included. With the profile
        in the user message: the end of the profile.

        Raises:
            TemplateError: the template puts the profile after the query or after a response.
        """
        messages = self._messages([*prompt, *completion], profile, where)
        lead = list(itertools.takewhile(lambda message: message["role"] == "system", messages))
        if lead and self._position == "system":
            try:
                head = self.render(lead, where, options=options)
            except TemplateError:  # some templates need a user message
                head = ""
            if head and context.startswith(head):
                return len(head)
        if not profile:
            return 0
        spans = self.segments(prompt, completion, profile, where, options)[0]
        kinds = [kind for _, kind in spans]
        if "profile" not in kinds or "query" in kinds[: kinds.index("profile")]:
            raise TemplateError(
                f"{where}: profile_pass: frozen needs the profile before every query and response, and this chat "
                "template puts it elsewhere. Try template.position: user, or profile_pass: full."
            )
        return sum(len(text) for text, _ in spans[: kinds.index("profile") + 1])

    def _unused_marker(self, name: str, messages: list[Message], profile: str, where: str) -> str:
        """A marker string that occurs in no message."""
        text = repr(self._messages(messages, profile, where))
        return next(marker for n in range(10**6) if (marker := f"{name}{n}slot") not in text)

    def _messages(self, messages: Sequence[Message], profile: str, where: str) -> list[Message]:
        """`messages` with the profile at its place, and the same system message in both passes."""
        profile_part = profile and self.template.profile.replace("{profile}", profile)
        rest = list(messages)
        system = content_of(rest.pop(0)) if rest and rest[0]["role"] == "system" else self._system
        has_system = len(rest) < len(messages)
        if self._position == "system":
            system = self.template.separator.join(part for part in (system or self._own_system, profile_part) if part)
        elif profile_part:
            at = next((index for index, message in enumerate(rest) if message["role"] == "user"), None)
            if at is None:
                raise TemplateError(f"{where}: template.position is user, but there is no user message for the profile")
            rest[at] = {**rest[at], "content": f"{profile_part}{self.template.separator}{content_of(rest[at])}"}
        first = [{"role": "system", "content": system}] if system or has_system else []
        # Again: two harmless halves may have become neighbours.
        return [self.safe_message(message)[0] for message in [*first, *rest]]

    def render(
        self,
        messages: list[Message],
        where: str,
        add_generation_prompt: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """`messages` rendered by the chat template; `options`: a row's `template_options`.

        Raises:
            RowRefusedError: the template refuses them.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self._source,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **{**self.template.chat_template_kwargs, **(options or {})},
            )
        except (JinjaError, TypeError, ValueError) as error:  # the latter: a template that expects another field
            roles = ", ".join(message["role"] for message in messages)
            raise RowRefusedError(where, f"the chat template refuses the messages ({roles}): {error}") from error
        return str(text)

    def _template_system(self) -> tuple[bool, str]:
        """Whether the chat template renders a system message, and the text that it fills in if there is none."""
        user = {"role": "user", "content": "x"}
        try:
            before, shown, after = self.render([{"role": "system", "content": "probe7"}, user], "").partition("probe7")
        except TemplateError:
            return False, ""
        bare = self.render([user], "the template")
        fills_in = shown and bare.startswith(before) and bare.endswith(after) and len(bare) > len(before) + len(after)
        return bool(shown), bare[len(before) : len(bare) - len(after)] if fills_in else ""

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def safe_profile(self, profile: Profiled) -> tuple[str, int]:
        return self.safe(format_profile(profile, self.template))

    def safe_message(self, message: Message) -> tuple[Message, int]:
        """`message` with all its texts `safe`, and the number of words broken; a thought that opens a turn stays."""
        clean: Message = {}
        count = 0
        for name, value in message.items():
            thought = self._thought.match(value) if name == "content" and isinstance(value, str) else None
            if thought is not None and message["role"] == "assistant":
                inner, broken_within = self.safe(thought["thought"])
                rest, broken_behind = self.safe(value[thought.end() :])
                clean[name], broken = f"{thought['open']}{inner}{thought['close']}{rest}", broken_within + broken_behind
            else:
                clean[name], broken = self._safe_value(value)
            count += broken
        return clean, count

    def _safe_value(self, value: Any) -> tuple[Any, int]:
        """`value` with all texts in it `safe`."""
        if isinstance(value, str):
            return self.safe(value)
        if isinstance(value, Mapping):
            pairs = [(self.safe(str(name)), self._safe_value(inner)) for name, inner in value.items()]
            return {name: inner for (name, _), (inner, _) in pairs}, sum(
                in_name + in_value for (_, in_name), (_, in_value) in pairs
            )
        if isinstance(value, list | tuple):
            inner_values = [self._safe_value(inner) for inner in value]
            return [inner for inner, _ in inner_values], sum(count for _, count in inner_values)
        return value, 0

    def safe(self, text: str) -> tuple[str, int]:
        """`text` with a space inside everything that spells a control token, and the number of those.

        A lone surrogate, which no tokenizer accepts, becomes a question mark.
        """
        text = text.encode("utf-8", "replace").decode("utf-8") if not text.isascii() else text
        broken = 0
        while True:  # repeated, as nested spellings leave another one
            text, count = self._control.subn(lambda match: re.sub(r"(?<=\S)", " ", match[0], count=1), text)
            broken += count
            if not count:
                return text, broken


def dated(source: str, date: str) -> str:
    """A chat template that writes `date` (2024-07-26) where it asks for today's.

    Without that every prompt changes overnight: stored log-probs miss, a resumed run trains other rows, and an export
    cannot be proven. The date stands in the template itself, so that what is saved and exported with it says the same.
    """
    if "strftime_now" not in source or _DATE_MACRO in source:
        return source
    moment = datetime.datetime.fromisoformat(date)
    words = {f"%-{letter}": str(int(moment.strftime(f"%{letter}"))) for letter in "dmHIM"}
    words |= {f"%{letter}": moment.strftime(f"%{letter}") for letter in "dmYybBaAjHIMSpFTDe%"}
    filters = "".join(f" | replace({word!r}, {shown!r})" for word, shown in words.items())
    return f"{_DATE_MACRO}{{{{- format{filters} -}}}}{{%- endmacro -%}}{source}"


_DATE_MACRO = "{%- macro strftime_now(format) -%}"

_KEEPS = "a dialogue needs a template that keeps them all"


def _marked(completion: Sequence[Message], mark: str, plain: Sequence[bool]) -> list[Message]:
    """The completion with a marker in the place of each assistant turn that is `plain`."""
    numbers = itertools.count()
    return [
        {**message, "content": f"{mark}{number}."}
        if message["role"] == "assistant" and plain[(number := next(numbers))]
        else message
        for message in completion
    ]


def _without_merges(text: str, prompted: str, start: int) -> int:
    """`start` of a response, ahead of white space that would merge with its first token, as TRL's ids have it.

    prompted: the text ahead of it with a generation prompt; it may go on otherwise than `text`
    """
    merges = text[start : start + 1].isspace() or prompted[start : start + 1].isspace()
    return len(text[:start].rstrip()) if merges else start


def _common(text: str, other: str) -> int:
    """Number of characters with which both texts begin."""
    return sum(1 for _ in itertools.takewhile(lambda letters: letters[0] == letters[1], zip(text, other, strict=False)))


def format_profile(profile: Profiled, template: Template) -> str:
    """A profile as one text: a text as it is, items by `template.item`, in order."""
    if isinstance(profile, str):
        return profile

    def shown(item: Item) -> str:
        fields = {"{title}": item.title, "{text}": item.text}
        return re.sub(r"\{title\}|\{text\}", lambda match: fields[match[0]], template.item).strip()

    return template.separator.join(filter(None, map(shown, profile)))


def _aligned(text: str, outline: list[str], contents: list[str]) -> list[Span]:
    """`text` as spans.

    outline: pieces of template, and between each two the index in `contents` of the text between them
    """
    pattern, kinds = "", []
    for index, piece in enumerate(outline):
        if index % 2 == 0:
            words = [piece]
            kinds.append("template")
        else:
            content = contents[int(piece)]
            words = [content, content.strip(), content.lstrip(), content.rstrip()]  # templates trim
            kinds.append("query" if int(piece) else "profile")
        pattern += f"({'|'.join(map(re.escape, words))})"
    match = re.fullmatch(pattern, text)
    if match is None:
        return [(text, "template")]
    return [(piece, kind) for piece, kind in zip(match.groups(), kinds, strict=True) if piece]


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches what user text must not spell: special tokens, and added tokens that the chat template writes."""
    source = str(tokenizer.chat_template)
    words = {
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if len(token.content.strip()) > 1
        and (token.special or (token.content in source and not token.content.strip().isalnum()))
    }
    words |= {token for token in tokenizer.all_special_tokens if len(token.strip()) > 1}
    if not words:
        return re.compile(r"(?!)")
    return re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)))


def _thoughts(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches a thought that opens a turn, between two tokens such as <think> and </think>, with an answer behind."""
    words = {token.content for token in tokenizer.added_tokens_decoder.values() if "think" in token.content.lower()}
    pairs = [(word, f"{word[0]}/{word[1:]}") for word in words if f"{word[0]}/{word[1:]}" in words]
    forms = [
        rf"(?P<open>\s*{re.escape(opens)})(?P<thought>(?:(?!{re.escape(opens)}).)*?\w.*?)(?P<close>{re.escape(closes)}\s*)(?=\S)"
        for opens, closes in pairs[:1]
    ]
    return re.compile(forms[0] if forms else r"(?!)(?P<open>)(?P<thought>)(?P<close>)", re.S)
