"""Cores on disk: r x r numbers that name their parent, loaded everywhere as the plain LoRA that they make of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from fleet_fixtures import rows_of
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from test_cores import CORED, LORA_TEXT, folder_of
from transformers import AutoModelForCausalLM

from perce_lite.errors import AdapterError
from perce_lite.files import folder_written_aside
from perce_lite.fleet.disk import DiskSize
from perce_lite.fleet.engines.slots import engine_for
from perce_lite.fleet.fleet import fleet
from perce_lite.model import adapter_files, adapter_weights, adapters
from perce_lite.model.answering import Answerer
from perce_lite.model.lora_core import Cored
from perce_lite.recipe import load_recipe
from perce_lite.serve.pool import Pool

pytest_plugins = ["cli_fixtures"]

PARENTS = Path("adapters/parents")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, toy):
    """A recipe of cores, and in `out` beside it the fleet of two users that it trained."""
    folder = tmp_path_factory.mktemp("cores")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows_of(2))))
    head = f"model: {toy}\nquantization: none\ndtype: float32\ndevice: cpu\ndata: {{path: rows.jsonl}}\n"
    (folder / "mine.yaml").write_text(head + CORED + LORA_TEXT)
    result = fleet(
        load_recipe(folder / "mine.yaml", [f"train.output_dir={folder / 'out'}", "train.store=null"]), engine_for
    )
    assert (result.trained, result.failed) == (3, 0)
    return folder


@pytest.fixture
def cores(trained, tmp_path, monkeypatch):
    """The same in a copy, which is the current folder."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def base_of(toy):
    return AutoModelForCausalLM.from_pretrained(toy).eval()


def parent_folder():
    [parent] = (Path("out") / PARENTS).iterdir()
    return parent


def test_a_core_is_all_that_a_user_takes(cores):
    folder, parent = folder_of("out", "user0"), parent_folder()
    assert {file.name for file in folder.iterdir()} == {"core.safetensors", "perce_lite.json", "README.md"}
    assert {file.name for file in parent.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    numbers, whole = load_file(folder / "core.safetensors"), load_file(parent / "adapter_model.safetensors")
    assert {tuple(tensor.shape) for tensor in numbers.values()} == {(4, 4)}
    assert len(numbers) == len(whole) // 2
    shared = load_file(folder_of("out", "all") / "adapter_model.safetensors")
    assert all(torch.equal(whole[name], tensor) for name, tensor in shared.items())
    named = json.loads((folder / "perce_lite.json").read_text())["core"]
    assert named["fingerprint"] == parent.name
    assert (folder / named["parent"]).resolve() == parent.resolve()
    assert not Path(named["parent"]).is_absolute()


def test_loaded_it_is_the_plain_lora_to_the_bit(cores, toy):
    """Alone, beside another, to start from, and copied as peft has it."""
    folder = folder_of("out", "user0")
    Path("plain").mkdir()
    adapter_weights.copy_plain(folder, Path("plain"))
    metadata = adapter_files.given_away(adapter_files.read_metadata(folder))
    Path("plain/perce_lite.json").write_text(json.dumps(metadata))
    assert not adapter_files.is_core(Path("plain"))
    assert "core" not in adapter_files.read_metadata(Path("plain"))
    plain = load_file("plain/adapter_model.safetensors")
    expected = adapters.load(base_of(toy), Path("plain"))
    alone = adapters.load(base_of(toy), folder)
    both = adapters.load_beside(adapters.load(base_of(toy), folder_of("out", "user1"), "one"), folder, "other")
    started = adapters.load(base_of(toy), folder_of("out", "all"))
    adapters.start_from(started, folder)
    text = torch.arange(20)[None] + 5
    for model, name in ((expected, "default"), (alone, "default"), (both, "other"), (started, "default")):
        state = get_peft_model_state_dict(model, adapter_name=name)
        assert state.keys() == plain.keys()
        assert all(torch.equal(state[key], tensor) and tensor.dtype == torch.float32 for key, tensor in plain.items())
        assert not model.training
        with torch.no_grad():
            assert torch.equal(model(input_ids=text).logits, expected(input_ids=text).logits)
    assert not any(parameter.requires_grad for parameter in alone.parameters())
    with adapters.attached(base_of(toy), folder) as model, torch.no_grad():
        assert torch.equal(model(input_ids=text).logits, expected(input_ids=text).logits)


def test_what_is_stored_gives_back_what_was_trained():
    """C less the identity loses nothing of C in float32, and in bfloat16 nothing near 1 that C itself would lose."""
    generator = torch.Generator().manual_seed(0)
    core = torch.eye(4) + 0.3 * torch.rand(4, 4, generator=generator) - 0.1
    assert torch.equal(adapter_weights.change(core) + torch.eye(4), core)
    small = torch.eye(4) * (1 + 2**-12)
    assert torch.equal(adapter_weights.change(small).bfloat16().float() + torch.eye(4), small)
    assert torch.equal(small.bfloat16().float(), torch.eye(4))
    a, b = torch.rand(4, 6, generator=generator), torch.rand(5, 4, generator=generator)
    plain = Cored({"x.lora_A.weight": a, "x.lora_B.weight": b}, {"x": core}).plain()
    assert torch.equal(plain["x.lora_A.weight"], a)
    assert torch.equal(plain["x.lora_B.weight"], (b.double() @ core.double()).float())


def test_every_command_takes_it(cores, run, figures):
    folder = folder_of("out", "user1")
    for words in (
        ("generate", "--adapter", folder, "--user", "user1", "--prompt", "Hi", "--max-new-tokens", "2"),
        ("eval", "mine.yaml", "--adapter", folder, "--set", "evaluation.generated_rows=0"),
        ("adapters", "verify", "--fleet", "out"),
    ):
        code, _, err = run(*words)
        assert code == 0, (words, err)
    exported = figures("export", "--all", "--fleet", "out", "--to", "peft", "--out", "exported")
    assert (len(exported["exports"]), exported["failed"]) == (2, 0)
    again = figures("export", "--all", "--fleet", "out", "--to", "peft", "--out", "exported")
    assert {done["state"] for done in again["exports"]} == {"kept"}
    for done in exported["exports"]:
        numbers = load_file(Path(done["folder"]) / "adapter_model.safetensors")
        own = adapter_weights.tensors(folder_of("out", done["users"][0]))
        assert all(torch.equal(numbers[name], tensor) for name, tensor in own.items())


def test_the_server_takes_it(cores):
    own, other = (adapter_files.read_metadata(folder_of("out", user)) for user in ("user0", "user1"))
    size = adapter_files.weights_bytes(Path(own["folder"]))
    shared = load_file(folder_of("out", "all") / "adapter_model.safetensors")
    assert size == 4 * sum(tensor.numel() for tensor in shared.values())
    pool = Pool(own, limit=size)
    assert isinstance(pool.take(own), Answerer)
    assert isinstance(pool.take(other), Answerer)
    assert (pool.adapters, pool.bytes, pool.loads) == (1, size, 2)


def remove(parent):
    shutil.rmtree(parent)


def change(parent):
    numbers = load_file(parent / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in numbers.items()}, parent / "adapter_model.safetensors")


def stronger(parent):
    options = json.loads((parent / "adapter_config.json").read_text())
    (parent / "adapter_config.json").write_text(json.dumps({**options, "lora_alpha": 99}))


def tear(parent):
    file = parent / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize(
    ("harm", "message"),
    [(remove, "is missing"), (change, "has changed"), (stronger, "has changed"), (tear, "cut off or damaged")],
)
def test_a_parent_that_is_not_as_it_was_is_one_clear_error(cores, toy, run, harm, message):
    harm(parent_folder())
    folder = folder_of("out", "user0")
    with pytest.raises(AdapterError, match=message):
        adapters.load(base_of(toy), folder)
    code, _, err = run("generate", "--adapter", folder, "--no-profile", "--prompt", "Hi", "--max-new-tokens", "2")
    assert code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    code, out, _ = run("adapters", "verify", "--fleet", "out")
    assert code == 2
    assert message in " ".join(out.split())
    assert "1 of 3 adapters are whole" in out
    fleet(load_recipe("mine.yaml"), engine_for, retrain=["user0"])
    assert run("adapters", "verify", "--fleet", "out")[0] == 0, "the parent was written anew, for the other core too"


def test_workers_that_write_one_parent_at_once_do_not_disturb_each_other(tmp_path):
    folder = tmp_path / "parent"
    with folder_written_aside(folder, once=True) as aside:
        (aside / "file").write_text("mine")
        folder.mkdir()
        (folder / "file").write_text("the other's")
    assert (folder / "file").read_text() == "the other's"
    assert [path.name for path in tmp_path.iterdir()] == ["parent"]


def test_a_core_that_was_moved_says_how_to_take_it_along(cores, run):
    shutil.copytree(folder_of("out", "user0"), "elsewhere")
    code, _, err = run("export", "elsewhere", "--to", "peft", "--out", "x")
    assert code == 2
    assert "export --to peft makes a plain LoRA" in " ".join(err.split())
    shutil.move("out", "renamed")
    assert adapter_weights.tensors(folder_of("renamed", "user0"))


def test_what_a_core_stands_in_outlives_a_new_parent(cores):
    """A user whose new training has not come yet keeps the adapter; the old parent goes with the last core of it."""
    before = adapter_weights.tensors(folder_of("out", "user1"))
    recipe = load_recipe("mine.yaml", ["train.learning_rate=0.02"])
    fleet(recipe, engine_for, only=["user0"])
    assert len(list((Path("out") / PARENTS).iterdir())) == 2
    after = adapter_weights.tensors(folder_of("out", "user1"))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    fleet(recipe, engine_for)
    assert parent_folder().name == adapter_files.read_metadata(folder_of("out", "user1"))["core"]["fingerprint"]


def test_adapters_of_before_are_read_as_they_are(cores, toy):
    """A fleet whose users' cores were stored as plain LoRAs: a mixed one works, and is stored anew when due."""
    folder = folder_of("out", "user0")
    expected = adapter_weights.tensors(folder)
    plain = folder.with_name("plain")
    plain.mkdir()
    adapter_weights.copy_plain(folder, plain)
    shutil.copy(folder / "perce_lite.json", plain)
    shutil.rmtree(folder)
    plain.rename(folder)
    assert all(torch.equal(adapter_weights.tensors(folder)[name], tensor) for name, tensor in expected.items())
    adapters.load(base_of(toy), folder)
    fleet(load_recipe("mine.yaml"), engine_for, retrain=["user0"])
    assert adapter_files.is_core(folder)


@pytest.mark.parametrize("core", [True, False])
@pytest.mark.parametrize("slots", [1, 2])
def test_half_the_bytes_in_bfloat16(trained, tmp_path, monkeypatch, toy, core, slots):
    shutil.copy(trained / "rows.jsonl", tmp_path)
    shutil.copy(trained / "mine.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    options = [f"fleet.slots={slots}", f"lora.core_only={str(core).lower()}"]
    fleet(load_recipe("mine.yaml", [*options, "fleet.adapter_dtype=bfloat16"]), engine_for)
    file = folder_of("out", "user0") / ("core.safetensors" if core else "adapter_model.safetensors")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    shared = folder_of("out", "all") / "adapter_model.safetensors"
    assert {tensor.dtype for tensor in load_file(shared).values()} == {torch.bfloat16}
    state = get_peft_model_state_dict(adapters.load(base_of(toy), folder_of("out", "user0")))
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert all(torch.equal(state[name], tensor) for name, tensor in adapter_weights.tensors(file.parent).items())
    assert fleet(load_recipe("mine.yaml", options), engine_for).trained == 0, "what is there stays as it is stored"


def test_the_disk_that_is_asked_for(cores):
    whole = DiskSize.of(load_recipe("mine.yaml", ["lora.core_only=false", "fleet.slots=1"]))
    core = DiskSize.of(load_recipe("mine.yaml", ["fleet.slots=1"]))
    half = DiskSize.of(load_recipe("mine.yaml", ["fleet.adapter_dtype=bfloat16"]))
    numbers = load_file(folder_of("out", "user0") / "core.safetensors")
    assert core.trained == 4 * sum(tensor.numel() for tensor in numbers.values())
    assert core.of_a_user >= sum(file.stat().st_size for file in folder_of("out", "user0").iterdir())
    assert whole.whole >= sum(file.stat().st_size for file in folder_of("out", "all").iterdir())
    assert whole.of_a_user == whole.whole == core.whole > core.of_a_user > half.of_a_user
    many = 10_000
    assert whole.need(1, 1, many) == (many + 1) * whole.whole + 6 * whole.numbers
    assert core.need(1, 1, many) == many * core.of_a_user + 2 * core.whole + max(
        6 * core.trained + 2 * core.numbers, 6 * core.numbers
    )
    assert core.need(1, 0, 0) == core.whole, "nothing but the parents that there are"
