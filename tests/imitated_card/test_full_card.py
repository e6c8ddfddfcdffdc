"""A card whose memory is full, while the base is loaded and in training: one clear message that says what would fit."""

import bitsandbytes as bnb
import pytest
import torch

from imitated_card.runs import toy_recipe, train
from perce_lite.errors import BaseTooLargeError, GpuOutOfMemoryError, ModelError
from perce_lite.evaluation.bench.imitation.card import GIB
from perce_lite.evaluation.bench.imitation.libraries import imitated
from perce_lite.model.base import config_of, load_base
from perce_lite.model.full_gpu import gpu_is_full, on_meta, why_no_room
from perce_lite.model.host_embedding import table_of
from perce_lite.planning.oom_advice import explain_out_of_memory
from perce_lite.training.trainer import PerCETrainer

ALLOCATION = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 112.00 MiB. GPU 0 has a total of 7.66 GiB")
WORDS = {
    "torch's allocator": ALLOCATION,
    "the driver": torch.AcceleratorError("CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation'"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}


def taken(card, left: int) -> torch.Tensor:
    """Another program's memory: all but `left` bytes."""
    return torch.empty(card.memory - card.allocated - left, dtype=torch.uint8, device="cuda")


def test_the_base_is_too_large_by_its_shape(tmp_path):
    recipe = toy_recipe(tmp_path)
    with imitated(memory=2 * GIB) as card:
        others = taken(card, 50_000)
        with pytest.raises(BaseTooLargeError, match=r"its weights alone take 0\.00 GiB, and 0\.00 GiB .* are free"):
            load_base(recipe)
        assert card.allocated == -(-others.nbytes // 512) * 512
        assert card.counts["copies to the card"] == 0  # nothing was loaded


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_the_card_is_full_in_the_middle_of_loading(tmp_path, share):
    recipe = toy_recipe(tmp_path, more=["quantization=none"] if share < 0.9 else [])
    with imitated(memory=2 * GIB) as card:
        load_base(recipe)
        peak = card.peak
    with imitated(memory=2 * GIB) as card, pytest.MonkeyPatch.context() as patch:
        patch.setattr("perce_lite.model.base.why_no_room", lambda *shape: None)
        others = taken(card, int(share * peak))
        with pytest.raises(BaseTooLargeError, match=r"does not fit the GPU: CUDA out of memory\. Tried to allocate"):
            load_base(recipe)
        del others


def test_the_card_is_full_while_a_weight_is_quantised(tmp_path, monkeypatch):
    """transformers ends with `conversion` errors, which it writes to the log alone."""

    def full(*args, **kwargs):
        raise ALLOCATION

    recipe = toy_recipe(tmp_path)
    monkeypatch.setattr(bnb.functional, "quantize_4bit", full)
    with imitated(), pytest.raises(BaseTooLargeError, match=r"does not fit the GPU: .*CUDA out of memory"):
        load_base(recipe)
    monkeypatch.setattr(bnb.functional, "quantize_4bit", lambda *args, **kwargs: 1 / 0)
    with imitated(), pytest.raises(ModelError, match="holds no language model"):
        load_base(recipe)


@pytest.mark.parametrize("error", WORDS.values(), ids=WORDS)
def test_the_card_is_full_in_training_whatever_says_so(tmp_path, monkeypatch, error):
    def full(*args, **kwargs):
        raise error

    recipe = toy_recipe(tmp_path)
    monkeypatch.setattr(PerCETrainer, "compute_loss", full)
    kept = pytest.raises(GpuOutOfMemoryError, match=r"GPU out of memory: CUDA .*What was scored under the base is kept")
    with imitated(), kept, explain_out_of_memory(recipe, lambda: None):
        train(recipe)


def test_the_card_is_really_full_in_training(tmp_path):
    recipe = toy_recipe(tmp_path, more=["train.estimator=uniform"])
    full = pytest.raises(GpuOutOfMemoryError, match=r"CUDA out of memory\. .*No checkpoint had been written")
    with imitated(memory=2 * GIB) as card, full, explain_out_of_memory(recipe, lambda: None):
        others = taken(card, 2**20)  # enough for the base
        train(recipe)
    assert others.nbytes > GIB


def test_other_errors_are_not_taken_for_a_full_card():
    assert not gpu_is_full(RuntimeError("CUDA error: device-side assert triggered"))
    assert not gpu_is_full(ValueError("out of memory"))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_table_that_is_kept_on_the_host_never_takes_memory_of_the_card(tmp_path, quantization):
    peaks = {}
    for hosted in ("false", "true"):
        more = [f"quantization={quantization}", f"embedding_on_host={hosted}"]
        recipe = toy_recipe(tmp_path / hosted, "llama3", more)
        with imitated(memory=2 * GIB) as card:
            model = load_base(recipe).model
            table = model.get_input_embeddings().weight
            peaks[hosted] = card.peak
            assert table.device.type == ("cpu" if hosted == "true" else "cuda")
            assert {weight.device.type for name, weight in model.named_parameters() if "embed_tokens" not in name} == {
                "cuda"
            }
            assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    assert peaks["false"] - peaks["true"] == table.nbytes


def test_a_base_fits_where_its_table_stays_on_the_host(tmp_path):
    recipe = toy_recipe(tmp_path, "llama3", ["quantization=none", "embedding_on_host=true"])
    config = config_of(recipe)
    table = config.vocab_size * config.hidden_size * 4
    with imitated(memory=2 * GIB) as card:
        shapes = on_meta(config)
        whole = sum(weight.nbytes for weight in shapes.parameters())
        others = taken(card, whole - table + 4096)
        assert why_no_room(shapes, torch.float32, False) is not None
        assert why_no_room(shapes, torch.float32, False, table_of(shapes)) is None
        del others


def test_a_tied_table_is_refused_before_anything_is_loaded(tmp_path):
    recipe = toy_recipe(tmp_path, "chatml", ["embedding_on_host=true"])
    with imitated() as card, pytest.raises(ModelError, match=r"is its embedding table \(tied\)"):
        load_base(recipe)
    assert card.counts["copies to the card"] == 0
