"""The error of everything that is wrong with a user's data."""

from zoo.config import UserError, printable


class DataError(UserError):
    """Shards, documents or their cache are not usable; the message names the file and the way out."""


class BrokenDocument(Exception):
    """This document cannot be used; the message says why."""


def shown(text: str, limit: int = 200) -> str:
    """A text of unknown origin as a message can hold it: what cannot be printed is escaped, what is long is cut."""
    escaped = printable(text[:limit], lines=False)
    return escaped if len(text) <= limit else f"{escaped}… ({len(text):,} characters)"
