"""A decision that was made, with all that is needed to look into it again: its receipt, its payment, its model. For `fraudgate explain`.

Reads the Delta tables with delta-rs, without Spark: of each file only the columns asked for, and only files and row groups whose statistics
allow the transaction's id.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow.dataset as ds
from deltalake import DeltaTable
from deltalake.exceptions import TableNotFoundError

from deploy.history.lake import uri_of
from deploy.history.models import Kept, NoModelError, model_by_digest
from gateway.contracts import tables
from gateway.contracts.features import FEATURE_NAMES, FINGERPRINT
from gateway.contracts.model_meta import EXPLANATION_FILE, GOLDEN_FILE
from gateway.contracts.settings import Settings
from gateway.contracts.transaction import FIELDS, Transaction
from gateway.explanations.explain import Explainer, load_explainer
from gateway.models.model import Model


class CannotExplainError(RuntimeError):
    """The message says what is missing, and where it would come from."""


@dataclass(frozen=True)
class Logged:
    """What a receipt says, and `transaction` where it is known. `features` is (features,).

    `policy_decision` is what the policy came to, before exploration; None in receipts of before there was any. So are `list_hits` and
    `lists_version` in those of before there were lists.
    """

    transaction_id: str
    decision: str
    risk_score: int
    probability: float | None
    reasons: list[str]
    rule_hits: list[str]
    degraded: list[str]
    model_name: str | None
    model_version: str | None
    model_digest: str | None
    route: str | None
    policy_decision: str | None
    feature_fingerprint: str
    policy_digest: str
    list_hits: list[str] | None
    lists_version: int | None
    received_at_ms: int
    decided_at_ms: int
    features: npt.NDArray[np.float32]
    transaction: Transaction | None


_COLUMNS = [f.name for f in fields(Logged) if f.name != "transaction"]


@dataclass(frozen=True)
class Loaded:
    """A model as the gateway ran it, and what explains it, also where that takes too long for the gateway."""

    model: Model
    explainer: Explainer


def receipt_in_tables(settings: Settings, transaction_id: str) -> Logged:
    """The receipt in the Delta table `decisions`, with its payment from silver. Raises `CannotExplainError`."""
    row = _row(settings, tables.DECISIONS, [*_COLUMNS, "event_time_ms"], ds.field("transaction_id") == transaction_id)
    if row is None:
        raise CannotExplainError(
            f"there is no receipt of {transaction_id} in the table {tables.DECISIONS}; one arrives there some seconds after its decision, "
            "while fraudgate jobs runs"
        )
    chosen = (ds.field("transaction_id") == transaction_id) & (ds.field("event_time_ms") == row.pop("event_time_ms"))
    payment = _row(settings, tables.SILVER, list(FIELDS), chosen)
    return _logged(row, None if payment is None else msgspec.convert(payment, Transaction))


def receipt_in_file(text: str) -> Logged:
    """A receipt given as JSON, with the fields of schemas/decision.avsc; unknown features are null. Raises `CannotExplainError`."""
    try:
        row = json.loads(text)
        for name in ("policy_decision", "list_hits", "lists_version"):
            row.setdefault(name, None)
        return _logged({name: row[name] for name in _COLUMNS}, msgspec.convert(row["transaction"], Transaction))
    except (ValueError, KeyError, TypeError, msgspec.ValidationError) as exc:
        raise CannotExplainError(f"this is no receipt: {exc!r}") from exc


def _row(settings: Settings, name: str, columns: list[str], chosen: ds.Expression) -> dict[str, Any] | None:
    """The row of a table that is chosen, None without one or without the table."""
    try:
        table = DeltaTable(uri_of(settings, name))
    except TableNotFoundError:
        return None
    rows = table.to_pyarrow_dataset()
    # A table of an earlier version lacks what came later.
    held = [column for column in columns if column in rows.schema.names]
    found = rows.to_table(columns=held, filter=chosen)
    return dict.fromkeys(columns) | found.slice(0, 1).to_pylist()[0] if found.num_rows else None


def _logged(row: dict[str, Any], transaction: Transaction | None) -> Logged:
    """Raises `CannotExplainError` for what other features than this code's are in."""
    if row["feature_fingerprint"] != FINGERPRINT or len(row["features"]) != len(FEATURE_NAMES):
        raise CannotExplainError(
            f"the receipt is of features {row['feature_fingerprint']}, this code knows {FINGERPRINT}: explain it with the code of its time"
        )
    features = np.array([math.nan if v is None else v for v in row.pop("features")], np.float32)
    return Logged(**row, features=features, transaction=transaction)


@contextmanager
def model_of(settings: Settings, receipt: Logged) -> Iterator[Loaded]:
    """The model that made the decision, by its digest: from the model directory, or else from the registry. Raises `CannotExplainError`."""
    if receipt.model_digest is None or receipt.model_name is None or receipt.model_version is None:
        raise CannotExplainError(
            f"no model scored {receipt.transaction_id}: it was decided without ({', '.join(receipt.degraded)})"
        )
    try:
        with model_by_digest(settings, receipt.model_name, receipt.model_version, receipt.model_digest) as kept:
            yield Loaded(kept.model, explainer_of(kept))
    except NoModelError as exc:
        raise CannotExplainError(str(exc)) from exc


def explainer_of(kept: Kept) -> Explainer:
    """What explains a model, also where that takes too long for the gateway. Raises `CannotExplainError`."""
    if kept.model.explainer is not None:
        return kept.model.explainer
    name, version = kept.model.ref.name, kept.model.ref.version
    path = kept.folder / EXPLANATION_FILE
    if not path.exists():
        raise CannotExplainError(f"{name} version {version} was exported without an explanation; train anew with: fraudgate train")
    try:
        with np.load(kept.folder / GOLDEN_FILE, allow_pickle=False) as golden:
            return load_explainer(path.read_bytes(), golden["features"], golden["probability"])
    except (OSError, ValueError) as exc:
        raise CannotExplainError(f"{name} version {version}: {exc}") from exc
