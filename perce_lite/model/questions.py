"""Prompts to answer: one, a list, or the lines of a file or a pipe; each with the profile that it is asked with."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from perce_lite.data.readers import texts_of_users
from perce_lite.data.rows import DIALOGUES, Message, Profiled, messages_of, profile_of
from perce_lite.errors import AdapterError, DataError
from perce_lite.recipe import Recipe

Asked = str | Mapping[str, Any] | Sequence[Message]
"""A prompt: a text, messages, or a record {prompt or messages, profile, user}."""


@dataclass(frozen=True)
class Question:
    """One prompt.

    profile: its own; "": none; None: not said
    user: whose texts nearest to the prompt become its profile
    record: as it was given, so that what else stands in it stays with the answer
    """

    where: str
    prompt: tuple[Message, ...]
    profile: Profiled | None = None
    user: str | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What the user says last."""
        return next((str(message["content"]) for message in reversed(self.prompt) if message["role"] == "user"), "")


def question_of(asked: Asked, where: str, profile: Any = None, user: str | None = None) -> Question:
    """The question that `asked` is; `profile` and `user` where it names neither.

    Raises:
        DataError: no prompt, messages that are none, or both a profile and a user; `where` is named.
    """
    record = asked if isinstance(asked, Mapping) else {"prompt": asked}
    name = next((name for name in ("prompt", *DIALOGUES) if record.get(name) is not None), "prompt")
    prompt = messages_of(record.get(name), name, "user", where)
    if not prompt or prompt[-1]["role"] == "assistant":
        raise DataError(f"{where}: {name} ends with an answer; nothing is left to say")
    own_profile, own_user = record.get("profile"), record.get("user")
    if own_profile is None and own_user is None:
        own_profile, own_user = profile, user
    if own_profile is not None and own_user is not None:
        raise DataError(f"{where}: has both a profile and a user; give one of them")
    texts = None if own_profile is None else profile_of(own_profile, where)
    return Question(where, prompt, texts, None if own_user is None else str(own_user), record)


def read_questions(
    lines: Iterable[str], name: str, profile: str | None = None, user: str | None = None
) -> list[Question]:
    """The questions of a file or pipe called `name`: one a line, or JSONL if the first one is an object.

    profile, user: of lines that name neither

    Raises:
        DataError: a line that is no object in JSONL, or no question; nothing in it. The line is named.
    """
    numbered_lines = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered_lines:
        raise DataError(f"{name}: there is no prompt in it; give one a line, or JSONL with a prompt in each line")
    as_json = numbered_lines[0][1].startswith("{")
    questions = []
    for number, line in numbered_lines:
        where = f"{name}, line {number}"
        questions.append(question_of(_object(line, where) if as_json else line, where, profile, user))
    return questions


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: an object such as {{prompt: a text, user: NAME}} is needed, as in the first line")
    return record


def wanted_profiles(metadata: Mapping[str, Any], questions: Sequence[Question]) -> list[Profiled]:
    """The profile of each question for the adapter with this metadata, before it is cut to what fits.

    Raises:
        AdapterError: neither a profile nor a user is named, and the adapter was trained with profiles.
        DataError: a user whom the adapter's data does not know, or data that cannot be read.
    """
    recipe = Recipe.model_validate(metadata["recipe"])
    users = dict.fromkeys(question.user for question in questions if question.user is not None)
    texts = texts_of_users(recipe, users) if users else {}
    profiles: list[Profiled] = []
    for question in questions:
        if question.user is not None:
            profiles.append(texts[question.user].profile_for(question.text, recipe.profile))
            continue
        if question.profile is None and metadata["train_on"] == "factual":
            raise AdapterError(
                f"{question.where}: this adapter was trained with the user's profile in the prompt. Give --profile "
                "TEXT (or --profile @FILE), --user NAME for a user of its data, or --no-profile to go without."
            )
        profiles.append(question.profile or "")
    return profiles
