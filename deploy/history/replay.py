"""`fraudgate replay-decision`: recompute decisions from their receipts, whatever serves now. Identical, or what differs.

Each receipt gives the payment, the feature values, and what decided: the model by its digest, the policy by its digest, the lists by their
version. Receipts that share them are decided together.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from deltalake.exceptions import DeltaError

from deploy.history.again import decide_again, differences, rung
from deploy.history.find import Found, NoReceiptError, chosen_ids, read_receipts
from deploy.history.lake import NoTableError
from deploy.history.models import NoModelError, model_by_digest
from deploy.history.payloads import NoSchemaError, UnreadableError
from deploy.history.policies import Books, NoPolicyError, Policies
from gateway.contracts.features import FINGERPRINT
from gateway.contracts.settings import Settings, load_settings
from gateway.models.model import Model

DIFFERENCES_SHOWN = 20
COUNT_MAX = 10_000_000


@dataclass
class Replayed:
    """`different` are transactions and what differs, `not_replayed` why not and how often; `erased` can't be by intention."""

    identical: int = 0
    erased: int = 0
    different: list[tuple[str, list[str]]] = field(default_factory=list)
    not_replayed: Counter[str] = field(default_factory=Counter)

    @property
    def count(self) -> int:
        return self.identical + self.erased + len(self.different) + sum(self.not_replayed.values())


class _Sources:
    """Models, policies and books, each found once and kept until the end."""

    def __init__(self, settings: Settings, stack: ExitStack) -> None:
        self._settings, self._stack = settings, stack
        self._models: dict[tuple[str, str, str], Model | NoModelError] = {}
        self.policies, self.books = Policies(settings), Books(settings)

    def model(self, name: str | None, version: str | None, digest: str | None) -> Model | None:
        """None where no model scored. Raises `NoModelError`."""
        if name is None or version is None or digest is None:
            return None
        key = (name, version, digest)
        if key not in self._models:
            try:
                self._models[key] = self._stack.enter_context(model_by_digest(self._settings, *key)).model
            except NoModelError as exc:
                self._models[key] = exc
        found = self._models[key]
        if isinstance(found, NoModelError):
            raise found
        return found


def replay(settings: Settings, ids: Sequence[str] | None = None) -> Replayed:
    """Every receipt of the transactions `ids`, None: all.

    Raises `NoReceiptError`, `NoTableError`, `deploy.history.payloads.NoSchemaError`, `deploy.history.payloads.UnreadableError`.
    """
    out = Replayed()
    with ExitStack() as stack:
        sources = _Sources(settings, stack)
        for found in read_receipts(settings, ids):
            _replay_some(found, sources, out)
    return out


def _replay_some(found: Sequence[Found], sources: _Sources, out: Replayed) -> None:
    groups: dict[tuple[object, ...], list[Found]] = defaultdict(list)
    for one in found:
        r = one.receipt
        if r is None:
            out.erased += 1
            continue
        why_not = _why_not(r)
        if why_not is not None:
            out.not_replayed[why_not] += 1
            continue
        scored_by = (r["model_name"], r["model_version"], r["model_digest"])
        groups[*scored_by, r["policy_digest"], r.get("lists_version", -1), *rung(r)].append(one)
    for (name, version, digest, policy_digest, lists_version, *_), of_group in groups.items():
        assert isinstance(lists_version, int)
        try:
            model = sources.model(_text(name), _text(version), _text(digest))
            policy = sources.policies.by_digest(str(policy_digest))
            lists = sources.books.as_of(lists_version)
        except (NoModelError, NoPolicyError) as exc:
            out.not_replayed[str(exc)] += len(of_group)
            continue
        receipts = [one.receipt for one in of_group if one.receipt is not None]
        for receipt, again in zip(receipts, decide_again(receipts, model, policy, lists), strict=True):
            differing = differences(receipt, again)
            if differing:
                out.different.append((receipt["transaction_id"], differing))
            else:
                out.identical += 1


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _why_not(receipt: dict[str, Any]) -> str | None:
    """Why this receipt can't be replayed at all, else None."""
    if receipt["transaction"] is None:
        return "it is from before receipts were kept whole, and its payment isn't in silver"
    if receipt["feature_fingerprint"] != FINGERPRINT:
        return f"it is of features {receipt['feature_fingerprint']}, this code knows {FINGERPRINT}: replay it with the code of its time"
    return None


def replay_decision(argv: Sequence[str]) -> int:
    """Exit status 1 when any decision came out otherwise or can't be replayed, other than what was erased."""
    parser = argparse.ArgumentParser(
        prog="fraudgate replay-decision",
        description="Recomputes decisions from their receipts: same payment, features, model, policy and lists.",
    )
    parser.add_argument("transaction_id", nargs="*", help="whose receipts")
    parser.add_argument("--last", type=int, metavar="N", help="the newest N instead")
    parser.add_argument("--sample", type=int, metavar="N", help="N drawn at random instead")
    parser.add_argument("--seed", type=int, default=0, help="of --sample (default: %(default)s)")
    parser.add_argument("--all", action="store_true", help="every receipt of the table instead")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    options = parser.parse_args(argv)
    if sum((bool(options.transaction_id), options.last is not None, options.sample is not None, options.all)) != 1:
        parser.error("name transaction_ids, or one of --last, --sample and --all")
    for name in ("last", "sample"):
        value = getattr(options, name)
        if value is not None and not 1 <= value <= COUNT_MAX:
            parser.error(f"--{name} must be in 1..{COUNT_MAX}")
    settings = load_settings()
    try:
        done = replay(settings, options.transaction_id or chosen_ids(settings, options.last, options.sample, options.seed))
    except (NoTableError, NoReceiptError, NoSchemaError, UnreadableError, DeltaError, pa.ArrowException, OSError) as exc:
        print(f"fraudgate replay-decision: {exc}", file=sys.stderr)
        return 1
    print(_as_json(done) if options.json else readable(done))
    return 1 if done.different or done.not_replayed else 0


def readable(done: Replayed) -> str:
    """For a terminal."""
    lines = [f"{done.count:,} decisions: {done.identical:,} identical, {len(done.different):,} different"]
    for transaction_id, differing in done.different[:DIFFERENCES_SHOWN]:
        lines.append(f"  {transaction_id}")
        lines += [f"    {line}" for line in differing]
    if len(done.different) > DIFFERENCES_SHOWN:
        lines.append(f"  and {len(done.different) - DIFFERENCES_SHOWN:,} others; --json has them all")
    if done.erased:
        lines.append(f"  {done.erased:,} not replayed: the customer's data were erased on request")
    lines += [f"  {count:,} not replayed: {why}" for why, count in done.not_replayed.most_common()]
    return "\n".join(lines)


def _as_json(done: Replayed) -> str:
    different = [{"transaction_id": transaction_id, "differences": lines} for transaction_id, lines in done.different]
    found = {
        "decisions": done.count,
        "identical": done.identical,
        "different": different,
        "erased": done.erased,
        "not_replayed": dict(done.not_replayed),
    }
    return json.dumps(found, indent=2)
