"""Several prompts in one batch get the answers that each gets alone."""

import pytest

from perce_lite.model import adapter_files, generate
from perce_lite.model.generate import LoadedAdapter, Personal, generate_batch, generate_several, load_adapter

pytest_plugins = ["cli_fixtures"]

ASKED = [
    ([{"role": "user", "content": "Write a note about the garden."}], "An otter swam under the old bridge at noon."),
    ([{"role": "user", "content": "A note."}], ""),
    ([{"role": "user", "content": "Write a long and careful note about the river and the rain."}], "Rain at noon."),
]


@pytest.fixture
def its(adapter_folder) -> LoadedAdapter:
    return load_adapter(adapter_files.read_metadata(adapter_folder))


def alone(its: LoadedAdapter, **options) -> list[list[str]]:
    return [generate_several(its.model, its.maker, *each, 12, options.pop("count", 1), **options) for each in ASKED]


@pytest.mark.parametrize("use_adapter", [True, False])
def test_prompts_of_any_length_are_answered_as_alone(its, use_adapter):
    answers = generate_batch(its.model, its.maker, ASKED, 12, use_adapter=use_adapter)
    assert answers == alone(its, use_adapter=use_adapter)
    assert len({answer for [answer] in answers}) > 1, "the prompts have different answers"


def test_each_prompt_gets_its_own_draws(its):
    likeliest = {"do_sample": True, "top_k": 1}
    several = generate_batch(its.model, its.maker, ASKED, 12, 2, **likeliest)
    assert several == [[answer] * 2 for [answer] in alone(its)]


@pytest.mark.parametrize("reason", ["frozen", "personal"])
def test_one_after_another_where_a_batch_cannot_be_had(its, reason, monkeypatch):
    asked = [each for each in ASKED if each[1]]
    personal = Personal(3.0) if reason == "personal" else None
    its.maker.frozen_profile = reason == "frozen"
    wanted = [generate_several(its.model, its.maker, *each, 12, 1, personal=personal) for each in asked]
    sizes, real = [], generate._decoded
    monkeypatch.setattr(generate, "_decoded", lambda *a: sizes.append(len(a[2])) or real(*a))
    assert generate_batch(its.model, its.maker, asked, 12, personal=personal) == wanted
    assert sizes == [1, 1]
