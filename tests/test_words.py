"""Counts read as a person would say them."""

from perce_lite.words import counted


def test_one_is_not_many():
    assert counted(1, "user") == "1 user"
    assert counted(5, "user") == "5 users"
    assert counted(0, "row") == "0 rows"
    assert [counted(count, "query", "queries") for count in (1, 2)] == ["1 query", "2 queries"]
    assert [counted(count, "user has", "users have") for count in (1, 2)] == ["1 user has", "2 users have"]
