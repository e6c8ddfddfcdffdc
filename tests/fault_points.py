"""Faults at every write: a command is stopped at its n-th write, rename or removal, then run again, and must end alike.

    python tests/fault_points.py COMMAND KIND [EVERY [FIRST]]

Prints one JSON object: how many points there are, how many were tried, and those after which the next run ended
otherwise. The points are those of the audit hooks of Python (every `open` for writing, rename, removal, new folder),
the files that safetensors writes in Rust, and each statement that is given to SQLite. Each run is a fork of this
process, which has loaded torch and the toy model's files but no more, so that a point costs no new start.
"""

import json
import math
import operator
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
import traceback
from collections.abc import Callable
from errno import ENOSPC
from pathlib import Path
from typing import Any

ROW_FILES = "model: toy\nquantization: none\ndtype: float32\ndevice: cpu\ndata: {path: rows.jsonl}\n"
TRAIN = "train: {max_steps: 2, save_steps: 1, learning_rate: 0.05, output_dir: out, store: store, warmup_steps: 0}\n"
EVALUATION = "evaluation: {max_rows: 2, max_new_tokens: 2}\n"
FLEET = "fleet: {min_examples: 4, gate: null, slots: SLOTS}\nlora: {r: 2}\n"

COMMANDS = {
    "train": ["train", "mine.yaml"],
    "fleet": ["fleet", "mine.yaml"],
    "slots": ["fleet", "mine.yaml"],
    "export": ["export", "out", "--to", "peft"],
    "import": ["import", "notes", "--user", "ann", "--append", "--yes"],
    "delete": ["adapters", "delete", "user0", "--fleet", "out", "--yes"],
}

CHANGES = {"store_hits", "updated", "source", "num_tokens"}
"""What differs from run to run: hits of the store, times (of the model's files too), what TRL counts in a process."""


def prepared(command: str, folder: Path) -> None:
    """What lies in `folder` before the command: toy model, rows and recipe, or what an earlier command has made."""
    import toys
    from fleet_fixtures import rows_of

    toys.toy_folder(folder / "toy")
    users = 2 if command in ("fleet", "slots", "delete") else 1
    rows = rows_of(users, per_user=6)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fleet = FLEET.replace("SLOTS", "2" if command == "slots" else "1") if users > 1 else ""
    (folder / "mine.yaml").write_text(f"{ROW_FILES}{TRAIN}{EVALUATION}{fleet}")
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("Some words that ann wrote one day, long enough to keep them.")
    (folder / "texts.jsonl").write_text(json.dumps({"user": "bo", "query": "q", "text": "what bo wrote before"}) + "\n")
    before = {"export": "train", "delete": "fleet"}.get(command)
    if before is not None and in_a_fork(folder, lambda: run(COMMANDS[before])):
        sys.exit(f"{before} failed")


def run(words: list[str]) -> None:
    from perce_lite.cli import app

    app.main(words)


def in_a_fork(folder: Path, work: Callable[[], None]) -> int:
    """Does `work` in a fork of this process, in `folder`; gives its exit code, negative for a signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        os.chdir(folder)
        for stream in (1, 2):
            os.dup2(os.open(folder.parent / f"said-{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


class Points:
    """Counts what is written under `folder`; at the `at`-th stops the process, or raises that the disk is full."""

    def __init__(self, folder: Path, at: int, kind: str) -> None:
        self.folder, self.at, self.kind, self.count = str(folder), at, kind, 0
        self.log = os.open(folder.parent / "points", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def __call__(self, what: str) -> None:
        self.count += 1
        os.write(self.log, f"{what}\n".encode())
        if self.count != self.at:
            return
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(ENOSPC, os.strerror(ENOSPC), what)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not writes and event not in ("os.rename", "os.remove", "os.rmdir", "os.mkdir"):
            return
        path = os.path.abspath(os.fspath(args[0])) if isinstance(args[0], str | bytes | os.PathLike) else ""
        if str(path).startswith(f"{self.folder}/"):
            self(f"{event} {path}")

    def install(self) -> None:
        """From now on, in this process."""
        import safetensors
        import safetensors.torch

        sys.addaudithook(self.audit)
        for owner in (safetensors.torch, safetensors):
            if hasattr(owner, "serialize_file"):
                owner.serialize_file = self.halfway(owner.serialize_file)
        points = self

        class Connection(sqlite3.Connection):
            def execute(self, sql, *args):
                if sql.lstrip().split(" ")[0] not in ("SELECT", "PRAGMA"):
                    points(f"sqlite {sql[:60]}")
                return super().execute(sql, *args)

            def executemany(self, sql, *args):
                points(f"sqlite {sql[:60]}")
                return super().executemany(sql, *args)

            def __exit__(self, *args):
                points("sqlite commit or rollback")
                return super().__exit__(*args)

        connect = sqlite3.connect
        sqlite3.connect = lambda *args, **options: connect(*args, **{"factory": Connection, **options})

    def halfway(self, write: Callable[..., None]) -> Callable[..., None]:
        """safetensors' writer, of which half the file is there when the fault comes."""

        def writing(tensors, path, *args, **options):
            write(tensors, path, *args, **options)
            if self.count + 1 == self.at:
                os.truncate(path, os.path.getsize(path) // 2)
            self(f"safetensors {path}")

        return writing


def content(folder: Path) -> dict[str, Any]:
    """Everything under `folder` that must be alike: bytes of files, rows of databases, JSON without what changes."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or path.name.endswith((".lock", ".holder")) or name.startswith("store/"):
            continue
        if path.suffix == ".sqlite":
            found[name] = tables(path)
        elif path.suffix == ".json":
            found[name] = constant(json.loads(path.read_text()))
        elif path.suffix == ".html":
            found[name] = "a page"
        elif path.suffix in (".safetensors", ".jsonl", ".yaml", ".txt"):
            found[name] = path.read_bytes()
        elif not path.parent.name.startswith("checkpoint-"):
            found[name] = "there"
    return found


def tables(path: Path) -> dict[str, list[Any]]:
    with sqlite3.connect(path) as database:
        database.row_factory = sqlite3.Row
        names = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {
            name: [
                constant({key: unpacked(value) for key, value in dict(row).items()})
                for row in database.execute(
                    f"SELECT * FROM {name} ORDER BY 1, 2" if name != "deleted" else f"SELECT * FROM {name}"
                )
            ]
            for name in names
        }


def unpacked(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) and value[:1] in "{[" and value else value


def constant(value: Any) -> Any:
    """`value` of JSON without what differs from run to run."""
    if isinstance(value, dict):
        return {key: constant(part) for key, part in value.items() if key not in CHANGES}
    return [constant(part) for part in value] if isinstance(value, list) else value


def nearly(one: Any, other: Any) -> bool:
    """Alike but for the last bits: for slots, where a user goes on alone whose neighbour had ended and been saved.

    The rows are the same and so is their order; but a batch of fewer users has another shape.
    """
    if isinstance(one, bytes) and isinstance(other, bytes) and one != other:
        from safetensors.torch import load

        return nearly(
            *({name: tensor.flatten().tolist() for name, tensor in load(file).items()} for file in (one, other))
        )
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(nearly(one[name], other[name]) for name in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(nearly, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-5)
    return bool(one == other)


def main(command: str, kind: str, every: int = 1, first: int = 1) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    import torch

    import perce_lite.evaluation.summary
    import perce_lite.export.export
    import perce_lite.fleet.engines.slots  # noqa: F401

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        whole, work = Path(scratch).resolve() / "whole", Path(scratch).resolve() / "work"
        whole.mkdir()
        os.environ["PERCE_LITE_HOME"] = str(Path(scratch) / "home")
        prepared(command, whole)

        def fresh() -> None:
            shutil.rmtree(work, ignore_errors=True)
            shutil.copytree(whole, work)

        def faulty(at: int) -> int:
            def stopped() -> None:
                Points(work, at, kind).install()
                run(COMMANDS[command])

            return in_a_fork(work, stopped)

        fresh()
        if code := faulty(0):
            sys.exit(f"{command} failed with {code}: {(work.parent / 'said-2').read_text()[-3000:]}")
        points = (work.parent / "points").read_text().splitlines()
        expected = content(work)
        bad, tried, tracebacks = [], range(first, len(points) + 1, every), []
        for at in tried:
            fresh()
            faulty(at)
            if "Traceback (most recent" in (said := (work.parent / "said-2").read_text(errors="replace")):
                tracebacks.append([at, points[at - 1], said.strip().splitlines()[-1][:300]])
            again = in_a_fork(work, lambda: run(COMMANDS[command]))
            ended = content(work)
            alike = nearly if command == "slots" else operator.eq
            names = [name for name in sorted({*ended, *expected}) if not alike(ended.get(name), expected.get(name))]
            if names:
                kept = [json.dumps([ended.get(name), expected.get(name)], default=repr)[:4000] for name in names]
                said = (work.parent / "said-2").read_text(errors="replace").strip().splitlines()[-2:]
                bad.append([at, points[at - 1], again, names, kept, said])
    told = {"command": command, "kind": kind, "points": len(points), "tried": len(tried)}
    print(json.dumps({**told, "bad": bad, "tracebacks": tracebacks}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
