"""Many adapters in one batch against peft, one adapter at a time."""

import copy

import pytest
import torch
import toys
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch.nn.functional import log_softmax
from transformers import set_seed

from perce_lite.errors import AdapterError, ConfigError
from perce_lite.fleet.slot_lora import attach, save_slot
from perce_lite.fleet.slot_routing import BARE
from perce_lite.model.fingerprint import fingerprint

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def slot_model(slots, dtype=torch.float64, family="llama3", **lora):
    base = toys.toy_model(family, toys.VOCAB_SIZE, dtype=dtype)
    return attach(base, LoraConfig(**{**LORA, **lora}), slots, dtype)


def peft_model(seed, dtype=torch.float64, family="llama3", **lora):
    base = toys.toy_model(family, toys.VOCAB_SIZE, dtype=dtype)
    set_seed(seed)
    return get_peft_model(base, LoraConfig(**{**LORA, **lora}))


def ids_of(user, rows=1, length=None):
    generator = torch.Generator().manual_seed(100 + user)
    return torch.randint(0, toys.VOCAB_SIZE, (rows, length or 6 + 3 * user), generator=generator)


def padded(texts):
    """ids and mask (B, T) of several (b, t), padded on the right."""
    width = max(text.shape[1] for text in texts)
    pad = [torch.nn.functional.pad(text, (0, width - text.shape[1])) for text in texts]
    mask = [torch.nn.functional.pad(torch.ones_like(text), (0, width - text.shape[1])) for text in texts]
    return torch.cat(pad), torch.cat(mask)


def loss_of(logits, ids, mask):
    scored = mask[:, 1:] == 1
    return -log_softmax(logits[:, :-1], -1).gather(-1, ids[:, 1:, None])[..., 0][scored].mean()


def trained_alone(user, steps, **lora):
    model = peft_model(user, **lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = ids_of(user)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model(input_ids=ids).logits, ids, torch.ones_like(ids)).backward()
        optimizer.step()
    return get_peft_model_state_dict(model)


def trained_together(users, steps, **lora):
    model = slot_model(users, **lora)
    optimizers, tensors = [], []
    for user in range(users):
        model.load_slot(user, model.fresh(user))
        tensors.append(model.parameters_of(user))
        optimizers.append(torch.optim.AdamW(tensors[-1], lr=1e-2))
    ids, mask = padded([ids_of(user) for user in range(users)])
    for _ in range(steps):
        with model.route.of(list(range(users))):
            logits = model.base(input_ids=ids, attention_mask=mask).logits
            sum(loss_of(logits[u : u + 1], ids[u : u + 1], mask[u : u + 1]) for u in range(users)).backward()
        for user in range(users):
            model.hand_gradients(user, tensors[user])
            optimizers[user].step()
            model.clear_gradients(user)
    return [model.read_slot(user) for user in range(users)]


@pytest.mark.parametrize("lora", [{}, {"init_lora_weights": "gaussian"}, {"target_modules": ["q_proj", "down_proj"]}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_slot_is_what_peft_draws(lora, dtype):
    base = toys.toy_model("llama3", toys.VOCAB_SIZE, dtype=dtype)
    fresh = attach(base, LoraConfig(**{**LORA, **lora}), 2).fresh(7)
    theirs = get_peft_model_state_dict(peft_model(7, dtype, **lora))
    assert list(fresh) == list(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(fresh[name], tensor.float()), name


@pytest.mark.parametrize(("users", "lora"), [(2, {}), (8, {"use_rslora": True})])
def test_float64_parity_with_training_alone(users, lora):
    together = trained_together(users, 50, **lora)
    for user in {0, 1, users - 1}:
        alone = trained_alone(user, 50, **lora)
        assert max(alone[name].abs().max() for name in alone if "lora_B" in name) > 0.01, "nothing was trained"
        for name, tensor in alone.items():
            torch.testing.assert_close(together[user][name], tensor, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rows", [[0, 0, 2, 2], [0, 2, 0, 2], [2, 0, BARE, 0]])
def test_forward_equals_peft_row_by_row_and_others_get_no_gradient(rows):
    model = slot_model(4)
    states = {slot: stirred(model.fresh(slot), slot) for slot in range(4)}
    for slot, state in states.items():
        model.load_slot(slot, state)
    ids = ids_of(1, rows=4)
    with model.route.of(rows):
        logits = model.base(input_ids=ids).logits
        # Row 0's loss alone: it must reach its own slot and no other.
        loss_of(logits[:1], ids[:1], torch.ones_like(ids[:1])).backward()
    for row, slot in enumerate(rows):
        expected = model.base(input_ids=ids[row : row + 1]).logits[0] if slot == BARE else None
        if expected is None:
            one = peft_model(0)
            one.load_state_dict({k.replace(".weight", ".default.weight"): v for k, v in states[slot].items()}, False)
            expected = one(input_ids=ids[row : row + 1]).logits[0]
        torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-11)
    for layer in model.layers.values():
        for parameter in (layer.lora_A, layer.lora_B):
            assert parameter.grad[rows[0]].abs().max() > 0
            for slot in set(range(4)) - {rows[0]}:
                assert torch.count_nonzero(parameter.grad[slot]) == 0


def stirred(state, seed):
    """An adapter whose B is not zero."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 0.05 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) if "lora_B" in name else tensor
        for name, tensor in state.items()
    }


@pytest.mark.parametrize("autocast", [False, True])
def test_bare_rows_are_the_base_bit_for_bit(autocast):
    ids = ids_of(2, rows=3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = toys.toy_model("llama3", toys.VOCAB_SIZE)(input_ids=ids).logits
        model = slot_model(2, torch.float32)
        model.load_slot(1, stirred(model.fresh(0), 0))
        assert torch.equal(model.base(input_ids=ids).logits, expected)
        with model.route.of([BARE] * 3):
            assert torch.equal(model.base(input_ids=ids).logits, expected)
        with model.route.of([BARE, 1, BARE]):
            mixed = model.base(input_ids=ids).logits
    assert torch.equal(mixed[[0, 2]], expected[[0, 2]])
    assert not torch.equal(mixed[1], expected[1])


@pytest.mark.parametrize("autocast", [False, True])
def test_arithmetic_is_pefts(autocast):
    ids = ids_of(3)
    model = slot_model(1, torch.float32)
    state = stirred(model.fresh(5), 5)
    model.load_slot(0, state)
    theirs = peft_model(5, torch.float32)
    theirs.load_state_dict({k.replace(".weight", ".default.weight"): v for k, v in state.items()}, strict=False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast), model.route.of([0]):
        ours = model.base(input_ids=ids).logits
        expected = theirs(input_ids=ids).logits
    assert ours.dtype == expected.dtype
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.25 if autocast else 1e-5)


def test_checkpointing_recomputes_with_the_same_route():
    gradients = []
    for checkpointing in (False, True):
        model = slot_model(2)
        for slot in range(2):
            model.load_slot(slot, stirred(model.fresh(slot), slot))
        if checkpointing:
            model.base.activation_checkpointing_enable({"use_reentrant": False})
        model.base.train()
        ids = ids_of(1, rows=2)
        with model.route.of([1, 0]):
            loss_of(model.base(input_ids=ids, use_cache=False).logits, ids, torch.ones_like(ids)).backward()
        gradients.append([layer.lora_A.grad for layer in model.layers.values()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_detach_gives_the_base_back():
    base = toys.toy_model("llama3", toys.VOCAB_SIZE)
    before, modules = fingerprint(base), [name for name, _ in base.named_modules()]
    model = attach(base, LoraConfig(**LORA), 2)
    assert fingerprint(base) == before, "the store would miss"
    assert model.detach() is base
    assert [name for name, _ in base.named_modules()] == modules
    assert fingerprint(base) == before
    get_peft_model(base, LoraConfig(**LORA))


def test_a_saved_slot_loads_with_peft(tmp_path):
    model = slot_model(3, torch.float32)
    model.load_slot(1, stirred(model.fresh(1), 1))
    save_slot(model, model.read_slot(1), tmp_path / "adapter", toys.ABOUT)
    loaded = PeftModel.from_pretrained(toys.toy_model("llama3", toys.VOCAB_SIZE), str(tmp_path / "adapter"))
    ids = ids_of(4)
    with torch.no_grad(), model.route.of([1]):
        ours = log_softmax(model.base(input_ids=ids).logits, -1)
        torch.testing.assert_close(loaded(input_ids=ids).logits.log_softmax(-1), ours, rtol=0, atol=1e-5)
    state = get_peft_model_state_dict(loaded)
    assert state.keys() == model.read_slot(1).keys()
    for name, tensor in model.read_slot(1).items():
        assert torch.equal(state[name], tensor)
    assert loaded.peft_config["default"].base_model_name_or_path is None
    again = copy.deepcopy(state)
    model.load_slot(0, again)
    assert all(torch.equal(model.read_slot(0)[name], tensor) for name, tensor in again.items())


def test_a_state_that_does_not_fit_is_refused():
    model, other = slot_model(1), slot_model(1, r=8)
    before = model.read_slot(0)
    with pytest.raises(AdapterError, match="does not fit"):
        model.load_slot(0, other.fresh(0))
    with pytest.raises(AdapterError, match="does not fit"):
        model.load_slot(0, {})
    assert all(torch.equal(model.read_slot(0)[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("lora", "told"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens is no linear layer"),
        ({"target_modules": ["nowhere"]}, "does not go with this model"),
    ],
)
def test_what_slots_cannot_train_is_refused_and_leaves_no_trace(lora, told):
    base = toys.toy_model("llama3", toys.VOCAB_SIZE)
    before, modules = fingerprint(base), [name for name, _ in base.named_modules()]
    with pytest.raises(ConfigError, match=told):
        attach(base, LoraConfig(**{**LORA, **lora}), 2)
    assert [name for name, _ in base.named_modules()] == modules
    assert fingerprint(base) == before
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_every_fault_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        slot_model(0, lora_dropout=0.1, use_dora=True)
    assert len(caught.value.faults) == 3


def test_a_route_is_checked():
    model = slot_model(2)
    with pytest.raises(IndexError, match="slots 0 to 1"), model.route.of([2]):
        pass
    with model.route.of([0]), pytest.raises(RuntimeError, match="open already"), model.route.of([1]):
        pass
    with model.route.of([0, 1]), pytest.raises(ConfigError, match="has 2 rows"):
        model.base(input_ids=ids_of(0, rows=3))
    assert model.route.size is None
