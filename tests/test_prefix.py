"""`profile_pass: frozen` against one forward of the complete sequence, its adapters off at the profile's positions."""

import pytest
import torch
import toys
from peft import LoraConfig, get_peft_model
from test_loss import adapters_off_until, stir
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from perce_lite.data.pairs import IGNORED, PairMaker, Tokens
from perce_lite.data.rows import from_columns
from perce_lite.model import prefix_cache
from perce_lite.model.compat import keep_base_constant
from perce_lite.model.fused_head import training_forward
from perce_lite.model.generate import generate
from perce_lite.model.scoring import (
    ScoringJob,
    cached_log_probs,
    compute_log_probs,
    encode_prefix,
    encode_prefixes,
    model_inputs,
    no_grad_eval,
    padded,
    prefix_cache_of,
    store_of,
)
from perce_lite.recipe import Template
from perce_lite.training import trainer as training

FAMILIES = ("chatml", "llama3", "gemma", "qwen3")


def maker(family="chatml", profile_pass="frozen", **template):
    return PairMaker(toys.toy_tokenizer(family), Template(**template), profile_pass=profile_pass)


def toy_pairs(family="chatml", count=4, **options):
    rows = [from_columns(record, f"row {number}") for number, record in enumerate(toys.toy_rows())]
    return maker(family, **options).make(rows[:: len(rows) // count][:count])


def with_adapter(model, dtype=torch.float64, **options):
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"), **options)
    stir(model)
    return model.to(dtype)


def toy(family="chatml"):
    return with_adapter(toys.toy_model(family, toys.VOCAB_SIZE))


def masked_forward(model, tokens):
    """Log-probs (R,) of one sequence in one forward, the adapters doing nothing at its prefix."""
    with adapters_off_until(model, tokens.prefix_length):
        logits = model(input_ids=torch.tensor([tokens.ids])).logits[0, :-1]
    labels = torch.tensor(tokens.labels[1:])
    mask = labels != IGNORED
    return logits.log_softmax(-1)[mask].gather(1, labels[mask, None])[:, 0]


def short(model, sequences):
    """Log-probs (N,) of a padded batch of what follows the prefixes, with gradients."""
    inputs = model_inputs(sequences, 0, torch.device("cpu"), prefix_cache_of(model, None))
    model.train()
    return training_forward(model)(**inputs, use_cache=False)


def exactly(model, sequences):
    """As `short`, from full logits: the fused head computes in float32."""
    inputs = model_inputs(sequences, 0, torch.device("cpu"), prefix_cache_of(model, None))
    labels = inputs.pop("labels")[:, 1:]
    model.train()
    values = model(**inputs, use_cache=False).logits[:, :-1].log_softmax(-1)
    return values.gather(2, labels.clamp(min=0)[..., None])[..., 0][labels != IGNORED]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_and_gradients_equal_a_masked_forward_in_float64(family, checkpointed):
    model, sequences = toy(family), [pair.factual for pair in toy_pairs(family)]
    assert len({tokens.prefix_length for tokens in sequences}) > 1, "prefixes of one length test no padding"
    assert len({len(tokens.after_prefix.ids) for tokens in sequences}) > 1
    expected = torch.cat([masked_forward(model, tokens) for tokens in sequences])
    weights = torch.linspace(0.5, 2, len(expected), dtype=torch.float64)
    theirs = gradients(model, (weights * expected).sum())
    near = 1e-6 if family == "gemma" else 1e-9  # transformers' eager attention takes its softmax in float32
    if checkpointed:
        model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": False})
    log_probs = exactly(model, sequences)
    ours = gradients(model, (weights * log_probs).sum())
    torch.testing.assert_close(log_probs, expected, rtol=0, atol=near)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=near, msg=lambda text, n=name: f"{n}: {text}")
    # The reference itself is far from an adapter that is on at every token.
    always_on = torch.cat([masked_forward(model, tokens.with_prefix(0)) for tokens in sequences])
    assert (always_on - expected).abs().max() > 1e-3


def test_sliding_windows_look_back_over_the_prefix():
    settings = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 16}
    config = AutoConfig.for_model(
        "gemma3_text", vocab_size=toys.VOCAB_SIZE, sliding_window=12, sliding_window_pattern=2, pad_token_id=None,
        bos_token_id=None, eos_token_id=None, initializer_range=0.2, **settings, **heads,
    )  # fmt: skip
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    torch.manual_seed(0)
    model = with_adapter(AutoModelForCausalLM.from_config(config, dtype=torch.float64))
    sequences = [pair.factual for pair in toy_pairs("gemma")]
    assert min(tokens.prefix_length for tokens in sequences) > 12, "a window longer than the prefix tests nothing"
    log_probs = exactly(model, sequences)
    torch.testing.assert_close(
        log_probs, torch.cat([masked_forward(model, tokens) for tokens in sequences]), rtol=0, atol=1e-9
    )


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_in_nf4(tmp_path, autocast):
    folder = toys.toy_folder(tmp_path / "toy")
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bit, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    keep_base_constant(model)
    sequences = [pair.factual for pair in toy_pairs()]
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        zero = short(model, sequences)  # an adapter that was never trained adds nothing
        plain = training_forward(model)(**padded(sequences, 0, torch.device("cpu")), use_cache=False)
        torch.testing.assert_close(zero.float(), plain.float(), rtol=0, atol=1e-4 if autocast is None else 0.15)
        if autocast is None:
            stir(model)
            expected = torch.cat([masked_forward(model, tokens) for tokens in sequences])
            theirs = gradients(model, expected.sum())
            ours = gradients(model, short(model, sequences).sum())
            for name in theirs:
                torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-4)


def saved_bytes(model, sequences, forward=short):
    """Bytes of what a training forward keeps for its backward, without parameters."""
    seen = {}
    ours = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            seen[storage.data_ptr()] = tensor, storage.nbytes()  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(model, sequences).sum()
    loss.backward()
    return sum(size for _, size in seen.values())


def plainly(model, sequences):
    model.train()
    return training_forward(model)(**padded(sequences, 0, torch.device("cpu")), use_cache=False)


def test_saved_activations_do_not_grow_with_the_profile():
    model, tokens = toy(), toy_pairs()[0].factual
    prefix = list(tokens.prefix_ids)
    after = tokens.after_prefix
    longer = Tokens(prefix * 8 + after.ids, [IGNORED] * 8 * len(prefix) + after.labels, 8 * len(prefix))
    short(model, [tokens])  # the first one probes
    assert saved_bytes(model, [longer]) == saved_bytes(model, [tokens])
    assert saved_bytes(model, [longer], plainly) > 3 * saved_bytes(model, [longer])


# What is encoded, and how often


def test_a_prefix_that_rows_share_is_encoded_once(toy_trainer, monkeypatch):
    rows = toys.toy_rows(2, 6)
    shared = [{**row, "profile": rows[0 if row["user"] == "user0" else 6]["profile"]} for row in rows]
    encoded = []

    def counted(model, prefixes, autocast):
        encoded.extend(map(tuple, prefixes))
        return encode_prefixes(model, prefixes, autocast)

    monkeypatch.setattr(training, "encode_prefixes", counted)
    trainer = toy_trainer(rows=shared, profile_pass="frozen", max_steps=12)
    encoded.clear()
    trainer.train()
    assert len(encoded) == len(set(encoded)) == 2, "two users, two prefixes, two epochs"
    monkeypatch.setattr(prefix_cache, "MAX_CACHED_BYTES", 1)
    encoded.clear()
    trainer = toy_trainer(rows=shared, profile_pass="frozen", max_steps=12)
    trainer.train()
    assert len(encoded) > 4, "without room a prefix is encoded in every batch that has it"


def test_prefixes_of_one_row_each_are_encoded_together_and_each_as_if_alone(toy_trainer, monkeypatch):
    encoded = []

    def counted(model, prefixes, autocast):
        encoded.append(len(prefixes))
        return encode_prefixes(model, prefixes, autocast)

    monkeypatch.setattr(training, "encode_prefixes", counted)
    trainer = toy_trainer(profile_pass="frozen", max_steps=3)
    encoded.clear()
    trainer.train()
    assert encoded == [2, 2, 2], "a forward a batch of two rows"
    prefixes = [pair.factual.prefix_ids for pair in trainer.pairs["train"]][:4]
    assert len({len(ids) for ids in prefixes}) > 1
    for ids, cache in zip(prefixes, encode_prefixes(trainer.model, prefixes, None), strict=True):
        alone = encode_prefix(trainer.model, ids, None)
        assert cache.get_seq_length() == len(ids)
        for layer, expected in zip(cache.layers, alone.layers, strict=True):
            torch.testing.assert_close(layer.keys, expected.keys, rtol=0, atol=1e-5)
            torch.testing.assert_close(layer.values, expected.values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("each", [1, 6])
def test_without_room_the_adapter_is_the_same(toy_trainer, monkeypatch, each):
    rows = toys.toy_rows(2, 6)
    rows = [{**row, "profile": rows[index // each * each]["profile"]} for index, row in enumerate(rows)]

    def trained():
        trainer = toy_trainer(rows=rows, profile_pass="frozen", max_steps=6)
        trainer.train()
        return {
            name: parameter.detach().clone()
            for name, parameter in trainer.model.named_parameters()
            if parameter.requires_grad
        }

    first = trained()
    monkeypatch.setattr(prefix_cache, "MAX_CACHED_BYTES", 1)
    second = trained()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_scoring_with_the_adapter_on_sleeps_through_the_prefix(tmp_path):
    model, pairs = toy().float(), toy_pairs()
    sequences = [pair.factual for pair in pairs]
    log_probs = {}
    compute_log_probs(model, sequences, True, None, log_probs.__setitem__)
    for index, tokens in enumerate(sequences):
        with torch.no_grad():
            torch.testing.assert_close(log_probs[index], masked_forward(model, tokens), rtol=0, atol=2e-5)
    # The store never takes one for the other; without adapters the prefix changes nothing.
    store = store_of(str(tmp_path), model, None, adapters=True)
    jobs = [ScoringJob("u", tokens) for tokens in sequences]
    always_on = [ScoringJob("u", tokens.with_prefix(0)) for tokens in sequences]
    assert cached_log_probs(model, jobs, store, None, "", adapters=True).hits == 0
    assert cached_log_probs(model, always_on, store, None, "", adapters=True).hits == 0
    assert cached_log_probs(model, jobs, store, None, "", adapters=True).hits == len(jobs)
    bare = store_of(str(tmp_path), model, None)
    assert cached_log_probs(model, jobs, bare, None, "").hits == 0
    assert cached_log_probs(model, always_on, bare, None, "").hits == len(jobs)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_activates_the_adapter_after_the_profile(family):
    model, own = toy(family).float(), maker(family)
    (pair,) = toy_pairs(family, 1)
    said = generate(model, own, pair.row.prompt, pair.row.profile, 12)
    asked = own.prompt(pair.row.prompt, pair.row.profile)
    ids = list(asked.ids)
    with no_grad_eval(model, adapters=True), adapters_off_until(model, asked.prefix_length):
        for _ in range(12):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in own.stop_ids():
                break
    assert said == own.tokenizer.decode(ids[len(asked.ids) :], skip_special_tokens=True).strip()


def test_evaluation_in_training_has_the_adapter_off_in_the_prefix_too(toy_trainer):
    import datasets

    rows = datasets.Dataset.from_list(toys.toy_rows(2, 2))
    trainer = toy_trainer(profile_pass="frozen", eval_dataset=rows)
    stir(trainer.model)
    loss = trainer.evaluate()["eval_loss"]
    log_probs = {}
    compute_log_probs(
        trainer.model, [pair.factual for pair in trainer.pairs["eval"]], True, None, log_probs.__setitem__
    )
    values = torch.cat(list(log_probs.values()))
    assert loss == pytest.approx(-float(values.mean()), abs=0.05)
