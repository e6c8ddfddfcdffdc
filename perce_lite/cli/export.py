"""The command `perce-lite export`."""

from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from perce_lite.cli.lazy import Lazy
from perce_lite.cli.options import FleetPath, Json, Model, TemplateFile, agreed, require_user, writable, write
from perce_lite.cli.views import terminal
from perce_lite.console import warn
from perce_lite.errors import ExportError
from perce_lite.export_targets import refuse_unknown, written_proof
from perce_lite.fleet import queries
from perce_lite.model.adapter_files import Said, read_metadata

exports = Lazy("perce_lite.export.export")
fleet_exports = Lazy("perce_lite.export.export_all")
hub = Lazy("perce_lite.export.hub")


def export(
    adapter: Annotated[Path | None, typer.Argument(help="The folder of an adapter.")] = None,
    to: Annotated[str | None, typer.Option(help="peft, merged, gguf-lora, gguf, vllm or ollama.")] = None,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, callback=writable, help="Else <adapter>-<target>, beside it.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export there.")] = False,
    verify: Annotated[Path | None, typer.Option(help="Repeat the proof of this export instead.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Every adapter of a fleet that serves somebody.")] = False,
    fleet: FleetPath = None,
    base_gguf: Annotated[
        Path | None, typer.Option(help="gguf-lora: the base as a GGUF file, for a llama.cpp to prove the adapter on.")
    ] = None,
    quant: Annotated[str | None, typer.Option(help="gguf, ollama: F32, F16, BF16, Q8_0 ...; else F16.")] = None,
    evaluation: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="What eval --json wrote, for the model card.")
    ] = None,
    user: Annotated[
        str | None,
        typer.Option(help="A user of the data: texts of theirs go into the export as its profile."),
    ] = None,
    push_to_hub: Annotated[str | None, typer.Option(help="peft, merged: a repository to upload it to.")] = None,
    public: Annotated[bool, typer.Option("--public", help="--push-to-hub: for everybody to read.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="--push-to-hub: do not ask.")] = False,
    model: Model = None,
    template: TemplateFile = None,
    json: Json = None,
) -> None:
    """Take an adapter to other programs; it is loaded again and shown to do what it did in training."""
    if [adapter is not None, verify is not None, all_].count(True) != 1 or (verify is None) != (to is not None):
        raise typer.BadParameter("give an adapter and --to TARGET, --all and --to TARGET, or --verify FOLDER alone")
    of_one = any((evaluation, push_to_hub, user, model, template))
    if verify is not None and (of_one or out is not None or force or quant):
        raise typer.BadParameter("--verify writes nothing, so it goes with --base-gguf and --json alone")
    if all_ and of_one:
        names = "--evaluation, --user, --model, --template and --push-to-hub"
        raise typer.BadParameter(f"{names} are for one adapter, not for --all")
    if fleet is not None and not all_:
        raise typer.BadParameter("--fleet goes with --all")
    if user is not None and push_to_hub is not None:
        raise typer.BadParameter("--user puts a user's own texts into the export, and --push-to-hub would upload them")
    if (public or yes) and push_to_hub is None:
        raise typer.BadParameter("--public and --yes go with --push-to-hub")
    said = Said(model, None, template)
    _refuse_at_once(adapter, to, verify, quant, user, said)
    figures: dict[str, Any]
    if verify is not None:
        figures = exports.verify(verify, base_gguf)
    elif to is not None and adapter is not None:
        if push_to_hub is not None:
            _ask(push_to_hub, to, public, yes)
        figures = exports.export(adapter, to, out, force, base_gguf, quant, evaluation, user, said)
        if push_to_hub is not None:
            figures["pushed"] = hub.push(Path(figures["folder"]), push_to_hub, public)
    elif to is not None:
        _report_all(fleet_exports.export_all(fleet, to, out, force, base_gguf, quant), json)
    write(json, figures)
    terminal.show_export(figures)


def _refuse_at_once(
    adapter: Path | None, to: str | None, verify: Path | None, quant: str | None, user: str | None, said: Said
) -> None:
    """Raises what is wrong with the target, the adapter, its user or the export, before torch is imported."""
    if to is not None:
        refuse_unknown(to, quant)
    if adapter is not None:
        queries.refuse_deleted(adapter, user)
        require_user(read_metadata(adapter, said), user)
    if verify is not None:
        written_proof(verify)


def _report_all(figures: dict[str, Any], json: Path | None) -> NoReturn:
    write(json, figures)
    terminal.show_exports(figures)
    raise typer.Exit(3 if figures["failed"] else 0)


def _ask(repo: str, target: str, public: bool, yes: bool) -> None:
    """The warning, and the question; raises ExportError where the answer is no, or nobody can be asked."""
    warn(hub.check(repo, target, public))
    unasked = f"--push-to-hub {repo}: nobody can be asked here. Nothing was exported. Give --yes if it is meant."
    if not agreed(f"Push to {repo}?", yes, ExportError(unasked)):
        raise ExportError("Nothing was exported or pushed.")
