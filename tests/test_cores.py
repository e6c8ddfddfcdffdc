"""Cores: an r x r matrix a layer between the frozen A and B of a parent, alone and in slots, against plain autograd."""

import shutil
from pathlib import Path

import pytest
import torch
import toys
from fleet_fixtures import TEXT, Clock, names, rows_of
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from test_engine import config, exact_head, pairs_of, toy_base
from test_slots import LORA, ids_of, loss_of, padded, peft_model, stirred

from perce_lite.errors import AdapterError, ConfigError
from perce_lite.fleet.engines.sequential import SequentialEngine
from perce_lite.fleet.fleet import fleet
from perce_lite.fleet.registry import opened
from perce_lite.fleet.slot_lora import attach
from perce_lite.fleet.slot_routing import BARE
from perce_lite.fleet.slot_trainer import SlotTrainer
from perce_lite.fleet.slot_user import UserJob
from perce_lite.model import adapter_weights
from perce_lite.model.fingerprint import fingerprint
from perce_lite.model.lora_core import add_cores, cored_of, faults
from perce_lite.recipe import load_recipe, lora_config

pytest_plugins = ["cli_fixtures"]


def parent_of(seed):
    """An adapter that does something, by PEFT's names."""
    return stirred(get_peft_model_state_dict(peft_model(seed)), seed)


def cored(parent, dtype=torch.float64):
    """A peft model with `parent` frozen on it and a core in each layer."""
    model = peft_model(0, dtype)
    model.load_state_dict({name.replace(".weight", ".default.weight"): one for name, one in parent.items()}, False)
    add_cores(model)
    return model


def reference(parent, text, steps, rate=1e-2):
    """Trains the cores alone, the products B C A written out beside each linear: (cores, first gradients), by layer."""
    base = toys.toy_model("llama3", toys.VOCAB_SIZE, dtype=torch.float64)
    base.requires_grad_(False)
    cores = {}
    for name, a in parent.items():
        if "lora_A" not in name:
            continue
        path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        b, core = parent[name.replace("lora_A", "lora_B")], torch.eye(4, dtype=torch.float64, requires_grad=True)
        cores[path] = core

        def beside(module, args, output, a=a, b=b, core=core):
            return output + 2.0 * args[0] @ (b @ core @ a).mT  # lora_alpha / r

        base.get_submodule(path).register_forward_hook(beside)
    optimizer, first = torch.optim.AdamW(cores.values(), lr=rate), {}
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(base(input_ids=text).logits, text, torch.ones_like(text)).backward()
        first = first or {path: core.grad.clone() for path, core in cores.items()}
        optimizer.step()
    return {path: core.detach() for path, core in cores.items()}, first


def test_a_core_alone_is_autograds_and_starts_from_its_parent():
    parent, text = parent_of(3), ids_of(1)
    model = cored(parent)
    whole = PeftModel(toys.toy_model("llama3", toys.VOCAB_SIZE, dtype=torch.float64), LoraConfig(**LORA)).double()
    whole.load_state_dict({name.replace(".weight", ".default.weight"): one for name, one in parent.items()}, False)
    torch.testing.assert_close(model(input_ids=text).logits, whole(input_ids=text).logits, rtol=0, atol=1e-11)
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    assert all(name.endswith("lora_B.default.core") for name in trained)
    assert sum(one.numel() for one in trained.values()) == 4 * 4 * len(parent) // 2
    cores, first = reference(parent, text, 20)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    for step in range(20):
        optimizer.zero_grad()
        loss_of(model(input_ids=text).logits, text, torch.ones_like(text)).backward()
        for name, one in trained.items() if step == 0 else ():
            path = name.removeprefix("base_model.model.").removesuffix(".lora_B.default.core")
            assert first[path].abs().max() > 1e-6
            torch.testing.assert_close(one.grad, first[path], rtol=0, atol=1e-11)
        optimizer.step()
    saved = cored_of(model).plain()
    assert saved.keys() == parent.keys()
    for name, tensor in parent.items():
        path = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
        expected = tensor if "lora_A" in name else tensor @ cores[path]
        torch.testing.assert_close(saved[name], expected, rtol=0, atol=1e-9)
        assert torch.equal(saved[name], tensor) == ("lora_A" in name)


def test_a_core_stays_the_only_trained_part_whatever_peft_switches_on():
    model = cored(parent_of(1))
    with model.disable_adapter():
        pass
    model.set_adapter("default")
    assert {name.rpartition(".")[2] for name, one in model.named_parameters() if one.requires_grad} == {"core"}


@pytest.mark.parametrize("parents", [(5, 5, 5), (5, 6, 5)])
def test_cores_in_slots_are_those_trained_alone(parents):
    """Users of one parent, and of two, share batches; gradients of other slots are exactly zero."""
    states = {seed: parent_of(seed) for seed in set(parents)}
    base = toys.toy_model("llama3", toys.VOCAB_SIZE, dtype=torch.float64)
    model = attach(base, LoraConfig(**LORA), 3, torch.float64, core=True)
    optimizers, tensors = [], []
    for slot, seed in enumerate(parents):
        model.load_slot(slot, states[seed])
        tensors.append(model.parameters_of(slot))
        optimizers.append(torch.optim.AdamW(tensors[-1], lr=1e-2))
    layer = next(iter(model.layers.values()))
    assert len(layer.lora_A) == len(set(parents)), "one A and B a parent, not a slot"
    assert model.parameters == 16 * len(model.layers)
    texts = [ids_of(slot) for slot in range(3)]
    ids, mask = padded(texts)
    for step in range(20):
        with model.route.of([0, 1, 2]):
            logits = model.base(input_ids=ids, attention_mask=mask).logits
            losses = [loss_of(logits[u : u + 1], ids[u : u + 1], mask[u : u + 1]) for u in range(3)]
            if step == 0:
                losses[1].backward(retain_graph=True)
                for one in model.layers.values():
                    assert one.lora_core.grad[1].abs().max() > 0
                    assert torch.count_nonzero(one.lora_core.grad[[0, 2]]) == 0
                model.clear_gradients(1)
            sum(losses).backward()
        for slot in range(3):
            model.hand_gradients(slot, tensors[slot])
            optimizers[slot].step()
            model.clear_gradients(slot)
    for slot, seed in enumerate(parents):
        cores, _ = reference(states[seed], texts[slot], 20)
        for name, tensor in model.read_slot(slot).items():
            path = name.removeprefix("base_model.model.").rpartition(".lora_")[0]
            expected = states[seed][name] if "lora_A" in name else states[seed][name] @ cores[path]
            torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-9)
    with torch.no_grad(), model.route.of([BARE, 1, BARE]):
        bare = toys.toy_model("llama3", toys.VOCAB_SIZE, dtype=torch.float64)(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(model.base(input_ids=ids, attention_mask=mask).logits[[0, 2]], bare[[0, 2]])


def test_a_parent_makes_room_for_the_next(tmp_path, monkeypatch):
    """Five users of four parents in two slots: each as alone, and no more parents are held than slots."""
    monkeypatch.setattr("perce_lite.fleet.slot_trainer.training_forward", exact_head)
    args = config(tmp_path, estimator="uniform", max_steps=3)

    def engine(slots):
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        return SlotTrainer(
            toy_base(torch.float64), toys.toy_tokenizer("chatml"), args, lora, slots, torch.float64, True
        )

    two = engine(2)
    whole = attach(toy_base(torch.float64), LoraConfig(**LORA), 1, torch.float64)
    parents = [stirred(whole.fresh(seed), seed) for seed in range(4)]
    jobs = [UserJob(f"user{u}", pairs_of(u, 2 + u % 2), steps=2 + u % 3, adapter=parents[u % 4]) for u in range(5)]
    together = {}
    two.run(iter(jobs), lambda result: together.update({result.user: result}))
    assert len(two.model.parents) == 2
    for job in jobs:
        alone = []
        engine(1).run([job], alone.append)
        for name, tensor in alone[0].adapter.items():
            torch.testing.assert_close(together[job.user].adapter[name], tensor, rtol=0, atol=1e-9)
            assert torch.equal(tensor, job.adapter[name]) == ("lora_A" in name)
    failed = []
    two.run([UserJob("nobody", pairs_of(0))], failed.append)
    assert isinstance(failed[0].error, AdapterError)


def test_what_a_core_cannot_stand_in_is_refused():
    with pytest.raises(ConfigError, match="plain LoRA on linear layers"):
        add_cores(peft_model(0, use_dora=True))
    with pytest.raises(ConfigError, match="would be trained too"):
        add_cores(peft_model(0, modules_to_save=["norm"]))
    assert faults({}) == []


CORED = TEXT.replace("gate: null", "gate: null, slots: 2, train: {learning_rate: 0.02}").replace(
    "learning_rate: 0.05", "learning_rate: 0.01, adam_epsilon: 1e-4"
)
LORA_TEXT = "lora: {r: 4, core_only: true}\n"


def weights_of(folder, user):
    return adapter_weights.tensors(folder_of(folder, user))


def folder_of(fleet_folder, user):
    [folder] = Path(fleet_folder).rglob(f"{user}-*/adapter")
    return folder


def test_a_fleet_of_cores(recipe, figures, run):
    """Slots and one by one train the same; what is exported is a plain LoRA; the registry says what was trained."""
    path = recipe(rows_of(3), CORED + LORA_TEXT)
    told = figures("fleet", path)
    assert (told["trained"], told["failed"], told["gains"]["users"]) == (4, 0, 3)
    shutil.move("out", "slots")
    fleet(load_recipe(path), SequentialEngine)
    [shared] = Path("slots").rglob("all-*/adapter")
    start = load_file(shared / "adapter_model.safetensors")
    for user in ("user0", "user1", "user2"):
        one, other = weights_of("slots", user), weights_of("out", user)
        assert one.keys() == other.keys() == start.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=2e-5)
            assert torch.equal(one[name], start[name]) == ("lora_A" in name)
        moved = max(float((one[name] - start[name]).abs().max()) for name in one)
        assert moved > 1e-3, "nothing was trained"
    folder = folder_of("slots", "user1")
    assert {file.name for file in folder.iterdir()} == {"core.safetensors", "perce_lite.json", "README.md"}
    assert run("export", folder, "--to", "peft", "--out", "plain")[0] == 0
    model = PeftModel.from_pretrained(toys.toy_model("chatml", 600), "plain").eval()
    assert torch.isfinite(model(input_ids=ids_of(1)).logits).all()
    for name, tensor in load_file("plain/adapter_model.safetensors").items():
        assert torch.equal(tensor, weights_of("slots", "user1")[name])
    config_read = Path("plain/adapter_config.json").read_text()
    assert "core_only" not in config_read
    assert '"r": 4' in config_read
    with opened(Path("slots")) as one, opened(Path("out")) as other:
        for mine, theirs in zip(one.all(), other.all(), strict=True):
            assert mine.gain == pytest.approx(theirs.gain, abs=1e-4)
            assert mine.metrics["parameters"] == theirs.metrics["parameters"]
        layers, user = len(start) // 2, one.get("user", "user1")
    assert user.metrics["parameters"] == 4 * 4 * layers
    shown = figures("adapters", "show", "user1", "--fleet", "slots")
    assert shown["trained"].startswith(f"a core of {16 * layers} parameters between A and B of the shared adapter")
    assert "core" not in figures("adapters", "show", "all", "--fleet", "slots")["trained"]
    assert run("adapters", "verify", "--fleet", "slots")[0] == 0
    assert run("generate", "--adapter", folder, "--user", "user1", "--prompt", "Hi", "--max-new-tokens", "2")[0] == 0


def test_asking_for_cores_trains_no_parent_again(recipe):
    path, engine = recipe(rows_of(2), TEXT), Clock()
    fleet(load_recipe(path), engine)
    names(engine)
    fleet(load_recipe(path, ["lora.core_only=true"]), engine)
    assert names(engine) == ["user0", "user1"]
    assert fleet(load_recipe(path, ["lora.core_only=true"]), engine).trained == 0
    fleet(load_recipe(path, ["lora.core_only=false"]), engine)
    assert names(engine) == ["user0", "user1"]
    fleet(load_recipe(path, ["fleet.max_examples=3"]), engine)
    assert names(engine) == ["all", "user0", "user1"], "the shared adapter has seen fewer rows as well"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("fleet", "--set", "fleet.init_from=none"), "no adapter starts from another"),
        (("fleet", "--set", "fleet.group_by=all"), "no adapter starts from another"),
        (("fleet", "--set", "fleet.group_by=cohort"), "no adapter starts from another"),
        (("fleet", "--set", "lora.core_only=2"), "true or false"),
        (("fleet", "--set", "lora.use_dora=true"), "plain LoRA on linear layers"),
        (("train",), "perce-lite train trains from nothing"),
        (("compare", "--arms", "uniform,base"), "perce-lite compare trains from nothing"),
        (("bench",), "perce-lite bench trains from nothing"),
        (("bench", "--fleet"), "perce-lite bench --fleet trains from nothing"),
    ],
)
def test_a_core_without_a_parent_is_refused(recipe, run, words, told):
    path = recipe(rows_of(2), TEXT.replace("gate: null", "gate: null, slots: 1") + "lora: {core_only: true}\n")
    code, _, err = run(words[0], path, *words[1:])
    assert code == 2
    assert told in " ".join(err.split())


def test_the_field_never_reaches_peft(recipe):
    read = load_recipe(recipe(rows_of(2), TEXT + LORA_TEXT))
    assert read.core_only
    assert lora_config(read).r == 4
    model = get_peft_model(toy_base(), lora_config(read))
    before = fingerprint(model)
    add_cores(model)
    assert fingerprint(model) == before, "a core is no part of the base"
