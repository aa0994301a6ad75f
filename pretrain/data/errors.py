"""The error of everything that is wrong with a user's data."""

from zoo.config import UserError


class DataError(UserError):
    """Shards, documents or their cache are not usable; the message names the file and the way out."""
