"""Words of messages that depend on a number."""


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """`count` with its noun: "1 user", "5 users", "1 query", "2 queries" with `plural`.

    noun: with what stands around it, such as "user who was deleted is"; then `plural` is the whole of the other
    """
    return f"{count} {noun if count == 1 else plural or noun + 's'}"
