"""Generation with base or adapter, with a profile or without, from the prompt that training would make."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer
from transformers.generation import BaseStreamer

from perce_lite.config import chosen_dtype, pick_device
from perce_lite.data.pairs import PairMaker
from perce_lite.data.readers import user_texts
from perce_lite.data.rows import Message, Profiled
from perce_lite.errors import AdapterError
from perce_lite.model import adapters
from perce_lite.model.base import load_base
from perce_lite.model.fused_head import base_of
from perce_lite.model.scoring import autocast_to, encode_prefix, no_grad_eval
from perce_lite.recipe import Recipe


def generate(
    model: torch.nn.Module,
    maker: PairMaker,
    prompt: Sequence[Message],
    profile: Profiled,
    max_new_tokens: int,
    use_adapter: bool = True,
    autocast: torch.dtype | None = None,
    stream: bool | BaseStreamer = False,
    **options: Any,
) -> str:
    """The answer to `prompt`; greedy unless `options`, of transformers' `generate`, change that.

    stream: write it to standard output as well, token by token; or what takes each token instead
    """
    tokenizer: PreTrainedTokenizerBase = maker.tokenizer
    device = next(model.parameters()).device
    tokens = maker.prompt(prompt, profile)
    ids = torch.tensor([tokens.ids], device=device)
    cache = options.get("past_key_values")
    cached_length = 0 if cache is None else cache.get_seq_length()
    if use_adapter and tokens.prefix_length > cached_length:
        options["past_key_values"] = encode_prefix(model, tokens.prefix_ids, autocast, cache)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream is True else stream or None
    with no_grad_eval(model, adapters=use_adapter), autocast_to(device, autocast):
        out = base_of(model).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            eos_token_id=maker.stop_ids(),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=streamer,
            **{"do_sample": False, **options},
        )
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).strip()


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter on its base, and the maker of the prompts that it was trained with."""

    metadata: dict[str, Any]
    recipe: Recipe
    model: torch.nn.Module
    maker: PairMaker
    autocast: torch.dtype | None


def load_adapter(metadata: dict[str, Any]) -> LoadedAdapter:
    """The adapter with this metadata (`adapters.read_metadata`) on its base, in eval mode.

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


def recipe_of(metadata: dict[str, Any]) -> Recipe:
    """The recipe that an adapter was trained with; the metadata hold the text of its chat template file."""
    recipe = Recipe.model_validate(metadata["recipe"])
    recipe.train.pop("chat_template_path", None)
    return recipe


def generate_from_folder(
    folder: Path,
    prompt: str,
    profile: str | None,
    user: str | None,
    max_new_tokens: int,
    use_adapter: bool = True,
    stream: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """The answer to `prompt` of the adapter in `folder`, or of its base; with the profile that was in the prompt.

    profile: the profile's text; "": without one
    user: instead of a profile, a user of the adapter's data; the texts nearest to the prompt become the profile

    Raises:
        AdapterError: no adapter there, or the profile is missing that the adapter was trained with.
    """
    metadata = adapters.read_metadata(folder)
    wanted = _wanted_profile(metadata, prompt, profile, user)
    loaded = load_adapter(metadata)
    messages = [{"role": "user", "content": prompt}]
    fitting = loaded.maker.fitting(messages, wanted)
    answer = generate(
        loaded.model, loaded.maker, messages, fitting, max_new_tokens, use_adapter, loaded.autocast, stream, **options
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
        AdapterError: neither a profile nor a user is named, and the adapter was trained with profiles.
    """
    if user is not None:
        recipe = Recipe.model_validate(metadata["recipe"])
        return user_texts(recipe, user).profile_for(prompt, recipe.profile)
    if profile is not None:
        return profile
    if metadata["train_on"] == "factual":
        raise AdapterError(
            "This adapter was trained with the user's profile in the prompt. Give --profile TEXT (or --profile @FILE), "
            "--user NAME for a user of its data, or --no-profile to go without."
        )
    return ""
