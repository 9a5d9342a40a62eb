"""`fraudgate erase`: one customer's personal data out of the Delta tables and Redis, on request.

What was decided stays: a receipt keeps its outcome, digests, times and hashes, so that the chain still verifies, and loses its payload,
entities and features. The audit record that says who did it, when and which receipts, is written first; it doesn't name the customer.
Nor do the tables' logs: rows are chosen by their places and by md5. Old files go with the vacuum, `time_travel_days` later.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import secrets
import sys
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import redis
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from deploy.history.alone import UpkeepRunningError, alone
from deploy.history.erased import ERASED, ERASED_COLUMNS, kept_digest
from deploy.history.lake import BATCH_ROWS, NoTableError, open_table, schema_of
from deploy.history.publish import NotPublishedError, publish_audit
from deploy.history.upkeep import UpkeepError, delete, replace
from feature_jobs.redis_client import connect
from gateway.contracts import layout, tables
from gateway.contracts.audit import AuditRecord, who
from gateway.contracts.settings import Settings, load_settings
from gateway.contracts.topics import DECISIONS, LABELS, TRANSACTIONS
from gateway.kafka.avro import encode_text

# Places that one audit record and one statement name.
PLACES_MAX = 10_000
# Tables with a transaction_id of which the customer's rows go.
BY_TRANSACTION = (tables.LABELS, tables.GOLD_DECISIONS, tables.FEATURES, tables.TRAINING_SET, tables.BURSTS)
# Raw records, found by the ids in their bytes, of the topics that name customers.
RAW = (tables.BRONZE, tables.QUARANTINE)
RAW_TOPICS = (TRANSACTIONS, DECISIONS, LABELS)
Place = tuple[int, int]


class NothingToEraseError(RuntimeError):
    """The tables know no such customer."""


@dataclass
class Person:
    """What the tables know of one customer. `entities` are ids by entity that nobody else's payments name."""

    customer_id: str
    transactions: set[str] = field(default_factory=set)
    entities: dict[str, set[str]] = field(default_factory=dict)

    @property
    def ids(self) -> list[str]:
        return sorted(set().union(*self.entities.values()))


# The entities that are somebody's, by the column that names them.
OWN = {"card": "card_id", "customer": "customer_id", "device": "device_id", "ip": "ip"}


def find_person(settings: Settings, customer_id: str) -> Person:
    """Their transactions, and the cards, devices and addresses of these that are in no other customer's. Raises `NothingToEraseError`."""
    person = Person(customer_id, entities={entity: set() for entity in OWN})
    person.entities["customer"].add(customer_id)
    others: dict[str, set[str]] = {entity: set() for entity in OWN}
    mine = ds.field("customer_id") == customer_id
    held = [table for name in (tables.SILVER, tables.DECISIONS) if (table := _table(settings, name)) is not None]
    for table in held:
        rows = table.to_pyarrow_dataset().to_table(columns=["transaction_id", *OWN.values()], filter=mine)
        person.transactions |= set(rows["transaction_id"].to_pylist())
        for entity, column in OWN.items():
            person.entities[entity] |= set(rows[column].to_pylist()) - {None}
    if not person.transactions:
        raise NothingToEraseError("the tables know no such customer")
    for table in held:
        for entity, column in OWN.items():
            shared = ds.field(column).isin(sorted(person.entities[entity])) & (ds.field("customer_id") != customer_id)
            others[entity] |= set(table.to_pyarrow_dataset().to_table(columns=[column], filter=shared)[column].to_pylist())
    person.entities = {entity: ids - others[entity] for entity, ids in person.entities.items()}
    return person


def erase_person(
    settings: Settings, person: Person, by: str, reason: str, publish: Callable[[list[AuditRecord]], None]
) -> Generator[str, None, None]:
    """Does it, and says what was done, a line each. `publish` returns when the audit records are safe.

    Silver comes last: an erasure that was interrupted finds the customer there when it is run again. Raises `UpkeepError`,
    `deploy.history.publish.NotPublishedError`, and what Redis raises.
    """
    yield _erase_receipts(settings, person, by, reason, publish)
    for name in RAW:
        yield f"{name}: {_delete_raw(settings, name, person):,} records deleted"
    for name in BY_TRANSACTION:
        yield f"{name}: {_delete_rows(settings, name, 'transaction_id', person.transactions):,} rows deleted"
    yield f"{tables.LABEL_CHANGES}: the customer taken out of {_forget_in_label_changes(settings, person):,} rows"
    rows = sum(_delete_rows(settings, tables.GOLD_ENTITY_HOUR, "entity_id", ids, entity) for entity, ids in person.entities.items())
    yield f"{tables.GOLD_ENTITY_HOUR}: {rows:,} rows deleted"
    yield f"{tables.BURSTS}: {_delete_rows(settings, tables.BURSTS, 'entity_value', person.entities['device']):,} rows of devices deleted"
    yield f"Redis: {erase_in_redis(settings, person):,} values deleted"
    yield f"{tables.SILVER}: {_delete_rows(settings, tables.SILVER, 'transaction_id', person.transactions):,} rows deleted"
    listed = _count(settings, tables.LIST_CHANGES, ds.field("entity_value").isin(person.ids))
    if listed:
        yield f"{tables.LIST_CHANGES}: {listed:,} changes name them and stay, since decisions are replayed by them"


def _erase_receipts(settings: Settings, person: Person, by: str, reason: str, publish: Callable[[list[AuditRecord]], None]) -> str:
    table = _table(settings, tables.DECISIONS)
    if table is None:
        return f"{tables.DECISIONS}: there is none"
    mine = ds.field("customer_id") == person.customer_id
    rows = table.to_pyarrow_dataset().to_table(filter=mine)
    at_ms = time.time_ns() // 1_000_000
    places = list(zip(rows["partition"].to_pylist(), rows["offset"].to_pylist(), strict=True))
    digests = kept_digest(rows)
    subject = f"erasure {secrets.token_hex(8)}"
    told = [[partition, offset, digest] for (partition, offset), digest in zip(places, digests, strict=True)]
    records = [
        AuditRecord(
            at_ms=at_ms,
            who=by,
            action=ERASED,
            subject=subject,
            before=None,
            after=None,
            reason=reason,
            detail=json.dumps({"rows": told[first : first + PLACES_MAX]}),
        )
        for first in range(0, max(len(told), 1), PLACES_MAX)
    ]
    publish(records)
    for first in range(0, len(places), PLACES_MAX):
        some = places[first : first + PLACES_MAX]
        chosen = _emptied(rows.slice(first, PLACES_MAX), at_ms)
        replace(settings, tables.DECISIONS, _by_place(some), chosen, mine & _at(some))
    return f"{tables.DECISIONS}: {len(places):,} receipts emptied, {subject}"


def _emptied(rows: pa.Table, at_ms: int) -> pa.Table:
    for name in (*ERASED_COLUMNS, "erased_at_ms"):
        if name in rows.schema.names:
            place, column = rows.schema.get_field_index(name), rows.schema.field(name)
            values = pa.array([at_ms if name == "erased_at_ms" else None] * rows.num_rows, column.type)
            rows = rows.set_column(place, column, values)
    return rows


def _by_place(places: Iterable[Place]) -> str:
    of_partition: dict[int, list[int]] = {}
    for partition, offset in places:
        of_partition.setdefault(partition, []).append(offset)
    return " or ".join(f"(partition = {p} and {_among('offset', offsets)})" for p, offsets in sorted(of_partition.items()))


def _among(column: str, numbers: Sequence[int]) -> str:
    return f'"{column}" in ({", ".join(map(str, numbers))})'


def _forget_in_label_changes(settings: Settings, person: Person) -> int:
    """Takes the customer out of what a merchant's frauds are counted from."""
    table = _table(settings, tables.LABEL_CHANGES)
    if table is None:
        return 0
    mine = ds.field("customer_id") == person.customer_id
    rows = table.to_pyarrow_dataset().to_table(filter=mine)
    places = list(zip(rows["partition"].to_pylist(), rows["offset"].to_pylist(), strict=True))
    column = rows.schema.field("customer_id")
    without = rows.set_column(rows.schema.get_field_index("customer_id"), column, pa.nulls(rows.num_rows, column.type))
    for first in range(0, len(places), PLACES_MAX):
        some = places[first : first + PLACES_MAX]
        replace(settings, tables.LABEL_CHANGES, _by_place(some), without.slice(first, PLACES_MAX), mine & _at(some))
    return len(places)


def _delete_rows(settings: Settings, name: str, column: str, ids: set[str], entity: str | None = None) -> int:
    gone = ds.field(column).isin(sorted(ids))
    if entity is not None:
        gone &= ds.field("entity") == entity
    if not ids or not _count(settings, name, gone):
        return 0
    rows = 0
    listed = sorted(ids)
    for first in range(0, len(listed), PLACES_MAX):
        some = listed[first : first + PLACES_MAX]
        predicate = _by_md5(column, some) + (f" and entity = '{entity}'" if entity is not None else "")
        left = ds.field(column).isin(some)
        rows += delete(settings, name, predicate, left if entity is None else left & (ds.field("entity") == entity))
    return rows


def _by_md5(column: str, ids: Iterable[str]) -> str:
    """The log keeps a statement for as long as versions can be read: it must not name anybody."""
    digests = ", ".join(f"'{hashlib.md5(one.encode(), usedforsecurity=False).hexdigest()}'" for one in sorted(ids))
    return f"md5({column}) in ({digests})"


def _delete_raw(settings: Settings, name: str, person: Person) -> int:
    """Records whose bytes name the customer, or one of their cards, devices, addresses or payments: as Avro or as JSON."""
    table = _table(settings, name)
    if table is None:
        return 0
    ids = sorted(person.entities["customer"] | person.entities["card"])
    wanted = re.compile(b"|".join(re.escape(pattern) for one in ids for pattern in (encode_text(one), b'"%s"' % one.encode())))
    keys = pa.array([one.encode() for one in ids], pa.binary())
    keyed = "key" in schema_of(table).names
    scanner = table.to_pyarrow_dataset().scanner(
        columns=["topic", "partition", "offset", "value", *(["key"] if keyed else [])],
        filter=ds.field("topic").isin(RAW_TOPICS),
        batch_size=BATCH_ROWS,
        batch_readahead=1,
        fragment_readahead=1,
    )
    found: dict[str, list[Place]] = {}
    for batch in scanner.to_batches():
        hits = pa.array(
            [value is not None and wanted.search(value) is not None for value in batch["value"].to_pylist()], pa.bool_()
        )
        if keyed:
            hits = pc.or_(hits, pc.is_in(batch["key"], keys))
        chosen = batch.filter(hits)
        for topic, partition, offset in zip(*(chosen[n].to_pylist() for n in ("topic", "partition", "offset")), strict=True):
            found.setdefault(topic, []).append((partition, offset))
    rows = 0
    for topic, places in found.items():
        for first in range(0, len(places), PLACES_MAX):
            some = places[first : first + PLACES_MAX]
            gone = (ds.field("topic") == topic) & _at(some)
            rows += delete(settings, name, f"topic = '{topic}' and ({_by_place(some)})", gone)
    return rows


def _at(places: Sequence[Place]) -> ds.Expression:
    """Rows at these places."""
    partitions = sorted({partition for partition, _ in places})
    terms = [
        (ds.field("partition") == partition) & ds.field("offset").isin([offset for p, offset in places if p == partition])
        for partition in partitions
    ]
    return reduce(or_, terms)


def erase_in_redis(settings: Settings, person: Person) -> int:
    """Every value of the customer, and of cards, devices and addresses that are theirs alone, and the answers kept for retries."""
    keys = [
        make(entity, entity_id)
        for entity, ids in person.entities.items()
        for entity_id in ids
        for make in (layout.head_key, layout.tiles_key, layout.early_key, layout.labels_key)
    ]
    keys += [layout.idempotency_key(transaction_id) for transaction_id in person.transactions]
    removed = 0
    with connect(settings.redis) as client:
        for key in keys:
            removed += int(client.delete(key))
    return removed


def _count(settings: Settings, name: str, chosen: ds.Expression) -> int:
    table = _table(settings, name)
    return 0 if table is None else int(table.to_pyarrow_dataset().count_rows(chosen))


def _table(settings: Settings, name: str) -> DeltaTable | None:
    try:
        return open_table(settings, name)
    except NoTableError:
        return None


def erase(argv: Sequence[str]) -> int:
    """Exit status 1 when nothing, or not all of it, was erased."""
    parser = argparse.ArgumentParser(
        prog="fraudgate erase",
        description="Erases one customer's personal data from the Delta tables and Redis. The receipts' chain still verifies.",
    )
    parser.add_argument("--customer", required=True, metavar="ID")
    parser.add_argument("--reason", default="", help="for the audit record: the request's number; name nobody")
    parser.add_argument("--yes", action="store_true", help="don't only say what would be erased")
    options = parser.parse_args(argv)
    settings = load_settings()
    if options.customer in options.reason:
        parser.error("--reason must not name the customer: it is kept")
    try:
        with alone(settings.home_path):
            person = find_person(settings, options.customer)
            known = ", ".join(f"{len(ids)} {entity}" for entity, ids in person.entities.items())
            print(f"{len(person.transactions):,} payments; theirs alone: {known}")
            if not options.yes:
                print("nothing was erased: add --yes")
                return 0
            for line in erase_person(settings, person, who(), options.reason, lambda records: publish_audit(settings, records)):
                print(line, flush=True)
    except (NothingToEraseError, NotPublishedError, UpkeepError, UpkeepRunningError, DeltaError, OSError, redis.RedisError) as exc:
        print(f"fraudgate erase: {exc}", file=sys.stderr)
        return 1
    print(
        f"Old files hold them until fraudgate maintain removes those, {settings.time_travel_days} days from now; Kafka by its retention."
    )
    return 0
