"""Profile, query and response become what a chat template makes of them; user text never becomes control tokens."""

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
"""A piece of text and what it is: template, profile, query (what the user says) or response."""


class Chat:
    """One tokenizer's chat template, and where a profile goes in it.

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
        """Ids (T,) of a prompt that waits for an answer, `profile` in it where there is one; for generation."""
        return self.ids(self.render(self.composed(prompt, profile), "the prompt", add_generation_prompt=True))

    def composed(self, prompt: Sequence[Message], profile: Profiled) -> list[Message]:
        """The messages that the chat template is given of a prompt, `profile` in them where there is one."""
        text, _ = self.safe_profile(profile)
        messages = [{"role": self.safe(one["role"])[0], "content": one["content"]} for one in prompt]
        return self._messages(messages, text, "the prompt")

    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the tokenizer's own, and the template's end-of-turn token."""
        turn = [{"role": "user", "content": "x"}], [{"role": "assistant", "content": "y"}]
        after = self.ids(self.contexts(*turn, "", "a short conversation")[1])
        ends = [self.tokenizer.eos_token_id, *after[: self.end_of_turn(after)][-1:]]
        return sorted({one for one in ends if one is not None})

    def profile_text(self, profile: Profiled) -> str:
        """The profile as it stands in the prompt; empty where there is none."""
        return self.safe_profile(profile)[0]

    def end_of_turn(self, after: list[int]) -> int:
        """How many of the ids behind a response end its turn: up to the first control token, if it stands first.

        Some templates put a space ahead of it.
        """
        first = next((index for index, one in enumerate(after) if one in self._control_ids), None)
        stands_first = first is not None and not self.tokenizer.decode(after[:first]).strip()
        return first + 1 if first is not None and stands_first else 0

    def contexts(self, prompt: list[Message], completion: list[Message], profile: str, where: str) -> list[str]:
        """The rendered text around the scored turns: n + 1 pieces for n turns."""
        mark = self._unspoken("response", [*prompt, *completion], profile, where)
        turns = iter(range(len(completion)))
        marked = [
            {**one, "content": f"{mark}{next(turns)}."} if one["role"] == "assistant" else one for one in completion
        ]
        messages = self._messages([*prompt, *marked], profile, where)
        pieces = re.split(rf"{mark}\d+\.", self.render(messages, where))
        expected = sum(one["role"] == "assistant" for one in completion) + 1
        if len(pieces) != expected:
            raise TemplateError(
                f"{where}: the chat template shows {len(pieces) - 1} of {expected - 1} assistant turns; a dialogue "
                "needs a template that keeps them all"
            )
        if expected == 2:  # what precedes a single answer is exactly what generation will see
            ahead = list(itertools.takewhile(lambda one: one["role"] != "assistant", completion))
            asked = self._messages([*prompt, *ahead], profile, where)
            pieces[0] = self.render(asked, where, add_generation_prompt=True)
        return pieces

    def segments(self, prompt: list[Message], completion: list[Message], profile: str, where: str) -> list[list[Span]]:
        """`contexts` in spans that say what each piece is; exact, whatever a query or a profile says.

        The messages are rendered once more with placeholders for the profile and for what the user says. Where a
        template does more to a text than trimming it, the context around that text is one span of template.
        """
        messages = [*prompt, *completion]
        said = [profile, *(one["content"] for one in messages if one["role"] == "user")]
        mark = self._unspoken("part", messages, profile, where)
        turns = itertools.count(1)
        marked = [{**one, "content": f"{mark}{next(turns)}."} if one["role"] == "user" else one for one in messages]
        at = len(prompt)
        outlines = self.contexts(marked[:at], marked[at:], profile and f"{mark}0.", where)
        texts = self.contexts(prompt, completion, profile, where)
        pairs = zip(texts, outlines, strict=True)
        return [_aligned(text, re.split(rf"{mark}(\d+)\.", outline), said) for text, outline in pairs]

    def wakes_at(self, context: str, prompt: list[Message], completion: list[Message], profile: str, where: str) -> int:
        """Where in `context` (all that stands before the first response) an adapter wakes: letters ahead of it.

        That is where the first user message begins, its header included, where the profile stands in the system
        message; where it stands in the user message itself, right behind it.

        Raises:
            TemplateError: the template puts the profile behind the query, or behind a response.
        """
        messages = self._messages([*prompt, *completion], profile, where)
        lead = list(itertools.takewhile(lambda one: one["role"] == "system", messages))
        if lead and self._position == "system":
            try:
                head = self.render(lead, where)
            except TemplateError:  # there are templates that want a user's message
                head = ""
            if head and context.startswith(head):
                return len(head)
        if not profile:
            return 0
        spans = self.segments(prompt, completion, profile, where)[0]
        kinds = [kind for _, kind in spans]
        if "profile" not in kinds or "query" in kinds[: kinds.index("profile")]:
            raise TemplateError(
                f"{where}: profile_pass: frozen needs the profile ahead of every query and response, and this chat "
                "template puts it elsewhere. Try template.position: user, or profile_pass: full."
            )
        return sum(len(text) for text, _ in spans[: kinds.index("profile") + 1])

    def _unspoken(self, name: str, messages: list[Message], profile: str, where: str) -> str:
        """A word for placeholders that stands in none of the messages."""
        spoken = "".join(one["content"] for one in self._messages(messages, profile, where))
        return next(mark for n in range(10**6) if (mark := f"{name}{n}slot") not in spoken)

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
        return [{**one, "content": self.safe(one["content"])[0]} for one in [*first, *rest]]

    def render(self, messages: list[Message], where: str, add_generation_prompt: bool = False) -> str:
        """What the chat template makes of `messages`; raises TemplateError where it refuses them."""
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


def _aligned(text: str, outline: list[str], said: list[str]) -> list[Span]:
    """`text` in spans. `outline`: the template's pieces, and between them the number of the text that stands there."""
    pattern, kinds = "", []
    for index, piece in enumerate(outline):
        if index % 2 == 0:
            words = [piece]
            kinds.append("template")
        else:
            content = said[int(piece)]
            words = [content, content.strip(), content.lstrip(), content.rstrip()]  # templates trim
            kinds.append("query" if int(piece) else "profile")
        pattern += f"({'|'.join(map(re.escape, words))})"
    match = re.fullmatch(pattern, text)
    if match is None:
        return [(text, "template")]
    return [(piece, kind) for piece, kind in zip(match.groups(), kinds, strict=True) if piece]


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """What user text must not spell: special tokens, and added ones that the chat template itself writes."""
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
