"""What can be wrong with a model that a user names."""

from __future__ import annotations

from flashhead_dist.errors import UserError


class ModelSourceError(UserError):
    """The named model cannot serve as a source of output-embedding rows."""
