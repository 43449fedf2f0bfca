"""Operations of a model's body for one token on a CPU: norms, rotation, matrix-vector products.

torch's RMSNorm is five operators and its rotation ten, which cost a decoding step more than the
arithmetic: 109 norms take 3.5 ms. A step also has a hundred matrix-vector products of some
megabytes, a fifth of a millisecond each; waking a thread for each costs what that thread gains.
So `MatVecPool` is woken once a step: its threads spin between products, and read the next product's
weights into the cache meanwhile. Each thread takes the next part of a product when it is free, so
that a thread that the system holds up delays nobody. Each row is summed as in the heads' scans, in
an order that depends on the row's length alone.
"""

from __future__ import annotations

import math
import threading
import weakref
from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from flashhead_kernels.cpu_loops import AHEAD_BYTES, jit
from flashhead_kernels.llvm_dots import row_dot
from flashhead_kernels.llvm_vectors import I32, I64, pointer_at, prefetch

_BYTES = 8
_ARCHITECTURE = binding.get_process_triple().split("-")[0]


def _element(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
    return pointer_at(context, b, sig.args[0], args[0], args[1])


@intrinsic
def load_acquire(_: Any, array: Any, at: Any) -> Any:
    """`array[at]`, and all that its writer wrote before it."""
    signature = types.int64(array, at)

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return b.load_atomic(_element(context, b, sig, args), "acquire", _BYTES)

    return signature, generate


@intrinsic
def store_release(_: Any, array: Any, at: Any, value: Any) -> Any:
    """Set `array[at]`, after all that this thread wrote before."""
    signature = types.void(array, at, types.int64)

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        b.store_atomic(args[2], _element(context, b, sig, args), "release", _BYTES)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def add_atomic(_: Any, array: Any, at: Any, value: Any) -> Any:
    """Add to `array[at]`; returns what it was."""
    signature = types.int64(array, at, types.int64)

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return b.atomic_rmw("add", _element(context, b, sig, args), args[2], "acq_rel")

    return signature, generate


@intrinsic
def exchange_if(_: Any, array: Any, at: Any, expected: Any, value: Any) -> Any:
    """Set `array[at]` where it is `expected`; returns whether it was, 1 or 0."""
    signature = types.int64(array, at, types.int64, types.int64)

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        pair = b.cmpxchg(_element(context, b, sig, args), args[2], args[3], "acq_rel", "acquire")
        return b.zext(b.extract_value(pair, 1), I64)

    return signature, generate


@intrinsic
def pause(_: Any) -> Any:
    """Tell the processor that this thread spins, where it has an instruction for that."""
    signature = types.void()

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        if _ARCHITECTURE == "x86_64":
            kind = ir.FunctionType(ir.VoidType(), [])
            b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.x86.sse2.pause"), [])
        elif _ARCHITECTURE in ("aarch64", "arm64"):
            kind = ir.FunctionType(ir.VoidType(), [I32])
            hint = cgutils.get_or_insert_function(b.module, kind, "llvm.aarch64.hint")
            b.call(hint, [ir.Constant(I32, 1)])
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def address(_: Any, number: Any) -> Any:
    """The pointer at an address, as `numba.carray` takes it."""
    signature = types.voidptr(types.int64)
    return signature, lambda context, b, sig, args: b.inttoptr(args[0], cgutils.voidptr_t)


@jit
def normalize(states: int, weight: int, result: int, rows: int, size: int, eps: float) -> None:
    """RMSNorm of `rows` states at an address, for compiled code; `result` may be `states`."""
    values: Any = carray(address(states), (rows * size,), np.float32)
    factors: Any = carray(address(weight), (size,), np.float32)
    out: Any = carray(address(result), (rows * size,), np.float32)
    for at in range(0, rows * size, size):
        mean = row_dot(values, at, values, at, size)[0] / np.float32(size)
        scale = np.float32(1) / np.float32(math.sqrt(mean + np.float32(eps)))
        for i in range(size):
            out[at + i] = values[at + i] * scale * factors[i]


def rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`states / sqrt(mean(states ** 2) + eps) * weight`, as `torch.nn.functional.rms_norm`.

    states: float32 `[..., D]` on a CPU. weight: float32 `[D]`, contiguous. On one thread.
    """
    size = weight.numel()
    states = states.contiguous()
    result = torch.empty_like(states)
    if size:
        normalize(
            states.data_ptr(), weight.data_ptr(), result.data_ptr(), states.numel() // size, size,
            eps,
        )  # fmt: skip
    return result


@jit
def _turn(heads: int, cos: int, sin: int, scale: int, count: int, size: int, eps: float) -> None:
    values: Any = carray(address(heads), (count * size,), np.float32)
    cosines: Any = carray(address(cos), (size,), np.float32)
    sines: Any = carray(address(sin), (size,), np.float32)
    if scale:
        normalize(heads, scale, heads, count, size, eps)
    half = size // 2
    for at in range(0, count * size, size):
        for i in range(half):
            a, b = values[at + i], values[at + half + i]
            values[at + i] = a * cosines[i] - b * sines[i]
            values[at + half + i] = b * cosines[half + i] + a * sines[half + i]


def turn_heads(
    heads: Tensor, cos: Tensor, sin: Tensor, scale: Tensor | None = None, eps: float = 0.0
) -> None:
    """Give queries or keys their position, in place, after an RMSNorm where `scale` is given.

    heads: float32 `[H, d]`, contiguous, d even. cos, sin, scale: float32 `[d]`, contiguous.
    """
    count, size = heads.shape
    _turn(
        heads.data_ptr(), cos.data_ptr(), sin.data_ptr(), 0 if scale is None else scale.data_ptr(),
        count, size, eps,
    )  # fmt: skip


_PART_BYTES = 256 << 10
"""64 KiB to 512 KiB measured alike, 32 KiB a third slower."""
_AHEAD_STEP = 4096
_SPINS = 200_000
"""Some milliseconds, after which threads that nobody dismissed go to sleep."""

# Places in the shared array. Several threads write the first two: lines of their own.
_PARTS, _DONE, _WEIGHT, _STATE, _RESULT, _ROWS, _COLUMNS, _ITEM_BYTES, _NEXT, _NEXT_BYTES = (
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
def _part_rows(size: int, item_bytes: int) -> int:
    return max(1, _PART_BYTES // (size * abs(item_bytes)))


@jit
def _do_part(box: Any, part: int) -> None:
    rows, size, item_bytes = box[_ROWS], box[_COLUMNS], box[_ITEM_BYTES]
    state = carray(address(box[_STATE]), (size,), np.float32)
    result = carray(address(box[_RESULT]), (rows,), np.float32)
    count = _part_rows(size, item_bytes)
    first, last = part * count, min(rows, (part + 1) * count)
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
def _take_part(box: Any, word: int) -> int:
    """Do one of the pieces that `word` says are left; 1 if another thread was not quicker.

    What the part is of is read once it is taken: it cannot change before the part is done.
    """
    if exchange_if(box, _PARTS, word, word - 1):
        _do_part(box, (word & _LEFT) - 1)
        add_atomic(box, _DONE, 1)
        return 1
    return 0


@jit
def _serve(box: Any) -> None:
    """What a thread of the pool does from being woken to being dismissed."""
    spins, seen, at = 0, np.int64(0), np.int64(0)
    while spins < _SPINS:
        word = load_acquire(box, _PARTS)
        if word < 0:
            return
        if word & _LEFT:
            if _take_part(box, word):
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
    """Publish a product, take part in it, and wait for its last part."""
    box[_WEIGHT], box[_STATE], box[_RESULT] = weight, state, result
    box[_ROWS], box[_COLUMNS], box[_ITEM_BYTES] = rows, size, item_bytes
    box[_NEXT], box[_NEXT_BYTES] = following, following_bytes
    count = _part_rows(size, item_bytes)
    total = (rows + count - 1) // count
    product = (load_acquire(box, _PARTS) >> 32) + 1
    store_release(box, _DONE, 0)
    store_release(box, _PARTS, ((product & 0x3FFFFFFF) << 32) | total)
    while True:
        word = load_acquire(box, _PARTS)
        if word & _LEFT == 0:
            break
        _take_part(box, word)
    while load_acquire(box, _DONE) < total:
        pause()


@jit
def _set_word(box: Any, word: int) -> None:
    store_release(box, _PARTS, word)


class MatVecPool:
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
                target=_run_thread, args=(self._box, call), name="flashhead-matvec", daemon=True
            ).start()
        weakref.finalize(self, _end_threads, self._box, self._calls)

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


def _run_thread(box: Any, call: threading.Event) -> None:
    while True:
        call.wait()
        call.clear()
        if box[_ROWS] < 0:
            return
        _serve(box)


def _end_threads(box: Any, calls: list[threading.Event]) -> None:
    box[_ROWS] = -1
    _set_word(box, _DISMISSED)
    for call in calls:
        call.set()
