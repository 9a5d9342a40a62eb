"""Little-endian numbers, Avro's numbers and CRC-32 in byte buffers, for the other kernels. No index is checked here."""

from __future__ import annotations

import zlib

import numpy as np
import numpy.typing as npt

from gateway.kernels.compiled import compiled

Bytes = npt.NDArray[np.uint8]


@compiled
def u16(buf: Bytes, at: int) -> int:
    return np.int64(buf[at]) | np.int64(buf[at + 1]) << 8


@compiled
def u32(buf: Bytes, at: int) -> int:
    return np.int64(buf[at]) | np.int64(buf[at + 1]) << 8 | np.int64(buf[at + 2]) << 16 | np.int64(buf[at + 3]) << 24


@compiled
def i64(buf: Bytes, at: int) -> int:
    return u32(buf, at) | u32(buf, at + 4) << 32


@compiled
def u64(buf: Bytes, at: int) -> np.uint64:
    return np.uint64(i64(buf, at))


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
    out[at : at + length] = data[start : start + length]
    return at + length


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
