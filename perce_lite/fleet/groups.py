"""Who gets an adapter: users, cohorts and all of them together, from the rows and the recipe's `fleet` section."""

import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from perce_lite.console import warn
from perce_lite.data.readers import RowsByUser, UserOutline
from perce_lite.data.rows import Row
from perce_lite.errors import DataError
from perce_lite.files import digest, safe_name
from perce_lite.recipe import Fleet, Recipe

Key = tuple[str, str]
"""(kind, name): ("user", "ann"), ("cohort", "press"), ("all", "all")."""

SHARED: Key = ("all", "all")

PARENTS = "parents"
"""Folder beside those of the kinds, of what cores stand in (see `model.adapter_files`)."""


@dataclass(frozen=True)
class Group:
    """The users that one adapter belongs to.

    parent: the adapter that its training starts from; None: fresh weights
    examples: training rows, at most `fleet.max_examples` of each user
    """

    key: Key
    users: tuple[str, ...] = field(repr=False)
    examples: int
    parent: Key | None

    @property
    def folder(self) -> str:
        """Folder of its adapter in the fleet's folder; no name is ever a path."""
        kind, name = self.key
        return f"adapters/{kind}/{safe_name(name)}"


class UserPlan(NamedTuple):
    """A user's line in the registry. examples: training rows; own: whether the user gets an adapter of their own."""

    user: str
    cohort: str | None
    examples: int
    own: bool


@dataclass(frozen=True)
class Plan:
    """Groups that get an adapter, parents first, and every user by name.

    max_examples: training rows of a user at most, the last ones; None: all
    """

    groups: list[Group]
    users: list[UserPlan]
    data: RowsByUser = field(repr=False)
    max_examples: int | None

    def rows_of(self, group: Group) -> list[Row]:
        """The rows of a group, held-out ones too, with their profiles; made anew at each call."""
        return _last(self.data.rows_of(*group.users), self.max_examples)

    def fingerprints_of(self, group: Group) -> list[str]:
        """Of each row of a group, profile and all."""
        return [row.fingerprint() for row in self.rows_of(group)]

    def content_of(self, group: Group) -> list[Any]:
        """What says whether the rows of a user's group are as they were, for JSON; no document gets a profile."""
        content = self.data.content_of(*group.users)
        return self.fingerprints_of(group) if content is None else content


def plan(data: RowsByUser, recipe: Recipe, without: Set[str] = frozenset()) -> Plan:
    """The adapters that a fleet is to have, parents first. `without`: users to leave out.

    Raises:
        DataError: a user in two cohorts; cohorts asked for where the data names none; nobody has rows to train on.
    """
    rule = recipe.fleet
    users = [user for user in data.users if user not in without]
    cohorts = {user: _cohort_of(user, data.outline(user)) for user in users}
    examples = {user: data.outline(user).splits.count("train") for user in users}
    _warn_of_twins(users)
    named = sorted({cohort for cohort in cohorts.values() if cohort is not None})
    if "cohort" in (rule.group_by, rule.init_from) and not named:
        raise DataError("fleet: cohorts are asked for, but no row has a `cohort`; name yours with data.columns.cohort")
    own = {user for user in users if rule.group_by == "user" and examples[user] >= rule.min_examples}

    def group(key: Key, members: Sequence[str], parent: Key | None) -> Group:
        limit = rule.max_examples
        count = sum(examples[user] if limit is None else min(examples[user], limit) for user in members)
        return Group(key, tuple(members), count, parent)

    groups = [
        group(key, users if key == SHARED else [user for user in users if cohorts[user] == key[1]], parent)
        for key, parent in _parents(rule, named, None in cohorts.values())
    ]
    by_cohort = named and rule.init_from in ("auto", "cohort")
    for user in sorted(own):
        cohort = cohorts[user]
        parent = ("cohort", cohort) if by_cohort and cohort is not None else SHARED
        groups.append(group(("user", user), [user], parent if rule.init_from != "none" else None))
    groups = [entry for entry in groups if entry.examples]
    if not groups:
        most = max(examples.values(), default=0)
        raise DataError(
            f"fleet: nobody has {rule.min_examples} training rows, as fleet.min_examples asks for; the most is {most}"
        )
    plans = [UserPlan(user, cohorts[user], examples[user], user in own) for user in sorted(users)]
    return Plan(groups, plans, data, rule.max_examples)


def _parents(rule: Fleet, cohorts: Sequence[str], some_without: bool) -> list[tuple[Key, Key | None]]:
    """The shared adapter and the cohorts' where the recipe asks for them, each with its own parent.

    some_without: whether some users are in no cohort
    """
    from_cohorts = bool(cohorts) and rule.init_from in ("auto", "cohort")
    with_parent = rule.init_from != "none"
    keys: list[tuple[Key, Key | None]] = []
    if rule.group_by == "all" or (with_parent and (not from_cohorts or some_without)):
        keys.append((SHARED, None))
    if rule.group_by == "cohort" or (rule.group_by == "user" and with_parent and from_cohorts):
        parent = SHARED if rule.group_by == "cohort" and rule.init_from == "all" else None
        keys += [(("cohort", cohort), parent) for cohort in cohorts]
    return keys


def served_name(key: Key) -> str:
    """What an adapter is called where it is served or exported beside others: no path, a user's name before all."""
    return safe_name(key[1] if key[0] == "user" else " ".join(key))


def key_of(name: str) -> Key:
    """What a name on the command line means: "cohort:press", "all", or a user."""
    if name == SHARED[1]:
        return SHARED
    kind, colon, rest = name.partition(":")
    return ("cohort", rest) if colon and kind == "cohort" else ("user", name)


def run_fingerprint(
    group: Group, source: str, generation: str, parent: str | None, content: Sequence[Any] | None
) -> str:
    """Equal as long as a group's adapter need not be trained again.

    source: fingerprint of recipe and base; generation: changes where training is asked for, or a user was deleted
    parent: fingerprint of the parent's run; content: of a user's rows, see `Plan.content_of`; None for other groups

    A user's adapter depends on the user's rows, the recipe and its parent. A cohort's does not depend on the rows: new
    texts of one user retrain that one user.
    """
    return digest([source, group.key, generation, parent, *([] if content is None else [content])])


def _last(rows: Sequence[Row], count: int | None) -> list[Row]:
    """Of each user's training rows the last `count`, and all others; None: every one."""
    if count is None:
        return list(rows)
    taken: Counter[str] = Counter()
    kept = []
    for row in reversed(rows):
        taken[row.user] += row.split == "train"
        if row.split != "train" or taken[row.user] <= count:
            kept.append(row)
    return kept[::-1]


def _cohort_of(user: str, outline: UserOutline) -> str | None:
    """The user's cohort; None where no row names one."""
    if len(outline.cohorts) > 1:
        (first, first_where), (second, second_where) = outline.cohorts[:2]
        raise DataError(
            f"user {user} is in two cohorts: {first} ({first_where}) and {second} ({second_where}). "
            "A user's adapter starts from one; give all of the user's rows the same."
        )
    return outline.cohorts[0][0] if outline.cohorts else None


def _warn_of_twins(users: Iterable[str]) -> None:
    """Warns of names that look alike: they may be two accounts of one person, or two people."""
    by_look: dict[str, list[str]] = defaultdict(list)
    for user in users:
        by_look[unicodedata.normalize("NFKC", user).casefold().strip()].append(user)
    for names in by_look.values():
        if len(names) > 1:
            quoted = " and ".join(map(ascii, names))
            warn(f"{quoted} differ only in case or Unicode form; they are taken for different users")
