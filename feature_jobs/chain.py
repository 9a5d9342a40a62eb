"""The chain of hashes over the rows of `decisions`, continued with each batch of silver. Its state is the table itself.

A batch costs one small job, which brings place and hash of each row to the driver, and a broadcast join with what came of it. A replayed
batch whose rows are in the table already changes nothing, and a start reads the newest row of each partition.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import pyarrow as pa
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from gateway.contracts.chain import GENESIS, PLACE, chain_of

NO_BATCH = -1


@dataclass(frozen=True)
class Heads:
    """The newest chained batch of the table, and the chain of the newest row of each partition."""

    batch_id: int
    chains: dict[int, bytes]


def content_column() -> Column:
    """`content_sha256` (gateway.contracts.chain) of rows with payload, schema_id, partition, offset, kafka_timestamp and batch_id."""
    parts = (
        _big_endian(F.col("schema_id"), 4),
        _big_endian(F.col("partition"), 4),
        _big_endian(F.col("offset"), 8),
        _big_endian(F.unix_micros("kafka_timestamp"), 8),
        _big_endian(F.col("batch_id"), 8),
    )
    assert PLACE.size == 32
    place = F.unhex(F.concat(*parts))
    return F.unhex(F.sha2(F.concat(place, F.col("payload")), 256))


def _big_endian(number: Column, size: int) -> Column:
    """The bytes of a number that is not negative, in hexadecimal."""
    return F.lpad(F.hex(number.cast("bigint")), 2 * size, "0")


def load_heads(spark: SparkSession, uri: str) -> Heads:
    """Where the chain of the table at `uri` ends. Two passes, so that only files of the newest batches give up their hashes."""
    rows = spark.read.format("delta").load(uri).where("schema_id is not null")
    newest = rows.groupBy("partition").agg(F.max(F.struct("batch_id", "offset")).alias("at")).collect()
    if not newest:
        return Heads(NO_BATCH, {})
    places = {(row["partition"], row["at"]["batch_id"], row["at"]["offset"]) for row in newest}
    batches = sorted({batch_id for _, batch_id, _ in places})
    offsets = sorted({offset for _, _, offset in places})
    found = (
        rows.where(F.col("batch_id").isin(batches) & F.col("offset").isin(offsets))
        .select("partition", "batch_id", "offset", "chain_sha256")
        .collect()
    )
    chains = {
        row["partition"]: bytes(row["chain_sha256"])
        for row in found
        if (row["partition"], row["batch_id"], row["offset"]) in places
    }
    return Heads(batches[-1], chains)


def links(rows: pa.Table, heads: Heads) -> tuple[pa.Table, dict[int, tuple[int, bytes]]]:
    """(partition, offset and chain_sha256 of each row, offset and chain of the newest row of each partition that has any).

    `rows` are partition, offset and content_sha256 of one batch.
    """
    ordered = rows.sort_by([("partition", "ascending"), ("offset", "ascending")])
    rising = zip(*(ordered[name].to_pylist() for name in ("partition", "offset", "content_sha256")), strict=True)
    newest: dict[int, tuple[int, bytes]] = {}
    linked: list[bytes] = []
    for partition, group in groupby(rising, itemgetter(0)):
        of_partition = list(group)
        linked += chain_of(heads.chains.get(partition, GENESIS), (content for _, _, content in of_partition))
        newest[partition] = (of_partition[-1][1], linked[-1])
    columns = {"partition": ordered["partition"], "offset": ordered["offset"], "chain_sha256": pa.array(linked, pa.binary())}
    return pa.table(columns), newest


@dataclass(frozen=True)
class Linked:
    """Rows with chain_sha256; `heads` are offset and chain of each partition's newest, for the commit's note."""

    rows: DataFrame
    heads: dict[str, tuple[int, str]]


class Chain:
    """The state between batches. `link` one, append it, then say that it is `written`; what failed in between is read anew."""

    def __init__(self, spark: SparkSession, uri: str) -> None:
        self._spark = spark
        self._uri = uri
        self._heads: Heads | None = None
        self._next: Heads | None = None

    def link(self, rows: DataFrame, batch_id: int) -> Linked | None:
        """`rows` with chain_sha256, None when the table holds this batch already. They have content_sha256, partition and offset."""
        if self._heads is None or self._next is not None:
            self._heads, self._next = load_heads(self._spark, self._uri), None
        if batch_id <= self._heads.batch_id:
            return None
        linked, newest = links(rows.select("partition", "offset", "content_sha256").toArrow(), self._heads)
        self._next = Heads(batch_id, self._heads.chains | {partition: chain for partition, (_, chain) in newest.items()})
        joined = rows.join(F.broadcast(rows.sparkSession.createDataFrame(linked)), ["partition", "offset"])
        return Linked(joined, {str(partition): (offset, chain.hex()) for partition, (offset, chain) in newest.items()})

    def written(self) -> None:
        """The rows of the last `link` are in the table."""
        self._heads, self._next = self._next, None
