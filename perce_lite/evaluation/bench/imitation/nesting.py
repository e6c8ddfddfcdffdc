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
        for one in value:
            yield from each(one)
    elif isinstance(value, dict):
        for one in value.values():
            yield from each(one)
    else:
        yield value


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """`value` with what is in it changed, however deep."""
    if isinstance(value, tuple | list):
        return type(value)([mapped(change, one) for one in value])
    if isinstance(value, dict):
        return {key: mapped(change, one) for key, one in value.items()}
    return change(value)
