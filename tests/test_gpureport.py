"""The GPU report, rehearsed on a toy shape on the CPU: every measurement runs, and says what it should."""

import re

import bitsandbytes as bnb
import pytest
import torch
import toys

from perce_lite.errors import BenchError
from perce_lite.evaluation.bench import gpumeasuring, gpureport
from perce_lite.evaluation.bench.gpureport import (
    GIB,
    HOST,
    ON_GPU,
    PARTS,
    SHAPE,
    gpu_report,
    judged,
    markdown,
    planned_parts,
)
from perce_lite.evaluation.bench.randombase import (
    TOY,
    byte_tokenizer,
    config_of_shape,
    elements,
    random_base,
    write_shape,
)
from perce_lite.model.base import load_base
from perce_lite.recipe import Recipe

pytest_plugins = ["cli_fixtures"]

LENGTH = 64


SUMMED = ("base", "unquantized", "adapter", "optimizer", "working")
"""Parts that add up to the peak of a step."""


@pytest.fixture(scope="module")
def report():
    """One report on the toy shape."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = gpu_report("toy", LENGTH, 1, 0, 1, planned=planned_parts)
    torch.set_num_threads(before)
    return found


def test_parts_of_memory_are_those_of_the_shape(report):
    width, wide, vocabulary, layers = 64, 128, TOY["vocab_size"], 2
    linear = {"q": (64, 64), "k": (64, 32), "v": (64, 32), "o": (64, 64)}
    linear |= {"gate": (width, wide), "up": (width, wide), "down": (wide, width)}
    on_gpu, on_host = report["memory"][ON_GPU], report["memory"][HOST]
    itemsize = 2 if report["settings"]["dtype"] == "bfloat16" else 4
    in_four_bit = layers * sum(one * other for one, other in linear.values()) // 2
    assert 1.0 < on_gpu["base"] / in_four_bit < 1.6  # a toy's tables of 256 numbers weigh as much as its constants
    assert on_gpu["adapter"] == layers * sum(32 * (one + other) for one, other in linear.values()) * 4
    assert on_gpu["gradients"] == on_gpu["adapter"]
    assert on_gpu["total"] >= sum(on_gpu[name] for name in SUMMED)
    assert 0 <= on_gpu["optimizer"] - 2 * on_gpu["adapter"] <= 4 * len(linear) * 2 * layers  # a step counter each
    norms = (2 * layers + 1) * width * itemsize
    buffers = 2 * 8 * 4  # rotary frequencies
    assert on_gpu["unquantized"] == 2 * vocabulary * width * itemsize + norms + buffers
    assert on_gpu["unquantized"] - on_host["unquantized"] == vocabulary * width * itemsize
    assert {name: on_gpu[name] for name in ("base", "adapter")} == {name: on_host[name] for name in ("base", "adapter")}


def test_the_plan_stands_beside_what_was_measured(report):
    planned, on_gpu = report["plan"], report["memory"][ON_GPU]
    assert all(planned[part] > 0 for part in PARTS)
    exact = ("base", "unquantized", "adapter", "gradients")
    assert {name: planned[name] for name in exact} == {name: on_gpu[name] for name in exact}
    assert planned["total"] >= sum(planned[name] for name in SUMMED)
    assert planned["working"] > planned["gradients"]
    assert planned["reserved"] > planned["total"]


def test_every_estimator_is_timed_beside_plain_sft(report):
    assert set(report["speed"]) == set(gpumeasuring.SPEED)
    assert all(one["tokens_per_second"] > 0 for one in report["speed"].values())
    assert report["speed"]["sft"]["time"]["median"] == 1
    [run] = report["runs"]
    hits = {name: one["store_hits"] for name, one in run.items() if name not in ("sft", "uniform", "bootstrap")}
    assert hits == {"base": 1.0, "mixed": 1.0, "base-cold": 0.0, "mixed-cold": 0.0}
    assert len({one["tokens"] for one in run.values()}) == 1


def test_slots_and_numerics(report):
    assert list(report["slots"]) == ["1", "4", "8"]
    assert all(one["tokens_per_second"] > 0 for one in report["slots"].values())
    half, brain = report["numerics"]["float16"], report["numerics"]["bfloat16"]
    assert 0 < half["mean"] < brain["mean"] < 0.05  # fp16 has three bits more
    assert half["mean"] <= half["max"]
    assert 0.999 < brain["cosine"] < half["cosine"] <= 1
    assert half["norm"] == pytest.approx(1, abs=0.01)


def test_both_measurements_of_memory_score(monkeypatch, tmp_path):
    trainers, make = [], gpumeasuring.make
    monkeypatch.setattr(gpumeasuring, "make", lambda *given: trainers.append(make(*given)) or trainers[-1])
    config = config_of_shape("toy")
    write_shape(config, tmp_path / "shape")
    place = gpumeasuring.Place(gpureport.recipe_of_report(tmp_path / "shape", LENGTH), tmp_path, 1, 0)
    base = random_base(config, torch.float32, torch.device("cpu"))
    for _ in range(2):
        gpumeasuring.memory(place, base, LENGTH)
    assert [one.store_hits for one in trainers] == [0, 0]
    assert not [name for name, _ in base.model.named_parameters() if "lora" in name]


def test_another_shape_than_the_bars_is_not_judged(report):
    assert [bar["met"] for bar in report["bars"]] == [None] * 4
    assert all("it is set for llama-3.1-8b" in bar["why"] for bar in report["bars"])


def test_the_page_holds_what_was_measured(report):
    page = markdown(report)
    for name, text in PARTS.items():
        if name != "reserved":
            [line] = [line for line in page.splitlines() if line.startswith(f"| {text} |")]
            assert f"{report['memory'][ON_GPU][name] / GIB:.4f} | {report['memory'][HOST][name] / GIB:.4f}" in line
    assert "| memory, GiB | table on the GPU | table on the host | plan |" in page
    [line] = [line for line in page.splitlines() if line.startswith("| peak |")]
    assert line.endswith(f" {report['plan']['total'] / GIB:.4f} |")
    for arm, one in report["speed"].items():
        assert f"| {arm} | {one['tokens_per_second']:.0f} |" in page
    assert re.findall(r"^\| ([148]) \|", page, re.M) == ["1", "4", "8"]
    assert "| float16 | 0." in page
    widths = [[line.count("|") for line in block.splitlines()] for block in page.split("\n\n") if block[:1] == "|"]
    assert len(widths) == 5
    assert all(len(set(one)) == 1 for one in widths)


def found_for_bars(gpu: float, host: float, base: float, mixed: float) -> dict:
    times = {"base": {"time": {"median": base}}, "mixed": {"time": {"median": mixed}}}
    return {"memory": {ON_GPU: {"total": gpu * GIB}, HOST: {"total": host * GIB}}, "speed": times}


def test_bars():
    bars = judged(found_for_bars(6.9, 6.1, 1.02, 1.03), True)
    assert [(bar["limit"], bar["met"]) for bar in bars] == [(7.0, True), (6.0, False), (1.02, True), (1.02, False)]
    failed = {"memory": {ON_GPU: {"out_of_memory": "x"}, HOST: {"refused": "y"}}, "speed": {"base": {}, "mixed": {}}}
    assert [(bar["met"], bar["why"]) for bar in judged(failed, True)] == [(None, "not measured")] * 4


def test_what_does_not_fit_is_told_and_the_rest_goes_on(report):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    def refused():
        raise BenchError("cannot")

    def broken():
        raise RuntimeError("shapes do not match")

    found = gpumeasuring.told(full)
    assert found == {"out_of_memory": "CUDA out of memory. Tried to allocate 2 GiB"}
    assert gpumeasuring.told(refused) == {"refused": "cannot"}
    with pytest.raises(RuntimeError, match="shapes"):
        gpumeasuring.told(broken)
    partly = {**report, "numerics": found, "slots": {"8": found}, "speed": {"sft": found}}
    page = markdown({**partly, "memory": {**report["memory"], HOST: gpumeasuring.told(refused)}, "plan": None})
    assert page.count("CUDA out of memory. Tried to allocate 2 GiB") == 3
    assert "table on the host: cannot" in page


def test_the_8b_needs_a_gpu(run, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, err = run("bench", "--gpu-report")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "error: --gpu-report: the shape llama-3.1-8b has 8.0 billion weights and needs a CUDA device" in err
    assert "`--shape toy`" in err
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_table_and_figures(run, report, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(gpureport, "gpu_report", lambda *words, **options: asked.append((words, options)) or report)
    code, out, err = run("bench", "--gpu-report", "--shape", "toy", "--lengths", "128", "--steps", "2")
    assert (code, asked) == (0, [(("toy", 128, 2, 1, 2, 3), {"planned": planned_parts})]), err
    page = (tmp_path / "runs" / "gpu-report.md").read_text("utf-8")
    assert page == markdown(report)
    assert page in out
    assert (tmp_path / "runs" / "gpu-report.json").is_file()
    assert run("bench", "--gpu-report", "--out", "mine.md")[0] == 0
    assert asked[1][0] == (SHAPE, 2048, 3, 1, 2, 3)
    assert {"mine.md", "mine.json"} <= {one.name for one in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--gpu-report", "--fleet"], "one of --fleet and --gpu-report"),
        (["--gpu-report", "--arms", "base"], "--arms has no part in --gpu-report"),
        (["--gpu-report", "x.yaml"], "RECIPE has no part in --gpu-report"),
        (["x.yaml", "--shape", "toy"], "--shape goes with --gpu-report"),
        (["--shape", "toy"], "--shape goes with --gpu-report"),
        ([], "give a recipe"),
        (["--gpu-report", "--lengths", "64,128"], "rows of one length"),
        (["--gpu-report", "--out", "table.json"], "the table is Markdown"),
        (["--gpu-report", "--shape", "nowhere"], "neither llama-3.1-8b nor toy, nor a folder"),
    ],
)
def test_what_does_not_go_together(run, words, told):
    code, out, err = run("bench", *words)
    assert (code, out, "Traceback" in err) == (2, "", False)
    assert told in re.sub(r"[\s│]+", " ", err)


def test_a_random_base_is_laid_out_as_a_loaded_one(tmp_path):
    """A folder with real weights, quantised as a recipe's base is; only the numbers may differ."""
    folder = toys.toy_folder(tmp_path / "toy", "llama3")
    settings = {"model": str(folder), "dtype": "float32", "device": "cpu", "data": {"path": "x"}}
    loaded = load_base(Recipe.model_validate(settings)).model
    made = random_base(config_of_shape(str(folder)), torch.float32, torch.device("cpu")).model

    def layout(model):
        weights = {name: (one.dtype, one.shape, one.device, type(one)) for name, one in model.named_parameters()}
        modules = {name: type(one) for name, one in model.named_modules()}
        return weights, modules, (model.is_loaded_in_4bit, model.is_quantized, str(model.quantization_method))

    assert layout(made) == layout(loaded)
    for (name, one), other in zip(loaded.named_buffers(), made.buffers(), strict=True):
        assert torch.equal(one, other), name
    for one, other in zip(loaded.modules(), made.modules(), strict=True):
        if isinstance(one, bnb.nn.Linear4bit):
            theirs, ours = one.weight.quant_state, other.weight.quant_state
            assert (ours.quant_type, ours.nested, ours.shape, ours.dtype) == (
                *(theirs.quant_type, theirs.nested, theirs.shape, theirs.dtype),
            )
            spread = bnb.functional.dequantize_4bit(other.weight, ours).std()
            assert spread == pytest.approx(0.02, rel=0.1)


def test_the_same_seed_makes_the_same_base():
    def weights(seed):
        made = random_base(config_of_shape("toy"), torch.float32, torch.device("cpu"), seed).model
        return torch.cat([one.flatten().float() for one in made.parameters()])

    before = torch.get_rng_state()
    assert torch.equal(weights(0), weights(0))
    assert not torch.equal(weights(0), weights(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_shape_of_the_8b_has_so_many_weights():
    assert elements(config_of_shape(SHAPE)) == 8_030_261_248


def test_a_word_has_as_many_tokens_as_letters():
    tokenizer = byte_tokenizer()
    assert len(tokenizer("ab cde f")["input_ids"]) == 6
    assert tokenizer.decode(tokenizer("ab cde f ü")["input_ids"]) == "ab cde f ü"
