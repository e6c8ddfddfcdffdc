"""JSON that is too large to be read whole, as a piece at a time that keeps what is needed of it."""

from collections.abc import Iterator
from typing import IO, Any

import ijson

from perce_lite.data.importers.chat_exports import slimmed


class TornJsonError(ValueError):
    """The file is no JSON from some place on; `values`: what was whole before it."""

    def __init__(self, message: str, values: list[Any]) -> None:
        super().__init__(message)
        self.values = values


def read_large(file: IO[bytes]) -> Any:
    """The value of a JSON file, or a list of those in its lines, its records `slimmed` as soon as each is whole.

    Raises:
        TornJsonError: see there.
    """
    values: list[Any] = []
    if file.read(3) != b"\xef\xbb\xbf":
        file.seek(0)
    try:
        events = ijson.basic_parse(file, use_float=True, multiple_values=True)
        for event, value in events:
            values.append(_value(event, value, events))
    except (ijson.JSONError, UnicodeDecodeError, ValueError) as error:
        raise TornJsonError(str(error), values) from error
    return values[0] if len(values) == 1 else values


def _value(event: str, value: Any, events: Iterator[tuple[str, Any]]) -> Any:
    """The value that begins with `event`."""
    if event == "start_array":
        return [_value(event, value, events) for event, value in iter(lambda: next(events), ("end_array", None))]
    if event == "start_map":
        record = {}
        for _, name in iter(lambda: next(events), ("end_map", None)):
            record[name] = _value(*next(events), events)
        return slimmed(record)
    return value
