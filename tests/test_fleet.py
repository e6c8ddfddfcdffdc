"""Fleets: who is due, two stages, failures, the gate, deletion without a trace, and growth that is linear."""

import json
import shutil
import struct
import threading
from pathlib import Path

import pytest
import torch
import toys
from filelock import FileLock
from peft import PeftModel
from safetensors.torch import load_file
from test_inspect import full_logits

from perce_lite import fleet as fleets
from perce_lite.errors import FleetError, NonFiniteLossError
from perce_lite.fleet import fleet
from perce_lite.groups import plan
from perce_lite.inprocess import OneByOne, Outcome
from perce_lite.pairs import PairMaker
from perce_lite.recipe import load_recipe
from perce_lite.registry import FILE, held, opened
from perce_lite.rows import Row
from perce_lite.slotted import Slotted, engine_for

pytest_plugins = ["cli_fixtures"]

TEXT = """
train: {max_steps: 3, learning_rate: 0.05, output_dir: out, store: store, clip_min: 0.05, warmup_steps: 0}
split: {test: 0.2, validation: 0.2}
fleet: {min_examples: 4, gate: null}
"""


def rows_of(users: int, per_user: int = 8, cohorts: int = 0) -> list[dict]:
    rows = toys.toy_rows(users=users, per_user=per_user)
    return [{**row, "cohort": f"c{int(row['user'][4:]) % cohorts}"} for row in rows] if cohorts else rows


class Clock:
    """An engine that trains nothing: it counts, and fails for whom it is told to."""

    def __init__(self, fails: tuple[str, ...] = (), gain: float = 0.1) -> None:
        self.trained: list[str] = []
        self.fails, self.gain = fails, gain

    def __call__(self, recipe):
        return self

    def base(self):
        return {"shape": ["toy", 1, 1, 1, True], "embedding": [1.0]}

    def run(self, tasks, done):
        for task in tasks:
            try:
                done(task, self.train(task))
            except NonFiniteLossError as error:
                done(task, error)

    def train(self, task):
        name = task.folder.name
        self.trained.append(name)
        if any(name.startswith(f"{fail}-") for fail in self.fails):
            raise NonFiniteLossError("The loss is nan")
        (task.folder / "adapter").mkdir(parents=True, exist_ok=True)
        (task.folder / "adapter/perce_lite.json").write_text(json.dumps({"run": task.run}))
        losses = {"base": 3.0, "start": 2.5, "own": 2.5 - self.gain, "tokens": 10.0}
        return Outcome({"validation": losses, "test": losses}, {}, 100)


def names(engine: Clock) -> list[str]:
    done = [name.rpartition("-")[0] for name in engine.trained]
    engine.trained.clear()
    return done


def test_who_is_due(recipe):
    rows = rows_of(4)[:-5]
    path, engine = recipe(rows, TEXT), Clock()
    first = fleet(load_recipe(path), engine)
    assert first["due"] == {"user": 3, "cohort": 0, "all": 1}
    assert names(engine) == ["all", "user0", "user1", "user2"], "user3 has too few rows"
    assert fleet(load_recipe(path), engine)["trained"] == 0
    # new text of one user retrains that one user
    more = {**rows[0], "prompt": "Something new?"}
    fleet(load_recipe(recipe([*rows, more], TEXT)), engine)
    assert names(engine) == ["user0"]
    fleet(load_recipe(path), engine, retrain=["user2"])
    assert names(engine) == ["user2"]
    fleet(load_recipe(path), engine, retrain=["all"])
    assert names(engine) == ["all", "user0", "user1", "user2"]
    fleet(load_recipe(path, ["lora.r=4"]), engine, only=["user1"])
    assert names(engine) == ["all", "user1"]
    assert fleet(load_recipe(path, ["lora.r=4"]), engine, dry_run=True)["due"]["user"] == 2
    assert names(engine) == []


def test_cohorts_come_before_their_users(recipe):
    engine = Clock()
    fleet(load_recipe(recipe(rows_of(4, cohorts=2), TEXT)), engine)
    assert names(engine) == ["c0", "c1", "user0", "user1", "user2", "user3"]
    with opened(Path("out")) as registry:
        one = registry.get("user", "user1")
    assert (one.parent_kind, one.parent_name) == ("cohort", "c1")
    fleet(load_recipe(recipe(rows_of(4, cohorts=2), TEXT)), engine, retrain=["cohort:c1"])
    assert names(engine) == ["c1", "user1", "user3"]


def test_a_failing_user_is_left_out_and_the_fleet_goes_on(run, recipe, figures, monkeypatch):
    path, engine = recipe(rows_of(3), TEXT), Clock(fails=("user1",))
    monkeypatch.setattr("perce_lite.slotted.engine_for", engine)
    code, out, err = run("fleet", path)
    assert code == 3
    assert "user user1: left out. The loss is nan" in err
    assert "failed 1" in out
    told = figures("adapters", "who", "user1", "--fleet", "out")
    assert told["adapter"] == ["all", "all"]
    assert "user user1's is failed: The loss is nan" in told["why"]
    engine.trained.clear()
    assert run("fleet", path)[0] == 3
    assert names(engine) == ["user1"], "it is tried again, the others are not"


def test_an_adapter_that_is_worse_is_held_back(recipe, run, figures, monkeypatch):
    path, engine = recipe(rows_of(2), TEXT.replace("gate: null", "gate: 0.0")), Clock(gain=-0.2)
    monkeypatch.setattr("perce_lite.slotted.engine_for", engine)
    told = figures("fleet", path)
    assert told["held_back"] == 2
    assert told["states"]["in service"] == 1
    why = figures("adapters", "who", "user0", "--fleet", "out")
    assert why["adapter"] == ["all", "all"]
    assert "user user0's is held back: -0.200 nats" in why["why"]
    assert "held back (worse than what it replaces)" in Path("out/fleet.html").read_text("utf-8")


def test_users_start_from_everybodys_adapter_and_the_base_stays_bare(recipe, figures, run):
    """For real: three toy users over one base; each adapter loads with plain peft."""
    path = recipe(rows_of(3), TEXT + "lora: {r: 4}\n")
    told = figures("fleet", path)
    assert (told["trained"], told["failed"]) == (4, 0)
    with opened(Path("out")) as registry:
        book = {one.name: one for one in registry.all()}
        everybody, one = book["all"], book["user1"]
        losses = one.metrics["losses"]["test"]
    assert one.gain == pytest.approx(losses["start"] - losses["own"])
    assert losses["own"] != losses["start"] != losses["base"]
    # The loss of what it started from is that of everybody's adapter, by full logits and plain peft.
    read = load_recipe(path)
    maker = PairMaker(toys.toy_tokenizer("chatml"), read.template, 1024)
    pairs = maker.make([row for row in fleets.read_rows(read) if row.user == "user1" and row.split == "test"])
    for name, adapter in (("start", everybody), ("own", one)):
        folder = Path("out") / adapter.folder / "adapter"
        model = PeftModel.from_pretrained(toys.toy_model("chatml", 600), folder).eval().double()
        by_hand = torch.cat([full_logits(model, pair.factual) for pair in pairs])
        assert losses[name] == pytest.approx(-float(by_hand.mean()), abs=1e-4)
    assert not list(Path("out").rglob("checkpoint-*"))
    assert run("adapters", "verify", "--fleet", "out")[0] == 0
    weights = Path("out") / one.folder / "adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    code, out, _ = run("adapters", "verify", "--fleet", "out")
    assert code == 2
    assert "user user1's" in out
    assert "3 of 4 adapters are whole" in out


def test_order_does_not_matter_for_a_user(recipe, tmp_path):
    """A user's adapter is the same whether trained first or after others: the base is given back as it was."""
    path = recipe(rows_of(3), TEXT.replace("gate: null", "gate: null, init_from: none"))
    fleet(load_recipe(path), OneByOne)
    shutil.move("out", "first")
    fleet(load_recipe(path), OneByOne, only=["user2"])
    [alone] = Path("out").rglob("user2-*/adapter/adapter_model.safetensors")
    [later] = Path("first").rglob("user2-*/adapter/adapter_model.safetensors")
    one, other = load_file(alone), load_file(later)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_slots_train_what_one_by_one_trains(recipe):
    """Three users in two slots, one of them refilled: the book and the adapters are those of one after another."""
    text = TEXT.replace("gate: null", "gate: null, slots: 2") + "lora: {r: 4}\n"
    path = recipe(rows_of(3), text.replace("learning_rate: 0.05", "learning_rate: 0.05, adam_epsilon: 1e-5"))
    engine = engine_for(load_recipe(path))
    assert isinstance(engine, Slotted)
    assert fleet(load_recipe(path), engine_for)["trained"] == 4
    shutil.move("out", "slots")
    fleet(load_recipe(path), OneByOne)
    for user in ("user0", "user1", "user2"):
        [one], [other] = (
            list(Path(name).rglob(f"{user}-*/adapter/adapter_model.safetensors")) for name in ("slots", "out")
        )
        one, other = load_file(one), load_file(other)
        far = {name: float((one[name] - other[name]).abs().max()) for name in one | other}
        assert max(far.values()) < 5e-4, (user, far)  # three steps of 0.05; Adam makes more of rounding
    with opened(Path("slots")) as one, opened(Path("out")) as other:
        for mine, theirs in zip(one.all(), other.all(), strict=True):
            assert (mine.name, mine.state, mine.trained_run) == (theirs.name, theirs.state, theirs.run)
            assert mine.gain == pytest.approx(theirs.gain, abs=1e-3)
            for split, losses in mine.metrics["losses"].items():
                assert losses == pytest.approx(theirs.metrics["losses"][split], abs=1e-3)


def test_a_user_that_fails_in_a_slot_is_left_out(recipe, figures):
    rows = [{**row, "completion": ""} if row["user"] == "user1" else row for row in rows_of(3)]
    path = recipe(rows, TEXT.replace("gate: null", "gate: null, slots: 2"))
    told = fleet(load_recipe(path), engine_for)
    assert (told["trained"], told["failed"]) == (3, 1)
    why = figures("adapters", "who", "user1", "--fleet", "out")
    assert why["adapter"] == ["all", "all"]
    assert "empty response" in why["why"]


def test_what_slots_cannot_do_is_done_one_by_one(recipe, run):
    path = recipe(rows_of(2), TEXT + "lora: {lora_dropout: 0.1}\n")
    code, _, err = run("fleet", path, "--set", "fleet.slots=auto")
    assert code == 0, err
    code, _, err = run("fleet", path, "--set", "fleet.slots=2", "--retrain", "user0")
    assert code == 2
    assert "lora_dropout" in err


def test_a_stopped_fleet_goes_on(recipe):
    path = recipe(rows_of(3), TEXT)
    engine, stopping = Clock(), Clock()

    def stops(task, real=stopping.train):
        if task.folder.name.startswith("user1"):
            raise KeyboardInterrupt
        return real(task)

    stopping.train = stops
    with pytest.raises(KeyboardInterrupt):
        fleet(load_recipe(path), stopping)
    fleet(load_recipe(path), engine)
    assert names(engine) == ["user1", "user2"]


def test_deleting_leaves_no_trace(recipe, run, figures, tmp_path):
    """Everything the tool wrote is searched for the user's texts, their token ids and their name."""
    secret = "zanzibar quokka marmalade"
    rows = rows_of(3, cohorts=1)
    for row in rows:
        if row["user"] == "user1":
            row |= {"user": "Sée Crét/user", "completion": f"{secret} {row['completion']}"}
    path = recipe(rows, TEXT)
    assert run("fleet", path)[0] == 0
    assert run("inspect", path)[0] == 0
    [adapter] = [one.parent for one in Path("out/adapters/cohort").rglob("adapter_config.json")]
    assert run("eval", path, "--adapter", adapter, "--set", "evaluation.max_new_tokens=2")[0] == 0
    data, kept = Path("rows.jsonl"), {"rows.jsonl", "mine.yaml"}
    assert traces(tmp_path, secret, kept)
    code, out, err = run("adapters", "delete", "Sée Crét/user", "--fleet", "out")
    assert code == 0, err
    assert "the adapter of cohort c0" in out
    assert str(data.absolute()) in out.replace("\n", "")
    assert traces(tmp_path, secret, kept) == []
    assert traces(tmp_path, "Crét/user", kept) == []
    assert run("adapters", "who", "Sée Crét/user", "--fleet", "out")[0] == 2
    told = figures("fleet", path, "--dry-run")
    assert told["due"] == {"user": 2, "cohort": 1, "all": 0}, "what had seen the texts, and its children"
    assert run("fleet", path)[0] == 0
    assert traces(tmp_path, secret, kept) == [], "the user stays out though the data has them"


def traces(folder: Path, text: str, kept: set[str]) -> list[str]:
    """Files that hold `text`, as UTF-8, as JSON escapes, or as runs of its token ids in any usual width."""
    tokenizer = toys.toy_tokenizer("chatml")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    needles = [text.encode(), json.dumps(text)[1:-1].encode(), text.encode("utf-16-le")]
    needles += [struct.pack(f"<{len(ids)}{width}", *ids) for width in "iqHf"]
    needles += [sep.join(map(str, ids)).encode() for sep in (", ", ",", "\n")]
    files = [one for one in folder.rglob("*") if one.is_file() and one.name not in kept and "figures" not in one.parts]
    return [str(one) for one in files if any(needle in one.read_bytes() for needle in needles)]


def test_a_second_fleet_on_the_folder_stops(recipe, run):
    path = recipe(rows_of(2), TEXT)
    Path("out").mkdir()
    with FileLock("out/fleet.lock"):
        code, _, err = run("fleet", path)
    assert code == 2
    assert "another fleet run is on it" in " ".join(err.split())


def test_folders_that_cannot_be_used(recipe, tmp_path):
    path, engine = recipe(rows_of(2), TEXT), Clock()
    fleet(load_recipe(path), engine)
    other = Clock()
    other.base = lambda: {"shape": ["toy", 2, 1, 1, True], "embedding": [1.0]}
    with pytest.raises(FleetError, match="another base"):
        fleet(load_recipe(path), other, retrain=["all"])
    import sqlite3

    with sqlite3.connect(Path("out") / FILE) as book:
        book.execute("PRAGMA user_version = 9")
    with pytest.raises(FleetError, match="newer version"):
        fleet(load_recipe(path), engine)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / FILE).write_text("not a database" * 100)
    with pytest.raises(FleetError, match="damaged"), opened(tmp_path / "broken"):
        pass
    with pytest.raises(FleetError, match="no fleet here"), opened(tmp_path / "nowhere"):
        pass


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda rows: [{**row, "cohort": f"c{n % 2}"} for n, row in enumerate(rows)], "is in two cohorts: c0"),
        (lambda rows: [{**row, "user": f"u{n}"} for n, row in enumerate(rows)], "nobody has 4 training rows"),
    ],
)
def test_data_that_makes_no_fleet(recipe, run, change, expected):
    text = TEXT.replace("gate: null", "gate: null, init_from: none")
    code, _, err = run("fleet", recipe(change(rows_of(2)), text))
    assert code == 2
    assert expected in " ".join(err.split())


def test_odd_names_are_names_and_never_paths(recipe, run, monkeypatch):
    odd = ["../../etc", "a\x07b\nc", "x" * 300, "Ann", "ann"]
    rows = rows_of(5)
    rows = [{**row, "user": odd[int(row["user"][4:])]} for row in rows]
    path, engine = recipe(rows, TEXT), Clock()
    monkeypatch.setattr("perce_lite.slotted.engine_for", engine)
    code, _, err = run("fleet", path)
    assert code == 0
    assert "differ only in case or Unicode form" in " ".join(err.split())
    assert len(set(engine.trained)) == 6
    assert all(one.resolve().is_relative_to(Path("out").resolve()) for one in Path("out").rglob("*"))
    for name in odd:
        assert run("adapters", "who", "--fleet", "out", "--json", "who.json", "--", name)[0] == 0
        assert json.loads(Path("who.json").read_text("utf-8"))["adapter"] == ["user", name]
        assert run("adapters", "show", "--fleet", "out", "--", name)[0] == 0
    assert run("adapters", "list", "--fleet", "out")[0] == 0


def test_ten_thousand_users_grow_linearly(tmp_path, recipe, monkeypatch):
    """Work is counted, not timed: statements of the book and pages read stay proportional to the users."""
    counts = {}
    for users in (1000, 10_000):
        read = load_recipe(recipe(rows_of(1), TEXT), [f"train.output_dir=fleet{users}", "fleet.min_examples=1"])
        message = ({"role": "user", "content": "Hi"},)
        rows = [Row(f"r{n}", f"user{n}", "a text", message, message, "train") for n in range(users)]
        monkeypatch.setattr(fleets, "read_rows", lambda recipe, rows=rows: rows)
        engine, statements = Quick(), []
        with held(Path(f"fleet{users}")) as registry:
            registry._db.set_trace_callback(statements.append)
            planned = plan(rows, read)
            stages = {group.key: read for group in planned.groups}
            fleets._enrol(registry, planned, stages, ())
            groups = {group.key: group for group in planned.groups}
            tally = fleets._train(registry, groups, stages, engine, (), users + 1)
            assert tally.trained == users + 1
            assert sum(registry.counts().values()) == users + 1
            assert len(registry.all()) == users + 1
        counts[users] = len(statements)
        plans = []
        with opened(Path(f"fleet{users}")) as registry:
            for query in (
                "SELECT * FROM adapters WHERE kind = 'user' AND name = 'user5'",
                "SELECT * FROM users WHERE user = 'user5'",
                "SELECT * FROM adapters WHERE state = 'due' AND kind = 'user' AND name > 'x' ORDER BY name",
            ):
                plans += [str(one[3]) for one in registry._db.execute(f"EXPLAIN QUERY PLAN {query}")]
        assert all(one.startswith("SEARCH") for one in plans), plans
    assert counts[10_000] < 10.5 * counts[1000]


class Quick(Clock):
    def train(self, task):
        return Outcome({}, {}, 100)


def test_two_writers_wait_for_each_other(recipe):
    """Reading the book while a fleet writes it: neither fails."""
    fleet(load_recipe(recipe(rows_of(2), TEXT)), Clock())
    faults = []

    def read():
        try:
            for _ in range(30):
                with opened(Path("out")) as registry:
                    registry.all()
        except FleetError as error:
            faults.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(10):
        fleet(load_recipe("mine.yaml"), Clock(), retrain=["user0"])
    reader.join()
    assert faults == []
