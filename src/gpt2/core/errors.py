"""What ends a command: a user's mistake, or a signal that asked for it."""


class UserError(Exception):
    """A mistake that the user can mend; its message says how."""


class NoModelError(UserError):
    """There is no registered model yet, or none where it was looked for."""


class Stopped(KeyboardInterrupt):
    """Work that ended because a signal asked for it; the message says how to resume."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
