"""How every command ends: its exit code, and one line on standard error for a user's mistake."""

import os
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake that the user can mend; its message says how."""


def run_command(main: Callable[[], None]) -> None:
    """Run main. Exit with 2 on a UserError or what the system refuses (a full disk, no permission), 130 on Ctrl-C."""
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        sys.exit(fail(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, e.g. `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        sys.exit(fail(error))


def fail(error: Exception) -> int:
    """Print an error as one line and return the exit code for it."""
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
