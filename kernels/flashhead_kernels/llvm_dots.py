"""Dot products of rows and centroids with hidden states, written in LLVM's vector instructions.

Why not leave the loop to the compiler: a float reduction needs permission to reorder, and then the
order is the compiler's. Here lanes and accumulators are fixed, so a row's logit is the same bits
whichever rank holds the row and however many rows stand beside it. LLVM lowers the vectors to what
the processor has (AVX-512, AVX2, NEON).

Integer centroids: products of 32 bytes are summed as integers, exactly; each scale group's sum then
meets its two scales in float32. Four centroids share the loads of the hidden state. In tiles of 16
(`quantize.tile_centroids`) a lane holds a centroid, so that nothing is summed across lanes. One
centroid, four, and a tile have their own order of float32 sums.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from flashhead_kernels.llvm_vectors import (
    F32,
    FIRST,
    I8,
    I16,
    I32,
    broadcast,
    const,
    fma_function,
    horizontal_sum,
    load,
    pointer_at,
    splat,
    vec,
)
from flashhead_kernels.quantize import TILE

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


_INT_LANES = 8
OCTETS = 32
"""Bytes of a centroid that one step takes: 64 columns of int4, 32 of int8."""


def add_products(b: ir.IRBuilder, total: Any, unsigned: Any, signed: Any) -> Any:
    """Add to lane i of int32 `total [8 or 16]` the products of bytes 4 i to 4 i + 3."""
    lanes = total.type.count
    features = llvm.get_host_cpu_features()
    sums, octets = vec(I32, lanes), vec(I8, 4 * lanes)
    if features.get("avx512vnni") and (lanes == 16 or features.get("avx512vl")):
        # LLVM 21 gave the byte operands their own type; before, they were int32 vectors.
        operand = octets if llvm.llvm_version_info[0] >= 21 else sums
        function = cgutils.get_or_insert_function(
            b.module,
            ir.FunctionType(sums, [sums, operand, operand]),
            f"llvm.x86.avx512.vpdpbusd.{32 * lanes}",
        )
        return b.call(function, [total, b.bitcast(unsigned, operand), b.bitcast(signed, operand)])
    wide = vec(I32, 4 * lanes)
    products = b.mul(b.zext(unsigned, wide), b.sext(signed, wide))
    undefined = ir.Constant(wide, ir.Undefined)
    for byte in range(4):
        every_fourth = ir.Constant(sums, list(range(byte, 4 * lanes, 4)))
        total = b.add(total, b.shuffle_vector(products, undefined, every_fourth))
    return total


class _IntegerDot:
    """Code for `count` adjacent centroids of `bits` bits against one hidden state."""

    def __init__(self, context: Any, b: ir.IRBuilder, sig: Any, args: Any, bits: int, count: int):
        self.b, self.bits, self.count = b, bits, count
        self.values, self.scales, self.states, self.starts, self.factors = (
            pointer_at(context, b, sig.args[i], args[i], args[i + 1]) for i in range(0, 10, 2)
        )
        self.groups = args[10]
        self.parts = [cgutils.alloca_once(b, vec(I32, _INT_LANES)) for _ in range(count)]
        self.totals = [cgutils.alloca_once(b, vec(F32, _INT_LANES)) for _ in range(count)]
        for total in self.totals:
            b.store(splat(F32, _INT_LANES, 0.0), total)

    def add_octets(self, group: Any, group_bytes: Any, offset: Any) -> None:
        """Add the products of 32 stored bytes of each centroid, `offset` into the scale group."""
        b, octets = self.b, vec(I8, OCTETS)
        columns = b.mul(group_bytes, const(2 if self.bits == 4 else 1))
        at = b.add(b.mul(group, columns), offset)
        state = load(b, b.gep(self.states, [at]), octets)
        if self.bits == 4:
            other = load(b, b.gep(self.states, [b.add(at, group_bytes)]), octets)
        for c, part in enumerate(self.parts):
            centroid = b.mul(b.mul(self.groups, group_bytes), const(c))
            where = b.add(b.add(centroid, b.mul(group, group_bytes)), offset)
            packed = load(b, b.gep(self.values, [where]), octets)
            if self.bits == 4:
                low = b.and_(packed, splat(I8, OCTETS, 15))
                high = b.lshr(packed, splat(I8, OCTETS, 4))
                partial = add_products(b, b.load(part), low, state)
                b.store(add_products(b, partial, high, other), part)
            else:
                byte = b.xor(packed, splat(I8, OCTETS, 128))
                b.store(add_products(b, b.load(part), byte, state), part)

    def begin_group(self, group: Any) -> None:
        start = self.b.gep(self.starts, [self.b.mul(group, const(_INT_LANES))])
        for part in self.parts:
            self.b.store(load(self.b, start, vec(I32, _INT_LANES)), part)

    def end_group(self, group: Any) -> None:
        """Scale the group's integer sums and add them to the totals."""
        b, floats = self.b, vec(F32, _INT_LANES)
        factor = broadcast(b, b.load(b.gep(self.factors, [group])), vec(F32, _INT_LANES))
        for c, (part, total) in enumerate(zip(self.parts, self.totals, strict=True)):
            where = b.add(b.mul(self.groups, const(c)), group)
            # A broadcast of 16-bit lanes, shifted up in 32-bit lanes, is a float32 in every lane.
            bits = broadcast(b, b.load(b.gep(self.scales, [where])), vec(I16, 2 * _INT_LANES))
            lanes = b.shl(b.bitcast(bits, vec(I32, _INT_LANES)), splat(I32, _INT_LANES, 16))
            scale = b.fmul(b.bitcast(lanes, floats), factor)
            partial = b.sitofp(b.load(part), floats)
            fma = fma_function(b, _INT_LANES)
            b.store(b.call(fma, [partial, scale, b.load(total)]), total)

    def generate(self, group_size: Any) -> list[Any]:
        """Emit the loops over scale groups; returns `count` float32 values."""
        b = self.b
        step = const(2 * OCTETS if self.bits == 4 else OCTETS)
        # The usual size needs no inner loop, which costs a third of the scan's time.
        with b.if_else(b.icmp_unsigned("==", group_size, step)) as (then, otherwise):
            with then, cgutils.for_range(b, self.groups) as loop:
                self.begin_group(loop.index)
                self.add_octets(loop.index, const(OCTETS), const(0))
                self.end_group(loop.index)
            with otherwise, cgutils.for_range(b, self.groups) as loop:
                steps = b.udiv(group_size, step)
                self.begin_group(loop.index)
                with cgutils.for_range(b, steps) as inner:
                    offset = b.mul(inner.index, const(OCTETS))
                    self.add_octets(loop.index, b.mul(steps, const(OCTETS)), offset)
                self.end_group(loop.index)
        return [horizontal_sum(b, b.load(total), _INT_LANES) for total in self.totals]


def _make_integer_dot(bits: int, count: int) -> Any:
    """`dot(values, at, scales, scale_at, states, state_at, starts, start_at, factors, factor_at,
    groups, group_size)` -> `count` float32 values, of the centroid at `at` and those behind it.

    values: uint8 (int4 pairs) or int8; scales: bfloat16 bits, one a scale group; states: the hidden
    state in int8; starts: int32 `[groups, 8]`, the lanes that a group's sum starts from, which undo
    the offset of the stored bytes; factors: float32 scale of the hidden state, one a scale group.
    `group_size` is a multiple of 64 (int4) or 32 (int8).
    """

    # numba reads the arity from the function, so each argument has a name.
    def typer(
        _: Any, values: Any, at: Any, scales: Any, scale_at: Any, states: Any, state_at: Any,
        starts: Any, start_at: Any, factors: Any, factor_at: Any, groups: Any, group_size: Any,
    ) -> Any:  # fmt: skip
        signature = types.UniTuple(types.float32, count)(
            values, at, scales, scale_at, states, state_at,
            starts, start_at, factors, factor_at, groups, group_size,
        )  # fmt: skip

        def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
            sums = _IntegerDot(context, b, sig, args, bits, count).generate(args[11])
            return context.make_tuple(b, sig.return_type, sums)

        return signature, generate

    return intrinsic(typer)


dot_int4 = _make_integer_dot(4, 1)
dot_int4_4 = _make_integer_dot(4, 4)
dot_int8 = _make_integer_dot(8, 1)
dot_int8_4 = _make_integer_dot(8, 4)


_TILE_BYTES = 4 * TILE
_STARTS_STRIDE = 8


class _TileDot:
    """Code for one tile of `bits`-bit centroids against one hidden state."""

    def __init__(self, context: Any, b: ir.IRBuilder, sig: Any, args: Any, bits: int):
        self.b, self.bits = b, bits
        self.values, self.scales, self.states, self.starts, self.factors, self.scores = (
            pointer_at(context, b, sig.args[i], args[i], args[i + 1]) for i in range(0, 12, 2)
        )
        self.groups, self.group_size = args[12], args[13]
        self.columns = 2 if bits == 4 else 1

    def generate(self) -> None:
        """Emit the loop over scale groups and the store of sixteen float32 scores."""
        b, floats = self.b, vec(F32, TILE)
        total = cgutils.alloca_once_value(b, splat(F32, TILE, 0.0))
        usual = const(64)
        # Unrolled for the usual size: an inner loop would cost a third of the time.
        with b.if_else(b.icmp_unsigned("==", self.group_size, usual)) as (then, otherwise):
            with then, cgutils.for_range(b, self.groups) as loop:
                part = cgutils.alloca_once_value(b, self.start(loop.index))
                for step in range(64 // self.columns // 4):
                    self.add_octets(part, loop.index, usual, const(step))
                self.scale(total, loop.index, b.load(part))
            with otherwise, cgutils.for_range(b, self.groups) as loop:
                part = cgutils.alloca_once(b, vec(I32, TILE))
                b.store(self.start(loop.index), part)
                steps = b.udiv(self.group_size, const(4 * self.columns))
                with cgutils.for_range(b, steps) as inner:
                    self.add_octets(part, loop.index, self.group_size, inner.index)
                self.scale(total, loop.index, b.load(part))
        b.store(b.load(total), b.bitcast(self.scores, floats.as_pointer()), align=1)

    def start(self, group: Any) -> Any:
        """The sum that undoes the offset of the group's stored bytes, in every lane."""
        place = self.b.gep(self.starts, [self.b.mul(group, const(_STARTS_STRIDE))])
        return broadcast(self.b, self.b.load(place), vec(I32, TILE))

    def add_octets(self, part: Any, group: Any, group_size: Any, step: Any) -> None:
        """Add the products of four stored bytes of each centroid, `step` into the scale group."""
        b, octets = self.b, vec(I8, _TILE_BYTES)
        steps = b.udiv(group_size, const(4 * self.columns))
        place = b.mul(b.add(b.mul(group, steps), step), const(_TILE_BYTES))
        packed = load(b, b.gep(self.values, [place]), octets)
        column = b.add(b.mul(group, group_size), b.mul(step, const(4)))
        if self.bits == 8:
            byte = b.xor(packed, splat(I8, _TILE_BYTES, 128))
            b.store(add_products(b, b.load(part), byte, self.state(column)), part)
            return
        low = b.and_(packed, splat(I8, _TILE_BYTES, 15))
        high = b.lshr(packed, splat(I8, _TILE_BYTES, 4))
        total = add_products(b, b.load(part), low, self.state(column))
        second = b.add(column, b.udiv(group_size, const(2)))
        b.store(add_products(b, total, high, self.state(second)), part)

    def state(self, column: Any) -> Any:
        """Four bytes of the hidden state in every lane."""
        b = self.b
        word = b.bitcast(b.gep(self.states, [column]), I32.as_pointer())
        return b.bitcast(broadcast(b, b.load(word, align=1), vec(I32, TILE)), vec(I8, _TILE_BYTES))

    def scale(self, total: Any, group: Any, part: Any) -> None:
        """Add the group's integer sums to `total`, times the scales of centroids and state."""
        b, floats = self.b, vec(F32, TILE)
        place = b.gep(self.scales, [b.mul(group, const(TILE))])
        bits = b.zext(load(b, place, vec(I16, TILE)), vec(I32, TILE))
        scales = b.bitcast(b.shl(bits, splat(I32, TILE, 16)), floats)
        factor = broadcast(b, b.load(b.gep(self.factors, [group])), vec(F32, TILE))
        fma = fma_function(b, TILE)
        scaled = b.fmul(scales, factor)
        b.store(b.call(fma, [b.sitofp(part, floats), scaled, b.load(total)]), total)


def _make_tile_dot(bits: int) -> Any:
    """`dot(values, at, scales, scale_at, states, state_at, starts, start_at, factors, factor_at,
    scores, score_at, groups, group_size)` writes the sixteen products of the tile at `at`.

    Arguments as for `_make_integer_dot`; `group_size` is a multiple of 8 (int4) or 4 (int8).
    """

    # numba reads the arity from the function, so each argument has a name.
    def typer(
        _: Any, values: Any, at: Any, scales: Any, scale_at: Any, states: Any, state_at: Any,
        starts: Any, start_at: Any, factors: Any, factor_at: Any, scores: Any, score_at: Any,
        groups: Any, group_size: Any,
    ) -> Any:  # fmt: skip
        signature = types.void(
            values, at, scales, scale_at, states, state_at, starts, start_at, factors, factor_at,
            scores, score_at, groups, group_size,
        )  # fmt: skip

        def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
            _TileDot(context, b, sig, args, bits).generate()
            return context.get_dummy_value()

        return signature, generate

    return intrinsic(typer)


tile_dot_int4 = _make_tile_dot(4)
tile_dot_int8 = _make_tile_dot(8)
