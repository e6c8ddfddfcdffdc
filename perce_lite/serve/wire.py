"""OpenAI's form of requests, answers and errors; what a request asks for and is not supported is refused by name."""

import json
import time
import uuid
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from perce_lite.data.rows import Message
from perce_lite.serve.directory import Entry

MAX_TOKENS = 200
"""Tokens of an answer where a request names no `max_tokens`: as `perce-lite generate`."""


class RequestError(Exception):
    """A request that is refused, in OpenAI's form. status: of HTTP; code: for programs; param: the field at fault."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else _KINDS.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """`Retry-After` where waiting helps, seconds."""
        return {"Retry-After": "2"} if self.status in (429, 503) else {}


_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


# Requests

Neutral = Literal[0] | None


class _Body(BaseModel):
    """A part of a request; unknown fields are faults."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TextPart(_Body):
    type: Literal["text"]
    text: str


class Turn(_Body):
    """A message of a chat. The fields below `content` are what clients send back of an earlier answer, empty."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    refusal: None = None
    tool_calls: None = None
    function_call: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def message(self) -> Message:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Body):
    include_usage: bool = False


class Question(_Body):
    """What both kinds of request ask. The fields at the end are accepted where they ask for nothing.

    profile: a text instead of the user's own; null: none
    personal: strength of the contrast, as `perce-lite generate --personal`; it needs a profile
    use_adapter: false: the base answers, with the same profile
    lean: give each generated token's PIR
    """

    model: Annotated[str, Field(min_length=1, max_length=1000)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    profile: str | None = None
    personal: Annotated[float, Field(ge=0, le=10)] = 0.0
    use_adapter: bool = True
    lean: bool = False
    n: Literal[1] | None = None
    presence_penalty: Neutral = None
    frequency_penalty: Neutral = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None

    @property
    def messages(self) -> list[Message]:
        """The turns, the question last."""
        raise NotImplementedError

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer; they are left out of it."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in given if text]

    @property
    def most_tokens(self) -> int | None:
        """Tokens of the answer at the most, if the request says."""
        return self.max_tokens


class ChatQuestion(Question):
    """The body of /v1/chat/completions."""

    turns: Annotated[list[Turn], Field(min_length=1, max_length=1000, alias="messages")]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Literal[False] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None

    @property
    def messages(self) -> list[Message]:
        return [turn.message() for turn in self.turns]

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class PromptQuestion(Question):
    """The body of /v1/completions: the prompt is put as a question in the template of training, as `generate` does."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: Neutral = None
    suffix: Literal[""] | None = None

    @property
    def messages(self) -> list[Message]:
        text = self.prompt if isinstance(self.prompt, str) else self.prompt[0]
        return [{"role": "user", "content": text}]


# Answers


@dataclass(frozen=True)
class Begun:
    """Known ahead of an answer. profile: its text in the prompt; prompt_tokens: of profile and template too."""

    profile: str
    prompt_tokens: int


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    finish: "stop", or "length" where tokens or time ran out
    tokens: generated ones
    lean: units with their PIR, as `inspect` shows them; None: not asked for, or there was no profile
    """

    begun: Begun
    text: str
    finish: str
    tokens: int
    lean: list[dict[str, Any]] | None = None

    def usage(self) -> dict[str, int]:
        prompt = self.begun.prompt_tokens
        return {"prompt_tokens": prompt, "completion_tokens": self.tokens, "total_tokens": prompt + self.tokens}


@dataclass(frozen=True)
class Form:
    """One of OpenAI's two forms of an answer."""

    chat: bool
    model: str
    id: str
    created: int

    @classmethod
    def of(cls, question: Question) -> "Form":
        chat = isinstance(question, ChatQuestion)
        head = "chatcmpl" if chat else "cmpl"
        return cls(chat, question.model, f"{head}-{uuid.uuid4().hex}", int(time.time()))

    def whole(self, answer: Answer) -> dict[str, Any]:
        """An answer that is not streamed."""
        content = {"message": {"role": "assistant", "content": answer.text}} if self.chat else {"text": answer.text}
        choice = {**self._choice(content, answer.finish), **_lean(answer)}
        return {**self._head(), "choices": [choice], "usage": answer.usage(), "profile": answer.begun.profile}

    def opening(self, begun: Begun) -> bytes:
        """The first event of a stream; it holds the profile."""
        delta = {"delta": {"role": "assistant", "content": ""}} if self.chat else {"text": ""}
        return event({**self._head(chunk=True), "choices": [self._choice(delta, None)], "profile": begun.profile})

    def piece(self, text: str) -> bytes:
        """The event of some more text."""
        delta = {"delta": {"content": text}} if self.chat else {"text": text}
        return event({**self._head(chunk=True), "choices": [self._choice(delta, None)]})

    def closing(self, answer: Answer) -> bytes:
        """The last event of a choice."""
        delta: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        choice = {**self._choice(delta, answer.finish), **_lean(answer)}
        return event({**self._head(chunk=True), "choices": [choice]})

    def usage(self, answer: Answer) -> bytes:
        """The event that `stream_options` asks for."""
        return event({**self._head(chunk=True), "choices": [], "usage": answer.usage()})

    def _head(self, chunk: bool = False) -> dict[str, Any]:
        kind = "text_completion"
        if self.chat:
            kind = "chat.completion.chunk" if chunk else "chat.completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": finish}


def _lean(answer: Answer) -> dict[str, Any]:
    return {} if answer.lean is None else {"lean": answer.lean}


def event(body: dict[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(body, ensure_ascii=False).encode("utf-8", "replace") + b"\n\n"


DONE = b"data: [DONE]\n\n"
"""The end of a stream."""


def model_object(entry: Entry) -> dict[str, Any]:
    """A model as /v1/models lists it."""
    more = {"kind": entry.kind, "gain": entry.gain}
    return {"id": entry.id, "object": "model", "created": 0, "owned_by": "perce-lite", **more}
