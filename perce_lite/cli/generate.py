"""The command `perce-lite generate`."""

from pathlib import Path
from typing import Annotated

import typer

from perce_lite.cli.lazy import Lazy
from perce_lite.cli.options import (
    Json,
    Personal,
    ProfileText,
    Seed,
    Temperature,
    TopP,
    UserName,
    require_user,
    text_or_file,
    write,
)
from perce_lite.fleet import queries
from perce_lite.model.adapter_files import read_metadata, require_profile

answering = Lazy("perce_lite.model.answering")
generation = Lazy("perce_lite.model.generate")
transformers = Lazy("transformers")


def generate(
    adapter: Annotated[Path, typer.Option(help="The folder of an adapter, such as runs/quickstart/adapter.")],
    prompt: Annotated[str, typer.Option(help="What to ask.")],
    profile: ProfileText = None,
    no_profile: Annotated[bool, typer.Option("--no-profile", help="Go without a profile.")] = False,
    user: UserName = None,
    base: Annotated[bool, typer.Option("--base", help="Answer with the base, the adapter switched off.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at the most.")] = 200,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    personal: Personal = 0.0,
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Answer a prompt with an adapter, or with its base."""
    if sum((profile is not None, no_profile, user is not None)) > 1:
        raise typer.BadParameter("give one of --profile, --no-profile and --user")
    queries.refuse_deleted(adapter, user)
    metadata = read_metadata(adapter)
    require_user(metadata, user)
    text = "" if no_profile else text_or_file(profile)
    require_profile(metadata, text, user)
    transformers.set_seed(seed)
    options = answering.sampling(temperature, top_p)
    figures = generation.generate_from_folder(
        adapter, prompt, text, user, max_new_tokens, not base, stream=True, strength=personal, **options
    )
    write(json, figures)
