"""API keys: who may call, what for, and how often. Used by POST /score and by the case service.

A key is 256 random bits behind the prefix `fg_`; the file that `api_keys_path` names holds its sha256 alone, with name, scopes, rate,
expiry and revocation. A call costs one sha256, one dictionary look-up, one constant-time comparison and one token bucket, about a
microsecond (tests/unit/gateway/test_api_keys.py prints it). The file is read anew within a second of a change; one that can't be read
changes nothing. A bucket is of one process: with N workers a key has N times its rate at most.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

import msgspec

from gateway.contracts.transaction import ID_PATTERN, holds_card_number
from gateway.errors import ForbiddenError, GatewayError, RateLimitedError, UnauthorizedError

log = logging.getLogger(__name__)

Scope = Literal["score", "review", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
PREFIX = "fg_"
KEY_BITS = 256
# Longer is none of ours and isn't hashed.
PRESENTED_BYTES_MAX = 128
RATE_PER_S_MAX = 1_000_000
KEYS_MAX = 10_000
FILE_BYTES_MAX = 8 * 1024 * 1024
POLL_S = 1.0
AUTHORIZATION, X_API_KEY = b"authorization", b"x-api-key"
_BEARER = b"bearer "
_name_match = re.compile(ID_PATTERN[1:-1]).fullmatch
# A copy of a hash that was begun costs half of a new one.
_begun = hashlib.sha256()


class KeyFileError(GatewayError):
    """The file of keys can't be used. The message says why and never repeats what is in it."""

    reason = "api_keys"


class ApiKey(msgspec.Struct, frozen=True, kw_only=True):
    """`sha256` is of the whole key, hexadecimal. Times are the wall clock's."""

    name: str
    sha256: str
    scopes: list[Scope]
    rate_per_s: int
    created_at_ms: int
    expires_at_ms: int | None = None
    revoked_at_ms: int | None = None


class KeyFile(msgspec.Struct, frozen=True, kw_only=True):
    keys: list[ApiKey] = []
    version: int = 1


class Caller:
    """One key that is in force. `tokens` are the calls that it has left at `since_s`."""

    __slots__ = ("digest", "expires_at_s", "name", "rate_per_s", "scopes", "since_s", "tokens")

    def __init__(self, key: ApiKey) -> None:
        self.name = key.name
        self.digest = bytes.fromhex(key.sha256)
        self.scopes = frozenset(key.scopes)
        self.rate_per_s = key.rate_per_s
        self.expires_at_s = float("inf") if key.expires_at_ms is None else key.expires_at_ms / 1000
        self.tokens = float(key.rate_per_s)
        self.since_s = 0.0


def presented(authorization: bytes | None, x_api_key: bytes | None) -> bytes | None:
    """The key of a request, from the value of its header Authorization (Bearer), or of X-Api-Key; None without one."""
    if authorization is not None and authorization[:7].lower() == _BEARER:
        return authorization[7:].strip()
    return x_api_key


class KeyBook:
    """The keys of one file. `clock_s` is monotonic, `wall_s` the time that expiry is on.

    Raises `KeyFileError` when the file can't be read: who asks for keys is never served without.
    """

    def __init__(self, path: Path, clock_s: Callable[[], float] = time.monotonic, wall_s: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock_s = clock_s
        self._wall_s = wall_s
        self._seen: tuple[int, int, int] | None = None
        self._complaint: str | None = None
        self._callers: dict[bytes, Caller] = {}
        self._take()

    def __len__(self) -> int:
        return len(self._callers)

    def check(self, key: bytes | None, scope: Scope) -> Caller:
        """Whose key it is. Raises `UnauthorizedError` (none, unknown, revoked, expired), `ForbiddenError` (scope), `RateLimitedError`."""
        if key is None or len(key) > PRESENTED_BYTES_MAX:
            raise UnauthorizedError
        hashed = _begun.copy()
        hashed.update(key)
        digest = hashed.digest()
        caller = self._callers.get(digest)
        if caller is None or not hmac.compare_digest(caller.digest, digest) or self._wall_s() >= caller.expires_at_s:
            raise UnauthorizedError
        if scope not in caller.scopes:
            raise ForbiddenError
        now_s = self._clock_s()
        tokens = caller.tokens + (now_s - caller.since_s) * caller.rate_per_s
        caller.since_s = now_s
        if tokens > caller.rate_per_s:
            tokens = caller.rate_per_s
        if tokens < 1.0:
            caller.tokens = tokens
            raise RateLimitedError
        caller.tokens = tokens - 1.0
        return caller

    async def watch(self, poll_s: float = POLL_S) -> None:
        """Reads the file anew when it changes, until cancelled."""
        while True:
            await asyncio.sleep(poll_s)
            await asyncio.to_thread(self.refresh)

    def refresh(self) -> None:
        """Read the file if it is another than before. One that can't be used leaves the keys as they are, and is logged once."""
        try:
            if _stamp(self._path) != self._seen:
                self._take()
                log.info("api keys: %d in force", len(self))
            self._complaint = None
        except (KeyFileError, OSError) as exc:
            if str(exc) != self._complaint:
                log.error("api keys: those of before stay in force: %s", exc)  # noqa: TRY400
            self._complaint = str(exc)

    def _take(self) -> None:
        try:
            stamp = _stamp(self._path)
        except OSError as exc:
            raise KeyFileError(f"{self._path}: {exc.strerror}; make it with fraudgate keys create") from exc
        found = {}
        for key in read_keys(self._path).keys:
            if key.revoked_at_ms is None:
                caller = Caller(key)
                before = self._callers.get(caller.digest)
                if before is not None:
                    # What it has used up stays used up.
                    caller.tokens, caller.since_s = min(before.tokens, caller.tokens), before.since_s
                found[caller.digest] = caller
        # One exchange: whoever checks sees all of the old keys or all of the new.
        self._callers, self._seen = found, stamp


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def read_keys(path: Path) -> KeyFile:
    """Raises `KeyFileError`."""
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise KeyFileError(f"{path}: {exc.strerror}") from exc
    if len(content) > FILE_BYTES_MAX:
        raise KeyFileError(f"{path} is larger than {FILE_BYTES_MAX} bytes")
    try:
        found = msgspec.json.decode(content, type=KeyFile)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise KeyFileError(f"{path}: {exc}") from exc
    if len(found.keys) > KEYS_MAX:
        raise KeyFileError(f"{path} holds more than {KEYS_MAX} keys")
    for i, key in enumerate(found.keys):
        if not re.fullmatch("[0-9a-f]{64}", key.sha256) or not 1 <= key.rate_per_s <= RATE_PER_S_MAX:
            raise KeyFileError(f"{path}: key {i + 1} needs a sha256 of 64 hexadecimal digits and a rate in 1..{RATE_PER_S_MAX}")
    return found


def create_key(
    path: Path, name: str, scopes: Sequence[Scope], rate_per_s: int, *, expires_at_ms: int | None = None, now_ms: int | None = None
) -> tuple[str, ApiKey]:
    """Adds a key to the file, which is made when it isn't there. Returns the key itself, which is kept nowhere, and its entry.

    Raises `KeyFileError`, also for a name that a key in force has.
    """
    if _name_match(name) is None or holds_card_number(name):
        raise KeyFileError("a key's name has 1 to 64 of A-Z a-z 0-9 . _ : -")
    if not scopes or set(scopes) - set(SCOPES):
        raise KeyFileError(f"a key has one or more of the scopes {', '.join(SCOPES)}")
    if not 1 <= rate_per_s <= RATE_PER_S_MAX:
        raise KeyFileError(f"a key's rate is in 1..{RATE_PER_S_MAX} calls a second")
    secret = PREFIX + secrets.token_urlsafe(KEY_BITS // 8)
    made = ApiKey(
        name=name,
        sha256=hashlib.sha256(secret.encode()).hexdigest(),
        scopes=sorted(set(scopes)),
        rate_per_s=rate_per_s,
        created_at_ms=_now_ms() if now_ms is None else now_ms,
        expires_at_ms=expires_at_ms,
    )
    with _changing(path):
        before = read_keys(path) if path.exists() else KeyFile()
        if any(key.name == name and key.revoked_at_ms is None for key in before.keys):
            raise KeyFileError(f"there is a key of the name {name}: revoke it first")
        if len(before.keys) >= KEYS_MAX:
            raise KeyFileError(f"{path} holds {KEYS_MAX} keys, which is all it may")
        _write(path, KeyFile(keys=[*before.keys, made]))
    return secret, made


def revoke_key(path: Path, name: str, *, now_ms: int | None = None) -> ApiKey:
    """Marks the key of that name as revoked; the entry stays. Raises `KeyFileError` when none in force has the name."""
    with _changing(path):
        before = read_keys(path)
        for i, key in enumerate(before.keys):
            if key.name == name and key.revoked_at_ms is None:
                after = msgspec.structs.replace(key, revoked_at_ms=_now_ms() if now_ms is None else now_ms)
                _write(path, KeyFile(keys=[*before.keys[:i], after, *before.keys[i + 1 :]]))
                return after
    raise KeyFileError(f"no key in force has the name {name}")


@contextmanager
def _changing(path: Path) -> Iterator[None]:
    """One process at a time changes the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(path: Path, file: KeyFile) -> None:
    """By one rename, readable by its owner alone."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as f:
        f.write(msgspec.json.format(msgspec.json.encode(file), indent=2))
        f.flush()
        os.fsync(f.fileno())
    partial.replace(path)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
