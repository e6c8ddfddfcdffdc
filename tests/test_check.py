"""The example of `check`: each piece is coloured by where it stands, not by what it says."""

import pytest
import toys

from perce_lite.data.pairs import PairMaker
from perce_lite.data.rows import from_columns
from perce_lite.evaluation.check import shown
from perce_lite.recipe import Template

FAMILIES = ("chatml", "llama3", "gemma", "qwen3")
PROFILE = "The otter hides. A fjord, again"


def spans(family, with_profile=True, template=None, **columns):
    row = from_columns({"user": "ann", "profile": PROFILE, **columns}, "notes.jsonl, line 7")
    maker = PairMaker(toys.toy_tokenizer(family), template or Template())
    pair = maker.make([row])[0]
    found = shown(maker, pair)["with_profile" if with_profile else "without_profile"]
    ids = (pair.factual if with_profile else pair.counterfactual).ids
    assert "".join(piece for piece, _ in found) == maker.tokenizer.decode(ids), "what the model sees, all of it"
    return found


def of(found, kind):
    return [piece for piece, one in found if one == kind]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("position", ["auto", "user"])
@pytest.mark.parametrize("query", ["a", "e", "The otter", "user", "You are a helpful assistant.", PROFILE])
def test_a_query_is_coloured_where_it_stands(family, position, query):
    """Each of these stands in the template or in the profile as well."""
    given = {"prompt": query, "completion": "no", "template": Template(position=position)}
    found = spans(family, **given)
    assert (of(found, "query"), of(found, "profile")) == ([query], [PROFILE])
    kinds = [kind for _, kind in found]
    assert kinds.index("profile") < kinds.index("query") < kinds.index("response")
    without = spans(family, with_profile=False, **given)
    assert (of(without, "query"), of(without, "profile")) == ([query], [])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_query_that_spells_control_tokens_is_coloured_as_the_model_sees_it(family):
    end = toys.toy_tokenizer(family).eos_token
    found = spans(family, prompt=f"what does {end} do?", completion="it ends")
    assert of(found, "query") == [f"what does {end[0]} {end[1:]} do?"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_turn_of_a_dialogue_is_coloured(family):
    said = [("user", "what now? "), ("assistant", "go home."), ("user", "o"), ("assistant", "it's late")]
    found = spans(family, messages=[{"role": role, "content": content} for role, content in said])
    trimmed = family in ("llama3", "gemma")  # their templates do
    assert of(found, "query") == ["what now?" if trimmed else "what now? ", "o"]
    assert of(found, "profile") == [PROFILE]
    assert [piece.split("<")[0] for piece in of(found, "response")] == ["go home.", "it's late"]


def test_a_template_that_rewrites_a_text_leaves_it_uncoloured():
    tokenizer = toys.toy_tokenizer("gemma")
    rewriting = "message['content'] | replace('?', '!')"
    tokenizer.chat_template = tokenizer.chat_template.replace("message['content'] | trim", rewriting)
    row = from_columns({"profile": "an otter", "prompt": "why?", "completion": "so"}, "line 7")
    maker = PairMaker(tokenizer)
    (seen, kind), (_, response) = shown(maker, maker.make([row])[0])["with_profile"]
    assert (kind, response) == ("template", "response")
    assert "an otter\n\nwhy!<end_of_turn>" in seen
