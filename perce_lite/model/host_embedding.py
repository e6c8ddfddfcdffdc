"""An embedding table in host memory: ids are copied to the host, the embeddings that were looked up come back.

A lookup reads one row of the table a token, so the GPU saves the table (1 GiB on an 8B model in bf16) for a copy of a
few MiB a forward.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from perce_lite.errors import ModelError


class HostEmbedding(nn.Module):
    """Embeddings (B, T, H) of ids (B, T) on the device of the ids, bit by bit those of `table`.

    The table is neither parameter nor submodule, so code that moves, casts, counts or saves weights does not find it.
    """

    table: nn.Embedding

    def __init__(self, table: nn.Embedding) -> None:
        """table: on the CPU, frozen"""
        super().__init__()
        self.__dict__["table"] = table

    @property
    def weight(self) -> Tensor:
        """(V, H), on the CPU."""
        return self.table.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        embeddings: Tensor = self.table(input_ids.to("cpu"))
        return embeddings.to(input_ids.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> "HostEmbedding":
        """peft copies modules that it trains fully (`modules_to_save`); this table cannot be trained.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            "embedding_on_host: the embedding table is kept out of reach on the host, so it cannot be trained or "
            "copied: leave embed_tokens out of lora.modules_to_save, or set embedding_on_host: false."
        )


def table_of(model: PreTrainedModel) -> str:
    """Path of the module of `model` that is its embedding table; shapes are enough.

    Raises:
        ModelError: the head is tied to the table, and the head computes on the GPU.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is table.weight:
        raise tied(model.config.model_type)
    return next(path for path, module in model.named_modules() if module is table)


def keep_on_host(model: PreTrainedModel) -> None:
    """Moves `model`'s input embeddings to host memory permanently, if they are not there; its log-probs stay the same.

    Raises:
        ModelError: the head is tied to the table, and the head computes on the GPU.
    """
    table = model.get_input_embeddings()
    if isinstance(table, HostEmbedding):
        return
    table_of(model)  # refuses a tied one
    was_on_gpu = table.weight.is_cuda
    model.set_input_embeddings(HostEmbedding(table.requires_grad_(False).to("cpu")))
    if was_on_gpu:
        torch.cuda.empty_cache()  # returns the table's memory to the GPU


def tied(kind: str) -> ModelError:
    """The error of a model of type `kind` whose head is its embedding table."""
    return ModelError(
        f"embedding_on_host: the output head of this {kind} model is its embedding table (tied), and the head computes "
        "on the GPU, so nothing would be saved. Set embedding_on_host: false."
    )


def tables_on_host(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Name and weights (V, H) of every table on the host, under the name of the parameter that it was."""
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, HostEmbedding)]
    return [(f"{name}.weight", module.weight) for name, module in modules]
