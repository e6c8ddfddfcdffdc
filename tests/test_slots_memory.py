"""What the plan says of many users at once, against real slots: what is saved and held, how many fit."""

import gc
import json
import weakref
from dataclasses import replace

import psutil
import pytest
import torch
import toys
from memory_fixtures import base_as_on_a_card, recipe_for, size_of, weights, what_is_saved
from transformers import AutoConfig

from perce_lite import PerCEConfig
from perce_lite.data.pairs import PairMaker
from perce_lite.data.rows import from_columns
from perce_lite.fleet import capacity
from perce_lite.fleet.capacity import users_at_once
from perce_lite.fleet.slot_routing import Route
from perce_lite.fleet.slot_trainer import SlotTrainer
from perce_lite.fleet.slot_user import UserJob
from perce_lite.planning import parts as memory
from perce_lite.planning.gpus import GIB, of_size
from perce_lite.planning.plan import MOST_USERS, Plan
from perce_lite.planning.row_lengths import alike
from perce_lite.planning.shapes import KNOWN, shape_of
from perce_lite.recipe import Recipe, load_recipe, lora_config

pytest_plugins = ["cli_fixtures"]


def engine_of(recipe: Recipe, users: int, dtype: torch.dtype, folder, **options) -> tuple[SlotTrainer, list[UserJob]]:
    base = base_as_on_a_card(recipe, dtype)
    given = {"estimator": "uniform", "max_length": 4096, "gradient_checkpointing": False, "report_to": "none",
             "per_device_train_batch_size": 1}  # fmt: skip
    args = PerCEConfig(str(folder / "out"), **{**given, "bf16": dtype == torch.bfloat16, **options})
    maker = PairMaker.of(recipe, base.tokenizer, args.max_length)
    rows = [from_columns({**row, "completion": row["completion"] * 3}, "") for row in toys.toy_rows(users, 3)]
    engine = SlotTrainer(base.model, base.tokenizer, args, lora_config(recipe), users, core=recipe.core_only)
    one_parent = recipe.fleet.init_from == "all"
    names = dict.fromkeys(row.user for row in rows)
    pairs = {name: maker.make([row for row in rows if row.user == name]) for name in names}
    parents = [engine.model.fresh(seed) for seed in range(users)] if recipe.core_only else [None] * users
    starts = [parents[0] if one_parent else parent for parent in parents]
    jobs = zip(pairs.items(), starts, strict=True)
    return engine, [UserJob(name, made, steps=2, adapter=start) for (name, made), start in jobs]


CASES = {
    "llama": ("llama", 3, torch.float32, "r: 8", {}),
    "qwen3, two rows a user": ("qwen3", 4, torch.float32, "r: 4", {"per_device_train_batch_size": 2}),
    "gemma3, checkpointed": ("gemma3_text", 4, torch.bfloat16, "r: 4", {"gradient_checkpointing": True}),
    "llama, cores": ("llama", 5, torch.float32, "r: 4, core_only: true", {}),
    "llama, cores of several parents": ("llama", 3, torch.float32, "r: 4, core_only: true", {"init_from": "cohort"}),
}


@pytest.mark.parametrize(("kind", "users", "dtype", "lora", "options"), CASES.values(), ids=CASES)
def test_what_slots_hold_and_save(tmp_path, kind, users, dtype, lora, options):
    options = dict(options)
    starts = {"init_from": options.pop("init_from", "all")}
    recipe = recipe_for(tmp_path, kind, {}, lora)
    recipe = recipe.model_copy(update={"fleet": recipe.fleet.model_copy(update=starts)})
    engine, jobs = engine_of(recipe, users, dtype, tmp_path, **options)
    found, steps, losses = {}, [], engine._losses

    def watched(trainings, batch):
        if steps:  # later ones may be smaller
            return losses(trainings, batch)
        rows, length = batch["input_ids"].shape
        scored = int((batch["labels"][:, 1:] != -100).sum()) // rows
        steps.append(memory.Step(rows, length, scored, itemsize=dtype.itemsize, users=users))
        with what_is_saved(engine.model.base) as saved:
            made = losses(trainings, batch)
        found.update(saved)
        found["learners"] = list(trainings)
        return made

    engine._losses = watched
    engine.run(jobs, lambda result: None)
    counted, step = weights(recipe, dtype.itemsize), steps[0]
    facts = shape_of(AutoConfig.from_pretrained(recipe.model_folder))
    assert step.users == users
    assert step.rows == users * options.get("per_device_train_batch_size", 1)
    told = memory.saved(facts, counted, step, options.get("gradient_checkpointing", False))
    assert told == pytest.approx(found["bytes"], rel=0.03)
    trained = [tensor for learner in found["learners"] for tensor in learner.parameters]
    held = [tensor for layer in engine.model.layers.values() for tensor in (layer.lora_A, layer.lora_B)]
    frozen = size_of(held) if recipe.core_only else 0
    assert 4 * counted.elements(users) == size_of(trained) + frozen
    states = [learner.optimizer.state.values() for learner in found["learners"]]
    kept = [one for some in states for state in some for one in state.values() if isinstance(one, torch.Tensor)]
    assert users * memory.optimizer_bytes(counted.by_user, "adamw_torch") == size_of(kept)


def fleet_recipe(tmp_path, *overrides: str) -> Recipe:
    path = tmp_path / "mine.yaml"
    path.write_text(f"model: {KNOWN['Llama-3.1-8B']}\ndata: {{path: rows.jsonl}}\nfleet: {{slots: auto}}\n")
    return load_recipe(path, ["train.per_device_train_batch_size=1", *overrides])


def test_the_most_users_are_the_last_that_fit(tmp_path):
    plan = Plan(fleet_recipe(tmp_path), alike(512, ""))
    by_size = [plan.most_users(plan.choice, of_size(size)) for size in (6, 10, 12, 80)]
    assert by_size[0] == 0
    assert 1 <= by_size[1] < by_size[2] < MOST_USERS == by_size[3]
    for users, fits in ((by_size[1], True), (by_size[1] + 1, False)):
        assert plan.fits(replace(plan.choice, users=users), of_size(10)) == fits
    packed = Plan(fleet_recipe(tmp_path, "train.packing=true", "train.max_length=512"), alike(512, ""))
    assert packed.most_users(packed.choice, of_size(24)) == 1, "slots do not pack"


def test_auto_takes_what_the_memory_here_takes(tmp_path, monkeypatch):
    def with_free(gib: float, *overrides: str) -> int:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Free", (), {"available": int(2 * gib * GIB)}))
        return users_at_once(fleet_recipe(tmp_path, "device=cpu", "train.max_length=256", *overrides))

    some = with_free(16)
    assert 1 < some < with_free(24) < MOST_USERS
    assert with_free(0.5) == 1
    assert with_free(400) == MOST_USERS
    assert with_free(16, "fleet.train.max_length=128") > some
    assert with_free(0.5, "fleet.slots=5") == 5
    monkeypatch.setattr(capacity, "Plan", plan_that_does_not_know)
    assert with_free(400) == 1


def plan_that_does_not_know(*args, **kwargs):
    from perce_lite.errors import PlanError

    raise PlanError("a family that nobody has looked into")


def test_the_plan_of_a_fleet_tells_how_many_users_fit(tmp_path, run):
    fleet_recipe(tmp_path)
    path, size = tmp_path / "mine.yaml", ("--gpu", "10GB", "--json", tmp_path / "plan.json")
    short = ("--set", "train.max_length=512", "--set", "train.per_device_train_batch_size=1")
    code, out, _ = run("plan", path, *size, *short)
    most = json.loads((tmp_path / "plan.json").read_text())["cards"][0]["users_at_once"]
    assert (code, "users at" in out, "fits as it is" in out, 1 <= most < MOST_USERS) == (0, True, True, True)
    code, out, _ = run("plan", path, *size, *short, "--set", f"fleet.slots={most + 1}")
    assert f"perce-lite fleet {path} {' '.join(short)} --set fleet.slots={most}\n" in out
    _, out, _ = run("plan", path, *size, *short, "--set", f"fleet.slots={most}")
    assert "fits as it is" in out


def test_an_engine_is_free_as_soon_as_it_is_let_go(tmp_path):
    """Without a collection: a fleet makes the next one at once, beside what the first would hold."""
    engine, jobs = engine_of(recipe_for(tmp_path, "llama", {}), 2, torch.float32, tmp_path)
    gc.collect()
    gc.disable()
    try:
        engine.run(jobs, lambda result: None)
        gone = weakref.ref(engine.model.layers["model.layers.0.self_attn.q_proj"])
        engine.model.detach()
        del engine
        assert gone() is None
    finally:
        gc.enable()


def test_gradients_are_there_while_a_window_is_open_alone(tmp_path):
    """Two batches a step for each: after the first all gradients wait, after the second none is left."""
    options = {"gradient_accumulation_steps": 2, "num_train_epochs": 1}
    engine, jobs = engine_of(recipe_for(tmp_path, "llama", {}), 2, torch.float32, tmp_path, **options)
    waiting, step = [], engine._step

    def watched(trainings):
        errors = step(trainings)
        waiting.append([parameter.grad is not None for _, parameter in engine.model._trained()])
        return errors

    engine._step = watched
    engine.run(jobs, lambda result: None)
    assert [all(some) for some in waiting[:2]] == [True, False]
    assert not any(waiting[1])


def test_layers_that_read_the_same_share_what_is_saved_of_it(tmp_path, monkeypatch):
    """A float32 base under bf16, as on a CPU: q, k and v keep one copy of their input, gate and up another."""

    def copies(folder) -> int:
        engine, jobs = engine_of(recipe_for(folder, "llama", {}), 2, torch.float32, folder, bf16=True)
        counted, losses = [], engine._losses

        def watched(trainings, batch):
            kept = {}

            def pack(tensor):
                kept[tensor.untyped_storage().data_ptr()] = tensor
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
                made = losses(trainings, batch)
            size = 2 * batch["input_ids"].numel() * engine.model.base.config.hidden_size
            of_size = [one for one in kept.values() if one.untyped_storage().nbytes() == size]
            counted.append(sum(one.dtype == torch.bfloat16 for one in of_size))
            return made

        engine._losses = watched
        engine.run(jobs, lambda result: None)
        return counted[0]

    shared = copies(tmp_path / "shared")
    monkeypatch.setattr(Route, "rows_of", lambda self, x, dtype: x.to(dtype))
    layers = 2
    assert copies(tmp_path / "alone") - shared == layers * (2 + 1)
