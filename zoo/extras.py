"""Packages that not everybody installs: what brings them is named where one is missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from zoo.config import UserError


@contextlib.contextmanager
def extra(name: str, what: str) -> Iterator[None]:
    """Stands round the import of packages that the extra `name` of setup.cfg brings.

    Args:
        what: needs them, for the message: "speech".
    Raises:
        UserError: a package cannot be imported; names the extra.
    """
    try:
        yield
    except (ImportError, OSError) as error:  # OSError: a shared library that the package needs is not there
        raise UserError(f"{what}: {error}; pip install -e .[{name}]") from None
