"""`--personal`: each token is that of the contrast, computed here without caches; what cannot be contrasted is told."""

import pytest
import torch

from perce_lite.cli.conversation import Conversation, talk
from perce_lite.errors import DataError
from perce_lite.evaluation.bench import generating
from perce_lite.model import adapter_files
from perce_lite.model.answering import Answerer
from perce_lite.model.generate import LoadedAdapter, Personal, generate, generate_several, load_adapter
from perce_lite.model.personal_decoding import PersonalContrast
from perce_lite.model.scoring import encode_prefix

pytest_plugins = ["cli_fixtures"]

PROMPT = [{"role": "user", "content": "Write a note about the garden."}]
PROFILE = "An otter swam under the old bridge at noon."


@pytest.fixture
def its(adapter_folder) -> LoadedAdapter:
    return load_adapter(adapter_files.read_metadata(adapter_folder))


@torch.no_grad()
def by_hand(its: LoadedAdapter, strength: float, adapters_off: bool, tokens: int) -> str:
    """Greedy decoding of the contrast, both prompts read anew for each token, float64 from the logits on."""
    model = its.model.eval()
    ids, other = its.maker.prompt_ids(PROMPT, PROFILE), its.maker.prompt_ids(PROMPT, "")
    said: list[int] = []
    for _ in range(tokens):
        factual = model(torch.tensor([ids + said])).logits[0, -1].double().log_softmax(-1)
        if adapters_off:
            with model.disable_adapter():
                counterfactual = model(torch.tensor([other + said])).logits[0, -1].double().log_softmax(-1)
        else:
            counterfactual = model(torch.tensor([other + said])).logits[0, -1].double().log_softmax(-1)
        scores = factual + strength * (factual - counterfactual)
        scores[factual.exp() < 0.1 * factual.exp().max()] = -torch.inf
        token = int(scores.argmax())
        said.append(token)
        if token in its.maker.stop_ids():
            break
    return str(its.maker.tokenizer.decode(said, skip_special_tokens=True)).strip()


def test_answers_are_those_of_the_contrast_token_by_token(its):
    said = {}
    for adapters_off in (True, False):
        for strength in (0.5, 3.0):
            personal = Personal(strength, adapters_off)
            said[adapters_off, strength] = generate(its.model, its.maker, PROMPT, PROFILE, 12, personal=personal)
            assert said[adapters_off, strength] == by_hand(its, strength, adapters_off, 12), (adapters_off, strength)
    plain = generate(its.model, its.maker, PROMPT, PROFILE, 12)
    assert (
        generate(its.model, its.maker, PROMPT, PROFILE, 12, personal=Personal(0.0)) == plain == by_hand(its, 0, 1, 12)
    )
    assert len({*said.values(), plain}) > 2, "the contrast chooses other tokens"


def test_an_adapter_that_is_off_for_the_profile_is_contrasted_too(its):
    """The pass with the profile starts from a KV cache of the base; the contrast stays that of both prompts."""
    its.maker.frozen_profile = True
    plain = generate(its.model, its.maker, PROMPT, PROFILE, 12)
    personal = generate(its.model, its.maker, PROMPT, PROFILE, 12, personal=Personal(3.0))
    assert personal != plain
    likeliest = {"do_sample": True, "top_k": 1}
    three = generate_several(its.model, its.maker, PROMPT, PROFILE, 12, 3, personal=Personal(3.0), **likeliest)
    assert three == [personal] * 3


@torch.no_grad()
def test_the_same_adapter_is_off_for_the_prefix_in_both_passes(its):
    """`bootstrap`, `profile_pass: frozen`: without the profile too the base reads what stands ahead of the query."""
    its.maker.frozen_profile = True
    model, tokens = its.model.eval(), its.maker.prompt(PROMPT, "")
    assert 0 < tokens.prefix_length < len(tokens.ids)
    contrast = PersonalContrast(model, tokens, 1.0, adapters_off=False)
    cache = encode_prefix(model, tokens.prefix_ids, None)
    following = torch.tensor([tokens.after_prefix.ids])
    expected = model(input_ids=following, past_key_values=cache, use_cache=True).logits[:, -1]
    said = contrast._without_profile(torch.tensor([tokens.ids] * 2))
    torch.testing.assert_close(said, expected.expand(2, -1), rtol=0, atol=1e-5)
    awake = model(torch.tensor([tokens.ids])).logits[:, -1]
    assert (awake - expected).abs().max() > 1e-3, "which way is told apart"


@torch.no_grad()
def test_implausible_tokens_are_never_drawn(its):
    """Whatever the strength, a token needs a tenth of the likeliest one's probability."""
    contrast = PersonalContrast(its.model.eval(), its.maker.prompt(PROMPT, ""), 50.0, adapters_off=True)
    ids = torch.tensor([its.maker.prompt_ids(PROMPT, PROFILE)] * 2)
    for _ in range(4):
        logits = its.model(ids).logits[:, -1]
        drawn = contrast(ids, logits).softmax(-1)
        likely = logits.softmax(-1) >= 0.1 * logits.softmax(-1).amax(-1, keepdim=True)
        assert torch.equal(drawn > 0, likely & (drawn > 0))
        assert torch.equal(contrast(ids, logits).isfinite(), likely)
        contrast.cache.crop(-1)  # the second call has read the last token again
        ids = torch.cat([ids, drawn.multinomial(1)], dim=1)


def test_without_a_profile_it_is_one_error(its, adapter_folder, run):
    with pytest.raises(DataError, match="no profile in the prompt to lean on"):
        generate(its.model, its.maker, PROMPT, "", 3, personal=Personal(0.5))
    with pytest.raises(DataError, match="leave num_beams out"):
        generate(its.model, its.maker, PROMPT, PROFILE, 3, personal=Personal(0.5), num_beams=2)
    words = ("generate", "--adapter", adapter_folder, "--prompt", "Hello?", "--personal", "0.5")
    code, _, err = run(*words, "--no-profile")
    assert code == 2
    assert "Give --profile TEXT" in " ".join(err.split())
    assert run(*words[:-1], "-1", "--profile", PROFILE)[0] == 2
    code, out, err = run(*words, "--profile", PROFILE, "--max-new-tokens", "12")
    assert code == 0, err
    plain = run(
        "generate", "--adapter", adapter_folder, "--prompt", "Hello?", "--profile", PROFILE, "--max-new-tokens", "12"
    )
    assert out != plain[1]


def test_a_chat_sets_it_and_keeps_it(its, capfd):
    told: list[str] = []
    conversation = Conversation(Answerer(its), 12, told.append, profile=PROFILE)
    talk(conversation, ["/personal", "/personal 3", "Write a note about the garden.", "/personal much", "/personal"])
    assert conversation.turns[0][1] == by_hand(its, 3.0, True, 12)
    assert [line.split()[-1].strip(".") for line in told] == ["0", "3", "0.5", "3"]
    assert "give a number of at least 0" in told[2]
    talk(conversation, ["/profile none", "And the harbour?"])
    assert "there is no profile" in told[-1]
    assert len(conversation.turns) == 1


def test_the_bench_measures_answers_of_equal_length(recipe, run, figures, monkeypatch):
    lengths: list[tuple[float, int]] = []
    real = generating.generate

    def generate(model, maker, prompt, profile, length, **options):
        lengths.append((options["personal"].strength, options["min_new_tokens"]))
        return real(model, maker, prompt, profile, length, **options)

    monkeypatch.setattr(generating, "generate", generate)
    told = figures("bench", recipe(), "--generation", "--repeats", "2")
    assert lengths.count((0.5, 48)) == lengths.count((0.0, 48)) == 3 * 4  # a warm-up and two repeats, four queries
    assert len(told["ratios"]) == 2
    assert told["met"] == (told["ratio"] <= 2.1)
    code, _, err = run("bench", recipe(), "--generation", "--arms", "base")
    assert code == 2
    assert "--arms has no part in --generation" in " ".join(err.split())
