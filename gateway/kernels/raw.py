"""Little-endian numbers, Avro's numbers and CRC-32 in byte buffers, for the other kernels. No index is checked here."""

from __future__ import annotations

import sys
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gateway.kernels.compiled import compiled

Bytes = npt.NDArray[np.uint8]


assert sys.byteorder == "little", "packed values are read as they lie in memory"


def _reader(kind: types.Type, result: types.Type) -> Any:
    """A function (buf, at) that reads one number of `kind`, at any address, and widens it to `result`."""

    @intrinsic  # type: ignore[untyped-decorator]
    def read(_context: object, buf: types.Type, at: types.Type) -> tuple[Any, Any]:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            place = _address(context, builder, signature.args[0], arguments[0], arguments[1])
            number = context.get_value_type(kind)
            value = builder.load(builder.bitcast(place, number.as_pointer()))
            value.align = 1
            return context.cast(builder, value, kind, result)

        return result(buf, types.int64), generate

    return read


def _address(context: Any, builder: Any, kind: Any, buf: Any, at: Any) -> Any:
    """Of byte `at` of a buffer. An index of numba's own looks whether it is below 0 first, byte by byte."""
    assert (kind.dtype, kind.ndim, kind.layout) == (types.uint8, 1, "C"), "a buffer is bytes, one after the other"
    return builder.gep(context.make_array(kind)(context, builder, buf).data, [at])


_u16, _u32 = _reader(types.uint16, types.int64), _reader(types.uint32, types.int64)
_i64, _u64 = _reader(types.int64, types.int64), _reader(types.uint64, types.uint64)
_f32, _f64 = _reader(types.float32, types.float64), _reader(types.float64, types.float64)


@intrinsic  # type: ignore[untyped-decorator]
def _copy(_context: object, out: types.Type, at: types.Type, data: types.Type, start: types.Type, length: types.Type) -> Any:
    """memcpy. Slices would ask whether the two overlap, and have a copy made in case they do."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out_, at_, data_, start_, length_ = arguments
        to = _address(context, builder, signature.args[0], out_, at_)
        cgutils.raw_memcpy(builder, to, _address(context, builder, signature.args[2], data_, start_), length_, 1)
        return context.get_dummy_value()

    return types.void(out, types.int64, data, types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def _put_u64(_context: object, out: types.Type, at: types.Type, value: types.Type) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _address(context, builder, signature.args[0], arguments[0], arguments[1])
        number = context.get_value_type(types.uint64)
        builder.store(arguments[2], builder.bitcast(place, number.as_pointer())).align = 1
        return context.get_dummy_value()

    return types.void(out, types.int64, types.uint64), generate


@intrinsic  # type: ignore[untyped-decorator]
def bits_of(_context: object, value: types.Type) -> Any:
    """The 64 bits of a double."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.uint64))

    return types.uint64(types.float64), generate


@compiled
def u16(buf: Bytes, at: int) -> int:
    found: int = _u16(buf, at)
    return found


@compiled
def u32(buf: Bytes, at: int) -> int:
    found: int = _u32(buf, at)
    return found


@compiled
def i64(buf: Bytes, at: int) -> int:
    found: int = _i64(buf, at)
    return found


@compiled
def u64(buf: Bytes, at: int) -> np.uint64:
    found: np.uint64 = _u64(buf, at)
    return found


@compiled
def f32(buf: Bytes, at: int) -> float:
    found: float = _f32(buf, at)
    return found


@compiled
def f64(buf: Bytes, at: int) -> float:
    found: float = _f64(buf, at)
    return found


# One entry for each value of a byte, by the polynomial that zlib uses. Whether all bits are flipped or not cancels out.
_CRC_TABLE = np.array([zlib.crc32(bytes([i])) ^ zlib.crc32(b"\0") for i in range(256)], np.int64)
_CRC_ALL = 0xFFFFFFFF


@compiled
def crc32(buf: Bytes, at: int, length: int, start: int) -> int:
    """As zlib.crc32(buf[at : at + length], start)."""
    crc = start ^ _CRC_ALL
    for i in range(at, at + length):
        crc = _CRC_TABLE[(crc ^ np.int64(buf[i])) & 0xFF] ^ (crc >> 8)
    return crc ^ _CRC_ALL


@compiled
def put_bytes(out: Bytes, at: int, data: Bytes, start: int, length: int) -> int:
    """Copies `length` bytes of `data` from `start`. Returns where the next byte goes, like all put_* functions."""
    _copy(out, at, data, start, length)
    return at + length


@compiled
def put_f64(out: Bytes, at: int, value: float) -> int:
    """Avro's double."""
    _put_u64(out, at, bits_of(value))
    return at + 8


@compiled
def put_long(out: Bytes, at: int, value: int) -> int:
    """Avro's int and long: zigzag, then 7 bits a byte, the lowest first."""
    rest = np.uint64((value << 1) ^ (value >> 63))
    while rest > np.uint64(0x7F):
        out[at] = np.uint8(rest & np.uint64(0x7F)) | np.uint8(0x80)
        rest >>= np.uint64(7)
        at += 1
    out[at] = np.uint8(rest)
    return at + 1


@compiled
def put_decimal(out: Bytes, at: int, value: int) -> int:
    """`value`, not negative, in decimal digits."""
    digits = 1
    rest = value
    while rest >= 10:
        rest //= 10
        digits += 1
    for i in range(digits):
        out[at + digits - 1 - i] = np.uint8(48 + value % 10)
        value //= 10
    return at + digits
