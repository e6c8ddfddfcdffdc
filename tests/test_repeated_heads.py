"""Attention whose keys and values are repeated for every head: the same values, by a fused kernel on every GPU."""

import pytest
import torch
import toys
from imitated_card.runs import toy_recipe

from perce_lite.evaluation.bench.imitation.libraries import imitated
from perce_lite.model import repeated_heads
from perce_lite.model.base import load_base
from perce_lite.model.prefix_cache import plain_implementation
from perce_lite.model.repeated_heads import repeat_heads_where_needed

IDS = torch.arange(24).view(2, 12)


@pytest.mark.parametrize("family", ["chatml", "qwen3"])
@pytest.mark.parametrize("masked", [False, True])
def test_hidden_states_are_those_of_sdpa(family, masked):
    model = toys.toy_model(family, toys.VOCAB_SIZE)
    mask = torch.ones_like(IDS)
    mask[1, :4] = 0  # on the left, so that it is needed
    inputs = {"input_ids": IDS, "attention_mask": mask} if masked else {"input_ids": IDS}
    plain = model.base_model(**inputs).last_hidden_state
    model.set_attn_implementation(repeated_heads.NAME)
    repeated = model.base_model(**inputs).last_hidden_state
    torch.testing.assert_close(repeated[mask.bool()], plain[mask.bool()], rtol=1e-5, atol=1e-6)
    assert plain_implementation(model) == "sdpa"  # so that the store finds what was scored before


@pytest.mark.parametrize(
    ("capability", "dtype", "name"),
    [((7, 5), "auto", repeated_heads.NAME), ((8, 6), "float32", repeated_heads.NAME), ((8, 6), "auto", "sdpa")],
)
def test_a_base_repeats_them_where_the_gpu_takes_no_shared_ones(tmp_path, capability, dtype, name):
    recipe = toy_recipe(tmp_path, more=[f"dtype={dtype}"])
    with imitated(capability=capability) as card, torch.no_grad():
        base = load_base(recipe).model
        assert base.config._attn_implementation == name
        base.base_model(input_ids=IDS.to("cuda"))
        assert "plain mathematics" not in card.attention_kernels()


def test_a_cpu_shares_them():
    model = toys.toy_model("chatml", toys.VOCAB_SIZE)
    repeat_heads_where_needed(model, None)
    assert model.config._attn_implementation == "sdpa"
