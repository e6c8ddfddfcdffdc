"""Adapters in memory over one base: loaded when they are asked for, dropped by least use within a limit."""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from perce_lite.files import digest
from perce_lite.model import adapter_files, adapters
from perce_lite.model.adapter_files import recipe_of
from perce_lite.model.answering import Answerer
from perce_lite.model.base import load_base
from perce_lite.model.generate import loaded_on


class Pool:
    """Adapters on the base of `reference`, an adapter's metadata.

    limit: bytes of all adapters in memory together; one that is larger than that is there alone
    loads: how often an adapter was read from disk

    Raises:
        ModelError, DeviceError: the base cannot be loaded.
    """

    def __init__(self, reference: dict[str, Any], limit: int) -> None:
        self._reference, self._base = reference, load_base(recipe_of(reference))
        self._there: OrderedDict[str, tuple[Answerer, int]] = OrderedDict()  # by name, the last used at the end
        self._on(self._base.model)
        self.limit, self.loads = limit, 0

    def _on(self, model: torch.nn.Module) -> None:
        """Asks `model` from now on: the base, or peft's wrapper around it, which alone can switch adapters off."""
        self._model = model
        self._bare = self._last = Answerer(loaded_on(model, self._base.tokenizer, self._reference))

    @property
    def bytes(self) -> int:
        """Of the adapters in memory."""
        return sum(size for _, size in self._there.values())

    @property
    def adapters(self) -> int:
        """How many are in memory."""
        return len(self._there)

    def take(self, metadata: dict[str, Any] | None) -> Answerer:
        """What answers with the adapter of this metadata, switched on; None: with the base.

        Raises:
            AdapterError: the adapter is gone, or of another base.
        """
        answerer = self._bare if metadata is None else self._adapter(metadata)
        if answerer is not self._last:
            self._last.forget()
            self._last = answerer
        return answerer

    def _adapter(self, metadata: dict[str, Any]) -> Answerer:
        name = digest([metadata["folder"], metadata["run"], metadata["recipe"]])
        if name in self._there:
            self._there.move_to_end(name)
            assert isinstance(self._model, PeftModel)
            self._model.set_adapter(name, inference_mode=True)
        else:
            folder = Path(metadata["folder"])
            self._make_room(adapter_files.weights_bytes(folder))
            self._load(name, folder, metadata)
        return self._there[name][0]

    def _load(self, name: str, folder: Path, metadata: dict[str, Any]) -> None:
        try:
            if isinstance(self._model, PeftModel):
                adapters.load_beside(self._model, folder, name)
            else:
                self._on(adapters.load(self._base.model, folder, name))
        except BaseException:
            self.drop_all()  # half of an adapter may be on the base
            raise
        answerer = Answerer(loaded_on(self._model, self._base.tokenizer, metadata))
        self._there[name] = answerer, adapter_files.weights_bytes(folder)
        self.loads += 1

    def _make_room(self, size: int) -> None:
        """Drops the least used until `size` bytes more are within the limit, or none is left."""
        while len(self._there) > 1 and self.bytes + size > self.limit:
            name, _ = self._there.popitem(last=False)
            assert isinstance(self._model, PeftModel)
            self._model.delete_adapter(name)
        if self.bytes + size > self.limit:
            self.drop_all()

    def drop_all(self) -> None:
        """Drops every adapter; the next one is read from disk."""
        self._there.clear()
        adapters.strip(self._base.model)
        self._on(self._base.model)
