"""Generation with base or adapter, with a profile or without, from the prompt that training would make."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, TextStreamer
from transformers.generation import BaseStreamer

from perce_lite.config import chosen_dtype, pick_device
from perce_lite.data.pairs import PairMaker
from perce_lite.data.rows import Message, Profiled
from perce_lite.errors import DataError
from perce_lite.model import adapters
from perce_lite.model.adapter_files import recipe_of
from perce_lite.model.base import load_base
from perce_lite.model.fused_head import base_of
from perce_lite.model.personal_decoding import PersonalContrast
from perce_lite.model.questions import Asked, Question, question_of, wanted_profiles
from perce_lite.model.scoring import autocast_to, encode_prefix, no_grad_eval
from perce_lite.recipe import Recipe


@dataclass(frozen=True)
class Personal:
    """How much more like the user an answer is than the model alone would write it: see `PersonalContrast`.

    strength: nats of weight to each nat that the profile adds; 0: plain decoding
    adapters_off: the pass without profile is the bare base (as the estimators over the base have it), or else the same
        adapter (`bootstrap`)
    """

    strength: float
    adapters_off: bool = True


def generate(
    model: torch.nn.Module,
    maker: PairMaker,
    prompt: Sequence[Message],
    profile: Profiled,
    max_new_tokens: int,
    use_adapter: bool = True,
    autocast: torch.dtype | None = None,
    stream: bool | BaseStreamer = False,
    personal: Personal | None = None,
    **options: Any,
) -> str:
    """The answer to `prompt`; greedy unless `options`, of transformers' `generate`, change that.

    stream: write it to standard output as well, token by token; or what takes each token instead
    personal: how much more like the user than the model alone would; None: not at all

    Raises:
        DataError: `personal` without a profile to contrast, or with beams.
    """
    [answer] = generate_several(
        model, maker, prompt, profile, max_new_tokens, 1, use_adapter, autocast, stream, personal, **options
    )
    return answer


def generate_several(
    model: torch.nn.Module,
    maker: PairMaker,
    prompt: Sequence[Message],
    profile: Profiled,
    max_new_tokens: int,
    count: int,
    use_adapter: bool = True,
    autocast: torch.dtype | None = None,
    stream: bool | BaseStreamer = False,
    personal: Personal | None = None,
    **options: Any,
) -> list[str]:
    """`count` answers to `prompt` in one batch, drawn if `options` say `do_sample`; otherwise as `generate`.

    Raises:
        DataError: `personal` without a profile to contrast, or with beams.
    """
    tokens = maker.prompt(prompt, profile)
    cache = options.get("past_key_values")
    cached_length = 0 if cache is None else cache.get_seq_length()
    if use_adapter and tokens.prefix_length > cached_length:
        cache = encode_prefix(model, tokens.prefix_ids, autocast, cache)
        if count > 1:
            cache.batch_repeat_interleave(count)
        options["past_key_values"] = cache
    if personal is not None and personal.strength:
        contrast = _contrast(model, maker, prompt, profile, personal, use_adapter, autocast, options)
        options["logits_processor"] = LogitsProcessorList([contrast])
    tokenizer: PreTrainedTokenizerBase = maker.tokenizer
    options["streamer"] = (
        TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream is True else stream or None
    )
    [answers] = _decoded(model, maker, [tokens.ids], max_new_tokens, count, use_adapter, autocast, options)
    return answers


def generate_batch(
    model: torch.nn.Module,
    maker: PairMaker,
    asked: Sequence[tuple[Sequence[Message], Profiled]],
    max_new_tokens: int,
    count: int = 1,
    use_adapter: bool = True,
    autocast: torch.dtype | None = None,
    personal: Personal | None = None,
    stream: bool = False,
    **options: Any,
) -> list[list[str]]:
    """`count` answers to each of several prompts with their profiles; all in one batch, padded on the left.

    One prompt after another where a batch cannot be had: with `personal`, or where the adapter is on only behind the
    profile (`profile_pass: frozen`), or to `stream`.

    Raises:
        DataError: `personal` without a profile to contrast, or with beams.
    """
    prompts = [maker.prompt(prompt, profile) for prompt, profile in asked]
    frozen = use_adapter and any(tokens.prefix_length for tokens in prompts)
    alone = frozen or stream or (personal is not None and personal.strength)
    if len(asked) > 1 and not alone:
        ids = [tokens.ids for tokens in prompts]
        return _decoded(model, maker, ids, max_new_tokens, count, use_adapter, autocast, options)
    return [
        generate_several(
            model, maker, prompt, profile, max_new_tokens, count, use_adapter, autocast, stream, personal, **options
        )
        for prompt, profile in asked
    ]


def _decoded(
    model: torch.nn.Module,
    maker: PairMaker,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    count: int,
    use_adapter: bool,
    autocast: torch.dtype | None,
    options: dict[str, Any],
) -> list[list[str]]:
    """`count` answers to each of `prompts`, ids of any length, in one batch."""
    tokenizer: PreTrainedTokenizerBase = maker.tokenizer
    device = next(model.parameters()).device
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    longest = max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    read = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    with no_grad_eval(model, adapters=use_adapter), autocast_to(device, autocast):
        out = base_of(model).generate(
            input_ids=ids,
            attention_mask=read,
            max_new_tokens=max_new_tokens,
            eos_token_id=maker.stop_ids(),
            pad_token_id=pad,
            num_return_sequences=count,
            **{"do_sample": False, **options},
        )
    texts = [str(text).strip() for text in tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)]
    return [texts[start : start + count] for start in range(0, len(texts), count)]


def _contrast(
    model: torch.nn.Module,
    maker: PairMaker,
    prompt: Sequence[Message],
    profile: Profiled,
    personal: Personal,
    use_adapter: bool,
    autocast: torch.dtype | None,
    options: dict[str, Any],
) -> PersonalContrast:
    if not maker.profile_text(profile).strip():
        raise DataError(
            "personal: there is no profile in the prompt to lean on. Give --profile TEXT or --user NAME (in a chat "
            "/profile), or go without --personal."
        )
    if options.get("num_beams", 1) > 1:
        raise DataError("personal: beams share no cache with the pass without profile; leave num_beams out")
    off = use_adapter and personal.adapters_off  # without the adapter both passes are the base's anyway
    return PersonalContrast(model, maker.prompt(prompt, ""), personal.strength, off, autocast)


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter on its base, and the maker of the prompts that it was trained with."""

    metadata: dict[str, Any]
    recipe: Recipe
    model: torch.nn.Module
    maker: PairMaker
    autocast: torch.dtype | None

    def personal(self, strength: float) -> Personal:
        """The contrast at `strength`, against what this adapter was trained to be contrasted with."""
        return Personal(strength, self.metadata["estimator"] != "bootstrap")

    def generate(
        self,
        prompts: Asked | Sequence[Asked],
        *,
        profile: str | Sequence[Any] | None = None,
        user: str | None = None,
        max_new_tokens: int = 200,
        temperature: float = 0.0,
        top_p: float = 1.0,
        personal: float = 0.0,
        use_adapter: bool = True,
        seed: int = 0,
        batch_size: int = 8,
    ) -> Any:
        """The answer to a prompt, or the answers to a list of prompts, in order.

        >>> writer = perce_lite.load("out/adapter", data="rows.jsonl")
        >>> writer.generate("Write a note about the snow.", profile="Short sentences. No adjectives.", max_new_tokens=8)
        '...'
        >>> prompts = ["Write a title.", {"prompt": "Write a note.", "user": "user0"}]
        >>> writer.generate(prompts, profile="", temperature=0.7, seed=1, max_new_tokens=8)
        ['...', '...']

        prompts: a text, messages, or a record {prompt, profile, user}; or several of these, in batches of `batch_size`
        profile: of prompts that name none: a text, or a list of texts or {title, text}; "": without one
        user: instead, a user of the adapter's data; their texts nearest to each prompt become its profile
        temperature: 0 is greedy; answers are drawn by `seed` otherwise, whatever was drawn before
        personal: how much more like the user than the model alone would write, see `Personal`

        Raises:
            AdapterError: no profile, and the adapter was trained with them; DataError: a prompt that is none, no such
                user, `personal` without a profile.
        """
        several = not isinstance(prompts, str | Mapping) and not _is_dialogue(prompts)
        asked: Sequence[Any] = prompts if several else [prompts]  # type: ignore[assignment]
        questions = [question_of(prompt, f"prompt {number}", profile, user) for number, prompt in enumerate(asked, 1)]
        wanted = wanted_profiles(self.metadata, questions)
        options = sampling(temperature, top_p)
        answered = self.answers(questions, wanted, max_new_tokens, use_adapter, personal, seed, batch_size, **options)
        answers = [figures["answer"] for figures in answered]
        return answers if several else answers[0]

    def answers(
        self,
        questions: Sequence[Question],
        wanted: Sequence[Profiled],
        max_new_tokens: int,
        use_adapter: bool = True,
        personal: float = 0.0,
        seed: int = 0,
        batch_size: int = 8,
        stream: bool = False,
        **options: Any,
    ) -> Iterator[dict[str, Any]]:
        """Each question's record with the profile that was in the prompt, who answered, and the answer; as they come.

        wanted: `wanted_profiles` of the questions
        stream: write each answer to standard output as well, token by token
        options: of transformers' `generate`
        """
        device = next(self.model.parameters()).device
        for start in range(0, len(questions), batch_size):
            batch = questions[start : start + batch_size]
            fitting = [
                (question.prompt, self.maker.fitting(question.prompt, profile))
                for question, profile in zip(batch, wanted[start : start + batch_size], strict=True)
            ]
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(seed + start)
                texts = generate_batch(
                    self.model,
                    self.maker,
                    fitting,
                    max_new_tokens,
                    use_adapter=use_adapter,
                    autocast=self.autocast,
                    stream=stream,
                    personal=self.personal(personal),
                    **options,
                )
            for question, (_, profile), [answer] in zip(batch, fitting, texts, strict=True):
                details = {"profile": self.maker.profile_text(profile), "model": "adapter" if use_adapter else "base"}
                named = {} if question.user is None else {"user": question.user}
                yield {**question.record, **named, **details, "answer": answer}


def _is_dialogue(prompts: Any) -> bool:
    """Whether `prompts` is one prompt in messages, not several prompts."""
    return bool(prompts) and all(isinstance(message, Mapping) and "role" in message for message in prompts)


def sampling(temperature: float, top_p: float) -> dict[str, Any]:
    """Options of transformers' `generate`; greedy at 0."""
    return {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {}


def load_adapter(metadata: dict[str, Any]) -> LoadedAdapter:
    """The adapter with this metadata (`adapter_files.read_metadata`) on its base, in eval mode.

    Raises:
        ModelError, DeviceError: its base cannot be loaded; AdapterError: the base has changed since.
    """
    base = load_base(recipe_of(metadata))
    return loaded_on(adapters.load(base.model, Path(metadata["folder"]), metadata=metadata), base.tokenizer, metadata)


def loaded_on(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, metadata: dict[str, Any]) -> LoadedAdapter:
    """The adapter with this metadata, which is on `model` already, with the prompts of its training.

    tokenizer: of the base; a copy of it gets the chat template of training
    """
    recipe = recipe_of(metadata)
    own = copy.copy(tokenizer)
    own.chat_template = metadata["chat_template"]
    maker = PairMaker.of(recipe, own, recipe.train.get("max_length", 1024))
    dtype = chosen_dtype(recipe.dtype, pick_device(recipe.device))
    return LoadedAdapter(metadata, recipe, model, maker, None if dtype == torch.float32 else dtype)
