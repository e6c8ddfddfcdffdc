"""A toy fleet, and servers of it that run in a thread of the test."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fleet_fixtures import TEXT, rows_of

from perce_lite.fleet.engines.sequential import SequentialEngine
from perce_lite.fleet.fleet import fleet
from perce_lite.fleet.registry import opened
from perce_lite.recipe import load_recipe
from perce_lite.serve.server import Server, Settings, make_server, running

EVIL = "<script>document.title='evil'</script>"


def fleet_rows() -> list[dict]:
    """Three users: ann with twelve held-out rows, one called like a tag, one with too few texts for an adapter."""
    rows = rows_of(3)
    names = {"user0": "ann", "user1": EVIL, "user2": "cy"}
    named = [{**row, "user": names[row["user"]]} for row in rows]
    held_out = [{**named[0], "prompt": f"{named[0]['prompt']}, number {number}"} for number in range(10)]
    return held_out + [row for number, row in enumerate(named) if row["user"] != "cy" or number % 8 < 4]


@pytest.fixture(scope="module")
def fleet_folder(tmp_path_factory, toy) -> Path:
    """A trained toy fleet: ann and `EVIL` have adapters of their own, the shared one serves cy."""
    folder = tmp_path_factory.mktemp("fleet")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, fleet_rows())), encoding="utf-8")
    head = f"model: {toy}\nquantization: none\ndtype: float32\ndevice: cpu\ndata: {{path: rows.jsonl}}\n"
    text = TEXT.replace("output_dir: out", f"output_dir: {folder / 'out'}").replace(
        "store: store", "store: null, weighting: clip"
    )
    (folder / "mine.yaml").write_text(head + text)
    fleet(load_recipe(folder / "mine.yaml"), SequentialEngine)
    return folder / "out"


@contextmanager
def serving(adapter: Path | None, fleet: Path | None, **settings) -> Iterator[Server]:
    """A server of an adapter or a fleet."""
    with running(make_server(adapter, fleet, Settings(port=0, **settings))) as server:
        yield server


def folder_of(root: Path, kind: str, name: str) -> Path:
    """The folder of an adapter of the fleet."""
    with opened(root) as registry:
        adapter = registry.get(kind, name)
    return root / adapter.folder / "adapter"
