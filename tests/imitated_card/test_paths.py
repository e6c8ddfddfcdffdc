"""Every path of training on an imitated card: no mismatch of devices or dtypes, the expected kernels, few waits."""

import math

import pytest
from imitated_card import imitated
from imitated_card.runs import toy_recipe, train

T4 = {"capability": (7, 5)}

PATHS = {
    "base": ("chatml", [], {}),
    "bootstrap": ("chatml", ["train.estimator=bootstrap"], {}),
    "fp16 with a scaler, table on the host": ("llama3", ["embedding_on_host=true"], T4),
    "frozen and packed": ("chatml", ["train.profile_pass=frozen", "train.packing=true"], {}),
    "offloaded": ("chatml", ["train.activation_offloading=true", "train.gradient_checkpointing=false"], {}),
    "without Triton": ("chatml", [], {"triton": False}),
    "unquantised, DoRA, sliding windows": ("gemma", ["quantization=none", "lora.use_dora=true"], {}),
}


@pytest.mark.parametrize("path", PATHS)
def test_a_path_trains(tmp_path, path):
    family, more, options = PATHS[path]
    recipe = toy_recipe(tmp_path, family, more)
    with imitated(**options) as card:
        losses = train(recipe)
    assert all(map(math.isfinite, losses.values()))
    print(losses, card.attention_kernels(), card.counts["synchronisations"])
