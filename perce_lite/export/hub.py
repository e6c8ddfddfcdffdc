"""An export to the Hub: private unless asked otherwise, and only after a warning."""

import shlex
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, HTTPError

from perce_lite.errors import ExportError, first_line

TARGETS = ("peft", "merged")
"""What is pushed: what the Hub's own libraries load."""

WARNING = (
    "An adapter can leak the texts that it was trained on: whoever may read {repo} ({seen}) may get them out of it. "
    "Its model card names your recipe, and the paths in it."
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


def push(folder: Path, repo: str, public: bool) -> str:
    """Uploads the export in `folder` to `repo`, which is made if it is not there; gives its address.

    Raises:
        ExportError: the Hub refuses; the export in `folder` stays.
    """
    try:
        api = HfApi()
        api.create_repo(repo, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Export of PerCE Lite")
    except _REFUSALS as error:
        raise ExportError(
            f"--push-to-hub {repo}: the Hub did not take it: {first_line(error)} The export is whole: {folder}. Push "
            f"it with: hf upload {repo} {shlex.quote(str(folder))}"
        ) from error
    return f"https://huggingface.co/{repo}"
