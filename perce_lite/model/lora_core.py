"""A core: what a user with very few texts trains. The A and B of the adapter that they start from are frozen, and a
matrix C of r x r stands between them: W + s * B C A. C is the identity at first, so the user starts from that adapter.

What is saved is a plain LoRA: B C in the place of B.
"""

from collections.abc import Mapping

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from perce_lite.errors import ConfigError


class CoreB(nn.Module):
    """Stands in the place of peft's `lora_B`: `frozen` (out, r) is B, and `core` (r, r) is trained."""

    frozen: Tensor

    def __init__(self, b: Tensor) -> None:
        super().__init__()
        self.register_buffer("frozen", b.detach().clone())
        self.core = nn.Parameter(torch.eye(b.shape[1], dtype=b.dtype, device=b.device))

    @property
    def weight(self) -> Tensor:
        """B C (out, r): what peft merges."""
        return self.frozen @ self.core

    def forward(self, x: Tensor) -> Tensor:
        """(..., r) to (..., out)."""
        return nn.functional.linear(nn.functional.linear(x, self.core), self.frozen)


def add_cores(model: PeftModel) -> None:
    """Freezes the adapter on `model` as it is and gives each of its layers a core to train.

    Raises:
        ConfigError: every reason why there cannot be cores; the model is as it was.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}
    wrong = faults(layers)
    others = [name for name, one in model.named_parameters() if one.requires_grad and ".lora_" not in name]
    if others:
        wrong.append(f"lora: core_only trains cores alone, and {others[0]} would be trained too; leave it out of lora")
    if wrong:
        raise ConfigError(wrong)
    for layer in layers.values():
        for name, first in layer.lora_A.items():
            # A buffer, because peft sets requires_grad on every parameter of an active adapter, frozen or not.
            weight = first.weight.detach()
            del first.weight
            first.register_buffer("weight", weight)
            layer.lora_B[name] = CoreB(layer.lora_B[name].weight)


def faults(layers: Mapping[str, LoraLayer]) -> list[str]:
    """Layers that are no plain pair of matrices, so that nothing can stand between the two."""
    odd = [path for path, layer in layers.items() if layer.lora_variant or not layer.lora_A or not _linear(layer)]
    return [f"lora: core_only goes with plain LoRA on linear layers alone, and {odd[0]} is not that"] if odd else []


def _linear(layer: LoraLayer) -> bool:
    matrices = (*layer.lora_A.values(), *layer.lora_B.values())
    return all(type(one) is nn.Linear and one.bias is None for one in matrices)


def folded(b: Tensor, core: Tensor) -> Tensor:
    """B C on the CPU, in B's dtype; computed in float64, so that trainer and slots save the same."""
    return (b.cpu().double() @ core.cpu().double()).to(b.dtype)


def plain_state(model: PeftModel) -> dict[str, Tensor] | None:
    """The state of `model` with every core folded into its B, as peft would name it; None where there is no core."""
    cored = {path: module for path, module in model.named_modules() if isinstance(module, CoreB)}
    if not cored:
        return None
    state: dict[str, Tensor] = model.state_dict()
    for path, module in cored.items():
        del state[f"{path}.frozen"], state[f"{path}.core"]
        state[f"{path}.weight"] = folded(module.frozen, module.core.detach())
    return state
