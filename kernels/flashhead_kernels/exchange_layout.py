"""Sizes of the memory of a key exchange, and what an exchange computes; see `triton_exchange`."""

from __future__ import annotations

from torch import Tensor

DEFAULT_CAPACITY = 256
"""Keys that a slot holds: the largest batch whose greedy keys go this way."""
NUM_BUFFERS = 2
"""Rounds whose keys have slots of their own; one would let a fast rank overwrite unread keys."""
SIGNAL_STRIDE = 16
"""Words from one signal to the next: 128 bytes, a line of the cache each."""


def num_words(tp_size: int, capacity: int) -> int:
    """Int64 words that each rank shares with its peers: signals, then slots.

    Raises:
        ValueError: fewer than two ranks, or a capacity that is not a power of two.
    """
    if tp_size < 2:
        raise ValueError(f"an exchange takes two ranks or more, not {tp_size}")
    if capacity < 1 or capacity & (capacity - 1):
        raise ValueError(f"capacity {capacity} is not a power of two")
    return tp_size * SIGNAL_STRIDE + NUM_BUFFERS * tp_size * capacity


def padded(size: int) -> int:
    """The least power of two that is not below `size`."""
    return 1 << (size - 1).bit_length()


def merged_keys(rank_keys: Tensor) -> Tensor:
    """What an exchange leaves every rank with: the maximum over P of `rank_keys [P, *shape]`."""
    return rank_keys.amax(dim=0)
