"""Obsidian vaults: which notes are templates, and what Obsidian's own marks stand for."""

import json
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

from perce_lite.data.importers.archives import Found

TEMPLATE = "a template of an Obsidian vault"

_SETTINGS = {".obsidian/templates.json": "folder", ".obsidian/plugins/templater-obsidian/data.json": "templates_folder"}
"""Files of a vault in which a setting names the folder of templates, and the setting."""

_USUAL = ("templates", "_templates", "template")


class Vaults:
    """The vaults among some files.

    Raises:
        OSError: settings of a vault that cannot be read.
    """

    def __init__(self, files: Sequence[Found]) -> None:
        paths = {PurePosixPath(file.name): file for file in files}
        roots = {path.parents[path.parts[::-1].index(".obsidian")] for path in paths if ".obsidian" in path.parts}
        self._templates = {root: _template_folders(root, paths) for root in roots}

    def hold(self, name: str) -> bool:
        """Whether the file of this name lies in a vault."""
        return any(root in PurePosixPath(name).parents for root in self._templates)

    def is_template(self, name: str) -> bool:
        """Whether the file of this name lies in a vault's folder of templates."""
        path = PurePosixPath(name)
        return any(folder in path.parents for folders in self._templates.values() for folder in folders)


def _template_folders(root: PurePosixPath, paths: dict[PurePosixPath, Found]) -> set[PurePosixPath]:
    folders = {path for file in paths for path in file.parents if path.name.lower() in _USUAL and root in path.parents}
    for place, setting in _SETTINGS.items():
        file = paths.get(root / place)
        named = _setting(file, setting) if file is not None else ""
        folders |= {root / named} if named.strip("/") else set()
    return folders


def _setting(file: Found, name: str) -> str:
    try:
        settings = json.loads(file.content() or b"{}")
    except ValueError:
        return ""
    value = settings.get(name) if isinstance(settings, dict) else None
    return value.strip("/") if isinstance(value, str) else ""


def without_marks(text: str) -> str:
    """A note as it is shown: links by their words, without embedded files, comments, block names and queries."""
    text = re.sub(r"%%.*?%%", "", text, flags=re.S)
    text = re.sub(r"(?m)^```(?:dataview|dataviewjs|query|tasks)\b[\s\S]*?^```[ \t]*$", "", text)
    text = re.sub(r" ?!\[\[[^\[\]\n]*\]\]", "", text)
    text = re.sub(r"\[\[[^\[\]|\n]*\|([^\[\]\n]+)\]\]", r"\1", text)
    text = re.sub(r"\[\[([^\[\]\n]+)\]\]", r"\1", text)
    return re.sub(r"(?m)[ \t]+\^[\w-]+[ \t]*$", "", text)
