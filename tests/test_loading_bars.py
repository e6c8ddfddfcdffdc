"""A base that is downloaded, read and quantised shows how far it is, with sizes: no silent gigabytes."""

import http.server
import os
import re
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
import toys
from safetensors.torch import load_file, save_file
from transformers.utils.logging import set_tqdm_hook

from perce_lite.model import loading_bars
from perce_lite.model.base import load_base
from perce_lite.recipe import load_recipe

pytest_plugins = ["cli_fixtures"]

COMMIT = "0123456789abcdef0123456789abcdef01234567"

LOAD = """
import sys
from perce_lite.console import quiet
quiet()
from perce_lite.model.base import load_base
from perce_lite.recipe import load_recipe
for name in sys.argv[2:]:
    print("of", name, load_base(load_recipe(sys.argv[1], [f"model=someone/{name}"])).model.config.model_type)
    print("\\n--", file=sys.stderr)
"""


class Hub(http.server.SimpleHTTPRequestHandler):
    """The Hub's addresses of its repositories, each a folder, as far as they are needed to load them."""

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        found = re.fullmatch(r"/someone/(\w+)/resolve/[^/]+/([\w.]+)", self.path)
        file = Path(self.directory) / found[1] / found[2] if found else None
        if file is None or not file.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{file.stat().st_size}-{file.name}"')
        self.send_header("Content-Length", str(file.stat().st_size))
        self.end_headers()
        if with_body:
            self.wfile.write(file.read_bytes())


@pytest.fixture
def hub(tmp_path):
    """Serves `large`, whose weights are a file of 12 MB, and `small`, whose weights are less than one."""
    weights = toys.toy_folder(tmp_path / "served/large", "chatml") / "model.safetensors"
    save_file({**load_file(weights), "padding": torch.zeros(3_000_000)}, weights, {"format": "pt"})
    toys.toy_folder(tmp_path / "served/small", "chatml")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, directory=str(tmp_path / "served")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_download_says_file_and_megabytes_and_what_is_there_says_nothing(recipe, hub, tmp_path):
    """In processes of their own: where the Hub is, is read when huggingface_hub is imported."""
    path, home = recipe(), str(tmp_path / "hf")
    own = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": home, "PERCE_LITE_HOME": home}

    def said_of(*names: str) -> list[str]:
        words = [sys.executable, "-c", LOAD, str(path), *names]
        done = subprocess.run(words, env={**os.environ, **own}, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [f"of {name} llama" for name in names]
        return done.stderr.split("\n--\n")

    small, fetched, _ = said_of("small", "large")
    assert "Downloading" not in small
    assert re.search(r"^Downloading model\.safetensors, MB: 12 of 12 \(100%\)", fetched, re.M)
    assert "Downloading" not in "".join(said_of("large"))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_reading_shows_a_bar_where_it_takes_long(recipe, tmp_path, monkeypatch, capsys, quantization):
    folder = toys.toy_folder(tmp_path / "model", "chatml")
    read = load_recipe(recipe(), [f"model={folder}", f"quantization={quantization}"])
    load_base(read)
    assert "weights" not in capsys.readouterr().err
    monkeypatch.setattr(loading_bars, "AT_ONCE", 0.0)
    model = load_base(read).model
    said = capsys.readouterr().err
    what = "Reading and quantising weights" if quantization == "nf4" else "Reading weights"
    tensors = len({name for name, _ in model.named_parameters()})
    assert re.search(rf"^{what}: (\d+) of \1 \(100%\), .*; 0\.00 billion weights$", said, re.M), said
    assert f"{what}: {tensors} of {tensors} " in said


def test_an_interrupted_load_leaves_no_bar_behind(recipe, tmp_path, monkeypatch):
    read = load_recipe(recipe())

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("perce_lite.model.base.model_class", lambda config: type("K", (), {"from_pretrained": stop}))
    with pytest.raises(KeyboardInterrupt):
        load_base(read)
    assert set_tqdm_hook(None) is None
