"""A fleet's adapters as a folder that vLLM's filesystem LoRA resolver loads from at run time, and how it is served.

The resolver (`lora_filesystem_resolver`, a plugin that vLLM brings) takes a request's model name for the name of a
sub-folder, and loads it if the `base_model_name_or_path` of its adapter_config.json is, letter by letter, the model
that `vllm serve` was given (https://docs.vllm.ai/en/latest/design/lora_resolver_plugins/). Not run in vLLM itself.
"""

import json
import shlex
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perce_lite.errors import ExportError
from perce_lite.export_targets import PROOF, max_rank
from perce_lite.files import read_json, write_json, write_text
from perce_lite.fleet.registry import SERVED

USERS = "users.json"
"""In the folder: user -> the model name of the adapter that serves them; null: the base."""

BATCH = 8
"""Adapters in one batch of a server, unless it is told otherwise."""


@dataclass(frozen=True)
class ResolverFolder:
    """place: the folder; base: what its adapters call their base; rank: the highest, as vLLM counts

    models: (adapter, model name) of every sub-folder; serve: the command
    """

    place: Path
    base: str
    rank: int
    models: tuple[tuple[str, str], ...]
    serve: str


def default_place(fleet: Path) -> Path:
    """Where the adapters of a fleet are laid out; `adapters delete` knows it."""
    return fleet / SERVED


def finish(place: Path, exports: Sequence[Mapping[str, Any]], by_base: Collection[str]) -> ResolverFolder | None:
    """Writes beside the sub-folders who is served by which, and how; None: there is no whole export.

    exports: `adapter`, `users`, `folder` and `state` of each; by_base: users whom the base serves

    Raises:
        ExportError: the adapters name different bases.
    """
    whole = [export for export in exports if export["state"] != "failed"]
    if not whole:
        return None
    configs = [read_json(Path(export["folder"]) / "adapter_config.json") for export in whole]
    bases = sorted({str(config["base_model_name_or_path"]) for config in configs})
    if len(bases) > 1:
        raise ExportError(f"{place}: its adapters name several bases: {', '.join(bases)}; a server has one.")
    rank = max_rank(max(config["r"] for config in configs))
    assert rank is not None  # refused before it was exported
    models = tuple((str(export["adapter"]), Path(export["folder"]).name) for export in whole)
    of_users = {user: Path(export["folder"]).name for export in whole for user in export["users"]}
    write_json(place / USERS, dict(sorted({**of_users, **dict.fromkeys(by_base)}.items())))
    template = place.absolute() / models[0][1] / "chat_template.jinja"
    folder = ResolverFolder(place.absolute(), bases[0], rank, models, _vllm(place.absolute(), bases[0], rank, template))
    write_text(place / "README.md", _readme(folder))
    return folder


def remove_others(place: Path, names: Collection[str]) -> list[str]:
    """Removes exports in `place` other than `names`: a server would still load them. Gives their folders."""
    others = sorted(proof.parent for proof in place.glob(f"*/{PROOF}") if proof.parent.name not in names)
    for folder in others:
        shutil.rmtree(folder)
    return [str(folder) for folder in others]


def _vllm(place: Path, base: str, rank: int, template: Path) -> str:
    return " \\\n    ".join(
        [
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 VLLM_PLUGINS=lora_filesystem_resolver",
            f"VLLM_LORA_RESOLVER_CACHE_DIR={shlex.quote(str(place))}",
            f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {rank} --max-loras {BATCH}",
            f"--chat-template {shlex.quote(str(template))}",
        ]
    )


def _readme(folder: ResolverFolder) -> str:
    """How the folder is served."""
    base, name = folder.base, folder.models[0][1]
    path = str(folder.place / name)
    request = json.dumps({"lora_name": name, "lora_path": path}, ensure_ascii=False)
    lines = [
        "# Adapters of a fleet, a folder each",
        "",
        f"{USERS} says which of them serves a user: it is the `model` of a request. vLLM loads it at the first one:",
        "",
        *(f"    {line}" for line in folder.serve.splitlines()),
        "",
        f"- The model has to be called {base}, letter by letter: the resolver compares it with adapter_config.json.",
        f"- The name of a request is that of a folder, such as {name}. Who may send requests may load any of them.",
        "- What vLLM has loaded stays: after a new export POST the name to /v1/unload_lora_adapter, or start anew.",
        "",
        "SGLang has no resolver; each adapter is loaded by a request, and called BASE:NAME in `model`:",
        "",
        f"    python -m sglang.launch_server --model-path {shlex.quote(base)} --enable-lora \\",
        f"        --max-lora-rank {folder.rank} --lora-target-modules all --max-loras-per-batch {BATCH}",
        f"    curl localhost:30000/load_lora_adapter -H 'Content-Type: application/json' -d {shlex.quote(request)}",
        "",
        "LoRAX takes the folder's path for a name:",
        "",
        f"    lorax-launcher --model-id {shlex.quote(base)}",
        f'    client.generate(prompt, adapter_id={json.dumps(path, ensure_ascii=False)}, adapter_source="local")',
        "",
    ]
    return "\n".join(lines)
