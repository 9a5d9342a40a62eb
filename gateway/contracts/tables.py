"""The Delta tables: names and what a row of each is. All lie under the setting `tables_uri`, one folder each."""

from __future__ import annotations

# topic, partition, offset, key, value (raw bytes), headers, kafka_timestamp, batch_id: every record of transactions, decisions
# and labels as it came, once. Partitioned by topic.
BRONZE = "bronze"
# The fields of a transaction, then scored_by (null: by the Kafka door), partition, offset, kafka_timestamp, batch_id; typed, valid,
# one row a transaction_id within the deduplication window.
SILVER = "silver_transactions"
# reason, field, topic, partition, offset, kafka_timestamp, value (original bytes), batch_id: what the feature jobs refused.
QUARANTINE = "quarantine"
# The fields of a receipt (its transaction flattened is not repeated: join on transaction_id), payload (the receipt's Avro record without
# its frame), schema_id, content_sha256 and chain_sha256 (contracts.chain; null in rows from before there was a chain), erased_at_ms
# (null, or since when the customer's data are gone), then partition, offset, kafka_timestamp, batch_id; one row a transaction_id.
DECISIONS = "decisions"
# The fields of a label, then partition, offset, kafka_timestamp, batch_id.
LABELS = "labels"
# One row a label that was matched with its payment: transaction_id, event_time_ms, customer_id, merchant_id (of the payment), is_fraud,
# source, state, reported_at_ms, effective_at_ms, change (+1 fraud became known, -1 it was taken back, 0 nothing new), place (order within
# the batch), then partition, offset, kafka_timestamp of the label, applied_at_ms (wall clock), batch_id of the stream of labels. An
# entity's frauds and the counter of its label changes (receipts: label_changes) are made of the rows with a change, in order of
# (batch_id, place).
LABEL_CHANGES = "label_changes"
# entity, entity_id, hour, transactions, amount_minor, declined, largest_minor, updated_at: to be summed by entity and hour.
GOLD_ENTITY_HOUR = "gold_entity_hour"
# transaction_id, the transaction's fields, the decision's outcome and score, the label that stands: one row a transaction.
GOLD_DECISIONS = "gold_decisions"
# transaction_id, event_time_ms, one float column a feature (contracts.features.FEATURE_NAMES): what fraudgate backfill computed.
FEATURES = "features"
# transaction_id, event_time_ms, one float column a feature, is_fraud, country (text, no feature: models are judged by it).
TRAINING_SET = "training_set"
# window_end_ms, window_ms, measure (a feature, or risk_score, score_band, decision), rows, psi, ks, threshold (null: can't alarm), alarm,
# model_version (of the champion whose training rows were compared with), decisions_version (of the table decisions): one row a measure
# and ten minutes of event time, and one for each alarm where it begins.
DRIFT = "drift"
# burst_id, state (begun or ended), entity (merchant_id, device_id or card_bin), entity_value, began_ms (event time of its first decline),
# at_ms, decided_at_ms and transaction_id (of the decline with which it was one), declines, window_ms, decisions_version (of the table
# decisions): one row where a burst of declines begins, of which an alert tells, and one where it ends.
BURSTS = "bursts"
# The fields of a change of a list (contracts.lists.ListChange), then partition, offset, kafka_timestamp, batch_id: every change, once. A
# change's offset plus one is the version of the lists after it.
LIST_CHANGES = "list_changes"
# The fields of contracts.audit.AuditRecord, then partition, offset, kafka_timestamp, batch_id: who changed what, when and why.
AUDIT = "audit"
# partition, batch_id, offset, chain_sha256, rows, at_ms: where the chain of a partition of `decisions` (contracts.chain) goes on from
# after `rows` older rows were deleted in time.
CHAIN_ANCHORS = "chain_anchors"

TABLES: tuple[str, ...] = (
    *(BRONZE, SILVER, QUARANTINE, DECISIONS, LABELS, LABEL_CHANGES, LIST_CHANGES, AUDIT),
    *(GOLD_ENTITY_HOUR, GOLD_DECISIONS, FEATURES, TRAINING_SET, DRIFT, BURSTS, CHAIN_ANCHORS),
)


def table_uri(tables: str, name: str) -> str:
    """The address of a table under the setting `tables_uri`."""
    assert name in TABLES
    return f"{tables.rstrip('/')}/{name}"
