"""What can be wrong with texts and with stored hidden states."""

from __future__ import annotations

from flashhead_dist.errors import UserError


class HiddenStatesError(UserError):
    """Hidden states cannot be had from what the user named."""
