"""A whole fleet exported, one adapter after another over one base: what serves somebody, as the registry says."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perce_lite.console import no_bars, progress_bar, say, warn
from perce_lite.errors import DiskFullError, ExportError, PerceLiteError
from perce_lite.export import resolver_folder
from perce_lite.export.export import QUANT, check_options, export, verify
from perce_lite.export.proof import read_proof
from perce_lite.export.reuse import kept
from perce_lite.export.writers import source_hash
from perce_lite.fleet.groups import Key, served_name
from perce_lite.fleet.queries import find, who
from perce_lite.fleet.registry import Registry, opened


@dataclass
class Served:
    """An adapter in service, and whom it serves."""

    key: Key
    folder: Path
    users: list[str] = field(default_factory=list)


def export_all(
    fleet: Path | None,
    target: str,
    out: Path | None = None,
    force: bool = False,
    base_gguf: Path | None = None,
    quant: str | None = None,
) -> dict[str, Any]:
    """Exports every adapter of a fleet that serves somebody; gives what `--json` writes.

    Exports that are there, of the very adapter, and still hold their proof are left alone; so a stopped run resumes.

    fleet: the fleet's folder; None: the only one under runs/
    out: a folder to put them in; None: each beside its adapter, for vllm all in one folder of the fleet's, where
        `adapters delete` finds them
    force: make even those anew; base_gguf, quant: as `export`

    Raises:
        FleetError: no fleet there; ExportError: no such target; DiskFullError: no space left.
        One adapter's failure is told, and the others go on.
    """
    check_options(target, base_gguf, quant)
    folder = find(fleet)
    with opened(folder) as registry:
        serving, bare = served(registry)
    if target == "vllm" and out is None:
        out = resolver_folder.default_place(folder)
        for left in resolver_folder.remove_others(out, {served_name(entry.key) for entry in serving}):
            say(f"{left}: removed, for it serves nobody any more")
    outcomes = []
    with progress_bar() as bar, no_bars(), kept():
        progress = bar.add_task("Exports", total=len(serving), note="")
        for adapter in serving:
            place = (
                adapter.folder.with_name(f"{adapter.folder.name}-{target}")
                if out is None
                else out / served_name(adapter.key)
            )
            done = {"adapter": " ".join(adapter.key), "users": adapter.users, "folder": str(place)}
            outcomes.append(done | _export(adapter, target, place, force, base_gguf, quant))
            bar.update(progress, advance=1, note=done["adapter"])
    failed = sum(outcome["state"] == "failed" for outcome in outcomes)
    figures = {"fleet": str(folder), "target": target, "exports": outcomes, "served_by_base": bare, "failed": failed}
    if target == "vllm" and out is not None and (laid_out := resolver_folder.finish(out, outcomes, bare)) is not None:
        figures |= {"folder": str(laid_out.place), "serve": laid_out.serve}
    return figures


def served(registry: Registry) -> tuple[list[Served], list[str]]:
    """The adapters that serve somebody, and the users whom the bare base serves."""
    by_adapter: dict[Key, Served] = {}
    bare = []
    for user in registry.users():
        serves = who(registry, user)
        if serves.adapter is None or serves.folder is None:
            bare.append(user)
            continue
        by_adapter.setdefault(serves.adapter, Served(serves.adapter, Path(serves.folder))).users.append(user)
    return list(by_adapter.values()), bare


def _export(
    adapter: Served, target: str, place: Path, force: bool, base_gguf: Path | None, quant: str | None
) -> dict[str, Any]:
    """One adapter: what became of it."""
    try:
        if not force and _holds(adapter.folder, target, place, base_gguf, quant):
            return {"state": "kept"}
        figures = export(adapter.folder, target, place, True, base_gguf, quant)
    except DiskFullError:
        raise
    except PerceLiteError as error:
        warn(f"{' '.join(adapter.key)}: left out. {error}")
        return {"state": "failed", "why": str(error)}
    return {"state": "exported", "proof": figures["proof"]}


def _holds(source: Path, target: str, place: Path, base_gguf: Path | None, quant: str | None) -> bool:
    """Whether an export of this very adapter lies at `place` and is proven once more."""
    try:
        proof = read_proof(place)
        wanted = (target, source_hash(source), (quant or QUANT) if target in ("gguf", "ollama") else "", "")
        if (proof.target, proof.source, proof.quant, proof.profile) != wanted:
            return False
        verify(place, base_gguf)
    except ExportError:
        return False
    return True
