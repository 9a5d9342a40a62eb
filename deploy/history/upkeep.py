"""What keeps the Delta tables small, quick to look things up in, and no older than they may be. Beside the streams that write them.

By delta-rs, so in a process of its own. Rewriting files changes no row: Spark's appends don't mind, and a merge of gold that meets it is
done again (feature_jobs.gold). On a directory Spark's commits aren't conditional: in the microseconds between its look and its rename it
would put its commit in the place of ours. So ours is looked for afterwards, and no checkpoint is made here that could hold what the log
doesn't.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, QueryBuilder, WriterProperties, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError

from deploy.history.lake import NoTableError, open_table, schema_of, uri_of
from gateway.contracts import tables
from gateway.contracts.settings import Settings

# So many smaller files cost every reader.
SMALL_FILE_BYTES = 32 * 1024 * 1024
SMALL_FILES_MIN = 16
TARGET_FILE_BYTES = 128 * 1024 * 1024
# Receipts are put in order again when this part of them came since the last time, or this many files.
UNORDERED_SHARE = 0.1
UNORDERED_FILES_MAX = 400
# A look-up decodes one group; a receipt is a kilobyte.
ROW_GROUP_ROWS = 8_192
# Sums of an hour are put together when hardly anything comes for it any more, and while it is young: nobody looks through years each
# round. What is older stays in parts, which come to the same.
HOUR_IS_OVER, HOUR_IS_OLD = timedelta(hours=2), timedelta(days=7)
HOURS_A_ROUND = 48
# A commit of ours is looked for by its token among so many of the newest.
TOKEN, LOOKED_BACK = "token", 100
ATTEMPTS_MAX = 8
RETRY_S = 0.5
COMPACTED = (
    *(tables.BRONZE, tables.SILVER, tables.QUARANTINE, tables.LABELS, tables.LABEL_CHANGES, tables.LIST_CHANGES, tables.AUDIT),
    *(tables.GOLD_ENTITY_HOUR, tables.GOLD_DECISIONS, tables.FEATURES, tables.TRAINING_SET, tables.DRIFT, tables.BURSTS),
    tables.CHAIN_ANCHORS,
)
NO_HOOKS = PostCommitHookProperties(create_checkpoint=False, cleanup_expired_logs=False)
WRITER = WriterProperties(max_row_group_size=ROW_GROUP_ROWS, compression="ZSTD")
ANCHORS = pa.schema(
    [
        ("partition", pa.int32()),
        ("batch_id", pa.int64()),
        ("offset", pa.int64()),
        ("chain_sha256", pa.binary()),
        ("rows", pa.int64()),
        ("at_ms", pa.int64()),
    ]
)


class UpkeepError(RuntimeError):
    """A change was not committed: others were always quicker. The message says which."""


@dataclass(frozen=True)
class Done:
    """One thing that was done to a table; `what` tells it to a person."""

    table: str
    what: str


def committed(settings: Settings, name: str, change: Callable[[DeltaTable], Any], held: Callable[[DeltaTable], bool]) -> Any:
    """The result of `change`, made anew after each conflict until `held` says of the newest version that it is in it.

    Raises `UpkeepError`, `NoTableError`.
    """
    problem = "its commit was replaced by another's"
    for attempt in range(ATTEMPTS_MAX):
        try:
            result = change(open_table(settings, name))
        except (CommitFailedError, DeltaError) as exc:
            if not _conflict(exc):
                raise
            problem = str(exc)
        else:
            if held(open_table(settings, name)):
                return result
        time.sleep(RETRY_S * (attempt + 1))
    raise UpkeepError(f"{name}: {problem}")


def _conflict(exc: DeltaError) -> bool:
    text = str(exc).lower()
    return isinstance(exc, CommitFailedError) or any(word in text for word in ("conflict", "concurrent", "version already exists"))


def maintain_once(settings: Settings, say: Callable[[Done], None] = lambda _: None, now: datetime | None = None) -> list[Done]:
    """Retention, then order and size of files, then what no promised version needs any more. Raises `UpkeepError`, `DeltaError`."""
    now = now or datetime.now(UTC)
    done: list[Done] = []

    def tell(found: Done | None) -> None:
        if found is not None:
            done.append(found)
            say(found)

    tell(forget_receipts(settings, now))
    for name in (tables.BRONZE, tables.QUARANTINE):
        tell(forget_raw(settings, name, now))
    tell(order_receipts(settings))
    for hour in hours_in_parts(settings, now):
        tell(put_together(settings, hour))
    for name in COMPACTED:
        tell(compact(settings, name))
    for name in tables.TABLES:
        tell(vacuum(settings, name))
    return done


def order_receipts(settings: Settings, always: bool = False) -> Done | None:
    """The table `decisions` sorted by transaction, so that a look-up reads one group of rows; only when enough is new."""
    try:
        table = open_table(settings, tables.DECISIONS)
    except NoTableError:
        return None
    sizes = _sizes(table)
    small = [size for size in sizes if size < SMALL_FILE_BYTES]
    if not always and (
        len(small) < SMALL_FILES_MIN or (sum(small) < UNORDERED_SHARE * sum(sizes) and len(small) < UNORDERED_FILES_MAX)
    ):
        return None

    def change(table: DeltaTable) -> Any:
        return table.optimize.z_order(
            ["transaction_id"], target_size=TARGET_FILE_BYTES, writer_properties=WRITER, post_commithook_properties=NO_HOOKS
        )

    metrics = committed(settings, tables.DECISIONS, change, lambda _: True)
    return Done(tables.DECISIONS, f"sorted by transaction_id: {metrics['numFilesRemoved']} files became {metrics['numFilesAdded']}")


def hours_in_parts(settings: Settings, now: datetime) -> list[datetime]:
    """The hours of `gold_entity_hour` that are over and have an entity in more than one row, the oldest first; HOURS_A_ROUND at most."""
    try:
        table = open_table(settings, tables.GOLD_ENTITY_HOUR)
    except NoTableError:
        return []
    young, over = _sql_time(now - HOUR_IS_OLD), _sql_time(now - HOUR_IS_OVER)
    found = _query(
        table,
        f"select hour from (select hour, entity, entity_id from t where hour between {young} and {over}"  # noqa: S608
        f" group by hour, entity, entity_id having count(*) > 1) group by hour order by hour limit {HOURS_A_ROUND}",
    )
    hours: list[datetime] = found["hour"].to_pylist()
    return hours


def put_together(settings: Settings, hour: datetime) -> Done:
    """One row for each entity of that hour, with the sums of those that the batches appended. What comes later is a row beside it."""
    token, merged = secrets.token_hex(8), [0, 0]

    def change(table: DeltaTable) -> None:
        at = _sql_time(hour)
        rows = _query(
            table,
            "select entity, entity_id, hour, sum(transactions) as transactions, sum(amount_minor) as amount_minor, "  # noqa: S608
            "sum(declined) as declined, max(largest_minor) as largest_minor, max(updated_at) as updated_at, count(*) as parts "
            f"from t where hour = {at} group by entity, entity_id, hour",
        )
        merged[:] = [pc.sum(rows["parts"]).as_py() or 0, rows.num_rows]
        write_deltalake(
            table,
            rows.drop_columns(["parts"]).cast(schema_of(table)),
            mode="overwrite",
            predicate=f"hour = {at}",
            writer_properties=WRITER,
            post_commithook_properties=NO_HOOKS,
            commit_properties=CommitProperties(custom_metadata={TOKEN: token}),
        )

    committed(
        settings, tables.GOLD_ENTITY_HOUR, change, lambda table: any(c.get(TOKEN) == token for c in table.history(LOOKED_BACK))
    )
    return Done(tables.GOLD_ENTITY_HOUR, f"{merged[0]:,} rows of {hour:%Y-%m-%d %H}:00 became {merged[1]:,}")


def _query(table: DeltaTable, sql: str) -> pa.Table:
    """By delta-rs' own engine, which holds what the query groups by and not the table. `sql` calls it t."""
    return pa.table(QueryBuilder().register("t", table).execute(sql).read_all())


def compact(settings: Settings, name: str) -> Done | None:
    """Small files put together, when there are enough of them."""
    try:
        table = open_table(settings, name)
    except NoTableError:
        return None
    if sum(size < SMALL_FILE_BYTES for size in _sizes(table)) < SMALL_FILES_MIN:
        return None

    def change(table: DeltaTable) -> Any:
        return table.optimize.compact(target_size=TARGET_FILE_BYTES, writer_properties=WRITER, post_commithook_properties=NO_HOOKS)

    metrics = committed(settings, name, change, lambda _: True)
    if not metrics["numFilesRemoved"]:
        return None
    return Done(name, f"{metrics['numFilesRemoved']} files became {metrics['numFilesAdded']}")


def _sizes(table: DeltaTable) -> list[int]:
    sizes: list[int] = pa.table(table.get_add_actions(flatten=True))["size_bytes"].to_pylist()
    return sizes


def vacuum(settings: Settings, name: str, hours: int | None = None) -> Done | None:
    """Removes files that no version of the last `time_travel_days` needs. `hours` instead of them is for tests."""
    try:
        table = open_table(settings, name)
    except NoTableError:
        return None
    kept = settings.time_travel_days * 24 if hours is None else hours
    removed = table.vacuum(kept, dry_run=False, enforce_retention_duration=False, post_commithook_properties=NO_HOOKS)
    return Done(name, f"{len(removed)} files removed that no version of the last {kept} hours needs") if removed else None


def forget_raw(settings: Settings, name: str, now: datetime) -> Done | None:
    """Raw records past `bronze_keep_days`."""
    if not settings.bronze_keep_days:
        return None
    before = now - timedelta(days=settings.bronze_keep_days)
    old = ds.field("kafka_timestamp") < pa.scalar(before, pa.timestamp("us", "UTC"))
    try:
        rows = open_table(settings, name).to_pyarrow_dataset().count_rows(old)
    except NoTableError:
        return None
    if not rows:
        return None
    delete(settings, name, f"kafka_timestamp < {_sql_time(before)}", old)
    return Done(name, f"{rows:,} records older than {settings.bronze_keep_days} days deleted")


def forget_receipts(settings: Settings, now: datetime) -> Done | None:
    """Receipts past `decisions_keep_days`, from the beginning of each partition's chain; its end is kept as the table's anchor.

    The newest receipt of a partition stays, however old: the chain goes on from it.
    """
    if not settings.decisions_keep_days:
        return None
    before = now - timedelta(days=settings.decisions_keep_days)
    limit = pa.scalar(before, pa.timestamp("us", "UTC"))
    try:
        table = open_table(settings, tables.DECISIONS)
    except NoTableError:
        return None
    rows = table.to_pyarrow_dataset()
    if not rows.count_rows(ds.field("kafka_timestamp") < limit):
        return None
    deleted = 0
    for partition in sorted(pc.unique(rows.to_table(columns=["partition"])["partition"]).to_pylist()):
        of_partition = ds.field("partition") == partition
        part = rows.to_table(columns=["batch_id", "offset", "kafka_timestamp", "chain_sha256"], filter=of_partition)
        part = part.sort_by([("batch_id", "ascending"), ("offset", "ascending")])
        young = pc.index(pc.greater_equal(part["kafka_timestamp"], limit), True).as_py()
        end = part.num_rows - 1 if young < 0 else young
        if end <= 0:
            continue
        last = part.slice(end - 1, 1).to_pylist()[0]
        if last["chain_sha256"] is not None:
            _anchor(settings, partition, last, end, now)
        batch_id, offset = last["batch_id"], last["offset"]
        earlier = (ds.field("batch_id") < batch_id) | ((ds.field("batch_id") == batch_id) & (ds.field("offset") <= offset))
        predicate = f"partition = {partition} and (batch_id < {batch_id} or (batch_id = {batch_id} and offset <= {offset}))"
        delete(settings, tables.DECISIONS, predicate, of_partition & earlier)
        deleted += end
    return (
        Done(tables.DECISIONS, f"{deleted:,} receipts older than {settings.decisions_keep_days} days deleted") if deleted else None
    )


def _anchor(settings: Settings, partition: int, last: dict[str, Any], rows: int, now: datetime) -> None:
    row = {"partition": partition, **last, "rows": rows, "at_ms": int(now.timestamp() * 1000)}
    row.pop("kafka_timestamp")
    write_deltalake(uri_of(settings, tables.CHAIN_ANCHORS), pa.Table.from_pylist([row], ANCHORS), mode="append")


def delete(settings: Settings, name: str, predicate: str, gone: ds.Expression) -> int:
    """Rows deleted; `gone` is the predicate as a reader spells it. Raises `UpkeepError`, `NoTableError`."""
    table = open_table(settings, name)
    rows = int(table.to_pyarrow_dataset().count_rows(gone))
    replace(settings, name, predicate, schema_of(table).empty_table(), gone)
    return rows


def replace(settings: Settings, name: str, predicate: str, rows: pa.Table, gone: ds.Expression) -> None:
    """`rows`, which the predicate holds for too, in the place of those that it holds for; `gone` is true of none of them afterwards.

    Not by delta-rs' own delete and update: they write texts as views, by which pyarrow can't select. Raises `UpkeepError`, `NoTableError`.
    """

    def change(table: DeltaTable) -> None:
        write_deltalake(
            table,
            rows,
            mode="overwrite",
            predicate=predicate,
            writer_properties=WRITER,
            post_commithook_properties=NO_HOOKS,
        )

    committed(settings, name, change, lambda table: not table.to_pyarrow_dataset().count_rows(gone))


def _sql_time(at: datetime) -> str:
    """An instant in the type that Delta's timestamps are read as."""
    return f"arrow_cast('{at.astimezone(UTC).strftime('%Y-%m-%dT%H:%M:%S.%fZ')}', 'Timestamp(Microsecond, Some(\"UTC\"))')"


def told(done: Sequence[Done]) -> str:
    """For a terminal."""
    return "\n".join(f"{one.table:<18} {one.what}" for one in done) or "nothing to do"
