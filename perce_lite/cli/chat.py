"""The command `perce-lite chat`."""

from typing import Annotated

import typer

from perce_lite.cli.lazy import Lazy
from perce_lite.cli.options import (
    AdapterPath,
    Personal,
    ProfileText,
    Seed,
    Temperature,
    TopP,
    UserName,
    require_user,
    text_or_file,
)
from perce_lite.fleet import queries
from perce_lite.model.adapter_files import read_metadata

answering = Lazy("perce_lite.model.answering")
conversation = Lazy("perce_lite.cli.conversation")
generation = Lazy("perce_lite.model.generate")
transformers = Lazy("transformers")


def chat(
    adapter: AdapterPath,
    profile: ProfileText = None,
    user: UserName = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at the most.")] = 200,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    personal: Personal = 0.0,
    seed: Seed = 0,
) -> None:
    """Talk to an adapter in the terminal; /help lists what else can be said there."""
    if profile is not None and user is not None:
        raise typer.BadParameter("give one of --profile and --user")
    queries.refuse_deleted(adapter, user)
    metadata = read_metadata(adapter)
    require_user(metadata, user)
    text = text_or_file(profile)
    opened = generation.load_adapter(metadata)
    transformers.set_seed(seed)
    conversation.chat(opened, text, user, max_new_tokens, personal, **answering.sampling(temperature, top_p))
