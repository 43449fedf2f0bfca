"""Models by name: the only reader of checkpoints.

A ModelSource gives rows of the output embedding without loading the body, reading from the stored
file only the rows that are asked for.
"""

from __future__ import annotations

from flashhead_dist.models.base import ModelSource
from flashhead_dist.models.cache import cache_root
from flashhead_dist.models.errors import ModelSourceError
from flashhead_dist.models.opening import open_model

__all__ = ["ModelSource", "ModelSourceError", "cache_root", "open_model"]
