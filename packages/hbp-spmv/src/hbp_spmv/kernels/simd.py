# SPDX-License-Identifier: Apache-2.0
"""Vector registers and gathers for numba kernels, as LLVM intrinsics on raw addresses.

numba has no vector type and its array indexing adds a sign test that keeps `x[col[p]]` from
vectorising. The functions here emit the LLVM instructions directly: a kernel reads like C
intrinsics, needs no C compiler, and LLVM lowers it to AVX-512, AVX2, NEON or scalar code.

Addresses are plain integers, offsets count elements. `size` is the element size in bytes (4 or 8
for values; 2, 4 or 8 for unsigned indices), `lanes` the vector length; both must be compile-time
constants of the calling kernel (literals, globals or closure variables).
"""

import zlib
from functools import cache
from pathlib import Path
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

__all__ = [
    "AHEAD",
    "Vector",
    "declare",
    "element_pointer",
    "float_from_bits",
    "float_of_size",
    "fma",
    "load_float",
    "load_index",
    "prefetch",
    "sources_stamp",
    "store_float",
    "vector_extract",
    "vector_fma",
    "vector_gather",
    "vector_greater",
    "vector_load",
    "vector_load_lengths",
    "vector_popcount",
    "vector_select",
    "vector_splat",
    "vector_store",
    "vector_zero",
]

AHEAD = 2048
"""Bytes of values by which prefetches run ahead: up to 1.4 times faster from memory."""

_I1, _I32, _I64 = ir.IntType(1), ir.IntType(32), ir.IntType(64)
_ELEMENTS = {
    "f64": ir.DoubleType(),
    "f32": ir.FloatType(),
    "i32": _I32,
    "i1": _I1,
}
_SCALARS = {"f64": types.float64, "f32": types.float32}


@cache
def sources_stamp() -> int:
    """Return a checksum of the kernel sources, read once in a process.

    numba keys its cache by the file that defines a function, not by the files that function calls.
    A task that mentions this number is compiled anew when any kernel source changes.
    """
    files = sorted(Path(__file__).parent.glob("*.py"))
    return zlib.crc32(b"".join(file.read_bytes() for file in files))


class Vector(types.Type):
    """numba type of a fixed-length SIMD register, e.g. 16 lanes of `f64`."""

    def __init__(self, element: str, lanes: int) -> None:
        self.element = element
        self.lanes = lanes
        super().__init__(f"Vector({element}, {lanes})")

    @property
    def key(self) -> tuple[str, int]:
        """What makes two such types the same."""
        return (self.element, self.lanes)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, _llvm_vector(fe_type))


def _llvm_vector(vector: Vector) -> ir.VectorType:
    return ir.VectorType(_ELEMENTS[vector.element], vector.lanes)


def _literal(value) -> Any:
    """Return a compile-time int, or None: then numba tries again with literal arguments."""
    return value.literal_value if isinstance(value, types.IntegerLiteral) else None


def _float_name(size: int) -> str:
    return "f64" if size == 8 else "f32"


def element_pointer(builder, base, offset, element, size: int):
    """Return a typed pointer to element `offset` of the array at integer address `base`."""
    address = builder.add(base, builder.mul(offset, ir.Constant(_I64, size)))
    return builder.inttoptr(address, element.as_pointer())


def declare(builder, name: str, result, arguments):
    """Return an LLVM function of this module by name, declaring it on first use."""
    module = builder.module
    found = module.globals.get(name)
    return found or ir.Function(module, ir.FunctionType(result, arguments), name)


def _broadcast(builder, scalar, lanes: int):
    vector = ir.VectorType(scalar.type, lanes)
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    mask = ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes)
    return builder.shuffle_vector(first, undefined, mask)


# Scalars


@intrinsic
def load_float(typingctx, base, offset, size):
    """Load a floating-point value of `size` bytes."""
    width = _literal(size)
    if width is None:
        return None
    name = _float_name(width)

    def codegen(context, builder, signature, args):
        pointer = element_pointer(builder, args[0], args[1], _ELEMENTS[name], width)
        return builder.load(pointer, align=width)

    return _SCALARS[name](types.int64, types.int64, size), codegen


@intrinsic
def store_float(typingctx, base, offset, value, size):
    """Store a floating-point value of `size` bytes."""
    width = _literal(size)
    if width is None:
        return None
    name = _float_name(width)

    def codegen(context, builder, signature, args):
        pointer = element_pointer(builder, args[0], args[1], _ELEMENTS[name], width)
        builder.store(args[2], pointer, align=width)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, _SCALARS[name], size), codegen


@intrinsic
def load_index(typingctx, base, offset, size):
    """Load an unsigned index of `size` bytes and zero-extend it to 64 bits."""
    width = _literal(size)
    if width is None:
        return None

    def codegen(context, builder, signature, args):
        pointer = element_pointer(builder, args[0], args[1], ir.IntType(8 * width), width)
        value = builder.load(pointer, align=width)
        return value if width == 8 else builder.zext(value, _I64)

    return types.int64(types.int64, types.int64, size), codegen


@intrinsic
def fma(typingctx, a, b, c):
    """Return `a * b + c` with a single rounding."""
    if a not in (types.float32, types.float64):
        return None
    element = ir.DoubleType() if a == types.float64 else ir.FloatType()
    name = "llvm.fma.f64" if a == types.float64 else "llvm.fma.f32"

    def codegen(context, builder, signature, args):
        return builder.call(declare(builder, name, element, [element] * 3), args)

    return a(a, a, a), codegen


@intrinsic
def float_from_bits(typingctx, bits):
    """Reinterpret 64 bits as a double."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), codegen


@intrinsic
def float_of_size(typingctx, value, size):
    """Convert a double to the floating-point type of `size` bytes."""
    width = _literal(size)
    if width is None:
        return None
    name = _float_name(width)

    def codegen(context, builder, signature, args):
        return args[0] if width == 8 else builder.fptrunc(args[0], ir.FloatType())

    return _SCALARS[name](types.float64, size), codegen


# Vectors


@intrinsic
def vector_zero(typingctx, lanes, size):
    """Return a register of zeros."""
    if _literal(lanes) is None or _literal(size) is None:
        return None
    vector = Vector(_float_name(_literal(size)), _literal(lanes))

    def codegen(context, builder, signature, args):
        return ir.Constant(_llvm_vector(vector), None)

    return vector(lanes, size), codegen


@intrinsic
def vector_splat(typingctx, value, lanes):
    """Return a register that holds `value` in every lane."""
    if _literal(lanes) is None or value not in (types.float32, types.float64):
        return None
    vector = Vector("f64" if value == types.float64 else "f32", _literal(lanes))

    def codegen(context, builder, signature, args):
        return _broadcast(builder, args[0], vector.lanes)

    return vector(value, lanes), codegen


@intrinsic
def vector_load(typingctx, base, offset, lanes, size):
    """Load `lanes` neighbouring values."""
    if _literal(lanes) is None or _literal(size) is None:
        return None
    width = _literal(size)
    vector = Vector(_float_name(width), _literal(lanes))

    def codegen(context, builder, signature, args):
        pointer = element_pointer(builder, args[0], args[1], _llvm_vector(vector), width)
        return builder.load(pointer, align=width)

    return vector(types.int64, types.int64, lanes, size), codegen


@intrinsic
def vector_store(typingctx, base, offset, value, size):
    """Store a register to neighbouring values."""
    width = _literal(size)
    if width is None or not isinstance(value, Vector):
        return None

    def codegen(context, builder, signature, args):
        pointer = element_pointer(builder, args[0], args[1], _llvm_vector(value), width)
        builder.store(args[2], pointer, align=width)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, value, size), codegen


@intrinsic
def vector_fma(typingctx, a, b, c):
    """Return `a * b + c` lane by lane with a single rounding."""
    if not isinstance(a, Vector):
        return None
    name = f"llvm.fma.v{a.lanes}{a.element}"

    def codegen(context, builder, signature, args):
        llvm = _llvm_vector(a)
        return builder.call(declare(builder, name, llvm, [llvm] * 3), args)

    return a(a, a, a), codegen


@intrinsic
def vector_extract(typingctx, vector, lane):
    """Return one lane of a floating-point register."""
    if not isinstance(vector, Vector):
        return None

    def codegen(context, builder, signature, args):
        return builder.extract_element(args[0], builder.trunc(args[1], _I32))

    return _SCALARS[vector.element](vector, types.int64), codegen


@intrinsic
def vector_gather(typingctx, x, col, offset, lanes, size, index_size, hardware):
    """Load `x[col[offset + q]]` into lane q.

    `hardware` (0 or 1) chooses between `llvm.masked.gather` and one scalar load per lane: the
    gather instruction wins on some Intel cores and loses on AMD ones; `calibrate` measures it.
    """
    constants = [_literal(item) for item in (lanes, size, index_size, hardware)]
    if None in constants:
        return None
    count, width, index_width, use_gather = constants
    vector = Vector(_float_name(width), count)
    emit = _hardware_gather if use_gather else _scalar_gather

    def codegen(context, builder, signature, args):
        return emit(builder, args[0], args[1], args[2], vector, width, index_width)

    signature = vector(types.int64, types.int64, types.int64, lanes, size, index_size, hardware)
    return signature, codegen


def _scalar_gather(builder, x, col, offset, vector, width, index_width):
    """Load lane by lane; from 8 lanes on, indices come 8 bytes at a time (little-endian).

    Load ports are the bottleneck then: 1.15 times faster with 16 lanes, 1.1 times slower with 4.
    """
    together = 8 // index_width if vector.lanes >= 8 else 1
    bits = 8 * index_width
    word_type = _I64 if together > 1 else ir.IntType(bits)
    result = ir.Constant(_llvm_vector(vector), ir.Undefined)
    word = None
    for lane in range(vector.lanes):
        part = lane % together
        if part == 0:
            position = builder.add(offset, ir.Constant(_I64, lane))
            pointer = element_pointer(builder, col, position, word_type, index_width)
            word = builder.load(pointer, align=index_width)
        index = word if part == 0 else builder.lshr(word, ir.Constant(_I64, bits * part))
        if word_type.width < 64:
            index = builder.zext(index, _I64)
        elif part < together - 1:
            index = builder.and_(index, ir.Constant(_I64, (1 << bits) - 1))
        source = element_pointer(builder, x, index, _ELEMENTS[vector.element], width)
        element = builder.load(source, align=width)
        result = builder.insert_element(result, element, ir.Constant(_I32, lane))
    return result


def _hardware_gather(builder, x, col, offset, vector, width, index_width):
    lanes = vector.lanes
    indices = ir.VectorType(ir.IntType(8 * index_width), lanes)
    pointer = element_pointer(builder, col, offset, indices, index_width)
    wide = ir.VectorType(_I64, lanes)
    index = builder.load(pointer, align=index_width)
    index = index if index_width == 8 else builder.zext(index, wide)
    stride = ir.Constant(wide, [width] * lanes)
    address = builder.add(_broadcast(builder, x, lanes), builder.mul(index, stride))
    pointers = ir.VectorType(_ELEMENTS[vector.element].as_pointer(), lanes)
    mask = ir.VectorType(_I1, lanes)
    llvm = _llvm_vector(vector)
    name = f"llvm.masked.gather.v{lanes}{vector.element}.v{lanes}p0"
    function = declare(builder, name, llvm, [pointers, _I32, mask, llvm])
    every = ir.Constant(mask, [1] * lanes)
    return builder.call(
        function,
        [
            builder.inttoptr(address, pointers),
            ir.Constant(_I32, width),
            every,
            ir.Constant(llvm, ir.Undefined),
        ],
    )


@intrinsic
def prefetch(typingctx, base, offset, size):
    """Ask for the cache line of element `offset`, to be read once, without waiting for it."""
    width = _literal(size)
    if width is None:
        return None

    def codegen(context, builder, signature, args):
        byte = ir.IntType(8).as_pointer()
        address = builder.add(args[0], builder.mul(args[1], ir.Constant(_I64, width)))
        function = declare(builder, "llvm.prefetch.p0", ir.VoidType(), [byte, _I32, _I32, _I32])
        hints = [ir.Constant(_I32, hint) for hint in (0, 3, 1)]  # read, keep in cache, data
        builder.call(function, [builder.inttoptr(address, byte), *hints])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, size), codegen


@intrinsic
def vector_load_lengths(typingctx, base, offset, lanes):
    """Load `lanes` int32 row lengths."""
    if _literal(lanes) is None:
        return None
    vector = Vector("i32", _literal(lanes))

    def codegen(context, builder, signature, args):
        pointer = element_pointer(builder, args[0], args[1], _llvm_vector(vector), 4)
        return builder.load(pointer, align=4)

    return vector(types.int64, types.int64, lanes), codegen


@intrinsic
def vector_greater(typingctx, lengths, step):
    """Return the mask of lanes whose length exceeds `step`."""
    if not isinstance(lengths, Vector):
        return None
    mask = Vector("i1", lengths.lanes)

    def codegen(context, builder, signature, args):
        step32 = _broadcast(builder, builder.trunc(args[1], _I32), lengths.lanes)
        return builder.icmp_signed(">", args[0], step32)

    return mask(lengths, types.int64), codegen


@intrinsic
def vector_popcount(typingctx, mask):
    """Return the number of set lanes."""
    if not isinstance(mask, Vector):
        return None
    bits = ir.IntType(mask.lanes)

    def codegen(context, builder, signature, args):
        function = declare(builder, f"llvm.ctpop.i{mask.lanes}", bits, [bits])
        count = builder.call(function, [builder.bitcast(args[0], bits)])
        return builder.zext(count, _I64)

    return types.int64(mask), codegen


@intrinsic
def vector_select(typingctx, mask, yes, no):
    """Return `yes` where the mask is set, else `no`."""
    if not isinstance(yes, Vector):
        return None

    def codegen(context, builder, signature, args):
        return builder.select(*args)

    return yes(mask, yes, yes), codegen
