"""The store: bit-exact, safe under two processes and a kill, and never stale."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import toys
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from perce_lite.data.pairs import IGNORED, PairMaker, Tokens
from perce_lite.data.rows import from_columns
from perce_lite.model import scoring as score
from perce_lite.model.logprob_store import Store, entry_key
from perce_lite.model.scoring import ScoringJob, cached_log_probs, prefix_cache_of, store_key
from perce_lite.model.store_files import clear, usage

ODD = [0.0, -0.0, 1e-45, -1e-38, -3.4028235e38, float("inf"), float("nan"), -1.0000001, -17.25]


def same_bits(first, second):
    return first.dtype == second.dtype == torch.float32 and torch.equal(
        first.view(torch.int32), second.view(torch.int32)
    )


def test_entry_key_depends_on_ids_and_on_labels():
    entries = [
        ([1, 2, 3], [-100, 2, 3]),
        ([1, 2, 3], [-100, -100, 3]),
        ([1, 2, 4], [-100, 2, 3]),
        ([2, 1, 3], [-100, 2, 3]),
        ([1, 2], [3, -100, 2, 3]),  # the same numbers, cut elsewhere
        ([1, 2, 3, -100], [2, 3]),
        ([], []),
    ]
    keys = [entry_key(*entry) for entry in entries]
    assert len(set(keys)) == len(entries)
    assert keys == [entry_key(tuple(ids), tuple(labels)) for ids, labels in entries]


def test_round_trip_is_bit_exact_and_adds_to_what_is_there(tmp_path, capfd):
    store = Store(tmp_path, "base")
    assert store.get("ann") == {}
    first = {"a": torch.tensor(ODD), "b": torch.tensor([-2.5])}
    store.put("ann", first)
    strided = torch.arange(8.0)[::2]
    store.put("ann", {"b": torch.tensor([-7.0]), "c": strided, "d": torch.tensor([0.5], dtype=torch.bfloat16)})
    expected = {**first, "b": torch.tensor([-7.0]), "c": torch.tensor([0.0, 2.0, 4.0, 6.0]), "d": torch.tensor([0.5])}
    read = Store(tmp_path, "base").get("ann")
    assert read.keys() == expected.keys()
    assert all(same_bits(read[key], expected[key]) for key in expected)
    assert Store(tmp_path, "base").get("bob") == Store(tmp_path, "other").get("ann") == {}
    assert capfd.readouterr().err == ""


def damaged(raw):
    """Ways to break a file, each with a name."""
    yield "empty", b""
    yield "garbage", bytes(range(256)) * 4
    yield "text", b"version https://git-lfs.github.com/spec/v1\n"
    yield "zeros", bytes(len(raw))
    for size in range(1, len(raw), 5):
        yield f"cut at {size}", raw[:size]
    for at in range(len(raw)):
        flipped = bytearray(raw)
        flipped[at] ^= 1 << (at % 8)
        yield f"bit {at % 8} of byte {at}", bytes(flipped)


def test_every_kind_of_damage_counts_as_empty_with_a_warning_and_heals(tmp_path, capsys):
    store = Store(tmp_path, "base")
    store.put("ann", {"a": torch.tensor([-1.5, -2.25]), "b": torch.tensor([-3.0])})
    path = store.path("ann")
    raw = path.read_bytes()
    for name, content in damaged(raw):
        path.write_bytes(content)
        assert store.get("ann") == {}, name
        assert "warning: the store file" in " ".join(capsys.readouterr().err.split()), name
    store.put("ann", {"c": torch.tensor([-4.0])})
    capsys.readouterr()
    assert store.get("ann").keys() == {"c"}
    assert capsys.readouterr().err == ""


WRITER = """
import sys, time
from pathlib import Path
import torch
from perce_lite.model.logprob_store import Store
root, name = Path(sys.argv[1]), sys.argv[2]
(root / f"{name}.ready").touch()
while len(list(root.glob("*.ready"))) < 2:
    time.sleep(0.002)
for n in range(20):
    Store(root, "base").put("ann", {f"{name}{n}": torch.tensor([float(n), -0.5])})
"""

KILLED = """
import os, sys
from pathlib import Path
import torch
import perce_lite.model.logprob_store as store
def half(tensors, path, metadata):
    save_file(tensors, path, metadata)
    os.truncate(path, os.path.getsize(path) // 2)
    os.kill(os.getpid(), 9)
save_file, store.save_file = store.save_file, half
store.Store(Path(sys.argv[1]), "base").put("ann", {"new": torch.arange(1000.0)})
"""


def exit_codes(tmp_path, code, *names):
    """Of one process a name, all running at the same time."""
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name], env=here) for name in names]
    try:
        return [process.wait(timeout=120) for process in running]
    finally:
        for process in running:
            process.kill()


def test_two_processes_lose_nothing(tmp_path):
    assert exit_codes(tmp_path, WRITER, "x", "y") == [0, 0]
    read = Store(tmp_path, "base").get("ann")
    assert read.keys() == {f"{name}{n}" for name in "xy" for n in range(20)}
    assert all(values.tolist() == [float(key[1:]), -0.5] for key, values in read.items())


def test_threads_lose_nothing(tmp_path):
    def write(name):
        barrier.wait()
        for n in range(10):
            Store(tmp_path, "base").put("ann", {f"{name}{n}": torch.tensor([float(n)])})

    barrier = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, "pqrs"))
    assert Store(tmp_path, "base").get("ann").keys() == {f"{name}{n}" for name in "pqrs" for n in range(10)}


def test_a_kill_in_the_middle_of_a_write_leaves_the_old_entries(tmp_path, capsys):
    store = Store(tmp_path, "base")
    store.put("ann", {"old": torch.tensor(ODD)})
    assert exit_codes(tmp_path, KILLED, "z") == [-signal.SIGKILL]
    (left,) = store.folder.glob(".*.tmp")  # it was killed half-way, indeed
    read = store.get("ann")
    assert read.keys() == {"old"}
    assert same_bits(read["old"], torch.tensor(ODD))
    store.put("ann", {"newer": torch.tensor([1.0])})  # its lock died with it
    assert store.get("ann").keys() == {"old", "newer"}
    size = sum(path.stat().st_size for path in store.folder.iterdir())
    assert left.stat().st_size > 0
    assert clear(tmp_path) == size
    assert not store.folder.exists()
    assert capsys.readouterr().err == ""


def test_usage_and_clear(tmp_path, capsys):
    assert (usage(tmp_path / "absent"), clear(tmp_path / "absent")) == ([], 0)
    first, second = Store(tmp_path, "b1"), Store(tmp_path, "b2")
    first.put("ann", {"a": torch.zeros(3), "b": torch.zeros(1)})
    first.put("bob", {"a": torch.zeros(2)})
    second.put("ann", {"a": torch.zeros(2)})
    torn = second.folder / ".ann-0123456789ab.safetensors.abc.tmp"
    torn.write_bytes(b"12345")
    foreign = [second.folder / "notes.txt", second.folder / "model.safetensors", tmp_path / "a.safetensors"]
    for file in foreign:
        file.write_text("mine")
    written = {first: ("ann", "bob"), second: ("ann",)}
    size = {store: sum(store.path(user).stat().st_size for user in users) for store, users in written.items()}
    assert usage(tmp_path) == [
        {"base": "b1", "users": 2, "entries": 3, "bytes": size[first]},
        {"base": "b2", "users": 1, "entries": 1, "bytes": size[second]},
    ]
    second.path("ann").write_bytes(b"broken")
    assert [base["entries"] for base in usage(tmp_path)] == [3, 0]
    assert "warning" in capsys.readouterr().err
    assert clear(tmp_path) == size[first] + len(b"broken") + 5
    kept = [tmp_path / "store.lock", tmp_path / ".deleted", tmp_path / ".deleted/all", tmp_path / ".deleted/count"]
    assert sorted(tmp_path.rglob("*")) == sorted([second.folder, *foreign, *kept])
    assert first.get("ann") == {}


def test_clear_leaves_weights_that_are_not_the_store_s(tmp_path):
    weights = toys.toy_folder(tmp_path / "models" / "mine") / "model.safetensors"
    clear(tmp_path / "models")
    assert weights.is_file()


def test_any_user_name_is_a_file_of_its_own_inside_the_folder(tmp_path):
    users = ["../../etc", "/etc/passwd", "", ".", "..", "x", "a" * 300, "a" * 301, "Anna", "anna", "ANNA", "an-na"]
    users += ["é", "e\u0301", "\uff41nna", "CON", "a\0b", "a\nb", "\ud800", "抹茶", "抹", "~", "a/b", "a\\b", "an na"]
    store = Store(tmp_path / "store", "base")
    for number, user in enumerate(users):
        store.put(user, {"n": torch.tensor([float(number)])})
    assert [store.get(user)["n"].item() for user in users] == list(range(len(users)))
    paths = [store.path(user) for user in users]
    assert len({path.name.lower() for path in paths}) == len(users)  # on a disk that ignores case, too
    assert all(path.parent == store.folder and len(path.name) < 80 and path.name.isascii() for path in paths)
    written = {path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"}
    assert written == set(paths)


# With a model


def jobs(family="chatml"):
    """Jobs of three users, interleaved, both terms of every row."""
    rows = [from_columns(record, f"row {n}") for n, record in enumerate(toys.toy_rows(3, 2))]
    pairs = PairMaker(toys.toy_tokenizer(family)).make(rows[::2] + rows[1::2])
    return [ScoringJob(pair.row.user, tokens) for pair in pairs for tokens in (pair.factual, pair.counterfactual)]


def forbid(*_):
    raise AssertionError("a forward")


def test_the_second_call_makes_no_forward_and_gives_the_same_bits(tmp_path, monkeypatch):
    model, todo = toys.toy_model("chatml", toys.VOCAB_SIZE), jobs()
    store = Store(tmp_path, store_key(model, None))
    first = cached_log_probs(model, todo, store, None, "scoring")
    assert first.hits == 0
    for job, values in zip(todo, first.log_probs, strict=True):  # in the order of the jobs, and right
        labels = torch.tensor(job.tokens.labels)
        logits = model.double()(torch.tensor([job.tokens.ids])).logits[0, :-1].detach()
        picked = logits.log_softmax(-1)[labels[1:] != IGNORED].gather(1, labels[labels != IGNORED][:, None])[:, 0]
        torch.testing.assert_close(values.double(), picked, atol=1e-4, rtol=0)
    model.float()
    again = cached_log_probs(model, todo, None, None, "scoring").log_probs
    assert all(same_bits(*both) for both in zip(again, first.log_probs, strict=True))
    changed = ScoringJob(todo[0].user, Tokens(todo[0].tokens.ids, [IGNORED, *todo[0].tokens.ids[1:]]))
    assert cached_log_probs(model, [changed, *todo], store, None, "scoring").hits == len(todo)
    monkeypatch.setattr(score, "batch_log_probs", forbid)
    model.model.register_forward_pre_hook(forbid)
    second = cached_log_probs(model, todo[::-1], store, None, "scoring")
    assert second.hits == len(todo)
    assert all(same_bits(*both) for both in zip(second.log_probs[::-1], first.log_probs, strict=True))
    with pytest.raises(AssertionError, match="a forward"):
        cached_log_probs(model, todo, Store(tmp_path, "another"), None, "scoring")


def test_a_pass_that_stops_goes_on_where_it_was(tmp_path, monkeypatch):
    model, todo = toys.toy_model("chatml", toys.VOCAB_SIZE), jobs()
    real, done = score.batch_log_probs, []

    def stops(*arguments):
        done.append(1)
        if len(done) > 5:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(score, "_SECONDS_BETWEEN_WRITES", -1.0)
    monkeypatch.setattr(score, "batch_log_probs", stops)
    with pytest.raises(KeyboardInterrupt):
        cached_log_probs(model, todo, Store(tmp_path, "base"), None, "scoring")
    monkeypatch.setattr(score, "batch_log_probs", real)
    assert cached_log_probs(model, todo, Store(tmp_path, "base"), None, "scoring").hits == 5


def test_store_key_changes_with_what_the_base_computes_with_and_not_with_its_adapter(tmp_path):
    folder = toys.toy_folder(tmp_path, "llama3")

    def base(**kwargs):
        return AutoModelForCausalLM.from_pretrained(folder, **{"dtype": torch.float32, **kwargs})

    def bits(**kwargs):
        return base(quantization_config=BitsAndBytesConfig(load_in_4bit=True, **kwargs))

    nudged, renormed, adapted = base(), base(), get_peft_model(base(), LoraConfig(init_lora_weights=False))
    nudged.lm_head.weight.data[7, 3] += 1e-6
    renormed.model.norm.weight.data[0] = 1.001
    plain = store_key(base(), None)
    keys = [
        plain,
        store_key(base(), torch.bfloat16),  # autocast
        store_key(base(dtype=torch.bfloat16), None),
        store_key(nudged, None),
        store_key(renormed, None),
        store_key(bits(bnb_4bit_quant_type="nf4"), None),
        store_key(bits(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True), None),
        store_key(bits(bnb_4bit_quant_type="fp4"), None),
    ]
    assert len(set(keys)) == len(keys)
    assert store_key(base(), None) == store_key(adapted, None) == plain


def test_store_key_changes_with_the_config():
    models = [toys.toy_model("gemma", toys.VOCAB_SIZE) for _ in range(2)]
    models[1].config.final_logit_softcapping = None
    values = [cached_log_probs(model, jobs("gemma")[:1], None, None, "scoring").log_probs[0] for model in models]
    assert not torch.equal(*values)
    keys = [store_key(model, None) for model in models]
    assert keys[0] != keys[1]
    models[0].config.use_cache, models[0].config.pad_token_id = False, 7  # what trainers set
    assert store_key(models[0], None) == keys[0]


def test_store_key_changes_with_the_precision_of_float32_products(monkeypatch):
    model = toys.toy_model("chatml", toys.VOCAB_SIZE)
    exact = store_key(model, None)
    monkeypatch.setattr(torch.backends, "fp32_precision", "ieee")
    assert store_key(model, None) == exact
    monkeypatch.setattr(torch.backends, "fp32_precision", "tf32")  # as `tf32: true` does
    assert store_key(model, None) != exact


def test_store_key_changes_with_the_attention_and_not_with_prefix_attention():
    model = toys.toy_model("chatml", toys.VOCAB_SIZE)
    sdpa = store_key(model, None)
    prefix_cache_of(model, None)
    assert model.config._attn_implementation != "sdpa"
    assert store_key(model, None) == sdpa, "bare, it computes what it did"
    model.set_attn_implementation("eager")
    assert store_key(model, None) != sdpa


@pytest.mark.parametrize("package", ["torch", "transformers", "trl", "bitsandbytes"])
def test_store_key_changes_with_the_minor_version_of_what_computes(monkeypatch, package):
    model = toys.toy_model("chatml", toys.VOCAB_SIZE)
    real = score.version_of
    keys = []
    for version in ("7.1.0", "7.1.4+cpu", "7.2.0"):
        with monkeypatch.context() as patch:
            patch.setattr(score, "version_of", lambda name, v=version: v if name == package else real(name))
            keys.append(store_key(model, None))
    assert keys[0] == keys[1] != keys[2]
