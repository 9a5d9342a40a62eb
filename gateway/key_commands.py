"""`fraudgate keys create | list | revoke`: the API keys of the file that the setting `api_keys_path` names."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from gateway.api_keys import SCOPES, ApiKey, KeyFile, KeyFileError, create_key, read_keys, revoke_key
from gateway.cases.outbox import audit_record, send_now
from gateway.contracts.audit import AUDIT_FILE, append_audit
from gateway.contracts.settings import load_settings

DAY_MS = 86_400_000
EXPIRES_DAYS_MAX = 3650
RATE_PER_S = 100


def keys(argv: Sequence[str]) -> int:
    """Exit status 1 when the file can't be read or changed."""
    parser = argparse.ArgumentParser(
        prog="fraudgate keys",
        description="API keys of the gateway and the case service. Only their sha256 is kept: a key is printed once, when it is made."
        " Gateways and case service follow within a second; each change stands in audit.jsonl beside the file and on the topic audit.",
    )
    actions = parser.add_subparsers(dest="action", required=True)
    create = actions.add_parser("create", help="make a key and print it")
    create.add_argument("name", help="whose it is: it stands as who in audit records")
    create.add_argument(
        "--scope", action="append", choices=SCOPES, required=True, help="what it is for; may be given more than once"
    )
    create.add_argument("--rate", type=int, default=RATE_PER_S, metavar="N", help=f"calls a second (default {RATE_PER_S})")
    create.add_argument("--expires-in-days", type=int, metavar="N", help=f"1 to {EXPIRES_DAYS_MAX} (default: never)")
    create.add_argument("--reason", default="", help="why, for the audit file")
    revoke = actions.add_parser("revoke", help="take a key out of force")
    revoke.add_argument("name")
    revoke.add_argument("--reason", default="", help="why, for the audit file")
    show = actions.add_parser("list", help="names, scopes, rates and states")
    show.add_argument("--json", action="store_true", help="print as JSON")
    args = parser.parse_args(argv)
    settings = load_settings()
    if not settings.api_keys_path:
        print(
            "fraudgate keys: set FRAUDGATE_API_KEYS_PATH to the file that holds them; without it no key is asked for",
            file=sys.stderr,
        )
        return 1
    path = Path(settings.api_keys_path).expanduser().absolute()
    try:
        if args.action == "create":
            return _create(parser, args, path)
        if args.action == "revoke":
            _audit(path, "key_revoked", revoke_key(path, args.name), args.reason)
            print(f"{args.name} is revoked")
            return 0
        _show(read_keys(path), as_json=args.json)
    except (KeyFileError, OSError, ValueError) as exc:
        print(f"fraudgate keys: {exc}", file=sys.stderr)
        return 1
    return 0


def _create(parser: argparse.ArgumentParser, args: argparse.Namespace, path: Path) -> int:
    days = args.expires_in_days
    if days is not None and not 1 <= days <= EXPIRES_DAYS_MAX:
        parser.error(f"--expires-in-days must be in 1..{EXPIRES_DAYS_MAX}")
    expires_at_ms = None if days is None else time.time_ns() // 1_000_000 + days * DAY_MS
    secret, made = create_key(path, args.name, args.scope, args.rate, expires_at_ms=expires_at_ms)
    _audit(path, "key_created", made, args.reason)
    print(f"{made.name}: {', '.join(made.scopes)}, {made.rate_per_s} calls a second; it is shown only now:", file=sys.stderr)
    print(secret)
    return 0


def _audit(path: Path, action: str, key: ApiKey, reason: str) -> None:
    state = msgspec.json.encode({"scopes": key.scopes, "rate_per_s": key.rate_per_s, "expires_at_ms": key.expires_at_ms}).decode()
    revoked = key.revoked_at_ms is not None
    before, after = (state, None) if revoked else (None, state)
    entry = append_audit(path.parent, action=action, subject=key.name, before=before, after=after, reason=reason)
    record = audit_record(entry.at_ms, entry.who, action, key.name, before, after, reason)
    if not send_now(load_settings(), record):
        print(f"Kafka can't be reached: this change stands in {path.parent / AUDIT_FILE} alone", file=sys.stderr)


def _show(file: KeyFile, *, as_json: bool) -> None:
    now_ms = time.time_ns() // 1_000_000
    if as_json:
        entries = [msgspec.to_builtins(key) | {"state": _state(key, now_ms)} for key in file.keys]
        print(json.dumps(entries, indent=2))
        return
    rows = [("name", "state", "scopes", "rate", "created", "expires", "sha256")]
    for key in file.keys:
        expires = "never" if key.expires_at_ms is None else _day(key.expires_at_ms)
        cells = (key.name, _state(key, now_ms), ",".join(key.scopes), str(key.rate_per_s), _day(key.created_at_ms), expires)
        rows.append((*cells, key.sha256[:12]))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _state(key: ApiKey, now_ms: int) -> str:
    if key.revoked_at_ms is not None:
        return "revoked"
    return "expired" if key.expires_at_ms is not None and now_ms >= key.expires_at_ms else "in force"


def _day(at_ms: int) -> str:
    return dt.datetime.fromtimestamp(at_ms / 1000, dt.UTC).date().isoformat()
