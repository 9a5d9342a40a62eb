"""`fraudgate chaos shadows`: what shadow models cost the answers of the gateway that runs, by turns with and without in one run.

The champion's own package stands for the shadows, so each costs what the champion does. Off and on take turns, and who is first alternates
from round to round (off on, on off, ...), so that what the machine does meanwhile falls on both. The manifest is put back at the end.
"""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from deploy.payments import payments
from gateway.contracts.decision import Route
from gateway.contracts.model_meta import SHADOW_PREFIX, Manifest, read_manifest, write_manifest
from gateway.contracts.settings import Settings
from loadtest.offered import offer, quantile
from loadtest.openloop.payments import run_name

SHADOWS = 3
SETTLE_S = 1.5
SEEN_WITHIN_S = 15.0
# A gateway of several workers is asked so often, in the hope of each.
ASKED = 12
CONNECTIONS = 200
P99_RATIO_MOST = 1.05


@dataclass(frozen=True)
class Turn:
    """One part of a run; times in milliseconds."""

    shadows: int
    p50_ms: float
    p99_ms: float
    other_than_decided: int


def _shadows_seen(settings: Settings) -> int:
    # The URL is our own setting, hence http.
    with urllib.request.urlopen(settings.gateway + "/routing", timeout=5) as reply:  # noqa: S310
        return len(json.loads(reply.read())["shadows"])


async def _until_seen(settings: Settings, shadows: int) -> None:
    deadline = time.monotonic() + SEEN_WITHIN_S
    while True:
        seen = [await asyncio.to_thread(_shadows_seen, settings) for _ in range(ASKED)]
        if set(seen) == {shadows}:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"the gateway doesn't serve with {shadows} shadow models within {SEEN_WITHIN_S:.0f} s")
        await asyncio.sleep(0.2)


def _manifest_with(manifest: Manifest, shadows: int) -> Manifest:
    routes = {route: entry for route, entry in manifest.routes.items() if not route.startswith(SHADOW_PREFIX)}
    champion = routes[Route.CHAMPION.value]
    return msgspec.structs.replace(manifest, routes=routes | {f"{SHADOW_PREFIX}-{i}": champion for i in range(shadows)})


async def _turn(settings: Settings, manifest: Manifest, shadows: int, rate: float, seconds: float) -> Turn:
    write_manifest(settings.models_path, _manifest_with(manifest, shadows))
    await _until_seen(settings, shadows)
    await asyncio.sleep(SETTLE_S)
    gc.collect()
    payment = payments(run_name("chaos-"))
    offered = await offer(settings.host, settings.gateway_port, lambda _: rate, seconds, payment, CONNECTIONS)
    answered = offered.answered()
    return Turn(
        shadows,
        round(quantile(answered, 0.5) * 1000, 2),
        round(quantile(answered, 0.99) * 1000, 2),
        len(offered.samples) - len(answered),
    )


async def shadow_turns(settings: Settings, rate: float, seconds: float, rounds: int) -> list[Turn]:
    """Twice `rounds` turns of `seconds`, at `rate` payments a second. Raises OSError, TimeoutError."""
    manifest = read_manifest(settings.models_path)
    turns: list[Turn] = []
    try:
        # The first after a pause pays for what the others find ready.
        await _turn(settings, manifest, SHADOWS, rate, seconds)
        order = [n for i in range(rounds) for n in ((0, SHADOWS) if i % 2 == 0 else (SHADOWS, 0))]
        turns += [await _turn(settings, manifest, shadows, rate, seconds) for shadows in order]
    finally:
        write_manifest(settings.models_path, manifest)
    return turns


def shadows_table(turns: Sequence[Turn]) -> str:
    lines = [f"{'':<16}{'p50 ms, median':>16}{'range':>16}{'p99 ms, median':>16}{'range':>16}{'not decided':>13}"]
    for shadows in (0, SHADOWS):
        of = [turn for turn in turns if turn.shadows == shadows]
        cells = ""
        for values in ([turn.p50_ms for turn in of], [turn.p99_ms for turn in of]):
            cells += f"{statistics.median(values):>16.2f}" + f"{min(values):.2f}..{max(values):.2f}".rjust(16)
        lines.append(f"{shadows} shadow models".ljust(16) + cells + f"{sum(turn.other_than_decided for turn in of):>13}")
    lines.append(f"p99 with them is {p99_ratio(turns):.3f} of p99 without, by medians of {len(turns) // 2} turns each")
    return "\n".join(lines)


def p99_ratio(turns: Sequence[Turn]) -> float:
    off, on = ([turn.p99_ms for turn in turns if turn.shadows == shadows] for shadows in (0, SHADOWS))
    return statistics.median(on) / statistics.median(off)


def shadow_complaints(turns: Sequence[Turn]) -> list[str]:
    """What was promised and not kept."""
    found = [] if p99_ratio(turns) <= P99_RATIO_MOST else [f"p99 is more than {P99_RATIO_MOST:.2f} of what it is without"]
    return found + (["some payments were not decided"] if any(turn.other_than_decided for turn in turns) else [])
