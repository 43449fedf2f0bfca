"""One base class for what a user can mend: `launch` prints it as one sentence and exits with 2."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave: its text names the value and the remedy.

    Raised anywhere below `launch`; never caught there except to print it.
    """

    exit_code = 2


class ModelSourceError(UserError):
    """The named model cannot serve as a source of output-embedding rows."""


INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 + SIGINT."""

LOST = 1
"""Exit code of a rank that ends because another one failed."""
