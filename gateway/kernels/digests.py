"""MD5 (RFC 1321) of many pieces of one buffer. Called for each batch, for fingerprints and the hashes that heads hold.

What a call of hashlib costs is mostly the call, and a batch would make two a row. Its slow twin is hashlib (tests/agreement).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from gateway.kernels.compiled import allocating, compiled
from gateway.kernels.intake import Int64s
from gateway.kernels.raw import Bytes

Digests = npt.NDArray[np.uint8]

DIGEST_BYTES = 16
_BLOCK_BYTES, _LENGTH_BYTES = 64, 8
_SINES = np.array([int(abs(math.sin(i + 1)) * 2**32) for i in range(64)], np.uint32)
_START = np.array([0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476], np.uint32)


@compiled
def _turned(value: np.uint64, by: int) -> np.uint32:
    # Sums of 32-bit numbers have 64 bits here, of which the upper ones mean nothing.
    low = np.uint32(value)
    return np.uint32(np.uint32(low << np.uint32(by)) | np.uint32(low >> np.uint32(32 - by)))


@compiled
def _mix(state: npt.NDArray[np.uint32], w: npt.NDArray[np.uint32]) -> None:
    """One block of 16 words into `state` (4,). Four steps a turn of each loop, so that nothing is moved from a variable to another."""
    a, b, c, d = state[0], state[1], state[2], state[3]
    for i in range(0, 16, 4):
        a = b + _turned(a + ((b & c) | (~b & d)) + _SINES[i] + w[i], 7)
        d = a + _turned(d + ((a & b) | (~a & c)) + _SINES[i + 1] + w[i + 1], 12)
        c = d + _turned(c + ((d & a) | (~d & b)) + _SINES[i + 2] + w[i + 2], 17)
        b = c + _turned(b + ((c & d) | (~c & a)) + _SINES[i + 3] + w[i + 3], 22)
    for i in range(0, 16, 4):
        k = 5 * i + 1
        a = b + _turned(a + ((d & b) | (~d & c)) + _SINES[i + 16] + w[k & 15], 5)
        d = a + _turned(d + ((c & a) | (~c & b)) + _SINES[i + 17] + w[(k + 5) & 15], 9)
        c = d + _turned(c + ((b & d) | (~b & a)) + _SINES[i + 18] + w[(k + 10) & 15], 14)
        b = c + _turned(b + ((a & c) | (~a & d)) + _SINES[i + 19] + w[(k + 15) & 15], 20)
    for i in range(0, 16, 4):
        k = 3 * i + 5
        a = b + _turned(a + (b ^ c ^ d) + _SINES[i + 32] + w[k & 15], 4)
        d = a + _turned(d + (a ^ b ^ c) + _SINES[i + 33] + w[(k + 3) & 15], 11)
        c = d + _turned(c + (d ^ a ^ b) + _SINES[i + 34] + w[(k + 6) & 15], 16)
        b = c + _turned(b + (c ^ d ^ a) + _SINES[i + 35] + w[(k + 9) & 15], 23)
    for i in range(0, 16, 4):
        k = 7 * i
        a = b + _turned(a + (c ^ (b | ~d)) + _SINES[i + 48] + w[k & 15], 6)
        d = a + _turned(d + (b ^ (a | ~c)) + _SINES[i + 49] + w[(k + 7) & 15], 10)
        c = d + _turned(c + (a ^ (d | ~b)) + _SINES[i + 50] + w[(k + 14) & 15], 15)
        b = c + _turned(b + (d ^ (c | ~a)) + _SINES[i + 51] + w[(k + 21) & 15], 21)
    state[0] += a
    state[1] += b
    state[2] += c
    state[3] += d


@allocating
def md5(buf: Bytes, starts: Int64s, lengths: Int64s, out: Digests) -> None:
    """`out` (n, DIGEST_BYTES) gets the digest of `lengths[i]` bytes of `buf` from `starts[i]`; a length below 0 counts as 0."""
    block = np.empty(_BLOCK_BYTES, np.uint8)
    words = block.view(np.uint32)
    state = np.empty(4, np.uint32)
    for i in range(len(starts)):
        length = max(0, lengths[i])
        state[:] = _START
        at, end = starts[i], starts[i] + length
        while end - at >= _BLOCK_BYTES:
            block[:] = buf[at : at + _BLOCK_BYTES]
            _mix(state, words)
            at += _BLOCK_BYTES
        rest = end - at
        block[:] = 0
        block[:rest] = buf[at:end]
        block[rest] = 0x80
        if rest >= _BLOCK_BYTES - _LENGTH_BYTES:
            _mix(state, words)
            block[:] = 0
        words[14] = (length << 3) & 0xFFFFFFFF
        words[15] = length >> 29
        _mix(state, words)
        out[i] = state.view(np.uint8)
