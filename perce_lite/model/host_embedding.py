"""An embedding table that stays in the host's memory: ids go there, what was looked up comes back.

A lookup reads as many rows as there are tokens, so a card gains the whole table (1 GiB on an 8B model in bf16) for a
copy of some MiB a forward.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from perce_lite.errors import ModelError


class HostEmbedding(nn.Module):
    """Gives for ids (B, T) on any device what `table` gives, (B, T, H) on that device, bit by bit the same.

    The table is no parameter and no submodule: nothing that moves, casts, counts or saves a model's weights finds it.
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
        looked_up: Tensor = self.table(input_ids.to("cpu"))
        return looked_up.to(input_ids.device)

    def __deepcopy__(self, memo: dict[int, Any]) -> "HostEmbedding":
        """peft copies what it is to train as a whole (`modules_to_save`); a table that nothing finds cannot be trained.

        Raises:
            ModelError: always.
        """
        raise ModelError(
            "embedding_on_host: the embedding table is kept out of reach on the host, so it cannot be trained or "
            "copied: leave embed_tokens out of lora.modules_to_save, or set embedding_on_host: false."
        )


def keep_on_host(model: PreTrainedModel) -> None:
    """Moves `model`'s input embeddings to the host's memory, for good; its log-probs stay the same.

    Raises:
        ModelError: the head is tied to the table, and the head computes on the card.
    """
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(table, HostEmbedding):
        return
    if head is not None and head.weight is table.weight:
        raise tied(model.config.model_type)
    model.set_input_embeddings(HostEmbedding(table.requires_grad_(False).to("cpu")))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what the table took goes back to the card


def tied(kind: str) -> ModelError:
    """The error of a model of type `kind` whose head is its embedding table."""
    return ModelError(
        f"embedding_on_host: the output head of this {kind} model is its embedding table (tied), and the head computes "
        "on the card, so nothing would be saved. Set embedding_on_host: false."
    )


def tables_on_host(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Name and weights (V, H) of every table that is kept on the host, named as the parameter that it was."""
    found = [(name, one) for name, one in model.named_modules() if isinstance(one, HostEmbedding)]
    return [(f"{name}.weight", one.weight) for name, one in found]
