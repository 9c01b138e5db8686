"""The errors that the command line shows without a traceback."""

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """Something that the person who started the command can mend; the message says how."""


class RunError(UserError):
    """A run cannot start or go on; the message says where it stands."""


@contextlib.contextmanager
def told_as(error: type[UserError], *more: type[Exception], where: str = "") -> Iterator[None]:
    """Raise as `error` what is raised inside for a broken rule: a ValueError, or one of `more`.

    `where` it was broken comes before what is said.
    """
    try:
        yield
    except (ValueError, *more) as broken:
        raise error(f"{where}: {broken}" if where else str(broken)) from broken
