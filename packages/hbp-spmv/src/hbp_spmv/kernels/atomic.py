# SPDX-License-Identifier: Apache-2.0
"""Atomics and calls by address for the worker pool, as LLVM intrinsics; see `kernels.simd`."""

import platform

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hbp_spmv.kernels.simd import declare, element_pointer

__all__ = [
    "atomic_add",
    "atomic_exchange",
    "atomic_load",
    "atomic_store",
    "call_native",
    "call_task",
    "spin_pause",
]

_I32, _I64 = ir.IntType(32), ir.IntType(64)


@intrinsic
def atomic_add(typingctx, base, offset, value):
    """Add to the int64 at `base[offset]` and return what it held before."""

    def codegen(context, builder, signature, args):
        pointer = element_pointer(builder, args[0], args[1], _I64, 8)
        return builder.atomic_rmw("add", pointer, args[2], "seq_cst")

    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def atomic_exchange(typingctx, base, offset, value):
    """Store to the int64 at `base[offset]` and return what it held before."""

    def codegen(context, builder, signature, args):
        pointer = element_pointer(builder, args[0], args[1], _I64, 8)
        return builder.atomic_rmw("xchg", pointer, args[2], "seq_cst")

    return types.int64(types.int64, types.int64, types.int64), codegen


@intrinsic
def atomic_load(typingctx, base, offset):
    """Load the int64 at `base[offset]`, sequentially consistent."""

    def codegen(context, builder, signature, args):
        pointer = element_pointer(builder, args[0], args[1], _I64, 8)
        return builder.load_atomic(pointer, "seq_cst", 8)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_store(typingctx, base, offset, value):
    """Store to the int64 at `base[offset]`, sequentially consistent."""

    def codegen(context, builder, signature, args):
        pointer = element_pointer(builder, args[0], args[1], _I64, 8)
        builder.store_atomic(args[2], pointer, "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def spin_pause(typingctx):
    """Tell the core that this is a spin-wait loop (x86 `pause`; nothing elsewhere)."""

    def codegen(context, builder, signature, args):
        if platform.machine().lower() in ("x86_64", "amd64"):
            builder.call(declare(builder, "llvm.x86.sse2.pause", ir.VoidType(), []), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def call_task(typingctx, address, job, worker):
    """Call the compiled task `void task(int64 job, int64 worker)` at `address`."""

    def codegen(context, builder, signature, args):
        function = ir.FunctionType(ir.VoidType(), [_I64, _I64])
        builder.call(builder.inttoptr(args[0], function.as_pointer()), [args[1], args[2]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def call_native(typingctx, address, first, second, third):
    """Call the C function at `address` with three integers or addresses; return its int.

    A function that takes fewer of them ignores the rest: they travel in registers.
    """

    def codegen(context, builder, signature, args):
        function = ir.FunctionType(_I32, [_I64, _I64, _I64])
        result = builder.call(builder.inttoptr(args[0], function.as_pointer()), args[1:])
        return builder.sext(result, _I64)

    signature = types.int64(types.int64, types.int64, types.int64, types.int64)
    return signature, codegen
