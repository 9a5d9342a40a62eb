"""Topics, their schemas and headers."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files

TRANSACTIONS = "transactions"
DECISIONS = "decisions"
LABELS = "labels"
QUARANTINE = "transactions.quarantine"
ALERTS = "alerts"
SHADOW_SCORES = "shadow_scores"
# Every change of every list, for ever (contracts.lists).
LIST_CHANGES = "list_changes"
# Who changed what, when and why, and which policies were in use (contracts.audit).
AUDIT = "audit"


@dataclass(frozen=True)
class Topic:
    """`schema` is a file in gateway/contracts/schemas, registered under `subject`. Keys are plain UTF-8 (the card_id).

    `partitions` is None where the setting `kafka_partitions` says it. With `keeps_all` the broker never deletes a record.
    """

    name: str
    schema: str
    partitions: int | None = None
    keeps_all: bool = False

    @property
    def subject(self) -> str:
        return f"{self.name}-value"

    @property
    def schema_text(self) -> str:
        return files("gateway.contracts").joinpath(f"schemas/{self.schema}").read_text()


TOPICS: dict[str, Topic] = {
    TRANSACTIONS: Topic(TRANSACTIONS, "transaction.avsc"),
    DECISIONS: Topic(DECISIONS, "decision.avsc"),
    LABELS: Topic(LABELS, "label.avsc"),
    QUARANTINE: Topic(QUARANTINE, "quarantine.avsc"),
    ALERTS: Topic(ALERTS, "alert.avsc"),
    SHADOW_SCORES: Topic(SHADOW_SCORES, "shadow_score.avsc"),
    # One partition each: what was changed last is what holds.
    LIST_CHANGES: Topic(LIST_CHANGES, "list_change.avsc", partitions=1, keeps_all=True),
    AUDIT: Topic(AUDIT, "audit.avsc", partitions=1, keeps_all=True),
}
COMPATIBILITY = "BACKWARD"

# A record of `transactions` with this header has its decision already (or never needs one): the Kafka door skips it.
SCORED_HEADER = "fraudgate-scored"
SCORED_BY_HTTP = b"http"
SCORED_NEVER = b"history"

# Every producer must place a card in the same partition. librdkafka's name for the Java client's and aiokafka's default.
LIBRDKAFKA_PARTITIONER = "murmur2_random"
