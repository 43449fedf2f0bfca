"""LLVM code that the CPU loops share."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

F32 = ir.FloatType()
I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FIRST = ir.Constant(I32, 0)


def vec(element: ir.Type, count: int) -> ir.VectorType:
    return ir.VectorType(element, count)


def const(value: int) -> ir.Constant:
    return ir.Constant(I64, value)


def splat(element: ir.Type, count: int, value: float) -> ir.Constant:
    return ir.Constant(vec(element, count), [value] * count)


def load(b: ir.IRBuilder, pointer: Any, kind: ir.VectorType) -> Any:
    return b.load(b.bitcast(pointer, kind.as_pointer()), align=1)


def pointer_at(context: Any, b: ir.IRBuilder, array_type: Any, array: Any, offset: Any) -> Any:
    return b.gep(context.make_array(array_type)(context, b, array).data, [offset])


def horizontal_sum(b: ir.IRBuilder, vector: Any, count: int) -> Any:
    undefined = ir.Constant(vector.type, ir.Undefined)
    while count > 1:
        count //= 2
        low = ir.Constant(vec(I32, count), list(range(count)))
        high = ir.Constant(vec(I32, count), list(range(count, 2 * count)))
        half = b.fadd(
            b.shuffle_vector(vector, undefined, low), b.shuffle_vector(vector, undefined, high)
        )
        vector, undefined = half, ir.Constant(half.type, ir.Undefined)
    return b.extract_element(vector, FIRST)


def broadcast(b: ir.IRBuilder, value: Any, kind: ir.VectorType) -> Any:
    """`value` in every lane."""
    undefined = ir.Constant(kind, ir.Undefined)
    first = b.insert_element(undefined, value, FIRST)
    return b.shuffle_vector(first, undefined, splat(I32, kind.count, 0))


def fma_function(b: ir.IRBuilder, count: int) -> Any:
    kind = vec(F32, count)
    signature = ir.FunctionType(kind, [kind] * 3)
    return cgutils.get_or_insert_function(b.module, signature, f"llvm.fma.v{count}f32")


@intrinsic
def float_bits(_: Any, value: Any) -> Any:
    """The bits of a float32 as int32."""
    signature = types.int32(types.float32)
    return signature, lambda context, b, sig, args: b.bitcast(args[0], I32)


@intrinsic
def bfloat16_value(_: Any, bits: Any) -> Any:
    """The float32 value of a bfloat16's bits (uint16)."""
    signature = types.float32(types.uint16)

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        return b.bitcast(b.shl(b.zext(args[0], I32), ir.Constant(I32, 16)), F32)

    return signature, generate


@intrinsic
def prefetch(_: Any, array: Any, at: Any) -> Any:
    """Ask for the cache line of `array[at]`."""
    signature = types.void(array, at)

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        pointer = b.bitcast(pointer_at(context, b, sig.args[0], args[0], args[1]), I8.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
        b.call(function, [pointer, *(ir.Constant(I32, value) for value in (0, 2, 1))])
        return context.get_dummy_value()

    return signature, generate
