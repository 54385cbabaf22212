"""What ends a command: a user's mistake, or a signal that asked for it."""

import re


class UserError(Exception):
    """A mistake that the user can mend; its message says how."""


class NoModelError(UserError):
    """There is no registered model yet, or none where it was looked for."""


class Stopped(KeyboardInterrupt):
    """Work that ended because a signal asked for it; the message says how to resume."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def one_line(message: object) -> str:
    """Return a message as one line, without what would steer a terminal, and its URIs without passwords."""
    line = re.sub(r"[\x00-\x1f\x7f-\x9f]", "", " ".join(str(message).split()))
    return re.sub(r"(?<!file://)(?<=://)\S*@|(?<=password=)[^&\s]*", "", line)
