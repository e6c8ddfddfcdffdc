"""Who gets an adapter: users, cohorts and all of them together, from the rows and the recipe's `fleet` section."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from perce_lite.console import warn
from perce_lite.data.rows import Row
from perce_lite.errors import DataError
from perce_lite.files import digest, safe_name
from perce_lite.recipe import Recipe

Key = tuple[str, str]
"""(kind, name): ("user", "ann"), ("cohort", "press"), ("all", "all")."""

SHARED: Key = ("all", "all")


@dataclass(frozen=True)
class Group:
    """What one adapter belongs to. `rows` hold its held-out rows too; `parent` is what it starts from."""

    key: Key
    rows: list[Row] = field(repr=False)
    parent: Key | None

    @property
    def examples(self) -> int:
        """Training rows."""
        return sum(row.split == "train" for row in self.rows)

    @property
    def folder(self) -> str:
        """Where its adapter lies in the fleet's folder; no name is ever a path."""
        kind, name = self.key
        return f"adapters/{kind}/{safe_name(name)}"


@dataclass(frozen=True)
class Plan:
    """Groups that get an adapter, and every user: (name, cohort, training rows, whether they get one of their own)."""

    groups: list[Group]
    users: list[tuple[str, str | None, int, bool]]


def plan(rows: Sequence[Row], recipe: Recipe) -> Plan:
    """Which adapters a fleet is to have, those that others start from first.

    Raises:
        DataError: a user in two cohorts; cohorts asked for where the data names none; nobody has rows to train on.
    """
    cohorts = _cohorts(rows)
    rule = recipe.fleet
    examples = Counter(row.user for row in rows if row.split == "train")
    rows = _last(rows, rule.max_examples)
    by_user: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_user[row.user].append(row)
    _warn_of_twins(by_user)
    named = {cohort for cohort in cohorts.values() if cohort is not None}
    if "cohort" in (rule.group_by, rule.init_from) and not named:
        raise DataError("fleet: cohorts are asked for, but no row has a `cohort`; name yours with data.columns.cohort")
    common = "cohort" if named and rule.init_from in ("auto", "cohort") else "all"
    with_parent = rule.init_from != "none"
    groups = []
    if rule.group_by == "all" or (with_parent and (common == "all" or None in cohorts.values())):
        groups.append(Group(SHARED, list(rows), None))
    if rule.group_by == "cohort" or (rule.group_by == "user" and with_parent and common == "cohort"):
        parent = SHARED if rule.group_by == "cohort" and rule.init_from == "all" else None
        for cohort in sorted(named):
            groups.append(Group(("cohort", cohort), [row for row in rows if cohorts[row.user] == cohort], parent))
    own = {user for user in by_user if rule.group_by == "user" and examples[user] >= rule.min_examples}
    for user in sorted(own):
        home = cohorts[user]
        parent = ("cohort", home) if common == "cohort" and home is not None else SHARED
        groups.append(Group(("user", user), by_user[user], parent if with_parent else None))
    groups = [group for group in groups if group.examples]
    if not groups:
        most = max(examples.values(), default=0)
        raise DataError(
            f"fleet: nobody has {rule.min_examples} training rows, as fleet.min_examples asks for; the most is {most}"
        )
    return Plan(groups, [(user, cohorts[user], examples[user], user in own) for user in sorted(by_user)])


def key_of(name: str) -> Key:
    """What a name on the command line means: "cohort:press", "all", or a user."""
    if name == SHARED[1]:
        return SHARED
    kind, colon, rest = name.partition(":")
    return ("cohort", rest) if colon and kind == "cohort" else ("user", name)


def run_fingerprint(group: Group, source: str, generation: str, parent: str | None) -> str:
    """What a group's adapter is to be trained from; equal as long as it need not be trained again.

    source: of recipe and base

    A user's adapter depends on the user's rows, the recipe and its parent. A cohort's does not depend on the rows: new
    texts of one user retrain that one user. Its `generation` changes where it is asked for, or a user was deleted.
    """
    content: list[Any] = [source, group.key, generation, parent]
    if group.key[0] == "user":
        content.append([row.fingerprint() for row in group.rows])
    return digest(content)


def _last(rows: Sequence[Row], count: int | None) -> list[Row]:
    """Of each user's training rows the last `count`, and all others; None: every one."""
    taken: Counter[str] = Counter()
    kept = []
    for row in reversed(rows):
        taken[row.user] += row.split == "train"
        if row.split != "train" or count is None or taken[row.user] <= count:
            kept.append(row)
    return kept[::-1]


def _cohorts(rows: Sequence[Row]) -> dict[str, str | None]:
    """Every user's cohort; None where their rows name none."""
    found: dict[str, str | None] = {}
    where: dict[str, str] = {}
    for row in rows:
        before = found.setdefault(row.user, row.cohort)
        if before is None and row.cohort is not None:
            found[row.user] = row.cohort
        elif row.cohort not in (None, before):
            raise DataError(
                f"user {row.user} is in two cohorts: {before} ({where[row.user]}) and {row.cohort} ({row.where}). "
                "A user's adapter starts from one; give all of the user's rows the same."
            )
        if row.cohort is not None:
            where.setdefault(row.user, row.where)
    return found


def _warn_of_twins(users: dict[str, list[Row]]) -> None:
    """Says which names look alike: two accounts of one person, or two people, it cannot know."""
    by_look: dict[str, list[str]] = defaultdict(list)
    for user in users:
        by_look[unicodedata.normalize("NFKC", user).casefold().strip()].append(user)
    for names in by_look.values():
        if len(names) > 1:
            told = " and ".join(map(ascii, names))
            warn(f"{told} differ only in case or Unicode form; they are taken for different users")
