"""Talking to an adapter in a terminal or a pipe: turns in its own template, its profile, its base for comparison."""

import importlib.util
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from perce_lite.console import errors
from perce_lite.data.readers import UserTexts, user_texts
from perce_lite.data.rows import Message, Profiled
from perce_lite.errors import DataError, PerceLiteError
from perce_lite.fleet.queries import refuse_deleted
from perce_lite.model.answering import Answerer, Stop
from perce_lite.model.generate import LoadedAdapter
from perce_lite.recipe_checks import nearest

HELP = {
    "/profile": "show the profile; /profile TEXT or @FILE sets it, none drops it, user NAME takes a user of the data",
    "/personal": "show how much more like the user it writes; /personal 0.5 sets it, 0 is plain",
    "/base": "switch the adapter off, or on again",
    "/compare": "let base and adapter answer your last question, one below the other",
    "/clear": "forget the turns so far; the profile stays",
    "/help": "show this",
    "/quit": "leave; Ctrl-D does so too, Ctrl-C stops an answer",
}
"""What a line may start with that is no question."""


@dataclass
class Conversation:
    """The turns with one adapter, and all that an answer depends on.

    options: of transformers' `generate`
    profile: a text, empty for none; with `user`, their texts nearest to each question are taken instead
    personal: strength of the contrast, see `generate.Personal`
    told: takes each line that is said about the conversation and is no answer
    """

    answerer: Answerer
    max_new_tokens: int
    told: Callable[[str], None]
    options: dict[str, Any] = field(default_factory=dict)
    profile: str = ""
    user: str | None = None
    use_adapter: bool = True
    personal: float = 0.0
    turns: list[tuple[str, str]] = field(default_factory=list)
    _last: tuple[list[Message], Profiled] | None = None
    _texts: UserTexts | None = None

    @property
    def opened(self) -> LoadedAdapter:
        return self.answerer.opened

    def ask(self, question: str, stop: Stop) -> str:
        """The answer to `question`, written to standard output while it comes; both become a turn.

        Raises:
            DataError: the question alone does not fit beside an answer.
        """
        profile = self._profile_for(question)
        prompt = self._prompt(question, profile)
        self._last = prompt, profile
        answer = self._answer(prompt, profile, self.use_adapter, stop)
        if answer or not stop.asked:
            self.turns.append((question, answer))
        return answer

    def compare(self, stop: Stop) -> dict[str, str]:
        """What base and adapter answer to the last question, each as a fresh answer; no turn is added."""
        if self._last is None:
            self.told("There is no question to compare yet: ask one first.")
            return {}
        answers = {}
        for name, use_adapter in (("base", False), ("adapter", True)):
            if not stop.asked:
                print(f"{name}:", flush=True)
                answers[name] = self._answer(*self._last, use_adapter, stop)
        return answers

    def clear(self) -> None:
        """Forgets the turns."""
        self.turns.clear()
        self._last = None

    def set_profile(self, given: str) -> None:
        """Takes `given` as the profile: a text, @FILE, none, or user NAME.

        Raises:
            FleetError: a user who was deleted from the adapter's fleet.
            DataError: a file that cannot be read, or a user whom the data does not know. The profile stays as it was.
        """
        name = given.removeprefix("user ").strip()
        if given.startswith("user ") and name:
            refuse_deleted(Path(self.opened.metadata["folder"]), name)
            self._texts = user_texts(self.opened.recipe, name)
            self.profile, self.user = "", name
            return
        text = read_text(given[1:]) if given.startswith("@") else "" if given == "none" else given
        self.profile, self.user, self._texts = text, None, None

    def set_personal(self, given: str) -> None:
        """Takes `given` as the strength of the contrast.

        Raises:
            DataError: no number of at least 0. The strength stays as it was.
        """
        try:
            strength = float(given)
        except ValueError:
            strength = -1.0
        if not 0 <= strength < float("inf"):
            raise DataError(f"/personal {given}: give a number of at least 0, such as 0.5")
        self.personal = strength

    def profile_shown(self) -> str:
        """The profile as the last question met it, or as the next one will."""
        question = self.turns[-1][0] if self.turns else ""
        text = self.opened.maker.profile_text(self._profile_for(question))
        owner = "" if self.user is None else f"Of {self.user}, the texts nearest to each question; now:\n"
        return owner + (text or "There is no profile in the prompt.")

    def _profile_for(self, question: str) -> Profiled:
        return self.answerer.profile_for(question, self.profile if self._texts is None else self._texts)

    def _prompt(self, question: str, profile: Profiled) -> list[Message]:
        """The turns and the question, without the oldest turns where they do not fit beside an answer; says so."""
        context = self.answerer.context
        for left_out in range(len(self.turns) + 1):
            history = [pair for turn in self.turns[left_out:] for pair in zip(("user", "assistant"), turn, strict=True)]
            messages = [{"role": role, "content": text} for role, text in [*history, ("user", question)]]
            length = len(self.opened.maker.prompt_ids(messages, profile))
            if length + self.max_new_tokens <= context:
                break
        else:
            raise DataError(
                f"The question, its profile and an answer of {self.max_new_tokens} tokens take "
                f"{length + self.max_new_tokens} tokens, and the model looks at {context}: ask a shorter one, "
                "set a shorter profile, or start with a smaller --max-new-tokens."
            )
        del self.turns[:left_out]
        if left_out:
            turns = "The oldest turn is" if left_out == 1 else f"The {left_out} oldest turns are"
            self.told(f"{turns} left out: the model looks at {context} tokens, and the conversation is longer.")
        return messages

    def _answer(self, prompt: list[Message], profile: Profiled, use_adapter: bool, stop: Stop) -> str:
        return self.answerer.answer(
            prompt,
            profile,
            use_adapter,
            self.max_new_tokens,
            stop,
            stream=True,
            personal=self.personal,
            **self.options,
        )


def read_text(path: str) -> str:
    """The text of a file.

    Raises:
        DataError: it cannot be read as UTF-8.
    """
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"@{path}: {error}") from error


def talk(conversation: Conversation, lines: Iterable[str]) -> None:
    """Goes through `lines`, questions and commands, until /quit or their end. A line that fails is told, no more."""
    for line in lines:
        if line.rstrip() == "/quit":
            return
        if not line.strip():
            continue
        try:
            with stoppable() as stop:
                _one(conversation, line, stop)
            if stop.asked:
                conversation.told("Stopped.")
        except PerceLiteError as error:
            conversation.told(f"error: {error}")


def _one(conversation: Conversation, line: str, stop: Stop) -> None:
    """What one line asks for. A line with a space ahead of its slash is a question."""
    word, _, rest = line.partition(" ") if line.startswith("/") else ("", "", line)
    if word == "":
        conversation.ask(line.strip(), stop)
    elif word == "/profile" and rest.strip():
        conversation.set_profile(rest.strip())
        conversation.told(conversation.profile_shown())
    elif word == "/profile":
        conversation.told(conversation.profile_shown())
    elif word == "/personal":
        if rest.strip():
            conversation.set_personal(rest.strip())
        conversation.told(f"The strength of the profile while it writes is {conversation.personal:g}.")
    elif word == "/base":
        conversation.use_adapter = not conversation.use_adapter
        conversation.told(f"The {'adapter' if conversation.use_adapter else 'base, the adapter off,'} answers now.")
    elif word == "/compare":
        conversation.compare(stop)
    elif word == "/clear":
        conversation.clear()
        conversation.told("The turns are forgotten.")
    elif word == "/help":
        for name, what in HELP.items():
            conversation.told(f"{name:10} {what}")
    else:
        conversation.told(f"error: there is no {word}; {nearest(word, HELP)} A question may start with a space.")


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Inside, Ctrl-C sets `asked` of what it gives, and nothing else."""
    stop = Stop()

    def ask(signum: int, frame: object) -> None:
        stop.asked = True

    with _on_ctrl_c(ask):
        yield stop


@contextmanager
def _on_ctrl_c(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def typed(told: Callable[[str], None]) -> Iterator[str]:
    """Lines of standard input: from a terminal with a prompt and its own editing, else as they come.

    Ctrl-D ends them; Ctrl-C while a line is typed drops that line.
    """
    if not sys.stdin.isatty():
        yield from (line.rstrip("\r\n") for line in sys.stdin)
        return
    if importlib.util.find_spec("readline") is not None:  # Windows has its own
        importlib.import_module("readline")  # arrow keys and earlier lines in input()
    while True:
        try:
            with _on_ctrl_c(signal.default_int_handler):
                line = input("> ")
        except KeyboardInterrupt:
            told("\nCtrl-D or /quit leaves.")
            continue
        except EOFError:
            print()
            return
        yield line


def tell(message: str) -> None:
    """A line about the conversation, on standard error; dim where both ends are a terminal."""
    errors.print(message, style="dim" if sys.stdin.isatty() else None, markup=False, soft_wrap=True)


def chat(
    opened: LoadedAdapter,
    profile: str | None,
    user: str | None,
    max_new_tokens: int,
    personal: float = 0.0,
    **options: Any,
) -> None:
    """Talks to an adapter on standard input and output until the input ends.

    profile: the profile's text; None or "": without one
    user: instead, a user of the adapter's data; the texts nearest to each question become the profile
    personal: strength of the contrast, see `generate.Personal`
    options: of transformers' `generate`

    Raises:
        DataError: a user whom the data does not know.
    """
    conversation = Conversation(Answerer(opened), max_new_tokens, tell, options, profile or "", personal=personal)
    if user is not None:
        conversation.set_profile(f"user {user}")
    tell(greeting(opened, bool(profile) or user is not None))
    talk(conversation, typed(tell))


def greeting(opened: LoadedAdapter, has_profile: bool) -> str:
    """What the first line says: whom one talks to, and whether it needs a profile."""
    name = f"An adapter for {opened.recipe.model}."
    if opened.metadata["train_on"] == "counterfactual":
        need = "It was trained without the profile in the prompt, so it needs none."
    elif has_profile:
        need = "It was trained with the profile in the prompt, and has one."
    else:
        need = "It was trained with the profile in the prompt: set one with /profile, or it answers without."
    return f"{name} {need} /help lists the commands, /quit leaves."
