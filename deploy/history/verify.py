"""Is the table `decisions` what the feature jobs wrote? Hash, columns and chain of each row; what was erased must say by whom.

Two passes: one over everything, in whatever order it lies, for hashes and columns; one over places and hashes, by partition, for the chain.
Called by `fraudgate audit`. About 150 microseconds a row, most of it reading Avro; memory: a batch, and 100 bytes a row of one partition.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from deltalake import DeltaTable

from deploy.history.erased import ERASED_COLUMNS, Erasures, erasures_of, kept_digest
from deploy.history.lake import BATCH_ROWS, NoTableError, open_table, rows_of, schema_of
from deploy.history.payloads import RECEIPT_COLUMNS, Payloads, UnreadableError, column_of
from gateway.contracts import tables
from gateway.contracts.chain import GENESIS, chain_of, content_sha256
from gateway.contracts.settings import Settings

PLACE_COLUMNS = ("schema_id", "partition", "offset", "kafka_timestamp", "batch_id")
CHAIN_COLUMNS = ("payload", "content_sha256", "chain_sha256", "erased_at_ms")
# Breaks that are kept to be shown; all are counted.
BREAKS_MAX = 20
# Commits that are looked through for the newest one of the feature jobs.
COMMITS_MAX = 1_000

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, order=True)
class Break:
    """Where something isn't as it was written; `batch_id` and `offset` are those of the row, or of the one behind what is missing."""

    partition: int
    batch_id: int
    offset: int
    what: str


@dataclass
class Verdict:
    """What was looked at and found.

    `older` are rows from before the chain, `anchored` those that were deleted in time; `heads` the newest row of each partition, and
    `unbounded` are partitions of which the log doesn't say which row is the newest: a loss at their end wouldn't show.
    """

    version: int
    rows: int = 0
    chained: int = 0
    erased: int = 0
    older: int = 0
    anchored: int = 0
    broken: int = 0
    heads: dict[int, tuple[int, str]] = field(default_factory=dict)
    unbounded: list[int] = field(default_factory=list)
    breaks: list[Break] = field(default_factory=list)

    def add(self, found: Break) -> None:
        self.broken += 1
        self.breaks = sorted([*self.breaks, found])[:BREAKS_MAX]


@dataclass(frozen=True)
class Range:
    """Rows that Kafka took in [from_ms, to_ms), None: no bound."""

    from_ms: int | None = None
    to_ms: int | None = None

    def chosen(self) -> ds.Expression | None:
        terms = []
        if self.from_ms is not None:
            terms.append(ds.field("kafka_timestamp") >= _timestamp(self.from_ms))
        if self.to_ms is not None:
            terms.append(ds.field("kafka_timestamp") < _timestamp(self.to_ms))
        if not terms:
            return None
        return terms[0] if len(terms) == 1 else terms[0] & terms[1]


def _timestamp(ms: int) -> pa.Scalar:
    return pa.scalar(ms * 1000, pa.timestamp("us", "UTC"))


def verify(settings: Settings, within: Range | None = None) -> Verdict:
    """Everything within the range. Raises `NoTableError`, `deploy.history.payloads.NoSchemaError`."""
    within = within or Range()
    table = open_table(settings, tables.DECISIONS)
    verdict = Verdict(table.version())
    schema = schema_of(table)
    if "schema_id" not in schema.names:
        verdict.rows = verdict.older = table.to_pyarrow_dataset().count_rows(within.chosen())
        return verdict
    contents = _Contents(Payloads(settings), erasures_of(settings), [n for n in schema.names if n in RECEIPT_COLUMNS], verdict)
    scanner = table.to_pyarrow_dataset().scanner(
        filter=within.chosen(), batch_size=BATCH_ROWS, batch_readahead=1, fragment_readahead=1
    )
    for batch in scanner.to_batches():
        contents.check(batch)
    _check_links(settings, table, within, verdict)
    return verdict


class _Contents:
    """Whether rows are what their hash says, and what their payload says."""

    def __init__(self, payloads: Payloads, erasures: Erasures, columns: list[str], verdict: Verdict) -> None:
        self._payloads, self._erasures, self._columns, self._verdict = payloads, erasures, columns, verdict

    def check(self, batch: pa.RecordBatch) -> None:
        self._verdict.rows += batch.num_rows
        chained = batch.filter(pc.is_valid(batch["schema_id"]))
        self._verdict.older += batch.num_rows - chained.num_rows
        self._verdict.chained += chained.num_rows
        whole = pc.is_valid(chained["payload"])
        self._check_whole(chained.filter(whole))
        if whole.false_count:
            self._check_erased(chained.filter(pc.invert(whole)))

    def _check_whole(self, rows: pa.RecordBatch) -> None:
        if not rows.num_rows:
            return
        payloads = rows["payload"].to_pylist()
        receipts: list[dict[str, Any]] = []
        sound = np.ones(rows.num_rows, bool)
        for i, (place, payload, content, erased) in enumerate(
            zip(_places(rows), payloads, rows["content_sha256"].to_pylist(), rows["erased_at_ms"].to_pylist(), strict=True)
        ):
            complaint, receipt = self._read(place, payload, content)
            if complaint is None and erased is not None:
                complaint = "it says that it was erased and has a payload"
            if complaint is not None or receipt is None:
                sound[i] = False
                self._broken(place, complaint or "")
            else:
                receipts.append(receipt)
        held = rows.filter(pa.array(sound)) if not sound.all() else rows
        for name in self._columns:
            said = [column_of(receipt, name) for receipt in receipts]
            if _same(held.column(name), said):
                continue
            places = _places(held)
            for i, (ours, theirs) in enumerate(zip(held.column(name).to_pylist(), said, strict=True)):
                if not _same(held.column(name).slice(i, 1), [theirs]):
                    self._broken(places[i], f"column {name} is {_short(ours)}, the payload says {_short(theirs)}")

    def _read(self, place: tuple[int, ...], payload: bytes, content: bytes | None) -> tuple[str | None, dict[str, Any] | None]:
        """(what is wrong, the receipt)."""
        schema_id, partition, offset, timestamp_us, batch_id = place
        if None in place or content_sha256(schema_id, partition, offset, timestamp_us, batch_id, payload) != content:
            return "content_sha256 is not that of its place and payload", None
        try:
            return None, self._payloads.receipt(schema_id, payload)
        except UnreadableError as exc:
            return f"the payload is no receipt of schema {schema_id}: {exc}", None

    def _check_erased(self, rows: pa.RecordBatch) -> None:
        kept = kept_digest(rows)
        left = [pc.is_valid(rows[name]).to_pylist() for name in ERASED_COLUMNS if name in rows.schema.names]
        erased = rows["erased_at_ms"].to_pylist()
        for i, (place, erased_at_ms, digest) in enumerate(zip(_places(rows), erased, kept, strict=True)):
            where = (place[1], place[2])
            if erased_at_ms is None:
                self._broken(place, "the payload is missing, and nobody erased it")
            elif where not in self._erasures.rows:
                self._broken(place, "it says that it was erased, and the table audit has no entry of that")
            elif self._erasures.rows[where] != (erased_at_ms, digest):
                self._broken(place, "what the erasure left of it is not what its entry in the table audit says")
            elif any(held[i] for held in left):
                self._broken(place, "it says that it was erased and holds the customer's data")
            else:
                self._verdict.erased += 1

    def _broken(self, place: tuple[int, ...], what: str) -> None:
        _, partition, offset, _, batch_id = (-1 if number is None else number for number in place)
        self._verdict.add(Break(partition, batch_id, offset, what))


def _places(rows: pa.RecordBatch) -> list[tuple[int, ...]]:
    """schema_id, partition, offset, Kafka's timestamp in microseconds and batch_id of each row."""
    columns = [rows["kafka_timestamp"].cast(pa.int64()) if n == "kafka_timestamp" else rows[n] for n in PLACE_COLUMNS]
    return list(zip(*(column.to_pylist() for column in columns), strict=True))


def _same(column: pa.Array, said: list[Any]) -> bool:
    """Floats are compared by their bits, so that NaN equals itself."""
    try:
        expected = pa.array(said, column.type)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return False
    if column.equals(expected):
        return True
    if pa.types.is_list(column.type) and pa.types.is_floating(column.type.value_type):
        lengths = pc.list_value_length(column).equals(pc.list_value_length(expected))
        return bool(lengths) and _bits(column.flatten()) == _bits(expected.flatten())
    if pa.types.is_floating(column.type):
        return bool(pc.is_valid(column).equals(pc.is_valid(expected))) and _bits(column.drop_null()) == _bits(expected.drop_null())
    return False


def _bits(values: pa.Array) -> bytes:
    raw: bytes = values.to_numpy(zero_copy_only=False).tobytes()
    return bool(values.null_count).to_bytes(1) + raw


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _check_links(settings: Settings, table: DeltaTable, within: Range, verdict: Verdict) -> None:
    rows = table.to_pyarrow_dataset()
    columns = ["batch_id", "offset", "content_sha256", "chain_sha256"]
    chained = pc.is_valid(ds.field("schema_id"))
    known = rows.to_table(columns=["partition"], filter=chained)["partition"]
    anchors = _anchors(settings)
    newest = _heads_of_log(table) if within.to_ms is None else {}
    partitions = sorted({*pc.unique(known).to_pylist(), *newest} - {None})
    verdict.unbounded = [partition for partition in partitions if partition not in newest]
    for partition in partitions:
        of_partition = chained & (ds.field("partition") == partition)
        part = rows.to_table(columns=[*columns, "kafka_timestamp"], filter=of_partition).sort_by(
            [("batch_id", "ascending"), ("offset", "ascending")]
        )
        passed = _before(part, anchors.get(partition, []))
        verdict.anchored += sum(anchor.rows for anchor in passed)
        for found in _links(part, partition, within, passed[-1] if passed else None):
            verdict.add(found)
        if part.num_rows:
            last = part.slice(part.num_rows - 1).to_pylist()[0]
            verdict.heads[partition] = (last["offset"], _hex(last["chain_sha256"]))
        if partition in newest and verdict.heads.get(partition) != newest[partition]:
            offset = newest[partition][0]
            verdict.add(
                Break(partition, 2**62, offset, f"the newest row that the feature jobs wrote is offset {offset}: it is not here")
            )


def _links(part: pa.Table, partition: int, within: Range, anchor: Anchor | None) -> Iterator[Break]:
    """What is wrong with the chain of one partition, whose rows come in order."""
    first, end = _extent(part, within)
    batches, offsets = part["batch_id"].to_pylist(), part["offset"].to_pylist()
    contents, chains = part["content_sha256"].to_pylist(), part["chain_sha256"].to_pylist()
    for i in range(first, end):
        if i:
            before = chains[i - 1]
        else:
            before = GENESIS if anchor is None else anchor.chain_sha256
        if contents[i] is None or chains[i] is None or before is None:
            what = "a hash is missing"
        elif chain_of(before, [contents[i]])[0] != chains[i]:
            after = "the beginning" if not i else f"offset {offsets[i - 1]}"
            what = f"chain_sha256 does not follow from {after}: a row is missing, changed or out of its place"
        else:
            continue
        yield Break(partition, -1 if batches[i] is None else batches[i], -1 if offsets[i] is None else offsets[i], what)


def _extent(part: pa.Table, within: Range) -> tuple[int, int]:
    """The rows from the first within the range to the last."""
    at_us = part["kafka_timestamp"].cast(pa.int64()).fill_null(0).to_numpy()
    inside = np.ones(len(at_us), bool)
    if within.from_ms is not None:
        inside &= at_us >= within.from_ms * 1000
    if within.to_ms is not None:
        inside &= at_us < within.to_ms * 1000
    places = np.flatnonzero(inside)
    return (int(places[0]), int(places[-1]) + 1) if len(places) else (0, 0)


@dataclass(frozen=True)
class Anchor:
    """Where the chain of a partition goes on from since older rows were deleted; `rows` of them in all."""

    batch_id: int
    offset: int
    chain_sha256: bytes
    rows: int


def _anchors(settings: Settings) -> dict[int, list[Anchor]]:
    """Of each partition, the oldest first."""
    try:
        table = open_table(settings, tables.CHAIN_ANCHORS)
    except NoTableError:
        return {}
    found: dict[int, list[Anchor]] = {}
    rows = rows_of(table, ["partition", "batch_id", "offset", "chain_sha256", "rows"])
    for row in sorted(rows, key=lambda row: (row["batch_id"], row["offset"])):
        found.setdefault(row.pop("partition"), []).append(Anchor(**row))
    return found


def _before(part: pa.Table, anchors: list[Anchor]) -> list[Anchor]:
    """The anchors before the first row: one behind it belongs to a deletion that did not come to its end."""
    if not part.num_rows:
        return anchors
    first = part.slice(0, 1).to_pylist()[0]
    if first["batch_id"] is None or first["offset"] is None:
        return []
    return [anchor for anchor in anchors if (anchor.batch_id, anchor.offset) < (first["batch_id"], first["offset"])]


def _heads_of_log(table: DeltaTable) -> dict[int, tuple[int, str]]:
    """Offset and chain of the newest row of each partition, as the feature jobs' newest commits say."""
    found: dict[int, tuple[int, str]] = {}
    for commit in table.history(COMMITS_MAX):
        note = commit.get("userMetadata")
        heads = {} if note is None else json.loads(note).get("heads", {})
        for partition, (offset, chain) in heads.items():
            found.setdefault(int(partition), (offset, chain))
    return found


def _hex(value: bytes | None) -> str:
    return "" if value is None else value.hex()


def fingerprint(heads: dict[int, tuple[int, str]]) -> str:
    """One number for all heads, to be noted elsewhere: whoever rewrites the whole chain can't rewrite that."""
    text = "\n".join(f"{partition} {offset} {chain}" for partition, (offset, chain) in sorted(heads.items()))
    return hashlib.sha256(text.encode()).hexdigest()
