"""What the plan counts of weights, gradients and optimizer state is exact: real toys of every family, in bytes."""

import bitsandbytes as bnb
import pytest
import torch
from memory_fixtures import recipe_for, size_of, trainer_for, weights
from transformers import TrainerCallback

from perce_lite import PerCETrainer
from perce_lite.planning import parts as memory
from perce_lite.planning.shapes import FAMILIES


class Gradients(TrainerCallback):
    """Adds up the gradients ahead of the optimizer's step; afterwards they are gone."""

    def __init__(self, trainer: PerCETrainer) -> None:
        trainer.add_callback(self)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.bytes = size_of([one.grad for one in model.parameters() if one.grad is not None])


@pytest.mark.parametrize(("kind", "quantization"), [*((kind, "nf4") for kind in FAMILIES), ("llama", "none")])
def test_weights_gradients_and_optimizer_state_are_exact(tmp_path, kind, quantization):
    """In bytes of real tensors, each storage once: a toy is loaded, trained for a step, and looked at."""
    recipe = recipe_for(tmp_path, kind, {}, "r: 12", quantization)
    counted = weights(recipe, 4)
    trainer = trainer_for(recipe, optim="adamw_torch")
    seen = Gradients(trainer)
    trainer.train()
    model = trainer.model
    in_4_bit = [one for one in model.modules() if isinstance(one, bnb.nn.Linear4bit)]
    assert (len(in_4_bit) > 0) == (quantization == "nf4")
    constants = [one.weight.quant_state for one in in_4_bit]
    quantised = [
        tensor
        for layer, state in zip(in_4_bit, constants, strict=True)
        for tensor in (layer.weight, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    ]
    assert counted.base == size_of(quantised)
    weights_in_4_bit = {id(one.weight) for one in in_4_bit}
    whole = [one for one in model.parameters() if not one.requires_grad and id(one) not in weights_in_4_bit]
    assert counted.unquantized == size_of([*whole, *model.buffers()])
    trained = [one for one in model.parameters() if one.requires_grad]
    assert 4 * counted.elements(1) == size_of(trained) == seen.bytes
    assert sorted(counted.trained) == sorted(one.numel() for one in trained)
    assert memory.optimizer_bytes(counted.trained, "adamw_torch") == size_of(states(trainer))


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_state_of_8_bit_optimizers_is_exact(tmp_path, optim):
    """Ranks of which some matrices have fewer than 4,096 elements, and some no whole number of blocks."""
    recipe = recipe_for(tmp_path, "llama", {"hidden_size": 128, "intermediate_size": 264}, "r: 17")
    counted = weights(recipe, 4)
    assert min(counted.trained) < 4096 < max(counted.trained)
    assert any(one % 256 for one in counted.trained if one > 4096)
    trainer = trainer_for(recipe, optim=optim)
    trainer.train()
    assert memory.optimizer_bytes(counted.trained, optim) == size_of(states(trainer))


def states(trainer: PerCETrainer) -> list[torch.Tensor]:
    kept = trainer.optimizer.optimizer.state.values()
    return [one for state in kept for one in state.values() if isinstance(one, torch.Tensor)]
