"""A core: what a user with very few texts trains, a LoRA-XS style r x r matrix (arXiv 2405.17604).

A and B of a parent adapter are frozen, and a matrix C of r x r stands between them: W + s * B C A. C is the identity at
first, so training starts at the parent. For other programs it becomes a plain LoRA: B C in the place of B.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor, nn

from perce_lite.errors import ConfigError
from perce_lite.model.compat import LoraLayer, is_lora_weight, lora_layers


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
    layers = lora_layers(model)
    reasons = faults(layers)
    parameters = model.named_parameters()
    others = [name for name, weight in parameters if weight.requires_grad and not is_lora_weight(name)]
    if others:
        reasons.append(
            f"lora: core_only trains cores alone, and {others[0]} would be trained too; leave it out of lora"
        )
    if reasons:
        raise ConfigError(reasons)
    for layer in layers.values():
        for name, a in layer.lora_A.items():
            # A buffer, because peft sets requires_grad on every parameter of an active adapter, frozen or not.
            weight = a.weight.detach()
            del a.weight
            a.register_buffer("weight", weight)
            layer.lora_B[name] = CoreB(layer.lora_B[name].weight)


def faults(layers: Mapping[str, LoraLayer]) -> list[str]:
    """Why there cannot be cores: a layer is no plain pair of matrices, so that no core can stand between the two."""
    odd = [path for path, layer in layers.items() if layer.lora_variant or not layer.lora_A or not _linear(layer)]
    return [f"lora: core_only goes with plain LoRA on linear layers alone, and {odd[0]} is not that"] if odd else []


def _linear(layer: LoraLayer) -> bool:
    matrices = (*layer.lora_A.values(), *layer.lora_B.values())
    return all(type(matrix) is nn.Linear and matrix.bias is None for matrix in matrices)


def folded(b: Tensor, core: Tensor) -> Tensor:
    """B C (out, r) on the CPU, in B's dtype; computed in float64, so that trainer and slots save the same."""
    return (b.cpu().double() @ core.cpu().double()).to(b.dtype)


@dataclass(frozen=True)
class Cored:
    """An adapter that is a core in each layer of its parent.

    parent: A (r, in) and B (out, r), by PEFT's names; cores: C (r, r), by the layer's part of these names
    """

    parent: Mapping[str, Tensor]
    cores: Mapping[str, Tensor]

    def plain(self) -> dict[str, Tensor]:
        """The plain LoRA that it makes, on the CPU: A as it is, B C in the place of B."""
        return {
            name: tensor.detach().cpu() if matrix == "lora_A" else folded(tensor.detach(), self.cores[path])
            for name, tensor in self.parent.items()
            for path, matrix in [name.removesuffix(".weight").rsplit(".", 1)]
        }


def cored_of(model: PeftModel) -> Cored | None:
    """The cores of `model` and what they stand in; None if there is no core."""
    parent, cores = {}, {}
    for path, module in model.named_modules():
        if isinstance(module, CoreB):
            layer, _, name = path.rpartition(".lora_B.")
            parent[f"{layer}.lora_A.weight"] = model.get_submodule(f"{layer}.lora_A.{name}").get_buffer("weight")
            parent[f"{layer}.lora_B.weight"] = module.frozen
            cores[layer] = module.core.detach()
    return Cored(parent, cores) if cores else None
