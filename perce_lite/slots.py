"""Many adapters in one batch: each target linear of one frozen base holds K adapters, and each row names its own.

A 4-bit base pays its de-quantisation once a forward, whatever the number of users in it. `attach` finds the targets as
peft does, so that an adapter comes out under PEFT's names; `Route.of` says, around a forward and its backward, which
slot each row of the batch belongs to.
"""

import copy
import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from perce_lite.adapters import CARD, versions
from perce_lite.card import model_card
from perce_lite.errors import AdapterError, ConfigError, NonFiniteLossError
from perce_lite.files import folder_written_aside, write_json, write_text
from perce_lite.models import fingerprint, keep_base_constant, sketch

BARE = -1
"""The slot of a row that sees the base alone."""

_ADAPTER = "default"  # peft's own name for a model's only adapter


class Route:
    """Which slot each row of the batch in flight belongs to; all layers of a model read the same one.

    size: rows of the batch, 0 for any number; None where no route is open, and then every row sees the bare base
    slots: (G,) the slots that take part, one a group of rows
    whole: whether these are all slots there are, in their order
    active: (N,) the rows that have a slot, group after group of N / G; None: all of them
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self._count, self._device = slots, device
        self._close()

    def _close(self) -> None:
        self.size: int | None = None
        self.slots: Tensor | None = None
        self.active: Tensor | None = None
        self.whole = False

    @contextmanager
    def of(self, rows: Sequence[int]) -> Iterator[None]:
        """Routes the rows of a batch, given the slot of each (`BARE` for the base alone).

        Open it before the forward and keep it open until the backward is done: gradient checkpointing runs the
        forward again. Rows of one slot that lie together, in equal number, share a product.
        """
        if self.size is not None:
            raise RuntimeError("A route is open already: its backward is not done")
        wrong = [slot for slot in rows if not BARE <= slot < self._count]
        if wrong:
            raise IndexError(f"There are slots 0 to {self._count - 1}, and {BARE} for the bare base; not {wrong[0]}")
        routed = [slot for slot in rows if slot != BARE]
        runs = [(slot, len(list(run))) for slot, run in itertools.groupby(routed)]
        together = len({slot for slot, _ in runs}) == len(runs) and len({length for _, length in runs}) == 1
        heads = [slot for slot, _ in runs] if together else routed
        self.size = len(rows)
        if routed:
            self.slots = torch.tensor(heads, device=self._device)
            self.whole = heads == list(range(self._count))
        if len(routed) < len(rows):
            places = [place for place, slot in enumerate(rows) if slot != BARE]
            self.active = torch.tensor(places, device=self._device, dtype=torch.long)
        try:
            yield
        finally:
            self._close()

    @contextmanager
    def bare(self) -> Iterator[None]:
        """Every row sees the base alone, whatever is routed around it: to read what an adapter sleeps through."""
        kept = self.size, self.slots, self.active, self.whole
        self._close()
        try:
            yield
        finally:
            self.size, self.slots, self.active, self.whole = kept

    @contextmanager
    def everything_to(self, slot: int) -> Iterator[None]:
        """Every row of every batch belongs to `slot`: to score with one adapter on."""
        if self.size is not None:
            raise RuntimeError("A route is open already: its backward is not done")
        self.size, self.slots = 0, torch.tensor([slot], device=self._device)
        try:
            yield
        finally:
            self._close()


class SlotLoRA(nn.Module):
    """A frozen linear (4-bit or not) with K adapters: `lora_A` (K, r, in), `lora_B` (K, out, r).

    The arithmetic is that of peft's LoRA layers: the products run in the autocast dtype, or in the adapters' own.
    """

    def __init__(self, layer: LoraLayer, route: Route, slots: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.base_layer: nn.Module = layer.get_base_layer()
        self.route = route
        self.rank: int = layer.r[_ADAPTER]
        self.alpha: int = layer.lora_alpha[_ADAPTER]
        self.scaling: float = layer.scaling[_ADAPTER]
        place = {"device": self.base_layer.weight.device, "dtype": dtype}
        self.lora_A = nn.Parameter(torch.zeros(slots, self.rank, layer.in_features, **place))
        self.lora_B = nn.Parameter(torch.zeros(slots, layer.out_features, self.rank, **place))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, T, in) to (B, T, out)."""
        y: Tensor = self.base_layer(x, *args, **kwargs)
        route = self.route
        if route.slots is None:
            return y
        if x.dim() < 3 or (route.size and x.shape[0] != route.size):
            raise ConfigError(
                [
                    f"lora: a target layer is given {tuple(x.shape)} where the batch has {route.size} rows: it sees "
                    "tokens without their rows, as the experts of a mixture do; take it out of target_modules"
                ]
            )
        taken = x if route.active is None else x[route.active]
        if not torch.is_autocast_enabled(x.device.type):
            taken = taken.to(self.lora_A.dtype)
        grouped = taken.reshape(len(route.slots), -1, x.shape[-1])  # (G, rows of a group * T, in)
        a = self.lora_A if route.whole else self.lora_A[route.slots]  # (G, r, in)
        b = self.lora_B if route.whole else self.lora_B[route.slots]  # (G, out, r)
        learned = torch.bmm(torch.bmm(grouped, a.mT), b.mT) * self.scaling
        learned = learned.reshape(*taken.shape[:-1], -1).to(y.dtype)
        return y + learned if route.active is None else y.index_add(0, route.active, learned)


@dataclass(frozen=True)
class SlotModel:
    """A base whose target linears hold `slots` adapters. `base` is used as before; without a route it is bare.

    config: the adapters' `LoraConfig` as peft would save it
    layers: the wrapped linears by their path in the base, in peft's order
    """

    base: PreTrainedModel
    config: LoraConfig
    layers: Mapping[str, SlotLoRA]
    route: Route
    slots: int

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """What the card of each adapter says of base and packages; the base is hashed once for all of them."""
        return {"base": {**sketch(self.base), "fingerprint": fingerprint(self.base)}, "versions": versions()}

    def fresh(self, seed: int) -> dict[str, Tensor]:
        """The adapter that `get_peft_model` makes after `set_seed(seed)`, by PEFT's names."""
        state = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for path, layer in self.layers.items():
                kept = layer.base_layer.weight.dtype
                like = {"dtype": kept if kept.is_floating_point else torch.float32}  # peft draws, then casts to it
                shape = (layer.lora_A.shape[2], layer.lora_B.shape[1])
                stand_in = nn.utils.skip_init(nn.Linear, *shape, bias=False, **like)  # draws nothing
                made = PeftLinear(stand_in, _ADAPTER, config=self.config, r=layer.rank, lora_alpha=layer.alpha)
                names = _names(path)
                state[names[0]] = made.lora_A[_ADAPTER].weight.detach().to(layer.lora_A.dtype)
                state[names[1]] = made.lora_B[_ADAPTER].weight.detach().to(layer.lora_B.dtype)
        return state

    @torch.no_grad()
    def load_slot(self, slot: int, state: Mapping[str, Tensor]) -> None:
        """Puts an adapter, by PEFT's names, into a slot; what the slot held is gone, its gradients too.

        Raises:
            AdapterError: names or shapes are not those of this model's adapters; the slot is as it was.
        """
        wanted = {name: parameter[slot] for name, parameter in self._named()}
        wrong = sorted(set(wanted) ^ set(state))
        wrong += [name for name in wanted if name in state and state[name].shape != wanted[name].shape]
        if wrong:
            raise AdapterError(
                f"This adapter does not fit: {len(wrong)} tensors are missing, unknown or of another shape, such "
                f"as {wrong[0]}. Its rank and target modules must be those of the other adapters in the batch."
            )
        for name, place in wanted.items():
            place.copy_(state[name])
        self.clear_gradients(slot)

    def read_slot(self, slot: int) -> dict[str, Tensor]:
        """A slot's adapter by PEFT's names, copied to the CPU."""
        return {name: parameter[slot].detach().cpu().clone() for name, parameter in self._named()}

    def parameters_of(self, slot: int) -> list[Tensor]:
        """A slot's tensors for an optimizer of its own: leaves that share their storage with the model's."""
        return [parameter.detach()[slot].requires_grad_() for _, parameter in self._named()]

    def hand_gradients(self, slot: int, parameters: Sequence[Tensor]) -> None:
        """Gives `parameters_of(slot)` the slot's part of the gradients; they share their storage too."""
        for mine, (_, parameter) in zip(parameters, self._named(), strict=True):
            assert parameter.grad is not None
            mine.grad = parameter.grad[slot]

    def clear_gradients(self, slot: int) -> None:
        """Sets a slot's part of the gradients to zero."""
        for _, parameter in self._named():
            if parameter.grad is not None:
                parameter.grad[slot].zero_()

    def detach(self) -> PreTrainedModel:
        """Takes the adapters off; the base is as it was before `attach`."""
        for path, layer in self.layers.items():
            self.base.set_submodule(path, layer.base_layer)
        return self.base

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for path, layer in self.layers.items():
            yield from zip(_names(path), (layer.lora_A, layer.lora_B), strict=True)


def _names(path: str) -> tuple[str, str]:
    """PEFT's names of a layer's two matrices."""
    return f"base_model.model.{path}.lora_A.weight", f"base_model.model.{path}.lora_B.weight"


def attach(base: PreTrainedModel, lora: LoraConfig, slots: int, dtype: torch.dtype = torch.float32) -> SlotModel:
    """Wraps the linears that `lora` targets, as peft finds them, for `slots` adapters; the base is frozen.

    Raises:
        ConfigError: every reason why this `LoraConfig` cannot be trained in slots; the base is as it was.
    """
    faults = _faults(lora, slots)
    if faults:
        raise ConfigError(faults)
    config = copy.deepcopy(lora)
    config.base_model_name_or_path = base.name_or_path or None
    wanted = {name: parameter.requires_grad for name, parameter in base.named_parameters()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns that no weights were drawn: `fresh` draws them
            inject_adapter_in_model(config, base, low_cpu_mem_usage=True)
        found = _injected(base)
        faults = _layer_faults(found)
    except (ValueError, TypeError, NotImplementedError) as error:
        found, faults = _injected(base), [f"lora: does not go with this model: {error}"]
    for path, layer in found.items():
        base.set_submodule(path, layer.get_base_layer())
    base.__dict__.pop("peft_config", None)
    if faults:
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(wanted[name])
        raise ConfigError(faults)
    keep_base_constant(base)
    base.requires_grad_(False)
    route = Route(slots, next(base.parameters()).device)
    layers = {path: SlotLoRA(layer, route, slots, dtype) for path, layer in found.items()}
    for path, wrapped in layers.items():
        base.set_submodule(path, wrapped)
    config.inference_mode = True  # as peft saves it
    return SlotModel(base, config, layers, route, slots)


def _injected(base: PreTrainedModel) -> dict[str, LoraLayer]:
    return {path: module for path, module in base.named_modules() if isinstance(module, LoraLayer)}


def _faults(lora: LoraConfig, slots: int) -> list[str]:
    """Why a `LoraConfig` cannot be trained in slots."""
    faults = [] if slots >= 1 else [f"slots: {slots} is not at least 1"]
    refused = {
        "lora_dropout": (lora.lora_dropout > 0, "users would share one stream of random numbers; use 0"),
        "use_dora": (lora.use_dora, "DoRA rescales the base's own weights; use false"),
        "bias": (lora.bias != "none", "it trains the base's own biases, which all users share; use 'none'"),
        "lora_bias": (lora.lora_bias, "slots hold A and B alone; use false"),
        "modules_to_save": (bool(lora.modules_to_save), "it trains layers of the base, which all users share"),
        "trainable_token_indices": (lora.trainable_token_indices is not None, "all users share the embedding"),
        "target_parameters": (bool(lora.target_parameters), "only linear layers have slots; use target_modules"),
        "layer_replication": (lora.layer_replication is not None, "it changes the base"),
        "init_lora_weights": (
            lora.init_lora_weights not in (True, "gaussian"),
            "slots start from true or 'gaussian': others look at the base's weights, or rewrite them",
        ),
    }
    return faults + [f"lora: {name} {getattr(lora, name)!r}: {why}" for name, (is_so, why) in refused.items() if is_so]


def _layer_faults(found: Mapping[str, LoraLayer]) -> list[str]:
    """What peft wrapped that is no plain LoRA on a linear layer."""
    odd = [path for path, layer in found.items() if _ADAPTER not in layer.lora_A]
    odd += [path for path in set(found) - set(odd) if not isinstance(found[path].lora_A[_ADAPTER], nn.Linear)]
    faults = [f"lora: target_modules: {path} is no linear layer, and only those have slots" for path in sorted(odd)]
    variants = [path for path, layer in found.items() if layer.lora_variant]
    if variants:
        faults.append(f"lora: {variants[0]} would be a variant of LoRA that slots do not know; plain LoRA only")
    return faults


def save_slot(model: SlotModel, state: Mapping[str, Tensor], folder: Path, about: dict[str, Any]) -> None:
    """Writes one user's adapter (of `read_slot`) to `folder`, as `adapters.save` does; `about` as there.

    Raises:
        DiskFullError: no space left; NonFiniteLossError: weights that are no numbers. What was there before stays.
    """
    if not all(torch.isfinite(tensor).all() for tensor in state.values()):
        raise NonFiniteLossError(f"The adapter's weights are not finite, so {folder} was not written. Lower the rate.")
    with folder_written_aside(folder) as aside:
        save_file(dict(state), aside / "adapter_model.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(str(aside))
        write_json(aside / CARD, {**about, **model.provenance})
        write_text(aside / "README.md", model_card(about))
