"""Dot products of a tile of sixteen integer centroids with an int8 hidden state.

A tile interleaves its centroids by four bytes (see `quantize.tile_centroids`), so that lane i of a
vector is centroid i: sums need no reduction over lanes, a hidden state's four bytes are broadcast
from memory, and one vector holds the scales of all sixteen. Half the instructions of a product of
single centroids, which are bound by arithmetic even when they come from memory; the processor's own
prefetch then keeps up without help. Integer sums are exact; each scale group's sum then meets its
two scales in float32, in the order of the groups.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from flashhead_kernels.llvm_integer_dot import add_products
from flashhead_kernels.llvm_vectors import (
    F32,
    FIRST,
    I8,
    I16,
    I32,
    const,
    fma_function,
    load,
    pointer_at,
    splat,
    vec,
)
from flashhead_kernels.quantize import TILE

_OCTETS = 4 * TILE
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
        return self.broadcast(self.b.load(place), I32)

    def add_octets(self, part: Any, group: Any, group_size: Any, step: Any) -> None:
        """Add the products of four stored bytes of each centroid, `step` into the scale group."""
        b, octets = self.b, vec(I8, _OCTETS)
        steps = b.udiv(group_size, const(4 * self.columns))
        place = b.mul(b.add(b.mul(group, steps), step), const(_OCTETS))
        packed = load(b, b.gep(self.values, [place]), octets)
        column = b.add(b.mul(group, group_size), b.mul(step, const(4)))
        if self.bits == 8:
            byte = b.xor(packed, splat(I8, _OCTETS, 128))
            b.store(add_products(b, b.load(part), byte, self.state(column)), part)
            return
        low = b.and_(packed, splat(I8, _OCTETS, 15))
        high = b.lshr(packed, splat(I8, _OCTETS, 4))
        total = add_products(b, b.load(part), low, self.state(column))
        second = b.add(column, b.udiv(group_size, const(2)))
        b.store(add_products(b, total, high, self.state(second)), part)

    def state(self, column: Any) -> Any:
        """Four bytes of the hidden state in every lane."""
        b = self.b
        word = b.bitcast(b.gep(self.states, [column]), I32.as_pointer())
        return b.bitcast(self.broadcast(b.load(word, align=1), I32), vec(I8, _OCTETS))

    def scale(self, total: Any, group: Any, part: Any) -> None:
        """Add the group's integer sums to `total`, times the scales of centroids and state."""
        b, floats = self.b, vec(F32, TILE)
        place = b.gep(self.scales, [b.mul(group, const(TILE))])
        bits = b.zext(load(b, place, vec(I16, TILE)), vec(I32, TILE))
        scales = b.bitcast(b.shl(bits, splat(I32, TILE, 16)), floats)
        factor = self.broadcast(b.load(b.gep(self.factors, [group])), F32)
        fma = fma_function(b, TILE)
        scaled = b.fmul(scales, factor)
        b.store(b.call(fma, [b.sitofp(part, floats), scaled, b.load(total)]), total)

    def broadcast(self, value: Any, element: ir.Type) -> Any:
        undefined = ir.Constant(vec(element, TILE), ir.Undefined)
        first = self.b.insert_element(undefined, value, FIRST)
        return self.b.shuffle_vector(first, undefined, splat(I32, TILE, 0))


def _make_tile_dot(bits: int) -> Any:
    """`dot(values, at, scales, scale_at, states, state_at, starts, start_at, factors, factor_at,
    scores, score_at, groups, group_size)` writes the sixteen products of the tile at `at`.

    Arguments as for `llvm_integer_dot`; `group_size` is a multiple of 8 (int4) or 4 (int8).
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
