"""`fraudgate policy check | show`: whether a policy can be used, and what it does in which order."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import msgspec

from gateway.contracts.settings import load_settings
from gateway.errors import PolicyRefusedError
from gateway.policy.declared import DEFAULT_OUTCOME
from gateway.policy.document import ListDeclaration, ListKind, Rule
from gateway.policy.policy import Policy, load_policy

# What comes after what, as docs/policy.md explains it.
ORDER = (
    "block lists   the most severe outcome of those the payment stands on; decline ends it here",
    "allow lists   unless blocked: neither the score nor rules that aren't hard are asked",
    "watch lists   ask for their outcomes",
    "rules         those that are certainly true ask for their outcomes",
    "score         asks for an outcome by the band of the amount; without model and features the band does",
    "the most severe outcome asked for is the decision",
)


def policy(argv: Sequence[str]) -> int:
    """Exit status 1 when the policy can't be used; the problems are on standard error."""
    parser = argparse.ArgumentParser(
        prog="fraudgate policy", description="Look at a policy. docs/policy.md says how one is written."
    )
    names = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    check = names.add_parser("check", help="every problem of a policy, with file, line and column; exit status 1 when there is one")
    check.add_argument("folder", metavar="FOLDER", help="the policy's folder")
    show = names.add_parser("show", help="bands, lists, rules and alerts, in the order of evaluation")
    show.add_argument("folder", metavar="FOLDER", nargs="?", help="default: the policy of the settings, or the one that ships")
    for each in (check, show):
        each.add_argument("--json", action="store_true", help="print as JSON")
    args = parser.parse_args(argv)
    try:
        found = load_policy(load_settings().policy_path if args.folder is None else args.folder)
    except PolicyRefusedError as exc:
        problems = str(exc).splitlines()
        if args.json:
            print(json.dumps({"usable": False, "problems": problems}))
        else:
            print(exc, file=sys.stderr)
            print(
                f"fraudgate policy: {len(problems)} problem{'s' * (len(problems) > 1)}; this policy can't be used", file=sys.stderr
            )
        return 1
    if args.json:
        print(json.dumps(_as_json(found)))
    elif args.name == "check":
        print(_summary(found))
    else:
        print(_shown(found))
    return 0


def _summary(found: Policy) -> str:
    states = {state: sum(rule.state == state for rule in found.rules) for state in ("live", "shadow", "off")}
    rules = ", ".join(f"{n} {state}" for state, n in states.items())
    return (
        f"policy {found.name!r} can be used: {len(found.rules)} rules ({rules}), {len(found.lists)} lists, {len(found.bands)} bands,"
        f" {len(found.alerts)} alerts\nsha256 {found.digest}"
    )


def _outcome(declared: ListDeclaration) -> str:
    return (declared.outcome or DEFAULT_OUTCOME[declared.kind]).value


def _as_json(found: Policy) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(
        {"bands": found.bands, "lists": found.lists, "rules": found.rules, "alerts": found.alerts}
    )
    for rule in plain["rules"]:
        rule["file"] = found.file_of[rule["id"]]
    return {"usable": True, "name": found.name, "digest": found.digest, **plain}


def _shown(found: Policy) -> str:
    lines = [_summary(found), "", "In this order:", *(f"  {i}. {text}" for i, text in enumerate(ORDER, 1))]
    for kind, title in ((ListKind.BLOCK, "Block lists"), (ListKind.ALLOW, "Allow lists"), (ListKind.WATCH, "Watch lists")):
        of_kind = [d for d in found.lists if d.kind is kind]
        if of_kind:
            lines += ["", f"{title}:"]
            asks = "" if kind is ListKind.ALLOW else "  "
            lines += [
                f"  {d.id:<24} {d.field:<14}{asks}{'' if not asks else f'{_outcome(d):<10}'} {d.text} ({d.owner})" for d in of_kind
            ]
    lines += ["", "Rules, the most severe first:"]
    for rule in found.rules:
        lines += _rule(rule, found.file_of[rule.id])
    lines += [
        "",
        "Bands, by amount in minor units:",
        f"  {'up to':>12} {'challenge':>10} {'review':>8} {'decline':>8}  without model",
    ]
    for band in found.bands:
        up_to = "any" if band.up_to_minor is None else f"{band.up_to_minor:,}"
        fails = "open" if band.without_model == "approve" else "closed"
        shown = f"{band.challenge:>10} {band.review:>8} {band.decline:>8}  {band.without_model.value} (fails {fails})"
        lines.append(f"  {up_to:>12} {shown}")
    if found.alerts:
        lines += ["", "Alerts:"]
    for route in found.alerts:
        parts = {
            "outcomes": ", ".join(route.outcomes),
            "rules": ", ".join(route.rules),
            "lists": ", ".join(route.lists),
            "from": f"{route.amount_minor_least:,}" if route.amount_minor_least else "",
            "to": ", ".join(route.webhooks),
        }
        lines.append(f"  {route.name:<24} " + "; ".join(f"{name} {text}" for name, text in parts.items() if text))
    return "\n".join(lines)


def _rule(rule: Rule, file: str) -> list[str]:
    hard = ", hard" if rule.hard else ""
    return [
        f"  {rule.id:<24} {rule.state.value:<7} {rule.outcome.value:<10} {rule.reason.value}{hard}  ({rule.owner}, {file})",
        f"  {'':<24} {rule.text}",
        f"  {'':<24} {' '.join(rule.when.split())}",
    ]
