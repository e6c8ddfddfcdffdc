"""Generation with base or adapter, with a profile or without, from the prompt that training would make."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, TextStreamer
from transformers.generation import BaseStreamer

from perce_lite.config import chosen_dtype, pick_device
from perce_lite.data.pairs import PairMaker
from perce_lite.data.readers import user_texts
from perce_lite.data.rows import Message, Profiled
from perce_lite.errors import DataError
from perce_lite.model import adapter_files, adapters
from perce_lite.model.adapter_files import recipe_of, require_profile
from perce_lite.model.base import load_base
from perce_lite.model.fused_head import base_of
from perce_lite.model.personal_decoding import PersonalContrast
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
    tokenizer: PreTrainedTokenizerBase = maker.tokenizer
    device = next(model.parameters()).device
    tokens = maker.prompt(prompt, profile)
    ids = torch.tensor([tokens.ids], device=device)
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
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream is True else stream or None
    with no_grad_eval(model, adapters=use_adapter), autocast_to(device, autocast):
        out = base_of(model).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            eos_token_id=maker.stop_ids(),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=streamer,
            num_return_sequences=count,
            **{"do_sample": False, **options},
        )
    return [str(text).strip() for text in tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)]


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


def load_adapter(metadata: dict[str, Any]) -> LoadedAdapter:
    """The adapter with this metadata (`adapter_files.read_metadata`) on its base, in eval mode.

    Raises:
        ModelError, DeviceError: its base cannot be loaded; AdapterError: the base has changed since.
    """
    base = load_base(recipe_of(metadata))
    return loaded_on(adapters.load(base.model, Path(metadata["folder"])), base.tokenizer, metadata)


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


def generate_from_folder(
    folder: Path,
    prompt: str,
    profile: str | None,
    user: str | None,
    max_new_tokens: int,
    use_adapter: bool = True,
    stream: bool = False,
    strength: float = 0.0,
    **options: Any,
) -> dict[str, Any]:
    """The answer to `prompt` of the adapter in `folder`, or of its base; with the profile that was in the prompt.

    profile: the profile's text; "": without one
    user: instead of a profile, a user of the adapter's data; the texts nearest to the prompt become the profile
    strength: see `Personal`

    Raises:
        AdapterError: no adapter there, or the profile is missing that the adapter was trained with.
        DataError: `strength` without a profile.
    """
    metadata = adapter_files.read_metadata(folder)
    wanted = _wanted_profile(metadata, prompt, profile, user)
    loaded = load_adapter(metadata)
    messages = [{"role": "user", "content": prompt}]
    fitting = loaded.maker.fitting(messages, wanted)
    answer = generate(
        loaded.model,
        loaded.maker,
        messages,
        fitting,
        max_new_tokens,
        use_adapter,
        loaded.autocast,
        stream,
        loaded.personal(strength),
        **options,
    )
    return {
        "prompt": prompt,
        "profile": loaded.maker.profile_text(fitting),
        "model": "adapter" if use_adapter else "base",
        "answer": answer,
    }


def _wanted_profile(metadata: dict[str, Any], prompt: str, profile: str | None, user: str | None) -> Profiled:
    """The profile to answer with, before it is cut to what fits; arguments as in `generate_from_folder`.

    Raises:
        AdapterError: as `adapter_files.require_profile`.
    """
    require_profile(metadata, profile, user)
    if user is not None:
        recipe = Recipe.model_validate(metadata["recipe"])
        return user_texts(recipe, user).profile_for(prompt, recipe.profile)
    return profile or ""
