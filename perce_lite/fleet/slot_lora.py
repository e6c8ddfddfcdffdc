"""Batched multi-LoRA: each target linear of one frozen base holds K adapters, and each row of a batch names its own.

A 4-bit base pays its de-quantisation once a forward, whatever the number of users in it. `attach` finds the targets as
peft does, so that an adapter comes out under PEFT's names; `Route.of` says, around a forward and its backward, which
slot each row of the batch belongs to. With cores (see `model.lora_core`) a slot trains an r x r matrix alone, and
slots that start from the same adapter share its A and B.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from perce_lite.errors import AdapterError, ConfigError
from perce_lite.files import folder_written_aside
from perce_lite.fleet.slot_routing import Route
from perce_lite.model.adapter_files import PLAIN, Storage
from perce_lite.model.adapters import require_finite, versions, write_about, write_cored, write_plain
from perce_lite.model.compat import LoraLayer, keep_base_constant
from perce_lite.model.compat import LoraLinear as PeftLinear
from perce_lite.model.fingerprint import fingerprint, sketch
from perce_lite.model.lora_core import Cored

_ADAPTER = "default"  # peft's own name for a model's only adapter


class SlotLoRA(nn.Module):
    """A frozen linear (4-bit or not) with K adapters: `lora_A` (K, r, in), `lora_B` (K, out, r).

    With cores `lora_core` (K, r, r) is trained; `lora_A` and `lora_B` are frozen, one a parent and not a slot.
    The arithmetic is that of peft's LoRA layers: the products run in the autocast dtype, or in the adapters' own.
    """

    lora_A: Tensor
    lora_B: Tensor
    lora_core: nn.Parameter | None

    def __init__(self, layer: LoraLayer, route: Route, slots: int, dtype: torch.dtype, core: bool) -> None:
        super().__init__()
        self.base_layer: nn.Module = layer.get_base_layer()
        self.route = route
        self.rank: int = layer.r[_ADAPTER]
        self.alpha: int = layer.lora_alpha[_ADAPTER]
        self.scaling: float = layer.scaling[_ADAPTER]
        place = {"device": self.base_layer.weight.device, "dtype": dtype}
        held = 0 if core else slots
        a = torch.zeros(held, self.rank, layer.in_features, **place)
        b = torch.zeros(held, layer.out_features, self.rank, **place)
        if core:
            self.register_buffer("lora_A", a, persistent=False)
            self.register_buffer("lora_B", b, persistent=False)
            self.lora_core = nn.Parameter(torch.zeros(slots, self.rank, self.rank, **place))
        else:
            self.lora_A, self.lora_B, self.lora_core = nn.Parameter(a), nn.Parameter(b), None

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
        autocast = torch.is_autocast_enabled(x.device.type)
        taken = route.rows_of(x, torch.get_autocast_dtype(x.device.type) if autocast else self.lora_A.dtype)
        grouped = taken.reshape(len(route.slots), -1, x.shape[-1])  # (G, rows of a group * T, in)
        learned = self._learned(grouped) * self.scaling
        learned = learned.reshape(*taken.shape[:-1], -1).to(y.dtype)
        return y + learned if route.active is None else y.index_add(0, route.active, learned)

    def _learned(self, x: Tensor) -> Tensor:
        """(G, n, in) to (G, n, out), each group with its slot's adapter."""
        route = self.route
        if self.lora_core is None:
            a = self.lora_A if route.all_slots else self.lora_A[route.slots]  # (G, r, in)
            b = self.lora_B if route.all_slots else self.lora_B[route.slots]  # (G, out, r)
            return torch.bmm(torch.bmm(x, a.mT), b.mT)
        core = self.lora_core if route.all_slots else self.lora_core[route.slots]  # (G, r, r)
        shared = len(self.lora_A) == 1
        a = self.lora_A if shared else self.lora_A[route.parents]  # (1 or G, r, in)
        b = self.lora_B if shared else self.lora_B[route.parents]  # (1 or G, out, r)
        return x @ a.mT @ core.mT @ b.mT

    def set_parent(self, place: int, a: Tensor, b: Tensor) -> None:
        """Stores a parent's A (r, in) and B (out, r) at `place`, at most one behind the last."""
        for name, matrix in (("lora_A", a), ("lora_B", b)):
            held: Tensor = self.get_buffer(name)
            new = matrix.to(held)[None]
            setattr(self, name, torch.cat([held[:place], new, held[place + 1 :]]))


@dataclass(frozen=True)
class SlotModel:
    """A base whose target linears hold `slots` adapters. `base` is used as before; without a route it is bare.

    config: the adapters' `LoraConfig` as peft would save it
    layers: the wrapped linears by their path in the base, in peft's order
    parents: with cores, the adapters whose A and B are held, by PEFT's names
    """

    base: PreTrainedModel
    config: LoraConfig
    layers: Mapping[str, SlotLoRA]
    route: Route
    slots: int
    core: bool = False
    parents: list[Mapping[str, Tensor]] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        """How many numbers a slot trains."""
        return sum(parameter[0].numel() for _, parameter in self._trained())

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Base and package versions for the metadata of each adapter; the base is hashed once for all of them."""
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
                layer_of_peft = PeftLinear(stand_in, _ADAPTER, config=self.config, r=layer.rank, lora_alpha=layer.alpha)
                names = _names(path)
                state[names[0]] = layer_of_peft.lora_A[_ADAPTER].weight.detach().to(layer.lora_A.dtype)
                state[names[1]] = layer_of_peft.lora_B[_ADAPTER].weight.detach().to(layer.lora_B.dtype)
        return state

    @torch.no_grad()
    def load_slot(self, slot: int, state: Mapping[str, Tensor]) -> None:
        """Puts an adapter, by PEFT's names, into a slot; what the slot held is gone, its gradients too.

        With cores it is frozen, shared with the slots that were given the very same mapping, and the core is new.

        Raises:
            AdapterError: names or shapes are not those of this model's adapters; the slot is as it was.
        """
        shapes = self._shapes()
        wrong = sorted(set(shapes) ^ set(state))
        wrong += [name for name in shapes if name in state and state[name].shape != shapes[name]]
        if wrong:
            raise AdapterError(
                f"This adapter does not fit: {len(wrong)} tensors are missing, unknown or of another shape, such "
                f"as {wrong[0]}. Its rank and target modules must be those of the other adapters in the batch."
            )
        if self.core:
            self.route.homes[slot] = self._place_of(slot, state)
        for name, parameter in self._trained():
            if self.core:
                torch.nn.init.eye_(parameter[slot])
            else:
                parameter[slot].copy_(state[name])
        self.clear_gradients(slot)

    def _place_of(self, slot: int, parent: Mapping[str, Tensor]) -> int:
        """The place of `parent`, stored first if it is new: in a place that no other slot uses, or a new one."""
        for place, held in enumerate(self.parents):
            if held is parent:
                return place
        taken = {home for other, home in enumerate(self.route.homes) if other != slot}
        place = next((place for place in range(len(self.parents)) if place not in taken), len(self.parents))
        self.parents[place : place + 1] = [parent]
        for path, layer in self.layers.items():
            layer.set_parent(place, *(parent[name] for name in _names(path)))
        return place

    def read_slot(self, slot: int) -> dict[str, Tensor]:
        """A slot's adapter by PEFT's names, copied to the CPU; a core is folded into B."""
        cored = self.read_core(slot)
        if cored is not None:
            return cored.plain()
        return {name: parameter.detach()[slot].cpu().clone() for name, parameter in self._trained()}

    def read_core(self, slot: int) -> Cored | None:
        """A slot's core, copied to the CPU, with the parent that the slot was given; None where slots have none."""
        if not self.core:
            return None
        cores = {_prefixed(path): parameter.detach()[slot].cpu().clone() for path, parameter in self._trained()}
        return Cored(self.parents[self.route.homes[slot]], cores)

    def parameters_of(self, slot: int) -> list[Tensor]:
        """A slot's tensors for an optimizer of its own: leaves that share their storage with the model's."""
        return [parameter.detach()[slot].requires_grad_() for _, parameter in self._trained()]

    def hand_gradients(self, slot: int, parameters: Sequence[Tensor]) -> None:
        """Gives `parameters_of(slot)` the slot's part of the gradients; they share their storage too."""
        for own, (_, parameter) in zip(parameters, self._trained(), strict=True):
            assert parameter.grad is not None
            own.grad = parameter.grad[slot]

    def gradients_of(self, slot: int) -> list[Tensor]:
        """A slot's part of the gradients, copied to the CPU; there must have been a backward."""
        gradients = [parameter.grad for _, parameter in self._trained()]
        return [gradient[slot].cpu().clone() for gradient in gradients if gradient is not None]

    @torch.no_grad()
    def add_gradients(self, slot: int, gradients: Sequence[Tensor]) -> None:
        """Adds what `gradients_of` gave, before a process was stopped, to a slot's part; nothing where it is empty."""
        for (_, parameter), gradient in zip(self._trained(), gradients, strict=bool(gradients)):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad[slot] += gradient.to(parameter.grad)

    def drop_gradients(self) -> None:
        """Sets all gradients to None. Call it when no slot is in the middle of an accumulation window."""
        for _, parameter in self._trained():
            parameter.grad = None

    def clear_gradients(self, slot: int) -> None:
        """Sets a slot's part of the gradients to zero."""
        for _, parameter in self._trained():
            if parameter.grad is not None:
                parameter.grad[slot].zero_()

    def detach(self) -> PreTrainedModel:
        """Takes the adapters off; the base is as it was before `attach`."""
        for path, layer in self.layers.items():
            self.base.set_submodule(path, layer.base_layer)
        return self.base

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Trained parameters, all slots stacked: A and B by PEFT's names, or cores by their layer's path."""
        for path, layer in self.layers.items():
            if layer.lora_core is not None:
                yield path, layer.lora_core
            else:
                for name, matrix in zip(_names(path), (layer.lora_A, layer.lora_B), strict=True):
                    assert isinstance(matrix, nn.Parameter)
                    yield name, matrix

    def _shapes(self) -> dict[str, torch.Size]:
        """Of a whole adapter's tensors, by PEFT's names."""
        return {
            name: matrix.shape[1:]
            for path, layer in self.layers.items()
            for name, matrix in zip(_names(path), (layer.lora_A, layer.lora_B), strict=True)
        }


def _names(path: str) -> tuple[str, str]:
    """PEFT's names of a layer's two matrices."""
    return f"{_prefixed(path)}.lora_A.weight", f"{_prefixed(path)}.lora_B.weight"


def _prefixed(path: str) -> str:
    """A layer's part of PEFT's names."""
    return f"base_model.model.{path}"


def attach(
    base: PreTrainedModel, lora: LoraConfig, slots: int, dtype: torch.dtype = torch.float32, core: bool = False
) -> SlotModel:
    """Wraps the linears that `lora` targets, as peft finds them, for `slots` adapters; the base is frozen.

    core: what `load_slot` gives a slot is frozen, and the slot trains a core

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
        targets = _injected(base)
        faults = _layer_faults(targets)
    except (ValueError, TypeError, NotImplementedError) as error:
        targets, faults = _injected(base), [f"lora: does not go with this model: {error}"]
    for path, layer in targets.items():
        base.set_submodule(path, layer.get_base_layer())
    base.__dict__.pop("peft_config", None)
    if faults:
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(wanted[name])
        raise ConfigError(faults)
    keep_base_constant(base)
    base.requires_grad_(False)
    route = Route(slots, next(base.parameters()).device)
    layers = {path: SlotLoRA(layer, route, slots, dtype, core) for path, layer in targets.items()}
    for path, wrapped in layers.items():
        base.set_submodule(path, wrapped)
    config.inference_mode = True  # as peft saves it
    return SlotModel(base, config, layers, route, slots, core)


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


def _layer_faults(targets: Mapping[str, LoraLayer]) -> list[str]:
    """What peft wrapped that is no plain LoRA on a linear layer."""
    odd = [path for path, layer in targets.items() if _ADAPTER not in layer.lora_A]
    odd += [path for path in set(targets) - set(odd) if not isinstance(targets[path].lora_A[_ADAPTER], nn.Linear)]
    faults = [f"lora: target_modules: {path} is no linear layer, and only those have slots" for path in sorted(odd)]
    variants = [path for path, layer in targets.items() if layer.lora_variant]
    if variants:
        faults.append(f"lora: {variants[0]} would be a variant of LoRA that slots do not know; plain LoRA only")
    return faults


def save_slot(
    model: SlotModel,
    adapter: Mapping[str, Tensor] | Cored,
    folder: Path,
    about: dict[str, Any],
    storage: Storage = PLAIN,
) -> None:
    """Writes one user's adapter (of `read_slot` or `read_core`) to `folder`, as `adapters.save` does.

    about: as there; storage: how it is stored

    Raises:
        DiskFullError: no space left; NonFiniteLossError: weights that are no numbers. What was there before stays.
    """
    require_finite((adapter.cores if isinstance(adapter, Cored) else adapter).values(), folder)
    with folder_written_aside(folder) as aside:
        origin = dict(model.provenance)
        if isinstance(adapter, Cored):
            origin |= write_cored(aside, folder, adapter, model.config, storage)
        else:
            write_plain(aside, adapter, model.config, storage)
        write_about(aside, {**about, **origin})
