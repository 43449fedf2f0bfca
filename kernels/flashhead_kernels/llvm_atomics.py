"""Words that threads share without a lock: atomic operations on elements of an int64 array."""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from flashhead_kernels.llvm_vectors import I32, I64, pointer_at

_BYTES = 8
_ARCHITECTURE = binding.get_process_triple().split("-")[0]


@intrinsic
def load_acquire(_: Any, array: Any, at: Any) -> Any:
    """`array[at]`, and all that its writer wrote before it."""
    signature = types.int64(array, at)

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        pointer = pointer_at(context, b, sig.args[0], args[0], args[1])
        return b.load_atomic(pointer, "acquire", _BYTES)

    return signature, generate


@intrinsic
def store_release(_: Any, array: Any, at: Any, value: Any) -> Any:
    """Set `array[at]`, after all that this thread wrote before."""
    signature = types.void(array, at, types.int64)

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        pointer = pointer_at(context, b, sig.args[0], args[0], args[1])
        b.store_atomic(args[2], pointer, "release", _BYTES)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def add_atomic(_: Any, array: Any, at: Any, value: Any) -> Any:
    """Add to `array[at]`; returns what it was."""
    signature = types.int64(array, at, types.int64)

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        pointer = pointer_at(context, b, sig.args[0], args[0], args[1])
        return b.atomic_rmw("add", pointer, args[2], "acq_rel")

    return signature, generate


@intrinsic
def exchange_if(_: Any, array: Any, at: Any, expected: Any, value: Any) -> Any:
    """Set `array[at]` where it is `expected`; returns whether it was, 1 or 0."""
    signature = types.int64(array, at, types.int64, types.int64)

    def generate(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> Any:
        pointer = pointer_at(context, b, sig.args[0], args[0], args[1])
        pair = b.cmpxchg(pointer, args[2], args[3], "acq_rel", "acquire")
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
