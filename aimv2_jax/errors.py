"""What a user can mend, told in one sentence; and the exit codes of the commands."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

EXIT_FINISHED = 0
EXIT_BUG = 1
EXIT_USER = 2
EXIT_GUARD = 3


class UserError(Exception):
    """Something the user can mend.

    Args:
      what: what is wrong, naming the config key, file or flag.
      value: the offending value.
      remedy: what to do about it, as a sentence without its full stop.
    """

    def __init__(self, what: str, value: object, remedy: str):
        self.what, self.value, self.remedy = what, value, remedy
        super().__init__(what, value, remedy)

    def __str__(self) -> str:
        return f"{self.what}: {self.value!r}. {self.remedy}."


class GuardStop(Exception):
    """The run stopped itself to protect what it has (non-finite loss, too much bad data)."""


def reports_user_errors(main: Callable[..., int]) -> Callable[..., int]:
    """Wraps a command's main: a `UserError` becomes one line and code 2, a `GuardStop` one line and code 3."""

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return EXIT_USER
        except GuardStop as error:
            print(f"stopped: {error}", file=sys.stderr)
            return EXIT_GUARD

    return wrapped
