"""What torch's dispatcher nests: tuples, lists and dictionaries alone, told faster than by torch's pytree.

There are some ten thousand operations in a step.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any


@cache
def name_of(func: Any) -> str:
    """The name of an operation, such as aten::mm; torch makes it anew each time that it is asked."""
    name: str = func._schema.name
    return name


def each(value: Any) -> Iterator[Any]:
    """What is in `value`, however deep."""
    if isinstance(value, tuple | list):
        for item in value:
            yield from each(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from each(item)
    else:
        yield value


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """`value` with what is in it changed, however deep."""
    if isinstance(value, tuple | list):
        return type(value)([mapped(change, item) for item in value])
    if isinstance(value, dict):
        return {key: mapped(change, item) for key, item in value.items()}
    return change(value)
