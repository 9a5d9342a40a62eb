"""How live traffic is shared between the models of a model directory, and how much of it may be explored.

<model_dir>/routing.json   Routing: the shares; written by `fraudgate route`, read by every gateway once a second. None: the settings'.
<model_dir>/guard.json     GuardFile: challengers that the guard has taken out; they stay out over restarts.

Both are replaced by one rename. The hash that splits cards and draws explorations is `point_of`: documented here because a receipt
must be explainable later, and computed for a batch by gateway/kernels/points.py, its fast twin.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path
from typing import TypeVar

import msgspec

from gateway.contracts.settings import Settings

ROUTING_FILE = "routing.json"
GUARD_FILE = "guard.json"
LOCK_FILE = ".guard.lock"
# A file larger than this is none of ours.
FILE_BYTES_MAX = 65_536
# The pairs of models that have counts of the guard in Redis.
GUARD_PAIRS_KEY = "fraudgate:guard-pairs"
AMOUNT_MINOR_MOST = 1_000_000_000_000

_MASK = (1 << 64) - 1
FNV_PRIME = 0x100000001B3
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class RoutingError(ValueError):
    """A routing file can't be read, or asks for what can't be. The message says what."""


class Routing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`challenger_share` of the cards go to the challenger. Of the payments that the model's score alone declines, up to
    `explore_amount_max_minor` each, `explore_share` are approved, at most `explore_loss_max_minor_per_day` of them a UTC day.
    """

    challenger_share: float = 0.1
    explore_share: float = 0.0
    explore_amount_max_minor: int = 0
    explore_loss_max_minor_per_day: int = 0

    def complaint(self) -> str | None:
        """What can't be, None when all of it can."""
        for name in ("challenger_share", "explore_share"):
            if not 0 <= getattr(self, name) <= 1:
                return f"{name} must be between 0 and 1"
        for name in ("explore_amount_max_minor", "explore_loss_max_minor_per_day"):
            if not 0 <= getattr(self, name) <= AMOUNT_MINOR_MOST:
                return f"{name} must be between 0 and {AMOUNT_MINOR_MOST} minor units"
        return None


def default_routing(settings: Settings) -> Routing:
    """What holds where the model directory has no routing.json."""
    return Routing(
        challenger_share=settings.challenger_share_permille / 1000,
        explore_share=settings.explore_share_permille / 1000,
        explore_amount_max_minor=settings.explore_amount_max_minor,
        explore_loss_max_minor_per_day=settings.explore_loss_max_minor_per_day,
    )


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """Why a challenger was taken out: which test, of what, and the counts it saw."""

    name: str
    version: str
    digest: str
    test: str
    detail: str
    at_ms: int


class GuardFile(msgspec.Struct, frozen=True, kw_only=True):
    """By the digest of a model's file: why it is out."""

    out: dict[str, Verdict] = {}


T = TypeVar("T")


def _read(path: Path, kind: type[T]) -> T | None:
    try:
        with path.open("rb") as f:
            content = f.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise RoutingError(f"{path.name} can't be read: {exc.strerror}") from exc
    if len(content) > FILE_BYTES_MAX:
        raise RoutingError(f"{path.name} is larger than {FILE_BYTES_MAX} bytes")
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.DecodeError as exc:
        raise RoutingError(f"{path.name}: {exc}") from exc


def _write(path: Path, value: msgspec.Struct) -> None:
    """By one rename, so that a reader sees the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as f:
        f.write(msgspec.json.format(msgspec.json.encode(value), indent=2))
        f.flush()
        os.fsync(f.fileno())
    partial.replace(path)


def read_routing(model_dir: Path) -> Routing | None:
    """What the file says, None when there is none. Raises `RoutingError`."""
    found = _read(model_dir / ROUTING_FILE, Routing)
    if found is not None and (complaint := found.complaint()) is not None:
        raise RoutingError(f"{ROUTING_FILE}: {complaint}")
    return found


def write_routing(model_dir: Path, routing: Routing) -> None:
    """Raises `RoutingError` for what can't be, OSError."""
    if (complaint := routing.complaint()) is not None:
        raise RoutingError(complaint)
    _write(model_dir / ROUTING_FILE, routing)


def read_guard(model_dir: Path) -> GuardFile:
    """What the guard has taken out. Raises `RoutingError`."""
    return _read(model_dir / GUARD_FILE, GuardFile) or GuardFile()


def take_out(model_dir: Path, verdict: Verdict) -> bool:
    """Add a verdict; False when that model is out already. Raises `RoutingError` or OSError."""
    with (model_dir / LOCK_FILE).open("w") as lock:
        # Several processes may come to the same verdict at once: one of them is the first.
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = read_guard(model_dir)
        if verdict.digest in before.out:
            return False
        _write(model_dir / GUARD_FILE, GuardFile(out={**before.out, verdict.digest: verdict}))
        return True


def clear_guard(model_dir: Path) -> list[Verdict]:
    """Let back in what was out. Returns what that was. Raises `RoutingError` or OSError."""
    before = read_guard(model_dir)
    (model_dir / GUARD_FILE).unlink(missing_ok=True)
    return list(before.out.values())


def guard_counts_key(pair: str) -> str:
    """Where the guard's counts of a pair are in Redis."""
    return f"fraudgate:{{guard:{pair}}}:counts"


def guard_cards_key(pair: str, day: int) -> str:
    """Where the cards are that were counted on a day, beside them."""
    return f"fraudgate:{{guard:{pair}}}:cards:{day}"


def salt_of(purpose: str, name: str) -> int:
    """The 64 bits that a hash begins with. Another purpose or name gives draws that have nothing to do with these."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{name}".encode()).digest()[:8], "little")


def route_salt(challenger_digest: str) -> int:
    """Each challenger gets a random part of the cards of its own; a changed share moves only the cards between the two shares."""
    return salt_of("route", challenger_digest)


EXPLORE_SALT = salt_of("explore", "1")


def point_of(text: bytes, salt: int) -> float:
    """Where `text` lies in [0, 1), uniformly: FNV-1a over its bytes from `salt`, finished by SplitMix64's mixing, the upper 53 bits.

    A card whose point is less than the share goes to the challenger; a transaction_id whose point is less than explore_share is explored.
    """
    h = salt
    for byte in text:
        h = ((h ^ byte) * FNV_PRIME) & _MASK
    h = ((h ^ (h >> 30)) * MIX_1) & _MASK
    h = ((h ^ (h >> 27)) * MIX_2) & _MASK
    return float(((h ^ (h >> 31)) >> 11) / (1 << 53))
