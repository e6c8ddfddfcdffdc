"""The command `perce-lite serve`."""

from pathlib import Path
from typing import Annotated

import typer

from perce_lite.cli.lazy import Lazy
from perce_lite.cli.options import FleetPath
from perce_lite.console import console
from perce_lite.errors import ServeError
from perce_lite.fleet import queries
from perce_lite.fleet.registry import opened
from perce_lite.model.adapter_files import read_metadata

server = Lazy("perce_lite.serve.server")


def serve(
    adapter: Annotated[Path | None, typer.Argument(help="The folder of an adapter; or give --fleet.")] = None,
    fleet: FleetPath = None,
    host: Annotated[str, typer.Option(help="Address; one that others reach needs --api-key-file.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: one that is free.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(dir_okay=False, help="A key a line, a user's name after a key that is theirs alone.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name that the server may be called by, beside --host.")
    ] = None,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are refused (429).")] = 8,
    queue_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a request waits (503).")] = 120.0,
    answer_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds after which an answer is ended.")] = 600.0,
    adapter_memory: Annotated[int, typer.Option(min=1, help="MiB of adapters in memory.")] = 1024,
) -> None:
    """Serve an adapter or a fleet: an OpenAI endpoint whose models are your users, and a page to look at."""
    if (adapter is None) == (fleet is None):
        raise typer.BadParameter("give an adapter's folder, or --fleet FOLDER")
    if adapter is not None:
        queries.refuse_deleted(adapter)
        read_metadata(adapter)
    if fleet is not None:
        with opened(fleet):
            pass
    try:
        settings = server.Settings(
            host, port, api_key_file, allow_host or (), max_queue, queue_timeout, answer_timeout, adapter_memory
        )
    except ModuleNotFoundError as error:
        raise ServeError(f"{error.name} is not installed: pip install 'perce-lite[serve]' brings it.") from error
    ready = server.make_server(adapter, fleet, settings)
    console.print(server.told_at_start(ready, settings), markup=False, soft_wrap=True)
    ready.serve_until_stopped()
