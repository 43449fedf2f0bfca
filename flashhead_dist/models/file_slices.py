"""Byte ranges of a stored tensor.

Files are read, not mapped: pages mapped from a file count as resident memory, and a rank's peak
must stay near its own share.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flashhead_dist.models.errors import ModelSourceError

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def read_slice(path: Path, offset: int, count: int) -> Bytes:
    """`count` bytes from `offset` on.

    Raises ModelSourceError where the file is gone or ends before them.
    """
    try:
        raw = np.fromfile(path, dtype=np.uint8, count=count, offset=offset)
    except OSError as error:
        raise ModelSourceError(
            f"{path} cannot be read ({error.strerror}); fetch the model again."
        ) from error
    if raw.size != count:
        raise ModelSourceError(
            f"{path} is truncated: it ends before byte {offset + count}; fetch the model again."
        )
    return raw


def row_ranges(
    start: int, stop: int, row_bytes: int, chunk_bytes: int
) -> Iterator[tuple[int, int]]:
    """[start, stop) in consecutive ranges of at most `chunk_bytes`, one row at least."""
    step = max(1, chunk_bytes // row_bytes)
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


def file_fingerprint(path: Path, tensor: str) -> str:
    """Changes with the path, size or modification time of the file, and with the tensor's name."""
    stat = path.stat()
    return f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{tensor}"
