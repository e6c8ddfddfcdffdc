"""The result of a fleet run, for the terminal, the page and `--json`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perce_lite.fleet.registry import Adapter, held_out


@dataclass(frozen=True)
class Gains:
    """Means over the `users` of a run who have an adapter of their own and held-out rows. Losses in nats a token.

    users: how many; where it is 0, everything else is None
    base, start, own: loss of the base, of the adapter they started from, of their own adapter
    over_start, over_base: by how much their own adapter is better; negative where it is worse
    parameters: trained parameters of a user
    """

    users: int
    base: float | None = None
    start: float | None = None
    own: float | None = None
    over_start: float | None = None
    over_base: float | None = None
    parameters: float | None = None

    def figures(self) -> dict[str, float]:
        """The JSON object `gains` of `perce-lite fleet --json`: only `users` where that is 0."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class AdapterResult:
    """What became of one adapter that was due.

    kind, name: in the registry; adapter: its folder; None: it was not trained
    gain: nats a token on test rows by which it is better than what it started from; None where none are held out
    state: "in service", "held back" (worse than what it would replace) or "failed"; error: why it failed
    """

    kind: str
    name: str
    adapter: Path | None
    gain: float | None
    state: str
    error: str | None

    @property
    def user(self) -> str | None:
        """The user whose adapter it is; None: it is what users start from, or a cohort's."""
        return self.name if self.kind == "user" else None


@dataclass(frozen=True)
class FleetResult:
    """What a run of `fleet` found and did.

    folder: the fleet's folder
    due: adapters that were due, by kind (registry.KINDS)
    bytes_needed: disk that the due adapters and their checkpoints take at most, bytes
    dry_run: nothing was trained
    trained, held_back, failed: adapters of this run; those held back are among the trained
    states: adapters in the registry after the run, by state (registry.STATES)
    gains: means over users with held-out rows
    adapters: every row of the registry after the run
    """

    folder: str
    due: dict[str, int]
    bytes_needed: int
    dry_run: bool
    trained: int
    held_back: int
    failed: int
    states: dict[str, int]
    gains: Gains
    adapters: tuple[Adapter, ...] = field(repr=False)

    def figures(self) -> dict[str, Any]:
        """The JSON object of `perce-lite fleet --json`."""
        kept = {name: value for name, value in vars(self).items() if name != "adapters"}
        return {**kept, "gains": self.gains.figures()}


def gains(adapters: Sequence[Adapter]) -> Gains:
    """Means over the users among `adapters` who are in the data and have held-out rows."""
    users = [adapter for adapter in adapters if adapter.kind == "user" and adapter.present]
    measured = [(adapter, losses) for adapter in users if (losses := held_out(adapter)) is not None]
    if not measured:
        return Gains(0)
    mean = {name: sum(losses[name] for _, losses in measured) / len(measured) for name in ("base", "start", "own")}
    return Gains(
        users=len(measured),
        **mean,
        over_start=mean["start"] - mean["own"],
        over_base=mean["base"] - mean["own"],
        parameters=sum(adapter.metrics.get("parameters", 0) for adapter, _ in measured) / len(measured),
    )
