"""How an export is used as it was trained: command lines, chat template options, where the profile stands."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perce_lite.export_targets import max_rank
from perce_lite.model.base import model_source
from perce_lite.model.builtin import BUILT_IN
from perce_lite.recipe import Recipe

SYSTEM = "system.txt"
"""The file beside an export that carries a profile: what its system message has to say."""


def vllm(place: Path, metadata: Mapping[str, Any], recipe: Recipe, rank: int) -> str:
    """How vLLM and LoRAX are given the adapter whose files will lie at `place`."""
    base = model_source(recipe) if recipe.model in BUILT_IN or recipe.model_file else recipe.model
    place = place.absolute()
    named, path = shlex.quote(f"personal={place}"), json.dumps(str(place), ensure_ascii=False)
    model, template = json.dumps(str(base), ensure_ascii=False), shlex.quote(str(place / "chat_template.jinja"))
    options = template_options(metadata, recipe)
    given = f", chat_template_kwargs={options!r}" if options else ""
    return "\n".join(
        [
            "## Use",
            "",
            f"vLLM; the adapter's rank is {rank}, so it needs a max_lora_rank of {max_rank(rank)} or more:",
            "",
            f"    vllm serve {shlex.quote(str(base))} --enable-lora --max-lora-rank {max_rank(rank)} \\",
            f"        --lora-modules {named} --chat-template {template}",
            "",
            "    from vllm import LLM",
            "    from vllm.lora.request import LoRARequest",
            "",
            f"    llm = LLM(model={model}, enable_lora=True, max_lora_rank={max_rank(rank)})",
            f'    lora_request = LoRARequest("personal", 1, {path})',
            f"    llm.chat(messages, lora_request=lora_request{given})",
            "",
            "LoRAX:",
            "",
            f'    client.generate(prompt, adapter_id={path}, adapter_source="local")',
            "",
        ]
    )


def llama_cpp(model: str, metadata: Mapping[str, Any], recipe: Recipe, profile: str) -> str:
    """The command lines for llama.cpp. model: what stands behind --model."""
    options = template_options(metadata, recipe)
    kwargs = f" --jinja --chat-template-kwargs {shlex.quote(json.dumps(options))}" if options else ""
    lines = [f"    llama-server --model {model}{kwargs}"]
    if profile:
        lines.append(f"    llama-cli --model {model}{kwargs} --system-prompt-file {SYSTEM}")
    return "\n".join(["## Use", "", *lines, ""])


def as_trained(target: str, metadata: Mapping[str, Any], recipe: Recipe, profile: str) -> str:
    """What a program has to put into the prompt so that it reads as in training."""
    lines = []
    if profile:
        where = "the Modelfile, as its SYSTEM" if target == "ollama" else f"{SYSTEM}: give it as the system message"
        ahead = "" if target == "ollama" else ", or ahead of the question where the chat template has none"
        lines.append(f"- The profile is in {where}{ahead}. The proof was made with it. It holds the user's own texts.")
    elif metadata["train_on"] == "factual":
        texts = (recipe.template.profile, recipe.template.system or "")
        wrapped, system = (json.dumps(text, ensure_ascii=False) for text in texts)
        lines.append(
            f"- The profile stands in the prompt as {wrapped}, in the system message (after {system}) or, where the "
            "chat template has none, ahead of the question."
        )
    if target != "ollama" and (options := template_options(metadata, recipe)):
        lines.append(
            f"- The chat template is given {json.dumps(options)} (`chat_template_kwargs` of a request to vLLM or "
            "llama-server)."
        )
    return "\n".join(["## The prompt, as in training", "", *lines, ""]) if lines else ""


def template_options(metadata: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The recipe's `chat_template_kwargs` that the chat template looks at."""
    options = recipe.template.chat_template_kwargs
    return {name: value for name, value in options.items() if name in metadata["chat_template"]}


def without_profile(metadata: Mapping[str, Any]) -> str | None:
    """What an export lacks that carries no profile, and what that costs on held-out rows; None: it needs none."""
    if metadata["train_on"] != "factual":
        return None
    losses = {loss["profile"]: loss["adapter"] for loss in metadata["metrics"]["losses"]}
    cost = ""
    if {"own", "none"} <= set(losses):
        cost = (
            f" On held-out rows its loss is {losses['own']:.3f} nats a token with the own profile and "
            f"{losses['none']:.3f} without: {losses['none'] - losses['own']:.3f} more."
        )
    return (
        f"The export carries no profile, and the adapter was trained with one in the prompt.{cost} Give the profile "
        "with each question, export with --user NAME, which puts texts of NAME into the system message, or train with "
        "train_on: counterfactual, which needs none."
    )
