"""What a trace of one decision consists of, and W3C's header `traceparent`, by which callers and readers join it to theirs.

Plain data: `gateway.tracing.tracer` chooses what is traced and keeps it, `gateway.tracing.export` makes spans of it.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

TRACEPARENT = "traceparent"
TRACEPARENT_HEADER = TRACEPARENT.encode()
# version, trace, caller's span, flags. A later version may have more behind another hyphen; version ff and zeros are no context.
_FORM = re.compile(rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)
_OURS = b"00-%b-%b-01"
_SAMPLED = 1


def accepted(value: bytes | None) -> bytes | None:
    """`value` if it is a traceparent, else None: who sends a malformed one gets a trace of our own, and no error."""
    if value is None:
        return None
    found = _FORM.fullmatch(value)
    # Version 00 ends with its flags.
    return None if found is None or (found[1] == b"00" and found[5] is not None) else value


def accepted_of(headers: Iterable[tuple[str, bytes | None]]) -> bytes | None:
    """The traceparent among the headers of a Kafka record."""
    for name, value in headers:
        if name == TRACEPARENT:
            return accepted(value)
    return None


def is_sampled(traceparent: bytes) -> bool:
    """Whether the caller records its own part of this trace. `traceparent` was accepted."""
    return bool(int(traceparent[53:55], 16) & _SAMPLED)


def trace_id_of(transaction_id: str) -> bytes:
    """The 16 bytes that name the trace of a transaction whose caller has none: `printf %s ID | md5sum` finds it again."""
    return hashlib.md5(transaction_id.encode(), usedforsecurity=False).digest()


@dataclass(slots=True, eq=False)
class Steps:
    """What the traces of one batch share. Times are time.monotonic(); `asked` is whether Redis was, `observed` whether it answered."""

    started_s: float
    observed_s: float
    modelled_s: float
    decided_s: float
    explained_s: float
    asked: bool
    observed: bool
    rows: int
    policy_digest: str
    lists_version: int


@dataclass(slots=True, eq=False)
class Trace:
    """Which spans one decision's are: the trace, the decision's own, and its caller's, None where it has none."""

    trace_id: bytes
    span_id: bytes
    parent_id: bytes | None
    steps: Steps

    @property
    def traceparent(self) -> bytes:
        """For whoever goes on with what was decided."""
        return _OURS % (self.trace_id.hex().encode(), self.span_id.hex().encode())


def trace_of(transaction_id: str, traceparent: bytes | None, steps: Steps) -> Trace:
    """A new trace, or a part of the caller's, whose `traceparent` was accepted."""
    span_id = secrets.token_bytes(8)
    if traceparent is None:
        return Trace(trace_id_of(transaction_id), span_id, None, steps)
    return Trace(bytes.fromhex(traceparent[3:35].decode()), span_id, bytes.fromhex(traceparent[36:52].decode()), steps)
