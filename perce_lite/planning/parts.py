"""Memory by part, from a model's shape alone: what is held, what a step saves for its backward pass, what works in it.

Weights, gradients and optimizer state are counted from the model itself on the meta device, so exactly. What is saved
follows from the operations: which of its inputs or results each keeps for the backward pass (RMS norm: its input in
float32; SiLU and products: their inputs; torch's fused attention: query, key, value, result and one number a head;
LoRA: its input and what its first matrix gives). Tests compare all of it with real toy models.
"""

import math
import re
from dataclasses import dataclass, field
from typing import NamedTuple

from peft import LoraConfig
from torch import nn
from transformers import PretrainedConfig

from perce_lite.model.base import with_adapter
from perce_lite.model.compat import TOKEN_CHUNK_SIZE, VOCABULARY_CHUNK_SIZE, LoraLayer
from perce_lite.model.footprint import on_meta
from perce_lite.planning.shapes import Shape
from perce_lite.recipe import Recipe, lora_config

FLOAT32 = 4
"""Bytes of a float32."""

_STASH, _WIDE_IN_STASH = 5, 4
"""Tensors that TRL's activation offloading leaves on the GPU while they are on their way to the host; of a layer that
is not computed again so many of these are as wide as its MLP."""

_WITHOUT_TRITON = 7 * FLOAT32 + 1
"""Bytes of a logit beside itself where TRL folds a tile without Triton: seven copies in float32, and a mask."""


@dataclass(frozen=True)
class Weights:
    """What lies on the GPU from the start, in bytes, and what is trained.

    base: weights in 4 bit with their quantisation constants; 0 where the base is whole
    unquantized: embeddings, norms, head and buffers, or all of a whole base
    trained: elements of each trained tensor, float32
    adapters: of each layer, the rank of LoRA by the name of the projection
    largest: elements of the largest 4-bit weight, which is whole for a moment whenever it is used
    cores: elements of each core, where users train those alone over a frozen adapter (`lora.core_only`)
    parents: whether the users of a batch may start from different adapters, each of which is then there
    table: bytes of the embedding table, a part of `unquantized`; 0 where it cannot leave the GPU, since it is the
        head's too or trained
    """

    base: int
    unquantized: int
    trained: tuple[int, ...]
    adapters: tuple[dict[str, int], ...] = field(repr=False)
    largest: int
    table: int = 0
    dropout: bool = False
    cores: tuple[int, ...] = ()
    parents: bool = False

    @property
    def by_user(self) -> tuple[int, ...]:
        """Elements of each tensor that a user trains."""
        return self.cores or self.trained

    def elements(self, users: int) -> int:
        """Of the adapters of so many users: all that they train, and what stands frozen around their cores."""
        frozen = sum(self.trained) if self.cores else 0
        return users * sum(self.by_user) + (users if self.parents else 1) * frozen


class Step(NamedTuple):
    """A batch: rows, tokens a row, tokens a row that carry loss, and how the GPU computes.

    length: tokens of a row, those of its prefix among them
    prefix: tokens of each row that the bare base reads ahead (`profile_pass: frozen`); 0: the ordinary way
    itemsize: bytes of the compute dtype
    packed: whether rows lie end to end, so that attention takes a mask
    shared: whether attention takes keys and values that several heads share; else they are repeated for every head
    triton: whether TRL's head runs in Triton's kernels, which is not installed on Windows
    users: whose rows these are, in slots; each has an adapter of their own
    """

    rows: int
    length: int
    scored: int
    prefix: int = 0
    itemsize: int = 2
    packed: bool = False
    shared: bool = True
    triton: bool = True
    users: int = 1


def weights_of(config: PretrainedConfig, recipe: Recipe, itemsize: int) -> Weights:
    """The weights of the recipe's base and adapter on a GPU that computes in `itemsize` bytes; none is loaded.

    Raises:
        RecipeError: a `lora` section that does not go with the model.
    """
    model = on_meta(config)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    linears = [linear for linear in model.modules() if isinstance(linear, nn.Linear) and linear is not head]
    quantized = [linear.weight for linear in linears] if recipe.quantization == "nf4" else []
    in_4_bit = {id(weight) for weight in quantized}
    kept = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in in_4_bit)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    lora: LoraConfig = lora_config(recipe)
    wrapped = with_adapter(model, recipe)
    free = head.weight is not table.weight and model.get_input_embeddings() is table
    cores = [next(iter(layer.r.values())) ** 2 for layer in wrapped.modules() if isinstance(layer, LoraLayer)]
    adapters: list[dict[str, int]] = [{} for _ in range(config.get_text_config().num_hidden_layers)]
    for name, module in wrapped.named_modules():
        place = re.search(r"\blayers\.(\d+)\.(?:self_attn|mlp)\.(\w+)$", name)
        if place is not None and isinstance(module, LoraLayer) and "vision" not in name:
            adapters[int(place[1])][place[2]] = next(iter(module.r.values()))
    return Weights(
        base=sum(nf4_bytes(weight.numel()) for weight in quantized),
        unquantized=kept * itemsize + buffers,
        trained=tuple(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad),
        adapters=tuple(adapters),
        largest=max((weight.numel() for weight in quantized), default=0),
        table=table.weight.numel() * itemsize if free else 0,
        dropout=lora.lora_dropout > 0,
        cores=tuple(cores) if recipe.core_only else (),
        parents=recipe.fleet.init_from != "all",
    )


def nf4_bytes(elements: int) -> int:
    """A weight in NF4 with double quantisation, as bitsandbytes keeps it: blocks of 64, their scales in blocks of 256.

    Beside the scales each weight has an offset, a code of 16 and one of 256 float32.
    """
    blocks = math.ceil(elements / 64)
    return math.ceil(elements / 2) + blocks + FLOAT32 * (math.ceil(blocks / 256) + 1 + 16 + 256)


EIGHT_BIT = ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
"""Names of `optim` whose state is 8 bit."""


def optimizer_bytes(trained: tuple[int, ...], optim: str) -> int:
    """AdamW's two states of each trained tensor: float32, or 8 bit with a scale a block of 256.

    bitsandbytes keeps tensors of fewer than 4,096 elements in float32. A paged state is counted whole, as it lies on
    the GPU while there is room. What is no 8-bit AdamW is counted as AdamW in float32.
    """
    if optim in EIGHT_BIT:
        small = [size for size in trained if size < 4096]
        large = [size for size in trained if size >= 4096]
        codes = 2 * 256 * FLOAT32 if large else 0
        return 2 * (FLOAT32 * sum(small) + sum(size + FLOAT32 * math.ceil(size / 256) for size in large)) + codes
    steps = 0 if "bnb" in optim or "paged" in optim else FLOAT32 * len(trained)  # torch keeps the count in a tensor
    return 2 * FLOAT32 * sum(trained) + steps


def saved(shape: Shape, weights: Weights, step: Step, checkpointing: bool) -> int:
    """Bytes that the training forward keeps for its backward pass, parameters left out.

    checkpointing: of each layer its input alone, in the compute dtype
    """
    tokens = step.rows * (step.length - step.prefix)
    if checkpointing:
        layers = shape.layers * shape.hidden * step.itemsize * tokens
    else:
        layers = sum(saved_by_layer(shape, weights, step, index) for index in range(shape.layers))
        layers -= _ahead_of_the_first_adapter(shape, weights, step, tokens)
        layers += casts(weights, step) + _rotary(shape, step)
    return layers + _after_the_layers(shape, step, tokens)


def _ahead_of_the_first_adapter(shape: Shape, weights: Weights, step: Step, tokens: int) -> int:
    """What the first layer does not save, as nothing ahead of it has a gradient: norms, and attention without LoRA."""
    norm = (FLOAT32 * shape.hidden + FLOAT32) * tokens
    if {"q_proj", "k_proj", "v_proj", "o_proj"} & set(weights.adapters[0]):
        return norm
    return (shape.norms // 2 + 1) * norm + _head_norms(shape, tokens) + _saved_by_attention(shape, step, 0)


def _head_norms(shape: Shape, tokens: int) -> int:
    """The norms of query and key, where a layer has them."""
    return shape.head_norms * (shape.heads + shape.kv_heads) * (FLOAT32 * shape.head_dim + FLOAT32) * tokens


def _after_the_layers(shape: Shape, step: Step, tokens: int) -> int:
    """The last norm, the scored hidden states, and a few numbers a token: indices, labels, log-probs, weights."""
    norm = (FLOAT32 * shape.hidden + FLOAT32) * tokens
    return norm + step.rows * step.scored * (shape.hidden * step.itemsize + 24) + 5 * tokens


def _rotary(shape: Shape, step: Step) -> int:
    """Sine and cosine of the positions; one set for each kind of attention in the model.

    Behind prefixes every row has positions of its own.
    """
    places = step.rows * (step.length - step.prefix) if step.prefix else step.length
    return len(set(shape.windows)) * 2 * places * shape.head_dim * step.itemsize


def casts(weights: Weights, step: Step) -> int:
    """Copies of LoRA weights in the compute dtype, which autocast makes and keeps until the forward is over.

    Cores of several parents gather A and B in float32 ahead of that.
    """
    gathered = FLOAT32 * step.users * sum(weights.trained) if weights.cores and weights.parents else 0
    return gathered + (0 if step.itemsize == FLOAT32 else weights.elements(step.users) * step.itemsize)


def saved_by_layer(shape: Shape, weights: Weights, step: Step, index: int) -> int:
    """Bytes that one layer keeps for its backward pass where it is not checkpointed."""
    tokens = step.rows * (step.length - step.prefix)
    norms = shape.norms * (FLOAT32 * shape.hidden + FLOAT32) * tokens + _head_norms(shape, tokens)
    ranks = weights.adapters[index]
    inputs = sum(ranks.values())  # all that a core needs: behind a frozen A, the input itself is not kept
    if not weights.cores:
        inputs = _lora_inputs(shape, ranks, weights.dropout, shape.eager or step.prefix > 0)
    mlp = 3 * shape.intermediate  # what the activation reads and gives, and what it is multiplied by
    return norms + (inputs + mlp) * step.itemsize * tokens + _saved_by_attention(shape, step, index)


def kept_by_offloading(shape: Shape, weights: Weights, step: Step, checkpointing: bool) -> int:
    """What TRL's activation offloading leaves on the GPU: tensors on their way to the host, and what is saved twice.

    It keeps a tensor that a second operation saves as well: the input of a norm, the input that several projections
    with LoRA share, the result of attention in front of one.
    """
    tokens = step.rows * (step.length - step.prefix)
    if checkpointing:
        return _STASH * shape.hidden * step.itemsize * tokens
    moving = _WIDE_IN_STASH * shape.intermediate * step.itemsize * tokens
    norms = FLOAT32 * (shape.norms * shape.hidden + shape.head_norms * (shape.heads + shape.kv_heads) * shape.head_dim)
    twice = shape.layers * norms - FLOAT32 * shape.hidden  # nothing ahead of the first norm has a gradient
    for ranks in weights.adapters:
        shared = [len({*group} & {*ranks}) > 1 for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))]
        result = shape.heads * shape.head_dim if "o_proj" in ranks else 0
        twice += step.itemsize * (shape.hidden * sum(shared) + result)
    return moving + twice * tokens


def _lora_inputs(shape: Shape, ranks: dict[str, int], dropout: bool, result: bool) -> int:
    """Elements a token that LoRA keeps in a layer: its inputs, once for projections that share one, and its ranks.

    result: whether attention itself does not keep its result, which the output projection reads
    """
    queries = shape.heads * shape.head_dim
    widths = {"q_proj": shape.hidden, "k_proj": shape.hidden, "v_proj": shape.hidden, "o_proj": queries,
              "gate_proj": shape.hidden, "up_proj": shape.hidden, "down_proj": shape.intermediate}  # fmt: skip
    shared = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("down_proj",))
    inputs = sum(widths[group[0]] for group in shared if set(group) & set(ranks))
    if result and "o_proj" in ranks:
        inputs += queries
    if dropout:  # noise, and an input of its own, for each
        inputs = 2 * sum(widths[name] for name in ranks)
    return inputs + sum(ranks.values())


def _saved_by_attention(shape: Shape, step: Step, index: int) -> int:
    """Query, key, value, result and what the kernel adds; behind a prefix the first three alone (see `prefix`)."""
    tokens = step.rows * (step.length - step.prefix)
    queries = shape.heads * shape.head_dim
    if step.prefix:
        return (queries + 2 * shape.kv_heads * shape.head_dim) * step.itemsize * tokens
    pairs = tokens * step.length
    window = shape.windows[index]
    masked = step.packed or (window is not None and step.length > window)
    repeated = masked or shape.eager or not step.shared
    keys_and_values = 2 * (shape.heads if repeated else shape.kv_heads) * shape.head_dim
    if shape.eager:  # tanh, softmax in float32 and its copy in the compute dtype
        scores = shape.heads * pairs * (FLOAT32 + step.itemsize + (0 if step.itemsize == FLOAT32 else step.itemsize))
        return (queries + keys_and_values) * step.itemsize * tokens + scores
    mask = pairs * step.itemsize if masked else 0
    return (2 * queries + keys_and_values) * step.itemsize * tokens + FLOAT32 * shape.heads * tokens + mask


def prefixes(shape: Shape, step: Step) -> int:
    """Keys and values of the batch's prefixes, of every layer, as if no two rows shared one."""
    return shape.layers * 2 * shape.kv_heads * shape.head_dim * step.itemsize * step.rows * step.prefix


# What works in a step for a moment


def attention(shape: Shape, step: Step) -> int:
    """What one layer's attention saves, at the most, and the masks; a part of what is saved or at work."""
    kept = max(_saved_by_attention(shape, step, index) for index in range(shape.layers))
    return kept + _joined(shape, step) + _masks(shape, step)


def _joined(shape: Shape, step: Step) -> int:
    """What attention behind a prefix makes anew: keys and values of both parts, repeated for every head, with the
    gradients of these, and its mask in the compute dtype.
    """
    if not step.prefix:
        return 0
    repeated = 2 * shape.heads if shape.heads > shape.kv_heads else shape.heads
    width = 2 * shape.head_dim * step.itemsize * step.rows * step.length
    return (shape.kv_heads + repeated) * width + step.rows * (step.length - step.prefix) * step.length * step.itemsize


def layer_at_work(shape: Shape, weights: Weights, step: Step, checkpointing: bool) -> int:
    """The most that one layer's backward pass holds beside what was saved.

    A checkpointed layer is computed again first, so all that it saves is there. Its MLP goes first: the gradients of
    the product's two factors are there at once, or one of them beside the largest 4-bit weight, whole. When attention's
    turn comes, what the MLP and its norms had saved is gone. What was saved behind the layers is gone from the start.
    The layer's own gradients are there; see `gradients_ahead` for those of the others.
    """
    tokens = step.rows * (step.length - step.prefix)
    again = 0
    if checkpointing:
        again = max(saved_by_layer(shape, weights, step, index) for index in range(shape.layers))
        again += casts(weights, step) // shape.layers
    wide = shape.intermediate * step.itemsize * tokens
    weight = weights.largest * step.itemsize
    stream = shape.hidden * step.itemsize * tokens
    own = FLOAT32 * step.users * sum(weights.by_user) // shape.layers
    gone = 4 * wide + (shape.norms // 2) * FLOAT32 * shape.hidden * tokens
    queries = 4 * shape.heads * shape.head_dim * step.itemsize * tokens
    scores = 2 * FLOAT32 * shape.heads * tokens * step.length if shape.eager else 0
    mlp = max(2 * wide, wide + weight)
    attention = queries + scores + _joined(shape, step) + stream - gone
    return again + max(mlp, attention) + stream + own + _masks(shape, step) - _after_the_layers(shape, step, tokens)


def _masks(shape: Shape, step: Step) -> int:
    """Which token may see which: one mask, kept all the while, for each kind of attention that takes one.

    Behind prefixes each takes one; eager attention then keeps another of its own in every layer.
    """
    if step.prefix:
        own = shape.layers * step.itemsize if shape.eager else 0
        return (len(set(shape.windows)) + own) * step.rows * (step.length - step.prefix) * step.length
    windows = {
        window for window in shape.windows if step.packed or shape.eager or (window or step.length) < step.length
    }
    return len(windows) * step.rows * step.length**2 * (step.itemsize if shape.eager else 1)


def gradients_ahead(weights: Weights, step: Step, accumulation: int) -> int:
    """Gradients that are there before a backward pass: those of the batches ahead of it in the accumulation window."""
    return FLOAT32 * step.users * sum(weights.by_user) if accumulation > 1 else 0


def gradients_behind(shape: Shape, weights: Weights, step: Step, kept: int) -> int:
    """By how much a backward pass has grown when it comes to its last layer: gradients come, what was saved goes.

    kept: bytes that were saved and go layer by layer
    """
    grown = FLOAT32 * step.users * sum(weights.by_user) - kept
    return max(0, grown * (shape.layers - 1) // shape.layers)


def head_at_work(shape: Shape, step: Step) -> int:
    """TRL's chunked head in training: one tile of logits, and the gradient of the scored hidden states in float32."""
    scored = step.rows * step.scored
    beside = 0 if step.triton else _WITHOUT_TRITON
    tile = min(scored, TOKEN_CHUNK_SIZE) * min(shape.vocabulary, VOCABULARY_CHUNK_SIZE) * (step.itemsize + beside)
    return tile + scored * shape.hidden * (FLOAT32 + step.itemsize)


def scoring(shape: Shape, weights: Weights, step: Step, adapters: bool = False) -> int:
    """A no-grad pass of a batch in `step`'s dtype: the wide tensors of one MLP, or the head in float32.

    The head has a tile of logits, the part of its weight that goes with it, and the scored hidden states, all float32,
    beside the last hidden states.
    """
    layer = _layer_without_gradients(shape, weights, step, step.length, step.rows, adapters)
    scored, words = step.rows * step.scored, min(shape.vocabulary, VOCABULARY_CHUNK_SIZE)
    tile, part = min(scored, TOKEN_CHUNK_SIZE) * words * FLOAT32, words * shape.hidden * FLOAT32
    states = (scored * FLOAT32 + step.rows * step.length * step.itemsize) * shape.hidden
    return max(layer, tile + part + states)


def reading(shape: Shape, weights: Weights, step: Step) -> int:
    """A no-grad pass of the bare base over the batch's prefixes, and the keys and values that it leaves."""
    if not step.prefix:
        return 0
    return prefixes(shape, step) + _layer_without_gradients(shape, weights, step, step.prefix, step.rows)


def _layer_without_gradients(
    shape: Shape, weights: Weights, step: Step, length: int, rows: int, adapters: bool = False
) -> int:
    """The wide tensors of one MLP over rows of `length` tokens, and a weight that is whole for a moment.

    adapters: whether they are on; what LoRA adds is then one wide tensor more
    """
    wide = ((3 + adapters) * shape.intermediate + 3 * shape.hidden) * step.itemsize * length
    if shape.eager:
        wide += 2 * FLOAT32 * shape.heads * length**2
    return rows * wide + weights.largest * step.itemsize
