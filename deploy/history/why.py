"""`fraudgate why`: the story of one decision, in words and a table, from Delta alone. Most of its time goes to loading libraries."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import pyarrow as pa
from deltalake.exceptions import DeltaError

from deploy.explain import FEATURES_SHOWN, Explanation
from deploy.history.find import NoReceiptError, find_receipt
from deploy.history.lake import NoTableError
from deploy.history.payloads import NoSchemaError, UnreadableError
from deploy.history.story import RUNGS, TIMINGS, Rule, Story, ages_of, story_of
from gateway.contracts.decision import SEVERITY, Outcome
from gateway.contracts.settings import load_settings

WIDTH = 120
# Currencies without hundredths: amounts are shown as they are.
_WHOLE = frozenset({"JPY", "KRW", "CLP", "VND", "ISK", "UGX", "XAF", "XOF", "PYG", "RWF"})


def why(argv: Sequence[str]) -> int:
    """Exit status 1, with the reason, when there is no such receipt."""
    parser = argparse.ArgumentParser(
        prog="fraudgate why", description="Why a payment was decided as it was: the story of its receipt, in words and a table."
    )
    parser.add_argument("transaction_id")
    parser.add_argument(
        "--as-of",
        metavar="TIME|VERSION",
        help="what was known at a time (2026-08-08T12:00:00, UTC), or as of a version of the table decisions",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args(argv)
    settings = load_settings()
    try:
        story = story_of(settings, find_receipt(settings, options.transaction_id, options.as_of), options.as_of)
    except (NoReceiptError, NoTableError, NoSchemaError, UnreadableError, DeltaError, pa.ArrowException, OSError) as exc:
        print(f"fraudgate why: {exc}", file=sys.stderr)
        return 1
    print(msgspec.json.format(msgspec.json.encode(story), indent=2).decode() if options.json else readable(story))
    return 0


def readable(story: Story) -> str:
    """For a terminal."""
    lines = [_headline(story)]
    if story.erased_at_ms is not None:
        lines.append(f"The customer's data were erased on {_time(story.erased_at_ms)}; what was decided and when is kept.")
    else:
        lines += ["", *_wrapped(_in_words(story))]
    lines += ["", *_table(story)]
    if story.said:
        lines += ["", "  hits", *(f"    {_hit(rule)}" for rule in story.said)]
    if story.reasons:
        lines += ["", "  reasons", *(f"    {code:<26} {text}" for code, text in story.reasons)]
    if story.explanation is not None:
        lines += ["", *_drivers(story.explanation)]
    elif story.not_explained is not None:
        lines += ["", f"  The model isn't asked again: {story.not_explained}."]
    lines += ["", "  known of it" + (f" by {story.as_of}" if story.as_of else " by now")]
    lines += [
        f"    {_time(label.reported_at_ms)}  {'fraud' if label.is_fraud else 'genuine'}, {label.source} {label.state}"
        for label in story.labels
    ] or ["    no label"]
    return "\n".join(lines)


def _headline(story: Story) -> str:
    r = story.receipt
    return f"{r['decision'].upper()}  {story.transaction_id}  decided {_time(r['decided_at_ms'])} UTC"


def _in_words(story: Story) -> str:
    """The outcome's path, as one would tell it."""
    r = story.receipt
    t = r["transaction"]
    sentences = []
    if t is not None:
        sentences.append(
            f"Card {t['card_id']} of customer {t['customer_id']} asked to pay {_money(t['amount_minor'], t['currency'])} to merchant "
            f"{t['merchant_id']} (category {t['mcc']}, {t['country']}) by {t['channel']}."
        )
    by_policy = r["policy_decision"] or r["decision"]
    by_score = _by_score(story)
    if r["probability"] is not None:
        said = f"{r['model_name']} {r['model_version']} ({r['route']}) gave a score of {r['risk_score']} of 1000"
        if story.thresholds is not None:
            challenge, review, decline = story.thresholds
            said += (
                f"; for such an amount the policy challenges from {challenge:.0f}, reviews from {review:.0f} and declines from "
                f"{decline:.0f}: the score alone asks to {by_score}"
            )
        sentences.append(f"{said}.")
    else:
        sentences.append("No model scored it.")
    live = [rule for rule in story.said if rule.kind not in ("shadow rule", "failed rule")]
    if live:
        sentences.append(f"{_listed([f'{rule.kind} {rule.id}' for rule in live])} hit.")
    else:
        sentences.append("No rule and no list had anything to say.")
    sentences.append(f"Together the policy came to: {by_policy}.")
    if by_policy != r["decision"]:
        sentences.append(
            f"It was answered {r['decision']} to explore what becomes of such payments (probability {r['propensity']:g})."
        )
    sentences += [f"The answer was degraded: {RUNGS.get(kind, kind)}." for kind in r["degraded"]]
    return " ".join(sentences)


def _by_score(story: Story) -> str:
    assert set(SEVERITY) == set(Outcome)
    place = 0 if story.thresholds is None else sum(story.receipt["risk_score"] >= floor for floor in story.thresholds)
    return list(Outcome)[place].value


def _table(story: Story) -> list[str]:
    r = story.receipt
    rows: list[tuple[str, str]] = [("decision", f"{r['decision']} (policy: {r['policy_decision'] or r['decision']})")]
    rows.append(("score", f"{r['risk_score']} of 1000, probability {_probability(r['probability'])}"))
    rows.append(("route", f"{r['route'] or 'none'}, routed by {r['routed_by']}, door {r['door']}"))
    rows.append(("model", f"{r['model_name'] or 'none'} {r['model_version'] or ''} sha256 {r['model_digest'] or '-'}"))
    rows.append(("policy", f"sha256 {r['policy_digest']}"))
    if r.get("lists_version", -1) >= 0:
        rows.append(("lists", f"version {r['lists_version']}"))
    rows.append(
        ("features", f"{r['feature_fingerprint']}{''.join(f'; {age}' for age in ages_of(r)) if 'observed_seq' in r else ''}")
    )
    rows.append(("code", r["code_version"]))
    rows.append(("timings", ", ".join(f"{name[:-3]} {r[name]:,} us" for name in TIMINGS)))
    rows.append(("received", f"{_time(r['received_at_ms'])}, answered {r['decided_at_ms'] - r['received_at_ms']} ms later"))
    rows.append(("replay", story.replay))
    out = []
    for name, text in rows:
        out += textwrap.wrap(text, WIDTH, initial_indent=f"  {name:<10} ", subsequent_indent=" " * 13)
    return out


def _drivers(e: Explanation) -> list[str]:
    lines = [
        f"  what drove the score: {e.expected:+.3f} for a payment of which nothing is known, {e.margin:+.3f} for this one (log odds)"
    ]
    lines += [f"    {'contribution':>12}  {'feature':<30} {'value':<15} counts for"]
    lines += [
        f"    {p.contribution:+12.4f}  {p.feature:<30} {'unknown' if p.value is None else f'{p.value:,.6g}':<15} {p.reason}"
        for p in e.by_feature[:FEATURES_SHOWN]
    ]
    lines.append("")
    if e.approved_if is not None:
        changes = [f"{'and ' if i else ''}{c.text}" for i, c in enumerate(e.approved_if.changes)]
        lines += ["  it would have been approved if", *(f"    {text}" for text in changes)]
        lines.append(f"    (score {e.approved_if.risk_score} then)")
    else:
        lines.append(f"  what would have changed it: {e.why_not or 'nothing was found within the bounds of the search'}")
    return lines


def _hit(rule: Rule) -> str:
    return f"{rule.kind} {rule.id}{f' -> {rule.outcome}' if rule.outcome else ''}{f': {rule.text}' if rule.text else ''}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ")


def _listed(texts: list[str]) -> str:
    joined = texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
    return joined[:1].upper() + joined[1:]


def _money(minor: int, currency: str) -> str:
    return f"{minor:,} {currency}" if currency in _WHOLE else f"{minor / 100:,.2f} {currency}"


def _probability(value: Any) -> str:
    return "unknown" if value is None else f"{value:.6f}"


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
