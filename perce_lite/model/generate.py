"""Text from base or adapter, with the profile or without, through the prompt that training saw."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TextStreamer

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
    stream: bool = False,
    **options: Any,
) -> str:
    """The answer to `prompt`, greedy unless `options` (of transformers' `generate`) say otherwise.

    stream: also write it to standard output while it comes
    """
    tokenizer: PreTrainedTokenizerBase = maker.tokenizer
    device = next(model.parameters()).device
    asked = maker.prompt(prompt, profile)
    ids = torch.tensor([asked.ids], device=device)
    known = options.get("past_key_values")
    if use_adapter and asked.prefix_length > (0 if known is None else known.get_seq_length()):  # the bare base reads it
        options["past_key_values"] = encode_prefix(model, asked.prefix_ids, autocast, known)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
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
    """An adapter's folder, loaded: its base with it on, and what makes the prompts that training saw."""

    card: dict[str, Any]
    recipe: Recipe
    model: PeftModel
    maker: PairMaker
    autocast: torch.dtype | None


def load_adapter(card: dict[str, Any]) -> LoadedAdapter:
    """The adapter whose `adapters.read_metadata` is `card`, on its base, in eval mode.

    Raises:
        ModelError, DeviceError: its base cannot be loaded; AdapterError: the base is another one now.
    """
    recipe = Recipe.model_validate(card["recipe"])
    recipe.train.pop("chat_template_path", None)  # the card holds what the file said
    base = load_base(recipe)
    model = adapters.load(base.model, Path(card["folder"]))
    base.tokenizer.chat_template = card["chat_template"]
    maker = PairMaker.of(recipe, base.tokenizer, recipe.train.get("max_length", 1024))
    dtype = chosen_dtype(recipe.dtype, pick_device(recipe.device))
    return LoadedAdapter(card, recipe, model, maker, None if dtype == torch.float32 else dtype)


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
    """The answer of the adapter in `folder` (or of its base) to `prompt`.

    profile: the profile's text; "" for none
    user: instead, a user of the adapter's own data, whose texts nearest to the prompt become the profile

    Raises:
        AdapterError: no adapter there, or a profile is missing that the adapter was trained with.
    """
    card = adapters.read_metadata(folder)
    chosen: Profiled
    if user is not None:
        trained_with = Recipe.model_validate(card["recipe"])
        chosen = user_texts(trained_with, user).profile_for(prompt, trained_with.profile)
    elif profile is not None:
        chosen = profile
    elif card["train_on"] == "factual":
        raise AdapterError(
            "This adapter was trained with the user's profile in the prompt. Give --profile TEXT (or --profile @FILE), "
            "--user NAME for a user of its data, or --no-profile to go without."
        )
    else:
        chosen = ""
    its = load_adapter(card)
    message = [{"role": "user", "content": prompt}]
    chosen = its.maker.fitting(message, chosen)
    answer = generate(
        its.model, its.maker, message, chosen, max_new_tokens, use_adapter, its.autocast, stream, **options
    )
    return {
        "prompt": prompt,
        "profile": its.maker.profile_text(chosen),
        "model": "adapter" if use_adapter else "base",
        "answer": answer,
    }
