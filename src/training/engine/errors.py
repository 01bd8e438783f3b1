"""The one exception that the program shows to its user as a single line."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend. The text is one line that names the file or flag, the value and the remedy.

    ``training.main`` prints the text without a traceback and exits with status 2.
    """
