"""The plan: GPUs, shapes known by heart, what fits, the smallest change, the command line, the README's table."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toys
from transformers import AutoModelForCausalLM

from perce_lite import PerCETrainer
from perce_lite.errors import ModelError, PlanError
from perce_lite.model.footprint import on_meta
from perce_lite.planning import probe
from perce_lite.planning.gpus import COMMON_SIZES, GIB, GPUS, gpu, of_size
from perce_lite.planning.parts import nf4_bytes
from perce_lite.planning.plan import Plan
from perce_lite.planning.row_lengths import Rows, alike
from perce_lite.planning.shapes import KNOWN, known_config, shape_of
from perce_lite.recipe import load_recipe

pytest_plugins = ["cli_fixtures"]

README = (Path(__file__).resolve().parents[1] / "perce_lite" / "planning" / "README.md").read_text(encoding="utf-8")
ELEMENTS = {
    "Llama-3.1-8B": 8_030_261_248,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Gemma-3-4B": 3_880_263_168,
    "SmolLM2-1.7B": 1_711_376_384,
    "SmolLM2-135M": 134_515_008,
}
"""Parameters as published with the models' weights; of Gemma 3 those of the text part."""


@pytest.mark.parametrize("given", ["8GB", "8 GiB", "8", "8g"])
def test_a_size_names_a_card(given):
    assert gpu(given) == of_size(8)
    assert 7.5 * GIB < of_size(8).bytes < 8 * GIB


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("RTX 4070", "RTX 4070"),
        ("rtx4070", "RTX 4070"),
        ("NVIDIA GeForce RTX 3060", "RTX 3060"),
        ("RTX 3060 12GB", "RTX 3060"),
        ("Tesla T4", "T4"),
        ("a100-80gb", "A100 80GB"),
        ("RTX 4060 Ti 16 GB", "RTX 4060 Ti 16GB"),
    ],
)
def test_names_of_cards(given, name):
    assert gpu(given) is GPUS[name]


def test_a_card_that_is_not_known_names_the_nearest():
    with pytest.raises(PlanError, match=r"RTX 4071.*did you mean .*RTX 4070.*--gpu 8GB"):
        gpu("RTX 4071")
    for old in ("V100", "Tesla P100", "GTX 1080 Ti"):
        with pytest.raises(PlanError, match="CUDA 13"):
            gpu(old)
    with pytest.raises(PlanError, match="1 to 1024 GB"):
        gpu("0.5GB")


def test_old_cards_have_no_bf16():
    assert not gpu("T4").bf16
    assert gpu("L4").bf16
    assert all(GPUS[name].bf16 for name in GPUS if name.startswith(("RTX 3", "RTX 4", "RTX 5", "A", "H", "L")))


@pytest.mark.parametrize("name", KNOWN)
def test_shapes_known_by_heart_have_the_published_size(name):
    config = known_config(KNOWN[name])
    assert sum(one.numel() for one in on_meta(config).parameters()) == ELEMENTS[name]
    assert shape_of(config).layers == config.num_hidden_layers == len(shape_of(config).windows)


def test_nf4_by_hand():
    """4096 x 4096: 8 MiB of codes, 262,144 scales of a byte, 1,024 scales of those, an offset and two tables."""
    assert nf4_bytes(4096 * 4096) == 8 * 2**20 + 262_144 + 4 * 1024 + 4 * (1 + 16 + 256)


def plan_of(tmp_path: Path, model: str, *overrides: str, length: int = 2048) -> Plan:
    path = tmp_path / "mine.yaml"
    path.write_text(f"model: {model}\ndata: {{path: rows.jsonl}}\n")
    return Plan(load_recipe(path, overrides), alike(length, ""))


@pytest.mark.parametrize("model", ["Llama-3.1-8B", "Gemma-3-4B"])
def test_the_longest_row_and_the_largest_batch_are_the_last_that_fit(tmp_path, model):
    plan, here = plan_of(tmp_path, KNOWN[model], "train.per_device_train_batch_size=1"), of_size(12)
    length, batch = plan.longest_row(plan.choice, here), plan.largest_batch(plan.choice, here)
    assert length > 2048
    assert batch >= 1
    for fitting, more in (({"length": length}, {"length": length + 16}), ({"batch": batch}, {"batch": batch + 1})):
        assert plan.fits(replace(plan.choice, **fitting), here)
        assert not plan.fits(replace(plan.choice, **more), here)
    assert plan.longest_row(replace(plan.choice, profile_pass="frozen"), here) > length


def test_a_larger_card_a_smaller_rank_and_a_shorter_row_never_need_more(tmp_path):
    plan = plan_of(tmp_path, KNOWN["Qwen3-8B"])
    longest = [plan.longest_row(plan.choice, of_size(size)) for size in (8, 10, 12, 16, 24)]
    assert longest == sorted(longest)
    here = of_size(16)
    total = {rank: plan.parts(replace(plan.choice, rank=rank), here)["total"] for rank in (4, 16, 64)}
    assert total[4] < total[16] < total[64]
    by_length = [plan.parts(replace(plan.choice, length=length), here)["total"] for length in (256, 512, 1024, 2048)]
    assert by_length == sorted(by_length)
    for accumulation in (1, 4):
        parts = plan.parts(replace(plan.choice, accumulation=accumulation), here)
        lasting = sum(parts[name] for name in ("base", "unquantized", "adapter"))
        assert 0 < parts["attention"] < parts["layer"]
        assert parts["gradients_ahead"] == (parts["gradients"] if accumulation > 1 else 0)
        step = parts["gradients_ahead"] + parts["saved"] + max(parts["layer"], parts["head"])
        at_work = max(parts["optimizer"] + step, parts["scoring_alone"])
        assert parts["total"] == lasting + at_work + parts["spill"] + parts["context"]


TIGHT = {
    "a batch": ("Llama-3.1-8B", ["train.per_device_train_batch_size=8"], 12, ["per_device_train_batch_size", "accum"]),
    "no checkpointing": ("Qwen3-4B", ["train.gradient_checkpointing=false"], 8, ["train.gradient_checkpointing=true"]),
    "a whole base": ("Qwen3-4B", ["quantization=none"], 8, ["quantization=nf4"]),
    "long rows": ("Llama-3.1-8B", ["train.max_length=4096"], 8, ["embedding_on_host=true"]),
    "several": (
        "SmolLM2-1.7B",
        ["train.gradient_checkpointing=false", "train.per_device_train_batch_size=16", "quantization=none"],
        6,
        ["train.gradient_checkpointing=true"],
    ),
}


@pytest.mark.parametrize(("model", "given", "size", "told"), TIGHT.values(), ids=TIGHT)
def test_the_change_makes_the_recipe_fit(tmp_path, model, given, size, told):
    """The overrides are put on the recipe as the user would, and it is planned anew; with one of them less it fails."""
    length = 4096 if "max_length" in given[0] else 2048
    given = ["train.per_device_train_batch_size=1", *given]
    plan, here = plan_of(tmp_path, KNOWN[model], *given, length=length), of_size(size)
    assert not plan.fits(plan.choice, here)
    words, choice = plan.smallest_change(here)
    assert all(any(part in word for word in words) for part in told)
    again = plan_of(tmp_path, KNOWN[model], *given, *words, length=choice.length)
    assert again.choice == replace(choice, rank=None)
    assert again.fits(again.choice, here)
    for left_out in range(len(words)):
        fewer = words[:left_out] + words[left_out + 1 :]
        less = plan_of(tmp_path, KNOWN[model], *given, *fewer, length=length)
        batch_alone = "accumulation" in words[left_out]  # it keeps rows a step, and takes no memory
        assert batch_alone or not less.fits(less.choice, here)
    whole = plan.choice.batch * plan.choice.accumulation
    assert choice.batch * choice.accumulation == whole


def test_what_nothing_makes_fit(tmp_path):
    plan = plan_of(tmp_path, KNOWN["Llama-3.1-8B"])
    assert plan.smallest_change(of_size(4)) is None
    assert plan.longest_row(plan.choice, of_size(4)) == 0
    assert plan.smaller_model(of_size(6)) == ["model=Qwen/Qwen3-4B"]


def test_the_table_on_the_host_is_off_the_card(tmp_path):
    """Llama-3.1-8B's table: 128,256 rows of 4,096 in bf16; a tied one stays, and is refused as at loading."""
    here = of_size(8)
    plan = plan_of(tmp_path, KNOWN["Llama-3.1-8B"])
    hosted = plan_of(tmp_path, KNOWN["Llama-3.1-8B"], "embedding_on_host=true")
    both = [one.parts(one.choice, here) for one in (plan, hosted)]
    assert both[0]["unquantized"] - both[1]["unquantized"] == 128_256 * 4096 * 2
    assert both[0]["total"] - both[1]["total"] == 128_256 * 4096 * 2
    trained = plan_of(tmp_path, KNOWN["Llama-3.1-8B"], "lora.modules_to_save=[embed_tokens]", "train.max_length=512")
    assert not any("embedding_on_host" in word for values, words in trained._cheaper() for word in words)
    with pytest.raises(ModelError, match=r"embedding_on_host: .*qwen3.*tied.*Set embedding_on_host: false"):
        plan_of(tmp_path, KNOWN["Qwen3-4B"], "embedding_on_host=true")
    assert hosted.smaller_model(of_size(6)) == ["model=Qwen/Qwen3-4B", "embedding_on_host=false"]


def test_prefixes_are_part_of_the_plan(tmp_path, recipe):
    """Rows of 3,072 tokens, two thirds of them prefix: keys and values of 32 layers, 8 heads of 128, in bf16."""
    whole, asleep = (
        plan_of(tmp_path, KNOWN["Llama-3.1-8B"], "train.per_device_train_batch_size=1", *given, length=3072)
        for given in ([], ["train.profile_pass=frozen"])
    )
    full, frozen = (one.parts(one.choice, of_size(8)) for one in (whole, asleep))
    assert (full["prefixes"], full["reading"]) == (0, 0)
    assert frozen["prefixes"] == max(32 * 2 * 8 * 128 * 2 * 2048, 256 * 2**20)
    assert frozen["saved"] == pytest.approx(full["saved"] / 3, rel=0.01)
    # All that is awake may be response: a third of the row, whose whole is scored all the same.
    assert full["scoring"] > frozen["scoring"] > frozen["reading"] - frozen["prefixes"] > 0
    assert asleep.parts(replace(asleep.choice, batch=4), of_size(8))["prefixes"] == 4 * frozen["prefixes"]
    words = "train.profile_pass=frozen"
    assert [told for _, told in whole._frozen_profile()] == [[words]]
    assert list(asleep._frozen_profile()) == []
    alone = Plan(load_recipe(recipe(), ["train.train_on=counterfactual"]))
    assert (alone.rows.prefix, list(alone._frozen_profile())) == (0, [])


def test_rows_are_those_of_the_data(recipe):
    short = Plan(load_recipe(recipe(), ["train.max_length=300"])).rows
    assert 50 < short.length <= 300
    assert 0 < short.scored < short.length
    assert "the longest of 14 training rows" in short.source
    assert 0 < short.prefix < short.length < short.prefix + short.awake + 1
    assert Plan(load_recipe(recipe(), ["train.max_length=300", "train.profile_pass=frozen"])).rows == short
    without = Plan(load_recipe(recipe(), ["train.train_on=counterfactual"])).rows
    assert without.length < without.read == short.read
    packed, here = Plan(load_recipe(recipe(), ["train.packing=true", "train.max_length=900"])), of_size(8)
    loose = Plan(load_recipe(recipe()), Rows(900, 900, 900, ""))
    assert (packed.rows.length, loose.choice) == (900, packed.choice)
    end_to_end, apart = (one.parts(packed.choice, here)["saved_without"] for one in (packed, loose))
    assert end_to_end > apart  # attention's mask is over both rows at once
    gone = Plan(load_recipe(recipe(), ["data.path=gone.jsonl", "train.max_length=777"])).rows
    assert (gone.length, "gone.jsonl" in gone.source) == (777, True)


def test_the_command(recipe, figures, run, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # no weights are loaded
    path = recipe(text="train: {per_device_train_batch_size: 2}\n")
    told = figures("plan", path, "--gpu", "8GB", "--gpu", "T4", "--set", "lora.r=4", "--set", "dtype=auto")
    assert [one["card"] for one in told["cards"]] == ["8 GB", "T4"]
    assert [one["dtype"] for one in told["cards"]] == ["bfloat16", "float16"]
    assert all(one["fits"] for one in told["cards"])
    assert told["settings"]["rank"] == 4
    code, out, err = run("plan", path)
    assert code == 0, err
    assert [f"{size} GB" for size in COMMON_SIZES if f"{size} GB" not in out] == []
    rows = [line for line in out.splitlines() if re.search(r"\d+\.\d\d ", line) and "│" in line]
    assert len(rows) > len(COMMON_SIZES)
    assert all("estimate" in row for row in rows), "each row says that nobody measured it"
    model = KNOWN["Llama-3.1-8B"]
    given = [f"model={model}", "train.max_length=4096", "dtype=auto", "quantization=nf4"]
    code, out, err = run("plan", path, "--gpu", "8GB", *(word for one in given for word in ("--set", one)))
    assert code == 0, err
    [line] = re.findall(r"8 GB: fits \(\d\.\d\d GiB\) with\n  perce-lite train \S+mine.yaml (--set .*)", out)
    words = shlex.split(line)
    assert set(given) - {"train.max_length=4096"} < set(words), "what the user has set belongs to it"
    code, out, err = run("plan", path, "--gpu", "8GB", *words)
    assert "8 GB: fits" in out.splitlines()[-1], "and with exactly that it fits"
    code, out, err = run("plan", path, "--gpu", "RTX 9999")
    assert (code, out, "did you mean" in err, "Traceback" in err) == (2, "", True, False)


def test_what_a_trainer_refuses_is_refused_and_what_needs_a_card_is_not(recipe, run):
    path = recipe(text="train: {per_device_train_batch_size: 2}\n")
    for word in ("train.learning_rate=-1", "train.max_length=0", "train.estimator=bas", "train.profile_pass=frosen"):
        code, out, err = run("plan", path, "--gpu", "8GB", "--set", word)
        assert (code, out, word.partition("=")[0].removeprefix("train.") in err) == (2, "", True)
    for word in ("train.activation_offloading=true", "train.bf16=true", "train.tf32=true"):
        code, out, err = run("plan", path, "--gpu", "8GB", "--set", word)
        assert (code, "fits as it is" in out) == (0, True), err


def test_a_family_that_nobody_has_looked_into(recipe, run, tmp_path):
    folder = toys.toy_folder(tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "gpt_neox"}))
    code, out, err = run("plan", recipe(), "--set", f"model={folder}")
    assert (code, out, "gpt_neox is not known beforehand" in err) == (2, "", True)


def test_a_probe_needs_a_gpu(recipe, run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = run("plan", recipe(), "--probe")
    assert (code, out, "no CUDA device here" in err) == (2, "", True)
    assert run("plan", recipe(), "--probe", "--gpu", "8GB")[0] == 2


def test_a_probe_trains_the_longest_rows_for_one_step(recipe, figures, monkeypatch):
    """All but the GPU: what it would say of its memory is made up here."""
    steps = []
    original = PerCETrainer.training_step

    def watched(self, model, inputs, *args, **kwargs):
        steps.append(inputs["input_ids"].shape)
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(PerCETrainer, "training_step", watched)
    monkeypatch.setattr(probe, "present", lambda: of_size(8))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * GIB, 8 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 4 * GIB)
    for name, size in (("memory_allocated", 1), ("max_memory_allocated", 2)):
        monkeypatch.setattr(torch.cuda, name, lambda size=size: size * GIB)
    path = recipe(text="train: {per_device_train_batch_size: 2, output_dir: out}\n")
    plan = Plan(load_recipe(path))
    told = figures("plan", path, "--probe")
    assert steps == [(2, plan.rows.length)]
    measured = {name: pair[1] for name, pair in told["parts"].items()}
    assert list(measured.values()) == [GIB, 2 * GIB, 2 * GIB, GIB]
    parts = plan.parts(plan.choice, of_size(8))
    assert told["parts"]["base, as loaded"][0] == parts["base"] + parts["unquantized"]
    assert parts["scoring_alone"] < parts["scoring"] < parts["total"]
    assert told["parts"]["peak of the step"][0] < parts["total"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_a_probe_on_a_gpu(recipe, figures):
    told = figures("plan", recipe(), "--probe", "--set", "device=cuda", "--set", "quantization=nf4")
    estimate, measured = told["parts"]["base, as loaded"]
    assert measured == pytest.approx(estimate, rel=0.2)
    estimate, measured = told["parts"]["peak of the step"]
    assert measured < 1.3 * estimate


def test_the_table_of_the_readme_is_the_codes():
    """As `perce-lite plan recipes/rtx-8gb.yaml --set model=...` prints it where the tokenizer is not at hand."""
    recipe = Path(__file__).resolve().parents[1] / "recipes" / "rtx-8gb.yaml"
    for name in list(KNOWN)[:5]:
        plan = Plan(load_recipe(recipe, [f"model={KNOWN[name]}"]), alike(2048, ""))
        asleep = replace(plan.choice, profile_pass="frozen")
        both = [[plan.longest_row(one, of_size(size)) for one in (plan.choice, asleep)] for size in COMMON_SIZES]
        row = " | ".join(" / ".join(f"{one:,}" if one else "none" for one in cell) for cell in both)
        assert f"| {name} | {row} |" in README
