"""Chat templates: messages with a profile become text and ids; user text never becomes control tokens."""

import itertools
import re
from collections.abc import Sequence

from jinja2.exceptions import TemplateError as JinjaError
from transformers import PreTrainedTokenizerBase

from perce_lite.data.retrieval import Item
from perce_lite.data.rows import Message, Profiled
from perce_lite.errors import TemplateError
from perce_lite.recipe import Template

Span = tuple[str, str]
"""A piece of text and its kind: template, profile, query (a user message) or response."""


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
        self._control = _control_tokens(tokenizer)
        self._control_ids = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        takes_system, self._own_system = self._template_system()
        auto = "system" if takes_system else "user"
        self._position = auto if self.template.position == "auto" else self.template.position
        self._system = (self.template.system or "") if takes_system else ""

    def prompt_ids(self, prompt: Sequence[Message], profile: Profiled) -> list[int]:
        """Ids (T,) of a prompt for generation, with `profile` unless it is empty."""
        return self.ids(self.render(self.composed(prompt, profile), "the prompt", add_generation_prompt=True))

    def composed(self, prompt: Sequence[Message], profile: Profiled) -> list[Message]:
        """The messages of a prompt as they are passed to the chat template, with `profile` unless it is empty."""
        text, _ = self.safe_profile(profile)
        messages = [{"role": self.safe(message["role"])[0], "content": message["content"]} for message in prompt]
        return self._messages(messages, text, "the prompt")

    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the tokenizer's own, and the template's end-of-turn token."""
        turn = [{"role": "user", "content": "x"}], [{"role": "assistant", "content": "y"}]
        after = self.ids(self.contexts(*turn, "", "a short conversation")[1])
        ends = [self.tokenizer.eos_token_id, *after[: self.end_of_turn(after)][-1:]]
        return sorted({token_id for token_id in ends if token_id is not None})

    def profile_text(self, profile: Profiled) -> str:
        """The profile as text of the prompt, control tokens broken; may be empty."""
        return self.safe_profile(profile)[0]

    def end_of_turn(self, after: list[int]) -> int:
        """Number of ids after a response that end its turn: up to the first control token, after white space at most.

        after: ids between a response and the next
        """
        first = next((index for index, token_id in enumerate(after) if token_id in self._control_ids), None)
        stands_first = first is not None and not self.tokenizer.decode(after[:first]).strip()
        return first + 1 if first is not None and stands_first else 0

    def contexts(self, prompt: list[Message], completion: list[Message], profile: str, where: str) -> list[str]:
        """The rendered text around the assistant turns of `completion`: n + 1 pieces for n turns."""
        mark = self._unused_marker("response", [*prompt, *completion], profile, where)
        turns = iter(range(len(completion)))
        marked = [
            {**message, "content": f"{mark}{next(turns)}."} if message["role"] == "assistant" else message
            for message in completion
        ]
        messages = self._messages([*prompt, *marked], profile, where)
        pieces = re.split(rf"{mark}\d+\.", self.render(messages, where))
        expected = sum(message["role"] == "assistant" for message in completion) + 1
        if len(pieces) != expected:
            raise TemplateError(
                f"{where}: the chat template shows {len(pieces) - 1} of {expected - 1} assistant turns; a dialogue "
                "needs a template that keeps them all"
            )
        if expected == 2:  # before a single response stands exactly the prompt of generation
            before = list(itertools.takewhile(lambda message: message["role"] != "assistant", completion))
            messages = self._messages([*prompt, *before], profile, where)
            pieces[0] = self.render(messages, where, add_generation_prompt=True)
        return pieces

    def segments(self, prompt: list[Message], completion: list[Message], profile: str, where: str) -> list[list[Span]]:
        """`contexts` as spans with their kind; exact for any text of query and profile.

        The messages are rendered once more with placeholders for the profile and the user messages. If a template does
        more to a text than trimming it, the whole context around it is one span of kind "template".
        """
        messages = [*prompt, *completion]
        contents = [profile, *(message["content"] for message in messages if message["role"] == "user")]
        mark = self._unused_marker("part", messages, profile, where)
        turns = itertools.count(1)
        marked = [
            {**message, "content": f"{mark}{next(turns)}."} if message["role"] == "user" else message
            for message in messages
        ]
        at = len(prompt)
        outlines = self.contexts(marked[:at], marked[at:], profile and f"{mark}0.", where)
        texts = self.contexts(prompt, completion, profile, where)
        pairs = zip(texts, outlines, strict=True)
        return [_aligned(text, re.split(rf"{mark}(\d+)\.", outline), contents) for text, outline in pairs]

    def activation_offset(
        self, context: str, prompt: list[Message], completion: list[Message], profile: str, where: str
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
                head = self.render(lead, where)
            except TemplateError:  # some templates need a user message
                head = ""
            if head and context.startswith(head):
                return len(head)
        if not profile:
            return 0
        spans = self.segments(prompt, completion, profile, where)[0]
        kinds = [kind for _, kind in spans]
        if "profile" not in kinds or "query" in kinds[: kinds.index("profile")]:
            raise TemplateError(
                f"{where}: profile_pass: frozen needs the profile before every query and response, and this chat "
                "template puts it elsewhere. Try template.position: user, or profile_pass: full."
            )
        return sum(len(text) for text, _ in spans[: kinds.index("profile") + 1])

    def _unused_marker(self, name: str, messages: list[Message], profile: str, where: str) -> str:
        """A marker string that occurs in no message."""
        text = "".join(message["content"] for message in self._messages(messages, profile, where))
        return next(marker for n in range(10**6) if (marker := f"{name}{n}slot") not in text)

    def _messages(self, messages: Sequence[Message], profile: str, where: str) -> list[Message]:
        """`messages` with the profile at its place, and the same system message in both passes."""
        profile_part = profile and self.template.profile.replace("{profile}", profile)
        rest = list(messages)
        system = rest.pop(0)["content"] if rest and rest[0]["role"] == "system" else self._system
        has_system = len(rest) < len(messages)
        if self._position == "system":
            system = self.template.separator.join(part for part in (system or self._own_system, profile_part) if part)
        elif profile_part:
            at = next((index for index, message in enumerate(rest) if message["role"] == "user"), None)
            if at is None:
                raise TemplateError(f"{where}: template.position is user, but there is no user message for the profile")
            rest[at] = {**rest[at], "content": f"{profile_part}{self.template.separator}{rest[at]['content']}"}
        first = [{"role": "system", "content": system}] if system or has_system else []
        # Again: two harmless halves may have become neighbours.
        return [{**message, "content": self.safe(message["content"])[0]} for message in [*first, *rest]]

    def render(self, messages: list[Message], where: str, add_generation_prompt: bool = False) -> str:
        """`messages` rendered by the chat template.

        Raises:
            TemplateError: the template refuses them.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **self.template.chat_template_kwargs,
            )
        except JinjaError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise TemplateError(f"{where}: the chat template refuses the messages ({roles}): {error}") from error
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
