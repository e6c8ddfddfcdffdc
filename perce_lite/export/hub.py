"""An export to the Hub: private unless asked otherwise, and only after a warning."""

import json
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError

from perce_lite.errors import ExportError, first_line
from perce_lite.export.proof import read_proof
from perce_lite.files import read_json
from perce_lite.model.adapter_files import base_name

TARGETS = ("peft", "merged")
"""What is pushed: what the Hub's own libraries load."""

WARNING = (
    "An adapter can leak the texts that it was trained on: whoever may read {repo} ({seen}) may get them out of it. "
    "Its model card names keys of your recipe; paths of this machine are left out."
)
_REFUSALS = (HFValidationError, HTTPError, OSError)


def check(repo: str, target: str, public: bool) -> str:
    """Whether an export can be pushed to `repo`, before any work; gives the warning.

    Raises:
        ExportError: a target that is not pushed, a name that is none, nobody logged in, no network, or a repository
            that everybody can read where that was not asked for.
    """
    if target not in TARGETS:
        raise ExportError(f"--push-to-hub goes with {' and '.join(TARGETS)}, not with {target}.")
    if repo.count("/") != 1:
        raise ExportError(f"--push-to-hub {repo}: is no repository. Give YOU/NAME.")
    try:
        api = HfApi()
        api.whoami()
        if api.repo_exists(repo) and not public and not api.repo_info(repo).private:
            raise ExportError(
                f"--push-to-hub {repo}: everybody can read that repository. Nothing was exported. Give another one, or "
                "--public if that is meant."
            )
    except _REFUSALS as error:
        raise ExportError(
            f"--push-to-hub {repo}: the Hub cannot be asked: {first_line(error)} Nothing was exported. Log in with "
            "`hf auth login`."
        ) from error
    return WARNING.format(repo=repo, seen="everybody, with --public" if public else "private: you, and whom you let in")


@contextmanager
def _without_places(folder: Path) -> Iterator[Path]:
    """A copy of the export in `folder`, of links where the disk has them, whose texts call a local base by its name."""
    model = read_proof(folder).model
    config = read_json(folder / "adapter_config.json")
    places = [model, config.get("base_model_name_or_path") if isinstance(config, dict) else None]
    named = [(place, base_name(model)) for place in places if place and Path(place).is_absolute()]
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent) as scratch:
        for file in folder.iterdir():
            copy = Path(scratch) / file.name
            if file.suffix in (".json", ".md", ".txt", ".jinja"):
                copy.write_text(_renamed(file.read_text("utf-8"), named), "utf-8")
            else:
                _link(file, copy)
        yield Path(scratch)


def _link(file: Path, copy: Path) -> None:
    try:
        os.link(file, copy)
    except OSError:  # a file system without hard links
        shutil.copyfile(file, copy)


def _renamed(text: str, named: Sequence[tuple[str, str]]) -> str:
    """`text` with each place, as it is and as JSON spells it, replaced by its name."""
    for place, name in named:
        for spelt, as_name in ((place, name), (json.dumps(place)[1:-1], json.dumps(name)[1:-1])):
            text = text.replace(spelt, as_name)
    return text


def push(folder: Path, repo: str, public: bool) -> str:
    """Uploads the export in `folder` to `repo`, which is made if it is not there; gives its address.

    Raises:
        ExportError: the Hub refuses; the export in `folder` stays.
    """
    try:
        api = HfApi()
        api.create_repo(repo, private=not public, exist_ok=True)
        with _without_places(folder) as copy:
            api.upload_folder(repo_id=repo, folder_path=copy, commit_message="Export of PerCE Lite")
    except _REFUSALS as error:
        raise ExportError(
            f"--push-to-hub {repo}: the Hub did not take it: {first_line(error)} The export is whole: {folder}. Push "
            f"it with: hf upload {repo} {shlex.quote(str(folder))}"
        ) from error
    return f"https://huggingface.co/{repo}"
