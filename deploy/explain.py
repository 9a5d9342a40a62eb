"""`fraudgate explain`: why a transaction was decided as it was, and the nearest payment that would have been approved.

From the receipt alone: the features that the model saw, the model by its digest, the policy. Takes some seconds, most of them loading
libraries.
"""

from __future__ import annotations

import argparse
import math
import sys
import textwrap
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from deploy.history.list_books import read_books
from deploy.receipts import CannotExplainError, Loaded, Logged, model_of, receipt_in_file, receipt_in_tables
from gateway.contracts.decision import Outcome, risk_score
from gateway.contracts.feature_reasons import MODEL_REASONS
from gateway.contracts.features import FEATURE_NAMES
from gateway.contracts.lists import ListBook
from gateway.contracts.reasons import CARDHOLDER_TEXT, REASON_TEXT
from gateway.contracts.settings import load_settings
from gateway.contracts.transaction import CHANNELS
from gateway.errors import PolicyRefusedError
from gateway.explanations.counterfactual import CHANGES_MAX, Change, decide_cases, find_counterfactual
from gateway.explanations.what_if import Case
from gateway.policy import NO_LISTS, Policy, load_policy

FEATURES_SHOWN = 12
# By how much a probability computed again may differ from the receipt's: another batch size, another processor.
PROBABILITY_TOLERANCE = 1e-6
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


class FeaturePart(msgspec.Struct, frozen=True, kw_only=True):
    """What one feature contributed to the margin, and the code that it counts for. Unknown is null."""

    feature: str
    value: float | None
    contribution: float
    reason: str


class ReasonPart(msgspec.Struct, frozen=True, kw_only=True):
    """The contributions of a code's features together, and its texts, which are empty for a code that lowers the score."""

    reason: str
    contribution: float
    text: str
    cardholder_text: str


class ChangePart(msgspec.Struct, frozen=True, kw_only=True):
    """One change of the counterfactual, by feature; `text` says it to a person. Unknown is null."""

    feature: str
    before: float | None
    after: float | None
    text: str


class WouldBe(msgspec.Struct, frozen=True, kw_only=True):
    """`changes` together make the policy approve; `features` are all that change with them: name, before and after."""

    changes: list[ChangePart]
    decision: str
    probability: float
    risk_score: int
    features: dict[str, tuple[float | None, float | None]]


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """The answer. `margin` is `expected` and all contributions together, and the log odds of the model's probability before calibration.

    `notes` say what differs from the time of the decision. `approved_if` is null where nothing was found, or `why_not` says why it wasn't
    looked for.
    """

    transaction_id: str
    decided_at_ms: int
    decision: str
    reasons: list[str]
    rule_hits: list[str]
    list_hits: list[str]
    degraded: list[str]
    model: str
    probability: float
    risk_score: int
    margin: float
    expected: float
    by_reason: list[ReasonPart]
    by_feature: list[FeaturePart]
    decided_again: str | None
    approved_if: WouldBe | None
    why_not: str | None
    notes: list[str]


def explain(argv: Sequence[str]) -> int:
    """Exit status 1, with the reason, when it can't be explained."""
    parser = argparse.ArgumentParser(prog="fraudgate explain", description="Explain a decision from its receipt.")
    parser.add_argument("transaction_id", nargs="?", help="whose receipt to take from the Delta table of decisions")
    parser.add_argument("--receipt", metavar="FILE", help="a receipt as JSON instead; - reads it from standard input")
    parser.add_argument("--policy", metavar="FOLDER", help="the policy to decide by (default: the gateway's)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    args = parser.parse_args(argv)
    if (args.transaction_id is None) == (args.receipt is None):
        parser.error("name a transaction_id or a --receipt")
    settings = load_settings()
    try:
        policy = load_policy(args.policy or settings.policy_path)
        if args.receipt is None:
            receipt = receipt_in_tables(settings, args.transaction_id)
        else:
            receipt = receipt_in_file(sys.stdin.read() if args.receipt == "-" else Path(args.receipt).read_text())
        with model_of(settings, receipt) as loaded:
            known = receipt.lists_version is not None and receipt.lists_version > 0
            lists = read_books(settings).at(receipt.lists_version or 0) if known else NO_LISTS
            found = explanation_of(receipt, loaded, policy, lists)
    except (CannotExplainError, PolicyRefusedError, OSError) as exc:
        print(f"fraudgate explain: {exc}", file=sys.stderr)
        return 1
    print(msgspec.json.format(msgspec.json.encode(found), indent=2).decode() if args.json else readable(found, receipt))
    return 0


def explanation_of(receipt: Logged, loaded: Loaded, policy: Policy, lists: ListBook = NO_LISTS) -> Explanation:
    """All of it, from what the model and the policy say now, with the lists of the decision's time."""
    row = receipt.features[None]
    explainer, model = loaded.explainer, loaded.model
    contributions = explainer.contributions(row)
    of_reasons = explainer.by_reason(row, contributions)[0]
    probability = float(model.probability(row)[0])
    notes = []
    if receipt.probability is not None and not abs(probability - receipt.probability) <= PROBABILITY_TOLERANCE:
        notes.append(f"the model gives probability {probability:.6f} now, the receipt says {receipt.probability:.6f}")
    if policy.digest != receipt.policy_digest:
        notes.append(
            f"the policy {policy.name!r} is another than the decision's (sha256 {receipt.policy_digest[:12]}...): what is said of "
            "decisions is by this one; name the other with --policy"
        )
    decided_again, approved_if, why_not = _decided_again(receipt, loaded, policy, lists)
    by_policy = receipt.policy_decision or receipt.decision
    if by_policy != receipt.decision:
        notes.append(f"the policy came to {by_policy}; it was {receipt.decision} to explore what becomes of such payments")
    if decided_again is not None and decided_again != by_policy:
        notes.append(f"decided again it is {decided_again}, the receipt says {by_policy}")
    return Explanation(
        transaction_id=receipt.transaction_id,
        decided_at_ms=receipt.decided_at_ms,
        decision=receipt.decision,
        reasons=receipt.reasons,
        rule_hits=receipt.rule_hits,
        list_hits=receipt.list_hits or [],
        degraded=receipt.degraded,
        model=f"{receipt.model_name} {receipt.model_version} ({receipt.route}), sha256 {receipt.model_digest}",
        probability=probability,
        risk_score=risk_score(probability),
        margin=float(explainer.margin(row)[0]),
        expected=explainer.expected,
        by_reason=_by_reason(of_reasons),
        by_feature=_by_feature(receipt, contributions[0], [r.value for r in explainer.reason_of(receipt.features)]),
        decided_again=decided_again,
        approved_if=approved_if,
        why_not=why_not,
        notes=notes,
    )


def _by_reason(values: npt.NDArray[np.float64]) -> list[ReasonPart]:
    """Codes that say anything, from what raises the score most to what lowers it most."""
    return [
        ReasonPart(
            reason=MODEL_REASONS[i].value,
            contribution=float(values[i]),
            text=REASON_TEXT[MODEL_REASONS[i]] if values[i] > 0 else "",
            cardholder_text=CARDHOLDER_TEXT[MODEL_REASONS[i]] if values[i] > 0 else "",
        )
        for i in np.argsort(-values, kind="stable").tolist()
        if values[i] != 0
    ]


def _by_feature(receipt: Logged, values: npt.NDArray[np.float64], reasons: list[str]) -> list[FeaturePart]:
    """Features that say anything, the largest contribution of either sign first."""
    return [
        FeaturePart(
            feature=FEATURE_NAMES[i], value=_known(float(receipt.features[i])), contribution=float(values[i]), reason=reasons[i]
        )
        for i in np.argsort(-np.abs(values), kind="stable").tolist()
        if values[i] != 0
    ]


def _decided_again(
    receipt: Logged, loaded: Loaded, policy: Policy, lists: ListBook
) -> tuple[str | None, WouldBe | None, str | None]:
    """What the policy decides now, the counterfactual, and why there is none where it wasn't looked for."""
    if receipt.transaction is None:
        return None, None, "the payment isn't in silver yet"
    case = Case(receipt.transaction, receipt.features)
    decisions, _ = decide_cases(loaded.model, policy, [case], lists, receipt.received_at_ms)
    outcome = decisions.outcome[0]
    if outcome is Outcome.APPROVE:
        return outcome.value, None, "it is approved"
    thresholds, received_at_ms = loaded.explainer.thresholds(), receipt.received_at_ms
    found = find_counterfactual(loaded.model, policy, thresholds, case, lists=lists, received_at_ms=received_at_ms)
    if found is None:
        return outcome.value, None, None
    # Nothing is told that wasn't tried.
    applied, probability = decide_cases(loaded.model, policy, [found.case], lists, receipt.received_at_ms)
    assert applied.outcome[0] is Outcome.APPROVE
    before, after = case.row.tolist(), found.case.row.tolist()
    return (
        outcome.value,
        WouldBe(
            changes=[
                ChangePart(
                    feature=c.feature, before=_known(c.before), after=_known(c.after), text=_said(c, receipt.transaction.currency)
                )
                for c in found.changes
            ],
            decision=applied.outcome[0].value,
            probability=float(probability[0]),
            risk_score=risk_score(float(probability[0])),
            features={
                name: (_known(b), _known(a))
                for name, b, a in zip(FEATURE_NAMES, before, after, strict=True)
                if not (b == a or (b != b and a != a))
            },
        ),
        None,
    )


def _said(change: Change, currency: str) -> str:
    """The change to a person."""
    before, after = change.before, change.after
    match change.feature:
        case "amount_minor":
            # Minor units, since not every currency has hundredths.
            return f"the amount had been {after:,.0f} instead of {before:,.0f} (minor units, {currency})"
        case "hour":
            return f"it had been between {after:.0f} and {after + 1:.0f} h UTC instead of {before:.0f} and {before + 1:.0f}, all else equal"
        case "weekday":
            return f"it had been {_WEEKDAYS[int(after)]} instead of {_WEEKDAYS[int(before)]}, all else equal"
        case "channel":
            return f"the channel had been {CHANNELS[int(after)]} instead of {CHANNELS[int(before)]}"
        case "cross_border":
            return "the card had been issued in the merchant's country"
        case name if name.endswith(("_new_merchant", "_new_device", "_country_changed")):
            return f"{name} had been 0 instead of {before:.0f}"
        case name:
            return f"{name} had been {after:,.6g} instead of {'unknown' if math.isnan(before) else f'{before:,.6g}'}"


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def readable(e: Explanation, receipt: Logged) -> str:
    """For a terminal."""
    at = datetime.fromtimestamp(e.decided_at_ms / 1000, UTC)
    lines = [
        f"{e.decision.upper()}  {e.transaction_id}  decided {at:%Y-%m-%d %H:%M:%S} UTC",
        f"  model        {e.model}",
        f"  probability  {e.probability:.6f}, risk score {e.risk_score}",
        f"  margin       {e.margin:+.4f} = {e.expected:+.4f} expected of a payment of which nothing is known {e.margin - e.expected:+.4f}",
        f"  reasons      {', '.join(e.reasons) or 'none'}",
    ]
    if e.rule_hits:
        lines.append(f"  rules        {', '.join(e.rule_hits)}")
    if e.list_hits:
        lines.append(f"  lists        {', '.join(e.list_hits)}")
    if e.degraded:
        lines.append(f"  degraded     {', '.join(e.degraded)}")
    lines += ["", "  contribution  reason"]
    lines += [f"  {p.contribution:+12.4f}  {p.reason:<24} {p.text}" for p in e.by_reason if p.contribution > 0]
    lowering = [f"{p.reason} {p.contribution:+.4f}" for p in reversed(e.by_reason) if p.contribution < 0]
    if lowering:
        lines += ["", *textwrap.wrap(", ".join(lowering), 120, initial_indent="  lowered by   ", subsequent_indent=" " * 15)]
    lines += ["", "  contribution  feature                        value           counts for"]
    lines += [
        f"  {p.contribution:+12.4f}  {p.feature:<30} {'unknown' if p.value is None else f'{p.value:,.6g}':<15} {p.reason}"
        for p in e.by_feature[:FEATURES_SHOWN]
    ]
    if len(e.by_feature) > FEATURES_SHOWN:
        rest = sum(p.contribution for p in e.by_feature[FEATURES_SHOWN:])
        lines.append(f"  {rest:+12.4f}  {len(e.by_feature) - FEATURES_SHOWN} others, together; --json has them all")
    lines.append("")
    if e.approved_if is not None:
        lines.append("  It would have been approved if")
        lines += [f"    {'and ' if i else ''}{c.text}" for i, c in enumerate(e.approved_if.changes)]
        lines.append(f"  Its probability would have been {e.approved_if.probability:.6f}, risk score {e.approved_if.risk_score}.")
    elif e.why_not is not None:
        lines.append(f"  No counterfactual: {e.why_not}.")
    else:
        lines.append(
            f"  No counterfactual: none of at most {CHANGES_MAX} changes was found that this payment would be approved with."
        )
    lines += [f"  Note: {note}." for note in e.notes]
    return "\n".join(lines)
