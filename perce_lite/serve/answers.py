"""One answer: who serves, which profile, the tokens as they come, and how much each leans on the profile."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from perce_lite.data.pairs import IGNORED, Tokens
from perce_lite.data.readers import UserTexts, user_texts
from perce_lite.data.rows import Message, Profiled
from perce_lite.errors import DataError, TemplateError
from perce_lite.model.adapter_files import recipe_of
from perce_lite.model.answering import Answerer, Stop
from perce_lite.model.generate import sampling
from perce_lite.model.scoring import compute_log_probs
from perce_lite.serve.directory import Directory, Entry, Metadata
from perce_lite.serve.pool import Pool
from perce_lite.serve.wire import MAX_TOKENS, Answer, Begun, Question, RequestError
from perce_lite.training.leaning import leaning_units

_USERS_KEPT = 32
"""Users whose texts and index stay in memory."""

Emit = Callable[[Begun | str], None]


class Answers:
    """Answers questions with the adapters of `pool`; call it from one thread."""

    def __init__(self, directory: Directory, pool: Pool) -> None:
        self.directory, self.pool = directory, pool
        self._texts: OrderedDict[tuple[str, str], UserTexts] = OrderedDict()

    def answer(self, entry: Entry, question: Question, stop: Stop, emit: Emit) -> Answer:
        """The answer of `entry` to `question`, whose pieces go to `emit` as they come.

        Raises:
            RequestError: a question that does not fit the model or its template, or a user whose texts are gone.
            AdapterError: the adapter is gone, or of another base.
        """
        metadata = self.directory.metadata_of(entry)
        answerer = self.pool.take(metadata)
        messages, on = question.messages, question.use_adapter and metadata is not None
        if messages[-1]["role"] != "user":
            raise RequestError(400, "invalid_messages", "The last message has to be the user's.", "messages")
        source = self._source(entry, question, metadata or self.directory.reference)
        try:
            profile = answerer.profile_for(messages[-1]["content"], source)
            prompt_tokens = len(answerer.opened.maker.prompt_ids(messages, profile))
        except TemplateError as error:
            raise RequestError(400, "invalid_messages", str(error), "messages") from error
        most = _room(answerer.context, prompt_tokens, question.most_tokens)
        begun = Begun(answerer.opened.maker.profile_text(profile), prompt_tokens)
        if question.personal and not begun.profile.strip():
            raise RequestError(400, "no_profile", "There is no profile in the prompt to lean on.", "personal")
        emit(begun)
        if question.seed is not None:
            torch.manual_seed(question.seed)
        stream = AnswerStream(answerer.opened.maker.tokenizer, question.stops, stop, emit)
        drawn = sampling(question.temperature or 0.0, 1.0 if question.top_p is None else question.top_p)
        answerer.answer(messages, profile, on, most, stop, stream, question.personal, **drawn)
        lean = None
        if question.lean and begun.profile:
            lean = _lean(answerer, messages, profile, on, stream.shown_ids())
        ended = stream.ended or (bool(stream.ids) and stream.ids[-1] in answerer.opened.maker.stop_ids())
        return Answer(begun, stream.text, "stop" if ended else "length", len(stream.ids), lean)

    def _source(self, entry: Entry, question: Question, metadata: Metadata) -> str | UserTexts:
        """What the profile is taken from: the request's own text, the user's texts, or nothing.

        An adapter that was trained without the profile in the prompt (`train_on: counterfactual`) is asked without.
        """
        if "profile" in question.model_fields_set or entry.kind != "user":
            return question.profile or ""
        if metadata["train_on"] == "counterfactual":
            return ""
        key = entry.name, str(metadata["run"])
        if key not in self._texts:
            try:
                self._texts[key] = user_texts(recipe_of(metadata), entry.name)
            except DataError as error:
                raise RequestError(
                    503, "texts_gone", "The server cannot read this user's texts; give a profile, or null.", "model"
                ) from error
        self._texts.move_to_end(key)
        while len(self._texts) > _USERS_KEPT:
            self._texts.popitem(last=False)
        return self._texts[key]


class AnswerStream(BaseStreamer):
    """Takes tokens as they are generated and emits their text: in the end exactly what `generate` gives.

    Held back until it is sure: half a character, white space that may be the answer's last, the beginning of a text
    that would end it.

    ids: generated so far; text: emitted so far; ended: whether one of `stops` came
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], stop: Stop, emit: Emit) -> None:
        self._tokenizer, self._stops, self._stop, self._emit = tokenizer, stops, stop, emit
        self._prompt_is_next = True  # transformers gives the prompt first
        self.ids: list[int] = []
        self.text, self.ended = "", False

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, then each token."""
        if self._prompt_is_next:
            self._prompt_is_next = False
        elif not self.ended:
            self.ids += value.reshape(-1).tolist()
            self._say(at_end=False)

    def end(self) -> None:
        """Emits what was held back."""
        if not self.ended:
            self._say(at_end=True)

    def shown_ids(self) -> list[int]:
        """Ids of what was emitted: after a stop text without those that only spell it."""
        ids = list(self.ids)
        while self.ended and ids and len(self._decoded(ids[:-1])) >= len(self.text):
            ids.pop()
        return ids

    def _say(self, at_end: bool) -> None:
        whole = self._decoded(self.ids)
        cuts = [whole.find(text) for text in self._stops if text in whole]
        self.ended = bool(cuts)
        self._stop.asked = self._stop.asked or self.ended
        sure = whole[: min(cuts)].rstrip() if cuts else whole.rstrip() if at_end else self._sure(whole)
        if sure.startswith(self.text) and sure != self.text:
            self._emit(sure[len(self.text) :])
            self.text = sure

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).lstrip()

    def _sure(self, whole: str) -> str:
        sure = whole.rstrip("\ufffd")
        spelt = (length for text in self._stops for length in range(1, len(text)) if sure.endswith(text[:length]))
        return sure[: len(sure) - max(spelt, default=0)].rstrip()


def _room(context: int, prompt_tokens: int, wanted: int | None) -> int:
    """Tokens that the answer may have; raises RequestError where prompt and answer do not fit the model."""
    most = max(1, min(MAX_TOKENS, context - prompt_tokens)) if wanted is None else wanted
    if prompt_tokens + most > context:
        raise RequestError(
            400,
            "context_length_exceeded",
            f"The prompt has {prompt_tokens} tokens with its profile, the answer may have {most}, and the model looks "
            f"at {context}: send fewer or shorter messages, or a smaller max_tokens.",
            "messages",
        )
    return most


def _lean(
    answerer: Answerer, messages: Sequence[Message], profile: Profiled, on: bool, ids: list[int]
) -> list[dict[str, Any]]:
    """The units of a generated answer with their PIR, nats.

    As in `inspect`: with the profile under what answered, without it under the bare base.
    """
    its = answerer.opened

    def score(prompt: Tokens, adapters: bool) -> torch.Tensor:
        tokens = Tokens(prompt.ids + ids, [IGNORED] * len(prompt.ids) + ids, prompt.prefix_length)
        scored: list[torch.Tensor] = []
        compute_log_probs(its.model, [tokens], adapters, its.autocast, lambda _, values: scored.append(values))
        return scored[0]

    if not ids:
        return []
    factual = score(its.maker.prompt(messages, profile), on)
    counterfactual = score(its.maker.prompt(messages, ""), False)
    return [unit for _, unit in leaning_units(its.maker.tokenizer, ids, factual, counterfactual)]
