"""Dot products of int4 and int8 centroids with int8 hidden states, in LLVM's vector instructions.

Products of 32 bytes are summed as integers, exactly; each scale group's sum then meets its two
scales in float32. Four centroids go together: they share the loads of the hidden state, and a scan
that was bound by arithmetic comes near the memory's rate. One centroid alone gives the same bits.
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
    I8,
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

_LANES = 8
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
        self.parts = [cgutils.alloca_once(b, vec(I32, _LANES)) for _ in range(count)]
        self.totals = [cgutils.alloca_once(b, vec(F32, _LANES)) for _ in range(count)]
        for total in self.totals:
            b.store(splat(F32, _LANES, 0.0), total)

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
        start = self.b.gep(self.starts, [self.b.mul(group, const(_LANES))])
        for part in self.parts:
            self.b.store(load(self.b, start, vec(I32, _LANES)), part)

    def end_group(self, group: Any) -> None:
        """Scale the group's integer sums and add them to the totals."""
        b, floats = self.b, vec(F32, _LANES)
        factor = self._broadcast(b.load(b.gep(self.factors, [group])), F32, _LANES)
        for c, (part, total) in enumerate(zip(self.parts, self.totals, strict=True)):
            where = b.add(b.mul(self.groups, const(c)), group)
            # A broadcast of 16-bit lanes, shifted up in 32-bit lanes, is a float32 in every lane.
            bits = self._broadcast(b.load(b.gep(self.scales, [where])), I16, 2 * _LANES)
            lanes = b.shl(b.bitcast(bits, vec(I32, _LANES)), splat(I32, _LANES, 16))
            scale = b.fmul(b.bitcast(lanes, floats), factor)
            partial = b.sitofp(b.load(part), floats)
            fma = fma_function(b, _LANES)
            b.store(b.call(fma, [partial, scale, b.load(total)]), total)

    def _broadcast(self, value: Any, element: ir.Type, count: int) -> Any:
        undefined = ir.Constant(vec(element, count), ir.Undefined)
        first = self.b.insert_element(undefined, value, ir.Constant(I32, 0))
        return self.b.shuffle_vector(first, undefined, splat(I32, count, 0))

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
        return [horizontal_sum(b, b.load(total), _LANES) for total in self.totals]


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
