"""`fraudgate audit`: are the receipts what was written, to the byte, and who changed what. Reads Delta without Spark."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.dataset as ds
from deltalake.exceptions import DeltaError

from deploy.history.lake import NoTableError, open_table, rows_of
from deploy.history.payloads import NoSchemaError
from deploy.history.verify import BREAKS_MAX, Range, Verdict, fingerprint, verify
from gateway.contracts import tables
from gateway.contracts.audit import AuditEntry, read_audit
from gateway.contracts.instants import instant_ms
from gateway.contracts.settings import Settings, load_settings

ENTRY_COLUMNS = ["at_ms", "who", "action", "subject", "before", "after", "reason", "detail"]
LINES = 100
# Of a policy's files or an erasure's rows: what a line of the table shows.
TEXT_CHARS_MAX = 60


def audit(argv: Sequence[str]) -> int:
    """Exit status 1 at the first break, or when there is nothing to look at."""
    parser = argparse.ArgumentParser(
        prog="fraudgate audit",
        description="Verifies hash, columns and chain of every receipt in the table decisions; with --changes shows who changed what.",
    )
    parser.add_argument("--from", dest="from_ms", type=instant_ms, metavar="MS|DATE", help="from when on Kafka took the rows")
    parser.add_argument("--to", dest="to_ms", type=instant_ms, metavar="MS|DATE", help="until when, not included")
    parser.add_argument("--table", default=tables.DECISIONS, choices=[tables.DECISIONS], help="the table (default: %(default)s)")
    parser.add_argument("--changes", action="store_true", help="show the entries of the table audit instead")
    parser.add_argument("--who", help="with --changes: only whose name holds this text")
    parser.add_argument("--action", help="with --changes: only this action, for instance promote, list_add, policy_loaded")
    parser.add_argument("--subject", help="with --changes: only whose subject holds this text")
    parser.add_argument("--last", type=int, default=LINES, metavar="N", help="with --changes: the newest N (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args(argv)
    settings = load_settings()
    within = Range(options.from_ms, options.to_ms)
    try:
        if options.changes:
            found = changes(settings, within, who=options.who, action=options.action, subject=options.subject)[-options.last :]
            print(json.dumps(found, indent=2) if options.json else _table(found))
            return 0
        verdict = verify(settings, within)
    except (NoTableError, NoSchemaError, DeltaError, pa.ArrowException, OSError) as exc:
        print(f"fraudgate audit: {exc}", file=sys.stderr)
        return 1
    print(_as_json(verdict) if options.json else readable(verdict))
    return 1 if verdict.broken else 0


def changes(
    settings: Settings, within: Range, *, who: str | None = None, action: str | None = None, subject: str | None = None
) -> list[dict[str, Any]]:
    """Entries of the table `audit` and of the audit file of the model directory, the oldest first. Raises `NoTableError`."""
    chosen = ds.field("at_ms") >= (within.from_ms or 0)
    if within.to_ms is not None:
        chosen &= ds.field("at_ms") < within.to_ms
    if action is not None:
        chosen &= ds.field("action") == action
    found = rows_of(open_table(settings, tables.AUDIT), ENTRY_COLUMNS, chosen)
    entries, _ = read_audit(settings.models_path)
    found += [
        msgspec.structs.asdict(entry) | {"detail": ""}
        for entry in entries
        if (within.from_ms or 0) <= entry.at_ms
        and (within.to_ms is None or entry.at_ms < within.to_ms)
        and action in (None, entry.action)
    ]
    # What a gateway has forwarded stands in both, and what was forwarded twice, twice in the table.
    told = {tuple(e[name] for name in AuditEntry.__struct_fields__): e for e in reversed(found)}
    chosen_of = [e for e in told.values() if (who is None or who in e["who"]) and (subject is None or subject in e["subject"])]
    return sorted(chosen_of, key=lambda entry: entry["at_ms"])


def _table(entries: list[dict[str, Any]]) -> str:
    if not entries:
        return "no entries"
    lines = [f"{'when (UTC)':<20} {'who':<24} {'action':<18} what"]
    for e in entries:
        what = _cut(e["subject"])
        if e["before"] is not None or e["after"] is not None:
            what += f": {_cut(e['before'] or 'nothing')} -> {_cut(e['after'] or 'nothing')}"
        if e["reason"]:
            what += f" ({_cut(e['reason'])})"
        lines.append(f"{_time(e['at_ms']):<20} {e['who']:<24} {e['action']:<18} {what}")
    return "\n".join(lines)


def _cut(text: str) -> str:
    return text if len(text) <= TEXT_CHARS_MAX else f"{text[: TEXT_CHARS_MAX - 3]}..."


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")


def readable(verdict: Verdict) -> str:
    """For a terminal: what was looked at, and the first breaks."""
    v = verdict
    lines = [f"{tables.DECISIONS}, version {v.version}: {v.rows:,} rows in {len(v.heads)} partitions"]
    lines.append(f"  {v.chained:>12,} in the chain, hash, columns and predecessor looked at")
    if v.erased:
        lines.append(f"  {v.erased:>12,} of them erased on request, each with its entry in the table audit")
    if v.older:
        lines.append(f"  {v.older:>12,} from before there was a chain, not looked at")
    if v.anchored:
        lines.append(f"  {v.anchored:>12,} deleted when their time was over; the chain goes on from its anchors")
    lines += [f"  partition {p}: newest offset {offset}, chain {chain}" for p, (offset, chain) in sorted(v.heads.items())]
    if v.unbounded:
        named = ", ".join(map(str, v.unbounded))
        lines.append(
            f"  the log doesn't say any more which row is the newest of partition {named}: a loss at the end would not show"
        )
    if not v.broken:
        lines.append(f"intact; all heads together: {fingerprint(v.heads)}")
        return "\n".join(lines)
    lines.append(f"BROKEN in {v.broken:,} places; the first{'' if v.broken == 1 else f' {min(v.broken, BREAKS_MAX)}'}:")
    lines += [f"  partition {b.partition}, offset {b.offset}: {b.what}" for b in v.breaks]
    return "\n".join(lines)


def _as_json(v: Verdict) -> str:
    heads = {str(p): {"offset": offset, "chain_sha256": chain} for p, (offset, chain) in sorted(v.heads.items())}
    found = {
        name: getattr(v, name) for name in ("version", "rows", "chained", "erased", "older", "anchored", "broken", "unbounded")
    }
    breaks = [{"partition": b.partition, "offset": b.offset, "what": b.what} for b in v.breaks]
    return json.dumps(found | {"heads": heads, "fingerprint": fingerprint(v.heads), "breaks": breaks}, indent=2)
