"""What a gateway tells the topic `audit`: policies that came into use or were refused, and what the audit file of its models says.

Records go the way of receipts (gateway/kafka/publisher.py): into the local log first, so that they outlive Kafka and this process.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from gateway.contracts.audit import (
    AUDIT_FILE,
    DETAIL_BYTES_MAX,
    ENTRY_BYTES_MAX,
    NEWLINE,
    POLICY_LOADED,
    POLICY_REFUSED,
    AuditEntry,
    AuditRecord,
    who,
)
from gateway.contracts.topics import AUDIT
from gateway.kafka import avro
from gateway.kafka.records import Record
from gateway.policy import Policy

log = logging.getLogger(__name__)

POLL_S = 2.0
# Of what a refusal says, which names every problem.
REASON_CHARS_MAX = 20_000
# What is read of the audit file at a time.
READ_BYTES_MAX = 64 * ENTRY_BYTES_MAX
CURSOR_BYTES = 64


def audit_record(entry: AuditRecord) -> Record:
    """Keyed by its subject."""
    return Record(AUDIT, entry.subject.encode()[:200], avro.encode(AUDIT, msgspec.structs.asdict(entry)))


def policy_loaded(policy: Policy, before: str | None) -> Record:
    """`before` is the digest of the policy that decided till now. A policy too large for a message goes without its text."""
    detail = json.dumps({name: data.decode(errors="replace") for name, data in policy.files.items()})
    reason = ""
    if len(detail.encode()) > DETAIL_BYTES_MAX:
        reason = f"the policy's text is not kept here: it has more than {DETAIL_BYTES_MAX} bytes"
        log.error("audit: %s", reason)
        detail = ""
    return _of_now(POLICY_LOADED, policy.digest, before, policy.digest, reason, detail)


def policy_refused(path: str, digest: str, why: str) -> Record:
    """`digest` is that of the policy that stays."""
    return _of_now(POLICY_REFUSED, path, digest, digest, why[:REASON_CHARS_MAX], "")


def _of_now(action: str, subject: str, before: str | None, after: str | None, reason: str, detail: str) -> Record:
    return audit_record(
        AuditRecord(
            at_ms=time.time_ns() // 1_000_000,
            who=who(),
            action=action,
            subject=subject,
            before=before,
            after=after,
            reason=reason,
            detail=detail,
        )
    )


class AuditForwarder:
    """Sends each line of a model directory's audit file to the topic: at least once, by one of the processes that look at it.

    `send` takes records and says by a future when they will not be lost. How far it has got stands in `cursor`, which the process at work
    holds locked. A line that comes twice is equal in all fields, `detail` with the sha256 of the line included.
    """

    def __init__(self, model_dir: Path, cursor: Path, send: Callable[[Sequence[Record]], asyncio.Future[None]]) -> None:
        self._file = model_dir / AUDIT_FILE
        self._cursor = cursor
        self._send = send

    async def run(self) -> None:
        """Looks for new lines until cancelled."""
        while True:
            try:
                await self.forward()
            except OSError as exc:
                log.warning("audit: the audit file of the models can't be forwarded now: %r", exc)
            await asyncio.sleep(POLL_S)

    async def forward(self) -> int:
        """Lines sent. Raises OSError."""
        fd = await asyncio.to_thread(self._lock)
        if fd is None:
            return 0
        try:
            sent = 0
            while True:
                records, note = await asyncio.to_thread(self._read, fd)
                if not note:
                    return sent
                if records:
                    kept = self._send(records)
                    await asyncio.wait({kept})
                    if kept.cancelled():
                        # There is no room: again another time.
                        return sent
                sent += len(records)
                os.pwrite(fd, note, 0)
        finally:
            os.close(fd)

    def _lock(self) -> int | None:
        """The cursor's file, None when another process has it or there is nothing to forward."""
        if not self._file.exists():
            return None
        self._cursor.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(self._cursor, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        return fd

    def _read(self, fd: int) -> tuple[list[Record], bytes]:
        """The next whole lines, and what the cursor is to say once they are sent; empty when there are none."""
        with self._file.open("rb") as file:
            stat = os.fstat(file.fileno())
            at = _position(fd, stat)
            file.seek(at)
            data = file.read(READ_BYTES_MAX)
        end = data.rfind(NEWLINE) + 1
        records = [record for line in data[:end].split(NEWLINE) if line and (record := _forwarded(line)) is not None]
        return records, f"{stat.st_ino} {at + end}\n".encode().ljust(CURSOR_BYTES) if end else b""


def _position(fd: int, stat: os.stat_result) -> int:
    """Where to go on in the file; the beginning of another one than the last time's, which a shorter one is too."""
    fields = os.pread(fd, CURSOR_BYTES, 0).split()
    if len(fields) == 2 and all(field.isdigit() for field in fields):
        inode, at = map(int, fields)
        if inode == stat.st_ino and at <= stat.st_size:
            return at
    return 0


def _forwarded(line: bytes) -> Record | None:
    try:
        entry = msgspec.json.decode(line, type=AuditEntry)
    except msgspec.DecodeError:
        log.warning("audit: a line of %d bytes of the audit file can't be read and stays there alone", len(line))
        return None
    detail = json.dumps({"sha256": hashlib.sha256(line).hexdigest()})
    return audit_record(AuditRecord(**msgspec.structs.asdict(entry), detail=detail))
