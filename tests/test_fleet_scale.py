"""What a fleet of many users costs, in counts: indices, hashes, rows in memory; and that rows by user are the rows."""

import gc
from pathlib import Path

import pytest
from fleet_fixtures import TEXT, Clock, rows_of

from perce_lite.data import retrieval
from perce_lite.data.documents import CHOICE, deciding, from_documents
from perce_lite.data.readers import RowsByUser, read_rows
from perce_lite.data.rows import Row
from perce_lite.files import digest
from perce_lite.fleet import fleet as fleets
from perce_lite.fleet.fleet import fleet
from perce_lite.fleet.registry import BY_CONTENT, opened
from perce_lite.recipe import Profile, load_recipe

pytest_plugins = ["cli_fixtures"]


def documents(users: int, texts: int = 8) -> list[dict]:
    """Texts of `users` in turn, as a log of commits has them."""
    return [
        {"user": f"user{user}", "query": f"say {text} of {user}", "text": f"text {text} by {user}", "idx": text}
        for text in range(texts)
        for user in range(users)
    ]


@pytest.mark.parametrize("split", ["{}", "{by: user, unseen_users: 0.3}", "{by: time, unseen_users: 0.3}"])
def test_rows_by_user_are_the_rows_of_documents(recipe, split):
    loaded = load_recipe(recipe(documents(10), TEXT + f"split: {split}\n"))
    with RowsByUser(loaded) as data:
        assert data.rows_of(*data.users) == read_rows(loaded)


@pytest.mark.parametrize("split", ["{by: row}", "{by: user}", "{by: time}", "{unseen_users: 0.3}"])
def test_rows_by_user_are_the_rows_whatever_order_they_stand_in(recipe, split):
    """Rows of several users in turn, profiles of items: the file's order comes back, a user's rows alone as well."""
    items = [{"title": f"t{number}", "text": f"words {number} and {number * 7 % 5}"} for number in range(6)]
    rows = [
        {"user": f"user{number % 5}", "profile": items, "prompt": f"words {number}", "completion": f"done {number}"}
        for number in range(40)
    ]
    loaded = load_recipe(recipe(rows, TEXT + f"split: {split}\nprofile: {{top_k: 2}}\n"))
    expected = read_rows(loaded)
    with RowsByUser(loaded) as data:
        assert data.rows_of(*data.users) == expected
        for user in data.users:
            assert data.rows_of(user) == [row for row in expected if row.user == user]
            names = [name for name in data.outline(user).splits if name is not None]
            assert names == [row.split for row in expected if row.user == user]


def test_a_row_of_one_user_changes_no_row_of_another(recipe):
    with RowsByUser(load_recipe(recipe(documents(3), TEXT))) as data:
        before = data.rows_of("user1")
    more = {"user": "user2", "query": "a new one", "text": "of another", "idx": 99}
    with RowsByUser(load_recipe(recipe([*documents(3), more], TEXT))) as data:
        assert data.rows_of("user1") == before


@pytest.mark.parametrize("users", [20, 80])
def test_what_is_due_is_found_without_rows(recipe, monkeypatch, users):
    """Counts, not times: no profile is chosen but to see that there are any, the base's files are hashed twice."""
    indices, alive, hashed = [], [], []
    build, hash_files, enrol_one = retrieval.Bm25Index.__init__, fleets.source_fingerprint, fleets.run_fingerprint

    def counted(self, texts):
        indices.append(len(texts))
        build(self, texts)

    def watched(group, *more):
        alive.append(sum(isinstance(entry, Row) for entry in gc.get_objects()))
        return enrol_one(group, *more)

    gc.collect()
    before = sum(isinstance(entry, Row) for entry in gc.get_objects())
    monkeypatch.setattr(retrieval.Bm25Index, "__init__", counted)
    monkeypatch.setattr(fleets, "source_fingerprint", lambda recipe: hashed.append(recipe) or hash_files(recipe))
    monkeypatch.setattr(fleets, "run_fingerprint", watched)
    path = recipe(documents(users), TEXT)
    result = fleet(load_recipe(path), Clock(), dry_run=True)
    assert result.due == {"user": users, "cohort": 0, "all": 1}
    assert len(indices) == 1
    assert len(hashed) <= 2, "whatever the number of users"
    assert max(alive) == before, "no row is alive"
    fleet(load_recipe(path), Clock())
    for changes, due in ([], 0), (["lora.r=4"], users):
        indices.clear()
        assert fleet(load_recipe(path, changes), Clock(), dry_run=True).due["user"] == due
        assert len(indices) == 1


@pytest.mark.parametrize(
    "change",
    [{"text": "another text"}, {"query": "say otherwise"}, {"title": "a title"}, {"idx": 7.5}],
)
def test_a_changed_document_makes_its_author_due(recipe, change):
    texts = documents(3)
    fleet(load_recipe(recipe(texts, TEXT)), Clock())
    [place] = [place for place, text in enumerate(texts) if (text["user"], text["idx"]) == ("user1", 1)]
    beside = [{**text, "likes": 3, "id": str(place)} for place, text in enumerate(texts)]
    assert sum(fleet(load_recipe(recipe(beside, TEXT)), Clock(), dry_run=True).due.values()) == 0
    texts[place] = {**texts[place], **change}
    assert fleet(load_recipe(recipe(texts, TEXT)), Clock(), dry_run=True).due == {"user": 1, "cohort": 0, "all": 0}


@pytest.mark.parametrize("users", [20, 80])
def test_of_data_in_rows_one_users_are_alive_at_once(recipe, monkeypatch, users):
    alive, enrol_one = [], fleets.run_fingerprint

    def watched(group, *more):
        alive.append(sum(isinstance(entry, Row) for entry in gc.get_objects()))
        return enrol_one(group, *more)

    path = recipe(rows_of(users, per_user=8), TEXT)
    gc.collect()
    before = sum(isinstance(entry, Row) for entry in gc.get_objects())
    monkeypatch.setattr(fleets, "run_fingerprint", watched)
    assert fleet(load_recipe(path), Clock(), dry_run=True).due["user"] == users
    assert max(alive) - before <= 3 * 8


def test_one_new_text_makes_one_user_due(recipe):
    texts = documents(6)
    fleet(load_recipe(recipe(texts, TEXT)), Clock())
    assert sum(fleet(load_recipe(recipe(texts, TEXT)), Clock(), dry_run=True).due.values()) == 0
    more = {"user": "user3", "query": "one more", "text": "a new text", "idx": 99}
    assert fleet(load_recipe(recipe([*texts, more], TEXT)), Clock(), dry_run=True).due == {
        "user": 1, "cohort": 0, "all": 0,
    }  # fmt: skip


@pytest.mark.parametrize("earlier_by", ["document", "month"])
def test_rows_are_made_of_nothing_that_does_not_decide(earlier_by):
    """A field that `from_documents` reads and `deciding` does not would change rows, and nobody would be due."""
    read = set()

    class Noted(dict):
        def get(self, key, default=None):
            read.add(key)
            return super().get(key, default)

        def __getitem__(self, key):
            read.add(key)
            return super().__getitem__(key)

    texts = [{"user": "ann", "query": "q", "text": f"text {day}", "date": f"2024-0{day}-01"} for day in (1, 2, 3)]
    for idx in ({}, {"idx": 1}):
        records = [("a file", None, Noted({**text, **idx})) for text in texts]
        from_documents(records, Profile(earlier_by=earlier_by))
    other = {
        "text": "else", "query": "else", "title": "else", "date": "2025-09-01", "idx": 9, "split": "test",
        "temporal_split": "test", "cohort": "c", "user_held_out": True, "part_of": "a whole", "user": "bo",
    }  # fmt: skip
    assert read == other.keys(), "a field that rows are made of is new: `deciding` has to know it"
    rule = Profile(earlier_by=earlier_by)
    for field, value in other.items():
        numbered = [{**text, "idx": number} for number, text in enumerate(texts)] if field == "idx" else texts
        changed = [{**numbered[0], field: value}, *numbered[1:]]
        before, after = ([("f", None, text) for text in made] for made in (numbered, changed))
        assert (deciding(before, rule) != deciding(after, rule)) == (field != "user"), field


def test_the_order_of_lines_and_the_way_numbers_are_written_make_nobody_due(recipe):
    texts = documents(3)
    fleet(load_recipe(recipe(texts, TEXT)), Clock())
    other = [{**text, "idx": text["idx"] + 1.0} for text in reversed(texts)]
    assert sum(fleet(load_recipe(recipe(other, TEXT)), Clock(), dry_run=True).due.values()) == 0


def test_the_same_documents_make_the_same_rows():
    """Adapters are kept for as long as this holds: if it fails, raise `documents.CHOICE` and change what is here."""
    words = ["red boats in the harbour", "a boat", "harbour lights", "green hills", "boats and lights", "the red hills"]
    texts = [
        {"user": "ann", "query": f"on {text}", "text": f"{text}, she wrote", "idx": n} for n, text in enumerate(words)
    ]
    rows = from_documents([("a file", None, text) for text in texts], Profile(select="bm25", top_k=2))
    chosen = [[words.index(item.text.removesuffix(", she wrote")) for item in row.profile] for row in rows]
    assert (CHOICE, chosen) == (1, [[], [0], [0, 1], [2, 1], [2, 0], [0, 3]])


def test_a_registry_of_before_stays_up_to_date(recipe):
    """An earlier version's fingerprints are those of rows with their profiles: nobody is trained anew by an upgrade."""
    texts = documents(3)
    loaded = load_recipe(recipe(texts, TEXT))
    fleet(loaded, Clock())
    rows = read_rows(loaded)
    with opened(Path("out")) as registry:
        shared = registry.get("all", "all")
        for user in ("user0", "user1", "user2"):
            own = [row.fingerprint() for row in rows if row.user == user]
            source = f"{loaded.of_users().fleet_fingerprint()} {fleets.source_fingerprint(loaded)}"
            run = digest([source, ("user", user), "0", shared.run, own])
            assert run != registry.get("user", user).run
            registry._db.execute("UPDATE adapters SET run = ?, trained_run = ? WHERE name = ?", (run, run, user))
        registry._db.execute("DELETE FROM meta WHERE key = ?", (BY_CONTENT,))
        registry._db.commit()
    assert sum(fleet(loaded, Clock(), dry_run=True).due.values()) == 0
    with opened(Path("out")) as registry:  # one was interrupted: it goes on as what it was begun as
        registry._db.execute("UPDATE adapters SET trained_run = NULL WHERE name = 'user2'")
        registry._db.commit()
        begun = registry.get("user", "user2").run
    begun_again = []
    fleet(loaded, Clock(), report=lambda result: begun_again.append(result) if result else None)
    with opened(Path("out")) as registry:
        assert registry.get("user", "user2").trained_run == begun
    assert [result.name for result in begun_again if result.name != "all"] == ["user2"]
    more = {"user": "user1", "query": "one more", "text": "a new text", "idx": 99}
    assert fleet(load_recipe(recipe([*texts, more], TEXT)), Clock()).trained == 1
    assert sum(fleet(load_recipe(recipe([*texts, more], TEXT)), Clock(), dry_run=True).due.values()) == 0
