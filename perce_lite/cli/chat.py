"""The command `perce-lite chat`."""

from pathlib import Path
from typing import Annotated

import typer

from perce_lite.cli.lazy import Lazy
from perce_lite.cli.options import (
    AdapterPath,
    Data,
    Model,
    Personal,
    ProfileText,
    Seed,
    Temperature,
    TemplateFile,
    TopP,
    UserName,
    require_user,
    say_loading,
    text_or_file,
)
from perce_lite.errors import FleetError
from perce_lite.model.adapter_files import Said, read_metadata

conversation = Lazy("perce_lite.cli.conversation")
generation = Lazy("perce_lite.model.generate")
queries = Lazy("perce_lite.fleet.queries")
registry = Lazy("perce_lite.fleet.registry")
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
    model: Model = None,
    data: Data = None,
    template: TemplateFile = None,
) -> None:
    """Talk to an adapter in the terminal; /help lists what else can be said there."""
    if profile is not None and user is not None:
        raise typer.BadParameter("give one of --profile and --user")
    queries.refuse_deleted(adapter, user)
    text = text_or_file(profile)
    metadata = read_metadata(_serving(adapter, user), Said(model, data, template))
    require_user(metadata, user)
    say_loading(metadata)
    opened = generation.load_adapter(metadata)
    transformers.set_seed(seed)
    conversation.chat(opened, text, user, max_new_tokens, personal, **generation.sampling(temperature, top_p))


def _serving(folder: Path, user: str | None) -> Path:
    """`folder`; where it is a fleet's, the folder of the adapter that serves `user`.

    Raises:
        FleetError: no such user, or one whom no adapter serves.
    """
    if user is None or not (folder / registry.FILE).is_file():
        return folder
    with registry.opened(folder) as known:
        serving = queries.who(known, user)
    if serving.folder is None:
        raise FleetError(f"user {user}: no adapter of the fleet serves them: {serving.why}")
    return Path(serving.folder)
