"""The audit file of a model directory: who changed which model or how much traffic it gets, when, from what to what, and why.

One JSON object a line in <model_dir>/audit.jsonl, only ever appended to. Written by `fraudgate promote`, `rollback`, `retrain`,
`route` and by the gateway's guard; an entry costs one write and one fsync.
"""

from __future__ import annotations

import fcntl
import getpass
import os
import socket
import time
from pathlib import Path

import msgspec

AUDIT_FILE = "audit.jsonl"
# A policy came into use: subject is its digest, detail its files, {relative name: text}.
POLICY_LOADED = "policy_loaded"
# A policy could not be used and the one before stays: subject is the setting's path, reason says where and why.
POLICY_REFUSED = "policy_refused"
# Most of an audit record's detail, so that the record fits into a message of any broker.
DETAIL_BYTES_MAX = 900_000
# An entry is a note, and one write must take it whole.
ENTRY_BYTES_MAX = 16_384
NEWLINE = b"\n"


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """`action` is what was done (promote, rollback, route ...), `subject` to what (an alias, a setting of routing.json).

    `before` and `after` are the subject's values as text, None where there was none. `at_ms` is the wall clock.
    """

    at_ms: int
    who: str
    action: str
    subject: str
    before: str | None
    after: str | None
    reason: str = ""


class AuditRecord(AuditEntry, frozen=True, kw_only=True):
    """One record of the topic `audit`; `schemas/audit.avsc` has the same fields in the same order.

    `detail` is JSON, or empty. A record may come twice, by another process or after trouble: then it is equal in all fields, or a
    `policy_loaded` of the same subject.
    """

    detail: str = ""


def who() -> str:
    """user@host of this process; the user's number where it has no name."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def append_audit(
    model_dir: Path,
    *,
    action: str,
    subject: str,
    before: str | None,
    after: str | None,
    reason: str = "",
    by: str | None = None,
    at_ms: int | None = None,
) -> AuditEntry:
    """Writes one entry and returns it; it is on the disk then. `by` is by default `who()`, `at_ms` now.

    Raises ValueError for an entry over ENTRY_BYTES_MAX, OSError when it could not be written whole.
    """
    entry = AuditEntry(
        at_ms=time.time_ns() // 1_000_000 if at_ms is None else at_ms,
        who=who() if by is None else by,
        action=action,
        subject=subject,
        before=before,
        after=after,
        reason=reason,
    )
    line = msgspec.json.encode(entry) + NEWLINE
    if len(line) > ENTRY_BYTES_MAX:
        raise ValueError(f"an audit entry has at most {ENTRY_BYTES_MAX} bytes, this one has {len(line)}")
    model_dir.mkdir(parents=True, exist_ok=True)
    fd = os.open(model_dir / AUDIT_FILE, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        size = os.fstat(fd).st_size
        # Half a line that a full disk or a power cut left must not spoil this one.
        if size and os.pread(fd, 1, size - 1) != NEWLINE:
            line = NEWLINE + line
        written = os.write(fd, line)
        os.fsync(fd)
    finally:
        os.close(fd)
    if written != len(line):
        raise OSError(f"{model_dir / AUDIT_FILE}: only {written} of {len(line)} bytes of an entry could be written")
    return entry


def read_audit(model_dir: Path) -> tuple[list[AuditEntry], int]:
    """The entries, oldest first, and how many lines could not be read. Nothing and 0 where there is no file."""
    try:
        lines = (model_dir / AUDIT_FILE).read_bytes().split(NEWLINE)
    except FileNotFoundError:
        return [], 0
    entries, unreadable = [], 0
    for line in filter(None, lines):
        try:
            entries.append(msgspec.json.decode(line, type=AuditEntry))
        except msgspec.DecodeError:
            unreadable += 1
    return entries, unreadable
