"""What `bench` is asked to measure: ways to train, tokens a row, users at once.

Without torch, so that a wrong name or number is told at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from perce_lite.errors import BenchError
from perce_lite.recipe_checks import nearest

Kind = Literal["trl", "trl-fp32", "hand-written", "perce"]


@dataclass(frozen=True)
class Arm:
    """One way to train the same rows.

    options: fields of `PerCEConfig`, over the recipe's own
    store: which store it reads; arms of one name share it. None: it keeps nothing
    cold: the store is empty at first and thrown away afterwards
    """

    kind: Kind
    options: dict[str, Any] = field(default_factory=dict)
    store: str | None = None
    cold: bool = False

    @property
    def sees_profile(self) -> bool:
        """Whether the profile stands in the prompt that is trained on."""
        return self.options.get("train_on") != "counterfactual"


_TRL = {"logging_nan_inf_filter": True}  # TRL's default, which PerCEConfig turns

_HAND_WRITTEN = {**_TRL, "estimator": "bootstrap", "weighting": "additive", "remove_unused_columns": False}

ARMS: dict[str, Arm] = {
    "sft": Arm("trl", _TRL),
    "sft-fp32": Arm("trl-fp32", _TRL),
    "uniform": Arm("perce", {"estimator": "uniform"}),
    "base": Arm("perce", {"estimator": "base"}, "base"),
    "base-cold": Arm("perce", {"estimator": "base"}, "base", cold=True),
    "mixed": Arm("perce", {"estimator": "mixed"}, "mixed"),
    "mixed-cold": Arm("perce", {"estimator": "mixed"}, "mixed", cold=True),
    "bootstrap": Arm("perce", {"estimator": "bootstrap"}),
    "counterfactual": Arm("perce", {"estimator": "base", "train_on": "counterfactual"}, "base"),
    "frozen": Arm("perce", {"estimator": "base", "profile_pass": "frozen"}, "base"),
    "hand-written": Arm("hand-written", _HAND_WRITTEN),
}
"""`sft` is TRL's own trainer, `sft-fp32` the same with its adapter in float32, as PerCE keeps it; `hand-written` is
what one writes without this package. `shuffled` is left out: it costs what `base` costs."""

SHAPES = ("llama-3.1-8b", "toy")
"""Names of shapes of a GPU report; the 8B's is known by heart in `planning.shapes`."""

LENGTHS, SLOTS = (32, 64, 96), (1, 2, 4, 8, 16)
"""Tokens a row and users at once, unless asked for otherwise."""

SHORTEST = 16
"""Tokens of a row that still has a profile, a query and a response."""


def arms_of(spec: str | None) -> list[str]:
    """The arms of "base,mixed"; all without a spec.

    Raises:
        BenchError: a name that is no arm; gives the nearest.
    """
    if spec is None:
        return list(ARMS)
    names = [name.strip() for name in spec.split(",") if name.strip()]
    for name in names:
        if name not in ARMS:
            raise BenchError(f"--arms: {name!r} is no arm; {nearest(name, ARMS)} Arms are {', '.join(ARMS)}.")
    if not names:
        raise BenchError(f"--arms: name some of {', '.join(ARMS)}.")
    return names


def numbers_of(option: str, spec: str | None, default: Sequence[int], least: int) -> list[int]:
    """The numbers of "32,64", each once; `default` without a spec.

    Raises:
        BenchError: something that is no whole number of at least `least`, or nothing.
    """
    if spec is None:
        return list(default)
    words = [word.strip() for word in spec.split(",") if word.strip()]
    for word in words or [spec]:
        if not word.isdecimal() or int(word) < least:
            example = ",".join(map(str, default))
            raise BenchError(
                f"{option}: {word!r} is no whole number of at least {least}; give a list such as {example}."
            )
    return list(dict.fromkeys(map(int, words)))


def lengths_of(spec: str | None) -> list[int]:
    """`--lengths`; see `numbers_of`."""
    return numbers_of("--lengths", spec, LENGTHS, SHORTEST)


def slots_of(spec: str | None) -> list[int]:
    """`--slots`; see `numbers_of`."""
    return numbers_of("--slots", spec, SLOTS, 1)


def require_shape(shape: str) -> None:
    """Raises BenchError where `shape` is neither a name in `SHAPES` nor a folder with a config.json."""
    if shape not in SHAPES and not (Path(shape) / "config.json").is_file():
        raise BenchError(f"--shape: {shape!r} is neither {' nor '.join(SHAPES)}, nor a folder with a config.json.")
