"""A run: the recipe, data and base that an output folder belongs to, with its checkpoints and its adapter."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perce_lite.console import say
from perce_lite.data.rows import Row
from perce_lite.errors import RunError
from perce_lite.files import digest, read_json, settle, write_json
from perce_lite.locks import held_alone
from perce_lite.model import adapters
from perce_lite.model.adapter_files import PLAIN, Storage
from perce_lite.recipe import Recipe


def run_of(recipe: Recipe, rows: Sequence[Row]) -> "Run":
    """The run of this recipe on these rows, in the recipe's output folder."""
    return Run(recipe.output_dir, digest([recipe.fingerprint(), [row.fingerprint() for row in rows]]))


def checkpoints_in(folder: Path) -> list[Path]:
    """Every checkpoint folder, whole or torn, in no order."""
    return [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that was written whole: its trainer_state.json, written last, can be read."""
    complete = [path for path in checkpoints_in(folder) if read_json(path / "trainer_state.json") is not None]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


@dataclass(frozen=True)
class Run:
    """An output folder and the one run it belongs to.

    fingerprint: hash of the recipe and its rows
    name: what the adapter's metadata calls the run; None: its fingerprint
    storage: how its adapter is stored
    """

    folder: Path
    fingerprint: str
    name: str | None = None
    storage: Storage = PLAIN

    @property
    def name_in_metadata(self) -> str:
        return self.name or self.fingerprint

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    @property
    def figures(self) -> Path:
        """Beside the adapter, not in it: they quote the user's texts."""
        return self.folder / "figures.json"

    def finished(self, recipe: Recipe) -> dict[str, Any] | None:
        """The figures of this run if it was finished before; None also if `evaluation` has changed since.

        Raises:
            RunError: the folder belongs to another run.
        """
        if self._known() and read_json(self._marker)["run"] != self.fingerprint:
            self._refuse()
        figures = read_json(self.figures)
        if not self.trained():
            return None
        if figures is None or figures["evaluation"] != recipe.evaluation.model_dump():
            return None
        return {**figures, "adapter": str(self.adapter)}

    def trained(self) -> bool:
        """Whether this run's adapter was saved.

        Raises:
            RunError: the adapter in the folder is another run's.
        """
        metadata = read_json(self.adapter / adapters.METADATA)
        if metadata is not None and metadata.get("run") != self.name_in_metadata:
            self._refuse()
        return metadata is not None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Holds the folder's lock: one training at a time writes there. What a killed one has left half done is ended.

        Raises:
            RunError: another process is training in the folder, or the folder is another program's.
        """

        def refuse(who: str) -> RunError:
            return RunError(
                f"{self.folder}: another run is training here ({who}). Wait for it or stop it, or take another folder "
                "with --set train.output_dir=FOLDER. Nothing was touched."
            )

        self._known()
        with held_alone(self.folder / ".run.lock", refuse):
            self.settle()
            yield

    def settle(self) -> None:
        """Ends what a killed run has left half written; only for who holds the lock."""
        for path in (self.adapter, self.figures, self._marker):
            settle(path)

    def claim(self, base: str) -> None:
        """Marks the folder as this run's, over the base with fingerprint `base`.

        Raises:
            RunError: it is marked as another run's.
        """
        marker = {"run": self.fingerprint, "base": base}
        if not self._known():
            write_json(self._marker, marker)
        elif read_json(self._marker) != marker:
            self._refuse()

    def last_checkpoint(self) -> str | None:
        """The checkpoint that training resumes from, which is announced; None: there is none."""
        newest = newest_checkpoint(self.folder)
        if newest is None:
            return None
        say(f"Resuming from {newest}")
        return str(newest)

    def forget(self) -> None:
        """Removes what a run writes into the folder, and nothing else.

        Raises:
            RunError: checkpoints or an adapter that no marker says PerCE Lite made.
        """
        known = self._known()
        for folder in checkpoints_in(self.folder):
            _remove_checkpoint(folder)
        shutil.rmtree(self.adapter, ignore_errors=True)
        for file in (self.figures, self._marker) if known else ():  # the marker last: after a kill the rest is known
            file.unlink(missing_ok=True)

    def make_way(self, base: str) -> None:
        """Removes checkpoints of another run or over another base; the adapter stays until a new one replaces it.

        Only for a folder that is known to be ours: a fleet's.
        """
        self.settle()
        if read_json(self._marker) != {"run": self.fingerprint, "base": base}:
            self.drop_checkpoints()
        if self.adapter.is_dir() and not _has_run(self.adapter / adapters.METADATA):  # torn: it cannot be loaded
            shutil.rmtree(self.adapter)

    def drop_checkpoints(self) -> None:
        """Removes the checkpoints and the marker of a finished run; the adapter's metadata names the run."""
        for folder in checkpoints_in(self.folder):
            _remove_checkpoint(folder)
        self._marker.unlink(missing_ok=True)

    @property
    def _marker(self) -> Path:
        return self.folder / "run.json"

    def _known(self) -> bool:
        """Whether the folder has a run's marker.

        Raises:
            RunError: without one, it holds checkpoints or an adapter that another program may have made.
        """
        if _has_run(self._marker):
            return True
        unknown = checkpoints_in(self.folder)
        if self.adapter.exists() and not _has_run(self.adapter / adapters.METADATA):
            unknown.append(self.adapter)
        if unknown:
            raise RunError(
                f"{self.folder} holds {', '.join(path.name for path in unknown)}, but no {self._marker.name} that "
                "would say that PerCE Lite made them. Nothing was touched. Take another folder with --set "
                "train.output_dir=FOLDER, or remove them yourself: --restart does not."
            )
        return False

    def _refuse(self) -> None:
        raise RunError(
            f"{self.folder} holds a run of another recipe, data or base. Nothing was touched. Take another folder with "
            "--set train.output_dir=FOLDER, or throw the old run away: perce-lite train --restart, or rm -r."
        )


def _remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint; first the file by which it is known to be whole, so that half of one is never resumed."""
    (folder / "trainer_state.json").unlink(missing_ok=True)
    shutil.rmtree(folder)


def _has_run(path: Path) -> bool:
    """Whether `path` is a JSON file of ours: it names a run and its base."""
    content = read_json(path)
    return isinstance(content, dict) and {"run", "base"} <= set(content)
