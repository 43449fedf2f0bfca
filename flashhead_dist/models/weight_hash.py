"""sha256 of stored rows, remembered on disk because a large head takes seconds to hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

from flashhead_dist.models.base import RowStore
from flashhead_dist.models.cache import make_once


def hash_rows(rows: RowStore, cache: Path) -> str:
    """Hex sha256 over the stored bytes, kept in `cache` under the fingerprint of the store."""
    key = hashlib.sha256(rows.fingerprint().encode()).hexdigest()

    def write(path: Path) -> None:
        digest = hashlib.sha256()
        for chunk in rows.stored_chunks():
            digest.update(chunk)
        path.write_text(digest.hexdigest())

    return make_once(cache / "weight_hashes" / key, write).read_text()
