"""Packed candidate keys: one int64 whose order is (larger logit, then smaller token id).

A maximum over keys is an argmax over logits whose ties do not depend on who holds which row, so one
`all_reduce(MAX)` of eight bytes a row gives the same token on every rank at every `tp_size`.
"""

from __future__ import annotations

import torch
from torch import Tensor

EMPTY_KEY = -(2**63)
"""Key of no candidate: below every key that `pack_keys` makes."""

_ID_MASK = 0xFFFFFFFF

DEFAULT_CAPACITY = 256
"""Keys that a slot holds: the largest batch whose greedy keys go this way."""
NUM_BUFFERS = 2
"""Rounds whose keys have slots of their own; one would let a fast rank overwrite unread keys."""
SIGNAL_STRIDE = 16
"""Words from one signal to the next: 128 bytes, a line of the cache each."""


def pack_keys(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Pack `logits [...]` (any float, taken as float32) and `token_ids [...]` into int64 keys.

    The high half is the float32 bit pattern made order-preserving (negative values have their
    magnitude bits flipped), the low half the complement of the id. -0.0 packs as 0.0. A negative
    id (a pad) gives EMPTY_KEY.

    Raises:
        ValueError: a logit of a real token is NaN, which has no order. Not on CUDA, where the host
            would have to wait to learn of it; heads refuse hidden states that are not finite.
    """
    # Adding zero turns -0.0 into 0.0: they are equal as logits and must be equal as keys.
    values = logits.to(torch.float32) + 0.0
    ids = token_ids.to(torch.int64)
    if not values.is_cuda and bool((torch.isnan(values) & (ids >= 0)).any()):
        raise ValueError("a logit is NaN: check the hidden states and the output embedding")
    bits = values.contiguous().view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (ordered.to(torch.int64) << 32) | (_ID_MASK - ids)
    return torch.where(ids >= 0, keys, EMPTY_KEY)


def unpack_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return `(logits float32 [...], token_ids int64 [...])`; EMPTY_KEY gives (-inf, -1)."""
    ordered = (keys >> 32).to(torch.int32)
    bits = ordered ^ ((ordered >> 31) & 0x7FFFFFFF)
    logits = bits.contiguous().view(torch.float32)
    token_ids = _ID_MASK - (keys & _ID_MASK)
    empty = keys == EMPTY_KEY
    return logits.masked_fill(empty, float("-inf")), token_ids.masked_fill(empty, -1)


def unpack_keys_into(keys: Tensor, token_ids: Tensor, logits: Tensor) -> None:
    """`unpack_keys` of `keys [...]` into int64 `token_ids` and float32 `logits` of that shape."""
    values, ids = unpack_keys(keys)
    token_ids.copy_(ids)
    logits.copy_(values)


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
