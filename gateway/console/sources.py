"""What other processes say of themselves: feature jobs, case service, Alertmanager. Asked over HTTP while somebody watches.

What one said last stays, with its age, when it doesn't answer any more: the page shows it as old, never as new.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from gateway.console.samples import TEXT_BYTES_MAX, Samples, read_text

POLL_S = 2.0
TIMEOUT_S = 1.5
ALERTS_SHOWN_MAX = 50


@dataclass
class Source:
    """`read` makes of an answer's body what is kept as `value`. `got_s` is when (monotonic); `trouble` why the last try brought nothing."""

    name: str
    url: str
    read: Callable[[bytes], Any]
    value: Any = None
    got_s: float | None = None
    trouble: str | None = None
    since_s: float | None = None

    def age_s(self, now_s: float) -> float | None:
        return None if self.got_s is None else max(0.0, now_s - self.got_s)

    def note(self, body: bytes | None, trouble: str, now_s: float) -> None:
        """What a try brought: a body, or why there is none."""
        if body is not None:
            try:
                self.value, self.got_s, self.trouble, self.since_s = self.read(body), now_s, None, None
            except (ValueError, KeyError, TypeError, msgspec.DecodeError) as exc:
                trouble = f"its answer can't be read ({type(exc).__name__})"
            else:
                return
        self.trouble = trouble
        if self.since_s is None:
            self.since_s = now_s


def asking() -> aiohttp.ClientSession:
    """Answers are taken as they come, hence asked for without compression: a small one could be unpacked to a huge one."""
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    return aiohttp.ClientSession(timeout=timeout, headers={"Accept-Encoding": "identity"}, trust_env=False, auto_decompress=False)


async def poll(session: aiohttp.ClientSession, source: Source, clock_s: Callable[[], float] = time.monotonic) -> None:
    """Ask once, TIMEOUT_S seconds at most."""
    body, trouble = None, ""
    try:
        async with session.get(source.url, allow_redirects=False) as reply:
            if reply.status == 200:
                body = await reply.content.read(TEXT_BYTES_MAX + 1)
                while len(body) <= TEXT_BYTES_MAX and (more := await reply.content.read(TEXT_BYTES_MAX + 1)):
                    body += more
            else:
                trouble = f"it answers {reply.status}"
    except TimeoutError:
        trouble = f"no answer within {TIMEOUT_S:g} s"
    except aiohttp.ClientConnectorError:
        trouble = "nobody listens"
    except (aiohttp.ClientError, OSError) as exc:
        trouble = f"the connection broke ({type(exc).__name__})"
    source.note(body, trouble, clock_s())


async def poll_forever(sources: list[Source], period_s: float = POLL_S) -> None:
    """All of them, every `period_s` seconds, until cancelled."""
    async with asking() as session:
        while True:
            await asyncio.gather(*[poll(session, source) for source in sources])
            await asyncio.sleep(period_s)


def read_jobs(body: bytes) -> Samples:
    """The feature jobs' metrics. Their histograms are left out: nothing is drawn of them."""
    return _ours(read_text(body, lambda line: line.startswith("fraudgate_jobs_") and "_bucket{" not in line))


def read_cases(body: bytes) -> Samples:
    return _ours(read_text(body, lambda line: line.startswith(("fraudgate_cases_", "fraudgate_webhook_"))))


def _ours(samples: Samples) -> Samples:
    """Raises ValueError when there are none: it is somebody else who answers."""
    if not samples:
        raise ValueError("none of the metrics that are expected")
    return samples


class _Status(msgspec.Struct, frozen=True):
    state: str = ""


class _Alert(msgspec.Struct, frozen=True, rename="camel"):
    """One of Alertmanager's API v2; what isn't shown isn't read."""

    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    starts_at: str = ""
    status: _Status = _Status()


def read_alertmanager(body: bytes) -> list[dict[str, str]]:
    """Firing alerts, the gravest first."""
    found = [alert for alert in msgspec.json.decode(body, type=list[_Alert]) if alert.status.state == "active"]
    shown = [
        {
            "name": alert.labels.get("alertname", "alert"),
            "severity": alert.labels.get("severity", ""),
            "summary": alert.annotations.get("summary", ""),
            "runbook": alert.annotations.get("runbook_url", alert.annotations.get("runbook", "")),
            "since": alert.starts_at,
        }
        for alert in found[:ALERTS_SHOWN_MAX]
    ]
    return sorted(shown, key=lambda alert: (alert["severity"] not in ("page", "critical"), alert["since"]))
