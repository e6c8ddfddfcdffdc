"""The command line: figures that are right, and one clean line with exit code 2 for what cannot be done."""

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import toys
from cli_fixtures import TRAIN
from transformers import AutoTokenizer

from perce_lite.cli import app as cli
from perce_lite.cli.views import terminal
from perce_lite.model.logprob_store import Store

pytest_plugins = ["cli_fixtures"]


def test_help_answers_without_torch():
    code = "import sys; from perce_lite.cli.app import main; sys.argv = ['perce-lite', *sys.argv[1:]]\ntry: main()\n"
    code += "except SystemExit as stop: print('code', stop.code, [m for m in ('torch', 'trl') if m in sys.modules])"
    for words, shown in (["--help"], ["train", "check", "generate", "store"]), (["train", "--help"], ["--restart"]):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
        assert done.stdout.rstrip().endswith("code 0 []")
        assert [word for word in shown if word not in done.stdout] == []


def test_the_installed_command_fails_cleanly(tmp_path):
    command = shutil.which("perce-lite", path=Path(sys.executable).parent)
    if command is None:
        pytest.skip("the package is not installed")
    done = subprocess.run([command, "train", "absent.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: absent.yaml: 1 fault\n  there is no such recipe. Give the path of a YAML file.\n"


FAULTS = {
    "no such recipe": (["check", "mime.yaml"], ["no such recipe", "Did you mean mine.yaml?"]),
    "unknown key": (["train", "mine.yaml", "--set", "train.lr=1"], ["--set train.lr=1: unknown key train.lr"]),
    "two faults": (["check", "mine.yaml", "--set", "a=1", "--set", "b=1"], ["2 faults", "key a", "key b"]),
    "no data": (["train", "mine.yaml", "--set", "data.path=no.jsonl"], ["no.jsonl: there is no such file"]),
    "no model": (
        ["train", "mine.yaml", "--set", "model=no-such-owner/no-such-model"],
        ["model: no-such-owner/no-such-model", "neither built in", "Offline: copy the model's folder"],
    ),
    "no model folder": (
        ["check", "mine.yaml", "--set", "model=./nowhere"],
        ["model: ./nowhere", "no such folder, here or beside the recipe"],
    ),
    "no cuda": (["check", "mine.yaml", "--set", "device=cuda"], ["device: cuda", "no CUDA device", "auto or cpu"]),
    "limit below any response": (
        ["check", "mine.yaml", "--set", "train.max_length=3"],
        [
            "No train rows are left of 14",
            "14 x query and response exceed max_length",
            "rows.jsonl, line",
            "Raise train.max",
        ],
    ),
    "no chat template": (
        ["train", "mine.yaml", "--set", "model=plain"],
        ["has no chat template", "chat_template_path"],
    ),
    "no adapter folder": (["generate", "--adapter", "no", "--prompt", "x"], ["no: there is no such folder"]),
    "folder of no adapter": (
        ["generate", "--adapter", ".", "--prompt", "x"],
        ["no adapter of PerCE Lite", "needs adapter"],
    ),
    "no template file": (["check", "mine.yaml", "--set", "train.chat_template_path=no.jinja"], ["no.jinja", "no file"]),
    "refused option": (["check", "mine.yaml", "--set", "train.loss_type=dft"], ["train: loss_type: 'dft' is refused"]),
}


@pytest.mark.parametrize(("words", "told"), FAULTS.values(), ids=FAULTS)
def test_what_cannot_be_done_is_one_clean_line(recipe, plain, run, monkeypatch, words, told):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    recipe()
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    error = err[err.index("error: ") :]
    assert "Traceback" not in err
    counted = re.search(r": (\d+) faults?$", error.splitlines()[0])
    assert len(error.splitlines()) == 1 + (int(counted[1]) if counted else 0)
    assert [part for part in told if part not in error] == []


def test_figures_of_check(recipe, figures, toy):
    rows = [{**row, "split": "test" if index % 6 == 5 else "train"} for index, row in enumerate(toys.toy_rows())]
    rows[0]["profile"], rows[1]["profile"], rows[7]["completion"] = [], "  ", " "
    rows[8]["prompt"] += " and more" * 60
    found = figures("check", recipe(rows, "train: {max_length: 160}\n"))
    train, test = found["splits"]["train"], found["splits"]["test"]
    assert (train["read"], train["kept"], test["read"], test["kept"]) == (15, 11, 3, 3)
    assert train["users"] == {"user0": 3, "user1": 3, "user2": 5}
    assert train["dropped"] == [
        {"user": "user0", "reason": "empty profile", "rows": 2, "such_as": "rows.jsonl, line 1"},
        {"user": "user1", "reason": "empty response", "rows": 1, "such_as": "rows.jsonl, line 8"},
        {"user": "user1", "reason": "query and response exceed max_length", "rows": 1, "such_as": "rows.jsonl, line 9"},
    ]
    assert found["splits"]["validation"] == {**found["splits"]["validation"], "read": 0, "users": {}, "dropped": []}
    tokenizer = AutoTokenizer.from_pretrained(toy)
    kept = [row for index, row in enumerate(rows) if index not in (0, 1, 7, 8) and row["split"] == "train"]
    response = [len(tokenizer(row["completion"])["input_ids"]) + 1 for row in kept]  # with <|im_end|>
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    turns = [f"{system}<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n" for row in kept]
    whole = [len(tokenizer(turn)["input_ids"]) + own for turn, own in zip(turns, response, strict=True)]
    for name, lengths in (("response_tokens", response), ("without_profile_tokens", whole)):
        ends = {"min": min(lengths), "max": max(lengths), "sum": sum(lengths)}
        assert train[name] == {**ends, "median": sorted(lengths)[len(lengths) // 2]}
    assert train["with_profile_tokens"]["sum"] > train["without_profile_tokens"]["sum"]
    assert train["with_profile_tokens"]["max"] <= found["max_length"] == 160


def test_the_example_of_check_is_what_the_model_sees(recipe, figures):
    rows = toys.toy_rows()
    example = figures("check", recipe())["example"]
    row = rows[int(example["row"].rpartition(" ")[2]) - 1]
    assert example["user"] == row["user"]
    spans = {side: Counter() for side in ("with_profile", "without_profile")}
    for side in spans:
        for piece, kind in example[side]:
            spans[side][kind] += 1
            assert kind != "response" or piece == row["completion"] + "<|im_end|>"
            assert kind != "query" or piece == row["prompt"]
            assert kind != "profile" or all(f"{one['title']}\n{one['text']}" in piece for one in row["profile"])
    assert spans["with_profile"] == {"template": 3, "profile": 1, "query": 1, "response": 1}
    assert spans["without_profile"] == {"template": 2, "query": 1, "response": 1}
    profile = next(piece for piece, kind in example["with_profile"] if kind == "profile")
    system = "<|im_start|>system\nYou are a helpful assistant.{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    for side, wrapped in ("with_profile", f"\n\nTexts by this user:\n\n{profile}"), ("without_profile", ""):
        text = "".join(piece for piece, _ in example[side])
        ends = f"<|im_start|>assistant\n{row['completion']}<|im_end|>"
        assert text == system.format(wrapped, row["prompt"]) + ends


def test_check_shows_what_it_found(recipe, run):
    code, out, _ = run("check", recipe())
    assert code == 0
    assert [part for part in ("14", "Texts by this user", "<|im_start|>assistant") if part not in out] == []


def test_store(figures, run, tmp_path):
    root = tmp_path / "store"
    assert figures("store", "show", "--path", root) == {"store": str(root), "bases": []}
    store = Store(root, "0123abcd")
    store.put("ann", {"k1": torch.ones(4), "k2": torch.ones(2)})
    store.put("../bob", {"k1": torch.ones(4)})
    (root / "0123abcd" / "kept.txt").write_text("mine")
    size = sum(file.stat().st_size for file in root.rglob("*.safetensors"))
    shown = figures("store", "show", "--path", root)
    assert shown == {"store": str(root), "bases": [{"base": "0123abcd", "users": 2, "entries": 3, "bytes": size}]}
    assert figures("store", "clear", "--path", root) == {"store": str(root), "bytes_freed": size}
    left = {file.name for file in root.rglob("*.*")}
    assert left == {"kept.txt", "store.lock", ".deleted"}, "who was deleted stays known to runs that are on"


def test_the_store_of_the_recipes_is_the_default(figures, monkeypatch, tmp_path):
    monkeypatch.setenv("PERCE_LITE_HOME", str(tmp_path / "home"))
    assert figures("store", "clear") == {"store": str(tmp_path / "home" / "store"), "bytes_freed": 0}


@pytest.mark.parametrize(
    "words", [["--profile", "a", "--no-profile"], ["--profile", "a", "--user", "b"], ["--no-profile", "--user", "b"]]
)
def test_one_profile_is_enough(run, words):
    code, out, err = run("generate", "--adapter", "no", "--prompt", "x", *words)
    assert (code, out) == (2, "")
    assert "give one of --profile, --no-profile and --user" in err
    assert "Traceback" not in err


def test_a_profile_file_that_is_not_there(run):
    code, _, err = run("generate", "--adapter", "no", "--prompt", "x", "--profile", "@no.txt")
    assert (code, "no.txt" in err, "Traceback" in err) == (2, True, False)


def test_a_run_and_what_comes_after_it(recipe, run, figures, tmp_path):
    path = recipe(text=TRAIN)
    trained = figures("train", path)
    assert (trained["rows"]["kept"], Path(trained["adapter"])) == (14, Path("out/adapter"))
    assert [one["profile"] for one in trained["losses"]][:2] == ["own", "none"]
    code, out, err = run("train", path)  # a finished run is not trained again
    assert (code, "was trained before" in err, str(trained["adapter"]) in out) == (0, True, True)
    code, _, err = run("train", path, "--set", "lora.r=3")
    assert (code, "out holds a run of another recipe" in err) == (2, True)
    asked = ["generate", "--adapter", "out", "--prompt", "Hello there", "--max-new-tokens", "3"]
    Path("p.txt").write_text("an otter ü", encoding="utf-8")
    for words, profile in (["--no-profile"], ""), (["--profile", "@p.txt"], "an otter ü"), (["--profile", "x"], "x"):
        answer = figures(*asked, *words)
        assert (answer["prompt"], answer["profile"], answer["model"]) == ("Hello there", profile, "adapter")
    items = [one for row in toys.toy_rows() if row["user"] == "user1" for one in row["profile"]]
    answer = figures(*asked, "--user", "user1", "--base")
    assert answer["model"] == "base"
    assert set(answer["profile"].split("\n\n")) <= {f"{one['title']}\n{one['text']}" for one in items}
    assert len(answer["profile"].split("\n\n")) == 4
    for words, told in ([], "Give --profile TEXT"), (["--user", "zoe"], "it has user0, user1, user2"):
        code, out, err = run(*asked, *words)
        assert (code, out, told in err, "Traceback" in err) == (2, "", True, False)


def test_the_recipes_own_template_is_used(recipe, run, figures, plain):
    own = ["--set", f"model={plain}", "--set", "train.chat_template_path=mine.jinja"]
    assert figures("check", recipe(), *own)["splits"] == figures("check", recipe())["splits"]
    assert run("train", recipe(text=TRAIN), *own)[0] == 0
    code, _, err = run("generate", "--adapter", "out", "--prompt", "x", "--no-profile", "--max-new-tokens", "1")
    assert (code, err.count("error")) == (0, 0)


STOPPED = {
    "train": (
        "perce_lite.evaluation.summary.train_and_measure",
        [],
        "resumes from the last checkpoint; what was scored is kept",
    ),
    "check": ("perce_lite.evaluation.check.check", [], "Nothing was written; the same command starts over"),
    "init": (
        "perce_lite.planning.drafting.choose",
        ["new.yaml", "--have", "rows", "--data", ".", "--want", "chat", "--gpu", "cpu"],
        "Nothing was written",
    ),
    "import": ("perce_lite.cli.importing.look", ["x", "--user", "ann"], "Nothing was written"),
    "inspect": (
        "perce_lite.evaluation.inspect.inspect",
        [],
        "scored under the base is kept; the same command scores the rest",
    ),
    "plan": ("perce_lite.planning.plan.figures", [], "Nothing was kept but scores of --probe"),
    "generate": (
        "perce_lite.cli.generate.read_metadata",
        ["--adapter", "x", "--prompt", "x"],
        "Nothing was written",
    ),
    "weights": (
        "perce_lite.training.weights.write_weights",
        [],
        "scored under the base is kept; the same command scores the rest",
    ),
    "chat": ("perce_lite.cli.chat.read_metadata", ["x"], "Nothing was written"),
    "serve": ("perce_lite.cli.serve.read_metadata", ["x"], "Nothing was written"),
    "eval": ("perce_lite.cli.eval.read_metadata", ["--adapter", "x"], "What was scored and answered is kept"),
    "compare": ("perce_lite.evaluation.compare.compare", [], "Finished trainings are kept"),
    "fleet": ("perce_lite.fleet.fleet.fleet", [], "Adapters that the registry has as trained stay so"),
    "export": ("perce_lite.cli.export.read_metadata", ["x", "--to", "peft"], "Nothing half-written stays"),
    "bench": (
        "perce_lite.evaluation.bench.bench.bench",
        [],
        "Nothing is kept: measurements are compared within one run",
    ),
    "store show": ("perce_lite.model.store_files.usage", [], "Nothing was changed."),
    "store clear": ("perce_lite.model.store_files.clear", [], "stays removed; the same command removes the rest"),
}


def test_every_command_says_what_is_true_after_ctrl_c():
    known = set()
    for name, command in cli.COMMANDS.items():
        said = command.after_ctrl_c
        known |= {name} if isinstance(said, str) else {f"{name} {sub}" for sub in said}
    assert known == set(STOPPED) | {"adapters", "recipe"}


@pytest.mark.parametrize("command", STOPPED)
def test_ctrl_c_says_how_to_go_on(recipe, run, monkeypatch, command):
    called, words, told = STOPPED[command]
    monkeypatch.setattr(called, lambda *args, **kwargs: signal.raise_signal(signal.SIGINT))
    words = [
        *(
            []
            if command.split()[0] in ("store", "generate", "chat", "serve", "export", "import", "init")
            else [recipe()]
        ),
        *words,
    ]
    code, out, err = run(*command.split(), *words)
    lines = [line for line in err.splitlines() if not line.startswith(("Device: ", "GPU: "))]  # the first
    assert (code, out, len(lines)) == (130, "", 1)
    assert lines[0].startswith("Stopped. ")
    assert told in err


@pytest.mark.parametrize(("after", "harmed"), [(38.4, True), (4.5, True), (4.2, False)])
def test_a_training_that_did_harm_is_not_praised(capfd, after, harmed):
    """In the first line of the result, before any table; no step taken counts as harm too."""
    part = {"base": 4.5, "adapter": after, "tokens": 10}
    sample = {"user": "ann", "query": "Why?", "written": "So.", "base": "b", "adapter": "a"}
    losses = [{"profile": "own", **part, "personal": part, "rows": 2, "per_row": []}]
    terminal.show_training({"losses": losses, "weights": {}, "sample": sample, "adapter": "out/adapter"})
    out = capfd.readouterr().out
    assert out.startswith("Do not use this adapter") == harmed
    assert ("changed nothing that shows" in out) == (after == 4.5)
    assert "10 tokens of 2 held-out responses" in out
    assert ("Use it:" in out) != harmed


def test_kernels_of_lengths_that_are_past_are_forgotten(monkeypatch, run):
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "1024")  # the user's own
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")  # so that it is put back afterwards
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    assert run("--version")[0] == 0
    assert (os.environ["LRU_CACHE_CAPACITY"], os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) == ("1024", "128")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc how much is in use")
def test_memory_does_not_grow_with_the_lengths_of_batches():
    """Torch and oneDNN still read these names; MiB more in use after batches of 24 new lengths."""
    code = (
        "import ctypes, torch\n"
        "class Info(ctypes.Structure): _fields_ = [(f'f{i}', ctypes.c_size_t) for i in range(10)]\n"
        "libc = ctypes.CDLL(None)\nlibc.mallinfo2.restype = Info\n"
        "layers = torch.nn.Sequential(*[torch.nn.Linear(256 + 64 * i, 320 + 64 * i) for i in range(6)])\n"
        "def step(n):\n"
        "    with torch.autocast('cpu', torch.bfloat16): layers(torch.randn(n, 256)).sum().backward()\n"
        "step(50)\nbefore = libc.mallinfo2().f7\n"
        "for n in range(60, 108, 2): step(n)\n"
        "print((libc.mallinfo2().f7 - before) / 2**20)"
    )
    grown = []
    plain = {name: value for name, value in os.environ.items() if name not in cli.CPU_KERNELS}
    for limits in ({}, dict.fromkeys(cli.CPU_KERNELS, "16")):  # fewer than the package's: the lengths are few too
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**plain, **limits})
        assert done.returncode == 0, done.stderr
        grown.append(float(done.stdout))
    if grown[0] < 8:
        pytest.skip("oneDNN makes no kernels of its own for bf16 on this CPU")
    assert grown[1] < grown[0] / 3


@pytest.mark.parametrize("own", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", None])
def test_what_the_user_says_of_torchs_allocator_stays(monkeypatch, run, own):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    for name in names:
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    if own is not None:
        monkeypatch.setenv(own, "max_split_size_mb:64")
    monkeypatch.setattr(sys, "platform", "linux")
    assert run("--version")[0] == 0
    found = {name: os.environ[name] for name in names if name in os.environ}
    assert found == ({own: "max_split_size_mb:64"} if own else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
