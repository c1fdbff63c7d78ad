"""The one exception for what a person can get wrong. The command line prints its text as one line and exits with code 2."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend. The message says what is wrong and what to do, in one line, without a traceback."""
