"""`fraudgate route`: how live traffic is shared between champion and challenger, and how much of it is explored."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

import msgspec

from gateway.contracts.audit import append_audit
from gateway.contracts.routing import (
    GUARD_PAIRS_KEY,
    Routing,
    RoutingError,
    Verdict,
    clear_guard,
    default_routing,
    guard_cards_key,
    guard_counts_key,
    read_guard,
    read_routing,
    write_routing,
)
from gateway.contracts.settings import Settings, load_settings
from gateway.redis.cluster import link_to
from gateway.redis.link import RedisReplyError, RedisUnavailableError
from gateway.redis.sharing import Ask, asker

ASK_TIMEOUT_S = 2.0
DAY_NS = 86_400 * 1_000_000_000
OPTIONS = {
    "challenger_share": (float, "part of the cards that go to the challenger, 0 to 1"),
    "explore_share": (
        float,
        "part of the payments declined by the model's score alone that are approved to learn their label, 0 to 1",
    ),
    "explore_amount_max_minor": (int, "largest amount that may be explored, minor units"),
    "explore_loss_max_minor_per_day": (int, "most that is approved by exploration in a UTC day, minor units"),
}


def route(argv: Sequence[str]) -> int:
    """Change what is given, or show how traffic is shared. Gateways on this model directory follow within a second."""
    parser = argparse.ArgumentParser(
        prog="fraudgate route",
        description="Show or change how live traffic is shared. A change is in force within a second, and stands in the audit file.",
    )
    for name, (kind, doc) in OPTIONS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind, help=doc)
    parser.add_argument("--clear-guard", action="store_true", help="let back in the challengers that the guard took out")
    parser.add_argument("--reason", default="", help="why, for the audit file")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    args = parser.parse_args(argv)
    settings = load_settings()
    wanted = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    try:
        if wanted:
            _change(settings, wanted, args.reason)
        if args.clear_guard:
            _clear(settings, args.reason)
        return _show(settings, as_json=args.json)
    except (RoutingError, OSError, ValueError) as exc:
        print(f"fraudgate route: {exc}", file=sys.stderr)
        return 1


def _change(settings: Settings, wanted: dict[str, Any], reason: str) -> None:
    before = read_routing(settings.models_path) or default_routing(settings)
    after = msgspec.structs.replace(before, **wanted)
    write_routing(settings.models_path, after)
    for name in wanted:
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            append_audit(settings.models_path, action="route", subject=name, before=str(old), after=str(new), reason=reason)


def _clear(settings: Settings, reason: str) -> None:
    cleared = clear_guard(settings.models_path)
    for verdict in cleared:
        append_audit(
            settings.models_path, action="clear-guard", subject="challenger", before=None, after=verdict.version, reason=reason
        )
    try:
        asyncio.run(_forget(settings))
    except (RedisUnavailableError, RedisReplyError) as exc:
        raise RoutingError(
            f"the challenger is let in, but Redis can't be told to forget what the guard counted ({exc}): it will soon be out again"
        ) from exc


async def _forget(settings: Settings) -> None:
    """Delete the guard's counts from Redis. Its keys are found by the pairs that have any."""
    link = link_to(settings.redis, ASK_TIMEOUT_S)
    link.start()
    try:
        async with asyncio.timeout(ASK_TIMEOUT_S):
            while not link.ready:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await _delete(asker(link))
    except TimeoutError as exc:
        raise RedisUnavailableError("no connection") from exc
    finally:
        await link.stop()


async def _delete(ask: Ask) -> None:
    pairs = await ask(GUARD_PAIRS_KEY, ("SMEMBERS", GUARD_PAIRS_KEY), ASK_TIMEOUT_S)
    today = time.time_ns() // DAY_NS
    for pair in (bytes(found).decode() for found in pairs):
        for key in (guard_counts_key(pair), guard_cards_key(pair, today), guard_cards_key(pair, today - 1)):
            await ask(key, ("DEL", key), ASK_TIMEOUT_S)
    await ask(GUARD_PAIRS_KEY, ("DEL", GUARD_PAIRS_KEY), ASK_TIMEOUT_S)


def _reported(settings: Settings) -> dict[str, Any] | None:
    """What the gateway says, None when none answers."""
    try:
        # The URL is our own setting, hence http.
        with urllib.request.urlopen(settings.gateway + "/routing", timeout=ASK_TIMEOUT_S) as reply:  # noqa: S310
            found: dict[str, Any] = json.loads(reply.read())
    except (OSError, ValueError):
        return None
    return found


def _show(settings: Settings, *, as_json: bool) -> int:
    asked = read_routing(settings.models_path)
    routing: Routing = asked or default_routing(settings)
    out: list[Verdict] = list(read_guard(settings.models_path).out.values())
    reported = _reported(settings)
    if as_json:
        told = {
            "routing": msgspec.to_builtins(routing),
            "from_file": asked is not None,
            "guard_out": [msgspec.to_builtins(v) for v in out],
            "gateway": reported,
        }
        print(json.dumps(told, indent=2))
        return 0
    print(f"asked for, by {'routing.json' if asked else 'the settings'}")
    for name in OPTIONS:
        print(f"  {name:<32}{getattr(routing, name)}")
    for verdict in out:
        print(f"the guard keeps out  {verdict.name} version {verdict.version} ({verdict.test}): {verdict.detail}")
    if reported is None:
        print(f"no gateway answers at {settings.gateway}")
        return 0
    print(f"the gateway at {settings.gateway}")
    for route_name in ("champion", "challenger"):
        model = reported[route_name]
        print(f"  {route_name:<32}{'none' if model is None else model['name'] + ' version ' + model['version']}")
    for name, model in reported["shadows"].items():
        print(f"  {name:<32}{model['name']} version {model['version']}")
    print(f"  {'challenger gets':<32}{reported['challenger_share']} of the cards (routed by {reported['routed_by']})")
    print(f"  {'explored today, minor units':<32}{reported['explored_today_minor']}")
    return 0
