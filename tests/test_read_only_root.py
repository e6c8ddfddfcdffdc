"""A container without network and with a read-only root: two folders take all that is written.

The commands run in mount and network namespaces of their own, where every file system is read-only but for two
folders, and nothing is left of a home, a working folder or a folder for temporary files that could be written.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import toys

from perce_lite import files

pytest_plugins = ["cli_fixtures"]

READ_ONLY = """
set -e
mount --make-rprivate /
for folder in "$1" "$2"; do mount --bind "$folder" "$folder"; done
awk '{print $2}' /proc/self/mounts | sort -ru | while read -r place; do
  case "$place" in "$1"|"$2"|/proc*|/sys*|/dev/*) continue;; esac
  mount -o remount,bind,ro "$place" 2>/dev/null || true
done
for place in "$PWD" /tmp /var/tmp; do
  if touch "$place/.written" 2>/dev/null; then rm "$place/.written"; echo "NOT READ-ONLY: $place"; exit 77; fi
done
shift 2
exec "$@"
"""


@pytest.fixture
def contained(tmp_path, toy):
    """Runs a command of ours in such a container, in a folder that holds a recipe; gives what came of it."""
    place, out, home = (tmp_path / name for name in ("work", "out", "home"))
    for folder in (place, out, home):
        folder.mkdir()
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, toys.toy_rows())))
    (place / "mine.yaml").write_text(
        f"model: {toy}\nquantization: none\ndtype: float32\ndevice: cpu\ndata: {{path: rows.jsonl}}\n"
        f"train: {{max_steps: 2, output_dir: {out}/run}}\nevaluation: {{max_rows: 4, max_new_tokens: 2}}\n"
    )
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare here")
    environment = {**os.environ, "PERCE_LITE_HOME": str(home), "HOME": str(tmp_path / "nobody")}
    for variable in ("TMPDIR", "HF_HOME", "MPLCONFIGDIR", "TRITON_CACHE_DIR"):
        environment.pop(variable, None)

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        inside = ["bash", "-c", READ_ONLY, "bash", str(out), str(home), sys.executable, "-m", "perce_lite", *words]
        done = subprocess.run(["unshare", "-rmn", *inside], cwd=place, env=environment, capture_output=True, text=True)
        if done.returncode == 77 or "unshare failed" in done.stderr or "mount:" in done.stderr:
            pytest.skip(f"no read-only root can be made here: {done.stdout}{done.stderr}")
        return done

    return call


def test_a_container_that_lets_nothing_be_written_elsewhere(contained, tmp_path):
    done = contained("train", "mine.yaml")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/run/adapter/adapter_model.safetensors").is_file()
    assert (tmp_path / "out/run/train.html").is_file()
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"rows.jsonl", "mine.yaml"}
    words = ["generate", "--adapter", str(tmp_path / "out/run/adapter"), "--prompt", "hi", "--user", "user0"]
    answered = contained(*words, "--max-new-tokens", "2")
    assert answered.returncode == 0, answered.stderr


def test_an_output_folder_there_is_one_clear_error(contained, tmp_path):
    done = contained("train", "mine.yaml", "--set", "train.output_dir=runs/mine")
    assert done.returncode == 2
    assert "nothing may be written in" in " ".join(done.stderr.split())
    assert "--set train.output_dir=FOLDER" in " ".join(done.stderr.split())


def test_caches_stay_where_they_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PERCE_LITE_HOME", str(tmp_path / "ours"))
    for variable in files._CACHES:
        monkeypatch.delenv(variable, raising=False)
    files.keep_to_writable_folders()
    assert not set(files._CACHES) & set(os.environ)
    (tmp_path / ".cache/huggingface").mkdir(parents=True)
    monkeypatch.setattr(files.os, "access", lambda path, mode: False)
    files.keep_to_writable_folders()
    assert "HF_HOME" not in os.environ, "it is there, so it is read"
    assert os.environ["MPLCONFIGDIR"] == str(tmp_path / "ours/matplotlib")
    for variable in files._CACHES:
        os.environ.pop(variable, None)


def test_temporary_files_have_a_place_where_the_machine_has_none(tmp_path, monkeypatch):
    def none_here():
        raise FileNotFoundError

    monkeypatch.setenv("PERCE_LITE_HOME", str(tmp_path / "ours"))
    monkeypatch.setenv("TMPDIR", "/nowhere")
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "gettempdir", none_here)
    files.keep_to_writable_folders()
    assert tempfile.tempdir == os.environ["TMPDIR"] == str(tmp_path / "ours/tmp")
    assert Path(tempfile.tempdir).is_dir()
