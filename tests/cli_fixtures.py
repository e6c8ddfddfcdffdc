"""Fixtures of the command line's tests: a toy model, a recipe for it, and the command run in this process."""

import json
import shutil
import signal
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import toys

from perce_lite.cli import app as cli
from perce_lite.evaluation.bench import children
from perce_lite.evaluation.summary import train_and_measure
from perce_lite.files import read_json
from perce_lite.recipe import load_recipe

TRAIN = "train: {max_steps: 1, output_dir: out}\nevaluation: {max_rows: 4, max_new_tokens: 2}\n"


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return toys.toy_folder(tmp_path_factory.mktemp("models") / "toy")


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory, toy):
    """The folder of a toy adapter that was trained for some steps."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, toys.toy_rows())))
    steps = f"{{max_steps: 3, learning_rate: 0.05, output_dir: {folder / 'out'}, store: null}}"
    head = f"model: {toy}\nquantization: none\ndtype: float32\ndevice: cpu\ndata: {{path: rows.jsonl}}\n"
    (folder / "mine.yaml").write_text(f"{head}train: {steps}\nevaluation: {{max_rows: 4, max_new_tokens: 2}}\n")
    return Path(train_and_measure(load_recipe(folder / "mine.yaml"))["adapter"])


@pytest.fixture
def recipe(tmp_path, monkeypatch, toy):
    """Writes rows and a recipe for the toy model; everything happens in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def make(rows: list[dict] | None = None, text: str = "") -> Path:
        records = toys.toy_rows() if rows is None else rows
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, records)))
        path = tmp_path / "mine.yaml"
        head = f"model: {toy}\nquantization: none\ndtype: float32\ndevice: cpu\ndata: {{path: rows.jsonl}}\n"
        path.write_text(head + text)
        return path

    return make


@pytest.fixture
def plain(recipe, toy) -> str:
    """The toy model without its chat template, which is `mine.jinja`."""
    shutil.copytree(toy, "plain")
    Path("plain/chat_template.jinja").rename("mine.jinja")
    return "plain"


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs the command in this process; gives exit code, standard output and standard error."""

    def call(*words: str | Path) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr(sys, "argv", ["perce-lite", *map(str, words)])
        capfd.readouterr()
        code: int | str | None = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code
        out, err = capfd.readouterr()
        return code, out, err

    ctrl_c, threads = signal.getsignal(signal.SIGINT), torch.get_num_threads()
    torch.set_num_threads(1)  # a toy is slower with two, much slower beside other work
    yield call
    signal.signal(signal.SIGINT, ctrl_c)
    torch.set_num_threads(threads)


@pytest.fixture
def figures(run, tmp_path):
    """Runs a command that writes `--json`; gives what it wrote."""

    def call(*words: str | Path) -> dict:
        path = tmp_path / "figures" / "out.json"
        code, _, err = run(*words, "--json", path)
        assert code == 0, err
        return json.loads(path.read_text("utf-8"))

    return call


class Ended:
    """Stands for a child process that has carried out its job."""

    def wait(self) -> int:
        return 0


@pytest.fixture
def in_this_process(monkeypatch, tmp_path):
    """Makes `children` carry out the jobs of a room (its `measure` as it is then) here; gives them as they come."""

    def make(room, kind):
        jobs = []

        @contextmanager
        def child(module, path, said):
            assert module == room.__name__.rpartition(".")[2]
            jobs.append(kind(**read_json(path)))
            children.carry_out(jobs[-1], room.measure)
            yield Ended()

        monkeypatch.setattr(children, "_child", child)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        return jobs

    return make
