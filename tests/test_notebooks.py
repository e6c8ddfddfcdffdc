"""The notebooks run from top to bottom on a CPU, over a toy model; they lie in the repository without outputs."""

import json
import os
import re
import shutil
import signal
import sys
import tomllib
import zipfile
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import nbformat
import pyarrow
import pytest
import toys
import writing_fixtures as planted
from nbclient import NotebookClient
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from perce_lite import notebook
from perce_lite.errors import NotebookError

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "recipes/notebooks").glob("*.ipynb"))
INSTALLS = [
    cell.source
    for path in NOTEBOOKS
    for cell in nbformat.read(path, as_version=4).cells
    if "install" in cell.metadata.get("tags", [])
]
COLAB = {"torch": "2.11.0", "ipywidgets": "7.7.1", "pyarrow": "18.1.0"}
TINY = "--set model={} --set quantization=none --set dtype=float32 --set device=cpu --set train.max_steps=2"
QUICK = "--set evaluation.max_rows=2 --set evaluation.max_new_tokens=4 --set fleet.slots=2 --set fleet.gate=null"


def executed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **parameters: str) -> nbformat.NotebookNode:
    """The notebook after all its cells, its parameters replaced, in a folder that has the recipes and nothing else."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes", ignore=shutil.ignore_patterns("runs"))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    read = nbformat.read(ROOT / f"recipes/notebooks/{name}.ipynb", as_version=4)
    [place] = [number for number, cell in enumerate(read.cells) if "parameters" in cell.metadata.get("tags", [])]
    lines = [f"{name} = {value!r}" for name, value in parameters.items()]
    read.cells.insert(place + 1, nbformat.v4.new_code_cell("\n".join(lines)))
    client = NotebookClient(read, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    return client.execute()


def told(read: nbformat.NotebookNode) -> str:
    """All text that the cells wrote, without HTML."""
    outputs = [output for cell in read.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def frames(read: nbformat.NotebookNode) -> list[str]:
    """The pages that are shown inside the notebook."""
    outputs = [output for cell in read.cells if cell.cell_type == "code" for output in cell.outputs]
    html = [output.get("data", {}).get("text/html", "") for output in outputs]
    return [one for one in html if "<iframe" in one]


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    return toys.toy_folder(tmp_path_factory.mktemp("models") / "toy")


def test_they_are_there():
    assert [path.stem for path in NOTEBOOKS] == ["fleet", "quickstart", "your_own_texts"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_lie_without_outputs(path):
    """As written by hand: no outputs, no counts, nothing of the machine that it was tried on."""
    raw = json.loads(path.read_text("utf-8"))
    nbformat.validate(raw)
    code = [cell for cell in raw["cells"] if cell["cell_type"] == "code"]
    assert len(code) >= 6
    assert [cell["outputs"] for cell in code] == [[]] * len(code)
    assert {cell["execution_count"] for cell in code} == {None}
    assert set().union(*(cell["metadata"] for cell in raw["cells"])) <= {"tags"}
    assert set(raw["metadata"]) == {"accelerator", "colab", "kernelspec", "language_info"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_install_from_where_the_user_says(path):
    """No address is named that somebody else could take."""
    read = nbformat.read(path, as_version=4)
    install = [cell.source for cell in read.cells if "install" in cell.metadata.get("tags", [])]
    assert install == INSTALLS[:1], "one cell, the same in every notebook"
    assert 'SOURCE = ""\n' in install[0]
    assert "://" not in "".join(cell.source for cell in read.cells)
    rest = "".join(cell.source for cell in read.cells if cell.cell_type == "code" and cell.source not in install)
    assert not re.search(r"pip|git ", rest)


def test_without_the_project_the_first_cell_says_what_to_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain = "\n".join(line for line in INSTALLS[0].splitlines() if not line.lstrip().startswith(("!", "%")))
    with pytest.raises(FileNotFoundError, match="set SOURCE"):
        exec(plain.replace("and SOURCE:", "and SOURCE:\n    pass"), {})


@pytest.mark.parametrize("loaded", ["18.1.0", None])
def test_a_library_that_is_replaced_under_the_kernel_asks_for_a_restart(monkeypatch, loaded):
    monkeypatch.chdir(ROOT)
    lines = [line for line in INSTALLS[0].splitlines() if not line.lstrip().startswith(("!", "%"))]
    cell = "\n".join(lines).replace("and SOURCE:", "and SOURCE:\n    pass").partition("from perce_lite.notebook")[0]
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(__version__=loaded or pyarrow.__version__))
    if loaded is None:
        exec(cell, {})
        return
    with pytest.raises(RuntimeError, match="Restart session"):
        exec(cell, {})


def test_what_colab_has_is_within_what_is_asked_for():
    """Its package list of August 2026: none of these is replaced, which would take minutes or break its widgets."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    every = [*project["dependencies"], *project["optional-dependencies"]["notebook"]]
    asked = {one.name: one.specifier for one in map(Requirement, every)}
    assert {name: Version(version) in asked[name] for name, version in COLAB.items()} == {
        "torch": True,
        "ipywidgets": True,
        "pyarrow": False,  # too old for trl: the first cell asks for a restart
    }
    assert Version("3.13") in SpecifierSet(project["requires-python"])
    assert "urls" not in project


def test_quickstart(toy, tmp_path, monkeypatch):
    """It shows the heat map, trains, and answers with the base and with the adapter."""
    done = executed("quickstart", tmp_path, monkeypatch, MORE=f"{TINY.format(toy)} {QUICK}")
    [frame] = frames(done)
    assert "Responses, token by token" in frame
    assert "Barometer falling" in frame
    said = told(done)
    assert "held-out responses" in said
    assert said.index("The base:") < said.index("With the adapter:")
    assert (tmp_path / "runs/quickstart/adapter/adapter_model.safetensors").is_file()
    assert not [line for line in said.splitlines() if "Warning" in line or "it/s" in line]


def test_your_own_texts(toy, tmp_path, monkeypatch):
    """A chat becomes rows, an adapter and an export in a ZIP."""
    dates = [f"2024-05-{day:02d}" for day in range(1, 31)]
    planted.write(tmp_path, {"chat.txt": planted.whatsapp(dates)})
    given = {"PATH": str(tmp_path / "chat.txt"), "WHO": "--me Ann", "USER": "ann bell", "QUESTION": planted.prose(2)}
    done = executed("your_own_texts", tmp_path, monkeypatch, MORE=f"{TINY.format(toy)} {QUICK}", **given)
    rows = [json.loads(line) for line in (tmp_path / "runs/mine.jsonl").read_text("utf-8").splitlines()]
    assert {row["user"] for row in rows} == {"ann bell"}
    assert [row["text"] for row in rows] == [planted.prose(number) for number in range(1, 30, 2)]
    said = told(done)
    assert said.index("this was a look") < said.index("Written: runs/mine.jsonl")
    assert "Entry3" in frames(done)[0]
    with zipfile.ZipFile(tmp_path / "runs/mine-peft.zip") as export:
        assert "adapter_model.safetensors" in export.namelist()


@pytest.mark.slow
def test_fleet(toy, tmp_path, monkeypatch):
    """It trains all users, says who is served by what, answers for two, and forgets one."""
    done = executed("fleet", tmp_path, monkeypatch, MORE=f"{TINY.format(toy)} {QUICK}")
    said = told(done)
    assert said.index("marlow:") < said.index("odette:")
    assert "the shared adapter" in said.rpartition("odette:")[2]
    assert len(list((tmp_path / "runs/fleet/adapters").rglob("adapter_model.safetensors"))) == 4
    assert "prof_lindqvist" in frames(done)[0]


def test_the_magic_says_what_went_wrong_and_stops(monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(NotebookError, match="perce-lite check ended with exit code 2") as failed:
        notebook.perce("check 'no such.yaml'")
    assert "no such.yaml" in capfd.readouterr().err
    assert failed.value._render_traceback_() == [str(failed.value)], "one line, no trace"
    with pytest.raises(NotebookError, match="exit code 2"):
        notebook.perce("check --wrong")
    with monkeypatch.context() as patched:
        patched.setattr("perce_lite.model.store_files.usage", lambda *_: signal.raise_signal(signal.SIGINT))
        with pytest.raises(NotebookError, match="exit code 130"):
            notebook.perce("store show")
    assert "Stopped. Nothing was changed." in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    notebook.perce("store show --path empty")  # a command that ends well raises nothing


def test_a_page_keeps_to_its_frame(tmp_path):
    """Its styles, and what texts in it spell, stay inside the frame's attribute."""
    text = '<style>p { color: red }</style><p title="a">"></iframe><script>out()</script></p>'
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    shown = notebook.page(tmp_path / "page.html", height=123).data
    tree = ElementTree.fromstring(shown)
    [frame] = tree
    assert (frame.tag, frame.get("srcdoc"), len(frame)) == ("iframe", text, 0)
    assert "height:123px" in frame.get("style")
    with pytest.raises(NotebookError, match="run the cell that writes it"):
        notebook.page(tmp_path / "none.html")


def test_a_page_can_begin_at_a_heading(tmp_path):
    (tmp_path / "page.html").write_text("<h2>One</h2><h2>Two's</h2>", encoding="utf-8")
    [frame] = ElementTree.fromstring(notebook.page(tmp_path / "page.html", at="Two's").data)
    assert frame.get("srcdoc").endswith('one.textContent === "Two\'s").offsetTop</script>')
