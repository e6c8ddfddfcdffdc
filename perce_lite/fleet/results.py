"""A fleet in Python: the same run as `perce-lite fleet`, as an iterator over adapters as they end."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from perce_lite.fleet import fleet as runs
from perce_lite.fleet.engines import slots
from perce_lite.fleet.engines.protocol import Engine, EngineName
from perce_lite.fleet.engines.ray import RayOptions, ray_engines
from perce_lite.fleet.result import AdapterResult
from perce_lite.fleet.stream import stream
from perce_lite.recipe import Recipe


@contextmanager
def engines(name: EngineName, options: RayOptions | None = None) -> Iterator[Callable[[Recipe], Engine]]:
    """Yields what makes an engine of that name; what it holds (a cluster's workers) ends with the block."""
    if name == "local":
        yield slots.engine_for
        return
    with ray_engines(options or RayOptions()) as make:
        yield make


def fleet(
    recipe: Recipe,
    engine: EngineName = "local",
    only: Sequence[str] = (),
    retrain: Sequence[str] = (),
    options: RayOptions | None = None,
) -> Iterator[AdapterResult]:
    """Trains every adapter that is due, and yields each as it ends, failed or not; parents before users.

    Whoever stops iterating stops the training after its next step; calling it again resumes.

    engine: where to train; options: of the Ray cluster
    only, retrain: as `perce_lite.fleet.fleet.fleet`, whose errors are raised here
    """

    def work(hand_out: Callable[[AdapterResult | None], None]) -> None:
        with engines(engine, options) as make:
            runs.fleet(recipe, make, only, retrain, report=hand_out)

    return stream(work)
