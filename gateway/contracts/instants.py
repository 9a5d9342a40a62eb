"""Instants as people write them on a command line, in milliseconds since the epoch."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime


def instant_ms(text: str) -> int:
    """Milliseconds given as such, or an ISO 8601 date or time; UTC unless it names another zone. For argparse's `type`."""
    if text.isdigit():
        return int(text)
    try:
        at = datetime.fromisoformat(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither milliseconds nor a date like 2018-08-08 or 2018-08-08T12:00:00"
        ) from exc
    return round((at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp() * 1000)
