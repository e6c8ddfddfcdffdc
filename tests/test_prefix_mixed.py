"""`profile_pass: frozen`: rows with a prefix and rows without one share a batch, and slots that start from cores."""

import pytest
import torch
import toys
from peft import LoraConfig, get_peft_model_state_dict
from test_engine import LORA, config, pairs_of, run, toy_base, trained_by_trainer
from test_loss import stir
from test_prefix import exactly, gradients, masked_forward, toy, toy_pairs
from test_slots import stirred

from perce_lite.data.pairs import IGNORED, Tokens
from perce_lite.evaluation.conditions import Case
from perce_lite.evaluation.judging import before_and_after
from perce_lite.fleet.slot_trainer import SlotTrainer
from perce_lite.fleet.slot_user import UserJob
from perce_lite.model import prefix_cache, scoring
from perce_lite.model.scoring import ScoringJob, cached_log_probs, compute_log_probs
from perce_lite.recipe import Template


def mixed():
    """Sequences of one batch, two with a prefix and two without."""
    pairs = toy_pairs(position="user")
    sequences = [tokens for pair in pairs[:2] for tokens in (pair.counterfactual, pair.factual)]
    assert [tokens.prefix_length > 0 for tokens in sequences] == [False, True, False, True]
    return sequences


def test_a_batch_of_rows_with_and_without_a_prefix_equals_a_masked_forward():
    model, sequences = toy(), mixed()
    expected = torch.cat([masked_forward(model, tokens) for tokens in sequences])
    theirs = gradients(model, expected.sum())
    for several in (sequences, sequences[1:], [sequences[0], sequences[2]]):
        log_probs = exactly(model, several)
        alone = torch.cat([masked_forward(model, tokens) for tokens in several])
        torch.testing.assert_close(log_probs, alone, rtol=0, atol=1e-9)
    ours = gradients(model, exactly(model, sequences).sum())
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("family", ["chatml", "gemma"])
def test_scoring_takes_both_kinds_of_rows(family, alone, monkeypatch):
    """As one evaluation does, of a row with its profile and without."""
    model = toy(family).float()
    sequences = [
        tokens for pair in toy_pairs(family, position="user") for tokens in (pair.factual, pair.counterfactual)
    ]
    every = range(len(sequences))
    batches = [[index] for index in every] if alone else [[*every]]
    monkeypatch.setattr(scoring, "_batches", lambda *_, **__: batches)
    log_probs = {}
    compute_log_probs(model, sequences, True, None, log_probs.__setitem__)
    for index, tokens in enumerate(sequences):
        with torch.no_grad():
            torch.testing.assert_close(log_probs[index], masked_forward(model, tokens), rtol=0, atol=2e-5)


def test_prefixes_that_do_not_fit_together_are_taken_a_few_at_a_time(monkeypatch):
    """As on a GPU, where the keys and values of a batch may be too many."""
    model, sequences = toy().float(), mixed()
    own, sizes = scoring.model_inputs, []

    def full(several, *rest):
        sizes.append(len(several))
        if len(several) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(several, *rest)

    monkeypatch.setattr(scoring, "_batches", lambda every, **_: [[*range(len(every))]])
    monkeypatch.setattr(scoring, "model_inputs", full)
    log_probs = {}
    compute_log_probs(model, sequences, True, None, log_probs.__setitem__)
    assert sizes == [4, 2, 1, 1, 2, 1, 1]
    assert sorted(log_probs) == [0, 1, 2, 3]


def test_before_and_after_of_a_template_without_system_messages():
    pairs = toy_pairs("gemma")
    cases = [Case(pair, {"own": pair.factual, "none": pair.counterfactual}) for pair in pairs]
    own, none = before_and_after(toy("gemma").float(), cases, None, None, 0.1)
    assert (own["profile"], none["profile"]) == ("own", "none")
    assert own["adapter"] != none["adapter"]


def rows_some_with_a_system_message():
    """Without its profile, a row has a system message, and with that a prefix, only where it brings its own."""
    rows = toys.toy_rows(2, 3)
    system = {"role": "system", "content": "Answer in one line."}
    return [
        {**row, "prompt": [system] * (number % 2) + [{"role": "user", "content": row["prompt"]}]}
        for number, row in enumerate(rows)
    ]


@pytest.mark.parametrize("packing", [False, True])
def test_twins_of_bootstrap_need_no_prefix_of_their_own(toy_trainer, packing):
    trainer = toy_trainer(
        family="llama3", rows=rows_some_with_a_system_message(), estimator="bootstrap", profile_pass="frozen",
        template=Template(system=None), packing=packing, max_length=512,
    )  # fmt: skip
    stir(trainer.model)
    twins = [pair.counterfactual for pair in trainer.pairs["train"]]
    assert {tokens.prefix_length > 0 for tokens in twins} == {True, False}
    expected = {}
    compute_log_probs(trainer.model, twins, True, None, expected.__setitem__)
    seen = []
    for batch in trainer.get_train_dataloader():
        rows = list(dict.fromkeys(row for row in batch["row"].flatten().tolist() if row >= 0))
        log_probs = trainer._without_profile(batch["counterfactual"], batch["labels"])
        values = log_probs[batch["labels"][:, 1:] != IGNORED]
        torch.testing.assert_close(values, torch.cat([expected[row] for row in rows]), rtol=0, atol=2e-5)
        seen += rows
    assert sorted(seen) == list(range(len(twins)))
    trainer.train()


def test_a_slot_without_a_system_message_trains_what_the_trainer_trains(tmp_path):
    args = config(tmp_path, estimator="bootstrap", profile_pass="frozen")

    def base():
        return toys.toy_model("gemma", toys.VOCAB_SIZE)

    trainer = trained_by_trainer(args, 1, base(), family="gemma")
    assert not any(pair.counterfactual.prefix_length for pair in trainer.pairs["train"])
    engine = SlotTrainer(base(), toys.toy_tokenizer("gemma"), args, LoraConfig(**LORA), 1)
    ours = run(engine, [UserJob("user1", trainer.pairs["train"])])["user1"]
    assert ours.error is None
    for key, tensor in get_peft_model_state_dict(trainer.model).items():
        torch.testing.assert_close(ours.adapter[key], tensor, rtol=0, atol=1e-5)


def test_a_prefix_that_rows_share_is_encoded_once_a_batch_even_without_room(monkeypatch):
    monkeypatch.setattr(prefix_cache, "MAX_CACHED_BYTES", 1)
    encoded = []

    def encode(several):
        encoded.append(several)
        caches = [prefix_cache.DynamicCache() for _ in several]
        for ids, cache in zip(several, caches, strict=True):
            cache.update(torch.zeros(1, 1, len(ids), 4), torch.zeros(1, 1, len(ids), 4), 0)
        return caches

    prefixes = prefix_cache.PrefixCache(encode)
    rows = [Tokens([1, 2, 7, 8], [-100, -100, -100, 8], 2), Tokens([3, 7, 8], [-100, -100, 8], 1)]
    first, second = (prefixes.features(row, "frozen")["prefix"][0] for row in rows)
    for row in rows:
        prefixes.features(row, "frozen")
    prefixes.inputs_of_tokens(torch.tensor([[first, first], [second, -1], [first, -1]]))
    assert encoded == [[(1, 2)], [(3,)]]


def test_cores_of_two_parents_are_off_in_the_prefix_each_beside_their_own(tmp_path):
    """A prefix is encoded while a route is open, which is afterwards as before, parents included."""
    args = config(tmp_path, estimator="bootstrap", profile_pass="frozen", max_steps=2)

    def engine(slots):
        return SlotTrainer(toy_base(), toys.toy_tokenizer("chatml"), args, LoraConfig(**LORA), slots, core=True)

    two = engine(2)
    parents = [stirred(two.model.fresh(seed), seed) for seed in range(2)]
    jobs = [UserJob(f"user{u}", pairs_of(u, 3, "frozen"), adapter=parents[u]) for u in range(2)]
    together = run(two, jobs)
    held_out = [ScoringJob("user0", pair.factual) for pair in pairs_of(2, 2, "frozen")]
    for slot, job in enumerate(jobs):
        engine_alone = engine(1)
        alone = run(engine_alone, [job])[job.user]
        assert together[job.user].error is None
        for name, tensor in alone.adapter.items():
            torch.testing.assert_close(together[job.user].adapter[name], tensor, rtol=0, atol=1e-5)
        scored = []
        for trainer, place in ((two, slot), (engine_alone, 0)):
            with trainer.model.route.everything_to(place):
                base, prefixes = trainer.model.base, trainer.prefixes
                scored.append(cached_log_probs(base, held_out, None, None, "", True, prefixes).log_probs)
        for values, expected in zip(*scored, strict=True):
            torch.testing.assert_close(values, expected, rtol=0, atol=1e-4)
