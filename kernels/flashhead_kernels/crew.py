"""Matrix-vector products by threads that stay awake from one to the next.

A decoding step of one token is a hundred products of some megabytes, a fifth of a millisecond each:
waking a thread for each costs as much as the product gains. So the crew is woken once a step, spins
between products, and reads the next product's weights into the cache meanwhile. Pieces of a product
are taken by whoever is free: a thread that the system holds up does less and nobody waits for it.
Each row is summed as in the heads' scans, in an order that depends on the row's length alone.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from flashhead_kernels.cpu_primitives import AHEAD_BYTES, jit
from flashhead_kernels.llvm_atomics import (
    add_atomic,
    address,
    exchange_if,
    load_acquire,
    pause,
    store_release,
)
from flashhead_kernels.llvm_row_dot import row_dot
from flashhead_kernels.llvm_vectors import prefetch

_PIECE_BYTES = 256 << 10
"""64 KiB to 512 KiB measured alike, 32 KiB a third slower."""
_AHEAD_STEP = 4096
_SPINS = 200_000
"""Some milliseconds, after which a crew that nobody dismissed goes to sleep."""

# Places in the shared array. Several threads write the first two: lines of their own.
_PIECES, _DONE, _WEIGHT, _STATE, _RESULT, _ROWS, _COLUMNS, _ITEM_BYTES, _NEXT, _NEXT_BYTES = (
    0, 8, 16, 17, 18, 19, 20, 21, 22, 23,
)  # fmt: skip
_LEFT = 0xFFFFFFFF
_DISMISSED = np.int64(-1)
_ITEM_DTYPES = {torch.float32: 4, torch.bfloat16: 2, torch.float16: -2}
"""Bytes a weight, negative where 16 bits are a float16."""


@jit
def _rows_dot(weight: Any, state: Any, result: Any, first: int, last: int, size: int) -> None:
    step, ahead = 64 // weight.itemsize, AHEAD_BYTES // weight.itemsize
    for row in range(first, last):
        for i in range(row * size, (row + 1) * size, step):
            prefetch(weight, i + ahead)
        result[row] = row_dot(weight, row * size, state, 0, size)[0]


@jit
def _piece_rows(size: int, item_bytes: int) -> int:
    return max(1, _PIECE_BYTES // (size * abs(item_bytes)))


@jit
def _do_piece(box: Any, piece: int) -> None:
    rows, size, item_bytes = box[_ROWS], box[_COLUMNS], box[_ITEM_BYTES]
    state = carray(address(box[_STATE]), (size,), np.float32)
    result = carray(address(box[_RESULT]), (rows,), np.float32)
    count = _piece_rows(size, item_bytes)
    first, last = piece * count, min(rows, (piece + 1) * count)
    if item_bytes == 4:
        wide = carray(address(box[_WEIGHT]), (rows * size,), np.float32)
        _rows_dot(wide, state, result, first, last, size)
    elif item_bytes == 2:
        brain = carray(address(box[_WEIGHT]), (rows * size,), np.uint16)
        _rows_dot(brain, state, result, first, last, size)
    else:
        half = carray(address(box[_WEIGHT]), (rows * size,), np.int16)
        _rows_dot(half, state, result, first, last, size)


@jit
def _take_piece(box: Any, word: int) -> int:
    """Do one of the pieces that `word` says are left; 1 if another thread was not quicker.

    What the piece is of is read once it is taken: it cannot change before the piece is done.
    """
    if exchange_if(box, _PIECES, word, word - 1):
        _do_piece(box, (word & _LEFT) - 1)
        add_atomic(box, _DONE, 1)
        return 1
    return 0


@jit
def _serve(box: Any) -> None:
    """What a thread of the crew does from being woken to being dismissed."""
    spins, seen, at = 0, np.int64(0), np.int64(0)
    while spins < _SPINS:
        word = load_acquire(box, _PIECES)
        if word < 0:
            return
        if word & _LEFT:
            if _take_piece(box, word):
                spins = 0
            continue
        if word != seen:
            seen, at = word, np.int64(0)
        if at < box[_NEXT_BYTES]:
            following = carray(address(box[_NEXT]), (box[_NEXT_BYTES],), np.uint8)
            for i in range(at, min(at + _AHEAD_STEP, box[_NEXT_BYTES]), 64):
                prefetch(following, i)
            at += _AHEAD_STEP
        else:
            spins += 1
            pause()


@jit
def _multiply(
    box: Any, weight: int, state: int, result: int, rows: int, size: int, item_bytes: int,
    following: int, following_bytes: int,
) -> None:  # fmt: skip
    """Publish a product, take part in it, and wait for its last piece."""
    box[_WEIGHT], box[_STATE], box[_RESULT] = weight, state, result
    box[_ROWS], box[_COLUMNS], box[_ITEM_BYTES] = rows, size, item_bytes
    box[_NEXT], box[_NEXT_BYTES] = following, following_bytes
    count = _piece_rows(size, item_bytes)
    total = (rows + count - 1) // count
    product = (load_acquire(box, _PIECES) >> 32) + 1
    store_release(box, _DONE, 0)
    store_release(box, _PIECES, ((product & 0x3FFFFFFF) << 32) | total)
    while True:
        word = load_acquire(box, _PIECES)
        if word & _LEFT == 0:
            break
        _take_piece(box, word)
    while load_acquire(box, _DONE) < total:
        pause()


@jit
def _set_word(box: Any, word: int) -> None:
    store_release(box, _PIECES, word)


class Crew:
    """Threads that multiply matrices with one vector, beside the thread that asks.

    One thread may ask at a time. `wake` before the products of a step and `dismiss` after them:
    between the two the threads spin. A product without either is right too, done by the asking
    thread alone.

    threads: in all, the asking one included; at least 1.
    """

    def __init__(self, threads: int) -> None:
        self._box: Any = np.zeros(32, np.int64)
        self._calls = [threading.Event() for _ in range(threads - 1)]
        for call in self._calls:
            threading.Thread(
                target=_stand_by, args=(self._box, call), name="flashhead-crew", daemon=True
            ).start()
        weakref.finalize(self, _send_home, self._box, self._calls)

    def wake(self) -> None:
        """Have the threads spin for products, until dismissed or for some milliseconds."""
        _set_word(self._box, 0)
        for call in self._calls:
            call.set()

    def dismiss(self) -> None:
        """Let the threads sleep, so that others have their cores."""
        self._box[_NEXT_BYTES] = 0
        _set_word(self._box, _DISMISSED)

    def multiply(self, weight: Tensor, state: Tensor, following: Tensor | None = None) -> Tensor:
        """`weight @ state` in float32.

        weight: `[N, D]` contiguous, float32, bfloat16 or float16, on a CPU. state: float32 `[D]`,
        contiguous. following: the weights that the next product will want, if known.
        """
        rows, size = weight.shape
        result = torch.empty(rows)
        _multiply(
            self._box, weight.data_ptr(), state.data_ptr(), result.data_ptr(), rows, size,
            _ITEM_DTYPES[weight.dtype],
            0 if following is None else following.data_ptr(),
            0 if following is None else following.nbytes,
        )  # fmt: skip
        return result


def _stand_by(box: Any, call: threading.Event) -> None:
    while True:
        call.wait()
        call.clear()
        if box[_ROWS] < 0:
            return
        _serve(box)


def _send_home(box: Any, calls: list[threading.Event]) -> None:
    box[_ROWS] = -1
    _set_word(box, _DISMISSED)
    for call in calls:
        call.set()
