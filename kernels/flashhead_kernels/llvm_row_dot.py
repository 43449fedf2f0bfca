"""Dot products of stored rows with hidden states, written in LLVM's vector instructions.

Why not leave the loop to the compiler: a float reduction needs permission to reorder, and then the
order is the compiler's. Here lanes and accumulators are fixed, so a row's logit is the same bits
whichever rank holds the row and however many rows stand beside it. LLVM lowers the vectors to what
the processor has (AVX-512, AVX2, NEON).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from flashhead_kernels.llvm_vectors import (
    F32,
    FIRST,
    I16,
    I32,
    const,
    fma_function,
    horizontal_sum,
    load,
    pointer_at,
    splat,
    vec,
)

_LANES = 16
_ACCUMULATORS = 4
_FLOAT_STEP = _LANES * _ACCUMULATORS


def _load_row(b: ir.IRBuilder, pointer: Any, count: int, dtype: Any) -> Any:
    """Load `count` elements of a row as float32."""
    wide = vec(F32, count)
    if dtype == types.float32:
        return load(b, pointer, wide)
    if dtype == types.uint16:
        bits = b.zext(load(b, pointer, vec(I16, count)), vec(I32, count))
        return b.bitcast(b.shl(bits, splat(I32, count, 16)), wide)
    return b.fpext(load(b, pointer, vec(ir.HalfType(), count)), wide)


def _make_row_dot(batch: int) -> Any:
    """`dot(rows, row_offset, hidden, hidden_offset, D)` -> `batch` float32 sums.

    `rows` is a flat array of float32, uint16 (the bits of bfloat16) or int16 (of float16): numpy
    has no bfloat16, and the two must differ in type. State j starts at `hidden_offset + j * D`.
    Columns past the last multiple of 64 are added one by one, after the rest.
    """

    def typer(_: Any, rows: Any, row_at: Any, hidden: Any, hidden_at: Any, size: Any) -> Any:
        signature = types.UniTuple(types.float32, batch)(rows, row_at, hidden, hidden_at, size)

        def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
            row = pointer_at(context, b, sig.args[0], args[0], args[1])
            states = pointer_at(context, b, sig.args[2], args[2], args[3])
            dtype, fma, wide = sig.args[0].dtype, fma_function(b, _LANES), vec(F32, _LANES)
            zero = splat(F32, _LANES, 0.0)
            sums = [
                [cgutils.alloca_once(b, wide) for _ in range(_ACCUMULATORS)] for _ in range(batch)
            ]
            for slot in (s for pair in sums for s in pair):
                b.store(zero, slot)
            with cgutils.for_range(b, b.udiv(args[4], const(_FLOAT_STEP))) as loop:
                base = b.mul(loop.index, const(_FLOAT_STEP))
                for lane in range(_ACCUMULATORS):
                    at = b.add(base, const(lane * _LANES))
                    weights = _load_row(b, b.gep(row, [at]), _LANES, dtype)
                    for j in range(batch):
                        where = b.add(at, b.mul(args[4], const(j)))
                        state = load(b, b.gep(states, [where]), wide)
                        slot = sums[j][lane]
                        b.store(b.call(fma, [weights, state, b.load(slot)]), slot)
            one, tails = vec(F32, 1), []
            for pair in sums:
                a0, a1, a2, a3 = (b.load(slot) for slot in pair)
                total = horizontal_sum(b, b.fadd(b.fadd(a0, a1), b.fadd(a2, a3)), _LANES)
                tails.append(cgutils.alloca_once(b, one))
                whole = b.insert_element(ir.Constant(one, ir.Undefined), total, FIRST)
                b.store(whole, tails[-1])
            rest = b.urem(args[4], const(_FLOAT_STEP))
            with cgutils.for_range(b, rest) as loop:
                at = b.add(b.sub(args[4], rest), loop.index)
                weight = _load_row(b, b.gep(row, [at]), 1, dtype)
                for j, slot in enumerate(tails):
                    where = b.add(at, b.mul(args[4], const(j)))
                    state = load(b, b.gep(states, [where]), one)
                    b.store(b.call(fma_function(b, 1), [weight, state, b.load(slot)]), slot)
            totals = [b.extract_element(b.load(slot), FIRST) for slot in tails]
            return context.make_tuple(b, sig.return_type, totals)

        return signature, generate

    return intrinsic(typer)


row_dot = _make_row_dot(1)
row_dot_4 = _make_row_dot(4)
